//! Agents that meet in other ways than lockstep: chains with their handoffs, groups, and files that say so.

use std::path::Path;

use dlmom_cli::ExitStatus;
use serde_json::Value;

use super::{Lab, bad, call, good, numbers, strings, text};

const CHAIN: [&str; 2] = ["--model", "m"];
const REF: [&str; 4] = ["--suite", "A1", "--only", "REF"];

fn words<'a>(parts: &[&[&'a str]]) -> Vec<&'a str> {
    parts.concat()
}

/// A run of the reference pipeline alone, whose folder is sound.
fn reference(lab: &Lab, folder: &str, more: &[&str]) -> Vec<Value> {
    lab.run(folder, &words(&[&REF, more]));
    lab.sound(folder);
    lab.outputs(folder, "REF")
}

/// Every handoff of the traced samples, with its item.
fn handoffs(lab: &Lab, folder: &str) -> Vec<(String, Value)> {
    lab.traces(folder, "REF")
        .into_iter()
        .flat_map(|trace| {
            let item = trace["item_id"].as_str().unwrap().to_owned();
            let records = trace["handoffs"].as_array().unwrap().clone();
            records
                .into_iter()
                .map(move |record| (item.clone(), record))
        })
        .collect()
}

// --- chains ---

#[test]
fn one_model_is_a_generalist_that_hands_over_to_a_specialist() {
    let lab = Lab::new();
    let rows = reference(&lab, "run", &CHAIN);
    let manifest = lab.json("run/run.json");
    let topology = &manifest["context"]["topology"];
    assert_eq!(topology["name"], "sequential");
    let roles: Vec<&Value> = topology["seats"]
        .as_array()
        .unwrap()
        .iter()
        .map(|seat| &seat["role"])
        .collect();
    assert_eq!(roles, ["generalist", "specialist"]);
    assert_eq!(
        (&manifest["experts"], &manifest["shared_model"]),
        (&2.into(), &true.into())
    );
    for row in &rows {
        assert_eq!(row["handoffs"], 1);
    }
    // One agent at a time: a step has one expert's entropy, and nobody to agree with.
    for trace in lab.traces("run", "REF") {
        let experts = trace["expert_entropy"].as_array().unwrap();
        assert!(experts.iter().all(|step| numbers(step).len() == 1));
        let handed = trace["handoffs"][0]["step"].as_u64().unwrap();
        for (step, agent) in (0..).zip(numbers(&trace["agent"])) {
            assert_eq!(agent == 1.0, step > handed, "{step}");
        }
    }
    assert!(rows.iter().all(|row| row["agreement"].is_null()));
    // Lockstep is still to be had, of one agent.
    reference(&lab, "one", &words(&[&CHAIN, &["--topology", "lockstep"]]));
    assert_eq!(lab.json("one/run.json")["experts"], 1);
}

#[test]
fn a_row_counts_the_handoffs_of_its_trace_and_names_their_triggers() {
    let lab = Lab::new();
    let rows = reference(&lab, "run", &words(&[&CHAIN, &["--max-handoffs", "5"]]));
    for row in &rows {
        let of_item: Vec<Value> = handoffs(&lab, "run")
            .into_iter()
            .filter(|(item, _)| *item == row["item_id"])
            .map(|(_, record)| record)
            .collect();
        assert_eq!(row["handoffs"], of_item.len());
        let triggers: Vec<&Value> = of_item.iter().map(|record| &record["trigger"]).collect();
        assert_eq!(strings(&row["handoff_triggers"]), triggers);
        let bytes: u64 = of_item.iter().map(|r| r["bytes"].as_u64().unwrap()).sum();
        assert_eq!(row["handoff_bytes"], bytes);
        // A handoff is no switch.
        let switches = row["switches"].as_u64().unwrap();
        let changes = row["mode_runs"].as_array().unwrap().len() as u64;
        assert!(switches < changes, "{row}");
    }
    insta::assert_snapshot!(
        rows.iter()
            .map(|row| format!("{}: {}", row["item_id"], row["handoff_triggers"]))
            .collect::<Vec<_>>()
            .join("\n"),
        @r#"
    "q0": ["convergence","failure","step_budget","failure","step_budget"]
    "q1": ["step_budget","failure","step_budget","failure","step_budget"]
    "q2": ["convergence","failure","convergence","failure","step_budget"]
    "q3": ["step_budget","failure","step_budget","failure","step_budget"]
    "#
    );
}

