//! The run directory: one writer, resume, repair.
#![expect(clippy::expect_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::path::Path;

use common::{ENSEMBLE, context, experiment, plan, row, write_rows};
use dlmom_runs::rundir::{MANIFEST_FORMAT, read_config};
use dlmom_runs::{
    Invocation, JsonlError, Manifest, ManifestCell, Overrides, Plan, RawRow, RawWriter, Registry,
    Repair, RunDir, RunDirError, TraceLine, read_manifest,
};
use dlmom_runtime::Trace;
use proptest::prelude::*;
use serde_json::{Value, json};

fn manifest(plan: &Plan, context: Value) -> Manifest {
    Manifest {
        format: MANIFEST_FORMAT,
        version: "0.1.0".into(),
        bench: "tinygsm".into(),
        data_sha256: "00".into(),
        items: 3,
        seeds: vec![0, 1],
        samples: 1,
        batch_size: 8,
        models: json!([{"name": "m"}]),
        shared_model: false,
        experts: 2,
        ln_vocab: Some(491f64.ln()),
        cells: ManifestCell::of_plan(plan, &context, None).expect("finite knobs"),
        context,
        environment: json!({"uname": "x"}),
        invocations: vec![Invocation {
            argv: vec!["run".into()],
            ..Invocation::default()
        }],
        pilot: None,
        notes: Value::Null,
    }
}

fn open(out: &Path, plan: &Plan, resume: bool) -> Result<RunDir, RunDirError> {
    RunDir::open(out, plan, manifest(plan, context()), resume)
}

#[test]
fn a_fresh_folder_holds_manifest_and_expanded_configs() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("deep/run");
    let plan = plan(&["A1", "A3"], &[], &ENSEMBLE);
    let dir = open(&out, &plan, false).unwrap();
    assert!(!dir.resumed());
    assert_eq!(read_manifest(&out).unwrap().unwrap(), *dir.manifest());
    for cell in &plan.cells {
        let config = read_config(&out, &cell.experiment.id).unwrap();
        let skipped = cell.experiment.id == "A3.1";
        assert_eq!(config, (!skipped).then(|| cell.experiment.clone()));
    }
    assert_eq!(read_config(&out, "nope").unwrap(), None);
}

#[test]
fn a_second_writer_is_refused_and_told_who_holds_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let plan = plan(&["A1"], &[], &ENSEMBLE);
    let first = open(folder.path(), &plan, false).unwrap();
    let error = open(folder.path(), &plan, true).unwrap_err();
    let holder = format!("another run writes here (process {})", std::process::id());
    assert!(error.to_string().ends_with(&holder), "{error}");
    drop(first);
    open(folder.path(), &plan, true).unwrap();
}

#[test]
fn resuming_keeps_what_was_recorded_and_adds_what_is_new() {
    let folder = tempfile::tempdir().unwrap();
    let one = plan(&["A1"], &["A1.2"], &ENSEMBLE);
    drop(open(folder.path(), &one, false).unwrap());
    let error = open(folder.path(), &one, false).unwrap_err();
    assert!(matches!(error, RunDirError::Exists { .. }));
    let more = plan(&["A2"], &[], &ENSEMBLE);
    let mut current = manifest(&more, context());
    current.seeds = vec![1, 2];
    let mut dir = RunDir::open(folder.path(), &more, current, true).unwrap();
    assert!(dir.resumed());
    let ids: Vec<&str> = dir.manifest().cells.iter().map(|c| c.id.as_str()).collect();
    assert_eq!(
        ids,
        [
            "REF", "A1.2", "A2.1", "A2.2", "A2.3", "A2.4", "A2.5", "A2.6", "A2.7"
        ]
    );
    assert_eq!(dir.manifest().seeds, [0, 1, 2]);
    assert_eq!(dir.manifest().invocations.len(), 2);
    dir.update_manifest(|m| m.invocations[1].finished_at = Some(5.0))
        .unwrap();
    let read = read_manifest(folder.path()).unwrap().unwrap();
    assert_eq!(read.invocations[1].finished_at, Some(5.0));
}

#[test]
fn another_configuration_is_refused_field_by_field() {
    let folder = tempfile::tempdir().unwrap();
    let before = plan(&["A1"], &[], &ENSEMBLE);
    drop(open(folder.path(), &before, false).unwrap());
    let overrides = Overrides {
        max_steps: Some(64),
        ..Overrides::default()
    };
    let after = Registry::builtin()
        .unwrap()
        .expand(&["A1".into()], &["A1.2".into()], &ENSEMBLE, &overrides)
        .unwrap();
    let mut other = context();
    other["dtype"] = json!("bf16");
    let error = RunDir::open(folder.path(), &after, manifest(&after, other), true).unwrap_err();
    let text = error
        .to_string()
        .replace(&folder.path().display().to_string(), "OUT");
    insta::assert_snapshot!("other_config", text);
}

