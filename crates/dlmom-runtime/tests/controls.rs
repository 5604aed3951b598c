//! What takes the place of packets, transcripts and exits, and the divergence it is reported with.

#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests fail as tests do"
)]

mod common;

use std::collections::BTreeSet;

use common::{
    Collect, Event, Fed, ROOM, Recorder, SAMPLED, VOCAB, chain_of, config, fed_packets, fed_tokens,
    go, go_with, job, jobs, one_model, packets_of, pair, prompt, refused, run_into, sequential,
    through_wire, with_chain,
};
use dlmom_core::{
    ConsensusSpec, FilterSpec, Gate, Method, Mode, NoiseSpec, Reason, Schedule, Stream, sample_key,
};
use dlmom_packet::{BeliefPacket, Encoding, Scalar, dense_len, embed_len};
use dlmom_runtime::controls::{ControlError, control, shuffled};
use dlmom_runtime::{
    AgentId, Backend, ConfigError, Controls, Donor, Donors, Handoff, HandoffControl, Hierarchy,
    Hooks, LinkMessage, LoopConfig, MockBackend, ModelId, PacketControl, PromptSource, RunError,
    Signal, Stop, Topology,
};
use proptest::prelude::*;

/// Six latent steps, then text.
fn latent(packet: PacketControl) -> LoopConfig {
    let mut cfg = config(Gate::AlwaysLatent, 0.5);
    cfg.controls.packet = packet;
    cfg
}

fn shared(slots: u32) -> MockBackend {
    one_model(MockBackend::hashed(2, VOCAB, slots, ROOM))
}

/// What both lanes were fed in their latent steps, with the events of these.
fn fed(cfg: &LoopConfig, index: u32, hooks: Hooks) -> (Vec<Fed>, Vec<Event>, Collect) {
    let mut backend = Recorder::new(shared(1));
    // Nothing but the latent budget ends the stretch.
    backend.inner.info_mut().models[0].eos.clear();
    let run = go_with(&mut backend, cfg, vec![job(index, 2)], hooks);
    let events: Vec<Event> = run.latent().cloned().collect();
    assert_eq!(events.len(), 6);
    let of = |agent: u32| {
        let at = prompt(index, agent).len();
        backend.last(agent)[at..at + 6].to_vec()
    };
    assert_eq!(of(0), of(1), "one message for all");
    (of(0), events, run)
}

fn packets(fed: &[Fed]) -> Vec<BeliefPacket> {
    fed.iter()
        .map(|fed| match fed {
            Fed::Packet(packet) => packet.clone(),
            other => panic!("{other:?} is no packet"),
        })
        .collect()
}

fn kl(a: &BeliefPacket, b: &BeliefPacket) -> f64 {
    a.iter()
        .map(|(id, p)| {
            let q = b.iter().find(|(other, _)| *other == id).unwrap().1;
            let (p, q) = (f64::from(p), f64::from(q));
            if p > 0.0 { p * (p / q).ln() } else { 0.0 }
        })
        .sum()
}

/// Jensen-Shannon divergence over the whole vocabulary.
fn js(a: &BeliefPacket, b: &BeliefPacket) -> f64 {
    let dense = |packet: &BeliefPacket| {
        let mut probs = vec![0.0_f64; VOCAB as usize];
        for (id, p) in packet.iter() {
            probs[id as usize] = f64::from(p);
        }
        probs
    };
    let term = |x: f64, m: f64| if x > 0.0 { 0.5 * x * (x / m).ln() } else { 0.0 };
    dense(a)
        .iter()
        .zip(dense(b))
        .map(|(&x, y)| term(x, 0.5 * (x + y)) + term(y, 0.5 * (x + y)))
        .sum()
}

/// Checks what is reported of every latent step against what was fed.
fn assert_reported(fed: &[BeliefPacket], events: &[Event], run: &Collect) {
    let (mut sum, mut halves) = (0.0, 0.0);
    for (packet, event) in fed.iter().zip(events) {
        assert_eq!(event.packet.as_ref(), Some(packet));
        let raw = event.raw();
        let expected = kl(packet, &raw);
        assert!((event.noise_kl.unwrap() - expected).abs() < 1e-5);
        assert!((event.noise_js - js(packet, &raw)).abs() < 1e-5);
        sum += event.noise_kl.unwrap();
        halves += event.noise_js;
    }
    let o = run.one();
    assert!((o.noise_kl.unwrap() - sum / 6.0).abs() < 1e-12);
    assert!((o.noise_js.unwrap() - halves / 6.0).abs() < 1e-12);
    assert_eq!(packets_of(o), fed);
}

