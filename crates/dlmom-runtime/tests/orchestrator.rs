//! The loop on mock backends: budgets, endings, refill, failures, and independence of the batch.

#![expect(clippy::expect_used, reason = "test helpers")]

use std::ops::ControlFlow;

use dlmom_core::{
    AlphaUnit, ConsensusSpec, ControllerSpec, Gate, Mode, NoiseSpec, Reason, SamplingSpec, Start,
};
use dlmom_runtime::{
    Backend, BackendError, EnsembleInfo, Feed, Job, JobKey, LaneId, LaneSpec, LinkSpec, LoopConfig,
    MemoryStats, MockBackend, ModelId, Outcome, Progress, PromptSource, Readout, Row, RunError,
    RunOptions, RunStats, Sink, SlotId, Stop, run,
};
use proptest::prelude::*;

fn controller(gate: Gate, alpha: f64, cap: i64) -> ControllerSpec {
    ControllerSpec {
        gate,
        w: Some(3),
        alpha,
        alpha_unit: AlphaUnit::Normalized,
        cap,
        min_dwell_latent: 1,
        min_dwell_explicit: 1,
        convergence_threshold: None,
        slope_eps: None,
        var_eps: None,
        max_latent_steps: 12,
        start: Start::Gate,
        ..ControllerSpec::default()
    }
}

fn config(gate: Gate, alpha: f64) -> LoopConfig {
    LoopConfig {
        k: 5,
        link: LinkSpec::default(),
        controller: controller(gate, alpha, -1),
        consensus: ConsensusSpec::paper(),
        noise: NoiseSpec::None,
        sampling: SamplingSpec::GREEDY,
        max_steps: 24,
        answer_reserve: 4,
        answer_cue: None,
        ..LoopConfig::default()
    }
}

fn job(index: u32, agents: usize, length: u32) -> Job {
    let ids: Vec<u32> = (0..length).map(|i| 1 + (i * 7 + index * 3) % 22).collect();
    Job {
        key: JobKey {
            item_id: format!("item-{index}"),
            seed: 0,
            sample: 0,
        },
        prompts: vec![PromptSource::Tokens { ids }; agents],
        trace: true,
        config: 0,
        schedule: None,
        rival: None,
    }
}

#[derive(Default)]
struct Collect {
    outcomes: Vec<Outcome>,
    reports: u32,
    stop_after: Option<usize>,
    fail: bool,
}

impl Sink for Collect {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if self.fail {
            return Err("disk full".into());
        }
        self.outcomes.push(outcome);
        Ok(())
    }

    fn progress(&mut self, progress: &Progress) {
        assert!(progress.active > 0);
        self.reports += 1;
    }

    fn poll(&mut self) -> ControlFlow<()> {
        match self.stop_after {
            Some(n) if self.outcomes.len() >= n => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }
}

fn go(backend: &mut dyn Backend, config: &LoopConfig, jobs: Vec<Job>) -> (Vec<Outcome>, RunStats) {
    let mut sink = Collect::default();
    let stats = run(
        backend,
        config,
        &RunOptions::default(),
        &mut jobs.into_iter(),
        &mut sink,
    )
    .expect("the run succeeds");
    (sink.outcomes, stats)
}

/// An outcome without what the clock decides.
fn timeless(mut outcome: Outcome) -> Outcome {
    outcome.latency_s = 0.0;
    outcome.started_at = 0.0;
    outcome
}

fn by_key(outcomes: Vec<Outcome>) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = outcomes.into_iter().map(timeless).collect();
    outcomes.sort_by(|a, b| a.key.cmp(&b.key));
    outcomes
}

