//! Two configurations side by side: what the second row is fed, what is compared, and that the first never notices.
//! And several configurations in one session.

#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests fail as tests do"
)]

mod common;

use common::{
    Collect, Event, Fed, ROOM, Recorder, SAMPLED, VOCAB, chain_of, config, go, job, jobs,
    one_model, packets_of, pair, prompt, run_into, timeless, timeless_all,
};
use dlmom_core::{
    Consensus, ConsensusSpec, FilterSpec, Gate, Method, Mode, NoiseSpec, SamplingSpec, Stream,
    compare_rows, noise, sample_key,
};
use dlmom_packet::BeliefPacket;
use dlmom_runtime::{
    AgentId, Align, Backend, Controls, Divergences, Donor, Donors, Feed, Follow, Handoff,
    HandoffControl, Hooks, Job, LaneId, LaneSpec, LinkMessage, LinkSpec, LoopConfig, MockBackend,
    Outcome, PacketControl, Readout, Rival, Row, RunError, RunOptions, SlotId, Stop, Want, run_all,
};

const MODES: [Follow; 3] = [Follow::Free, Follow::Inputs, Follow::OneStep];

/// Latent up to its budget, then in and out of it.
fn reference() -> LoopConfig {
    let mut cfg = config(Gate::Threshold, 0.45);
    cfg.controller.max_latent_steps = 12;
    cfg
}

fn against(follow: Follow, jobs: Vec<Job>) -> Vec<Job> {
    jobs.into_iter()
        .map(|job| Job {
            rival: Some(Rival { config: 1, follow }),
            ..job
        })
        .collect()
}

fn compared(
    backend: &mut dyn Backend,
    configs: [&LoopConfig; 2],
    follow: Follow,
    jobs: Vec<Job>,
) -> Collect {
    with_hooks(backend, configs, follow, jobs, Hooks::default())
}

fn with_hooks(
    backend: &mut dyn Backend,
    configs: [&LoopConfig; 2],
    follow: Follow,
    jobs: Vec<Job>,
    hooks: Hooks,
) -> Collect {
    let configs = configs.map(Clone::clone);
    run_into(
        Collect::default(),
        backend,
        &configs,
        hooks,
        against(follow, jobs),
    )
    .expect("the run succeeds")
}

fn divergences(o: &Outcome) -> &Divergences {
    o.divergences.as_ref().expect("a rival was there")
}

/// Steps at which a comparison of one step looks at the message of the step before.
fn after_latent(o: &Outcome) -> Vec<u32> {
    let mode = &o.trace.as_ref().unwrap().mode;
    (1..mode.len())
        .filter(|&step| mode[step - 1] == Mode::Latent)
        .map(|step| step as u32)
        .collect()
}

fn all_steps(o: &Outcome) -> Vec<u32> {
    (0..o.trace.as_ref().unwrap().mode.len() as u32).collect()
}

/// An outcome as it would be without a rival.
fn alone(o: &Outcome) -> Outcome {
    Outcome {
        divergences: None,
        ..timeless(o)
    }
}

fn hashed(slots: u32) -> MockBackend {
    MockBackend::hashed(2, VOCAB, slots, ROOM)
}

#[test]
fn the_reference_against_itself_is_the_same_to_the_last_bit() {
    let mut noisy = reference();
    noisy.noise = NoiseSpec::Gumbel { tau: 1.0 };
    noisy.sampling = SamplingSpec {
        repetition_penalty: 1.2,
        ..SAMPLED
    };
    let mut drawn = reference();
    drawn.consensus = ConsensusSpec::of(Method::Mixture);
    let mut embed = reference();
    embed.link.message = LinkMessage::Embed;
    let mut dense = reference();
    dense.link.message = LinkMessage::Logits;
    dense.k = -1;
    for cfg in [reference(), noisy, drawn, embed, dense] {
        for follow in MODES {
            for slots in [2, 5] {
                let mut mock = one_model(hashed(slots));
                let run = compared(&mut mock, [&cfg, &cfg], follow, jobs(6, 2));
                let mut met = 0;
                for o in &run.outcomes {
                    let found = divergences(o);
                    let steps = match follow {
                        Follow::OneStep => after_latent(o),
                        Follow::Free | Follow::Inputs => all_steps(o),
                    };
                    assert_eq!(found.step, steps, "{follow:?}");
                    met += steps.len();
                    assert!(found.kl.iter().all(|&kl| kl == 0.0), "{follow:?} {found:?}");
                    // The cosine divides by two roots.
                    assert!(found.cosine.iter().all(|c| (c - 1.0).abs() < 1e-12));
                    assert_eq!(found.cosine.len(), found.step.len());
                }
                assert!(met > 20, "{met} comparisons");
            }
        }
    }
}