fn sorted<T: Copy + PartialOrd>(values: &[T]) -> Vec<T> {
    let mut values = values.to_vec();
    values.sort_by(|a, b| a.partial_cmp(b).unwrap());
    values
}

#[test]
fn by_default_the_packet_is_fed_as_it_was_read() {
    let (fed, events, run) = fed(&latent(PacketControl::Real), 1, Hooks::default());
    let fed = packets(&fed);
    assert_reported(&fed, &events, &run);
    for (packet, event) in fed.iter().zip(&events) {
        assert_eq!(*packet, event.raw());
    }
    assert_eq!(
        (run.one().noise_kl, run.one().noise_js),
        (Some(0.0), Some(0.0))
    );
}

#[test]
fn uniform_feeds_the_tokens_without_their_weights() {
    let (fed, events, run) = fed(&latent(PacketControl::Uniform), 1, Hooks::default());
    let fed = packets(&fed);
    assert_reported(&fed, &events, &run);
    for (packet, event) in fed.iter().zip(&events) {
        assert_eq!(packet.probs(), [0.2; 5]);
        assert_eq!(packet.ids(), sorted(&event.read.ids));
        assert_eq!(packet.mass(), event.read.mass);
    }
}

#[test]
fn top1_feeds_the_most_probable_token_alone() {
    let (fed, events, run) = fed(&latent(PacketControl::Top1), 1, Hooks::default());
    let fed = packets(&fed);
    assert_reported(&fed, &events, &run);
    for (packet, event) in fed.iter().zip(&events) {
        assert_eq!(
            (packet.ids(), packet.probs()),
            (&event.read.ids[..1], &[1.0][..])
        );
        let far = -f64::from(event.read.probs[0]).ln();
        assert!((event.noise_kl.unwrap() - far).abs() < 1e-6);
    }
}

#[test]
fn a_shuffle_deals_the_probabilities_to_the_tokens_anew() {
    let cfg = latent(PacketControl::Shuffle);
    let mut moved = 0;
    for index in 0..3 {
        let (fed, events, run) = fed(&cfg, index, Hooks::default());
        let fed = packets(&fed);
        assert_reported(&fed, &events, &run);
        for (packet, event) in fed.iter().zip(&events) {
            assert_eq!(sorted(packet.ids()), sorted(&event.read.ids));
            assert_eq!(packet.probs(), event.read.probs);
            moved += usize::from(packet.ids() != event.read.ids);
        }
        let again = self::fed(&cfg, index, Hooks::default()).0;
        assert_eq!(packets(&again), fed);
    }
    assert!(moved > 12, "{moved} of 18 packets were dealt anew");
    let seeded = |seed| {
        let mut one = job(1, 2);
        one.key.seed = seed;
        packets_of(go(&mut shared(1), &cfg, vec![one]).one())
    };
    assert_ne!(seeded(1), seeded(2));
}

#[test]
fn equal_noise_is_as_far_from_the_packet_as_its_top_token() {
    let cfg = latent(PacketControl::EqualNoise);
    let seeded = |seed| {
        let mut backend = Recorder::new(shared(1));
        let mut one = job(2, 2);
        one.key.seed = seed;
        let run = go(&mut backend, &cfg, vec![one]);
        let events: Vec<Event> = run.latent().cloned().collect();
        let at = prompt(2, 0).len();
        let fed = packets(&backend.last(0)[at..at + 6]);
        assert_reported(&fed, &events, &run);
        for (packet, event) in fed.iter().zip(&events) {
            assert_eq!(sorted(packet.ids()), sorted(&event.read.ids));
            let far = -f64::from(event.read.probs[0]).ln();
            assert!((event.noise_kl.unwrap() - far).abs() < 1e-4, "{event:?}");
        }
        fed
    };
    assert_eq!(seeded(1), seeded(1));
    assert_ne!(seeded(1), seeded(2), "the direction is drawn");
}

