//! Suites C1 and C2: what each control changes, and what it leaves alone.

use std::collections::BTreeMap;
use std::fs;

use dlmom_packet::{BeliefPacket, Transcript};
use serde_json::Value;

use super::{Lab, numbers, strings};

const CHAIN: [&str; 2] = ["--model", "m"];
const ENSEMBLE: [&str; 3] = ["--experts", "a", "b"];

fn words<'a>(agents: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [agents, more].concat()
}

/// Traces by item.
fn traces(lab: &Lab, id: &str) -> BTreeMap<String, Value> {
    lab.traces("run", id)
        .into_iter()
        .map(|t| (t["item_id"].as_str().unwrap().to_owned(), t))
        .collect()
}

/// Steps that are latent, in order.
fn latent(trace: &Value) -> Vec<usize> {
    let modes = strings(&trace["mode"]);
    (0..modes.len()).filter(|&s| modes[s] == "latent").collect()
}

/// Steps from the start on that two samples have in common, by entropy and mode.
fn common(a: &Value, b: &Value) -> usize {
    let (x, y) = (numbers(&a["entropy"]), numbers(&b["entropy"]));
    let modes = |s: usize| a["mode"][s] == b["mode"][s];
    (0..x.len().min(y.len()))
        .take_while(|&s| x[s].to_bits() == y[s].to_bits() && modes(s))
        .count()
}

/// The packets of the pilot's items.
fn donors(lab: &Lab) -> Vec<(String, Vec<BeliefPacket>)> {
    let bytes = fs::read(lab.path("run/pilot/donors.dltr")).unwrap();
    let manifest = lab.json("run/run.json");
    let mut rest = &bytes[..];
    let found = strings(&manifest["pilot"]["donor_items"])
        .into_iter()
        .map(|item| {
            let (transcript, taken) = Transcript::decode(rest).unwrap();
            rest = &rest[taken..];
            (item.to_owned(), transcript.into_packets())
        })
        .collect();
    assert!(rest.is_empty());
    found
}

/// A run of C1 with its latent steps in the reference pipeline's samples.
fn c1(agents: &[&str]) -> Lab {
    let lab = Lab::new();
    lab.run(
        "run",
        &words(agents, &["--suite", "C1", "--seeds", "0", "1"]),
    );
    let reference = traces(&lab, "REF");
    assert!(reference.values().filter(|t| !latent(t).is_empty()).count() >= 2);
    lab
}

fn every_packet_control(agents: &[&str]) {
    let lab = c1(agents);
    let reference = traces(&lab, "REF");
    for id in ["C1.1", "C1.2", "C1.3", "C1.4", "C1.5", "C1.6", "C1.7"] {
        for (item, trace) in traces(&lab, id) {
            let first = latent(&reference[&item]).first().copied();
            let same = common(&reference[&item], &trace);
            match first {
                // What is fed shows in the step after.
                Some(first) => assert_eq!(same, first + 1, "{id}, {item}"),
                None => assert_eq!(
                    trace["entropy"], reference[&item]["entropy"],
                    "{id}, {item}"
                ),
            }
            for step in latent(&trace) {
                assert!(
                    trace["noise_js"][step].as_f64().unwrap() > 0.0,
                    "{id}, {item}"
                );
            }
        }
    }
    for trace in traces(&lab, "C1.1").values() {
        for step in latent(trace) {
            let probs = numbers(&trace["top_probs"][step]);
            assert!(
                probs.iter().all(|p| (p - 1.0 / 50.0).abs() < 1e-7),
                "{probs:?}"
            );
        }
    }
    for trace in traces(&lab, "C1.2").values() {
        // A filler is no packet, so there is no divergence that is finite.
        assert!(
            latent(trace)
                .iter()
                .all(|&s| trace["noise_kl"][s].is_null())
        );
    }
    for id in ["C1.5", "C1.7"] {
        for trace in traces(&lab, id).values() {
            for step in latent(trace) {
                assert_eq!(numbers(&trace["top_probs"][step]), [1.0]);
            }
        }
    }
}

#[test]
fn every_control_of_packets_takes_effect_at_the_first_latent_step_of_a_chain() {
    every_packet_control(&CHAIN);
}

