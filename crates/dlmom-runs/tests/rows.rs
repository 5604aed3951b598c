//! Raw rows: labels, grades and what may not be written.
#![expect(clippy::expect_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{context, experiment, item, outcome, row};
use dlmom_eval::{CodeJudge, Item, JudgeError, Method, NoJudge, Program, Task, Verdict};
use dlmom_runs::{Failure, RawRow, RowContext, RowError};
use dlmom_runtime::{MemoryStats, Outcome, Stop};

fn recorded(outcome: &Outcome, item: &Item) -> Result<RawRow, RowError> {
    judged(outcome, item, &mut NoJudge)
}

fn judged(outcome: &Outcome, item: &Item, judge: &mut dyn CodeJudge) -> Result<RawRow, RowError> {
    let experiment = experiment("A1.2");
    let hash = experiment.config_hash(&context()).expect("finite knobs");
    let context = RowContext {
        experiment: &experiment,
        config_hash: &hash,
        bench: "tinygsm",
        batch_size: 8,
        memory: MemoryStats::default(),
        drift: None,
    };
    RawRow::new(&context, outcome, item, judge)
}

#[test]
fn every_ending_has_its_label() {
    let item = item(18);
    for (stop, answer, failure, correct) in [
        (Stop::Eos, Some(18), None, true),
        (Stop::Eos, Some(19), None, false),
        (Stop::Eos, None, Some(Failure::ParseFailure), false),
        (Stop::Budget, Some(18), None, true),
        (Stop::Budget, None, Some(Failure::Timeout), false),
        (Stop::Context, None, Some(Failure::Timeout), false),
        (Stop::NanInf, Some(18), Some(Failure::NanInf), false),
        (Stop::Backend, Some(18), Some(Failure::BackendError), false),
        (Stop::Prompt, None, Some(Failure::BackendError), false),
        (Stop::Handoffs, None, Some(Failure::Timeout), false),
    ] {
        let mut sample = outcome(&item, 0, answer, 2);
        sample.stop = stop;
        sample.error = Some("boom\n  at step 3".into());
        let row = recorded(&sample, &item).unwrap();
        assert_eq!(
            (row.failure, row.correct, row.correct_flexible),
            (failure, correct, correct)
        );
        assert_eq!(row.error.as_deref(), Some("boom at step 3"));
    }
}

#[test]
fn sums_and_answers_are_those_of_the_outcome() {
    let row = row(&experiment("A1.2"), 18, 3, Some(18), 2);
    assert_eq!(
        (row.total_steps, row.prompt_tokens, row.forward_tokens),
        (7, 23, 37)
    );
    assert_eq!(
        (row.answer.as_deref(), row.gold.as_str()),
        (Some("18"), "18")
    );
    assert!(!row.deterministic);
    assert!(row.drift.is_none());
    assert_eq!(row.key().seed, 3);
}

#[test]
fn a_line_keeps_the_order_of_its_keys_and_reads_back() {
    let row = row(&experiment("REF"), 18, 0, None, 0);
    let line = serde_json::to_string(&row).unwrap();
    insta::assert_snapshot!("raw_row", line);
    assert_eq!(serde_json::from_str::<RawRow>(&line).unwrap(), row);
}

#[test]
fn the_deterministic_view_leaves_out_when_and_where() {
    let a = row(&experiment("REF"), 18, 0, None, 0);
    let b = RawRow {
        latency_s: 9.0,
        started_at: 5.0,
        batch_size: 1,
        peak_rss_bytes: None,
        peak_device_bytes: Some(3),
        ..a.clone()
    };
    assert_ne!(a, b);
    assert_eq!(
        a.deterministic_view().unwrap(),
        b.deterministic_view().unwrap()
    );
    let c = RawRow {
        switches: 3,
        ..a.clone()
    };
    assert_ne!(
        a.deterministic_view().unwrap(),
        c.deterministic_view().unwrap()
    );
}

type Change = fn(&mut Outcome, f64);

#[test]
fn numbers_that_json_cannot_hold_are_errors_unless_the_sample_failed_by_them() {
    let item = item(18);
    let changes: [(&str, Change); 7] = [
        ("latency_s", |o, v| o.latency_s = v),
        ("started_at", |o, v| o.started_at = v),
        ("topk_mass", |o, v| o.topk_mass = Some(v)),
        ("noise_kl", |o, v| o.noise_kl = Some(v)),
        ("entropy.mean", |o, v| o.entropy.mean = v),
        ("entropy.min", |o, v| o.entropy.min = v),
        ("entropy.max", |o, v| o.entropy.max = v),
    ];
    for (name, change) in changes {
        for value in [f64::NAN, f64::INFINITY] {
            let mut sample = outcome(&item, 0, None, 2);
            change(&mut sample, value);
            let Err(RowError::NonFinite { field, .. }) = recorded(&sample, &item) else {
                panic!("{name} = {value} was accepted")
            };
            assert_eq!(field, name);
            sample.stop = Stop::NanInf;
            let timing = matches!(name, "latency_s" | "started_at");
            assert_eq!(recorded(&sample, &item).is_err(), timing, "{name}");
        }
    }
    let mut failed = outcome(&item, 0, None, 2);
    failed.stop = Stop::NanInf;
    failed.entropy.mean = f64::NAN;
    failed.topk_mass = Some(f64::NAN);
    let row = recorded(&failed, &item).unwrap();
    assert_eq!(
        (row.entropy, row.topk_mass, row.noise_kl),
        (None, None, Some(0.05))
    );
}

