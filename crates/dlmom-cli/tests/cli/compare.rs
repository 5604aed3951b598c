//! `compare`: figures against numbers by hand on rows written by hand, and what cannot be compared.

use dlmom_cli::ExitStatus;
use dlmom_runs::paired::bootstrap;
use serde_json::Value;

use super::{Lab, bad, call, good, json, lines, text};

const ENSEMBLE: [&str; 5] = ["--experts", "a", "b", "--limit", "12"];
const CELLS: [&str; 7] = ["--suite", "A1", "A2", "--only", "A1.1", "A1.2", "A2.5"];

/// Right answers of twelve items, `1` for right.
fn marks(text: &str) -> Vec<bool> {
    assert_eq!(text.len(), 12);
    text.bytes().map(|b| b == b'1').collect()
}

/// Marks a cell's rows of a seed; strict and flexible answers apart.
fn mark(lab: &Lab, folder: &str, id: &str, seed: u64, strict: &str, flexible: &str) {
    let (strict, flexible) = (marks(strict), marks(flexible));
    lab.edit_lines(&format!("{folder}/raw/{id}.jsonl"), |row| {
        if row["seed"] == seed {
            let place: usize = row["item_id"].as_str().unwrap()[1..].parse().unwrap();
            row["failure"] = Value::Null;
            row["correct"] = strict[place].into();
            row["correct_flexible"] = flexible[place].into();
        }
    });
}

/// A run of REF, which is A1.1, of A1.2 with two seeds and of A2.5 that draws nothing, with answers by hand.
fn marked() -> Lab {
    let lab = Lab::new();
    let words = [&ENSEMBLE[..], &CELLS, &["--seeds", "0", "1"]].concat();
    lab.run("run", &words);
    mark(&lab, "run", "REF", 0, "110000110000", "111100110000");
    mark(&lab, "run", "A1.2", 0, "111111000000", "111111000000");
    mark(&lab, "run", "A1.2", 1, "101111000010", "111111000010");
    mark(&lab, "run", "A2.5", 0, "111111110000", "111111110000");
    lab
}

fn compared(lab: &Lab, more: &[&str]) -> Value {
    let root = lab.path("run");
    json(&good(&[&["compare", text(&root), "--json"], more].concat()))
}

fn close(value: &Value, expected: f64) {
    let value = value.as_f64().unwrap();
    assert!(
        (value - expected).abs() < 1e-12,
        "{value} is not {expected}"
    );
}