#[test]
fn every_control_of_packets_takes_effect_at_the_first_latent_step_of_an_ensemble() {
    every_packet_control(&ENSEMBLE);
}

#[test]
fn packets_of_another_item_are_one_items_of_the_pilot_in_its_order() {
    for agents in [&CHAIN[..], &ENSEMBLE] {
        let lab = c1(agents);
        let donors = donors(&lab);
        let mut met = BTreeMap::new();
        for (item, trace) in traces(&lab, "C1.3") {
            let steps = latent(&trace);
            let fits = |packets: &[BeliefPacket]| {
                steps.iter().enumerate().all(|(n, &step)| {
                    let packet = &packets[n % packets.len()];
                    let ids: Vec<f64> = packet.ids().iter().map(|id| f64::from(*id)).collect();
                    numbers(&trace["top_ids"][step]) == ids[..5]
                })
            };
            let givers: Vec<&str> = donors
                .iter()
                .filter(|(_, packets)| fits(packets))
                .map(|(id, _)| id.as_str())
                .collect();
            assert!(
                !givers.is_empty() && !givers.contains(&&*item),
                "{item}: {givers:?}"
            );
            met.insert(item, givers.join(" "));
        }
        assert!(met.values().any(|giver| *giver != met["q0"]), "{met:?}");
    }
}

#[test]
fn noise_of_equal_strength_is_as_far_as_the_top_token_alone() {
    let lab = c1(&ENSEMBLE);
    let reference = traces(&lab, "REF");
    let mut seen = 0;
    for (item, trace) in traces(&lab, "C1.6") {
        // At the first latent step the packet is the reference's, which fed it as it was.
        let Some(&step) = latent(&reference[&item]).first() else {
            continue;
        };
        let top = reference[&item]["top_probs"][step][0].as_f64().unwrap();
        let found = trace["noise_kl"][step].as_f64().unwrap();
        assert!((found + top.ln()).abs() < 2e-3, "{found}, {top}");
        seen += 1;
    }
    assert!(seen >= 2);
}

#[test]
fn same_exits_follows_the_modes_of_the_references_samples() {
    for agents in [&CHAIN[..], &ENSEMBLE] {
        let lab = c1(agents);
        let runs = |id: &str| -> BTreeMap<String, Value> {
            let rows = lab.outputs("run", id).into_iter();
            rows.map(|r| (r["item_id"].to_string(), r["mode_runs"].clone()))
                .collect()
        };
        assert_eq!(runs("C1.7"), runs("REF"));
        // The same packets with exits of their own: it is the control that keeps them.
        assert_ne!(runs("C1.5"), runs("REF"));
        for trace in traces(&lab, "C1.7").values() {
            let reasons = strings(&trace["reason"]);
            let own = ["above_alpha", "below_alpha"];
            assert!(reasons.contains(&"scheduled"));
            assert!(
                reasons.iter().all(|reason| !own.contains(reason)),
                "{reasons:?}"
            );
        }
    }
}

#[test]
fn dropped_stretches_change_nothing_before_their_end() {
    let lab = c1(&ENSEMBLE);
    let reference = traces(&lab, "REF");
    let mut cut = 0;
    for (item, trace) in traces(&lab, "C1.8") {
        let same = common(&reference[&item], &trace);
        let modes = strings(&reference[&item]["mode"]);
        // The token printed at the exit is still that of the whole context.
        let exit = (1..modes.len()).find(|&s| modes[s - 1] == "latent" && modes[s] == "explicit");
        match exit {
            Some(exit) if exit + 1 < modes.len() => {
                assert_eq!(same, exit + 1, "{item}");
                cut += 1;
            }
            _ => assert_eq!(trace["entropy"], reference[&item]["entropy"], "{item}"),
        }
    }
    assert!(cut >= 2);
}

#[test]
fn without_latent_steps_there_are_none() {
    for agents in [&CHAIN[..], &ENSEMBLE] {
        let lab = c1(agents);
        for row in lab.rows("run", "C1.9") {
            assert_eq!(
                (&row["latent_steps"], &row["switches"]),
                (&0.into(), &0.into())
            );
        }
    }
}

// --- what is handed over ---