#[test]
fn folders_of_somebody_else_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let plan = plan(&["A1"], &[], &ENSEMBLE);
    let rows = folder.path().join("raw/A1.1.jsonl");
    write_rows(&rows, &[row(&experiment("A1.1"), 1, 0, None, 0)]);
    for resume in [false, true] {
        let error = open(folder.path(), &plan, resume).unwrap_err();
        assert!(matches!(error, RunDirError::NoManifest { .. }));
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    assert!(matches!(
        open(&file, &plan, false),
        Err(RunDirError::Io { .. })
    ));
    let broken = tempfile::tempdir().unwrap();
    std::fs::write(broken.path().join("run.json"), "{").unwrap();
    assert!(matches!(
        open(broken.path(), &plan, true),
        Err(RunDirError::BadManifest { .. })
    ));
}

#[test]
fn rows_are_found_again_and_foreign_or_broken_ones_refused() {
    let folder = tempfile::tempdir().unwrap();
    let cell = experiment("A1.2");
    let hash = cell.config_hash(&context()).unwrap();
    let path = folder.path().join("A1.2.jsonl");
    let rows: Vec<RawRow> = (0..3).map(|i| row(&cell, i, 0, Some(i), 0)).collect();
    let (mut writer, repair) = RawWriter::open(&path, &hash).unwrap();
    assert_eq!(repair, Repair::None);
    for row in &rows {
        assert!(!writer.is_done(&row.key()));
        writer.append(row).unwrap();
        assert!(writer.is_done(&row.key()));
    }
    writer.sync().unwrap();
    drop(writer);
    let (writer, _) = RawWriter::open(&path, &hash).unwrap();
    assert_eq!(writer.done().len(), 3);
    drop(writer);
    let error = RawWriter::open(&path, "beef").unwrap_err();
    assert!(
        matches!(error, JsonlError::OtherConfig { line: 1, .. }),
        "{error}"
    );
    let mut text = std::fs::read_to_string(&path).unwrap();
    text.insert_str(text.find('\n').unwrap() + 1, "{\"item_id\": 3}\n");
    std::fs::write(&path, text).unwrap();
    let error = RawWriter::open(&path, &hash).unwrap_err().to_string();
    assert!(
        error.contains("A1.2.jsonl:2:13: not a row: invalid type"),
        "{error}"
    );
}

#[test]
fn traces_are_lines_of_columns() {
    let folder = tempfile::tempdir().unwrap();
    let plan = plan(&["A1"], &[], &ENSEMBLE);
    let dir = open(folder.path(), &plan, false).unwrap();
    let line = TraceLine {
        experiment: "A1.2".into(),
        key: row(&experiment("A1.2"), 1, 0, None, 0).key(),
        trace: Trace {
            entropy: vec![0.5, 0.25],
            ..Trace::default()
        },
    };
    let mut writer = dir.trace_writer("A1.2").unwrap();
    writer.append(&line).unwrap();
    let text = std::fs::read_to_string(writer.path()).unwrap();
    assert!(text.starts_with("{\"experiment\":\"A1.2\",\"item_id\":\"item-1\",\"seed\":0,\"sample\":0,\"entropy\":[0.5,0.25],"));
    assert_eq!(serde_json::from_str::<TraceLine>(&text).unwrap(), line);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_kill_at_any_byte_loses_no_whole_line(count in 1usize..5, cut in 0.0f64..=1.0, again in 0.0f64..=1.0) {
        let folder = tempfile::tempdir().unwrap();
        let cell = experiment("A1.2");
        let hash = cell.config_hash(&context()).unwrap();
        let path = folder.path().join("A1.2.jsonl");
        let rows: Vec<RawRow> =
            (0..count as u64).map(|i| row(&cell, i, 0, Some(i), i as u32)).collect();
        let mut text: Vec<u8> = Vec::new();
        let mut ends = Vec::new();
        for row in &rows {
            text.extend(serde_json::to_vec(row).unwrap());
            // The object is whole before its line end is.
            ends.push(text.len());
            text.push(b'\n');
        }
        // Killed twice: once while writing, once while writing on.
        let mut done = 0;
        for point in [cut, again] {
            let start = if done == 0 { 0 } else { ends[done - 1] + 1 };
            let stop = start + ((text.len() - start) as f64 * point) as usize;
            let mut bytes = std::fs::read(&path).unwrap_or_default();
            prop_assert_eq!(&bytes[..], &text[..start]);
            bytes.extend(&text[start..stop]);
            std::fs::write(&path, &bytes).unwrap();
            let (writer, repair) = RawWriter::open(&path, &hash).unwrap();
            done = ends.iter().filter(|end| **end <= stop).count();
            prop_assert_eq!(writer.done().len(), done);
            for row in &rows[..done] {
                prop_assert!(writer.is_done(&row.key()));
            }
            if let Repair::Torn { bytes, aside } = repair {
                let kept = std::fs::read(aside).unwrap();
                prop_assert!(kept.len() as u64 > bytes);
            }
        }
        let (mut writer, repair) = RawWriter::open(&path, &hash).unwrap();
        prop_assert_eq!(repair, Repair::None);
        for row in &rows[done..] {
            writer.append(row).unwrap();
        }
        drop(writer);
        prop_assert_eq!(std::fs::read(&path).unwrap(), text);
    }
}