#[test]
fn a_sample_is_the_same_alone_in_a_batch_in_any_order_and_after_refill() {
    for noise in [
        NoiseSpec::None,
        NoiseSpec::Gumbel { tau: 1.0 },
        NoiseSpec::Dirichlet { lambda: 20.0 },
    ] {
        let mut cfg = config(Gate::Threshold, 0.45);
        cfg.noise = noise;
        cfg.sampling = SamplingSpec {
            temperature: 0.8,
            top_k: 0,
            top_p: 0.95,
            min_p: 0.0,
            ..SamplingSpec::GREEDY
        };
        let jobs = || (0..17).map(|i| job(i, 2, 3 + i % 5)).collect::<Vec<_>>();
        let (alone, _) = go(&mut MockBackend::hashed(2, 23, 1, 64), &cfg, jobs());
        let (batch, stats) = go(&mut MockBackend::hashed(2, 23, 4, 64), &cfg, jobs());
        let mut reversed = jobs();
        reversed.reverse();
        let (back, _) = go(&mut MockBackend::hashed(2, 23, 7, 64), &cfg, reversed);
        let alone = by_key(alone);
        assert_eq!(alone, by_key(batch));
        assert_eq!(alone, by_key(back));
        assert_eq!(alone.len(), 17);
        assert!(stats.rows > stats.steps, "slots were shared");
        assert!(
            alone.iter().any(|o| o.latent_steps > 0),
            "some sample thought in latent mode"
        );
    }
}

#[test]
fn seeds_change_noise_and_nothing_else_does() {
    let mut cfg = config(Gate::AlwaysLatent, 0.5);
    cfg.noise = NoiseSpec::Gumbel { tau: 1.0 };
    let seeded = |seed| {
        let mut j = job(1, 2, 4);
        j.key.seed = seed;
        go(&mut MockBackend::hashed(2, 23, 2, 64), &cfg, vec![j])
            .0
            .remove(0)
    };
    assert_eq!(timeless(seeded(3)), timeless(seeded(3)));
    assert_ne!(
        seeded(3).trace.unwrap().top_probs,
        seeded(4).trace.unwrap().top_probs
    );
    assert!(seeded(3).noise_kl.unwrap() > 0.0);
}

#[test]
fn latent_steps_change_what_is_printed() {
    let explicit = config(Gate::AlwaysExplicit, 0.5);
    let latent = config(Gate::AlwaysLatent, 0.5);
    let text = |cfg: &LoopConfig| {
        go(
            &mut MockBackend::hashed(2, 23, 2, 64),
            cfg,
            vec![job(2, 2, 4)],
        )
        .0
        .remove(0)
    };
    let (e, l) = (text(&explicit), text(&latent));
    assert_eq!(e.latent_steps, 0);
    assert_eq!(
        (l.latent_steps, l.switches, &l.latent_segments[..]),
        (12, 1, &[12][..])
    );
    assert_ne!(
        e.text, l.text,
        "the latent state reaches the printed tokens"
    );
}

#[test]
fn budgets_hold_and_counts_add_up() {
    for max_steps in [1, 2, 7, 24] {
        for gate in [
            Gate::Threshold,
            Gate::Trend,
            Gate::AlwaysLatent,
            Gate::AlwaysExplicit,
        ] {
            let mut cfg = config(gate, 0.8);
            cfg.max_steps = max_steps;
            cfg.answer_reserve = cfg.answer_reserve.min(max_steps);
            let jobs = (0..9).map(|i| job(i, 3, 2 + i)).collect();
            for o in go(&mut MockBackend::hashed(3, 23, 4, 64), &cfg, jobs).0 {
                assert!(o.total_steps() <= max_steps);
                assert_eq!(o.total_steps() == max_steps, o.stop == Stop::Budget);
                assert!(o.latent_steps <= 12);
                assert_eq!(o.latent_segments.iter().sum::<u32>(), o.latent_steps);
                assert_eq!(o.tokens.len() as u32, o.explicit_tokens);
                let trace = o.trace.as_ref().unwrap();
                let observed = trace.mode.len() as u32;
                assert_eq!(observed, o.total_steps() + u32::from(o.stop == Stop::Eos));
                assert_eq!(o.entropy_hist.iter().sum::<u32>(), observed);
                // The last chosen token is never forwarded, whether it is printed or ends the sample.
                let fed = o.forward_tokens[0] - o.prompt_tokens[0];
                assert_eq!(fed, observed - 1);
                let switches = trace.mode.windows(2).filter(|w| w[0] != w[1]).count();
                assert_eq!(switches as u32, o.switches);
            }
        }
    }
}

