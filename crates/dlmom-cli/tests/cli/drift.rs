//! `run --drift N`: which comparisons a cell gets, what they hold, and that none is made twice.

use std::collections::BTreeMap;
use std::fs;

use dlmom_cli::ExitStatus;
use serde_json::{Value, json};

use super::{Lab, bad, call, good, numbers, strings, text};

const ENSEMBLE: [&str; 3] = ["--experts", "a", "b"];
const CHAIN: [&str; 2] = ["--model", "m"];

fn words<'a>(parts: &[&[&'a str]]) -> Vec<&'a str> {
    parts.concat()
}

/// The kinds of comparison of every cell that ran, one line a cell.
fn kinds(lab: &Lab, folder: &str) -> String {
    let manifest = lab.json(&format!("{folder}/run.json"));
    let lines: Vec<String> = manifest["cells"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|cell| cell["kind"] == "run")
        .map(|cell| {
            let id = cell["id"].as_str().unwrap();
            let lines = lab.drift(folder, id);
            let kinds: Vec<&str> = lines.iter().map(|l| l["kind"].as_str().unwrap()).collect();
            format!("{id}: {}", kinds.join(" "))
        })
        .collect();
    lines.join("\n")
}

/// Lines of a kind by item.
fn of_kind(lab: &Lab, folder: &str, id: &str, kind: &str) -> BTreeMap<String, Value> {
    lab.drift(folder, id)
        .into_iter()
        .filter(|line| line["kind"] == kind)
        .map(|line| (line["item_id"].as_str().unwrap().to_owned(), line))
        .collect()
}

fn by_item(lines: Vec<Value>) -> BTreeMap<String, Value> {
    lines
        .into_iter()
        .map(|line| (line["item_id"].as_str().unwrap().to_owned(), line))
        .collect()
}

const SUITES: &str = "suites:
  S:
    - {id: k, k: 10}
    - {id: noise, soft_mode: gumbel, tau: 0.5}
    - {id: filter, filter: {top_p: 0.9}}
    - {id: encoding, encoding: compact}
    - {id: control, packet_control: uniform}
    - {id: exits, packet_control: top1, same_exits: true}
    - {id: dropped, drop_latent: true}
    - {id: gate, gate: always_explicit}
    - {id: cap, cap: 2}
    - {id: merge, consensus: {method: mean}}
    - {id: support, support: packet}
    - {id: both, gate: always_explicit, consensus: {method: mean}, k: 10}
    - {id: printed, sampling: {temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0}}
";

#[test]
fn a_cell_of_an_ensemble_gets_the_comparisons_that_its_knobs_give_a_meaning() {
    let lab = Lab::new();
    let file = lab.write("suites.yaml", SUITES);
    lab.run(
        "run",
        &words(&[
            &ENSEMBLE,
            &["--config", &file, "--suite", "S", "--drift", "1"],
        ]),
    );
    insta::assert_snapshot!(kinds(&lab, "run"), @r"
    REF: free
    k: free one_step
    noise: free one_step
    filter: free one_step
    encoding: free one_step
    control: free one_step
    exits: free one_step
    dropped: free
    gate: free decisions
    cap: free decisions
    merge: free inputs
    support: free inputs
    both: free inputs one_step decisions
    printed: free
    ");
    lab.sound("run");
}

#[test]
fn in_a_chain_nobody_is_merged_so_no_consensus_is_compared() {
    let lab = Lab::new();
    let suites = ["--suite", "A1", "A2", "A3", "C1", "C2", "--drift", "1"];
    lab.run("run", &words(&[&CHAIN, &suites]));
    insta::assert_snapshot!(kinds(&lab, "run"), @r"
    REF: free
    A1.2: free one_step
    A1.3: free one_step
    A1.4: free one_step
    A1.5: free one_step
    A1.6: free one_step
    A1.7: free one_step
    A2.1: free decisions
    A2.2: free decisions
    A2.3: free decisions
    A2.4: free decisions
    A2.5: free decisions
    A2.6: free decisions
    A2.7: free decisions
    A3.2: free one_step
    A3.3: free one_step
    A3.4: free one_step
    A3.5: free one_step
    C1.1: free one_step
    C1.2: free one_step
    C1.3: free one_step
    C1.4: free one_step
    C1.5: free one_step
    C1.6: free one_step
    C1.7: free one_step
    C1.8: free
    C1.9: free decisions
    C2.1: free
    C2.2: free
    C2.3: free
    C2.4: free
    ");
}

#[test]
fn the_reference_against_itself_is_exactly_zero() {
    let lab = Lab::new();
    for (folder, agents) in [("ensemble", &ENSEMBLE[..]), ("chain", &CHAIN)] {
        lab.run(
            folder,
            &words(&[agents, &["--suite", "A1", "--only", "REF", "--drift", "4"]]),
        );
        let lines = of_kind(&lab, folder, "REF", "free");
        assert_eq!(lines.len(), 4);
        let traces = by_item(lab.traces(folder, "REF"));
        for (item, line) in lines {
            let steps = traces[&item]["mode"].as_array().unwrap().len();
            assert_eq!(line["steps"], steps);
            let found = &line["divergences"];
            assert_eq!(numbers(&found["kl"]), vec![0.0; steps]);
            let places: Vec<f64> = (0..steps).map(|s| s as f64).collect();
            assert_eq!(numbers(&found["step"]), places);
            assert!(
                numbers(&found["cosine"])
                    .iter()
                    .all(|c| (c - 1.0).abs() < 1e-12)
            );
        }
        for row in lab.rows(folder, "REF") {
            assert_eq!(
                (&row["drift"]["kl"], &row["drift"]["events"]),
                (&json!(0.0), &json!(0))
            );
        }
        assert_eq!(
            lab.json(&format!("{folder}/summary/REF.json"))["drift"][0]["kl"],
            0.0
        );
    }
}

const SEVERAL: [&str; 11] = [
    "--suite", "A1", "A2", "C1", "K1", "--only", "A1.2", "A2.5", "C1.1", "C1.9", "K1.mean",
];

fn several<'a>(more: &[&'a str]) -> Vec<&'a str> {
    words(&[&ENSEMBLE, &SEVERAL, more])
}

