//! The pilot before a run: what it finds, who reads it, and that every resume uses the one that was recorded.

use std::fs;

use dlmom_eval::sha256_hex;
use serde_json::{Value, json};

use super::{Lab, lines, numbers, refusal, strings, text};

const ENSEMBLE: [&str; 3] = ["--experts", "a", "b"];

fn with<'a>(parts: &[&[&'a str]]) -> Vec<&'a str> {
    parts.concat()
}

/// Words of a run whose alpha is a quantile.
fn ranked<'a>(more: &[&'a str]) -> Vec<&'a str> {
    with(&[&ENSEMBLE, &["--alpha-unit", "quantile"], more])
}

const NOISY: [&str; 4] = ["--suite", "A1", "--only", "A1.2"];
const OTHER: [&str; 5] = ["--suite", "C1", "--only", "C1.1", "C1.3"];

fn pilot(lab: &Lab, folder: &str) -> Value {
    lab.json(&format!("{folder}/run.json"))["pilot"].clone()
}

fn digest(lab: &Lab, folder: &str, id: &str) -> String {
    let manifest = lab.json(&format!("{folder}/run.json"));
    let cells = manifest["cells"].as_array().unwrap().clone();
    let cell = cells.iter().find(|c| c["id"] == id).unwrap();
    cell["config_hash"].as_str().unwrap().to_owned()
}

#[test]
fn a_pilot_takes_items_that_are_not_run_where_there_are_enough() {
    let lab = Lab::new();
    let done = lab.run("spare", &ranked(&NOISY));
    assert!(
        done.err
            .contains("pilot: entropies of REF without latent steps, 6 items"),
        "{}",
        done.err
    );
    // 6 spread evenly over the 8 behind the limit.
    let found = pilot(&lab, "spare");
    let items = ["q4", "q5", "q6", "q8", "q9", "q10"];
    assert_eq!(strings(&found["items"]), items);
    let run: Vec<Value> = lab
        .rows("spare", "REF")
        .iter()
        .map(|r| r["item_id"].clone())
        .collect();
    assert!(
        run.iter().all(|id| !items.contains(&id.as_str().unwrap())),
        "{run:?}"
    );
    // With 4 left, 6 spread evenly over all.
    lab.run("few", &ranked(&with(&[&NOISY, &["--limit", "8"]])));
    assert_eq!(
        strings(&pilot(&lab, "few")["items"]),
        ["q0", "q2", "q4", "q6", "q8", "q10"]
    );
    // Never more than there are.
    lab.run("all", &ranked(&with(&[&NOISY, &["--pilot-items", "99"]])));
    assert_eq!(pilot(&lab, "all")["items"].as_array().unwrap().len(), 12);
}

#[test]
fn the_quantiles_are_those_of_the_steps_of_an_explicit_run_over_the_same_items() {
    let lab = Lab::new();
    lab.run("run", &ranked(&NOISY));
    let found = pilot(&lab, "run");
    // Control C1.9 is the reference pipeline without latent steps; its traces hold every entropy.
    let explicit = with(&[
        &ENSEMBLE,
        &["--suite", "C1", "--only", "C1.9"],
        &["--limit", "12", "--traces", "12"],
    ]);
    lab.run("explicit", &explicit);
    let mut sorted: Vec<f64> = lab
        .traces("explicit", "C1.9")
        .iter()
        .filter(|t| strings(&found["items"]).contains(&t["item_id"].as_str().unwrap()))
        .flat_map(|t| numbers(&t["entropy"]))
        .collect();
    sorted.sort_by(f64::total_cmp);
    assert_eq!(found["steps"].as_u64().unwrap(), sorted.len() as u64);
    let quantiles = numbers(&found["quantiles"]);
    assert_eq!(quantiles.len(), 501);
    for (i, quantile) in quantiles.iter().enumerate() {
        let place = (i * (sorted.len() - 1)) as f64 / 500.0;
        let below = place.floor() as usize;
        let above = (below + 1).min(sorted.len() - 1);
        let expected = sorted[below] + (place - below as f64) * (sorted[above] - sorted[below]);
        assert!((quantile - expected).abs() < 1e-12, "{i}: {quantile}");
    }
}

