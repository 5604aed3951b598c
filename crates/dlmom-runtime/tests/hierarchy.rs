//! Agents in groups: what the groups send up, how it is merged, and what it costs.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use std::sync::{Arc, Mutex};

use common::{
    Collect, ROOM, SAMPLED, VOCAB, config, go, job, jobs, refused, run_into, timeless, timeless_all,
};
use dlmom_core::{
    Consensus, ConsensusSpec, Gate, MergeGate, Method, NoiseSpec, SpecError, Views, Weights,
};
use dlmom_packet::{Encoding, Scalar, dense_len, encoded_len};
use dlmom_runtime::{
    AgentId, ConfigError, Hierarchy, Hooks, LaneId, LinkMessage, LoopConfig, MockBackend, Outcome,
    RunError, Stop, Support, Topology, TopologyError, Trace, WireEncoding,
};

fn grouped(config: &LoopConfig, groups: &[&[u32]], meta: Method) -> LoopConfig {
    LoopConfig {
        topology: Topology::Hierarchical(Hierarchy {
            groups: groups.iter().map(|g| g.to_vec()).collect(),
            meta: ConsensusSpec::of(meta),
        }),
        ..config.clone()
    }
}

fn lockstep() -> LoopConfig {
    let mut cfg = config(Gate::Threshold, 0.45);
    cfg.consensus = ConsensusSpec::of(Method::Mean);
    cfg
}

fn run(agents: usize, cfg: &LoopConfig, count: u32) -> Collect {
    let mut mock = MockBackend::hashed(agents, VOCAB, 3, ROOM);
    go(&mut mock, cfg, jobs(count, agents as u32))
}

fn steps(o: &Outcome) -> u64 {
    o.trace.as_ref().unwrap().mode.len() as u64
}

#[test]
fn one_group_that_sends_everything_up_is_lockstep() {
    let mut cfg = lockstep();
    cfg.k = -1;
    for consensus in [Method::Mean, Method::Ties, Method::Arith] {
        cfg.consensus = ConsensusSpec::of(consensus);
        let plain = run(3, &cfg, 6);
        // With one group the meta level has nothing to merge, whatever it is.
        let one = run(3, &grouped(&cfg, &[&[0, 1, 2]], Method::Arith), 6);
        for (a, b) in plain.outcomes.iter().zip(&one.outcomes) {
            assert_eq!((a.stop, &a.tokens), (b.stop, &b.tokens), "{consensus:?}");
            assert_eq!(a.schedule, b.schedule);
            assert_eq!((a.agreement, a.merge_rate), (b.agreement, b.merge_rate));
            let (x, y) = (a.trace.as_ref().unwrap(), b.trace.as_ref().unwrap());
            let near = |x: f64, y: f64| (x - y).abs() < 1e-3;
            assert!(x.entropy.iter().zip(&y.entropy).all(|(x, y)| near(*x, *y)));
            let merged = x.merged_entropy.iter().zip(&y.merged_entropy);
            assert!(merged.clone().all(|(x, y)| near(*x, *y)));
            // Before rounding has gone through the loop.
            assert!((x.merged_entropy[0] - y.merged_entropy[0]).abs() < 1e-5);
            for (p, q) in x
                .top_probs
                .iter()
                .flatten()
                .zip(y.top_probs.iter().flatten())
            {
                assert!(near(f64::from(*p), f64::from(*q)));
            }
        }
        assert!(plain.latent().count() > 20);
    }
}

#[test]
fn groups_change_what_is_merged() {
    let cfg = lockstep();
    let texts = |cfg: &LoopConfig| -> Vec<String> {
        let outcomes = run(4, cfg, 6).outcomes;
        outcomes.into_iter().map(|o| o.text).collect()
    };
    let plain = texts(&cfg);
    let pairs = texts(&grouped(&cfg, &[&[0, 1], &[2, 3]], Method::Mean));
    assert_ne!(plain, pairs);
    assert_ne!(
        pairs,
        texts(&grouped(&cfg, &[&[0, 2], &[1, 3]], Method::Mean)),
        "it matters who is with whom"
    );
    assert_ne!(
        pairs,
        texts(&grouped(&cfg, &[&[0, 1], &[2, 3]], Method::Poe)),
        "the meta level merges the groups"
    );
    let mut inner = grouped(&cfg, &[&[0, 1], &[2, 3]], Method::Mean);
    inner.consensus = ConsensusSpec::of(Method::Arith);
    assert_ne!(pairs, texts(&inner), "the operator merges the members");
}