#[test]
fn rows_hold_the_free_comparison_of_the_first_items() {
    let lab = Lab::new();
    lab.run("run", &several(&["--drift", "2", "--seeds", "0", "1"]));
    for id in ["REF", "A1.2", "A2.5", "C1.1", "C1.9", "K1.mean"] {
        let lines = of_kind(&lab, "run", id, "free");
        assert_eq!(lines.keys().collect::<Vec<_>>(), ["q0", "q1"], "{id}");
        for row in lab.rows("run", id) {
            let item = row["item_id"].as_str().unwrap();
            // Of several seeds the first is compared.
            let Some(line) = lines.get(item).filter(|_| row["seed"] == 0) else {
                assert!(row["drift"].is_null(), "{id}, {item}");
                continue;
            };
            let mean = |name: &str| {
                let values = numbers(&line["divergences"][name]);
                values.iter().sum::<f64>() / values.len() as f64
            };
            for name in ["kl", "cosine"] {
                let found = row["drift"][name].as_f64().unwrap();
                assert!((found - mean(name)).abs() < 1e-12, "{id}, {item}: {name}");
            }
            let mut events = 0;
            let mut above = 0;
            for kl in numbers(&line["divergences"]["kl"]) {
                above = if kl > 0.1 { above + 1 } else { 0 };
                events += u32::from(above == 3);
            }
            assert_eq!(row["drift"]["events"], events, "{id}, {item}");
        }
    }
}

#[test]
fn free_samples_are_compared_until_either_ends() {
    let lab = Lab::new();
    lab.run("run", &several(&["--drift", "4"]));
    let reference = by_item(lab.traces("run", "REF"));
    let modes = |trace: &Value| trace["mode"].as_array().unwrap().clone();
    let mut apart = 0;
    for id in ["A1.2", "C1.1", "K1.mean"] {
        let own = by_item(lab.traces("run", id));
        for (item, line) in of_kind(&lab, "run", id, "free") {
            let (ours, theirs) = (modes(&own[&item]), modes(&reference[&item]));
            // An end token is compared, too, and is in no trace.
            let most = ours.len().min(theirs.len());
            let steps = line["steps"].as_u64().unwrap() as usize;
            assert!(
                steps == most || steps == most + 1,
                "{id}, {item}: {steps}, {most}"
            );
            if id == "K1.mean" {
                continue;
            }
            // Until the first latent step of both there is nothing that could differ.
            let first = theirs
                .iter()
                .position(|mode| mode == "latent")
                .unwrap_or(most);
            let kl = numbers(&line["divergences"]["kl"]);
            assert!(kl.iter().take(first + 1).all(|x| *x == 0.0), "{id}, {item}");
            apart += usize::from(kl.iter().any(|x| *x > 0.0));
        }
    }
    assert!(apart >= 4, "{apart}");
}