#[test]
fn a_step_is_latent_where_its_entropy_is_above_the_quantile_alpha_of_the_pilot() {
    let lab = Lab::new();
    lab.run("run", &ranked(&NOISY));
    let quantiles = numbers(&pilot(&lab, "run")["quantiles"]);
    // Alpha is 0.5.
    let median = quantiles[250];
    let mut seen = [0, 0];
    for trace in lab.traces("run", "REF") {
        let reasons = strings(&trace["reason"]);
        for (step, entropy) in numbers(&trace["entropy"]).into_iter().enumerate() {
            let observed = trace["observed"][step].as_f64().unwrap();
            let below = quantiles.iter().filter(|q| **q < entropy).count() as f64;
            let (least, most) = ((below - 1.0) / 500.0, below / 500.0);
            assert!(
                (least - 1e-12..=most + 1e-12).contains(&observed),
                "{observed}"
            );
            match reasons[step] {
                "above_alpha" => {
                    assert!(entropy > median);
                    seen[0] += 1;
                }
                "below_alpha" => {
                    assert!(entropy <= median);
                    seen[1] += 1;
                }
                _ => {}
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
    lab.sound("run");
}

#[test]
fn what_a_pilot_finds_depends_neither_on_rows_nor_on_order() {
    let lab = Lab::new();
    let file = lab.write("suites.yaml", SUITES);
    // More items than are left, so that those of the run are among the pilot's.
    let words = with(&[
        &ENSEMBLE,
        &["--config", &file, "--suite", "S", "--limit", "8"],
    ]);
    lab.run("given", &words);
    let reversed = with(&[&words, &["--order", "reversed", "--batch-size", "5"]]);
    lab.run("reversed", &reversed);
    let found = pilot(&lab, "given");
    assert_eq!(found, pilot(&lab, "reversed"));
    assert!(found["temperatures"].is_array() && found["donors_sha256"].is_string());
    for id in ["REF", "ranked", "fitted", "other"] {
        assert_eq!(lab.outputs("given", id), lab.outputs("reversed", id));
    }
}

#[test]
fn a_dry_run_says_that_a_pilot_comes_first() {
    let lab = Lab::new();
    let said = lab
        .run("none", &ranked(&with(&[&NOISY, &["--dry-run"]])))
        .out;
    assert!(said.contains("a pilot of 6 items comes first\n"), "{said}");
    let said = lab.run("none", &with(&[&ENSEMBLE, &NOISY, &["--dry-run"]]));
    assert!(!said.out.contains("pilot"), "{}", said.out);
    assert!(!lab.path("none").exists());
}

// --- resume ---

#[test]
fn a_resume_uses_the_recorded_pilot_and_adds_nothing() {
    let lab = Lab::new();
    lab.run("run", &ranked(&NOISY));
    let before = lab.json("run/run.json");
    let rows = ["REF", "A1.2"].map(|id| lab.rows("run", id));
    // Other items would give other quantiles.
    let again = ranked(&with(&[&NOISY, &["--resume", "--pilot-items", "3"]]));
    let done = lab.run("run", &again);
    assert!(!done.err.contains("pilot:"), "{}", done.err);
    let after = lab.json("run/run.json");
    assert_eq!(before["pilot"], after["pilot"]);
    assert_eq!(before["cells"], after["cells"]);
    assert_eq!(rows, ["REF", "A1.2"].map(|id| lab.rows("run", id)));
    // What is added is decided by the same quantiles, as in a run that had it from the start.
    lab.run(
        "run",
        &ranked(&with(&[&NOISY, &["--resume", "--limit", "5"]])),
    );
    assert_eq!(pilot(&lab, "run"), before["pilot"]);
    assert_eq!(lab.rows("run", "REF").len(), 5);
    lab.sound("run");
}

#[test]
fn a_folder_that_lost_its_pilot_cannot_go_on() {
    let lab = Lab::new();
    lab.run("run", &ranked(&NOISY));
    lab.edit("run/run.json", |manifest| manifest["pilot"] = Value::Null);
    let before = fs::read(lab.path("run/run.json")).unwrap();
    let line = lab.refused("run", &ranked(&with(&[&NOISY, &["--resume"]])));
    assert_eq!(
        lab.plain(&line),
        "error: LAB/run: REF ran with the pilot's quantiles, and run.json does not hold them; choose another --out"
    );
    assert_eq!(fs::read(lab.path("run/run.json")).unwrap(), before);
    let line = super::bad(
        &["replay", text(&lab.path("run"))],
        dlmom_cli::ExitStatus::Usage,
    );
    assert!(line.contains("needs a pilot run"), "{line}");
}

#[test]
fn another_pilot_is_refused_before_anything_is_written() {
    let lab = Lab::new();
    lab.run("run", &ranked(&NOISY));
    lab.edit("run/run.json", |manifest| {
        let quantile = &mut manifest["pilot"]["quantiles"][0];
        *quantile = json!(0.5 * quantile.as_f64().unwrap());
    });
    let before = fs::read(lab.path("run/run.json")).unwrap();
    let done = lab.call("run", &ranked(&with(&[&NOISY, &["--resume"]])));
    assert_eq!(done.status, dlmom_cli::ExitStatus::Usage);
    assert_eq!(
        done.err.matches("what the pilot found has changed").count(),
        2,
        "{}",
        done.err
    );
    assert_eq!(fs::read(lab.path("run/run.json")).unwrap(), before);
}

#[test]
fn a_suite_that_needs_packets_of_other_items_adds_them_and_keeps_the_quantiles() {
    let lab = Lab::new();
    lab.run("run", &ranked(&NOISY));
    let before = lab.json("run/run.json");
    let done = lab.run("run", &ranked(&with(&[&OTHER, &["--resume"]])));
    let said: Vec<&str> = done
        .err
        .lines()
        .filter(|l| l.starts_with("pilot"))
        .collect();
    assert_eq!(said, ["pilot: packets of REF, 6 items"]);
    let after = lab.json("run/run.json");
    for name in [
        "items",
        "steps",
        "quantiles",
        "temperatures",
        "cross_entropies",
    ] {
        assert_eq!(before["pilot"][name], after["pilot"][name], "{name}");
    }
    let packets = fs::read(lab.path("run/pilot/donors.dltr")).unwrap();
    assert_eq!(after["pilot"]["donors_sha256"], sha256_hex(&packets));
    for id in ["REF", "A1.2"] {
        let of = |manifest: &Value| {
            let cells = manifest["cells"].as_array().unwrap().clone();
            cells.into_iter().find(|c| c["id"] == id)
        };
        assert_eq!(of(&before), of(&after));
    }
    lab.sound("run");
    // The same cells and packets as in a run that had the suite from the start.
    lab.run(
        "whole",
        &ranked(&with(&[&["--suite", "A1"], &OTHER, &["A1.2"]])),
    );
    assert_eq!(pilot(&lab, "run"), pilot(&lab, "whole"));
    for id in ["REF", "A1.2", "C1.1", "C1.3"] {
        assert_eq!(lab.outputs("run", id), lab.outputs("whole", id));
    }
}

#[test]
fn packets_that_are_missing_or_damaged_are_made_again() {
    let lab = Lab::new();
    let words = with(&[&ENSEMBLE, &OTHER]);
    lab.run("run", &words);
    let path = lab.path("run/pilot/donors.dltr");
    let packets = fs::read(&path).unwrap();
    let resume = with(&[&words, &["--resume"]]);
    let problem = |says: &str| {
        let done = super::call(&["validate", text(&lab.path("run"))]);
        assert!(done.out.contains(says), "{}", done.out);
        assert_eq!(done.err, "error: 1 problem\n");
    };
    fs::remove_file(&path).unwrap();
    problem("donors.dltr: not there\n");
    lab.run("run", &resume);
    assert_eq!(fs::read(&path).unwrap(), packets);
    fs::write(&path, [&packets[..], b"x"].concat()).unwrap();
    problem("donors.dltr: its digest is not the one in run.json\n");
    lab.run("run", &resume);
    assert_eq!(fs::read(&path).unwrap(), packets);
    lab.sound("run");
}

#[test]
fn packets_that_cannot_be_had_again_are_refused() {
    let lab = Lab::new();
    let words = with(&[&ENSEMBLE, &OTHER]);
    lab.run("run", &words);
    let path = lab.path("run/pilot/donors.dltr");
    let resume = with(&[&words, &["--resume"]]);
    let recorded = |digest: &str| {
        lab.edit("run/run.json", |m| {
            m["pilot"]["donors_sha256"] = digest.into();
        });
        let packets = fs::read(&path).unwrap();
        let line = lab.plain(&lab.refused("run", &resume));
        // What is there may still be of use to somebody.
        assert_eq!(fs::read(&path).unwrap(), packets);
        line
    };
    assert_eq!(
        recorded(&"0".repeat(64)),
        "error: LAB/run/pilot/donors.dltr: the recorded packets are missing or damaged, and the pilot gives others now; choose another --out"
    );
    // Whole by its digest, and no transcripts.
    fs::write(&path, b"packets").unwrap();
    let line = recorded(&sha256_hex(b"packets"));
    assert!(
        line.starts_with("error: LAB/run/pilot/donors.dltr: packets of item q4: "),
        "{line}"
    );
}

#[test]
fn a_pilot_without_latent_steps_has_no_packets_to_give() {
    let lab = Lab::new();
    let words = with(&[&ENSEMBLE, &OTHER, &["--alpha", "0.999"]]);
    let line = lab.refused("run", &words);
    assert_eq!(
        line,
        "error: packets of other items: REF took latent steps on 0 of 6 pilot items, and 2 are needed; lower --alpha, or give --alpha-unit quantile"
    );
    assert!(!lab.path("run").exists());
}

// --- who reads it ---

const SUITES: &str = "suites:
  S:
    - {id: plain, k: 20}
    - {id: ranked, alpha_unit: quantile}
    - {id: fitted, consensus: {method: mean, calibrate: temperature}}
    - {id: weighed, consensus: {method: mean, weights: pilot}}
    - {id: other, packet_control: other}
";

#[test]
fn a_pilot_enters_the_digests_of_the_cells_that_read_it() {
    let lab = Lab::new();
    let file = lab.write("suites.yaml", SUITES);
    let words = with(&[&ENSEMBLE, &["--config", &file, "--suite", "S"]]);
    lab.run("six", &words);
    lab.run("three", &with(&[&words, &["--pilot-items", "3"]]));
    for (id, reads) in [
        ("REF", false),
        ("plain", false),
        ("ranked", true),
        ("fitted", true),
        ("weighed", true),
        ("other", true),
    ] {
        let differs = digest(&lab, "six", id) != digest(&lab, "three", id);
        assert_eq!(differs, reads, "{id}");
        assert_eq!(
            lab.outputs("six", id) != lab.outputs("three", id),
            reads,
            "{id}"
        );
    }
    for folder in ["six", "three"] {
        lab.sound(folder);
    }
}

// --- what is fitted on solutions ---

const FITTED: [&str; 2] = ["--suite", "K2"];

#[test]
fn temperatures_and_weights_are_fitted_once_on_the_solutions_of_the_pilots_items() {
    let lab = Lab::new();
    let words = with(&[&ENSEMBLE, &FITTED]);
    let done = lab.run("run", &words);
    assert!(
        done.err
            .contains("pilot: temperatures on the solutions of 6 items"),
        "{}",
        done.err
    );
    let found = pilot(&lab, "run");
    assert_eq!(numbers(&found["temperatures"]).len(), 2);
    let losses = numbers(&found["cross_entropies"]);
    // The mock knows nothing of the solutions: it does worse than chance among its 128 tokens.
    assert!(losses.iter().all(|x| *x > 128f64.ln()), "{losses:?}");
    lab.sound("run");
    let resumed = lab.run("run", &with(&[&words, &["--resume"]]));
    assert!(!resumed.err.contains("pilot:"), "{}", resumed.err);
    assert_eq!(pilot(&lab, "run"), found);
    // Cells that ran with them cannot go on without.
    lab.edit("run/run.json", |m| m["pilot"]["temperatures"] = Value::Null);
    let line = lab.refused("run", &with(&[&words, &["--resume"]]));
    assert!(
        line.contains("K2.temperature ran with the pilot's temperatures and weights"),
        "{line}"
    );
}

#[test]
fn a_folder_of_quantiles_gets_temperatures_when_a_suite_wants_them() {
    let lab = Lab::new();
    lab.run("run", &ranked(&NOISY));
    let before = pilot(&lab, "run");
    lab.run("run", &ranked(&with(&[&FITTED, &["--resume"]])));
    let after = pilot(&lab, "run");
    assert_eq!(before["quantiles"], after["quantiles"]);
    assert_eq!(before["temperatures"], Value::Null);
    assert_eq!(numbers(&after["temperatures"]).len(), 2);
    lab.sound("run");
}

#[test]
fn a_benchmark_without_solutions_cannot_fit() {
    let lab = Lab::new();
    let rows = lines((0..3).map(|i| {
        json!({
            "id": format!("c{i}"), "question": "Which one flies?", "answerKey": "B",
            "choices": {"text": ["dog", "owl"], "label": ["A", "B"]},
        })
    }));
    let bench = format!("arc:{}", lab.write("choices.jsonl", &rows));
    let done = lab.call("run", &with(&[&ENSEMBLE, &FITTED, &["--bench", &bench]]));
    assert_eq!(done.status, dlmom_cli::ExitStatus::Usage);
    assert_eq!(
        refusal(&done),
        "error: temperatures and pilot weights are fitted on solutions, and arc has none"
    );
    assert!(!lab.path("run").exists());
}
