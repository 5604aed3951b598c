//! Cells that equal another sample for sample: the table names the other, and the knobs that reached nothing.

use serde_json::{Value, json};

use super::{Lab, call, good, text};

const ENSEMBLE: [&str; 3] = ["--experts", "a", "b"];

/// Cells with their notes, one line a cell that has one.
fn notes(out: &str) -> String {
    let cells = |line: &str| -> Vec<String> {
        let inner = line.trim_matches('|');
        inner.split(" | ").map(|c| c.trim().to_owned()).collect()
    };
    let mut table = out.lines().take_while(|line| line.starts_with('|'));
    let place = cells(table.next().unwrap_or_default())
        .iter()
        .position(|name| name == "note");
    let Some(place) = place else {
        return String::new();
    };
    table
        .skip(1)
        .map(cells)
        .filter(|row| !row[place].is_empty())
        .map(|row| format!("{}: {}", row[0], row[place]))
        .collect::<Vec<_>>()
        .join("\n")
}

fn twin(lab: &Lab, folder: &str, id: &str) -> Value {
    lab.json(&format!("{folder}/summary/{id}.json"))["twin"].clone()
}

#[test]
fn the_first_earlier_equal_is_named_with_the_knobs_that_differ() {
    let lab = Lab::new();
    let out = lab
        .run("run", &[&ENSEMBLE[..], &["--suite", "A2"]].concat())
        .out;
    insta::assert_snapshot!(notes(&out), @r"
    REF: 1 timeout
    A2.1: inert: no sample differs from REF (cap), 1 timeout
    A2.4: inert: no sample differs from REF (gate, w, cap), 1 timeout
    A2.6: inert beside A2.3: cap
    A2.7: inert beside A2.3: cap
    ");
    for (id, expected) in [
        ("REF", Value::Null),
        ("A2.1", json!("REF")),
        ("A2.2", Value::Null),
        ("A2.3", Value::Null),
        ("A2.6", json!("A2.3")),
        ("A2.7", json!("A2.3")),
    ] {
        assert_eq!(twin(&lab, "run", id), expected, "{id}");
        let inert = lab.json(&format!("run/summary/{id}.json"))["inert"].clone();
        assert_eq!(inert, expected == "REF", "{id}");
    }
    let line = out
        .lines()
        .find(|line| line.starts_with("inert here"))
        .unwrap();
    assert_eq!(
        line,
        "inert here, sample for sample, whatever the knobs say: A2.1 = REF (cap); A2.4 = REF (gate, w, cap); A2.6 = A2.3 (cap); A2.7 = A2.3 (cap)"
    );
    lab.sound("run");
}

const ENCODINGS: &str = "suites:
  S:
    - {id: half, encoding: f16}
    - {id: brain, encoding: bf16}
    - {id: other, k: 20}
";

#[test]
fn cells_that_differ_in_bytes_are_no_twins() {
    let lab = Lab::new();
    let file = lab.write("suites.yaml", ENCODINGS);
    // Agents of one model send embeddings; only printed tokens are packets, and one token is exact in any encoding.
    let words = ["--experts", "a", "a", "--config", &file, "--suite", "S"];
    let out = lab.run("run", &words).out;
    insta::assert_snapshot!(notes(&out), @r"
    half: every answer is REF's; only the bytes differ
    brain: inert beside half: encoding
    ");
    // Both halves take two bytes a probability.
    assert_eq!(twin(&lab, "run", "half"), Value::Null);
    assert_eq!(twin(&lab, "run", "brain"), "half");
    for id in ["half", "brain"] {
        let summary = lab.json(&format!("run/summary/{id}.json"));
        assert_eq!(
            (&summary["inert"], &summary["versus_ref"]["identical"]),
            (&json!(true), &json!(true))
        );
    }
}

#[test]
fn bytes_that_were_handed_over_count() {
    let lab = Lab::new();
    let words = [
        "--model",
        "m",
        "--suite",
        "C2",
        "--only",
        "C2.4",
        "--max-handoffs",
        "0",
    ];
    let out = lab.run("run", &words).out;
    assert_eq!(
        notes(&out),
        "C2.4: inert: no sample differs from REF (handoff_control)"
    );
    lab.edit_lines("run/raw/C2.4.jsonl", |row| {
        row["handoffs"] = 1.into();
        row["handoff_bytes"] = 5.into();
    });
    let out = lab.run("run", &[&words[..], &["--resume"]].concat()).out;
    assert_eq!(
        notes(&out),
        "C2.4: every answer is REF's; only the bytes differ"
    );
}

#[test]
fn a_twin_is_an_earlier_cell_of_the_folder_in_whatever_order_they_came() {
    let lab = Lab::new();
    let words = |only: &'static str| -> Vec<&'static str> {
        let mut words = [&ENSEMBLE[..], &["--suite", "A2", "--only"]].concat();
        words.push(only);
        words
    };
    lab.run("run", &words("A2.7"));
    let out = lab
        .run("run", &[&words("A2.3")[..], &["--resume"]].concat())
        .out;
    assert_eq!(notes(&out), "REF: 1 timeout\nA2.3: inert beside A2.7: cap");
    assert_eq!(
        (twin(&lab, "run", "A2.7"), twin(&lab, "run", "A2.3")),
        (Value::Null, json!("A2.7"))
    );
    lab.sound("run");
}

#[test]
fn the_twin_of_an_alias_is_that_of_the_cell_whose_rows_it_shares() {
    let lab = Lab::new();
    let file = lab.write(
        "suites.yaml",
        "suites: {S: [{id: S1, cap: -1}, {id: S2, cap: -1}]}\n",
    );
    let words = [&ENSEMBLE[..], &["--config", &file, "--suite", "S"]].concat();
    let out = lab.run("run", &words).out;
    assert_eq!(
        notes(&out).lines().skip(1).collect::<Vec<_>>(),
        [
            "S1: inert: no sample differs from REF (cap), 1 timeout",
            "S2: same as S1"
        ]
    );
    assert_eq!(twin(&lab, "run", "S2"), "REF");
    lab.sound("run");
}

#[test]
fn a_cell_that_cannot_be_read_is_one_problem() {
    let lab = Lab::new();
    lab.run("run", &[&ENSEMBLE[..], &["--suite", "A2"]].concat());
    lab.edit_lines("run/raw/A2.3.jsonl", |row| row["total_steps"] = 99.into());
    let root = lab.path("run");
    let done = call(&["validate", text(&root)]);
    let problems: Vec<&str> = done
        .out
        .lines()
        .filter(|l| !l.starts_with("ok: "))
        .collect();
    // One for each row; summaries of cells that equal it are not blamed.
    assert_eq!(problems.len(), 4, "{}", done.out);
    assert!(
        problems.iter().all(|p| p.contains("raw/A2.3.jsonl:")),
        "{}",
        done.out
    );
    good(&["aggregate", text(&root)]);
}
