//! `run --backend mock` and the tools that read what it leaves: list, doctor, validate, replay, schema, completions.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use dlmom_cli::ExitStatus;
use dlmom_cli::host::NoPython;
use dlmom_packet::{BeliefPacket, Encoding, Meta, encode};
use serde_json::Value;
use tempfile::TempDir;

use super::{bad, call, good, json, json_lines, questions, text};

/// A finished run of four cells over four questions on the mock.
struct MockRun {
    folder: TempDir,
    words: Vec<String>,
}

impl MockRun {
    fn new(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bench = format!("gsm8k:{}", questions(folder.path(), 4).display());
        let out = folder.path().join("run");
        let mut words: Vec<String> = [
            "run",
            "--backend",
            "mock",
            "--suite",
            "A1",
            "A2",
            "--only",
            "A1.1",
            "A1.2",
            "A2.5",
            "--experts",
            "zoo:one",
            "zoo:two",
            "--bench",
            &bench,
            "--out",
            text(&out),
            "--alpha",
            "0.5",
            "--max-steps",
            "24",
            "--batch-size",
            "3",
            "--display",
            "none",
        ]
        .map(String::from)
        .to_vec();
        words.extend(more.iter().map(ToString::to_string));
        let run = Self { folder, words };
        let done = run.call(&[]);
        assert_eq!(done.0, ExitStatus::Success, "{}", done.1);
        assert!(done.1.starts_with("note: --backend mock"), "{}", done.1);
        run
    }

    fn call(&self, more: &[&str]) -> (ExitStatus, String) {
        let mut words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        words.extend(more);
        let done = call(&words);
        (done.status, done.err)
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.folder.path().join("run").join(inside)
    }

    fn root(&self) -> String {
        text(&self.folder.path().join("run")).to_owned()
    }

    fn edit(&self, inside: &str, change: impl FnOnce(String) -> String) {
        let path = self.path(inside);
        let before = fs::read_to_string(&path).unwrap();
        let after = change(before.clone());
        assert_ne!(after, before, "{inside}");
        fs::write(&path, after).unwrap();
    }

    /// A text with the folder's name taken out.
    fn plain(&self, text: &str) -> String {
        text.replace(&self.root(), "RUN")
    }

    fn rows(&self, id: &str) -> Vec<Value> {
        json_lines(&self.path(&format!("raw/{id}.jsonl")))
    }
}

/// A change to one line, from 1, of a text.
fn in_line(number: usize, change: impl Fn(&str) -> String) -> impl FnOnce(String) -> String {
    move |text| {
        text.lines()
            .enumerate()
            .map(|(i, line)| {
                if i + 1 == number {
                    change(line) + "\n"
                } else {
                    line.to_owned() + "\n"
                }
            })
            .collect()
    }
}

// --- run --backend mock ---

