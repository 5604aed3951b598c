//! The real GSM8K rows, where they are at hand: a folder `bench-data` under `DLMOM_SHARED` or `../shared`.

use std::path::{Path, PathBuf};

use dlmom_eval::{extract, load_gsm8k, score};

fn shared() -> PathBuf {
    match std::env::var_os("DLMOM_SHARED") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
    }
}

#[test]
fn gsm8k_loads_and_every_gold_is_found_in_its_own_solution() {
    let file = shared().join("bench-data/gsm8k_test.jsonl");
    if !file.is_file() {
        eprintln!(
            "skipped: {} is not there (set DLMOM_SHARED)",
            file.display()
        );
        return;
    }
    let set = load_gsm8k(&file).unwrap();
    assert!(set.items.len() >= 600, "{} items", set.items.len());
    let source = std::fs::read_to_string(&file).unwrap();
    for (item, line) in set.items.iter().zip(source.lines()) {
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