#[test]
fn a_filler_feeds_the_mean_embedding_of_the_vocabulary() {
    for message in [LinkMessage::Belief, LinkMessage::Embed, LinkMessage::Logits] {
        let mut cfg = latent(PacketControl::Filler);
        cfg.link.message = message;
        if message == LinkMessage::Logits {
            cfg.k = -1;
        }
        let (fed, events, run) = fed(&cfg, 1, Hooks::default());
        let share = 1.0 / VOCAB as f32;
        let all: Vec<u32> = (0..VOCAB).collect();
        let even = BeliefPacket::new(all, vec![share; VOCAB as usize], 1.0, VOCAB).unwrap();
        let mean = Fed::Embed(
            shared(1)
                .embed(ModelId(0), std::slice::from_ref(&even))
                .unwrap()
                .values,
        );
        assert_eq!(fed, vec![mean; 6]);
        let o = run.one();
        let bytes = 2 * embed_len(4, Scalar::F32) as u64;
        for event in &events {
            assert_eq!((event.noise_kl, &event.packet), (None, &None));
            // The mean embedding is the mixture of all tokens.
            assert!((event.noise_js - js(&even, &event.raw())).abs() < 1e-5);
            assert_eq!(event.bytes.1, bytes);
        }
        assert!(o.noise_kl.is_none() && o.packets.is_empty());
        let trace = o.trace.as_ref().unwrap();
        assert_eq!(trace.noise_kl[..6], [None; 6]);
        assert_eq!(trace.noise_kl[6], Some(0.0));
        let mean = events.iter().map(|e| e.noise_js).sum::<f64>() / 6.0;
        assert!((o.noise_js.unwrap() - mean).abs() < 1e-12);
    }
}