#[test]
fn the_answer_reserve_is_explicit() {
    let mut cfg = config(Gate::AlwaysLatent, 0.5);
    cfg.controller.max_latent_steps = 100;
    cfg.max_steps = 10;
    cfg.answer_reserve = 4;
    let o = go(
        &mut MockBackend::hashed(1, 23, 1, 64),
        &cfg,
        vec![job(0, 1, 3)],
    )
    .0
    .remove(0);
    let trace = o.trace.unwrap();
    assert_eq!(o.latent_steps, 6);
    assert_eq!(trace.reason[6], Reason::AnswerReserve);
    assert!(trace.mode[6..].iter().all(|m| *m == Mode::Explicit));
}

#[test]
fn certain_end_tokens_leave_latent_mode_and_end_the_sample() {
    // Uncertain for 3 steps, then certain of the end token, id 0.
    let script = |_: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        out.fill(0.0);
        if positions.len() >= 5 {
            out[0] = 30.0;
        }
    };
    let mut mock = MockBackend::scripted(1, 23, 1, 64, Box::new(script));
    let o = go(
        &mut mock,
        &config(Gate::AlwaysLatent, 0.5),
        vec![job(0, 1, 2)],
    )
    .0
    .remove(0);
    assert_eq!(
        (o.stop, o.latent_steps, o.explicit_tokens),
        (Stop::Eos, 3, 0)
    );
    assert_eq!(o.trace.unwrap().reason.last(), Some(&Reason::EosCertain));
    assert_eq!(o.text, "");
}

#[test]
fn progress_is_reported_at_most_ten_times_a_second() {
    let mut sink = Collect::default();
    let jobs = (0..300).map(|i| job(i, 2, 4));
    let mut mock = MockBackend::hashed(2, 23, 2, 64);
    let cfg = config(Gate::Threshold, 0.5);
    let options = RunOptions::default();
    let stats = run(&mut mock, &cfg, &options, &mut jobs.into_iter(), &mut sink).expect("runs");
    assert!(stats.steps > 300);
    assert!(f64::from(sink.reports) <= stats.wall_s * 10.0 + 1.0);
}

#[test]
fn an_end_token_that_is_merely_likely_does_not_end_latent_mode() {
    let script = |_: LaneId, _: &[Vec<(u32, f32)>], out: &mut [f32]| {
        out.fill(0.0);
        out[0] = 4.0; // 71 % of the mass over 23 tokens
    };
    let mut mock = MockBackend::scripted(1, 23, 1, 64, Box::new(script));
    let o = go(
        &mut mock,
        &config(Gate::AlwaysLatent, 0.5),
        vec![job(0, 1, 2)],
    )
    .0
    .remove(0);
    assert_eq!((o.stop, o.latent_steps), (Stop::Eos, 12));
}

#[test]
fn nan_fails_its_own_sample_only() {
    let script = |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        for (v, z) in out.iter_mut().enumerate() {
            *z = ((v * 7 + positions.len()) % 11) as f32 * 0.3;
        }
        if lane.agent.0 == 1 && positions[0][0].0 == 4 && positions.len() > 6 {
            out[3] = f32::NAN;
        }
    };
    let mut mock = MockBackend::scripted(2, 23, 4, 64, Box::new(script));
    // Item 1's prompt starts with token 4.
    let jobs = (0..4).map(|i| job(i, 2, 3)).collect();
    let outcomes = by_key(go(&mut mock, &config(Gate::Threshold, 0.5), jobs).0);
    let stops: Vec<Stop> = outcomes.iter().map(|o| o.stop).collect();
    assert_eq!(stops.iter().filter(|s| **s == Stop::NanInf).count(), 1);
    assert_eq!(stops[1], Stop::NanInf);
    assert!(outcomes[1].error.as_ref().unwrap().contains("mock-1"));
}

