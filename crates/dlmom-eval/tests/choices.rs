//! The conformance table of choices: text, strict letter, flexible letter, rule.

use dlmom_eval::Method::{self, Boxed, Hashes, Marked, OptionText, Phrase, TruncatedReasoning};
use dlmom_eval::extract_choice;

fn options() -> Vec<String> {
    ["salt", "salt water", "A crystal", "the Moon"]
        .map(str::to_owned)
        .to_vec()
}

#[rustfmt::skip]
const TABLE: &[(&str, &str, Method)] = &[
    // Strict forms: a box or a line with hashes. `=B` is both strict and flexible, `B` flexible only, `-` none.
    ("#### B", "=B", Hashes),
    ("A. salt: no\nB. salt water: yes\n#### B", "=B", Hashes),
    ("####B", "=B", Hashes),
    ("#### (B)", "=B", Hashes),
    ("#### **B**", "=B", Hashes),
    ("#### b.", "=B", Hashes),
    ("#### $B$", "=B", Hashes),
    ("#### Option B", "=B", Hashes),
    ("#### B. salt water", "=B", Hashes),
    ("#### salt water", "=B", Hashes),
    ("#### A\nNo, rather\n#### B\n", "=B", Hashes),
    ("#### A. salt\nno\n#### B. salt water\nyes\n\nThe answer is C", "C", Phrase),
    ("#### Step 1\nThe answer is B", "B", Phrase),
    (r"\boxed{B}", "=B", Boxed),
    (r"so \boxed{\text{B}}.", "=B", Boxed),
    (r"so \boxed{\textbf{(B)}}.", "=B", Boxed),
    (r"\boxed{\mathrm{b}}", "=B", Boxed),
    (r"\boxed{B. salt water}", "=B", Boxed),
    (r"\boxed{\text{B) salt water}}", "=B", Boxed),
    (r"\boxed{salt water}", "=B", Boxed),
    (r"\boxed{\text{Salt  Water}}", "=B", Boxed),
    (r"\fbox{B}", "=B", Boxed),
    (r"$\boxed B$", "=B", Boxed),
    (r"first \boxed{A}, then \boxed{B}", "=B", Boxed),
    (r"\boxed{B} weighs \boxed{3}", "=B", Boxed),
    ("#### A\n\\boxed{B}", "=B", Boxed),
    // Letters that no option has are no answers.
    ("#### E", "-", Method::None),
    (r"\boxed{E}", "-", Method::None),
    ("The answer is E.", "-", Method::None),
    ("#### 2", "-", Method::None),
    ("(F)", "-", Method::None),
    // Phrases.
    ("The answer is B", "B", Phrase),
    ("The answer is B.", "B", Phrase),
    ("the answer is b.", "B", Phrase),
    ("The answer is (B).", "B", Phrase),
    ("The answer is **B**.", "B", Phrase),
    ("The correct answer is: **B. salt water**", "B", Phrase),
    ("The answer is B because it flows.", "B", Phrase),
    ("The answer is A because it is dry.", "A", Phrase),
    ("The answer is option B", "B", Phrase),
    ("The correct option is B) salt water", "B", Phrase),
    ("Best choice: (B)", "B", Phrase),
    ("Answer: B", "B", Phrase),
    ("**Answer:** B", "B", Phrase),
    ("**Answer: B**", "B", Phrase),
    ("Answer:\n\nB\n", "B", Phrase),
    ("Final answer: $B$", "B", Phrase),
    ("Answer: [B]", "B", Phrase),
    (r"The answer is $\text{B}$.", "B", Phrase),
    ("The answer is A. No: the answer is B.", "B", Phrase),
    ("The answer is B, not A.", "B", Phrase),
    ("The answer is salt water.", "B", Phrase),
    ("Answer: the Moon", "D", Phrase),
    ("Answer: A crystal", "C", Phrase),
    // Letters that stand out.
    ("B", "B", Marked),
    ("b", "B", Marked),
    ("B.", "B", Marked),
    ("(B)", "B", Marked),
    ("**B**", "B", Marked),
    ("**(B)**", "B", Marked),
    ("**B. salt water**", "B", Marked),
    ("B. salt water", "B", Marked),
    ("B) salt water", "B", Marked),
    ("B: salt water", "B", Marked),
    ("B. Because it holds ions.", "B", Marked),
    ("I would go for (B) here.", "B", Marked),
    ("It holds ions.\n\nB", "B", Marked),
    ("It holds ions.\nB. salt water.", "B", Marked),
    ("It holds ions.\nB. salt water. That is all.", "B", Marked),
    ("- B. salt water", "B", Marked),
    ("(A) is dry, (C) is solid.\nSo it is (B).", "B", Marked),
    ("A. salt\nB. salt water\nC. A crystal\nD. the Moon\n\nB", "B", Marked),
    // The text of an option.
    ("It must be salt water.", "B", OptionText),
    ("SALT", "A", OptionText),
    ("I know that the moon does it.", "D", OptionText),
    ("Not salt, not the Moon.\nSalt water!", "B", OptionText),
    // Nothing is guessed.
    ("", "-", Method::None),
    ("I do not know.", "-", Method::None),
    ("The answer is a mystery.", "-", Method::None),
    ("A thing like this is hard.", "-", Method::None),
    ("Either (A) or (B).", "-", Method::None),
    ("Either salt or the Moon.", "-", Method::None),
    ("basalt and saltwater", "-", Method::None),
    ("A. salt\nB. salt water\nC. A crystal\nD. the Moon", "-", Method::None),
    ("A. salt: no\nB. salt water: no", "-", Method::None),
    ("A. salt, a mineral: no", "-", Method::None),
    ("f(B) and B.2", "-", Method::None),
    // Reasoning.
    ("<think>#### A</think>#### B", "=B", Hashes),
    ("<think>#### B", "-", TruncatedReasoning),
    ("<think>#### B</think>", "-", Method::None),
];