#[test]
fn a_sample_never_notices_its_rival_and_the_sink_never_sees_it() {
    let mut gumbel = reference();
    gumbel.noise = NoiseSpec::Gumbel { tau: 2.0 };
    let mut mean = reference();
    mean.consensus = ConsensusSpec::of(Method::Arith);
    let mut wide = reference();
    wide.k = 15;
    let mut brief = reference();
    brief.max_steps = 9;
    let mut other = config(Gate::AlwaysExplicit, 0.5);
    other.sampling = SAMPLED;
    for cfg in [reference(), {
        let mut cfg = reference();
        cfg.noise = NoiseSpec::Dirichlet { lambda: 20.0 };
        cfg.sampling = SAMPLED;
        cfg
    }] {
        let mut mock = hashed(3);
        let plain = go(&mut mock, &cfg, jobs(7, 2));
        for follow in MODES {
            for variant in [&gumbel, &mean, &wide, &brief, &other] {
                for slots in [2, 3, 6] {
                    let run = compared(&mut hashed(slots), [&cfg, variant], follow, jobs(7, 2));
                    let without: Vec<Outcome> = run.outcomes.iter().map(alone).collect();
                    assert_eq!(without, timeless_all(&plain.outcomes), "{follow:?}");
                    let key = |e: &Event| (e.item.clone(), e.step, e.agent, e.token, e.bytes);
                    let mut seen: Vec<_> = run.events.iter().map(key).collect();
                    let mut expected: Vec<_> = plain.events.iter().map(key).collect();
                    seen.sort();
                    expected.sort();
                    assert_eq!(seen, expected);
                }
            }
        }
    }
}

fn feed(fed: &Fed) -> Feed<'_> {
    match fed {
        Fed::Token(id) => Feed::Tokens(std::slice::from_ref(id)),
        Fed::Packet(packet) => Feed::Packets(std::slice::from_ref(packet)),
        Fed::Embed(_) | Fed::Dense(_) => panic!("not fed here"),
    }
}