#[test]
fn a_lane_that_is_full_ends_its_sample() {
    let mut cfg = config(Gate::AlwaysExplicit, 0.5);
    cfg.max_steps = 60;
    cfg.answer_reserve = 0;
    // The end token never leads.
    let script = |_: LaneId, _: &[Vec<(u32, f32)>], out: &mut [f32]| {
        out.fill(0.0);
        out[5] = 3.0;
    };
    let mut mock = MockBackend::scripted(1, 23, 2, 16, Box::new(script));
    let o = go(&mut mock, &cfg, vec![job(0, 1, 6)]).0.remove(0);
    assert_eq!(o.stop, Stop::Context);
    assert_eq!(o.forward_tokens[0], 16);
}

#[test]
fn a_prompt_that_does_not_fit_is_a_failed_sample_and_the_others_go_on() {
    let mut mock = MockBackend::hashed(2, 23, 2, 40);
    let jobs = vec![job(0, 2, 4), job(1, 2, 50), job(2, 2, 4)];
    let outcomes = by_key(go(&mut mock, &config(Gate::Threshold, 0.5), jobs).0);
    assert_eq!(outcomes[1].stop, Stop::Prompt);
    assert!(outcomes[1].error.as_ref().unwrap().contains("50 tokens"));
    assert!(outcomes[0].stop != Stop::Prompt && outcomes[2].stop != Stop::Prompt);
}

