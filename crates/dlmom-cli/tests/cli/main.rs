//! The command line without Python.

#![expect(clippy::unwrap_used, reason = "test helpers")]

mod batches;
mod calibrate;
mod commands;
mod compare;
mod controls;
mod drift;
mod pilot;
mod tools;
mod topologies;
mod twins;
mod usage;

use std::path::{Path, PathBuf};

use dlmom_cli::ExitStatus;
use dlmom_cli::host::NoPython;
use serde_json::Value;
use tempfile::TempDir;

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

/// The text of a JSON Lines file.
fn lines(values: impl IntoIterator<Item = Value>) -> String {
    let lines: Vec<String> = values
        .into_iter()
        .map(|value| format!("{value}\n"))
        .collect();
    lines.concat()
}

fn json_lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// Flags that every run of a lab has unless it says otherwise: two thirds of the questions stay unrun, and the mock's
/// entropies lie on both sides of alpha.
const USUAL: [(&str, &str); 5] = [
    ("--limit", "4"),
    ("--alpha", "0.5"),
    ("--max-steps", "24"),
    ("--batch-size", "3"),
    ("--pilot-items", "6"),
];

/// Twelve questions with solutions, `q0` to `q11`, and runs of the mock over them.
struct Lab {
    folder: TempDir,
}

impl Lab {
    fn new() -> Self {
        let lab = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let rows = lines((0..12).map(|i| {
            let answer = format!("One more than {i} is {0}.\n#### {0}", i + 1);
            serde_json::json!({
                "id": format!("q{i}"), "question": format!("{i} + 1?"), "answer": answer,
            })
        }));
        lab.write("questions.jsonl", &rows);
        lab
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.folder.path().join(inside)
    }

    fn write(&self, inside: &str, content: &str) -> String {
        let path = self.path(inside);
        std::fs::write(&path, content).unwrap();
        text(&path).to_owned()
    }

    fn bench(&self) -> String {
        format!("gsm8k:{}", text(&self.path("questions.jsonl")))
    }

    /// The words of a run into a folder.
    fn words(&self, folder: &str, more: &[&str]) -> Vec<String> {
        let mut words = vec![
            "run".to_owned(),
            "--backend".to_owned(),
            "mock".to_owned(),
            "--display".to_owned(),
            "none".to_owned(),
            "--out".to_owned(),
            text(&self.path(folder)).to_owned(),
        ];
        if !more.contains(&"--bench") {
            words.extend(["--bench".to_owned(), self.bench()]);
        }
        for (flag, value) in USUAL {
            if !more.contains(&flag) {
                words.extend([flag.to_owned(), value.to_owned()]);
            }
        }
        words.extend(more.iter().map(ToString::to_string));
        words
    }

    fn call(&self, folder: &str, more: &[&str]) -> Done {
        let words = self.words(folder, more);
        call(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// A run that succeeds.
    fn run(&self, folder: &str, more: &[&str]) -> Done {
        let done = self.call(folder, more);
        assert_eq!(done.status, ExitStatus::Success, "{}{}", done.out, done.err);
        done
    }

    /// The line in which a run is refused, behind notes and what a pilot says.
    fn refused(&self, folder: &str, more: &[&str]) -> String {
        let done = self.call(folder, more);
        assert_eq!(done.status, ExitStatus::Usage, "{}{}", done.out, done.err);
        refusal(&done)
    }

    fn json(&self, inside: &str) -> Value {
        json(&std::fs::read_to_string(self.path(inside)).unwrap())
    }

    /// Changes a JSON file.
    fn edit(&self, inside: &str, change: impl FnOnce(&mut Value)) {
        let mut value = self.json(inside);
        let before = value.clone();
        change(&mut value);
        assert_ne!(value, before, "{inside}");
        std::fs::write(self.path(inside), value.to_string()).unwrap();
    }

    /// Changes every line of a JSON Lines file.
    fn edit_lines(&self, inside: &str, change: impl FnMut(&mut Value)) {
        let mut values = json_lines(&self.path(inside));
        values.iter_mut().for_each(change);
        std::fs::write(self.path(inside), lines(values)).unwrap();
    }

    fn rows(&self, folder: &str, id: &str) -> Vec<Value> {
        json_lines(&self.path(&format!("{folder}/raw/{id}.jsonl")))
    }

    fn traces(&self, folder: &str, id: &str) -> Vec<Value> {
        json_lines(&self.path(&format!("{folder}/traces/{id}.jsonl")))
    }

    fn drift(&self, folder: &str, id: &str) -> Vec<Value> {
        json_lines(&self.path(&format!("{folder}/drift/{id}.jsonl")))
    }

    /// What rows hold apart from times and memory, in the order of their keys.
    fn outputs(&self, folder: &str, id: &str) -> Vec<Value> {
        let mut rows = self.rows(folder, id);
        rows.sort_by_key(|row| (row["item_id"].to_string(), row["seed"].as_u64()));
        for row in &mut rows {
            let fields = row.as_object_mut().unwrap();
            for name in dlmom_runs::row::VOLATILE_FIELDS {
                fields.remove(name).unwrap();
            }
        }
        rows
    }

    /// A folder that `validate` and `replay` find nothing wrong with; what `replay` says of it.
    fn sound(&self, folder: &str) -> String {
        let path = self.path(folder);
        good(&["validate", text(&path)]);
        good(&["replay", text(&path)])
    }

    /// A text with the lab's folder taken out.
    fn plain(&self, said: &str) -> String {
        said.replace(text(self.folder.path()), "LAB")
    }
}

/// The last line on standard error, where all before are notes.
fn refusal(done: &Done) -> String {
    let (last, before) = done
        .err
        .trim_end()
        .rsplit_once('\n')
        .map_or((done.err.trim_end(), ""), |(before, last)| (last, before));
    assert!(last.starts_with("error: "), "{}", done.err);
    for line in before.lines() {
        assert!(
            line.starts_with("note: ") || line.starts_with("pilot: "),
            "{}",
            done.err
        );
    }
    last.to_owned()
}

/// The numbers of an array.
fn numbers(value: &Value) -> Vec<f64> {
    let of = |x: &Value| x.as_f64().unwrap();
    value.as_array().unwrap().iter().map(of).collect()
}

/// The words of an array.
fn strings(value: &Value) -> Vec<&str> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_str().unwrap())
        .collect()
}
