//! What crosses the links, and a user's own parts in the loop.

#![expect(clippy::expect_used, reason = "test helpers")]

use std::sync::{Arc, Mutex};

use dlmom_core::{
    AlphaUnit, Consensus, ConsensusSpec, ControllerFailure, ControllerSpec, Gate, Mode, NoiseSpec,
    Reason, Rule, SamplingSpec, Start, Views,
};
use dlmom_packet::{BeliefPacket, Meta, Scalar, dense_len, embed_len, encode};
use dlmom_runtime::link::{Link, LinkError, Wire, expand};
use dlmom_runtime::{
    ConfigError, EnsembleInfo, Hooks, Job, JobKey, LinkMessage, LinkSpec, LoopConfig, MemoryStats,
    MockBackend, ModelId, Outcome, PromptSource, RunError, RunOptions, Session, Sink, StepEvent,
    Support, WireEncoding, run_with,
};
use proptest::prelude::*;

const VOCAB: u32 = 23;

fn config(message: LinkMessage, encoding: WireEncoding, support: Support) -> LoopConfig {
    LoopConfig {
        k: if message == LinkMessage::Logits {
            -1
        } else {
            5
        },
        link: LinkSpec {
            message,
            encoding,
            support,
            ..LinkSpec::default()
        },
        controller: ControllerSpec {
            gate: Gate::Threshold,
            w: None,
            alpha: 0.45,
            alpha_unit: AlphaUnit::Normalized,
            cap: -1,
            min_dwell_latent: 1,
            min_dwell_explicit: 1,
            convergence_threshold: None,
            slope_eps: None,
            var_eps: None,
            max_latent_steps: 12,
            start: Start::Gate,
            ..ControllerSpec::default()
        },
        consensus: ConsensusSpec::paper(),
        noise: NoiseSpec::None,
        sampling: SamplingSpec::GREEDY,
        max_steps: 24,
        answer_reserve: 4,
        answer_cue: None,
        ..LoopConfig::default()
    }
}

/// Two agents that share one model.
fn shared() -> MockBackend {
    let mut mock = MockBackend::hashed(2, VOCAB, 4, 64);
    mock.info_mut().agents = vec![ModelId(0), ModelId(0)];
    mock
}

fn job(index: u32) -> Job {
    let ids: Vec<u32> = (0..3 + index % 4)
        .map(|i| 1 + (i * 7 + index * 3) % 22)
        .collect();
    Job {
        key: JobKey {
            item_id: format!("item-{index}"),
            seed: 0,
            sample: 0,
        },
        prompts: vec![PromptSource::Tokens { ids }; 2],
        trace: true,
        config: 0,
        schedule: None,
        rival: None,
    }
}

#[derive(Default)]
struct Collect {
    outcomes: Vec<Outcome>,
    /// `(step, mode, printed token, bytes up, bytes down)` by item.
    events: Vec<(String, u32, Mode, Option<u32>, u64, u64)>,
}

impl Sink for Collect {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.outcomes.push(outcome);
        Ok(())
    }

    fn step(&mut self, event: &StepEvent<'_>) {
        self.events.push((
            event.key.item_id.clone(),
            event.step,
            event.decision.mode,
            event.token,
            event.bytes.0,
            event.bytes.1,
        ));
    }
}

fn go(mock: &mut MockBackend, config: &LoopConfig, hooks: Hooks) -> Result<Collect, RunError> {
    let mut sink = Collect::default();
    let mut jobs = (0..9).map(job);
    run_with(
        mock,
        config,
        &RunOptions::default(),
        hooks,
        &mut jobs,
        &mut sink,
    )?;
    sink.outcomes.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(sink)
}

fn texts(collected: &Collect) -> Vec<&str> {
    collected.outcomes.iter().map(|o| o.text.as_str()).collect()
}

