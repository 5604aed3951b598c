//! Committed files that are generated: JSON schemas, and what the YAML parser reads from every file under `configs/`.
//!
//! `DLMOM_UPDATE_GENERATED=1` rewrites them.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests fail as tests do"
)]

use std::path::{Path, PathBuf};

use dlmom_runs::{Experiment, Overrides, Registry, Setting};
use serde_json::{Map, Value, json};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn check(path: &Path, expected: &str) {
    if std::env::var_os("DLMOM_UPDATE_GENERATED").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("can create");
        std::fs::write(path, expected).expect("can write");
        return;
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == expected,
        "{} is out of date; run the test with DLMOM_UPDATE_GENERATED=1",
        path.display()
    );
}

#[test]
fn schemas_are_up_to_date() {
    for (name, text) in dlmom_runs::schema::schemas().unwrap() {
        check(&repository().join("configs/schema").join(name), &text);
    }
}

/// Paths relative to `configs/`, with slashes, sorted.
fn yaml_files(folder: &Path, prefix: &str, found: &mut Vec<(String, PathBuf)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{prefix}{}", path.file_name().unwrap().to_string_lossy());
        if path.is_dir() {
            yaml_files(&path, &format!("{name}/"), found);
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml") {
            found.push((name, path));
        }
    }
    found.sort();
}

#[test]
fn what_the_parser_reads_is_recorded_for_other_parsers() {
    let mut files = Vec::new();
    yaml_files(&repository().join("configs"), "", &mut files);
    assert!(files.iter().any(|(name, _)| name == "suites.yaml"));
    let golden: Map<String, Value> = files
        .into_iter()
        .map(|(name, path)| {
            let text = std::fs::read_to_string(&path).unwrap();
            let value = dlmom_runs::yaml::from_str(&name, &text).unwrap();
            (name, value)
        })
        .collect();
    let text = serde_json::to_string_pretty(&golden).unwrap() + "\n";
    check(
        &repository().join("crates/dlmom-runs/tests/golden/configs.json"),
        &text,
    );
}

#[test]
fn what_the_emitter_writes_is_recorded_for_other_parsers() {
    let setting = Setting::lockstep(2, false);
    let overrides = Overrides {
        answer_cue: Some("yes: #1\n'x'".into()),
        ..Overrides::default()
    };
    let plan = Registry::builtin()
        .unwrap()
        .expand(&[], &[], &setting, &overrides)
        .unwrap();
    let golden: Vec<Value> = plan
        .cells
        .iter()
        .map(|cell| {
            // Through text, so that 32-bit numbers keep their short form.
            let json = serde_json::to_string(&cell.experiment).unwrap();
            let value: Value = serde_json::from_str(&json).unwrap();
            let yaml = dlmom_runs::yaml::to_string(&cell.experiment).unwrap();
            assert_eq!(
                dlmom_runs::yaml::from_str::<Experiment>("x", &yaml).unwrap(),
                cell.experiment
            );
            json!({ "yaml": yaml, "value": value })
        })
        .collect();
    let text = serde_json::to_string_pretty(&golden).unwrap() + "\n";
    check(
        &repository().join("crates/dlmom-runs/tests/golden/emitted.json"),
        &text,
    );
}