#[test]
fn an_outcome_of_another_item_is_refused() {
    let error = recorded(&outcome(&item(1), 0, None, 0), &item(2)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "outcome of item item-1 was paired with item item-2"
    );
}

/// Says the same about every program, and counts them.
struct Says(Result<Verdict, JudgeError>, u32);

impl CodeJudge for Says {
    fn judge(&mut self, _: &Program<'_>) -> Result<Verdict, JudgeError> {
        self.1 += 1;
        self.0.clone()
    }
}

#[test]
fn programs_are_judged_and_only_those_of_samples_that_did_not_fail() {
    let item = Item {
        question: "def f(x):\n".into(),
        gold: "    return x\n".into(),
        solution: None,
        task: Task::Code {
            test: "def check(candidate):\n    assert candidate(1) == 1\n".into(),
            entry_point: "f".into(),
        },
        ..item(1)
    };
    let mut sample = outcome(&item, 0, None, 2);
    sample.text = "    return x".into();
    let source = Some("def f(x):\n    return x".to_owned());
    for (stop, verdict, correct, failure, answer) in [
        (Stop::Eos, Verdict::Passed, true, None, &source),
        (Stop::Budget, Verdict::Passed, true, None, &source),
        (Stop::Eos, Verdict::Failed("E".into()), false, None, &source),
        (Stop::Eos, Verdict::TimedOut, false, None, &source),
        (
            Stop::Eos,
            Verdict::NoProgram,
            false,
            Some(Failure::ParseFailure),
            &None,
        ),
        (
            Stop::Budget,
            Verdict::NoProgram,
            false,
            Some(Failure::Timeout),
            &None,
        ),
        (
            Stop::NanInf,
            Verdict::Passed,
            false,
            Some(Failure::NanInf),
            &source,
        ),
    ] {
        sample.stop = stop;
        let mut judge = Says(Ok(verdict), 0);
        let row = judged(&sample, &item, &mut judge).unwrap();
        assert_eq!((row.correct, row.correct_flexible), (correct, correct));
        assert_eq!(
            (row.failure, &row.answer, &row.error),
            (failure, answer, &None)
        );
        assert_eq!(row.gold, item.gold);
        assert_eq!(judge.1, u32::from(stop != Stop::NanInf));
        let line = serde_json::to_string(&row).unwrap();
        assert_eq!(serde_json::from_str::<RawRow>(&line).unwrap(), row);
    }
    sample.stop = Stop::Eos;
    let broken = Err(JudgeError::Runner("no memory".into()));
    let error = judged(&sample, &item, &mut Says(broken, 0)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "item item-1, seed 0: cannot judge code: the runner failed: no memory"
    );
}

#[test]
fn letters_are_graded_and_never_guessed() {
    let item = Item {
        gold: "B".into(),
        solution: None,
        task: Task::Choice {
            options: vec!["fire".into(), "ice".into()],
        },
        ..item(1)
    };
    for (text, correct, flexible, failure, method) in [
        ("#### B", true, true, None, Method::Hashes),
        ("It is (B).", false, true, None, Method::Marked),
        ("#### A", false, false, None, Method::Hashes),
        (
            "Who knows?",
            false,
            false,
            Some(Failure::ParseFailure),
            Method::None,
        ),
    ] {
        let mut sample = outcome(&item, 0, None, 2);
        sample.text = text.into();
        let row = recorded(&sample, &item).unwrap();
        assert_eq!(
            (row.correct, row.correct_flexible),
            (correct, flexible),
            "{text}"
        );
        assert_eq!(
            (row.failure, row.answer_method),
            (failure, method),
            "{text}"
        );
    }
}

#[test]
fn the_schema_names_every_method() {
    let schema = serde_json::to_value(schemars::schema_for!(RawRow)).unwrap();
    let named = &schema["properties"]["answer_method"]["enum"];
    for method in Method::ALL {
        let label = serde_json::to_value(method).unwrap();
        assert!(named.as_array().unwrap().contains(&label), "{label}");
    }
    assert_eq!(named.as_array().unwrap().len(), Method::ALL.len());
}