#[test]
fn controls_reach_every_kind_of_message() {
    for message in [LinkMessage::Embed, LinkMessage::Logits] {
        let mut cfg = latent(PacketControl::Top1);
        cfg.link.message = message;
        if message == LinkMessage::Logits {
            cfg.k = -1;
        }
        let (fed, events, _) = fed(&cfg, 1, Hooks::default());
        for (fed, event) in fed.iter().zip(&events) {
            let top = event.read.ids[0];
            match fed {
                Fed::Embed(values) => {
                    let token = BeliefPacket::one_hot(top, VOCAB).unwrap();
                    let expected = shared(1).embed(ModelId(0), &[token]).unwrap();
                    assert_eq!(*values, expected.values);
                }
                Fed::Dense(probs) => {
                    assert_eq!((probs[top as usize], probs.iter().sum::<f32>()), (1.0, 1.0));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn divergences_are_those_of_filter_noise_and_control_together() {
    for packet in [
        PacketControl::Real,
        PacketControl::Top1,
        PacketControl::Uniform,
        PacketControl::Shuffle,
        PacketControl::EqualNoise,
    ] {
        for (filter, noise) in [
            (
                FilterSpec {
                    keep: 3,
                    temperature: 0.7,
                    ..FilterSpec::NONE
                },
                NoiseSpec::None,
            ),
            (FilterSpec::NONE, NoiseSpec::Gumbel { tau: 1.0 }),
            (
                FilterSpec {
                    keep: 4,
                    ..FilterSpec::NONE
                },
                NoiseSpec::Dirichlet { lambda: 5.0 },
            ),
        ] {
            let mut cfg = latent(packet);
            cfg.filter = filter;
            cfg.noise = noise;
            let (fed, events, run) = fed(&cfg, 1, Hooks::default());
            assert_reported(&packets(&fed), &events, &run);
        }
    }
}

/// A donor whose packets say which they are.
fn donor(item: u32, count: u32) -> Donor {
    Donor {
        item_id: format!("item-{item}"),
        packets: (0..count)
            .map(|at| {
                let ids = vec![item % VOCAB, (item + 7 + at) % VOCAB, 22];
                BeliefPacket::new(ids, vec![0.5, 0.3, 0.2], 0.9, VOCAB).unwrap()
            })
            .collect(),
    }
}

fn donors(items: &[(u32, u32)]) -> Hooks {
    Hooks {
        donors: Donors::new(items.iter().map(|&(i, n)| donor(i, n)).collect()),
        ..Hooks::default()
    }
}

#[test]
fn other_feeds_the_packets_of_one_other_item_in_turn() {
    let cfg = latent(PacketControl::Other);
    let items = [(1, 4), (2, 4), (3, 4)];
    let mut givers = BTreeSet::new();
    for index in 0..4 {
        for seed in 0..6 {
            let mut one = job(index, 2);
            one.key.seed = seed;
            let run = |hooks| {
                let mut backend = Recorder::new(shared(1));
                let run = go_with(&mut backend, &cfg, vec![one.clone()], hooks);
                let at = prompt(index, 0).len();
                let fed = packets(&backend.last(0)[at..at + 6]);
                (fed, run)
            };
            let (fed, found) = run(donors(&items));
            let giver = items
                .iter()
                .map(|&(item, count)| (item, donor(item, count).packets))
                .find(|(_, packets)| packets[0] == fed[0])
                .expect("a donor's");
            assert_ne!(giver.0, index, "never its own");
            let turns: Vec<BeliefPacket> = giver.1.iter().cycle().take(6).cloned().collect();
            assert_eq!(fed, turns);
            assert_eq!(run(donors(&items)).0, fed, "by item and seed");
            givers.insert((index, giver.0));
            let o = found.one();
            assert!(o.noise_kl.is_none());
            let events: Vec<&Event> = found.latent().collect();
            for (packet, event) in fed.iter().zip(events) {
                assert!((event.noise_js - js(packet, &event.raw())).abs() < 1e-5);
            }
            assert!(o.noise_js.unwrap() > 0.0);
        }
    }
    assert!(givers.len() > 6, "{givers:?}");
}

#[test]
fn without_another_item_there_is_nothing_to_feed() {
    let mut handed = pair(Handoff::Transcript);
    handed.controls.handoff = HandoffControl::Other;
    for cfg in [latent(PacketControl::Other), handed] {
        let error = refused(&mut shared(1), &cfg, Hooks::default());
        assert!(matches!(error, RunError::NoDonors), "{error}");
        // Items that never thought have nothing to give.
        let error = refused(&mut shared(1), &cfg, donors(&[(4, 0)]));
        assert!(matches!(error, RunError::NoDonors), "{error}");
        // Its own packets alone are none of another: the sample fails, the others do not.
        let run = go_with(&mut shared(2), &cfg, jobs(3, 2), donors(&[(1, 3)]));
        let stops: Vec<bool> = run
            .outcomes
            .iter()
            .map(|o| o.stop == Stop::Backend)
            .collect();
        assert_eq!(stops, [false, true, false]);
        let said = run.outcomes[1].error.as_deref();
        assert_eq!(said, Some("no other item has a latent packet to give"));
    }
}

proptest! {
    #[test]
    fn a_donor_is_another_item_and_depends_on_item_and_seed_alone(
        seed in any::<u64>(),
        index in 0_u32..6,
        items in prop::collection::btree_set(0_u32..6, 0..6),
        step in 0_u32..20,
    ) {
        let items: Vec<(u32, u32)> = items.into_iter().map(|i| (i, 1 + i % 3)).collect();
        let all = donors(&items).donors;
        let name = format!("item-{index}");
        let stream = |step| Stream { seed, sample: sample_key(&name, 0, 0), step };
        let packet = BeliefPacket::new(vec![1, 2], vec![0.6, 0.4], 0.8, VOCAB).unwrap();
        let at = |moment: u64, latent_step| {
            control(PacketControl::Other, &packet, &name, latent_step, &all, &stream(moment))
        };
        if items.iter().all(|&(i, _)| i == index) {
            prop_assert!(matches!(at(0, step), Err(ControlError::NoDonor)));
        } else {
            let picked = all.pick(&name, &stream(0)).unwrap();
            prop_assert_ne!(&picked.item_id, &name);
            // Whenever it is asked for, the item's donor is the same one.
            for moment in [0, 1, 9] {
                let fed = at(moment, step).unwrap().packet;
                prop_assert_eq!(&fed, &picked.packets[step as usize % picked.packets.len()]);
            }
        }
    }

    #[test]
    fn a_shuffled_transcript_is_a_permutation(seed in any::<u64>(), count in 0_usize..40, step in 0_u64..9) {
        let stream = |step| Stream { seed, sample: 3, step };
        let order = shuffled(count, &stream(step));
        prop_assert_eq!(sorted(&order), (0..count).collect::<Vec<_>>());
        prop_assert_eq!(order, shuffled(count, &stream(0)));
    }
}

#[test]
fn modes_are_those_of_the_schedule_whatever_the_entropies() {
    for gate in [Gate::AlwaysExplicit, Gate::AlwaysLatent, Gate::Threshold] {
        let mut cfg = config(gate, 0.45);
        cfg.controls.same_exits = true;
        cfg.controller.min_dwell_latent = 3;
        for runs in [vec![0, 2, 1, 3], vec![2, 1, 1, 1, 1, 4], vec![0, 6], vec![]] {
            let mut one = job(1, 2);
            let schedule = Schedule::from(runs);
            one.schedule = Some(schedule.clone());
            let run = go(&mut shared(1), &cfg, vec![one]);
            let trace = run.one().trace.as_ref().unwrap();
            let modes: Vec<Mode> = (0..trace.mode.len() as u32)
                .map(|s| schedule.mode(s))
                .collect();
            assert_eq!(trace.mode, modes);
            assert_eq!(trace.reason[0], Reason::Scheduled);
        }
        // The sample's own budgets still hold.
        cfg.controller.max_latent_steps = 2;
        let mut one = job(1, 2);
        one.schedule = Some(Schedule::from(vec![1, 5]));
        let run = go(&mut shared(1), &cfg, vec![one]);
        let o = run.one();
        assert_eq!(o.latent_steps, 2);
        assert_eq!(o.trace.as_ref().unwrap().reason[3], Reason::LatentBudget);
        cfg.controller.cap = 0;
        let mut one = job(1, 2);
        one.schedule = Some(Schedule::from(vec![1, 5]));
        assert_eq!(go(&mut shared(1), &cfg, vec![one]).one().latent_steps, 0);
    }
}

#[test]
fn without_a_schedule_exits_cannot_be_the_same() {
    let mut cfg = config(Gate::Threshold, 0.45);
    cfg.controls.same_exits = true;
    let error = run_into(
        Collect::default(),
        &mut shared(1),
        &[cfg],
        Hooks::default(),
        jobs(1, 2),
    )
    .err()
    .expect("refused");
    assert!(matches!(error, RunError::NoSchedule { .. }));
    insta::assert_snapshot!(error, @"item item-0: controls.same_exits needs the modes of the reference pipeline's sample, and there are none");
}

#[test]
fn exits_of_a_chain_are_followed_from_visit_to_visit() {
    let mut cfg = with_chain(
        config(Gate::Threshold, 0.5),
        sequential(&["a", "b"], Handoff::Transcript),
    );
    // Stretches of different lengths.
    chain_of(&mut cfg).roles[0].latent_steps = Some(2);
    let mock = || MockBackend::hashed(2, VOCAB, 1, ROOM);
    let reference = go(&mut mock(), &cfg, jobs(6, 2));
    cfg.controls.same_exits = true;
    cfg.controls.packet = PacketControl::Top1;
    cfg.controller.gate = Gate::AlwaysExplicit;
    let followers = reference
        .outcomes
        .iter()
        .zip(jobs(6, 2))
        .map(|(o, mut job)| {
            job.schedule = Some(o.schedule.clone());
            job
        })
        .collect();
    let run = go(&mut mock(), &cfg, followers);
    let mut differ = 0;
    for (a, b) in reference.outcomes.iter().zip(&run.outcomes) {
        assert_eq!(a.latent_segments, b.latent_segments);
        assert_eq!(a.handoff_log[0].step, b.handoff_log[0].step);
        differ += usize::from(a.text != b.text);
    }
    assert!(
        reference
            .outcomes
            .iter()
            .any(|o| o.latent_segments.len() > 1)
    );
    assert!(differ > 0, "what is fed is another");
}

#[test]
fn a_latent_stretch_that_is_cut_leaves_what_was_there_before_it() {
    let mut cfg = config(Gate::AlwaysExplicit, 0.5);
    cfg.controls.same_exits = true;
    cfg.controls.drop_latent = true;
    cfg.max_steps = 14;
    let mut one = job(1, 2);
    one.schedule = Some(Schedule::from(vec![0, 2, 1, 3, 8]));
    let mut backend = Recorder::hashed(2);
    let run = go(&mut backend, &cfg, vec![one.clone()]);
    let o = run.one().clone();
    assert_eq!((o.latent_steps, o.explicit_tokens), (5, 9));
    for agent in 0..2 {
        let ids = prompt(1, agent);
        let expected = [fed_tokens(&ids), fed_tokens(&o.tokens[..8])].concat();
        assert_eq!(backend.last(agent), expected);
        let cuts: Vec<u32> = backend
            .truncations
            .iter()
            .filter(|(lane, _)| lane.agent == AgentId(agent))
            .map(|(_, length)| *length)
            .collect();
        let length = ids.len() as u32;
        assert_eq!(cuts, [length, length + 1]);
        // All that was forwarded counts, cut or not.
        assert_eq!(o.forward_tokens[agent as usize], length + 5 + 8);
    }
    // From the last cut on it is what it would be had it never thought.
    let mut plain = config(Gate::AlwaysExplicit, 0.5);
    plain.max_steps = 7;
    let mut from_there = job(1, 2);
    from_there.prompts = (0..2)
        .map(|agent| PromptSource::Tokens {
            ids: [prompt(1, agent), o.tokens[..2].to_vec()].concat(),
        })
        .collect();
    let later = go(
        &mut MockBackend::hashed(2, VOCAB, 1, ROOM),
        &plain,
        vec![from_there],
    );
    assert_eq!(o.tokens[2..], later.one().tokens);

    cfg.controls.drop_latent = false;
    let mut kept = Recorder::hashed(2);
    let other = go(&mut kept, &cfg, vec![one]);
    assert!(kept.truncations.is_empty());
    assert_eq!(
        kept.last(0).len(),
        prompt(1, 0).len() + 5 + other.one().tokens.len() - 1
    );
    assert_ne!(o.tokens, other.one().tokens);
}

fn handing(control: HandoffControl) -> LoopConfig {
    let mut cfg = pair(Handoff::Transcript);
    cfg.controls.handoff = control;
    cfg
}

/// What the receiver was fed between its prompt and its own thoughts, with the run.
fn handed(cfg: &LoopConfig, index: u32, hooks: Hooks) -> (Vec<Fed>, Collect) {
    let mut backend = Recorder::new(shared(1));
    let run = go_with(&mut backend, cfg, vec![job(index, 2)], hooks);
    let record = &run.one().handoff_log[0];
    let at = prompt(index, 1).len();
    let carried = backend.last(1)[at..at + record.positions as usize].to_vec();
    assert_eq!(
        run.one().forward_tokens[1] as usize,
        backend.last(1).len(),
        "all of it is forwarded"
    );
    (carried, run)
}

#[test]
fn zeros_take_as_many_positions_as_the_transcript() {
    for message in [LinkMessage::Belief, LinkMessage::Embed, LinkMessage::Hidden] {
        let mut cfg = handing(HandoffControl::Zero);
        cfg.link.message = message;
        let (carried, run) = handed(&cfg, 1, Hooks::default());
        assert_eq!(carried, vec![Fed::Embed(vec![0.0; 4]); 3]);
        let record = &run.one().handoff_log[0];
        assert_eq!(record.bytes, 3 * embed_len(4, Scalar::F32) as u64);
    }
}

#[test]
fn vectors_that_stand_for_packets_are_as_wide_as_the_receiver() {
    let mut zero = handing(HandoffControl::Zero);
    let mut filler = pair(Handoff::Transcript);
    filler.controls.packet = PacketControl::Filler;
    for cfg in [&mut zero, &mut filler] {
        // Models of one vocabulary and different widths; the first one thinks.
        chain_of(cfg).roles[0].latent_steps = Some(6);
        let mut backend = Recorder::hashed(2);
        let other = &mut backend.inner.info_mut().models[1];
        other.hidden = 6;
        other.dtype = "bf16".into();
        let run = go(&mut backend, cfg, vec![job(1, 2)]);
        let o = run.one();
        assert_ne!(o.stop, Stop::Backend, "{:?}", o.error);
        let at = prompt(1, 1).len();
        let carried = backend.last(1)[at..at + 6].to_vec();
        let rounded = |x: f32| f32::from_bits((x.to_bits() + 0x8000) & 0xffff_0000);
        let expected = if cfg.controls.handoff == HandoffControl::Zero {
            vec![0.0; 6]
        } else {
            let share = 1.0 / VOCAB as f32;
            let all: Vec<u32> = (0..VOCAB).collect();
            let even = BeliefPacket::new(all, vec![share; VOCAB as usize], 1.0, VOCAB).unwrap();
            let mean = backend.embed(ModelId(1), &[even]).unwrap().values;
            mean.into_iter().map(rounded).collect()
        };
        assert_eq!(carried, vec![Fed::Embed(expected); 6]);
        let bytes = 6 * embed_len(6, Scalar::Bf16) as u64;
        assert_eq!(o.handoff_bytes, bytes);
    }
}

#[test]
fn a_shuffled_handoff_hands_the_same_messages_over_in_another_order() {
    for message in [
        LinkMessage::Belief,
        LinkMessage::Embed,
        LinkMessage::Logits,
        LinkMessage::Hidden,
    ] {
        let mut moved = 0;
        for index in 0..4 {
            let with = |control| {
                let mut cfg = handing(control);
                cfg.link.message = message;
                if message == LinkMessage::Logits {
                    cfg.k = -1;
                }
                handed(&cfg, index, Hooks::default())
            };
            let (real, straight) = with(HandoffControl::Real);
            let (carried, shuffled_run) = with(HandoffControl::Shuffle);
            let stream = Stream {
                seed: 0,
                sample: sample_key(&format!("item-{index}"), 0, 0),
                step: 0,
            };
            let order = shuffled(3, &stream);
            let expected: Vec<Fed> = order.iter().map(|&at| real[at].clone()).collect();
            assert_eq!(carried, expected);
            moved += usize::from(order != [0, 1, 2]);
            let bytes = |run: &Collect| run.one().handoff_log[0].bytes;
            assert_eq!(bytes(&straight), bytes(&shuffled_run));
            // The giver has noticed nothing.
            assert_eq!(
                straight.one().packets.get(..3),
                shuffled_run.one().packets.get(..3)
            );
        }
        assert!(moved > 1);
    }
}

#[test]
fn another_items_transcript_travels_as_this_ones_would() {
    let given = donor(5, 4).packets;
    for message in [LinkMessage::Belief, LinkMessage::Embed, LinkMessage::Logits] {
        let mut cfg = handing(HandoffControl::Other);
        cfg.link.message = message;
        if message == LinkMessage::Logits {
            cfg.k = -1;
        }
        let (carried, run) = handed(&cfg, 1, donors(&[(1, 2), (5, 4)]));
        let (expected, bytes): (Vec<Fed>, u64) = match message {
            LinkMessage::Belief => {
                let (received, bytes) = through_wire(&given, Encoding::F32);
                (fed_packets(&received), bytes)
            }
            LinkMessage::Embed => {
                let mixed = shared(1).embed(ModelId(0), &given).unwrap();
                let rows = mixed.values.chunks_exact(4);
                (
                    rows.map(|row| Fed::Embed(row.to_vec())).collect(),
                    4 * embed_len(4, Scalar::F32) as u64,
                )
            }
            _ => {
                let dense = given.iter().map(|packet| {
                    let mut probs = vec![0.0; VOCAB as usize];
                    for (id, p) in packet.iter() {
                        probs[id as usize] = p;
                    }
                    Fed::Dense(probs)
                });
                (
                    dense.collect(),
                    4 * dense_len(VOCAB as usize, Scalar::F32) as u64,
                )
            }
        };
        assert_eq!(carried, expected);
        assert_eq!(run.one().handoff_log[0].bytes, bytes);
    }
}

#[test]
fn nothing_handed_over_is_a_handoff_all_the_same() {
    let mut backend = Recorder::new(shared(1));
    let run = go(
        &mut backend,
        &handing(HandoffControl::None),
        vec![job(1, 2)],
    );
    let o = run.one();
    let record = &o.handoff_log[0];
    assert_eq!((o.handoffs, record.positions, record.bytes), (1, 0, 0));
    assert_eq!((record.from, record.to), (0, 1));
    // Its prompt, and then its own thoughts.
    let own = [fed_tokens(&prompt(1, 1)), fed_packets(&packets_of(o)[3..])].concat();
    assert_eq!(backend.last(1)[..own.len()], own);
}

/// A chain whose first agent writes words.
fn noted(control: HandoffControl, index: u32) -> (String, Collect) {
    let mut cfg = with_chain(
        config(Gate::AlwaysExplicit, 0.5),
        sequential(&["a", "b"], Handoff::Text),
    );
    cfg.controls.handoff = control;
    cfg.sampling = SAMPLED;
    chain_of(&mut cfg).roles[1].notes = "{notes}".into();
    let mut backend = Recorder::new(shared(1));
    for id in (2..VOCAB).step_by(3) {
        backend.inner.info_mut().models[0].token_bytes[id as usize] = b" ".to_vec();
    }
    let mut one = job(index, 2);
    one.prompts[1] = PromptSource::Text { text: "ask".into() };
    let run = go(&mut backend, &cfg, vec![one]);
    let Some((_, PromptSource::Text { text })) = backend.encoded.last() else {
        panic!("a text is the last prompt")
    };
    (text.clone(), run)
}

#[test]
fn notes_may_be_shuffled_or_left_out() {
    let mut moved = 0;
    for index in 0..5 {
        let (straight, _) = noted(HandoffControl::Real, index);
        let (shuffle, run) = noted(HandoffControl::Shuffle, index);
        let words = |text: &str| -> Vec<String> {
            let notes = text.strip_prefix("ask").unwrap();
            notes.split_whitespace().map(str::to_owned).collect()
        };
        let (mut a, mut b) = (words(&straight), words(&shuffle));
        moved += usize::from(a != b);
        a.sort();
        b.sort();
        assert_eq!(a, b);
        let expected = words(&shuffle).join(" ").len() as u64;
        assert_eq!(run.one().handoff_bytes, expected);
        let (none, run) = noted(HandoffControl::None, index);
        let o = run.one();
        assert_eq!((&none[..], o.handoffs, o.handoff_bytes), ("ask", 1, 0));
    }
    assert!(moved > 2, "{moved} of 5 notes were shuffled");
}

#[test]
fn a_control_beside_what_it_cannot_work_with_is_refused() {
    let said = |change: &dyn Fn(&mut LoopConfig)| {
        let mut cfg = pair(Handoff::Transcript);
        change(&mut cfg);
        let error = refused(&mut shared(1), &cfg, donors(&[(9, 1)]));
        assert!(
            matches!(error, RunError::Config(ConfigError::Control { .. })),
            "{error}"
        );
        error.to_string()
    };
    let signal = || {
        Some(Signal {
            text: "x".into(),
            weight: 0.5,
        })
    };
    let hidden = |cfg: &mut LoopConfig| cfg.link.message = LinkMessage::Hidden;
    let mut lines = Vec::new();
    for packet in [
        PacketControl::Uniform,
        PacketControl::Filler,
        PacketControl::Other,
        PacketControl::Shuffle,
        PacketControl::Top1,
        PacketControl::EqualNoise,
    ] {
        lines.push(said(&|cfg| {
            hidden(cfg);
            cfg.controls.packet = packet;
        }));
    }
    lines.dedup();
    lines.push(said(&|cfg| {
        hidden(cfg);
        cfg.enter_signal = signal();
    }));
    lines.push(said(&|cfg| {
        hidden(cfg);
        cfg.exit_signal = signal();
    }));
    for exit in [false, true] {
        lines.push(said(&|cfg| {
            cfg.controls.packet = PacketControl::Filler;
            if exit {
                cfg.exit_signal = signal();
            } else {
                cfg.enter_signal = signal();
            }
        }));
    }
    lines.dedup();
    for handoff in [
        HandoffControl::Zero,
        HandoffControl::Shuffle,
        HandoffControl::Other,
        HandoffControl::None,
    ] {
        lines.push(said(&|cfg| {
            cfg.controls.handoff = handoff;
            cfg.topology = Topology::Lockstep;
        }));
        lines.push(said(&|cfg| {
            cfg.controls.handoff = handoff;
            cfg.topology = Topology::Hierarchical(Hierarchy {
                groups: vec![vec![0, 1]],
                meta: ConsensusSpec::of(Method::Mean),
            });
        }));
        lines.dedup();
    }
    for handoff in [
        HandoffControl::Zero,
        HandoffControl::Shuffle,
        HandoffControl::Other,
        HandoffControl::None,
    ] {
        lines.push(said(&|cfg| {
            cfg.controls.handoff = handoff;
            chain_of(cfg).handoff = Handoff::Kv;
        }));
        lines.dedup();
    }
    for handoff in [HandoffControl::Zero, HandoffControl::Other] {
        lines.push(said(&|cfg| {
            cfg.controls.handoff = handoff;
            chain_of(cfg).handoff = Handoff::Text;
        }));
    }
    lines.push(said(&|cfg| {
        hidden(cfg);
        cfg.controls.handoff = HandoffControl::Other;
    }));
    insta::assert_snapshot!(lines.join("\n"), @r"
    controls.packet: link.message is hidden: no packet is fed
    controls.packet: enter_signal and exit_signal need packets; link.message is hidden
    controls.packet: filler: a filler has no tokens to mix a signal with
    controls.handoff: only a sequential topology hands anything over
    controls.handoff: handoff: kv hands a cache over, not a transcript
    controls.handoff: zero: a text of zeros is none; use transcript, or none
    controls.handoff: other: texts of other items are not recorded; use transcript
    controls.handoff: other: hidden states of other items are not recorded; link.message is hidden
    ");
}

#[test]
fn controls_that_draw_make_seeds_matter() {
    let drawing = |controls: Controls| {
        let mut cfg = pair(Handoff::Transcript);
        cfg.controls = controls;
        (
            !cfg.is_deterministic(),
            controls.draws(),
            controls.needs_donors(),
        )
    };
    let packet = |packet| {
        drawing(Controls {
            packet,
            ..Controls::default()
        })
    };
    let handoff = |handoff| {
        drawing(Controls {
            handoff,
            ..Controls::default()
        })
    };
    let (no, draws, donors) = (
        (false, false, false),
        (true, true, false),
        (true, true, true),
    );
    assert_eq!(packet(PacketControl::Real), no);
    assert_eq!(packet(PacketControl::Uniform), no);
    assert_eq!(packet(PacketControl::Filler), no);
    assert_eq!(packet(PacketControl::Top1), no);
    assert_eq!(packet(PacketControl::Shuffle), draws);
    assert_eq!(packet(PacketControl::EqualNoise), draws);
    assert_eq!(packet(PacketControl::Other), donors);
    assert_eq!(handoff(HandoffControl::Zero), no);
    assert_eq!(handoff(HandoffControl::None), no);
    assert_eq!(handoff(HandoffControl::Shuffle), draws);
    assert_eq!(handoff(HandoffControl::Other), donors);
}
