//! The command line without Python.

#![expect(clippy::unwrap_used, reason = "test helpers")]

mod commands;
mod tools;

use std::path::{Path, PathBuf};

use dlmom_cli::ExitStatus;
use dlmom_cli::host::NoPython;

struct Done {
    status: ExitStatus,
    out: String,
    err: String,
}

fn call(arguments: &[&str]) -> Done {
    let argv: Vec<String> = std::iter::once("dlmom-rs")
        .chain(arguments.iter().copied())
        .map(String::from)
        .collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = dlmom_cli::run(&argv, &mut NoPython, &mut out, &mut err);
    Done {
        status,
        out: String::from_utf8(out).unwrap(),
        err: String::from_utf8(err).unwrap(),
    }
}

/// The output of a command that succeeds.
fn good(arguments: &[&str]) -> String {
    let done = call(arguments);
    assert_eq!(done.status, ExitStatus::Success, "{}{}", done.out, done.err);
    done.out
}

/// The one line on standard error of a command that ends with `status`.
fn bad(arguments: &[&str], status: ExitStatus) -> String {
    let done = call(arguments);
    assert_eq!(done.status, status, "{}{}", done.out, done.err);
    let line = done.err.trim_end().to_owned();
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.starts_with("error: "), "{line}");
    line
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A file of `n` questions in GSM8K's schema.
fn questions(folder: &Path, n: usize) -> PathBuf {
    let lines: Vec<String> = (0..n)
        .map(|i| {
            format!(
                "{{\"question\": \"{i} + 1?\", \"answer\": \"#### {}\"}}\n",
                i + 1
            )
        })
        .collect();
    let path = folder.join("rows.jsonl");
    std::fs::write(&path, lines.concat()).unwrap();
    path
}