#[test]
fn bytes_are_those_of_real_encodings() {
    let (belief, full) = (LinkMessage::Belief, Support::Full);
    let cfg = config(belief, WireEncoding::F32, full);
    let run = go(&mut shared(), &cfg, Hooks::default()).expect("runs");
    let mut latent = 0;
    for o in &run.outcomes {
        let observed = u64::from(o.entropy_hist.iter().sum::<u32>());
        // Two agents send all of their 23 logits, 4 bytes each, in every step.
        assert_eq!(o.uplink_bytes, observed * 2 * 23 * 4);
        let one_entry = encode(
            &BeliefPacket::one_hot(1, VOCAB).unwrap(),
            Meta::default(),
            dlmom_packet::Encoding::F32,
        )
        .unwrap()
        .len() as u64;
        let packets: u64 = o
            .packets
            .iter()
            .map(|(_, p)| {
                encode(p, Meta::default(), dlmom_packet::Encoding::F32)
                    .unwrap()
                    .len() as u64
            })
            .sum();
        assert_eq!(o.packets.len() as u32, o.latent_steps);
        assert_eq!(
            o.downlink_bytes,
            2 * (packets + u64::from(o.explicit_tokens) * one_entry)
        );
        latent += o.latent_steps;
    }
    assert!(latent > 20, "packets were sent");
}

#[test]
fn every_message_has_its_own_bytes_and_events_add_up_to_them() {
    let mut seen = Vec::new();
    for (message, encoding) in [
        (LinkMessage::Belief, WireEncoding::F32),
        (LinkMessage::Belief, WireEncoding::Bf16),
        (LinkMessage::Belief, WireEncoding::Compact),
        (LinkMessage::Embed, WireEncoding::F32),
        (LinkMessage::Logits, WireEncoding::F32),
        (LinkMessage::Logits, WireEncoding::F16),
    ] {
        let cfg = config(message, encoding, Support::Full);
        let run = go(&mut shared(), &cfg, Hooks::default()).expect("runs");
        for o in &run.outcomes {
            let of_item = run.events.iter().filter(|e| e.0 == o.key.item_id);
            let (up, down) = of_item
                .clone()
                .fold((0, 0), |(up, down), e| (up + e.4, down + e.5));
            assert_eq!((up, down), (o.uplink_bytes, o.downlink_bytes), "{cfg:?}");
            let printed: Vec<u32> = of_item.clone().filter_map(|e| e.3).collect();
            assert_eq!(printed, o.tokens);
            let steps: Vec<u32> = of_item.map(|e| e.1).collect();
            assert_eq!(steps, (0..steps.len() as u32).collect::<Vec<_>>());
        }
        seen.push(run.outcomes.iter().map(|o| o.downlink_bytes).sum::<u64>());
    }
    let mut distinct = seen.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct.len(), seen.len(), "{seen:?}");
}

#[test]
fn the_whole_vocabulary_feeds_what_a_packet_of_all_tokens_feeds() {
    let logits = config(LinkMessage::Logits, WireEncoding::F32, Support::Full);
    let mut packet = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
    packet.k = -1;
    let a = go(&mut shared(), &logits, Hooks::default()).expect("runs");
    let b = go(&mut shared(), &packet, Hooks::default()).expect("runs");
    assert_eq!(texts(&a), texts(&b));
    let down = |c: &Collect| c.outcomes.iter().map(|o| o.downlink_bytes).sum::<u64>();
    assert!(down(&a) < down(&b), "no ids cross the link");
}

#[test]
fn lengths_of_payloads_are_known_before_they_are_sent() {
    let mut wire = Wire::default();
    let meta = Meta::default();
    let probs = [0.25_f32; 4];
    assert_eq!(
        wire.dense(&probs, meta, WireEncoding::F32).unwrap().1,
        dense_len(4, Scalar::F32)
    );
    let (values, bytes) = wire.embed(&[1.5, -2.0, 0.0], meta, Scalar::Bf16).unwrap();
    assert_eq!(
        (values, bytes),
        (vec![1.5, -2.0, 0.0], embed_len(3, Scalar::Bf16))
    );
    assert!(matches!(
        wire.dense(&probs, meta, WireEncoding::Compact),
        Err(LinkError::NoScalar)
    ));
}

/// A codec that gives every packet's probabilities to the wrong ids.
struct Broken(Wire);

