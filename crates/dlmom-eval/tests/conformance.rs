//! The extractor's conformance table: gold, text, strict verdict, flexible verdict, rule.

use dlmom_eval::Method::{self, Boxed, Hashes, LastNumber, Phrase, TruncatedReasoning};
use dlmom_eval::{answers_equal, extract, score};

const YES: (bool, bool) = (true, true);
const NO: (bool, bool) = (false, false);
const FLEXIBLE: (bool, bool) = (false, true);

#[rustfmt::skip]
const TABLE: &[(&str, &str, (bool, bool), Method)] = &[
    // Boxes.
    ("18", r"\boxed{18}", YES, Boxed),
    ("18", r"\boxed{\$18.00}", YES, Boxed),
    ("8", r"so \boxed{8} hours. She works from 1:00 PM to 5:00 PM.", YES, Boxed),
    ("6", r"\boxed{6} miles, at an average speed of 4 miles", YES, Boxed),
    ("2000", r"\boxed{2015}", NO, Boxed),
    ("5", r"\boxed{5.}", YES, Boxed),
    ("10080", r"\boxed{10,\!080}", YES, Boxed),
    ("10080", r"\boxed{10{,}080}", YES, Boxed),
    ("10080", r"\boxed{10\,080}", YES, Boxed),
    (r"\frac12", r"\boxed{\dfrac{1}{2}}", YES, Boxed),
    ("1/2", r"\boxed{\frac12}", YES, Boxed),
    ("0.5", r"\boxed{\tfrac{2}{4}}", YES, Boxed),
    ("7/3", r"\boxed{2\frac{1}{3}}", YES, Boxed),
    ("-1/2", r"\boxed{-\frac{1}{2}}", YES, Boxed),
    ("B", r"\boxed{\text{B}}", YES, Boxed),
    ("B", r"\boxed{(b)}", YES, Boxed),
    ("33", r"\boxed{033}", YES, Boxed),
    ("5", r"\boxed{x=5}", YES, Boxed),
    ("18", r"\boxed{3 \times 6 = 18}", YES, Boxed),
    ("50", r"\boxed{50\%}", YES, Boxed),
    ("50%", r"\boxed{50}", YES, Boxed),
    ("x", r"I first thought \boxed{3}, so \boxed{x}", YES, Boxed),
    ("3", r"I first thought \boxed{3}, so \boxed{x}", NO, Boxed),
    ("7", r"\fbox{7}", YES, Boxed),
    ("5", r"\boxed 5", YES, Boxed),
    ("15", r"$\boxed 15$", YES, Boxed),
    ("18", r"\boxed{18 \text{ dollars}}", YES, Boxed),
    ("18", r"\boxed{18\text{ dollars}}", YES, Boxed),
    ("18", r"\boxed{18\ \mathrm{km/h}}", YES, Boxed),
    ("18", r"\boxed{18 apples}", YES, Boxed),
    ("18", r"\boxed{18cm}", YES, Boxed),
    ("90", r"\boxed{90^\circ}", YES, Boxed),
    ("90", r"\boxed{90°}", YES, Boxed),
    ("2", r"\boxed{2x}", NO, Boxed),
    ("-3", "\\boxed{\u{2212}3}", YES, Boxed),
    ("1000000", r"\boxed{1,000,000}", YES, Boxed),
    ("(1,2)", r"\boxed{(2,1)}", NO, Boxed),
    ("(1,2)", r"\boxed{(1, 2)}", YES, Boxed),
    ("[1,2)", r"\boxed{[1,2]}", NO, Boxed),
    ("1", r"\boxed{1,2}", NO, Boxed),
    ("12", r"an empty \boxed{} and \boxed{12} then \boxed{ }", YES, Boxed),
    ("4", r"\boxed{4} and a cut \boxed{5", YES, Boxed),
    (r"\{1\}", r"\boxed{\{1\}}", YES, Boxed),
    ("9", "#### 8\n\\boxed{9}", YES, Boxed),
    // Hashes.
    ("2125", "#### 2,125", YES, Hashes),
    ("2,125", "#### 2125", YES, Hashes),
    ("18", "reasoning\n#### 18", YES, Hashes),
    ("18", "#### $18.00\nThank you for asking about 3 things!", YES, Hashes),
    ("18", "####18", YES, Hashes),
    ("18", "#### **18**", YES, Hashes),
    ("18", "#### 18 dollars.", YES, Hashes),
    ("18", "The total is 18. #### 18", YES, Hashes),
    ("-7", "#### -7", YES, Hashes),
    ("3", "#### 2\n#### 3", YES, Hashes),
    ("2", "#### 2\n#### 3", NO, Hashes),
    ("0.5", "#### 1/2", YES, Hashes),
    ("42", "#### x = 42", YES, Hashes),
    ("42", "#### 42\r\n", YES, Hashes),
    ("42", "#### 42 apples\n#### Step 3: check 6 * 7", YES, Hashes),
    // Phrases.
    ("3/2", "answer: 1 1/2", FLEXIBLE, Phrase),
    ("B", "The answer is **B**.", FLEXIBLE, Phrase),
    ("18", "The answer is 18. There were 3 of them.", FLEXIBLE, Phrase),
    ("18", "The final answer is: $18$.", FLEXIBLE, Phrase),
    ("18", "**Final Answer:** 18 eggs, not 20", FLEXIBLE, Phrase),
    ("18", "Final answer:\n\n18 eggs\n20 hens", FLEXIBLE, Phrase),
    ("7", "So the answer is 3 + 4 = 7.", FLEXIBLE, Phrase),
    ("5", "The answer is 4. No: the answer is 5.", FLEXIBLE, Phrase),
    ("-5", "The answer is -$5.", FLEXIBLE, Phrase),
    ("1250", "Answer: $1,250.", FLEXIBLE, Phrase),
    ("6", "Answer: six, that is 6", FLEXIBLE, Phrase),
    ("4", "#### Step 4\nThe answer is 4", FLEXIBLE, Phrase),
    // Last number.
    ("21", "She pays 3 * 7 which makes 21", FLEXIBLE, LastNumber),
    ("5.5", "It costs 5.5.", FLEXIBLE, LastNumber),
    ("8", "It takes 8 hours, until 5:00 PM", FLEXIBLE, LastNumber),
    ("2", "the answers are 1,2", FLEXIBLE, LastNumber),
    ("5", "10-5", FLEXIBLE, LastNumber),
    ("9", "The answer is a mystery, maybe 9 of them, I say 9\n9", FLEXIBLE, Phrase),
    ("9", "The answer is unclear\nperhaps 9", FLEXIBLE, LastNumber),
    ("12", "Müller buys 12 Brötchen", FLEXIBLE, LastNumber),
    ("3", "#### 1. Add the apples\nthat makes 3", FLEXIBLE, LastNumber),
    // Reasoning.
    ("7", r"<think>\boxed{7}", NO, TruncatedReasoning),
    ("7", r"<think>\boxed{6}</think>\boxed{7}", YES, Boxed),
    ("7", r"\boxed{6}</think>#### 7", YES, Hashes),
    ("7", r"<think>a</think>#### 7<think>b", NO, TruncatedReasoning),
    ("7", r"<think>\boxed{7}</think>", NO, Method::None),
    // Nothing.
    ("7", "", NO, Method::None),
    ("7", "I cannot tell.", NO, Method::None),
    ("1", "1:30", NO, Method::None),
];