#[test]
fn forced_inputs_are_the_references_at_every_step() {
    let lab = Lab::new();
    lab.run("run", &several(&["--drift", "4"]));
    let reference = by_item(lab.traces("run", "REF"));
    let free = of_kind(&lab, "run", "K1.mean", "free");
    for (item, line) in of_kind(&lab, "run", "K1.mean", "inputs") {
        let steps = line["steps"].as_u64().unwrap() as usize;
        assert!(steps >= reference[&item]["mode"].as_array().unwrap().len());
        let (forced, own) = (
            numbers(&line["divergences"]["kl"]),
            numbers(&free[&item]["divergences"]["kl"]),
        );
        // After the prompt both have the same history; another operator shows at once.
        assert_eq!(forced[0], own[0]);
        assert!(forced.iter().all(|kl| *kl > 0.0), "{item}");
        assert_ne!(forced, own);
    }
}

#[test]
fn one_own_message_is_compared_after_every_latent_step_of_the_reference() {
    let lab = Lab::new();
    lab.run("run", &several(&["--drift", "4"]));
    let reference = by_item(lab.traces("run", "REF"));
    for id in ["A1.2", "C1.1"] {
        let free = of_kind(&lab, "run", id, "free");
        for (item, line) in of_kind(&lab, "run", id, "one_step") {
            let modes = strings(&reference[&item]["mode"]);
            let after: Vec<f64> = (0..modes.len())
                .filter(|&step| modes[step] == "latent")
                .map(|step| (step + 1) as f64)
                .collect();
            assert_eq!(numbers(&line["divergences"]["step"]), after, "{id}, {item}");
            let kl = numbers(&line["divergences"]["kl"]);
            // Up to the first message of its own the cell is the reference, so there the two kinds agree.
            if let Some(&first) = after.first() {
                let free = numbers(&free[&item]["divergences"]["kl"]);
                assert_eq!(kl[0], free[first as usize], "{id}, {item}");
            }
        }
    }
}

#[test]
fn decisions_are_what_replay_decides_with_the_cells_knobs() {
    let lab = Lab::new();
    lab.run("run", &several(&["--drift", "4"]));
    let changed = |id: &str| -> u64 {
        let lines = of_kind(&lab, "run", id, "decisions");
        assert_eq!(lines.len(), 4);
        assert!(lines.values().all(|line| line["divergences"].is_null()));
        lines.values().map(|l| l["changed"].as_u64().unwrap()).sum()
    };
    let root = lab.path("run");
    let replayed = |flags: &[&str]| -> u64 {
        let out = good(&words(&[&["replay", text(&root), "REF", "--json"], flags]));
        super::json(&out)["cells"][0]["changed"].as_u64().unwrap()
    };
    let trend = ["--gate", "trend", "--w", "5", "--cap", "2"];
    assert_eq!(changed("A2.5"), replayed(&trend));
    assert!(changed("A2.5") > 0);
    // Never latent: every latent step of the reference is decided otherwise.
    let latent: u64 = lab
        .rows("run", "REF")
        .iter()
        .map(|row| row["latent_steps"].as_u64().unwrap())
        .sum();
    assert_eq!(changed("C1.9"), latent);
}

