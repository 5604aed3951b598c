//! The benchmarks shipped with the tiny experts: they load, and what they call right is right.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::Path;

use dlmom_eval::{BenchSpec, CodeRunner, Item, Limits, NoJudge, grade, load};

fn items(word: &str) -> Vec<Item> {
    let spec = BenchSpec::parse(word).unwrap();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python/dlmom_rs/data");
    let file = data.join(format!("{}.jsonl", spec.info().name()));
    load(spec.schema(), &file).unwrap().items
}

#[test]
fn gold_numbers_and_letters_are_right() {
    for word in ["tinygsm", "tinymc"] {
        for item in items(word) {
            let found = grade(&item, &format!("#### {}", item.gold), &mut NoJudge).unwrap();
            assert!(found.correct && found.correct_flexible, "{item:?}");
        }
    }
}

#[cfg(unix)]
#[test]
fn reference_solutions_pass_and_a_body_that_returns_nothing_does_not() {
    let mut judge = CodeRunner::find(None, Limits::default()).unwrap();
    // One in eight keeps this short; the Python tests run them all in one process.
    for item in items("tinycode").iter().step_by(8) {
        let gold = grade(item, &item.gold, &mut judge).unwrap();
        assert!(gold.correct, "{}: {gold:?}", item.id);
        let nothing = grade(item, "    return None", &mut judge).unwrap();
        assert!(!nothing.correct_flexible, "{}", item.id);
    }
}