#[test]
fn every_row_of_the_table_holds() {
    let mut wrong = Vec::new();
    for (text, expected, method) in TABLE {
        let found = extract_choice(text, &options());
        let said = match (&found.strict, &found.flexible) {
            (Some(strict), Some(flexible)) if strict == flexible => format!("={strict}"),
            (None, Some(flexible)) => flexible.clone(),
            (None, None) => "-".to_owned(),
            (strict, flexible) => format!("{strict:?} {flexible:?}"),
        };
        if said != *expected || found.method != *method {
            wrong.push(format!("{text:?}: {said} by {:?}", found.method));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn options_of_one_text_are_never_told_apart_by_it() {
    let options = ["tin", "zinc", "tin"].map(str::to_owned);
    assert_eq!(extract_choice("It is tin.", &options).flexible, None);
    assert_eq!(extract_choice("#### tin", &options).flexible, None);
    // A text that is a letter is read as the letter.
    let gases = ["C", "NO", "CO"].map(str::to_owned);
    assert_eq!(
        extract_choice("#### C", &gases).strict.as_deref(),
        Some("C")
    );
    assert_eq!(extract_choice("A. C\nB. NO\nC. CO", &gases).flexible, None);
    let zinc = extract_choice("It is zinc.", &options);
    assert_eq!(zinc.flexible.as_deref(), Some("B"));
}

#[test]
fn letters_follow_the_number_of_options() {
    for count in 2..=10usize {
        let options: Vec<String> = (0..count).map(|i| format!("thing {i}")).collect();
        for index in 0..11 {
            let text = format!("#### {}", dlmom_eval::letter(index));
            assert_eq!(
                extract_choice(&text, &options).strict.is_some(),
                index < count,
                "{text} of {count}"
            );
        }
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_read_without_panic_and_answers_are_letters_of_options(
            text in "(\\PC|\\n|\\\\boxed|####|answer is |option|\\*\\*|salt|[ABCDE]|[{}$<>().: ]|</?think>){0,30}",
            count in 2usize..5,
        ) {
            let options = &super::options()[..count];
            let found = extract_choice(&text, options);
            for answer in found.strict.iter().chain(&found.flexible) {
                prop_assert!((0..count).any(|i| *answer == dlmom_eval::letter(i).to_string()));
            }
            if found.strict.is_some() {
                prop_assert_eq!(&found.strict, &found.flexible);
            }
        }

        #[test]
        fn any_option_is_read(text in "\\PC{0,20}", a in "\\PC{0,12}", b in "\\PC{0,12}") {
            let found = extract_choice(&text, &[a, b]);
            prop_assert_eq!(found.flexible.is_some(), !matches!(found.method, Method::None | TruncatedReasoning));
        }
    }
}