#[test]
fn handoffs_never_exceed_their_bound() {
    let lab = Lab::new();
    for most in ["0", "1", "2"] {
        let rows = reference(&lab, most, &words(&[&CHAIN, &["--max-handoffs", most]]));
        let most: u64 = most.parse().unwrap();
        for row in &rows {
            let count = row["handoffs"].as_u64().unwrap();
            assert!(count <= most, "{row}");
            // Control leaves the generalist once; it comes back where there is no answer.
            let back = row["handoff_triggers"].as_array().unwrap().get(1);
            assert!(back.is_none_or(|trigger| trigger == "failure"), "{row}");
        }
        assert!(rows.iter().any(|row| row["handoffs"] == most), "{most}");
    }
    // Without a handoff the generalist answers, and says why nobody took over.
    let unanswered: Vec<Value> = lab
        .rows("0", "REF")
        .into_iter()
        .filter(|row| row["stop"] == "handoffs")
        .collect();
    assert!(!unanswered.is_empty());
    for row in unanswered {
        assert_eq!(
            row["error"],
            "generalist gave no answer, and 0 of 0 handoffs are used"
        );
    }
}

#[test]
fn each_payload_says_what_it_takes() {
    let lab = Lab::new();
    for payload in ["transcript", "text", "kv"] {
        reference(&lab, payload, &words(&[&CHAIN, &["--handoff", payload]]));
        let records = handoffs(&lab, payload);
        assert!(
            records
                .iter()
                .any(|(_, r)| r["positions"].as_u64() > Some(0)),
            "{payload}"
        );
        for (item, record) in records {
            assert_eq!(record["payload"], payload);
            let positions = record["positions"].as_u64().unwrap();
            let bytes = record["bytes"].as_u64().unwrap();
            let trace = lab
                .traces(payload, "REF")
                .into_iter()
                .find(|t| t["item_id"] == *item)
                .unwrap();
            let step = record["step"].as_u64().unwrap() as usize;
            let latent = strings(&trace["mode"])[..=step]
                .iter()
                .filter(|mode| **mode == "latent")
                .count() as u64;
            match payload {
                // A thinker prints nothing, and hands over every latent step.
                "transcript" => {
                    assert_eq!(positions, latent);
                    assert_eq!(bytes > 0, positions > 0);
                }
                // Its prompt is in its cache, too; the mock keeps 32 bytes a position.
                "kv" => {
                    assert!(positions > latent);
                    assert_eq!(bytes, 32 * positions);
                }
                // Each byte of the notes is a token of the mock, behind two line ends.
                _ => assert_eq!(positions, if bytes > 0 { bytes + 2 } else { 0 }),
            }
        }
    }
    assert_ne!(lab.outputs("transcript", "REF"), lab.outputs("kv", "REF"));
    assert_ne!(lab.outputs("transcript", "REF"), lab.outputs("text", "REF"));
}

#[test]
fn a_cache_is_handed_to_the_same_weights_only() {
    let lab = Lab::new();
    let several = ["--experts", "a", "b", "--topology", "sequential"];
    let line = lab.refused("run", &words(&[&REF, &several, &["--handoff", "kv"]]));
    assert_eq!(
        line,
        "error: REF: handoff: kv from mock-a to mock-b: other weights; a cache means something to the weights that made it alone"
    );
    assert!(!lab.path("run").exists());
    // A cell that asks for it where it cannot be is skipped.
    let file = lab.write("suites.yaml", "suites: {S: [{id: S1, handoff: kv}]}\n");
    let done = lab.run(
        "run",
        &words(&[&["--config", &file, "--suite", "S"], &several]),
    );
    assert!(
        done.out.contains(
            "skipped: handoff: kv needs agents of one model: a cache means something to its own weights alone"
        ),
        "{}",
        done.out
    );
    // Packets and texts pass between different models.
    for payload in ["transcript", "text"] {
        reference(&lab, payload, &words(&[&several, &["--handoff", payload]]));
    }
}

