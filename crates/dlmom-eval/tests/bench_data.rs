//! Rows of the public data sets, where they are at hand: a folder `bench-data` under `DLMOM_SHARED` or `../shared`.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "helpers of tests fail as tests do, and say what they skip"
)]

use std::path::{Path, PathBuf};

use dlmom_eval::{CodeRunner, Item, Limits, NoJudge, Schema, Task, extract, grade, load, score};

fn shared() -> PathBuf {
    match std::env::var_os("DLMOM_SHARED") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
    }
}

/// The rows of a file, or nothing and a word about it.
fn rows(schema: Schema, name: &str) -> Option<Vec<Item>> {
    let file = shared().join("bench-data").join(name);
    if !file.is_file() {
        eprintln!(
            "skipped: {} is not there (set DLMOM_SHARED)",
            file.display()
        );
        return None;
    }
    Some(load(schema, &file).unwrap().items)
}

#[test]
fn gsm8k_loads_and_every_gold_is_found_in_its_own_solution() {
    let Some(items) = rows(Schema::Gsm8k, "gsm8k_test.jsonl") else {
        return;
    };
    assert!(items.len() >= 600, "{} items", items.len());
    let file = shared().join("bench-data/gsm8k_test.jsonl");
    let source = std::fs::read_to_string(&file).unwrap();
    for (item, line) in items.iter().zip(source.lines()) {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let verdict = score(&item.gold, &extract(row["answer"].as_str().unwrap()));
        assert!(verdict.correct, "{line}");
        for style in [
            "\\boxed{X}",
            "The answer is $X.",
            "so she has X left",
            "\\boxed{\\$X.00}",
        ] {
            let text = style.replace('X', &item.gold);
            assert!(
                score(&item.gold, &extract(&text)).correct_flexible,
                "{text}"
            );
        }
    }
}

#[test]
fn every_reference_solution_of_humaneval_passes_and_an_empty_one_does_not() {
    let Some(items) = rows(Schema::HumanEval, "humaneval.jsonl") else {
        return;
    };
    assert!(items.len() >= 80, "{} items", items.len());
    let mut judge = CodeRunner::find(None, Limits::default()).unwrap();
    for item in &items {
        let Task::Code { entry_point, .. } = &item.task else {
            panic!("code")
        };
        let at = item.question.rfind(&format!("def {entry_point}")).unwrap();
        // Without what the prompt holds before the function: the judge must put it there.
        let block = format!("```python\n{}{}\n```", &item.question[at..], item.gold);
        for (text, right) in [
            (item.gold.as_str(), true),
            (&block, true),
            ("    return None\n", false),
        ] {
            let found = grade(item, text, &mut judge).unwrap();
            assert_eq!(found.correct, right, "{}: {found:?}", item.id);
        }
    }
}

#[test]
fn the_right_letter_of_arc_is_read_in_every_style() {
    let Some(items) = rows(Schema::Arc, "arc_challenge_test.jsonl") else {
        return;
    };
    assert!(items.len() >= 500, "{} items", items.len());
    let styles = [
        "#### X",
        "It follows.\n#### (X)",
        "\\boxed{X}",
        "\\boxed{\\text{X}}",
        "The answer is X.",
        "The answer is **X**.",
        "Answer: X",
        "**Answer:** (X)",
        "(X)",
        "**X**",
        "X",
        "X. TEXT",
        "X) TEXT",
        "**X. TEXT**",
        "The correct answer is X: TEXT",
        "Because of this, I choose (X) TEXT",
        "#### X. TEXT",
        "\\boxed{TEXT}",
        "TEXT",
        "The answer is TEXT",
    ];
    let mut wrong = Vec::new();
    for item in &items {
        let Task::Choice { options } = &item.task else {
            panic!("choice")
        };
        let gold = &options[usize::from(item.gold.as_bytes()[0] - b'A')];
        for style in styles {
            let text = style
                .replace("TEXT", "\u{1}")
                .replace('X', &item.gold)
                .replace('\u{1}', gold);
            if !grade(item, &text, &mut NoJudge).unwrap().correct_flexible {
                wrong.push(format!("{} {text:?}", item.id));
            }
        }
        // An enumeration of all options chooses none.
        let letters = ('A'..).zip(options);
        let all: Vec<String> = letters.map(|(l, o)| format!("{l}. {o}")).collect();
        let found = grade(item, &all.join("\n"), &mut NoJudge).unwrap();
        assert_eq!(found.answer_flexible, None, "{}", item.id);
    }
    let share = wrong.len() as f64 / (items.len() * styles.len()) as f64;
    eprintln!("{} not read:\n{}", wrong.len(), wrong.join("\n"));
    assert!(share <= 0.005, "{share}");
}