#[test]
fn every_row_of_the_table_holds() {
    assert!(TABLE.len() >= 60);
    let mut wrong = Vec::new();
    for (gold, text, expected, method) in TABLE {
        let extraction = extract(text);
        let verdict = score(gold, &extraction);
        if (verdict.correct, verdict.correct_flexible) != *expected || extraction.method != *method
        {
            wrong.push(format!("{gold:?} in {text:?}: {verdict:?} {extraction:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn spans_point_at_the_answer() {
    for (text, raw) in [
        (r"<think>3</think>so \boxed{ 18 }.", " 18 "),
        ("a\n####  2,125 \nb", "2,125"),
        ("The answer is: $1,250.", "$1,250"),
        ("then 7 of 21 left", "21"),
    ] {
        let span = extract(text).span.unwrap();
        assert_eq!(&text[span], raw, "{text}");
    }
}

#[test]
fn equality_is_exact_and_never_between_kinds() {
    assert!(answers_equal("0.1", "1/10"));
    assert!(!answers_equal(
        "0.1",
        "0.1000000000000000055511151231257827"
    ));
    assert!(!answers_equal("0.333333", "1/3"));
    assert!(!answers_equal("1", "one"));
    assert!(!answers_equal("", ""));
    assert!(answers_equal("New York", "new  york"));
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_read_without_panic_and_spans_are_text(
            text in "(\\PC|\\n|\\\\boxed|####|answer is|[{}$<>0-9., ]|</?think>){0,30}",
        ) {
            let extraction = extract(&text);
            if let Some(span) = extraction.span.clone() {
                prop_assert!(text.get(span).is_some());
            }
            prop_assert_eq!(extraction.flexible.is_some(), extraction.span.is_some());
            if extraction.strict.is_some() {
                prop_assert_eq!(&extraction.strict, &extraction.flexible);
            }
        }

        #[test]
        fn a_gold_number_is_found_in_every_style(n in -1_000_000i64..1_000_000, style in 0usize..7) {
            let gold = n.to_string();
            let text = match style {
                0 => format!("\\boxed{{{n}}}"),
                1 => format!("steps 1, 2\n#### {n}"),
                2 => format!("The answer is {n}."),
                3 => format!("**Answer:** {n} units"),
                4 => format!("3 + 4, then {n}"),
                5 => format!("$\\boxed{{{n}.00}}$ in 7 days"),
                _ => format!("<think>12</think>Final answer: **{n}**"),
            };
            prop_assert!(score(&gold, &extract(&text)).correct_flexible, "{}", text);
        }
    }
}
