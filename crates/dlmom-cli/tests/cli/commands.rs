//! The command line without Python: help, what needs Python, exit statuses, aggregation of raw files.

use std::path::Path;

use dlmom_cli::ExitStatus;

use super::{call, questions, text};

#[test]
fn help_of_every_command() {
    for arguments in [
        &["--help"][..],
        &["run", "--help"],
        &["aggregate", "--help"],
        &["compare", "--help"],
        &["calibrate", "--help"],
        &["replay", "--help"],
        &["validate", "--help"],
        &["list", "--help"],
        &["doctor", "--help"],
        &["schema", "--help"],
        &["completions", "--help"],
    ] {
        let done = call(arguments);
        assert_eq!(done.status, ExitStatus::Success);
        insta::assert_snapshot!(arguments.join(" "), done.out);
    }
}

#[test]
fn what_needs_python_says_so_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let rows = questions(folder.path(), 1);
    let bench = format!("gsm8k:{}", rows.display());
    let out = text(&out);
    let done = call(&[
        "run", "--suite", "A1", "--model", "m", "--bench", &bench, "--out", out,
    ]);
    assert_eq!(done.status, ExitStatus::Usage);
    insta::assert_snapshot!(done.err, @"error: run needs Python: use the dlmom-rs command of the Python package, or --backend mock");
    let done = call(&["generate", "--model", "m", "--prompt", "How many?"]);
    assert_eq!(done.status, ExitStatus::Usage);
    insta::assert_snapshot!(done.err, @"error: generate needs Python: use the dlmom-rs command of the Python package");
    let done = call(&["plot", text(folder.path())]);
    assert_eq!(done.status, ExitStatus::Usage);
    insta::assert_snapshot!(done.err, @"error: plot needs Python: use the dlmom-rs command of the Python package");
    let shipped = call(&[
        "run", "--suite", "A1", "--model", "m", "--bench", "tinygsm", "--out", out,
    ]);
    insta::assert_snapshot!(shipped.err, @"error: tinygsm: shipped with the Python package only");
    assert!(!Path::new(out).exists());
}

#[test]
fn a_dry_run_needs_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let rows = questions(folder.path(), 40);
    let bench = format!("gsm8k:{}", rows.display());
    let done = call(&[
        "run",
        "--suite",
        "A1",
        "A2",
        "--only",
        "A1.1",
        "A1.2",
        "A2.5",
        "--experts",
        "a",
        "b",
        "--bench",
        &bench,
        "--out",
        "nowhere",
        "--seeds",
        "0",
        "1",
        "2",
        "--pilot",
        "20",
        "--dry-run",
    ]);
    assert_eq!(done.status, ExitStatus::Success, "{}", done.err);
    insta::assert_snapshot!(done.out);
}

#[test]
fn wrong_words_are_one_line_with_status_2() {
    for arguments in [
        &["walk"][..],
        &["run", "--suite", "A1", "--bench", "tinygsm", "--out", "o"],
        &[
            "run",
            "--suite",
            "A1",
            "--model",
            "a",
            "--experts",
            "b",
            "--bench",
            "x",
            "--out",
            "o",
        ],
        &[
            "run",
            "--suite",
            "A1",
            "--model",
            "a",
            "--bench",
            "x",
            "--out",
            "o",
            "--batch-size",
            "0",
        ],
        &["aggregate", "no-such-folder"],
        &["plot", "no-such-folder"],
    ] {
        let done = call(arguments);
        assert_eq!(done.status, ExitStatus::Usage, "{arguments:?}");
        assert_eq!(done.err.trim().lines().count(), 1, "{}", done.err);
        assert!(done.err.starts_with("error: "), "{}", done.err);
    }
}

#[test]
fn exit_statuses_are_what_a_shell_expects() {
    let codes = [
        ExitStatus::Success,
        ExitStatus::Failure,
        ExitStatus::Usage,
        ExitStatus::Interrupted,
    ]
    .map(ExitStatus::code);
    assert_eq!(codes, [0, 1, 2, 130]);
}