#[test]
fn a_shown_sample_marks_as_many_switches_as_its_row_has() {
    let lab = Lab::new();
    let rows = reference(&lab, "run", &words(&[&CHAIN, &["--max-handoffs", "2"]]));
    let root = lab.path("run");
    let mut handed = 0;
    for row in rows {
        let out = good(&[
            "show",
            text(&root),
            "REF",
            "--item",
            row["item_id"].as_str().unwrap(),
        ]);
        let marks = out
            .lines()
            .filter(|line| {
                line.get(..4)
                    .is_some_and(|n| n.trim().parse::<u32>().is_ok())
            })
            .filter(|line| line.get(4..5) == Some(">"))
            .count();
        assert_eq!(row["switches"], marks, "{out}");
        handed += out.matches("     -> mock-m (").count();
        let count = row["handoffs"].as_u64().unwrap();
        assert!(out.contains(&format!("\n{count} handoffs (")), "{out}");
    }
    assert_eq!(handed, handoffs(&lab, "run").len());
}

#[test]
fn replay_counts_switches_as_rows_do() {
    let lab = Lab::new();
    let rows = reference(&lab, "run", &words(&[&CHAIN, &["--max-handoffs", "2"]]));
    let mut switches: Vec<f64> = rows
        .iter()
        .map(|r| r["switches"].as_f64().unwrap())
        .collect();
    switches.sort_by(f64::total_cmp);
    let out = good(&["replay", text(&lab.path("run")), "--json"]);
    let recorded = &super::json(&out)["cells"][0]["recorded"];
    let median = 0.5 * (switches[1] + switches[2]);
    assert_eq!(recorded["switches_p50"].as_f64(), Some(median));
}

// --- groups ---

const PAIRS: &str = "name: two pairs\nkind: hierarchical\ngroups: {left: [0, 1], right: [2, 3]}\n";
const FOUR: [&str; 5] = ["--experts", "a", "b", "c", "d"];

#[test]
fn groups_are_merged_apart_and_then_with_one_another() {
    let lab = Lab::new();
    let file = lab.write("pairs.yaml", PAIRS);
    let grouped = words(&[&FOUR, &["--topology", &file]]);
    let rows = reference(&lab, "groups", &grouped);
    for trace in lab.traces("groups", "REF") {
        let experts = trace["expert_entropy"].as_array().unwrap();
        assert!(experts.iter().all(|step| numbers(step).len() == 4));
    }
    // What groups send up comes on top of the agents' logits.
    let flat = reference(&lab, "flat", &FOUR);
    let up = |rows: &[Value]| {
        let per_step = |row: &Value| {
            row["uplink_bytes"].as_f64().unwrap()
                / row["mode_runs"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|n| n.as_f64().unwrap())
                    .sum::<f64>()
        };
        rows.iter().map(per_step).fold(f64::INFINITY, f64::min)
    };
    // Four agents, 128 logits of 4 bytes each.
    assert_eq!(up(&flat), 4.0 * 128.0 * 4.0);
    assert!(up(&rows) > up(&flat));
    assert_ne!(rows, flat);
}

#[test]
fn what_a_pilot_fits_does_not_fit_a_group() {
    let lab = Lab::new();
    let file = lab.write("pairs.yaml", PAIRS);
    let more = words(&[
        &FOUR,
        &["--topology", &file, "--suite", "K1", "K2", "--only"],
    ]);
    let done = lab.run(
        "run",
        &words(&[&more, &["K1.mean", "K2.temperature", "K2.pilot"]]),
    );
    assert_eq!(
        done.out
            .matches("skipped: consensus: a pilot fits all agents")
            .count(),
        2,
        "{}",
        done.out
    );
    assert_eq!(lab.rows("run", "K1.mean").len(), 4);
    assert!(lab.json("run/run.json")["pilot"].is_null());
}

// --- files ---

#[test]
fn a_file_says_who_the_agents_are() {
    let lab = Lab::new();
    let file = lab.write(
        "chain.yaml",
        "name: mine
kind: sequential
agents:
  - {role: thinker, prompt: {question: 'Think: {question}', system: Briefly.}, latent_steps: 3}
  - {role: writer, prompt: solver, latent_steps: 0}
",
    );
    assert_eq!(
        lab.plain(&good(&["validate", &file])),
        "ok: LAB/chain.yaml: sequential, 2 agents\n"
    );
    let rows = reference(&lab, "run", &words(&[&CHAIN, &["--topology", &file]]));
    let manifest = lab.json("run/run.json");
    assert_eq!(manifest["context"]["topology"]["name"], "mine");
    for row in rows {
        // Only the thinker has latent steps, and no more than it may.
        assert!(row["latent_steps"].as_u64().unwrap() <= 3, "{row}");
    }
    // The file is part of what a folder was made with.
    lab.write(
        "chain.yaml",
        "name: mine\nkind: sequential\nagents: [{role: generalist}, {role: solver, latent_steps: 0}]\n",
    );
    let words = words(&[&REF, &CHAIN, &["--topology", &file, "--resume"]]);
    let done = lab.call("run", &words);
    assert_eq!(done.status, ExitStatus::Usage);
    assert!(
        done.err
            .contains("context.topology.seats[0].role: recorded \"thinker\", now \"generalist\""),
        "{}",
        done.err
    );
}