#[test]
fn groups_of_one_are_packet_support() {
    for (message, k, wire) in [
        (LinkMessage::Belief, 5, WireEncoding::F32),
        (LinkMessage::Belief, 3, WireEncoding::Compact),
        (LinkMessage::Logits, -1, WireEncoding::F16),
    ] {
        let mut cfg = lockstep();
        cfg.k = k;
        cfg.link.message = message;
        cfg.link.encoding = wire;
        cfg.sampling = SAMPLED;
        cfg.noise = NoiseSpec::Gumbel { tau: 1.0 };
        cfg.controller.gate = Gate::AlwaysLatent;
        let alone = run(3, &grouped(&cfg, &[&[0], &[1], &[2]], Method::Mean), 6);
        cfg.link.support = Support::Packet;
        let packet = run(3, &cfg, 6);
        for (a, b) in alone.outcomes.iter().zip(&packet.outcomes) {
            // In groups the members' logits go up as well, to their group.
            let logits = steps(a) * 3 * u64::from(VOCAB) * 4;
            assert_eq!(a.uplink_bytes, b.uplink_bytes + logits);
            // The entropies are the agents' own there, and those of their messages here.
            let (x, y) = (a.trace.as_ref().unwrap(), b.trace.as_ref().unwrap());
            let same = Outcome {
                uplink_bytes: a.uplink_bytes,
                entropy: a.entropy,
                entropy_hist: a.entropy_hist.clone(),
                trace: Some(Trace {
                    entropy: x.entropy.clone(),
                    observed: x.observed.clone(),
                    expert_entropy: x.expert_entropy.clone(),
                    ..y.clone()
                }),
                ..timeless(b)
            };
            assert_eq!(timeless(a), same, "{message:?}");
            if message == LinkMessage::Belief {
                assert_ne!(x.entropy, y.entropy);
            }
        }
    }
}

#[test]
fn every_group_sends_one_message_up_in_every_step() {
    let shapes: [&[&[u32]]; 3] = [&[&[0, 1, 2, 3]], &[&[0, 3], &[1, 2]], &[&[2], &[0, 1, 3]]];
    for groups in shapes {
        let count = groups.len() as u64;
        for (message, k, wire, length) in [
            (
                LinkMessage::Belief,
                5,
                WireEncoding::F32,
                encoded_len(5, Encoding::F32),
            ),
            (
                LinkMessage::Belief,
                7,
                WireEncoding::F16,
                encoded_len(7, Encoding::F16),
            ),
            (
                LinkMessage::Logits,
                -1,
                WireEncoding::Bf16,
                dense_len(VOCAB as usize, Scalar::Bf16),
            ),
        ] {
            let mut cfg = lockstep();
            cfg.k = k;
            cfg.link.message = message;
            cfg.link.encoding = wire;
            let sent = count * length as u64;
            for o in run(4, &grouped(&cfg, groups, Method::Mean), 4).outcomes {
                assert_eq!(
                    o.uplink_bytes,
                    steps(&o) * (4 * u64::from(VOCAB) * 4 + sent)
                );
            }
            // Members that send packets instead of logits.
            cfg.link.support = Support::Packet;
            for o in run(4, &grouped(&cfg, groups, Method::Mean), 4).outcomes {
                assert_eq!(o.uplink_bytes, steps(&o) * (4 * length as u64 + sent));
            }
        }
    }
}