#[test]
fn controls_of_a_transcript_take_effect_where_it_is_handed_over() {
    let lab = Lab::new();
    lab.run(
        "run",
        &words(&CHAIN, &["--suite", "C2", "--seeds", "0", "1"]),
    );
    let reference = traces(&lab, "REF");
    let donors = donors(&lab);
    let mut handed = 0;
    for id in ["C2.1", "C2.2", "C2.3", "C2.4"] {
        for (item, trace) in traces(&lab, id) {
            let (theirs, ours) = (&reference[&item]["handoffs"][0], &trace["handoffs"][0]);
            for name in ["step", "from", "to", "trigger", "payload"] {
                assert_eq!(theirs[name], ours[name], "{id}, {item}: {name}");
            }
            let count = |record: &Value| record["positions"].as_u64().unwrap();
            let (positions, bytes) = (count(ours), ours["bytes"].as_u64().unwrap());
            match id {
                "C2.3" => assert!(
                    donors
                        .iter()
                        .any(|(giver, p)| *giver != item && p.len() as u64 == positions),
                    "{item}"
                ),
                "C2.4" => assert_eq!((positions, bytes), (0, 0)),
                // As many positions, and as many bytes.
                _ => assert_eq!(
                    (positions, bytes),
                    (count(theirs), theirs["bytes"].as_u64().unwrap())
                ),
            }
            // Other contents, or another number of positions.
            let least = if id == "C2.2" { 2 } else { 1 };
            let differs = count(theirs) >= least || positions != count(theirs);
            let step = theirs["step"].as_u64().unwrap() as usize;
            let same = common(&reference[&item], &trace);
            if differs {
                assert_eq!(same, step + 1, "{id}, {item}");
                handed += 1;
            } else {
                assert_eq!(
                    trace["entropy"], reference[&item]["entropy"],
                    "{id}, {item}"
                );
            }
        }
    }
    assert!(handed >= 8, "{handed}");
    lab.sound("run");
}

#[test]
fn what_a_topology_does_not_hand_over_cannot_be_controlled() {
    let lab = Lab::new();
    for (folder, more, reason) in [
        (
            "lockstep",
            &ENSEMBLE[..],
            "handoff_control: only a sequential topology hands anything over",
        ),
        (
            "text",
            &["--model", "m", "--handoff", "text"],
            "handoff_control: what is handed over is no transcript",
        ),
        (
            "kv",
            &["--model", "m", "--handoff", "kv"],
            "handoff_control: what is handed over is no transcript",
        ),
    ] {
        let done = lab.run(folder, &words(more, &["--suite", "C2"]));
        assert_eq!(
            done.out.matches(&format!("skipped: {reason}")).count(),
            4,
            "{}",
            done.out
        );
        assert!(lab.json(&format!("{folder}/run.json"))["pilot"].is_null());
    }
}

// --- everything replays, and holds what it should ---

const ALL: [&str; 7] = ["--suite", "A1", "A2", "A3", "C1", "C2", "K1"];

#[test]
fn every_decision_of_every_cell_replays_and_the_folder_is_valid() {
    let lab = Lab::new();
    let groups = lab.write(
        "groups.yaml",
        "name: pairs\nkind: hierarchical\ngroups: {left: [0, 1], right: [2, 3]}\n",
    );
    let cases: [(&str, &[&str]); 7] = [
        ("chain", &CHAIN),
        ("back", &["--model", "m", "--max-handoffs", "3"]),
        ("notes", &["--model", "m", "--handoff", "text"]),
        ("caches", &["--model", "m", "--topology", "latentmas"]),
        ("ensemble", &ENSEMBLE),
        (
            "ranks",
            &["--experts", "a", "b", "--alpha-unit", "quantile"],
        ),
        (
            "groups",
            &["--experts", "a", "b", "c", "d", "--topology", &groups],
        ),
    ];
    for (folder, agents) in cases {
        let more = words(agents, &["--limit", "3", "--drift", "1"]);
        lab.run(folder, &words(&more, &ALL));
        let manifest = lab.json(&format!("{folder}/run.json"));
        let cells = manifest["cells"].as_array().unwrap();
        let run = cells.iter().filter(|cell| cell["kind"] == "run").count();
        assert!(run > 25, "{folder}: {run}");
        let said = lab.sound(folder);
        assert!(
            said.ends_with(&format!(" in {run} cells equal the recording\n")),
            "{folder}: {said}"
        );
    }
}