/// Feeds lanes anew, prompts at once and all else one by one, and reads after each: log-probabilities of
/// all tokens, and the packet of the `top` most probable.
fn replayed(
    lanes: &[(usize, &[Fed])],
    consensus: &dyn Consensus,
    top: u32,
) -> Vec<(Vec<f32>, BeliefPacket)> {
    let agents = lanes.len();
    let mut mock = MockBackend::hashed(agents, VOCAB, 1, ROOM);
    let specs: Vec<LaneSpec> = (0..agents as u32)
        .map(|agent| LaneSpec {
            lane: common::lane(0, agent),
            max_len: ROOM,
        })
        .collect();
    mock.open(&specs).unwrap();
    let everyone: Vec<AgentId> = (0..agents as u32).map(AgentId).collect();
    let all: Vec<u32> = (0..VOCAB).collect();
    let prompts: Vec<Vec<u32>> = lanes
        .iter()
        .map(|(length, held)| {
            held[..*length]
                .iter()
                .map(|fed| match fed {
                    Fed::Token(id) => *id,
                    other => panic!("{other:?} in a prompt"),
                })
                .collect()
        })
        .collect();
    let mut read = |feeds: &[(AgentId, Feed<'_>)]| {
        let row = Row {
            slot: SlotId(0),
            feeds,
            merge: &everyone,
            consensus,
            want: Want {
                top,
                targets: Some(&all),
                ..Want::default()
            },
        };
        let mut out = Readout::default();
        mock.advance(&[row], &mut out).unwrap();
        let read = &out.rows[0].read;
        let packet =
            BeliefPacket::new(read.ids.clone(), read.probs.clone(), read.mass, VOCAB).unwrap();
        let logs = read.target_logprobs.iter().map(|&l| l as f32).collect();
        (logs, packet)
    };
    let first: Vec<_> = everyone
        .iter()
        .zip(&prompts)
        .map(|(&agent, ids)| (agent, Feed::Tokens(ids)))
        .collect();
    let mut found = vec![read(&first)];
    let (length, held) = lanes[0];
    for at in 0..held.len() - length {
        let next: Vec<_> = everyone
            .iter()
            .zip(lanes)
            .map(|(&agent, (length, held))| (agent, feed(&held[length + at])))
            .collect();
        found.push(read(&next));
    }
    found
}

fn lanes_of(backend: &Recorder, slot: u32, index: u32) -> [(usize, &[Fed]); 2] {
    [0, 1].map(|agent| (prompt(index, agent).len(), backend.of(slot, agent)))
}

fn assert_near(found: &Divergences, pairs: &[(&Vec<f32>, &Vec<f32>)]) {
    assert_eq!(found.kl.len(), pairs.len());
    for (at, (a, b)) in pairs.iter().enumerate() {
        let expected = compare_rows(a, b);
        assert!(
            (found.kl[at] - expected.kl).abs() < 1e-5,
            "{at}: {} {expected:?}",
            found.kl[at]
        );
        assert!((found.cosine[at] - expected.cosine).abs() < 1e-5);
    }
}

#[test]
fn a_rival_that_is_fed_the_samples_inputs_is_compared_on_them() {
    let cfg = reference();
    let mut variant = reference();
    variant.consensus = ConsensusSpec::of(Method::Arith);
    variant.controller.gate = Gate::AlwaysExplicit;
    variant.k = 2;
    variant.noise = NoiseSpec::Gumbel { tau: 2.0 };
    for index in [1, 2] {
        let mut backend = Recorder::new(hashed(2));
        let run = compared(
            &mut backend,
            [&cfg, &variant],
            Follow::Inputs,
            vec![job(index, 2)],
        );
        let found = divergences(run.one());
        let lanes = lanes_of(&backend, 0, index);
        assert_eq!(lanes, lanes_of(&backend, 1, index), "one history");
        let mine = replayed(&lanes, &cfg.consensus, 1);
        let its = replayed(&lanes, &variant.consensus, 1);
        let pairs: Vec<_> = mine.iter().zip(&its).map(|(a, b)| (&a.0, &b.0)).collect();
        assert_near(found, &pairs);
        assert!(found.kl.iter().all(|&kl| kl > 1e-4), "{:?}", found.kl);
    }
}

#[test]
fn inputs_follow_injections_and_cut_stretches() {
    let mut cfg = reference();
    cfg.controller.gate = Gate::AlwaysLatent;
    cfg.answer_cue = Some("so".into());
    cfg.controls.drop_latent = true;
    let mut variant = cfg.clone();
    variant.consensus = ConsensusSpec::of(Method::Arith);
    let mut backend = Recorder::new(hashed(2));
    let run = compared(
        &mut backend,
        [&cfg, &variant],
        Follow::Inputs,
        vec![job(1, 2)],
    );
    let o = run.one();
    assert_eq!(o.injected_tokens, 2);
    assert_eq!(lanes_of(&backend, 0, 1), lanes_of(&backend, 1, 1));
    assert_eq!(
        backend.of(0, 0).len(),
        prompt(1, 0).len() + o.tokens.len() - usize::from(o.stop == Stop::Budget)
    );
    assert_eq!(divergences(o).step, all_steps(o));
}

#[test]
fn a_free_rival_takes_its_own_way_until_either_ends() {
    let cfg = reference();
    for (steps, gate) in [(24, Gate::Threshold), (7, Gate::AlwaysExplicit)] {
        let mut variant = reference();
        variant.max_steps = steps;
        variant.answer_reserve = 0;
        variant.controller.gate = gate;
        variant.noise = NoiseSpec::Gumbel { tau: 2.0 };
        let mut parted = 0;
        for index in 0..4 {
            let mut backend = Recorder::new(hashed(2));
            let jobs = || vec![job(index, 2)];
            let run = compared(&mut backend, [&cfg, &variant], Follow::Free, jobs());
            let found = divergences(run.one());
            let mut lone = Recorder::new(hashed(1));
            let other = go(&mut lone, &variant, jobs());
            let shorter = all_steps(run.one()).len().min(all_steps(other.one()).len());
            assert_eq!(found.step, (0..shorter as u32).collect::<Vec<_>>());
            let of_ref = lanes_of(&backend, 0, index);
            let of_variant = lanes_of(&lone, 0, index);
            for ((_, held), (_, whole)) in lanes_of(&backend, 1, index).iter().zip(of_variant) {
                assert_eq!(*held, &whole[..held.len()], "as by itself");
            }
            let mine = replayed(&of_ref, &cfg.consensus, 1);
            let its = replayed(&of_variant, &variant.consensus, 1);
            let pairs: Vec<_> = mine
                .iter()
                .zip(&its)
                .take(shorter)
                .map(|(a, b)| (&a.0, &b.0))
                .collect();
            assert_near(found, &pairs);
            assert_eq!(found.kl[0], 0.0, "the same prompt");
            parted += usize::from(found.kl.iter().any(|&kl| kl > 0.01));
        }
        assert!(parted > 1, "{parted} of 4 took another way");
    }
}

#[test]
fn a_free_rival_keeps_what_the_sample_forgets() {
    let cfg = {
        let mut cfg = reference();
        cfg.controller.gate = Gate::AlwaysLatent;
        cfg
    };
    let mut cutting = cfg.clone();
    cutting.controls.drop_latent = true;
    let mut backend = Recorder::new(hashed(2));
    compared(
        &mut backend,
        [&cutting, &cfg],
        Follow::Free,
        vec![job(1, 2)],
    );
    let mut lone = Recorder::new(hashed(1));
    go(&mut lone, &cfg, vec![job(1, 2)]);
    for agent in 0..2 {
        let (held, whole) = (backend.of(1, agent), lone.of(0, agent));
        assert!(held.len() > prompt(1, agent).len() + 12);
        assert_eq!(held, &whole[..held.len()]);
    }
}

/// The stream of a sample's step, with the seed of [`job`].
fn stream(index: u32, step: u32) -> Stream {
    Stream {
        seed: 0,
        sample: sample_key(&format!("item-{index}"), 0, 0),
        step: u64::from(step),
    }
}

#[test]
fn a_rival_of_one_step_has_the_samples_history_and_its_own_last_message() {
    let cfg = reference();
    let spec = NoiseSpec::Gumbel { tau: 1.0 };
    let mut variant = reference();
    variant.noise = spec;
    for index in 0..5 {
        let mut backend = Recorder::new(hashed(2));
        let run = compared(
            &mut backend,
            [&cfg, &variant],
            Follow::OneStep,
            vec![job(index, 2)],
        );
        let o = run.one();
        let found = divergences(o);
        assert_eq!(found.step, after_latent(o));
        assert!(!found.step.is_empty());
        assert!(found.kl.iter().all(|&kl| kl > 0.0), "{:?}", found.kl);
        // The message of a latent step is the same readout by the rival's rules.
        let messages: Vec<Fed> = found
            .step
            .iter()
            .map(|&step| {
                let event = &run.events[step as usize - 1];
                let mixed = noise::mix(
                    &FilterSpec::NONE,
                    &spec,
                    &event.read.ids,
                    &event.read.probs,
                    &stream(index, step - 1),
                )
                .unwrap();
                Fed::Packet(
                    BeliefPacket::new(mixed.ids, mixed.probs, event.read.mass, VOCAB).unwrap(),
                )
            })
            .collect();
        for agent in 0..2 {
            let length = prompt(index, agent).len();
            let (mine, its) = (backend.of(0, agent), backend.of(1, agent));
            let last = *found.step.last().unwrap() as usize;
            // Inputs before the last comparison, as the prompt was read at step 0.
            let history = [&mine[..length + last - 1], &messages[messages.len() - 1..]].concat();
            assert_eq!(its, history);
        }
        // Every comparison, made by hand.
        let lanes = lanes_of(&backend, 0, index);
        let mine = replayed(&lanes, &cfg.consensus, 1);
        let its: Vec<Vec<f32>> = found
            .step
            .iter()
            .zip(&messages)
            .map(|(&step, message)| {
                let branch: Vec<(usize, Vec<Fed>)> = lanes
                    .iter()
                    .map(|&(length, held)| {
                        let mut held = held[..length + step as usize].to_vec();
                        *held.last_mut().unwrap() = message.clone();
                        (length, held)
                    })
                    .collect();
                let branch: Vec<_> = branch.iter().map(|(l, h)| (*l, h.as_slice())).collect();
                replayed(&branch, &cfg.consensus, 1).pop().unwrap().0
            })
            .collect();
        let pairs: Vec<_> = found
            .step
            .iter()
            .zip(&its)
            .map(|(&step, its)| (&mine[step as usize].0, its))
            .collect();
        assert_near(found, &pairs);
    }
}

#[test]
fn a_rival_of_one_step_sends_as_many_entries_as_it_says() {
    let cfg = reference();
    for k in [1_i64, 2, 5, 9, -1] {
        let mut variant = reference();
        variant.k = k;
        let mut dense = variant.clone();
        dense.link.message = LinkMessage::Logits;
        let mut backend = Recorder::new(hashed(2));
        let run = compared(
            &mut backend,
            [&cfg, &variant],
            Follow::OneStep,
            vec![job(1, 2)],
        );
        let o = run.one();
        let found = divergences(o).clone();
        let entries = u32::try_from(k).unwrap_or(VOCAB);
        let last = *found.step.last().unwrap() as usize;
        let lanes = lanes_of(&backend, 0, 1);
        let read = replayed(&lanes, &cfg.consensus, entries);
        let expected = &read[last - 1].1;
        let Some(Fed::Packet(sent)) = backend.of(1, 0).last() else {
            panic!("{:?}", backend.of(1, 0).last())
        };
        assert_eq!((sent.k() as u32, sent.ids()), (entries, expected.ids()));
        for (a, b) in sent.probs().iter().zip(expected.probs()) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
        assert!((sent.mass() - expected.mass()).abs() < 1e-6);
        if k == 5 {
            assert!(found.kl.iter().all(|&kl| kl == 0.0));
        } else {
            assert!(found.kl.iter().all(|&kl| kl > 0.0), "{k}: {found:?}");
        }

        if k == -1 {
            // Without ids the whole vocabulary says the same.
            let mut backend = Recorder::new(hashed(2));
            let run = compared(
                &mut backend,
                [&cfg, &dense],
                Follow::OneStep,
                vec![job(1, 2)],
            );
            let Some(Fed::Dense(probs)) = backend.of(1, 0).last() else {
                panic!("no distribution was fed")
            };
            assert!(probs.iter().all(|&p| p > 0.0));
            assert_eq!(divergences(run.one()).step, found.step);
            for (a, b) in divergences(run.one()).kl.iter().zip(&found.kl) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
        }
    }
}

#[test]
fn a_rival_of_one_step_may_send_another_kind_of_message() {
    let cfg = {
        let mut cfg = reference();
        cfg.controller.gate = Gate::AlwaysLatent;
        cfg
    };
    for (message, align) in [
        (LinkMessage::Embed, Align::Ridge),
        (LinkMessage::Hidden, Align::Ridge),
        (LinkMessage::Hidden, Align::Identity),
    ] {
        let mut variant = cfg.clone();
        variant.link = LinkSpec {
            message,
            align,
            ..LinkSpec::default()
        };
        let mut backend = Recorder::new(MockBackend::hashed(1, VOCAB, 2, ROOM));
        let run = compared(
            &mut backend,
            [&cfg, &variant],
            Follow::OneStep,
            vec![job(1, 1)],
        );
        let o = run.one();
        assert_eq!(divergences(o).step, after_latent(o));
        assert!(divergences(o).kl.iter().all(|&kl| kl > 0.0));
        let plain = go(
            &mut MockBackend::hashed(1, VOCAB, 1, ROOM),
            &cfg,
            vec![job(1, 1)],
        );
        assert_eq!(alone(o), timeless(plain.one()));
        let Some(Fed::Embed(fed)) = backend.of(1, 0).last() else {
            panic!("no vector was fed")
        };
        if message == LinkMessage::Hidden {
            // The sample's own state, in the rival's alignment.
            let (lane, how, state) = backend.hidden.last().unwrap();
            assert_eq!((*lane, *how, state), (common::lane(0, 0), align, fed));
        }
    }
}

#[test]
fn comparisons_of_one_step_go_along_a_chain_and_those_of_inputs_end_at_the_handoff() {
    for handoff in [Handoff::Transcript, Handoff::Kv] {
        let cfg = pair(handoff);
        let mut variant = cfg.clone();
        variant.noise = NoiseSpec::Gumbel { tau: 1.0 };
        let run = |variant: &LoopConfig, follow| {
            let mut mock = one_model(hashed(2));
            compared(&mut mock, [&cfg, variant], follow, vec![job(1, 2)])
        };
        let plain = go(&mut one_model(hashed(1)), &cfg, vec![job(1, 2)]);
        for follow in MODES {
            for other in [&cfg, &variant] {
                let run = run(other, follow);
                let o = run.one();
                assert_eq!(alone(o), timeless(plain.one()));
                let found = divergences(o);
                let steps = match follow {
                    // Three messages of each agent.
                    Follow::OneStep => vec![1, 2, 3, 5, 6, 7],
                    Follow::Inputs => (0..=o.handoff_log[0].step).collect(),
                    Follow::Free => all_steps(o),
                };
                let shorter = found.step.len().min(steps.len());
                if other == &cfg || follow != Follow::Free {
                    assert_eq!(found.step, steps);
                } else {
                    assert_eq!(found.step[..shorter], steps[..shorter]);
                }
                // Noise reaches nothing that is fed the sample's inputs.
                let same = other == &cfg || follow == Follow::Inputs;
                assert_eq!(found.kl.iter().all(|&kl| kl == 0.0), same, "{follow:?}");
                assert_eq!(run.handoffs.len(), 1, "the rival's handoffs are its own");
            }
        }
    }
}

#[test]
fn free_rows_wait_for_each_other_where_one_takes_more_calls() {
    // A handoff takes two calls with a transcript, its prompt and its packets, and one without.
    let cfg = pair(Handoff::Transcript);
    let mut bare = cfg.clone();
    bare.controls.handoff = HandoffControl::None;
    for index in 0..4 {
        let run = |configs| compared(&mut hashed(2), configs, Follow::Free, vec![job(index, 2)]);
        let (there, back) = (run([&cfg, &bare]), run([&bare, &cfg]));
        let (a, b) = (divergences(there.one()), divergences(back.one()));
        let shorter = all_steps(there.one())
            .len()
            .min(all_steps(back.one()).len());
        let steps: Vec<u32> = (0..shorter as u32).collect();
        assert_eq!((&a.step, &b.step), (&steps, &steps));
        // Steps of equal number meet, whoever leads.
        assert_eq!(a.cosine, b.cosine);
        // Up to the handoff both are the same, and then they are not.
        assert!(a.kl[..=3].iter().all(|&kl| kl == 0.0));
        assert!(a.kl[4] > 0.0);
    }
}

#[test]
fn a_comparison_takes_two_rows() {
    let cfg = reference();
    for (slots, rows) in [(1, None), (4, Some(1))] {
        let mut sink = Collect::default();
        let mut jobs = against(Follow::Free, jobs(1, 2)).into_iter();
        let options = RunOptions {
            rows,
            ..RunOptions::default()
        };
        let error = run_all(
            &mut hashed(slots),
            &[cfg.clone(), cfg.clone()],
            &options,
            Hooks::default(),
            &mut jobs,
            &mut sink,
        )
        .unwrap_err();
        assert!(matches!(error, RunError::OneRow { .. }));
        insta::allow_duplicates! {
            insta::assert_snapshot!(error, @"item item-0: a comparison needs 2 rows of the batch, there is 1");
        }
    }
}

#[test]
fn pairs_wait_for_two_rows_and_share_the_batch_with_others() {
    let cfg = reference();
    let mut variant = reference();
    variant.noise = NoiseSpec::Gumbel { tau: 1.0 };
    let mixed = || -> Vec<Job> {
        jobs(11, 2)
            .into_iter()
            .zip([None, Some(0), Some(1), None, Some(2)].into_iter().cycle())
            .map(|(job, mode)| Job {
                rival: mode.map(|m: usize| Rival {
                    config: 1,
                    follow: MODES[m],
                }),
                ..job
            })
            .collect()
    };
    let run = |slots| {
        run_into(
            Collect::default(),
            &mut hashed(slots),
            &[cfg.clone(), variant.clone()],
            Hooks::default(),
            mixed(),
        )
        .unwrap()
    };
    let two = timeless_all(&run(2).outcomes);
    assert_eq!(two.len(), 11);
    assert_eq!(two, timeless_all(&run(3).outcomes));
    assert_eq!(two, timeless_all(&run(8).outcomes));
    let rivals = two.iter().filter(|o| o.divergences.is_some()).count();
    assert_eq!(rivals, 6, "without a rival there is nothing to report");
}

/// A sample goes on as if it had never had a rival, and reports the comparisons made until then.
fn assert_goes_on_alone(
    run: &Collect,
    plain: &Collect,
    follow: Follow,
    met: std::ops::RangeInclusive<usize>,
) {
    assert_eq!(alone(run.one()), timeless(plain.one()), "{follow:?}");
    let found = divergences(run.one());
    assert!(met.contains(&found.step.len()), "{follow:?} {found:?}");
}

#[test]
fn a_rival_that_fails_leaves_the_sample_alone() {
    let mut cfg = reference();
    cfg.controller.gate = Gate::AlwaysLatent;
    let plain = go(&mut hashed(1), &cfg, vec![job(1, 2)]);
    let script = |poisoned: bool| {
        move |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
            for (v, z) in out.iter_mut().enumerate() {
                *z = ((v * 7 + positions.len() * 3 + lane.agent.index()) % 11) as f32 * 0.3;
            }
            if poisoned && lane.slot == SlotId(1) && positions.len() > 8 {
                out[3] = f32::NAN;
            }
        }
    };
    let make = |poisoned| MockBackend::scripted(2, VOCAB, 2, ROOM, Box::new(script(poisoned)));
    let scripted = go(&mut make(false), &cfg, vec![job(1, 2)]);
    for follow in MODES {
        // NaN in its own rows.
        let run = compared(&mut make(true), [&cfg, &cfg], follow, vec![job(1, 2)]);
        assert_goes_on_alone(&run, &scripted, follow, 2..=6);
        // A call with it fails.
        let mut backend = Recorder::new(hashed(2));
        backend.bad = Some((SlotId(1), 4));
        let run = compared(&mut backend, [&cfg, &cfg], follow, vec![job(1, 2)]);
        assert_goes_on_alone(&run, &plain, follow, 3..=4);
        // Its lanes cannot be opened.
        let mut backend = Recorder::new(hashed(2));
        backend.shut = Some((SlotId(1), 0));
        let run = compared(&mut backend, [&cfg, &cfg], follow, vec![job(1, 2)]);
        assert_goes_on_alone(&run, &plain, follow, 0..=0);
        // There is no other item to take its packets from.
        let mut variant = cfg.clone();
        variant.controls = Controls {
            packet: PacketControl::Other,
            ..Controls::default()
        };
        let itself = Donor {
            item_id: "item-1".into(),
            packets: packets_of(plain.one()),
        };
        let hooks = Hooks {
            donors: Donors::new(vec![itself]),
            ..Hooks::default()
        };
        let run = with_hooks(
            &mut hashed(2),
            [&cfg, &variant],
            follow,
            vec![job(1, 2)],
            hooks,
        );
        // The inputs of another are no packets of its own.
        let met = match follow {
            Follow::Free => 1..=1,
            Follow::Inputs => 20..=25,
            Follow::OneStep => 0..=0,
        };
        assert_goes_on_alone(&run, &plain, follow, met);
    }
}