impl Link for Broken {
    fn packet(
        &mut self,
        packet: &BeliefPacket,
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(BeliefPacket, usize), LinkError> {
        let (packet, bytes) = self.0.packet(packet, meta, encoding)?;
        if packet.k() == 1 {
            return Ok((packet, bytes));
        }
        let ids = packet.ids().iter().map(|id| (id + 1) % VOCAB).collect();
        let shifted = BeliefPacket::new(ids, packet.probs().to_vec(), packet.mass(), VOCAB)?;
        Ok((shifted, bytes))
    }

    fn dense(
        &mut self,
        probs: &[f32],
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        let (mut probs, bytes) = self.0.dense(probs, meta, encoding)?;
        probs.rotate_left(1);
        Ok((probs, bytes))
    }

    fn embed(
        &mut self,
        values: &[f32],
        meta: Meta,
        scalar: Scalar,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        let (mut values, bytes) = self.0.embed(values, meta, scalar)?;
        values.rotate_left(1);
        Ok((values, bytes))
    }
}

#[test]
fn receivers_are_fed_what_was_decoded_so_a_broken_codec_changes_answers() {
    for message in [LinkMessage::Belief, LinkMessage::Embed, LinkMessage::Logits] {
        let cfg = config(message, WireEncoding::F32, Support::Full);
        let right = go(&mut shared(), &cfg, Hooks::default()).expect("runs");
        let hooks = Hooks {
            link: Some(Box::new(Broken(Wire::default()))),
            ..Hooks::default()
        };
        let wrong = go(&mut shared(), &cfg, hooks).expect("runs");
        assert_ne!(texts(&right), texts(&wrong), "{message:?}");
    }
}

/// Notes the step and the fingerprint that travel with every message.
struct Noting(Wire, Arc<Mutex<Vec<Meta>>>);

impl Noting {
    fn note(&self, meta: Meta) {
        self.1.lock().expect("not poisoned").push(meta);
    }
}

impl Link for Noting {
    fn packet(
        &mut self,
        packet: &BeliefPacket,
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(BeliefPacket, usize), LinkError> {
        self.note(meta);
        self.0.packet(packet, meta, encoding)
    }

    fn dense(
        &mut self,
        probs: &[f32],
        meta: Meta,
        encoding: WireEncoding,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        self.note(meta);
        self.0.dense(probs, meta, encoding)
    }

    fn embed(
        &mut self,
        values: &[f32],
        meta: Meta,
        scalar: Scalar,
    ) -> Result<(Vec<f32>, usize), LinkError> {
        self.note(meta);
        self.0.embed(values, meta, scalar)
    }
}

#[test]
fn every_message_says_which_step_it_is_of() {
    for message in [LinkMessage::Belief, LinkMessage::Embed, LinkMessage::Logits] {
        let cfg = config(message, WireEncoding::F32, Support::Full);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let hooks = Hooks {
            link: Some(Box::new(Noting(Wire::default(), Arc::clone(&seen)))),
            ..Hooks::default()
        };
        let mut sink = Collect::default();
        let options = RunOptions::default();
        let mut jobs = std::iter::once(job(3));
        run_with(&mut shared(), &cfg, &options, hooks, &mut jobs, &mut sink).expect("runs");
        let seen = seen.lock().expect("not poisoned");
        let steps: Vec<u32> = seen.iter().map(|meta| meta.step).collect();
        // One message a step, in order; a last latent step's mixture is not sent any more.
        assert_eq!(
            steps,
            (0..steps.len() as u32).collect::<Vec<_>>(),
            "{message:?}"
        );
        assert!(seen.iter().all(|meta| meta.fingerprint == u64::from(VOCAB)));
        assert!(sink.outcomes[0].latent_steps > 0);
    }
}

#[test]
fn a_coarse_encoding_is_what_the_receivers_get() {
    let exact = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
    let coarse = config(LinkMessage::Belief, WireEncoding::Compact, Support::Full);
    let a = go(&mut shared(), &exact, Hooks::default()).expect("runs");
    let b = go(&mut shared(), &coarse, Hooks::default()).expect("runs");
    let first = |c: &Collect| c.outcomes[0].packets[0].1.probs().to_vec();
    assert_ne!(first(&a), first(&b));
    for (x, y) in first(&a).iter().zip(first(&b)) {
        assert!((x - y).abs() < 0.05, "{x} {y}");
    }
}

#[test]
fn packet_support_lets_consensus_see_only_the_messages() {
    let full = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
    let mut packet = config(LinkMessage::Belief, WireEncoding::F32, Support::Packet);
    packet.k = 2;
    let a = go(&mut shared(), &full, Hooks::default()).expect("runs");
    let b = go(&mut shared(), &packet, Hooks::default()).expect("runs");
    let up = |c: &Collect| c.outcomes.iter().map(|o| o.uplink_bytes).sum::<u64>();
    let steps = |c: &Collect| c.events.len() as u64;
    assert_eq!(up(&a), steps(&a) * 2 * 23 * 4);
    // 36 bytes of frame and two entries of 8 bytes, from each of two agents.
    assert_eq!(up(&b), steps(&b) * 2 * (36 + 2 * 8));
    assert_ne!(texts(&a), texts(&b), "what is not sent does not count");

    // A message of everything leaves consensus with everything, up to rounding.
    let logits = config(LinkMessage::Logits, WireEncoding::F32, Support::Packet);
    let full = config(LinkMessage::Logits, WireEncoding::F32, Support::Full);
    let a = go(&mut shared(), &full, Hooks::default()).expect("runs");
    let b = go(&mut shared(), &logits, Hooks::default()).expect("runs");
    for (x, y) in a.outcomes.iter().zip(&b.outcomes) {
        assert!((x.entropy.mean - y.entropy.mean).abs() < 0.2);
        let first = |o: &Outcome| o.trace.as_ref().unwrap().entropy[0];
        assert!((first(x) - first(y)).abs() < 1e-5);
    }
}

proptest! {
    #[test]
    fn an_expanded_packet_says_what_the_packet_says(
        logits in prop::collection::vec(-8.0_f32..8.0, 12..60),
        k in 1_usize..12,
    ) {
        let vocab = logits.len();
        let z: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let p = |id: usize| f64::from(logits[id]).exp() / z;
        let mass: f64 = order[..k].iter().map(|&id| p(id)).sum();
        let packet = BeliefPacket::new(
            order[..k].iter().map(|&id| id as u32).collect(),
            order[..k].iter().map(|&id| (p(id) / mass) as f32).collect(),
            mass.min(1.0) as f32,
            vocab as u32,
        ).unwrap();
        let mut out = Vec::new();
        expand(&packet, &mut out);
        let total: f64 = out.iter().map(|&x| f64::from(x).exp()).sum();
        prop_assert!((total - 1.0).abs() < 1e-5, "{total}");
        for &id in &order[..k] {
            prop_assert!((f64::from(out[id]).exp() - p(id)).abs() < 1e-6);
        }
        for pair in order[k..].windows(2) {
            prop_assert_eq!(out[pair[0]], out[pair[1]]);
        }
    }
}

#[test]
fn configurations_that_mean_nothing_are_refused() {
    let said = |cfg: &LoopConfig| match go(&mut shared(), cfg, Hooks::default()) {
        Err(RunError::Config(error)) => error,
        other => panic!("{:?}", other.map(|c| c.outcomes)),
    };
    let mut cfg = config(LinkMessage::Logits, WireEncoding::F32, Support::Full);
    cfg.k = 5;
    assert_eq!(said(&cfg), ConfigError::LogitsK { k: 5 });
    let cfg = config(LinkMessage::Logits, WireEncoding::Compact, Support::Full);
    assert_eq!(said(&cfg), ConfigError::CompactLogits);
    let cfg = config(LinkMessage::Embed, WireEncoding::F32, Support::Packet);
    assert_eq!(said(&cfg), ConfigError::EmbedSupport);
    for k in [0, -2, 24] {
        let mut cfg = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
        cfg.k = k;
        assert_eq!(said(&cfg), ConfigError::K { k, vocab: VOCAB });
    }
    let cfg = config(LinkMessage::Embed, WireEncoding::F32, Support::Full);
    let mut two_models = MockBackend::hashed(2, VOCAB, 4, 64);
    let error = go(&mut two_models, &cfg, Hooks::default())
        .err()
        .expect("refused");
    assert!(matches!(error, RunError::VectorLink { .. }), "{error}");
}

/// Latent on every other wish.
struct Alternate {
    seen: Arc<Mutex<Vec<f64>>>,
    calls: u32,
    fail_at: u32,
}

impl Rule for Alternate {
    fn wish(&mut self, entropy: f64, _: Option<Mode>) -> Result<Mode, ControllerFailure> {
        self.seen.lock().expect("not poisoned").push(entropy);
        self.calls += 1;
        if self.calls == self.fail_at {
            return Err("no opinion".into());
        }
        Ok(if self.calls % 2 == 1 {
            Mode::Latent
        } else {
            Mode::Explicit
        })
    }
}

fn alternate(fail_at: u32) -> (Hooks, Arc<Mutex<Vec<f64>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let shared = Arc::clone(&seen);
    let rule = move |_: &JobKey| {
        Ok(Box::new(Alternate {
            seen: Arc::clone(&shared),
            calls: 0,
            fail_at,
        }) as Box<dyn Rule>)
    };
    let hooks = Hooks {
        rule: Some(Box::new(rule)),
        ..Hooks::default()
    };
    (hooks, seen)
}

#[test]
fn a_users_rule_decides_within_budget_and_cap() {
    let mut cfg = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
    cfg.controller.cap = 4;
    let (hooks, seen) = alternate(0);
    let run = go(&mut shared(), &cfg, hooks).expect("runs");
    for o in &run.outcomes {
        let trace = o.trace.as_ref().unwrap();
        assert_eq!(trace.mode[0], Mode::Latent);
        assert!(o.switches <= 4);
        assert!(trace.reason.contains(&Reason::Custom));
        let reserve = trace.reason.iter().filter(|r| **r == Reason::AnswerReserve);
        assert!(reserve.count() <= 4);
    }
    assert_eq!(seen.lock().unwrap().len(), run.events.len());

    let (hooks, _) = alternate(3);
    let error = go(&mut shared(), &cfg, hooks).err().expect("fails");
    assert!(
        error.to_string().contains("item item-0"),
        "names the sample: {error}"
    );
    let source = std::error::Error::source(&error).expect("keeps the cause");
    assert!(source.to_string().contains("no opinion"));
}

/// The first expert's row, whatever the others say.
struct First {
    fail: bool,
    failed: Mutex<bool>,
}

impl Consensus for First {
    fn name(&self) -> &'static str {
        "first"
    }

    fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool {
        out.copy_from_slice(views.centred[0]);
        *self.failed.lock().expect("not poisoned") = self.fail;
        true
    }

    fn take_failure(&self) -> Option<Box<dyn std::error::Error + Send + Sync>> {
        std::mem::take(&mut *self.failed.lock().expect("not poisoned"))
            .then(|| "no agreement".into())
    }
}

#[test]
fn a_users_consensus_is_the_one_that_merges() {
    let cfg = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
    let hooks = |fail| Hooks {
        consensus: Some(Box::new(First {
            fail,
            failed: Mutex::new(false),
        })),
        ..Hooks::default()
    };
    let own = go(&mut shared(), &cfg, hooks(false)).expect("runs");
    let paper = go(&mut shared(), &cfg, Hooks::default()).expect("runs");
    assert_ne!(texts(&own), texts(&paper));
    let error = go(&mut shared(), &cfg, hooks(true)).err().expect("fails");
    let source = std::error::Error::source(&error).expect("keeps the cause");
    assert!(source.to_string().contains("no agreement"), "{source}");
}

#[test]
fn the_compressor_is_called_after_the_prompt_and_as_lanes_grow() {
    let cfg = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
    let mut mock = shared();
    let hooks = Hooks {
        compress_every: Some(5),
        ..Hooks::default()
    };
    let run = go(&mut mock, &cfg, hooks).expect("runs");
    let calls = mock.compressed().len();
    // Each of two lanes: once after its prompt, then once for every 5 positions more; a sample that ends on such a step
    // needs no compression any more.
    let most: u32 = run
        .outcomes
        .iter()
        .map(|o| 2 * (1 + (o.forward_tokens[0] - o.prompt_tokens[0]) / 5))
        .sum();
    assert!(
        calls as u32 <= most && calls as u32 >= most - 18,
        "{calls} of {most}"
    );
    let mut plain = shared();
    go(&mut plain, &cfg, Hooks::default()).expect("runs");
    assert!(plain.compressed().is_empty());
}

#[test]
fn a_session_closed_early_frees_its_lanes() {
    let cfg = config(LinkMessage::Belief, WireEncoding::F32, Support::Full);
    let mut mock = shared();
    let mut session =
        Session::new(&mut mock, &[cfg], &RunOptions::default(), Hooks::default()).expect("starts");
    let mut jobs = (0..9).map(job);
    let mut sink = Collect::default();
    for _ in 0..3 {
        assert!(
            session
                .turn(&mut mock, &mut jobs, &mut sink)
                .expect("turns")
        );
    }
    assert!(dlmom_runtime::Backend::memory(&mock).kv_bytes > 0);
    session.close(&mut mock);
    assert_eq!(dlmom_runtime::Backend::memory(&mock).kv_bytes, 0);
    assert_eq!(session.stats().steps, 3);
}