#[test]
fn every_agent_is_in_one_group() {
    let said = |groups: &[&[u32]]| {
        let cfg = grouped(&lockstep(), groups, Method::Mean);
        let mut mock = MockBackend::hashed(3, VOCAB, 1, ROOM);
        match refused(&mut mock, &cfg, Hooks::default()) {
            RunError::Config(ConfigError::Topology(error)) => error,
            other => panic!("{other}"),
        }
    };
    let membership = |agent, times| TopologyError::Groups { agent, times };
    assert_eq!(said(&[&[0, 1]]), membership(2, 0));
    assert_eq!(said(&[]), membership(0, 0));
    assert_eq!(said(&[&[0, 1], &[1, 2]]), membership(1, 2));
    assert_eq!(said(&[&[0, 1, 1, 2]]), membership(1, 2));
    assert_eq!(said(&[&[0, 1, 2], &[3]]), membership(3, 1));
    assert_eq!(said(&[&[0, 1, 2], &[u32::MAX]]).to_string(), {
        "topology: agent 4294967295 is in 1 groups; every agent must be in one"
    });
    assert_eq!(
        said(&[&[0, 1, 2], &[]]),
        TopologyError::EmptyGroup { place: 1 }
    );
}

#[test]
fn what_counts_experts_counts_those_it_meets() {
    let weigh = |spec: &mut ConsensusSpec, count: usize| {
        spec.weights = Weights::Fixed(vec![1.0; count]);
    };
    let check = |groups: &[&[u32]], inner: Option<usize>, meta: Option<usize>| {
        let mut cfg = grouped(&lockstep(), groups, Method::Mean);
        if let Some(count) = inner {
            weigh(&mut cfg.consensus, count);
        }
        if let (Some(count), Topology::Hierarchical(h)) = (meta, &mut cfg.topology) {
            weigh(&mut h.meta, count);
        }
        cfg.validate_agents(4)
    };
    let pairs: [&[u32]; 2] = [&[0, 1], &[2, 3]];
    assert_eq!(check(&pairs, Some(2), Some(2)), Ok(()));
    let wrong = |found, experts| SpecError::Experts {
        knob: "weights",
        found,
        experts,
    };
    assert_eq!(
        check(&pairs, Some(4), None),
        Err(ConfigError::Spec(wrong(4, 2)))
    );
    assert_eq!(
        check(&pairs, None, Some(4)),
        Err(ConfigError::Topology(TopologyError::Meta(wrong(4, 2))))
    );
    assert_eq!(
        check(&[&[0, 1, 2], &[3]], Some(3), None),
        Err(ConfigError::Spec(wrong(3, 1)))
    );
}

#[test]
fn experts_count_as_merged_where_any_level_merged_them() {
    // Sure of one token at odd lengths, so that the gate lets the pivot decide alone there.
    let script = |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        for (v, z) in out.iter_mut().enumerate() {
            *z = ((v * 5 + positions.len() + lane.agent.index()) % 7) as f32 * 0.2;
        }
        if positions.len() % 2 == 1 {
            out[4] = 9.0;
        }
    };
    let rate = |groups: &[&[u32]], inner: bool, meta: bool| {
        let gate = |on: bool| {
            on.then_some(MergeGate {
                max_p: Some(0.9),
                js: None,
                pivot: 0,
            })
        };
        let mut cfg = grouped(&lockstep(), groups, Method::Mean);
        cfg.controller.gate = Gate::AlwaysExplicit;
        cfg.max_steps = 20;
        cfg.k = -1;
        cfg.consensus.gate = gate(inner);
        if let Topology::Hierarchical(h) = &mut cfg.topology {
            h.meta.gate = gate(meta);
        }
        let mut mock = MockBackend::scripted(4, VOCAB, 1, ROOM, Box::new(script));
        let mut one = job(0, 4);
        // Lanes of equal length.
        let first = one.prompts[0].clone();
        one.prompts.fill(first);
        go(&mut mock, &cfg, vec![one]).one().merge_rate
    };
    let (all, pairs): (&[&[u32]], &[&[u32]]) = (&[&[0, 1, 2, 3]], &[&[0, 1], &[2, 3]]);
    assert_eq!(rate(all, false, false), Some(1.0));
    assert_eq!(rate(all, true, false), Some(0.5));
    assert_eq!(rate(pairs, true, true), Some(0.5));
    assert_eq!(rate(pairs, false, true), Some(1.0));
    assert_eq!(rate(pairs, true, false), Some(1.0));
    // Nobody to merge with in a group; the meta level decides.
    assert_eq!(rate(&[&[0], &[1], &[2], &[3]], false, true), Some(0.5));
}