#[test]
fn a_rival_that_cannot_follow_to_the_next_agent_is_left_behind() {
    let cfg = pair(Handoff::Transcript);
    let plain = go(&mut hashed(1), &cfg, vec![job(1, 2)]);
    let mut backend = Recorder::new(hashed(2));
    backend.shut = Some((SlotId(1), 1));
    let run = compared(&mut backend, [&cfg, &cfg], Follow::OneStep, vec![job(1, 2)]);
    assert_goes_on_alone(&run, &plain, Follow::OneStep, 3..=3);
}

#[test]
fn a_rival_that_is_fed_the_samples_history_has_room_for_it() {
    let cfg = reference();
    let mut brief = reference();
    brief.max_steps = 2;
    brief.answer_reserve = 0;
    for follow in [Follow::Inputs, Follow::OneStep] {
        let run = compared(&mut hashed(2), [&cfg, &brief], follow, jobs(3, 2));
        for o in &run.outcomes {
            let steps = match follow {
                Follow::OneStep => after_latent(o),
                _ => all_steps(o),
            };
            assert!(steps.len() > 4);
            assert_eq!(divergences(o).step, steps, "{follow:?}");
        }
    }
}

#[test]
fn configurations_and_rivals_have_to_be_there() {
    let cfg = reference();
    for (config, rival) in [(1, None), (0, Some(1))] {
        let mut one = job(0, 2);
        one.config = config;
        one.rival = rival.map(|config| Rival {
            config,
            follow: Follow::Free,
        });
        let error = run_into(
            Collect::default(),
            &mut hashed(2),
            std::slice::from_ref(&cfg),
            Hooks::default(),
            vec![one],
        )
        .err()
        .expect("refused");
        let RunError::UnknownConfig {
            config, configs, ..
        } = error
        else {
            panic!("{error}")
        };
        assert_eq!((config, configs), (1, 1));
    }
}