#[test]
fn faults_of_topology_files_are_one_line_each_for_run_and_validate() {
    let lab = Lab::new();
    let path = lab.path("bad.yaml");
    let chain = |agents: &str| format!("name: x\nkind: sequential\nagents: [{agents}]\n");
    let cases = [
        String::new(),
        "name: x\nkind: ring\n".to_owned(),
        "name: x\nkind: sequential\n".to_owned(),
        chain("{role: solver}"),
        chain("{role: solver}, {role: solver}"),
        chain("{role: solver}, {role: gneralist}"),
        chain("{role: solver}, {role: critic, prompt: critc}"),
        chain("{role: solver}, {role: critic, expert: 7}"),
        chain("{role: solver}, {role: critic, latent: 3}"),
        chain("{role: solver}, {role: critic}") + "handoff: cache\n",
        chain("{role: solver}, {role: critic}") + "on_failure: planner\n",
        chain("{role: solver}, {role: critic}") + "groups: {a: [0], b: [1]}\n",
        "name: x\nkind: lockstep\nhandoff: kv\n".to_owned(),
        "name: x\nkind: lockstep\nagents: [{role: solver, latent_steps: 3}]\n".to_owned(),
        "name: x\nkind: hierarchical\n".to_owned(),
        "name: x\nkind: hierarchical\ngroups: {a: [0], b: []}\n".to_owned(),
        "name: x\nkind: hierarchical\ngroups: {a: [0], b: [0]}\n".to_owned(),
        "name: x\nkind: hierarchical\ngroups: {a: [0], b: [4]}\n".to_owned(),
        "name: x\nkind: hierarchical\ngroups: {a: [0], b: [1]}\nmeta: {theta: -1}\n".to_owned(),
    ];
    let said: Vec<String> = cases
        .iter()
        .map(|content| {
            std::fs::write(&path, content).unwrap();
            let run = lab.refused(
                "run",
                &words(&[&REF, &["--experts", "a", "b", "--topology", text(&path)]]),
            );
            let run = lab.plain(&run);
            // A file by itself says how many experts it needs.
            let done = call(&["validate", "--kind", "topology", text(&path)]);
            let alone = lab.plain(done.out.trim_end());
            assert_eq!(alone.lines().count(), 1, "{alone}");
            if run == format!("error: {alone}") {
                run
            } else {
                format!("{run}\n  alone: {alone}")
            }
        })
        .collect();
    insta::assert_snapshot!("topology_faults", said.join("\n"));
    assert!(!Path::new(&lab.path("run")).exists());
}

#[test]
fn a_topology_that_is_neither_shipped_nor_a_file_is_named() {
    let lab = Lab::new();
    for (name, says) in [
        (
            "sequntial",
            "error: unknown topology `sequntial`; did you mean `sequential`?; known: lockstep, sequential, panel, debate, latentmas, or a file",
        ),
        (
            "nothing.yaml",
            "error: unknown topology `nothing.yaml`; known: lockstep, sequential, panel, debate, latentmas, or a file",
        ),
    ] {
        let line = lab.refused("run", &words(&[&REF, &CHAIN, &["--topology", name]]));
        assert_eq!(line, says);
        let line = bad(
            &[
                "generate",
                "--model",
                "m",
                "--prompt",
                "1 + 1?",
                "--topology",
                name,
            ],
            ExitStatus::Usage,
        );
        assert_eq!(line, says);
    }
    let line = lab.refused(
        "run",
        &words(&[
            &REF,
            &["--experts", "a", "b", "c", "--topology", "sequential"],
        ]),
    );
    assert_eq!(
        line,
        "error: --topology sequential: c is nobody's model; its 2 agents are generalist, specialist"
    );
    let line = lab.refused(
        "run",
        &words(&[&REF, &["--experts", "a", "b", "--topology", "panel"]]),
    );
    assert!(
        line.contains("role `refiner` is expert 2, counted from 0; there are 2"),
        "{line}"
    );
}