/// The mean, noting how many rows it met.
struct Noting(Arc<Mutex<Vec<usize>>>);

impl Consensus for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }

    fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool {
        self.0.lock().unwrap().push(views.centred.len());
        ConsensusSpec::of(Method::Mean).merge(views, out)
    }
}

#[test]
fn a_users_consensus_merges_the_members_and_not_the_groups() {
    let met = Arc::new(Mutex::new(Vec::new()));
    let cfg = grouped(&lockstep(), &[&[0, 1, 2], &[3], &[4, 5]], Method::Mean);
    let hooks = Hooks {
        consensus: Some(Box::new(Noting(Arc::clone(&met)))),
        ..Hooks::default()
    };
    let mut mock = MockBackend::hashed(6, VOCAB, 1, ROOM);
    let configs = std::slice::from_ref(&cfg);
    let run = run_into(Collect::default(), &mut mock, configs, hooks, jobs(1, 6)).unwrap();
    // One expert is its own consensus.
    let expected = [3, 2].repeat(steps(run.one()) as usize);
    assert_eq!(*met.lock().unwrap(), expected);
}

#[test]
fn an_agent_that_fails_in_a_group_is_named() {
    let script = |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        out.fill(0.5);
        if lane.agent == AgentId(2) && positions.len() > 8 {
            out[3] = f32::INFINITY;
        }
    };
    let mut mock = MockBackend::scripted(4, VOCAB, 1, ROOM, Box::new(script));
    let cfg = grouped(&lockstep(), &[&[3, 2], &[1, 0]], Method::Mean);
    let run = go(&mut mock, &cfg, jobs(1, 4));
    let o = run.one();
    assert_eq!(o.stop, Stop::NanInf);
    assert!(
        o.error.as_ref().unwrap().contains("mock-2"),
        "{:?}",
        o.error
    );
}

#[test]
fn a_grouped_sample_does_not_depend_on_its_batch() {
    let mut cfg = grouped(&lockstep(), &[&[0, 1], &[2]], Method::Mixture);
    cfg.noise = NoiseSpec::Gumbel { tau: 1.0 };
    assert!(!cfg.is_deterministic());
    let run = |slots| {
        let mut mock = MockBackend::hashed(3, VOCAB, slots, ROOM);
        timeless_all(&go(&mut mock, &cfg, jobs(9, 3)).outcomes)
    };
    let alone = run(1);
    assert_eq!(alone, run(4));
    assert_eq!(alone, run(7));
    // Members of a group are drawn as well, by the seed.
    let seeded = |seed| {
        let mut drawn = grouped(&lockstep(), &[&[0, 1, 2]], Method::Mean);
        drawn.consensus = ConsensusSpec::of(Method::Mixture);
        let jobs = jobs(3, 3).into_iter().map(|mut job| {
            job.key.seed = seed;
            job
        });
        let mut mock = MockBackend::hashed(3, VOCAB, 1, ROOM);
        let run = go(&mut mock, &drawn, jobs.collect());
        let texts: Vec<String> = run.outcomes.into_iter().map(|o| o.text).collect();
        texts
    };
    assert_eq!(seeded(1), seeded(1));
    assert_ne!(seeded(1), seeded(2));
    let drawing = grouped(&lockstep(), &[&[0, 1], &[2]], Method::Mixture);
    assert!(!drawing.is_deterministic(), "the meta level draws");
    assert!(grouped(&lockstep(), &[&[0, 1], &[2]], Method::Mean).is_deterministic());
}