#[test]
fn figures_are_those_of_the_items_by_hand() {
    let lab = marked();
    let found = compared(&lab, &[]);
    assert_eq!(found["score"], "strict");
    let [noisy, trend] = &found["comparisons"].as_array().unwrap()[..] else {
        panic!("{found}");
    };
    assert_eq!(
        (&noisy["cell"], &noisy["against"]),
        (&"A1.2".into(), &"REF".into())
    );
    assert_eq!(
        (&trend["cell"], &trend["against"]),
        (&"A2.5".into(), &"REF".into())
    );

    // A2.5 is right on q2 to q5 besides what REF is right on: 4 of 12 items, none the other way.
    assert_eq!(
        (&trend["shared_items"], &trend["shared_rows"]),
        (&12.into(), &12.into())
    );
    close(&trend["accuracy"], 8.0 / 12.0);
    close(&trend["accuracy_against"], 4.0 / 12.0);
    close(&trend["delta"], 4.0 / 12.0);
    assert_eq!((&trend["better"], &trend["worse"]), (&4.into(), &0.into()));
    // Exact McNemar: 2 of the 2^4 ways that 4 fair coins fall.
    close(&trend["p_value"], 2.0 / 16.0);
    close(
        &trend["minimum_detectable"],
        2.8 * (4.0_f64 / 12.0 / 12.0).sqrt(),
    );

    // A1.2 draws: its rows of both seeds meet REF's one. Better on q2 to q5 (both seeds) and q10 (one of two); worse on q6 and
    // q7, and on q1 with one seed of two.
    assert_eq!(
        (&noisy["shared_items"], &noisy["shared_rows"]),
        (&12.into(), &24.into())
    );
    let differences = [
        0.0, -0.5, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 0.5, 0.0,
    ];
    close(&noisy["delta"], differences.iter().sum::<f64>() / 12.0);
    close(&noisy["accuracy"], 6.0 / 12.0);
    close(&noisy["accuracy_against"], 4.0 / 12.0);
    assert_eq!((&noisy["better"], &noisy["worse"]), (&5.into(), &3.into()));
    // The sign test over 8 items: P(at most 3 of 8) twice.
    close(&noisy["p_value"], 2.0 * f64::from(1 + 8 + 28 + 56) / 256.0);

    // Items are in the order of their names, which the resamples follow.
    let by_name = |of: [f64; 12]| {
        let mut named: Vec<(String, f64)> = (0..12).map(|i| format!("q{i}")).zip(of).collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        named.into_iter().map(|(_, d)| d).collect::<Vec<f64>>()
    };
    for (line, differences) in [
        (noisy, differences),
        (
            trend,
            [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ),
    ] {
        let interval = bootstrap(&by_name(differences)).unwrap();
        close(&line["bootstrap"]["lo"], interval.lo);
        close(&line["bootstrap"]["hi"], interval.hi);
        assert_eq!(line["identical"], false);
    }

    // Holm over both: the smaller p twice, then the larger, at most 1.
    close(&trend["p_adjusted"], 2.0 * 0.125);
    close(&noisy["p_adjusted"], 2.0 * 93.0 / 256.0);
}

#[test]
fn any_answer_may_count_instead() {
    let lab = marked();
    let found = compared(&lab, &["--score", "flexible"]);
    assert_eq!(found["score"], "flexible");
    let trend = &found["comparisons"][1];
    // REF is right on q2 and q3, too.
    assert_eq!((&trend["better"], &trend["worse"]), (&2.into(), &0.into()));
    close(&trend["accuracy_against"], 6.0 / 12.0);
    close(&trend["p_value"], 0.5);
    close(&trend["p_adjusted"], 1.0);
}

#[test]
fn the_cell_to_compare_with_and_the_cells_compared_can_be_chosen() {
    let lab = marked();
    let pairs = |more: &[&str]| -> Vec<String> {
        compared(&lab, more)["comparisons"]
            .as_array()
            .unwrap()
            .iter()
            .map(|c| {
                format!(
                    "{} {}",
                    c["cell"].as_str().unwrap(),
                    c["against"].as_str().unwrap()
                )
            })
            .collect()
    };
    assert_eq!(pairs(&["--against", "A2.5"]), ["REF A2.5", "A1.2 A2.5"]);
    assert_eq!(pairs(&["--only", "A2.5"]), ["A2.5 REF"]);
    assert_eq!(
        pairs(&["--only", "A2.5", "REF", "--against", "A1.2"]),
        ["A2.5 A1.2", "REF A1.2"]
    );
    // An alias is the cell whose rows it shares, once.
    assert_eq!(
        pairs(&["--only", "A1.1", "REF", "--against", "A2.5"]),
        ["REF A2.5"]
    );
    assert_eq!(pairs(&["--against", "A1.1"]), ["A1.2 REF", "A2.5 REF"]);
    // The other way round every sign turns; the p-value does not.
    let (there, back) = (
        compared(&lab, &["--only", "A2.5"]),
        compared(&lab, &["--only", "REF", "--against", "A2.5"]),
    );
    let (there, back) = (&there["comparisons"][0], &back["comparisons"][0]);
    close(&there["delta"], -back["delta"].as_f64().unwrap());
    assert_eq!(
        (&there["better"], &there["worse"]),
        (&back["worse"], &back["better"])
    );
    assert_eq!(there["p_value"], back["p_value"]);
    // Alone it is the only comparison there is.
    assert_eq!(there["p_adjusted"], there["p_value"]);
}

#[test]
fn two_runs_meet_cell_by_cell() {
    let lab = marked();
    lab.run(
        "other",
        &[&ENSEMBLE[..], &CELLS, &["--seeds", "1", "2"]].concat(),
    );
    mark(&lab, "other", "REF", 1, "111111110000", "111111110000");
    mark(&lab, "other", "A1.2", 1, "000000000000", "000000000000");
    mark(&lab, "other", "A1.2", 2, "111111111111", "111111111111");
    mark(&lab, "other", "A2.5", 1, "111111110000", "111111110000");
    let other = lab.path("other");
    let found = compared(&lab, &[text(&other)]);
    let lines = found["comparisons"].as_array().unwrap();
    let pairs: Vec<String> = lines
        .iter()
        .map(|c| {
            format!(
                "{} {}",
                c["cell"].as_str().unwrap(),
                c["against"].as_str().unwrap()
            )
        })
        .collect();
    assert_eq!(pairs, ["REF REF", "A1.2 A1.2", "A2.5 A2.5"]);
    // Cells that draw nothing meet whatever their seeds are.
    assert_eq!(
        (&lines[0]["better"], &lines[0]["worse"]),
        (&4.into(), &0.into())
    );
    assert_eq!(
        (&lines[2]["better"], &lines[2]["worse"]),
        (&0.into(), &0.into())
    );
    // Of cells that draw only rows of one seed are a pair, and accuracies are those of the pairs.
    let noisy = &lines[1];
    assert_eq!(
        (&noisy["shared_items"], &noisy["shared_rows"]),
        (&12.into(), &12.into())
    );
    close(&noisy["accuracy"], 0.0);
    close(&noisy["accuracy_against"], 6.0 / 12.0);
    close(&noisy["delta"], -6.0 / 12.0);
    // One cell of the first run for all of the second's.
    let found = compared(&lab, &[text(&other), "--against", "A2.5"]);
    let against: Vec<&Value> = found["comparisons"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| &c["against"])
        .collect();
    assert_eq!(against, ["A2.5", "A2.5", "A2.5"]);
    // A cell of the second run that the first lacks has nobody to meet.
    lab.run(
        "more",
        &[&ENSEMBLE[..], &["--suite", "A2", "--only", "A2.6"]].concat(),
    );
    let more = lab.path("more");
    let found = compared(&lab, &[text(&more)]);
    assert_eq!(found["comparisons"].as_array().unwrap().len(), 1);
}

#[test]
fn equal_runs_say_that_every_sample_is_the_same() {
    let lab = Lab::new();
    for folder in ["run", "again"] {
        lab.run(folder, &[&ENSEMBLE[..], &CELLS].concat());
    }
    let found = compared(&lab, &[text(&lab.path("again"))]);
    for line in found["comparisons"].as_array().unwrap() {
        assert_eq!(line["identical"], true);
        close(&line["p_value"], 1.0);
        close(&line["delta"], 0.0);
        assert!(line["minimum_detectable"].is_null());
    }
    let out = good(&["compare", text(&lab.path("run")), text(&lab.path("again"))]);
    assert_eq!(
        out.matches("| every sample is the same |").count(),
        3,
        "{out}"
    );
}

#[test]
fn the_table() {
    let lab = marked();
    insta::assert_snapshot!("compare", good(&["compare", text(&lab.path("run"))]));
}

#[test]
fn what_a_killed_run_left_empty_is_passed_over() {
    let lab = marked();
    std::fs::write(lab.path("run/raw/A1.2.jsonl"), "").unwrap();
    let found = compared(&lab, &[]);
    assert_eq!(found["comparisons"].as_array().unwrap().len(), 1);
    std::fs::write(lab.path("run/raw/A1.2.jsonl"), "{\"experiment\": \"A1").unwrap();
    let found = compared(&lab, &[]);
    assert_eq!(found["comparisons"].as_array().unwrap().len(), 1);
    std::fs::write(lab.path("run/raw/A1.2.jsonl"), "").unwrap();
    let root = lab.path("run");
    let line = bad(
        &["compare", text(&root), "--only", "A1.2"],
        ExitStatus::Usage,
    );
    assert_eq!(
        lab.plain(&line),
        "error: --only: A1.2 has no rows in LAB/run"
    );
    // The run itself goes on, too.
    let resume = [
        &ENSEMBLE[..],
        &[
            "--suite", "A1", "A2", "--only", "A2.5", "--seeds", "0", "1", "--resume",
        ],
    ];
    lab.run("run", &resume.concat());
}

#[test]
fn what_cannot_be_compared_is_one_line() {
    let lab = marked();
    let root = lab.path("run");
    let root = text(&root);
    let says = |more: &[&str], expected: &str| {
        let line = lab.plain(&bad(
            &[&["compare", root], more].concat(),
            ExitStatus::Usage,
        ));
        assert_eq!(line, format!("error: {expected}"));
    };
    says(
        &["--only", "A1.22"],
        "--only: unknown id `A1.22`; did you mean `A1.2`?; LAB/run has REF, A1.1, A1.2, A2.5",
    );
    says(
        &["--against", "REV"],
        "--against: unknown id `REV`; did you mean `REF`?; LAB/run has REF, A1.1, A1.2, A2.5",
    );
    says(
        &["--only", "REF"],
        "nothing to compare: no other cell has rows of shared items",
    );
    says(
        &[text(&lab.path("none"))],
        "LAB/none: no run folder (it has no run.json)",
    );
    // Another benchmark, and other items of the same.
    let rows = lines((0..3).map(|i| {
        serde_json::json!({
            "id": format!("c{i}"), "question": "Which one flies?", "answerKey": "B",
            "choices": {"text": ["dog", "owl"], "label": ["A", "B"]},
        })
    }));
    let bench = format!("arc:{}", lab.write("choices.jsonl", &rows));
    lab.run(
        "choices",
        &[
            &ENSEMBLE[..3],
            &["--suite", "A1", "--only", "REF", "--bench", &bench],
        ]
        .concat(),
    );
    says(
        &[text(&lab.path("choices"))],
        "LAB/run is of gsm8k, LAB/choices of arc: they share no item",
    );
    let bench = format!(
        "gsm8k:{}",
        lab.write(
            "others.jsonl",
            "{\"question\": \"2 + 2?\", \"answer\": \"#### 4\"}\n"
        )
    );
    lab.run(
        "others",
        &[
            &ENSEMBLE[..3],
            &["--suite", "A1", "--only", "REF", "--bench", &bench],
        ]
        .concat(),
    );
    let done = call(&["compare", root, text(&lab.path("others"))]);
    assert_eq!(done.status, ExitStatus::Usage);
    assert_eq!(
        done.err,
        "note: the runs read different data files; items are matched by their ids\nerror: nothing to compare: no other cell has rows of shared items\n"
    );
    let line = bad(&["compare", root, "--score", "loose"], ExitStatus::Usage);
    assert!(line.contains("possible values: strict, flexible"), "{line}");
}