#[test]
fn the_mock_runs_the_whole_pipeline() {
    let run = MockRun::new(&["--seeds", "0", "1"]);
    let manifest = json(&fs::read_to_string(run.path("run.json")).unwrap());
    assert_eq!(manifest["context"]["device"], "mock");
    assert_eq!(manifest["environment"]["backend"], "mock");
    assert_eq!(manifest["shared_model"], false);
    let names: Vec<&str> = manifest["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["mock-one", "mock-two"]);
    // The noiseless cell runs with one seed, the noisy one with both.
    assert_eq!(run.rows("REF").len(), 4);
    assert_eq!(run.rows("A1.2").len(), 8);
    assert!(!run.path("raw/A1.1.jsonl").exists());
    good(&["aggregate", &run.root()]);
    assert!(run.path("aggregate.csv").exists());
    let line = bad(
        &run.words.iter().map(String::as_str).collect::<Vec<_>>(),
        ExitStatus::Usage,
    );
    assert!(line.contains("already holds a run"), "{line}");
}

#[test]
fn agents_of_one_word_share_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let bench = format!("gsm8k:{}", questions(folder.path(), 1).display());
    let out = folder.path().join("run");
    good(&[
        "run",
        "--backend",
        "mock",
        "--suite",
        "A3",
        "--experts",
        "a",
        "a",
        "--bench",
        &bench,
        "--out",
        text(&out),
        "--max-steps",
        "8",
        "--alpha",
        "0.1",
        "--display",
        "none",
    ]);
    let manifest = json(&fs::read_to_string(out.join("run.json")).unwrap());
    assert_eq!(manifest["shared_model"], true);
    assert_eq!(manifest["models"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["context"]["agents"], serde_json::json!([0, 0]));
    // Embeddings can be sent where the agents are of one model.
    let listed = good(&["validate", text(&out)]);
    assert!(listed.contains("6 experiments"), "{listed}");
    good(&["replay", text(&out)]);
}

#[test]
fn a_killed_mock_run_resumes_to_the_same_rows() {
    let whole = MockRun::new(&[]);
    let killed = MockRun::new(&[]);
    killed.edit("raw/A1.2.jsonl", |text| text[..text.len() / 2].to_owned());
    fs::remove_file(killed.path("raw/A2.5.jsonl")).unwrap();
    let (status, err) = killed.call(&["--resume"]);
    assert_eq!(status, ExitStatus::Success, "{err}");
    let outputs = |run: &MockRun, id| -> BTreeSet<String> {
        run.rows(id)
            .iter()
            .map(|r| {
                format!(
                    "{} {} {} {}",
                    r["item_id"], r["seed"], r["text"], r["entropy"]
                )
            })
            .collect()
    };
    for id in ["REF", "A1.2", "A2.5"] {
        assert_eq!(outputs(&whole, id), outputs(&killed, id));
    }
    // A sample killed between its trace and its row is traced twice, which is no fault.
    good(&["validate", &killed.root()]);
    good(&["replay", &killed.root()]);
}

// --- validate ---

#[test]
fn a_good_run_is_told_in_a_few_lines() {
    let run = MockRun::new(&[]);
    insta::assert_snapshot!(run.plain(&good(&["validate", &run.root()])), @r"
    ok: RUN/run.json: 4 cells on gsm8k, finished
    ok: RUN/configs: 4 experiments with the recorded digests
    ok: RUN/raw: 12 rows, each once and of its cell's digest
    ok: RUN/traces: 12 samples whose traces agree with their rows
    ok: RUN/summary: 4 that follow from the rows
    ");
    let parts = good(&[
        "validate",
        text(&run.path("raw/REF.jsonl")),
        text(&run.path("traces/REF.jsonl")),
    ]);
    insta::assert_snapshot!(run.plain(&parts), @r"
    ok: RUN/raw/REF.jsonl: 4 rows
    ok: RUN/traces/REF.jsonl: 4 traces
    ");
}

#[test]
fn every_fault_of_a_run_is_named_by_file_and_line() {
    let run = MockRun::new(&[]);
    run.edit("raw/REF.jsonl", |text| text + "{\"item_id\": ");
    run.edit("raw/A1.2.jsonl", |text| {
        let first = text.lines().next().unwrap().to_owned();
        text + &first + "\n"
    });
    run.edit(
        "raw/A2.5.jsonl",
        in_line(2, |line| line.replace("\"switches\":", "\"switches\":9")),
    );
    run.edit(
        "raw/A2.5.jsonl",
        in_line(3, |line| line.replace("\"correct\"", "\"corect\"")),
    );
    run.edit(
        "traces/A1.2.jsonl",
        in_line(1, |line| line.replacen("\"mass\":[", "\"mass\":[1.0,", 1)),
    );
    run.edit(
        "traces/REF.jsonl",
        in_line(2, |line| line.replacen("\"latent\"", "\"explicit\"", 1)),
    );
    run.edit("configs/A1.1.yaml", |text| {
        text.replace("cap: 10", "cap: 11")
    });
    run.edit("configs/A2.5.yaml", |text| {
        text.replace("gate: trend", "gate: trendy")
    });
    fs::write(run.path("raw/A9.jsonl"), "").unwrap();
    let done = call(&["validate", &run.root()]);
    assert_eq!(done.status, ExitStatus::Usage);
    insta::assert_snapshot!("faults", digests_out(&run.plain(&(done.out + &done.err))));
}

/// A text with 32 and more hexadecimal digits in a row taken out: digests depend on the data's path-free content, but hide
/// what the line says.
fn digests_out(text: &str) -> String {
    let mut out = String::new();
    let mut run = String::new();
    for c in text.chars().chain([' ']) {
        if c.is_ascii_hexdigit() {
            run.push(c);
            continue;
        }
        if run.len() >= 32 {
            out.push_str("DIGEST");
        } else {
            out.push_str(&run);
        }
        run.clear();
        out.push(c);
    }
    out.pop();
    out
}

#[test]
fn a_summary_that_does_not_follow_is_a_fault() {
    let run = MockRun::new(&[]);
    run.edit("summary/A1.2.json", |text| {
        text.replace("\"n\": 4", "\"n\": 5")
    });
    fs::remove_file(run.path("summary/A2.5.json")).unwrap();
    let done = call(&["validate", &run.root()]);
    assert_eq!(done.status, ExitStatus::Usage);
    let out = run.plain(&done.out);
    assert!(
        out.contains("RUN/summary/A1.2.json: n is 5, the rows give 4\n"),
        "{out}"
    );
    assert!(out.contains("RUN/summary/A2.5.json: not there\n"), "{out}");
    assert_eq!(done.err, "error: 2 problems\n");
}

#[test]
fn a_run_that_was_stopped_is_valid() {
    let run = MockRun::new(&[]);
    run.edit("run.json", |text| {
        let at = text.find("\"finished_at\": ").unwrap() + "\"finished_at\": ".len();
        let end = at + text[at..].find('\n').unwrap();
        format!("{}null{}", &text[..at], &text[end..])
    });
    run.edit("raw/A2.5.jsonl", |text| {
        text.split_inclusive('\n').take(2).collect()
    });
    fs::remove_file(run.path("summary/A2.5.json")).unwrap();
    let out = good(&["validate", &run.root()]);
    assert!(out.contains("not finished"), "{out}");
}

#[test]
fn what_is_no_run_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let problem = |path: &Path, more: &[&str]| {
        let mut words = vec!["validate", text(path)];
        words.extend(more);
        let done = call(&words);
        assert_eq!(done.status, ExitStatus::Usage, "{}", done.out);
        assert_eq!(done.err, "error: 1 problem\n", "{}", done.out);
        done.out.trim_end().replace(text(folder.path()), "F")
    };
    assert_eq!(problem(&at("none"), &[]), "F/none: no such file or folder");
    assert_eq!(
        problem(folder.path(), &[]),
        "F: no run folder: neither run.json nor raw/"
    );
    assert_eq!(
        problem(folder.path(), &["--kind", "run"]),
        "F/run.json: not there"
    );
    fs::write(at("run.json"), "{\n  \"format\" 1}").unwrap();
    assert_eq!(
        problem(folder.path(), &[]),
        "F/run.json:2: not a manifest: column 12: expected `:`"
    );
    fs::write(at("rows.jsonl"), "{\"question\": \"q\"}\n").unwrap();
    assert_eq!(
        problem(&at("rows.jsonl"), &[]),
        "F/rows.jsonl:1: not a row: missing field `schema_version`"
    );
    fs::write(at("empty.jsonl"), "").unwrap();
    assert_eq!(
        problem(&at("empty.jsonl"), &[]),
        "F/empty.jsonl: holds no rows"
    );
}

#[test]
fn problems_beyond_a_cap_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    fs::write(&path, "{}\n".repeat(70)).unwrap();
    let done = call(&["validate", text(&path)]);
    assert_eq!(done.out.lines().count(), 51);
    assert!(
        done.out.trim_end().ends_with("20 more problems"),
        "{}",
        done.out
    );
    assert_eq!(done.err, "error: 70 problems\n");
}

#[test]
fn suites_files_are_expanded_for_both_settings() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("suites.yaml");
    let said = |content: &str| {
        fs::write(&path, content).unwrap();
        let done = call(&["validate", text(&path)]);
        (done.out + &done.err).replace(text(&path), "FILE")
    };
    insta::assert_snapshot!(said("suites:\n  S:\n    - {id: S1, comm: embed}\n    - {id: S2, k: 7}\n    - {id: S3, kv: minicache}\n"), @r"
    ok: FILE: 1 suites, 3 cells
    ok: FILE: agents of one model: 2 run, 1 same as another, 0 skipped; not built yet: S3
    ok: FILE: agents of several models: 2 run, 0 same as another, 1 skipped; not built yet: S3
    ok: FILE: agents of a chain: 2 run, 1 same as another, 0 skipped; not built yet: S3
    ");
    insta::assert_snapshot!(said("suites:\n  S:\n    - {id: S1, gate: trend}\n"), @r"
    ok: FILE: 1 suites, 1 cells
    FILE: S1: w is missing; the trend gate needs a window of at least 2 steps
    error: 1 problem
    ");
    insta::assert_snapshot!(said("suites:\n  S:\n    - {id: S1, gaet: trend}\n"));
    insta::assert_snapshot!(said("suites:\n  S:\n    - {id: S1}\n    - {id: s1}\n"), @r"
    FILE:4: id `s1` is already used on line 3
    error: 1 problem
    ");
}

#[test]
fn packet_files_are_decoded_to_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("packets.bin");
    let packet = BeliefPacket::new(vec![3, 1], vec![0.75, 0.25], 0.9, 10).unwrap();
    let one = encode(&packet, Meta::default(), Encoding::F32).unwrap();
    let bytes = [one.clone(), one.clone()].concat();
    fs::write(&path, &bytes).unwrap();
    let out = good(&["validate", text(&path)]);
    assert!(out.trim_end().ends_with("packets.bin: 2 packet"), "{out}");
    fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let done = call(&["validate", text(&path)]);
    assert_eq!(done.status, ExitStatus::Usage);
    assert!(
        done.out.contains("packets.bin: offset") && done.out.contains("cut short"),
        "{}",
        done.out
    );
    let renamed = folder.path().join("packets.yaml");
    fs::write(&renamed, &bytes).unwrap();
    good(&["validate", text(&renamed), "--kind", "packet"]);
}

// --- replay ---

#[test]
fn a_recording_replays_to_the_same_decisions() {
    let run = MockRun::new(&[]);
    let out = good(&["replay", &run.root()]);
    let traced: usize = ["REF", "A1.2", "A2.5"]
        .iter()
        .flat_map(|id| json_lines(&run.path(&format!("traces/{id}.jsonl"))))
        .map(|t| t["mode"].as_array().unwrap().len())
        .sum();
    assert_eq!(
        out,
        format!("{traced} decisions of 12 samples in 3 cells equal the recording\n")
    );
    // An alias is the cell whose samples it shares.
    let alias = good(&["replay", &run.root(), "A1.1", "REF"]);
    assert!(
        alias.ends_with("of 4 samples in 1 cells equal the recording\n"),
        "{alias}"
    );
}

#[test]
fn every_controller_path_replays() {
    // Spent budgets, caps, dwell and reserved answers all leave their reasons in the recording.
    for more in [
        &["--max-latent-steps", "3"][..],
        &["--max-switches", "2", "--alpha", "0.6"],
        &["--alpha", "2.2", "--alpha-unit", "nats"],
        &["--alpha", "2"],
    ] {
        let run = MockRun::new(&[]);
        let other = run.folder.path().join("other");
        let mut words: Vec<&str> = run.words.iter().map(String::as_str).collect();
        let at = words.iter().position(|w| *w == "--out").unwrap();
        words[at + 1] = text(&other);
        if more.contains(&"--alpha") {
            let at = words.iter().position(|w| *w == "--alpha").unwrap();
            words.drain(at..at + 2);
        }
        words.extend(more);
        good(&words);
        good(&["replay", text(&other)]);
        good(&["validate", text(&other)]);
    }
}

#[test]
fn a_changed_recording_is_a_failure() {
    let run = MockRun::new(&[]);
    let mut trace = json_lines(&run.path("traces/REF.jsonl")).swap_remove(0);
    let reasons = trace["reason"].as_array().unwrap();
    let step = reasons.iter().position(|r| r == "above_alpha").unwrap();
    // What the controller saw has to follow from the entropies, bit for bit.
    let seen = trace["observed"][step].clone();
    trace["observed"][step] = (seen.as_f64().unwrap() + 1e-15).into();
    run.edit("traces/REF.jsonl", in_line(1, |_| trace.to_string()));
    let done = call(&["replay", &run.root()]);
    assert_eq!(done.status, ExitStatus::Failure);
    assert!(done.out.contains("the entropies give"), "{}", done.out);
    trace["observed"][step] = 0.01.into();
    trace["entropy"][step] = 0.01.into();
    run.edit("traces/REF.jsonl", in_line(1, |_| trace.to_string()));
    let done = call(&["replay", &run.root()]);
    assert_eq!(done.status, ExitStatus::Failure);
    assert!(
        done.out.contains(&format!(
            "step {step}: recorded latent (above_alpha), replayed explicit (below_alpha)"
        )),
        "{}",
        done.out
    );
    assert!(
        done.err.contains("decisions differ from the recording"),
        "{}",
        done.err
    );
    // A line that is no trace is named; a torn last one was never finished.
    run.edit("traces/REF.jsonl", in_line(2, |_| "[]".into()));
    let line = bad(&["replay", &run.root()], ExitStatus::Usage);
    assert!(line.contains("REF.jsonl:2: not a trace"), "{line}");
}

#[test]
fn other_knobs_give_a_table() {
    let run = MockRun::new(&[]);
    insta::assert_snapshot!(
        "replay_table",
        good(&["replay", &run.root(), "--alpha", "0.65", "--cap", "-1"])
    );
    // The last quarter of the steps is kept for the answer, whatever the gate wants.
    let out = good(&[
        "replay",
        &run.root(),
        "REF",
        "--gate",
        "always-latent",
        "--cap",
        "-1",
        "--json",
    ]);
    let value = json(&out);
    let cell = &value["cells"][0];
    assert_eq!(value["as_recorded"], false);
    assert_eq!(cell["experiment"], "REF");
    let share = open_to_latent(&run);
    assert_eq!(cell["replayed"]["latent_coverage"].as_f64(), Some(share));
    // The same in a recording whose latent budget had hidden the reserve.
    let short = MockRun::new(&["--max-latent-steps", "2"]);
    let out = good(&[
        "replay",
        &short.root(),
        "REF",
        "--gate",
        "always-latent",
        "--max-latent-steps",
        "99",
        "--cap",
        "-1",
        "--json",
    ]);
    let share = open_to_latent(&short);
    let replayed = &json(&out)["cells"][0]["replayed"];
    assert_eq!(replayed["latent_coverage"].as_f64(), Some(share));
}

/// The share of REF's recorded steps that may be latent: the first 18 of 24, unless the end of the answer was certain.
fn open_to_latent(run: &MockRun) -> f64 {
    let traces = json_lines(&run.path("traces/REF.jsonl"));
    let reasons: Vec<&Vec<Value>> = traces
        .iter()
        .map(|t| t["reason"].as_array().unwrap())
        .collect();
    let open: usize = reasons
        .iter()
        .map(|r| r.iter().take(18).filter(|r| **r != "eos_certain").count())
        .sum();
    open as f64 / reasons.iter().map(|r| r.len()).sum::<usize>() as f64
}

#[test]
fn entropies_are_read_in_the_unit_of_alpha() {
    let run = MockRun::new(&[]);
    // ln 128 nats are 1; the same threshold in the other unit decides the same but for rounding.
    let nats = (0.5 * 128f64.ln()).to_string();
    let out = good(&[
        "replay",
        &run.root(),
        "--alpha-unit",
        "nats",
        "--alpha",
        &nats,
        "--json",
    ]);
    for cell in json(&out)["cells"].as_array().unwrap() {
        assert_eq!(cell["changed"], 0, "{cell}");
    }
    let line = bad(
        &["replay", &run.root(), "--alpha-unit", "nats"],
        ExitStatus::Usage,
    );
    assert!(
        line.contains("give --alpha in the other unit too"),
        "{line}"
    );
}

#[test]
fn replay_refuses_in_one_line() {
    let run = MockRun::new(&[]);
    let root = run.root();
    for (words, says) in [
        (&["nowhere"][..], "nowhere: no such run folder"),
        (&[&root, "A1.9"], "unknown id `A1.9`; did you mean `A1.1`?"),
        (&[&root, "--gate", "trend"], "REF: w is missing"),
        (&[&root, "--alpha", "-1"], "alpha"),
        (
            &[&root, "--alpha-unit", "quantile", "--alpha", "1"],
            "quantile needs the quantiles of the run's pilot (run.json records no pilot)",
        ),
        (&[&root, "--cap", "-2"], "cap"),
    ] {
        let words: Vec<&str> = ["replay"]
            .into_iter()
            .chain(words.iter().copied())
            .collect();
        let line = bad(&words, ExitStatus::Usage);
        assert!(line.contains(says), "{line}");
    }
    let empty = tempfile::tempdir().unwrap();
    let line = bad(&["replay", text(empty.path())], ExitStatus::Usage);
    assert!(line.contains("holds no run"), "{line}");
    let untraced = MockRun::new(&["--traces", "0"]);
    let line = bad(&["replay", &untraced.root()], ExitStatus::Usage);
    assert!(line.contains("no sample was traced"), "{line}");
    run.edit("traces/A1.2.jsonl", |text| {
        text.replacen("\"above_alpha\"", "\"custom\"", 1)
    });
    let line = bad(&["replay", &root], ExitStatus::Usage);
    assert!(line.contains("a rule of the user's own"), "{line}");
}

// --- list, doctor, schema, completions, version ---

#[test]
fn lists() {
    insta::assert_snapshot!("list", good(&["list"]));
    insta::assert_snapshot!(
        "list_experiments",
        good(&[
            "list",
            "experiments",
            "--suite",
            "A1",
            "A3",
            "--agents",
            "several-models"
        ])
    );
    insta::assert_snapshot!("list_presets", good(&["list", "presets"]));
    insta::assert_snapshot!("list_topologies", good(&["list", "topologies"]));
    insta::assert_snapshot!("list_prompts", good(&["list", "prompts"]));
    let line = bad(&["list", "suites", "--suite", "A9"], ExitStatus::Usage);
    assert!(line.contains("unknown suite `A9`"), "{line}");
    let line = bad(&["list", "--config", "none.yaml"], ExitStatus::Usage);
    assert!(line.contains("none.yaml: cannot read"), "{line}");
    let line = bad(&["list", "things"], ExitStatus::Usage);
    assert!(line.contains("possible values: suites"), "{line}");
}

#[test]
fn the_json_list_holds_whole_experiments() {
    let value = json(&good(&["list", "experiments", "--json"]));
    let cells = value["experiments"].as_array().unwrap();
    assert_eq!(cells[0]["id"], "REF");
    for cell in cells {
        let mut whole = cell["knobs"].clone();
        whole["id"] = cell["id"].clone();
        whole["suite"] = cell["suite"].clone();
        let experiment: dlmom_runs::Experiment = serde_json::from_value(whole).unwrap();
        assert_eq!(experiment.id, cell["id"].as_str().unwrap());
    }
    let skipped = json(&good(&["list", "--json", "--agents", "several-models"]));
    let embed = skipped["experiments"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["id"] == "A3.1")
        .unwrap();
    assert_eq!(embed["kind"], "skip");
    for kind in ["presets", "topologies", "prompts"] {
        assert!(skipped[kind].as_array().unwrap().len() > 3, "{kind}");
    }
    assert_eq!(skipped["experts"], serde_json::json!([]));
}

#[test]
fn doctor_without_python_says_what_it_knows() {
    let out = good(&["doctor"]);
    assert!(out.starts_with("build\n  version   0."), "{out}");
    assert!(out.contains("\nmachine\n  cores  "), "{out}");
    assert!(
        out.ends_with("use the doctor of the Python package\n"),
        "{out}"
    );
    let value = json(&good(&["doctor", "--json"]));
    assert!(value["python"].is_null());
    assert!(value["cores"].as_u64().unwrap() >= 1);
    assert_eq!(value["build"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn the_long_version_has_the_build_facts() {
    let version = format!("dlmom-rs {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(good(&["-V"]), version);
    let long = good(&["--version"]);
    assert!(long.starts_with(&version), "{long}");
    let names: Vec<&str> = long
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(names, ["profile", "target", "rustc", "commit", "features"]);
}

#[test]
fn schemas_have_names() {
    let names = good(&["schema"]);
    for name in names.lines() {
        let schema = json(&good(&["schema", name]));
        assert!(schema["$schema"].is_string(), "{name}");
    }
    for name in ["suites", "row", "experiment", "trace"] {
        assert!(names.lines().any(|known| known == name), "{names}");
    }
    let line = bad(&["schema", "suite"], ExitStatus::Usage);
    assert!(line.contains("did you mean `suites`?"), "{line}");
}

#[test]
fn every_shell_gets_a_script() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = good(&["completions", shell]);
        for word in ["dlmom-rs", "replay", "backend"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let script = good(&["completions", "zsh", "--name", "dlmom"]);
    assert!(script.starts_with("#compdef dlmom\n"));
    let line = bad(&["completions", "tcsh"], ExitStatus::Usage);
    assert!(line.contains("tcsh"), "{line}");
}

#[test]
fn a_closed_pipe_is_no_failure() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let run = MockRun::new(&[]);
    for words in [
        &["list"][..],
        &["list", "--json"],
        &["doctor"],
        &["schema", "row"],
        &["completions", "bash"],
        &["validate", &run.root()],
        &["replay", &run.root()],
        &["replay", &run.root(), "--alpha", "1"],
    ] {
        let argv: Vec<String> = ["dlmom-rs"]
            .iter()
            .chain(words)
            .map(ToString::to_string)
            .collect();
        let mut err = Vec::new();
        let status = dlmom_cli::run(&argv, &mut NoPython, &mut Closed, &mut err);
        assert_eq!(status, ExitStatus::Success, "{words:?}");
        assert!(
            err.is_empty(),
            "{words:?}: {}",
            String::from_utf8_lossy(&err)
        );
    }
}