/// Fails every call in which a given slot takes part.
struct BadSlot {
    inner: MockBackend,
    bad_prompt: u32,
    bad: Vec<SlotId>,
    /// Calls of these names and numbers are cancelled by the user.
    cancelled: Option<(&'static str, u32)>,
}

impl BadSlot {
    fn cancelled(&mut self, call: &str) -> Result<(), BackendError> {
        match &mut self.cancelled {
            Some((name, 0)) if *name == call => Err(BackendError::Cancelled(None)),
            Some((name, left)) if *name == call => {
                *left -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl Backend for BadSlot {
    fn info(&self) -> &EnsembleInfo {
        self.inner.info()
    }
    fn encode(&mut self, model: ModelId, source: &PromptSource) -> Result<Vec<u32>, BackendError> {
        self.cancelled("encode")?;
        self.inner.encode(model, source)
    }
    fn reserve(&mut self, slots: u32, max_len: u32) -> Result<(), BackendError> {
        self.inner.reserve(slots, max_len)
    }
    fn open(&mut self, lanes: &[LaneSpec]) -> Result<(), BackendError> {
        self.cancelled("open")?;
        self.bad
            .retain(|s| !lanes.iter().any(|l| l.lane.slot == *s));
        self.inner.open(lanes)
    }
    fn advance(&mut self, rows: &[Row<'_>], out: &mut Readout) -> Result<(), BackendError> {
        for row in rows {
            if let (_, Feed::Tokens(ids)) = &row.feeds[0]
                && ids.len() > 1
                && ids[0] == self.bad_prompt
            {
                self.bad.push(row.slot);
            }
        }
        if rows.iter().any(|r| self.bad.contains(&r.slot)) {
            return Err(BackendError::Failed {
                context: "forward".into(),
                source: "device side assert".into(),
            });
        }
        self.inner.advance(rows, out)
    }
    fn fork(&mut self, from: LaneId, to: LaneId, upto: Option<u32>) -> Result<(), BackendError> {
        self.inner.fork(from, to, upto)
    }
    fn truncate(&mut self, lane: LaneId, len: u32) -> Result<(), BackendError> {
        self.inner.truncate(lane, len)
    }
    fn close(&mut self, slots: &[SlotId]) {
        self.inner.close(slots);
    }
    fn memory(&self) -> MemoryStats {
        self.inner.memory()
    }
}

fn bad_slot() -> BadSlot {
    // Item 1's prompt starts with token 4.
    BadSlot {
        inner: MockBackend::hashed(2, 23, 4, 64),
        bad_prompt: 4,
        bad: Vec::new(),
        cancelled: None,
    }
}

#[test]
fn a_user_who_stops_the_run_while_a_sample_is_admitted_stops_the_run() {
    for call in ["encode", "open"] {
        let mut backend = bad_slot();
        backend.bad_prompt = u32::MAX;
        backend.cancelled = Some((call, 5));
        let mut sink = Collect::default();
        let mut jobs = (0..20).map(|i| job(i, 2, 4));
        let error = run(
            &mut backend,
            &config(Gate::Threshold, 0.6),
            &RunOptions::default(),
            &mut jobs,
            &mut sink,
        )
        .expect_err("the user asked to stop");
        assert!(matches!(error, RunError::Interrupted(None)), "{error}");
        // No sample is blamed for it.
        assert!(sink.outcomes.iter().all(|o| o.error.is_none()), "{call}");
    }
}

#[test]
fn a_sample_that_fails_in_the_backend_is_isolated_and_changes_no_other() {
    let cfg = config(Gate::Threshold, 0.6);
    let jobs = || (0..6).map(|i| job(i, 2, 4)).collect::<Vec<_>>();
    let healthy = by_key(go(&mut MockBackend::hashed(2, 23, 4, 64), &cfg, jobs()).0);
    let failing = by_key(go(&mut bad_slot(), &cfg, jobs()).0);
    assert_eq!(failing[1].stop, Stop::Backend);
    assert!(
        failing[1]
            .error
            .as_ref()
            .unwrap()
            .contains("device side assert")
    );
    for (index, (a, b)) in healthy.iter().zip(&failing).enumerate() {
        if index != 1 {
            assert_eq!(a, b);
        }
    }
}

#[test]
fn repeated_backend_failures_end_the_run_with_the_failure() {
    let mut mock = MockBackend::hashed(2, 23, 2, 64);
    mock.fail_after(Some(3));
    let mut sink = Collect::default();
    let jobs = (0..20).map(|i| job(i, 2, 4));
    let error = run(
        &mut mock,
        &config(Gate::Threshold, 0.6),
        &RunOptions::default(),
        &mut jobs.into_iter(),
        &mut sink,
    )
    .unwrap_err();
    assert!(matches!(error, RunError::Backend { .. }), "{error:?}");
    assert!(sink.outcomes.iter().all(|o| o.stop == Stop::Backend));
    assert_eq!(sink.outcomes.len(), 3);
}

#[test]
fn interruption_and_a_full_disk_end_the_run_and_keep_what_was_finished() {
    let cfg = config(Gate::Threshold, 0.6);
    let mut sink = Collect {
        stop_after: Some(3),
        ..Collect::default()
    };
    let jobs = (0..20).map(|i| job(i, 2, 4));
    let mut mock = MockBackend::hashed(2, 23, 2, 64);
    let result = run(
        &mut mock,
        &cfg,
        &RunOptions::default(),
        &mut jobs.into_iter(),
        &mut sink,
    );
    assert!(matches!(result, Err(RunError::Interrupted(None))));
    assert!((3..=4).contains(&sink.outcomes.len()));

    let mut sink = Collect {
        fail: true,
        ..Collect::default()
    };
    let jobs = (0..20).map(|i| job(i, 2, 4));
    let result = run(
        &mut mock,
        &cfg,
        &RunOptions::default(),
        &mut jobs.into_iter(),
        &mut sink,
    );
    assert!(matches!(result, Err(RunError::Sink(_))));
}

#[test]
fn different_vocabularies_are_refused_by_name() {
    let mut mock = MockBackend::hashed(2, 23, 2, 64);
    mock.info_mut().models[1].fingerprint = 99;
    let mut sink = Collect::default();
    let error = run(
        &mut mock,
        &config(Gate::Threshold, 0.6),
        &RunOptions::default(),
        &mut std::iter::empty(),
        &mut sink,
    )
    .unwrap_err();
    insta::assert_snapshot!(error, @"experts mock-0 and mock-1 have different vocabularies (23 and 23 tokens): packets cannot pass between them without a vocabulary bridge, which is not built yet");
}

#[test]
fn bytes_are_those_of_the_encodings() {
    let cfg = config(Gate::AlwaysLatent, 0.5);
    let o = go(
        &mut MockBackend::hashed(2, 23, 1, 64),
        &cfg,
        vec![job(0, 2, 3)],
    )
    .0
    .remove(0);
    let packet = dlmom_packet::encoded_len(5, dlmom_packet::Encoding::F32) as u64;
    let token = dlmom_packet::encoded_len(1, dlmom_packet::Encoding::F32) as u64;
    let steps = o.trace.as_ref().unwrap().mode.len() as u64;
    let expected = 2 * (packet * u64::from(o.latent_steps) + token * u64::from(o.explicit_tokens));
    assert_eq!(o.downlink_bytes, expected);
    assert_eq!(
        o.uplink_bytes,
        steps * 2 * 23 * 4,
        "f32 logits of both experts at every step"
    );
    let single = go(
        &mut MockBackend::hashed(1, 23, 1, 64),
        &cfg,
        vec![job(0, 1, 3)],
    )
    .0
    .remove(0);
    let steps = single.trace.as_ref().unwrap().mode.len() as u64;
    let expected =
        packet * u64::from(single.latent_steps) + token * u64::from(single.explicit_tokens);
    assert_eq!(
        (single.uplink_bytes, single.downlink_bytes),
        (steps * 23 * 4, expected),
        "a single agent's link is a loopback"
    );
}

#[test]
fn the_answer_cue_is_fed_once_when_the_latent_budget_is_spent() {
    let mut cfg = config(Gate::AlwaysLatent, 0.5);
    cfg.answer_cue = Some("so".into());
    let with = go(
        &mut MockBackend::hashed(2, 23, 1, 64),
        &cfg,
        vec![job(3, 2, 3)],
    )
    .0
    .remove(0);
    cfg.answer_cue = None;
    let without = go(
        &mut MockBackend::hashed(2, 23, 1, 64),
        &cfg,
        vec![job(3, 2, 3)],
    )
    .0
    .remove(0);
    assert_eq!(with.latent_steps, without.latent_steps);
    assert_ne!(with.text, without.text);
    assert_eq!(
        with.tokens.len() as u32,
        with.explicit_tokens + 2,
        "the cue is not counted"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn switches_never_pass_the_cap_in_the_loop(
        cap in -1_i64..6,
        alpha in 0.2_f64..0.95,
        w in 2_u32..6,
        trend in any::<bool>(),
        slots in 1_u32..5,
    ) {
        let mut cfg = config(if trend { Gate::Trend } else { Gate::Threshold }, alpha);
        cfg.controller.cap = cap;
        cfg.controller.w = Some(w);
        let jobs = (0..6).map(|i| job(i, 2, 3)).collect();
        let (outcomes, _) = go(&mut MockBackend::hashed(2, 23, slots, 64), &cfg, jobs);
        prop_assert_eq!(outcomes.len(), 6);
        for o in outcomes {
            if cap >= 0 {
                prop_assert!(i64::from(o.switches) <= cap);
            }
            if cap == 0 {
                prop_assert_eq!(o.latent_steps, 0);
            }
        }
    }
}
