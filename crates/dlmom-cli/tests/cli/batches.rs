//! Cells of a run share one batch, and no row of theirs tells.

use super::{Lab, strings};

const SUITES: [&str; 9] = [
    "--experts",
    "mock:1",
    "mock:2",
    "--suite",
    "A1",
    "A2",
    "--seeds",
    "0",
    "1",
];

#[test]
fn cells_share_a_batch_and_give_the_rows_that_each_gives_alone() {
    let lab = Lab::new();
    lab.run("together", &[&SUITES[..], &["--batch-size", "5"]].concat());
    let batches = &lab.json("together/run.json")["notes"]["batches"];
    let batch = &batches[0];
    assert_eq!(batches.as_array().unwrap().len(), 1);
    let cells = strings(&batch["cells"]);
    assert!(cells.len() > 10, "{cells:?}");
    // One cell has four samples: alone it could not fill five rows.
    assert_eq!(batch["occupancy_before_drain"], 1.0);
    assert!(batch["occupancy"].as_f64().unwrap() > 0.95, "{batch}");

    let mut alone: Vec<&str> = vec!["--only", "A1.2"];
    alone.extend(SUITES);
    lab.run(
        "alone",
        &[&alone[..], &["--batch-size", "1", "--order", "reversed"]].concat(),
    );
    for id in ["REF", "A1.2"] {
        let of = |folder| -> Vec<_> {
            let mut rows = lab.outputs(folder, id);
            for row in &mut rows {
                row.as_object_mut().unwrap().remove("batch_size");
            }
            rows
        };
        assert_eq!(of("together"), of("alone"), "{id}");
        assert_eq!(
            lab.traces("together", id).len(),
            lab.traces("alone", id).len()
        );
    }
    lab.sound("together");
}

#[test]
fn a_cells_time_is_its_share_of_the_batch() {
    let lab = Lab::new();
    lab.run("run", &SUITES);
    let notes = &lab.json("run/run.json")["notes"];
    let timings = notes["timings"].as_object().unwrap();
    let batch = &notes["batches"][0];
    let sum = |field: &str| -> f64 { timings.values().map(|t| t[field].as_f64().unwrap()).sum() };
    assert_eq!(sum("samples"), batch["samples"].as_f64().unwrap());
    assert!(sum("wall_s") <= batch["wall_s"].as_f64().unwrap());
    for (id, timing) in timings {
        let rows = lab.rows("run", id).len() as f64;
        assert_eq!(timing["samples"], rows, "{id}");
        assert!(timing["rows"].as_f64().unwrap() > rows, "{id}");
    }
}

#[test]
fn cells_that_follow_the_reference_come_after_it() {
    let lab = Lab::new();
    lab.run("run", &["--experts", "mock:1", "mock:2", "--suite", "C1"]);
    let notes = &lab.json("run/run.json")["notes"];
    let cells: Vec<Vec<&str>> = notes["batches"]
        .as_array()
        .unwrap()
        .iter()
        .map(|batch| strings(&batch["cells"]))
        .collect();
    assert_eq!(cells.len(), 2);
    assert_eq!(cells[1], ["C1.7"]);
    assert!(cells[0].contains(&"REF") && cells[0].contains(&"C1.9"));
}

#[test]
fn a_resumed_run_adds_a_batch_of_what_was_left() {
    let lab = Lab::new();
    let words = ["--experts", "mock:1", "mock:2", "--suite", "A2"];
    lab.run("run", &words);
    let path = lab.path("run/raw/A2.3.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let kept: Vec<&str> = text.lines().take(1).collect();
    std::fs::write(&path, format!("{}\n", kept.join("\n"))).unwrap();
    lab.run("run", &[&words[..], &["--resume"]].concat());
    assert_eq!(lab.rows("run", "A2.3").len(), 4);
    let batches = &lab.json("run/run.json")["notes"]["batches"];
    assert_eq!(strings(&batches[1]["cells"]), ["A2.3"]);
    assert_eq!(batches[1]["samples"], 3);
    let timings = &lab.json("run/run.json")["notes"]["timings"];
    assert_eq!(timings["A2.3"]["samples"], 4 + 3);
    assert_eq!(timings["A2.1"]["samples"], 4);
    // Nothing was left: no batch.
    lab.run("run", &[&words[..], &["--resume"]].concat());
    let batches = &lab.json("run/run.json")["notes"]["batches"];
    assert_eq!(batches.as_array().unwrap().len(), 2);
}

#[test]
fn an_item_is_asked_in_every_cell_and_under_every_seed_before_the_next() {
    let lab = Lab::new();
    lab.run("run", &[&SUITES[..], &["--batch-size", "1"]].concat());
    let manifest = lab.json("run/run.json");
    let batch = &manifest["notes"]["batches"][0];
    let mut asked = Vec::new();
    let mut positions = 0;
    for id in strings(&batch["cells"]) {
        for row in lab.rows("run", id) {
            let item = row["item_id"].as_str().unwrap().to_owned();
            positions += row["prompt_tokens"].as_u64().unwrap();
            asked.push((row["started_at"].as_f64().unwrap(), item));
        }
    }
    asked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut items: Vec<String> = asked.into_iter().map(|(_, item)| item).collect();
    let samples = items.len();
    items.dedup();
    let turns = items.len();
    items.sort();
    items.dedup();
    assert_eq!(turns, items.len(), "an item came back after another");
    assert!(samples > 10 * turns);
    // The mock forwards every prompt anew.
    assert_eq!(batch["prompt_positions"], positions);
    assert_eq!(batch["copied_positions"], 0);
}

#[test]
fn longest_prompts_are_admitted_first() {
    let lab = Lab::new();
    lab.run(
        "run",
        &[
            "--experts",
            "mock:1",
            "--suite",
            "A1",
            "--batch-size",
            "1",
            "--limit",
            "12",
        ],
    );
    let tokens: Vec<u64> = lab
        .rows("run", "REF")
        .iter()
        .map(|row| row["prompt_tokens"].as_u64().unwrap())
        .collect();
    assert!(tokens.is_sorted_by(|a, b| a >= b), "{tokens:?}");
    assert!(tokens.first() > tokens.last());
}