#[test]
fn no_comparison_is_made_twice() {
    let lab = Lab::new();
    let ids = ["REF", "A1.2", "A2.5", "C1.1", "C1.9", "K1.mean"];
    let files = |folder: &str| ids.map(|id| lab.drift(folder, id));
    lab.run("run", &several(&["--drift", "2"]));
    let before = files("run");
    lab.run("run", &several(&["--drift", "2", "--resume"]));
    lab.run("run", &several(&["--drift", "1", "--resume"]));
    assert_eq!(files("run"), before);
    // A kill in the middle of a line.
    let path = lab.path("run/drift/A1.2.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    fs::write(&path, lines[0].to_owned() + &lines[1][..40]).unwrap();
    lab.run("run", &several(&["--drift", "2", "--resume"]));
    let sorted = |mut lines: Vec<Value>| {
        lines.sort_by_key(ToString::to_string);
        lines
    };
    assert_eq!(sorted(lab.drift("run", "A1.2")), sorted(before[1].clone()));
    // More items are added to those that were there.
    lab.run("run", &several(&["--drift", "3", "--resume"]));
    lab.run("whole", &several(&["--drift", "3"]));
    for (a, b) in files("run").into_iter().zip(files("whole")) {
        assert_eq!(sorted(a), sorted(b));
    }
    lab.sound("run");
}

#[test]
fn what_is_compared_depends_neither_on_rows_nor_on_order() {
    let lab = Lab::new();
    lab.run("given", &several(&["--drift", "2"]));
    lab.run(
        "other",
        &several(&["--drift", "2", "--batch-size", "8", "--order", "reversed"]),
    );
    for id in ["REF", "A1.2", "A2.5", "C1.1", "C1.9", "K1.mean"] {
        let sorted = |folder: &str| {
            let mut lines = lab.drift(folder, id);
            lines.sort_by_key(ToString::to_string);
            lines
        };
        assert_eq!(sorted("given"), sorted("other"), "{id}");
        assert_eq!(lab.outputs("given", id), lab.outputs("other", id), "{id}");
    }
}

#[test]
fn a_comparison_needs_two_rows() {
    let lab = Lab::new();
    let line = lab.refused("run", &several(&["--drift", "2", "--batch-size", "1"]));
    assert_eq!(
        line,
        "error: --drift: a comparison needs 2 rows of the batch; give --batch-size 2 or more"
    );
    assert!(!lab.path("run").exists());
    // A folder that was made with one row has room for one.
    lab.run("run", &several(&["--batch-size", "1"]));
    let resume = several(&["--drift", "2", "--batch-size", "auto", "--resume"]);
    let line = lab.refused("run", &resume);
    assert!(
        line.contains("--drift: a comparison needs 2 rows"),
        "{line}"
    );
    let line = bad(
        &words(&[
            &["run"],
            &ENSEMBLE,
            &[
                "--suite", "A1", "--bench", "x", "--out", "y", "--drift", "-1",
            ],
        ]),
        ExitStatus::Usage,
    );
    assert!(line.contains("'-1'"), "{line}");
}

#[test]
fn every_kind_has_a_line_in_the_table() {
    let lab = Lab::new();
    let out = lab.run("run", &several(&["--drift", "2"])).out;
    let table: Vec<&str> = out
        .lines()
        .skip_while(|line| !line.starts_with("| cell") || !line.contains("| changed %"))
        .take_while(|line| line.starts_with('|'))
        .collect();
    insta::assert_snapshot!("drift_table", table.join("\n"));
    // The free kind is a column of the table of cells.
    assert!(out.contains("| drift |"), "{out}");
    let without = lab.run("plain", &several(&[])).out;
    assert!(!without.contains("| drift |"), "{without}");
}

#[test]
fn faults_of_drift_files_are_named() {
    let lab = Lab::new();
    lab.run("run", &several(&["--drift", "2"]));
    let path = lab.path("run/drift/A2.5.jsonl");
    let place = |says: &str| {
        let done = call(&["validate", text(&lab.path("run"))]);
        let lines: Vec<String> = done
            .out
            .lines()
            .filter(|line| !line.starts_with("ok: "))
            .map(|line| lab.plain(line))
            .collect();
        assert_eq!(
            lines.first().map(String::as_str),
            Some(says),
            "{}",
            done.out
        );
    };
    let whole = fs::read(&path).unwrap();
    for (change, says) in [
        (
            json!({"experiment": "A2.6"}),
            "LAB/run/drift/A2.5.jsonl:1: experiment is A2.6, expected A2.5",
        ),
        (
            json!({"steps": 7}),
            "LAB/run/drift/A2.5.jsonl:1: the length of step is 24, expected 7",
        ),
        (
            json!({"changed": 3}),
            "LAB/run/drift/A2.5.jsonl:1: decisions have a count of changed steps, other kinds have divergences",
        ),
        (
            json!({"kind": "bound"}),
            "LAB/run/drift/A2.5.jsonl:1: not a drift line: column ",
        ),
    ] {
        let mut first = true;
        lab.edit_lines("run/drift/A2.5.jsonl", |line| {
            if std::mem::take(&mut first) {
                for (name, value) in change.as_object().unwrap() {
                    line[name] = value.clone();
                }
            }
        });
        if says.ends_with("column ") {
            let done = call(&["validate", text(&lab.path("run"))]);
            assert!(lab.plain(&done.out).contains(says), "{}", done.out);
        } else {
            place(says);
        }
        fs::write(&path, &whole).unwrap();
    }
    good(&["validate", text(&lab.path("run"))]);
    good(&["validate", text(&path)]);
}