#[test]
fn configurations_that_share_a_session_give_what_each_gives_by_itself() {
    let mut noisy = reference();
    noisy.noise = NoiseSpec::Gumbel { tau: 1.0 };
    noisy.sampling = SAMPLED;
    let mut embed = reference();
    embed.link.message = LinkMessage::Embed;
    let mut packet = reference();
    packet.link.support = dlmom_runtime::Support::Packet;
    let mut back = pair(Handoff::Transcript);
    chain_of(&mut back).max_handoffs = Some(3);
    chain_of(&mut back).on_failure = Some(0);
    let configs = [
        reference(),
        noisy,
        embed,
        packet,
        back,
        pair(Handoff::Text),
        pair(Handoff::Kv),
    ];
    let judging = || Collect::judging(|text| text.len() % 2 == 0);
    let numbered: Vec<Job> = (0..configs.len() as u32)
        .flat_map(|config| {
            jobs(5, 2).into_iter().map(move |mut job| {
                job.config = config;
                job.key.sample = config;
                job
            })
        })
        .collect();
    // Neighbours in the batch run different configurations.
    let mut shuffled = numbered.clone();
    shuffled.sort_by_key(|job| (job.key.item_id.clone(), job.config));
    let mut mock = one_model(hashed(4));
    let together = run_into(judging(), &mut mock, &configs, Hooks::default(), shuffled).unwrap();
    assert_eq!(together.outcomes.len(), 35);
    for (place, config) in configs.iter().enumerate() {
        let own: Vec<Job> = numbered
            .iter()
            .filter(|job| job.config == place as u32)
            .map(|job| Job {
                config: 0,
                ..job.clone()
            })
            .collect();
        let mut mock = one_model(hashed(2));
        let single = run_into(
            judging(),
            &mut mock,
            std::slice::from_ref(config),
            Hooks::default(),
            own,
        )
        .unwrap();
        let of_place: Vec<Outcome> = together
            .outcomes
            .iter()
            .filter(|o| o.key.sample == place as u32)
            .map(|o| Outcome {
                config: 0,
                ..timeless(o)
            })
            .collect();
        assert!(
            together.outcomes.iter().all(|o| o.config == o.key.sample),
            "{config:?}"
        );
        assert_eq!(of_place, timeless_all(&single.outcomes), "{config:?}");
    }
}
