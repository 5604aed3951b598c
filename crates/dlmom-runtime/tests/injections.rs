//! What the loop feeds or forbids besides the models' own choices: texts, locks, signals, filters, ranks, penalties.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    Event, Fed, ROOM, Recorder, VOCAB, chain_of, config, fed_packets, fed_tokens, go, job, jobs,
    lane, pair, prompt, refused, sequential, sure, with_chain,
};
use dlmom_core::{
    AlphaUnit, FilterSpec, Gate, Mode, NoiseSpec, Ranks, Reason, SamplingSpec, Schedule, Stream,
    TriggerSpec, noise, sample_key,
};
use dlmom_packet::{BeliefPacket, Encoding, encoded_len};
use dlmom_runtime::{
    AgentId, ConfigError, Handoff, Hooks, Job, LaneId, LoopConfig, MockBackend, Outcome,
    PromptSource, RunError, Signal, Stop, Trigger,
};
use proptest::prelude::*;

/// Modes that alternate as `runs` say, explicit first, whatever the entropies.
fn scheduled(cfg: &mut LoopConfig, runs: Vec<u32>) -> Job {
    cfg.controls.same_exits = true;
    Job {
        schedule: Some(Schedule::from(runs)),
        ..job(1, 2)
    }
}

/// Two agents that never choose an end token by themselves.
fn endless() -> Recorder {
    let mut backend = Recorder::hashed(2);
    for model in &mut backend.inner.info_mut().models {
        model.eos.clear();
    }
    backend
}

/// The mock's tokens of a text.
fn tokens(text: &str) -> Vec<u32> {
    text.bytes()
        .map(|b| 1 + u32::from(b) % (VOCAB - 1))
        .collect()
}

fn triggers(converge_after: u32, terminate_after: u32) -> TriggerSpec {
    TriggerSpec {
        converge_after,
        converge_text: "</think>".into(),
        terminate_after,
        terminate_text: "the answer is".into(),
        terminate_steps: 3,
    }
}

#[test]
fn exits_inject_texts_by_their_count_and_the_last_leaves_few_tokens() {
    for (after, injected) in [
        ((1, 1), vec!["</think>", "the answer is"]),
        (
            (1, 3),
            vec!["</think>", "</think>", "</think>", "the answer is"],
        ),
        ((2, 2), vec!["", "</think>", "the answer is"]),
    ] {
        let mut cfg = config(Gate::AlwaysExplicit, 0.5);
        cfg.triggers = Some(triggers(after.0, after.1));
        let one = scheduled(&mut cfg, vec![0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]);
        let mut backend = endless();
        let run = go(&mut backend, &cfg, vec![one]);
        let o = run.one();
        let mut packets = o.packets.iter().map(|(_, p)| p);
        let mut expected = Vec::new();
        let mut text = Vec::new();
        let mut printed = run.events.iter().filter_map(|e| e.token);
        for given in &injected {
            expected.extend(fed_packets(packets.next()));
            // An exit that injects nothing prints a token.
            let ids = if given.is_empty() {
                vec![printed.next().unwrap()]
            } else {
                tokens(given)
            };
            expected.extend(fed_tokens(&ids));
            text.extend(ids);
        }
        let last: Vec<u32> = printed.collect();
        assert_eq!(last.len(), 3, "the budget after the last text");
        // The very last token is not forwarded any more.
        expected.extend(fed_tokens(&last[..2]));
        text.extend(&last);
        for agent in 0..2 {
            let whole = [fed_tokens(&prompt(1, agent)), expected.clone()].concat();
            assert_eq!(backend.last(agent), whole);
        }
        assert_eq!((o.stop, &o.tokens), (Stop::Budget, &text));
        let letters: usize = injected.iter().map(|t| t.len()).sum();
        assert_eq!(o.injected_tokens as usize, letters);
        let bare = injected.iter().filter(|t| t.is_empty()).count();
        assert_eq!(o.explicit_tokens as usize, 3 + bare);
        assert_eq!(o.latent_steps as usize, injected.len());
        let trace = o.trace.as_ref().unwrap();
        let reasons = &trace.reason[trace.reason.len() - 3..];
        assert_eq!(reasons, [Reason::Terminated; 3]);
        // Nothing is printed in the step of an exit that injects, and nothing is sent.
        let exits = run.events.iter().zip(&trace.injected);
        let mut said = Vec::new();
        for (event, &count) in exits {
            assert_eq!(event.injected.len() as u32, count);
            if count > 0 {
                assert_eq!((event.is_latent(), event.token), (false, None));
                assert_eq!(event.bytes.1, 0);
                said.push(event.injected.clone());
            }
        }
        let texts = injected.iter().filter(|t| !t.is_empty());
        assert_eq!(said, texts.map(|t| tokens(t)).collect::<Vec<_>>());
    }
}

#[test]
fn injected_texts_have_room_in_the_lane() {
    let mut cfg = config(Gate::AlwaysExplicit, 0.5);
    cfg.max_steps = 8;
    cfg.answer_reserve = 0;
    cfg.triggers = Some(TriggerSpec {
        converge_text: "c".repeat(20),
        terminate_text: "t".repeat(20),
        ..triggers(1, 2)
    });
    let one = scheduled(&mut cfg, vec![0, 1, 1, 1, 1, 1, 1]);
    let o = go(&mut endless(), &cfg, vec![one]).one().clone();
    assert_eq!((o.stop, o.injected_tokens), (Stop::Budget, 60));
    assert_eq!((o.latent_steps, o.explicit_tokens), (3, 3));
}

#[test]
fn triggers_that_cannot_be_used_are_refused() {
    let mut cfg = config(Gate::Threshold, 0.5);
    cfg.triggers = Some(triggers(3, 2));
    let error = refused(&mut endless(), &cfg, Hooks::default());
    assert!(matches!(error, RunError::Config(ConfigError::Spec(_))));
}

#[test]
fn an_agent_that_takes_over_counts_its_own_exits() {
    let mut cfg = with_chain(
        config(Gate::Threshold, 0.5),
        sequential(&["planner", "solver"], Handoff::Text),
    );
    cfg.triggers = Some(TriggerSpec {
        terminate_steps: 2,
        ..triggers(1, 1)
    });
    cfg.controller.max_latent_steps = 20;
    // The planner doubts at every other token, the solver never.
    let script = |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        sure(5, out);
        if lane.agent == AgentId(0) && positions.last().is_some_and(|p| p.len() == 1) {
            out[5] = 0.5;
        }
    };
    let mock = MockBackend::scripted(2, VOCAB, 1, ROOM, Box::new(script));
    let run = go(&mut Recorder::new(mock), &cfg, vec![job(0, 2)]);
    let o = run.one();
    let record = &o.handoff_log[0];
    assert_eq!((o.handoffs, record.trigger), (1, Trigger::StepBudget));
    // Two latent steps, one text and the other, two letters; then the solver has all that is left.
    assert_eq!((o.latent_steps, o.injected_tokens), (2, 8 + 13));
    assert_eq!(
        (o.stop, o.total_steps(), o.tokens.len()),
        (Stop::Budget, 24, 20)
    );
    let reasons = &o.trace.as_ref().unwrap().reason;
    let forced = reasons.iter().filter(|r| **r == Reason::Terminated).count();
    assert_eq!(forced, 2);
}

#[test]
fn the_answer_cue_is_the_answering_agents() {
    let mut cfg = pair(Handoff::Transcript);
    cfg.answer_cue = Some("so".into());
    let mut backend = endless();
    let run = go(&mut backend, &cfg, vec![job(1, 2)]);
    let o = run.one();
    assert_eq!((o.handoffs, o.injected_tokens), (1, 2));
    assert_eq!(backend.last(0).len(), prompt(1, 0).len() + 3);
    let at = prompt(1, 1).len() + 6;
    assert_eq!(backend.last(1)[at..at + 2], fed_tokens(&tokens("so")));
}

/// Unsure of everything, one token slightly ahead.
fn unsure(token: usize, out: &mut [f32]) {
    out.fill(0.0);
    out[token] = 0.5;
}

/// "x" is the mock's token 11.
const LOCK: u32 = 11;

#[test]
fn a_printed_lock_makes_the_mode_explicit_for_good() {
    // The prompt has 3 tokens: a letter, the lock, and then doubts.
    let script = |_: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| match positions.len() {
        3 => sure(5, out),
        4 => sure(LOCK as usize, out),
        _ => unsure(6, out),
    };
    let run = |lock: Option<&str>| {
        let mut cfg = config(Gate::Threshold, 0.5);
        cfg.lock_text = lock.map(str::to_owned);
        let mut mock = MockBackend::scripted(1, VOCAB, 1, ROOM, Box::new(script));
        go(&mut mock, &cfg, vec![job(0, 1)]).one().clone()
    };
    assert_eq!(tokens("x"), [LOCK]);
    let locked = run(Some("x"));
    let trace = locked.trace.as_ref().unwrap();
    assert_eq!((locked.latent_steps, locked.explicit_tokens), (0, 24));
    assert_eq!(trace.reason[0], Reason::BelowAlpha);
    assert!(trace.reason[1..].iter().all(|r| *r == Reason::Locked));
    assert_eq!(locked.tokens[..3], [5, LOCK, 6]);
    assert!(run(None).latent_steps > 0);
    assert!(run(Some("y")).latent_steps > 0, "another token is no lock");
}

#[test]
fn a_lock_that_leads_in_latent_mode_is_one_whatever_is_drawn() {
    let script = |_: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        unsure(if positions.len() == 5 { LOCK } else { 6 } as usize, out);
    };
    let mut other = 0;
    for seed in 0..4 {
        for sampling in [
            SamplingSpec::GREEDY,
            SamplingSpec {
                temperature: 1.0,
                ..SamplingSpec::GREEDY
            },
        ] {
            let mut cfg = config(Gate::AlwaysLatent, 0.5);
            cfg.lock_text = Some("x".into());
            cfg.sampling = sampling;
            let mut mock = MockBackend::scripted(1, VOCAB, 1, ROOM, Box::new(script));
            mock.info_mut().models[0].eos.clear();
            let mut one = job(0, 1);
            one.key.seed = seed;
            let o = go(&mut mock, &cfg, vec![one]).one().clone();
            let trace = o.trace.as_ref().unwrap();
            assert_eq!((o.latent_steps, o.switches), (2, 1), "{:?}", trace.reason);
            assert!(trace.reason[2..].iter().all(|r| *r == Reason::Locked));
            other += usize::from(o.tokens[0] != LOCK);
        }
    }
    assert!(other > 0, "another token was drawn");
}

#[test]
fn a_lock_holds_for_a_visit() {
    let mut cfg = with_chain(
        config(Gate::Threshold, 0.5),
        sequential(&["planner", "solver"], Handoff::Text),
    );
    cfg.lock_text = Some("x".into());
    let script = |lane: LaneId, positions: &[Vec<(u32, f32)>], out: &mut [f32]| {
        if lane.agent == AgentId(0) && positions.len() == 3 {
            sure(LOCK as usize, out);
        } else {
            unsure(6, out);
        }
    };
    let mut mock = MockBackend::scripted(2, VOCAB, 1, ROOM, Box::new(script));
    let o = go(&mut mock, &cfg, vec![job(0, 2)]).one().clone();
    let trace = o.trace.as_ref().unwrap();
    assert!(trace.mode[..12].iter().all(|m| *m == Mode::Explicit));
    assert_eq!(trace.mode[12], Mode::Latent);
}

fn signal(weight: f64) -> Signal {
    Signal {
        text: "x".into(),
        weight,
    }
}

/// `(1 - w) p + w [token]`.
fn mixed(packet: &BeliefPacket, token: u32, weight: f64) -> BeliefPacket {
    let mut entries: Vec<(u32, f64)> = packet
        .iter()
        .map(|(id, p)| (id, f64::from(p) * (1.0 - weight)))
        .collect();
    match entries.iter_mut().find(|(id, _)| *id == token) {
        Some((_, p)) => *p += weight,
        None => entries.push((token, weight)),
    }
    let (ids, probs) = entries.into_iter().map(|(id, p)| (id, p as f32)).unzip();
    BeliefPacket::new(ids, probs, packet.mass(), VOCAB).unwrap()
}

fn assert_close(a: &BeliefPacket, b: &BeliefPacket) {
    assert_eq!((a.ids(), a.mass()), (b.ids(), b.mass()));
    for (x, y) in a.probs().iter().zip(b.probs()) {
        assert!((x - y).abs() < 1e-7, "{x} {y}");
    }
}

#[test]
fn signals_are_mixed_into_the_inputs_at_switches() {
    let mut named = 0;
    for (weight, index) in (0..6).flat_map(|i| [(0.0, i), (0.3, i), (1.0, i)]) {
        let mut cfg = config(Gate::AlwaysExplicit, 0.5);
        cfg.enter_signal = Some(signal(weight));
        cfg.exit_signal = Some(signal(weight / 2.0));
        let mut one = scheduled(&mut cfg, vec![0, 2, 2, 2, 18]);
        one.prompts = job(index, 2).prompts;
        let mut backend = endless();
        let run = go(&mut backend, &cfg, vec![one]);
        let of = |step: usize| -> &Event { &run.events[step] };
        for agent in 0..2 {
            let held = &backend.last(agent)[prompt(index, agent).len()..];
            let packet = |at: usize| match &held[at] {
                Fed::Packet(packet) => packet.clone(),
                other => panic!("{other:?}"),
            };
            // The sample begins latent: no switch, no signal.
            assert_eq!(packet(0), of(0).raw());
            assert_eq!(packet(1), of(1).raw());
            // Left at 2, and what is printed there is what would be.
            assert_close(&packet(2), &mixed(&of(2).raw(), LOCK, weight / 2.0));
            assert_eq!(of(2).token, Some(of(2).read.ids[0]));
            assert_eq!(held[3], Fed::Token(of(3).token.unwrap()));
            // Entered at 4.
            assert_close(&packet(4), &mixed(&of(4).raw(), LOCK, weight));
            assert_eq!(of(4).packet.as_ref(), Some(&packet(4)));
            assert_eq!(packet(5), of(5).raw());
            assert_close(&packet(6), &mixed(&of(6).raw(), LOCK, weight / 2.0));
            assert_eq!(held[7], Fed::Token(of(7).token.unwrap()));
        }
        let o = run.one();
        assert_eq!(o.tokens.len() as u32, o.explicit_tokens);
        // A signal is not noise.
        assert_eq!(o.noise_kl, Some(0.0));
        for step in [2, 4] {
            let within = of(step).read.ids.contains(&LOCK);
            named += usize::from(within);
            let entries = if within { 5 } else { 6 };
            let bytes = 2 * encoded_len(entries, Encoding::F32) as u64;
            assert_eq!(of(step).bytes.1, bytes);
        }
    }
    assert!(named > 0, "some packets name the signal already");
}

#[test]
fn signals_and_locks_are_one_token_in_every_vocabulary() {
    type Change = fn(&mut LoopConfig);
    let changes: [Change; 3] = [
        |cfg| cfg.lock_text = Some("xy".into()),
        |cfg| {
            cfg.enter_signal = Some(Signal {
                text: "xy".into(),
                weight: 0.5,
            });
        },
        |cfg| {
            cfg.exit_signal = Some(Signal {
                text: "xyz".into(),
                weight: 0.5,
            });
        },
    ];
    let lines: Vec<String> = changes
        .iter()
        .map(|change| {
            let mut cfg = config(Gate::Threshold, 0.5);
            change(&mut cfg);
            let error = refused(&mut endless(), &cfg, Hooks::default());
            assert!(matches!(error, RunError::NotOneToken { .. }));
            error.to_string()
        })
        .collect();
    insta::assert_snapshot!(lines.join("\n"), @r#"
    lock_text: "xy" is 2 tokens for mock-0; it must be one
    enter_signal.text: "xy" is 2 tokens for mock-0; it must be one
    exit_signal.text: "xyz" is 3 tokens for mock-0; it must be one
    "#);
    for weight in [-0.1, 1.1, f64::NAN] {
        for exit in [false, true] {
            let mut cfg = config(Gate::Threshold, 0.5);
            let field = if exit {
                cfg.exit_signal = Some(signal(weight));
                "exit_signal"
            } else {
                cfg.enter_signal = Some(signal(weight));
                "enter_signal"
            };
            let error = refused(&mut endless(), &cfg, Hooks::default());
            let RunError::Config(ConfigError::SignalWeight { signal, .. }) = error else {
                panic!("{error}")
            };
            assert_eq!(signal, field);
        }
    }
}

/// Normalised entropies of a few samples without any latent step.
fn pilot() -> Vec<f64> {
    let cfg = config(Gate::AlwaysExplicit, 0.5);
    go(
        &mut MockBackend::hashed(2, VOCAB, 4, ROOM),
        &cfg,
        jobs(8, 2),
    )
    .outcomes
    .iter()
    .flat_map(|o| o.trace.as_ref().unwrap().entropy.clone())
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_threshold_on_ranks_decides_as_one_on_the_quantile(q in 0.02_f64..0.98, count in 2_usize..40) {
        let ranks = Ranks::of(&pilot(), count).unwrap();
        let mut by_rank = config(Gate::Threshold, q);
        by_rank.controller.alpha_unit = AlphaUnit::Quantile;
        by_rank.ranks = Some(ranks.clone());
        let by_value = config(Gate::Threshold, ranks.value(q));
        let run = |cfg: &LoopConfig| {
            go(&mut MockBackend::hashed(2, VOCAB, 2, ROOM), cfg, jobs(4, 2)).outcomes
        };
        for (a, b) in run(&by_rank).iter().zip(&run(&by_value)) {
            let (x, y) = (a.trace.as_ref().unwrap(), b.trace.as_ref().unwrap());
            prop_assert_eq!(&x.mode, &y.mode);
            prop_assert_eq!(&x.reason, &y.reason);
            prop_assert_eq!(&a.text, &b.text);
            prop_assert_eq!(&x.entropy, &y.entropy);
            let seen: Vec<f64> = x.entropy.iter().map(|&h| ranks.rank(h)).collect();
            prop_assert_eq!(&x.observed, &seen, "the controller sees ranks");
            prop_assert_eq!(&y.observed, &y.entropy);
        }
    }
}

#[test]
fn quantiles_need_a_pilot_and_order_its_steps() {
    let mut cfg = config(Gate::Threshold, 0.5);
    cfg.controller.alpha_unit = AlphaUnit::Quantile;
    let error = refused(&mut endless(), &cfg, Hooks::default());
    assert!(matches!(error, RunError::Config(ConfigError::NoRanks)));
    cfg.ranks = Some(Ranks::of(&pilot(), 33).unwrap());
    cfg.controller.max_latent_steps = 24;
    let latent = |q: f64| -> u32 {
        let mut cfg = cfg.clone();
        cfg.controller.alpha = q;
        let run = go(
            &mut MockBackend::hashed(2, VOCAB, 1, ROOM),
            &cfg,
            jobs(8, 2),
        );
        run.outcomes.iter().map(|o| o.latent_steps).sum()
    };
    let found = [0.05, 0.8, 1.0].map(latent);
    assert!(found[0] > found[1] && found[1] > 0, "{found:?}");
    assert_eq!(found[2], 0, "nothing is above the largest");
}

#[test]
fn a_filter_narrows_what_is_fed_in_latent_steps() {
    for filter in [
        FilterSpec {
            keep: 2,
            ..FilterSpec::NONE
        },
        FilterSpec {
            top_p: 0.6,
            temperature: 0.8,
            ..FilterSpec::NONE
        },
        FilterSpec {
            min_p: 0.5,
            ..FilterSpec::NONE
        },
    ] {
        for spec in [NoiseSpec::None, NoiseSpec::Gumbel { tau: 1.0 }] {
            let mut cfg = config(Gate::AlwaysLatent, 0.5);
            cfg.filter = filter;
            cfg.noise = spec;
            let mut backend = endless();
            let run = go(&mut backend, &cfg, vec![job(1, 2)]);
            let held = &backend.last(0)[prompt(1, 0).len()..];
            let mut narrowed = 0;
            for (fed, event) in held.iter().zip(run.latent()) {
                let stream = Stream {
                    seed: 0,
                    sample: sample_key("item-1", 0, 0),
                    step: u64::from(event.step),
                };
                let read = &event.read;
                let mixed = noise::mix(&filter, &spec, &read.ids, &read.probs, &stream).unwrap();
                narrowed += usize::from(mixed.ids.len() < 5);
                assert_eq!((event.noise_kl, event.noise_js), (Some(mixed.kl), mixed.js));
                assert!(mixed.kl > 0.0);
                let expected = BeliefPacket::new(mixed.ids, mixed.probs, read.mass, VOCAB).unwrap();
                assert_eq!(*fed, Fed::Packet(expected));
            }
            assert!(narrowed > 3, "{filter:?}");
            // Printed tokens come from the whole distribution.
            let explicit = run.events.iter().filter(|e| !e.is_latent());
            for event in explicit {
                assert_eq!(event.token, Some(event.read.ids[0]));
            }
        }
    }
}

/// The same preferences at every step: 5, then 6, then 7.
fn fixed(_: LaneId, _: &[Vec<(u32, f32)>], out: &mut [f32]) {
    out.fill(-4.0);
    for (token, z) in [(5, 2.0), (6, 1.9), (7, 1.8)] {
        out[token] = z;
    }
}

fn penalised(cfg: &LoopConfig, agents: u32) -> Outcome {
    let mut mock = MockBackend::scripted(agents as usize, VOCAB, 1, ROOM, Box::new(fixed));
    let mut one = job(0, agents);
    // Notes are read as a prompt, which is not printed.
    one.prompts.fill(PromptSource::Tokens { ids: vec![5, 6] });
    go(&mut mock, cfg, vec![one]).one().clone()
}

#[test]
fn a_repetition_penalty_falls_on_what_the_agent_has_printed() {
    let mut cfg = config(Gate::AlwaysExplicit, 0.5);
    cfg.max_steps = 6;
    cfg.answer_reserve = 0;
    assert_eq!(penalised(&cfg, 1).tokens, [5; 6]);
    cfg.sampling.repetition_penalty = 1.5;
    // All three are penalised in the end, and the first leads again.
    assert_eq!(penalised(&cfg, 1).tokens, [5, 6, 7, 5, 5, 5]);

    // What is injected has been said as well.
    let mut injecting = cfg.clone();
    injecting.triggers = Some(TriggerSpec {
        // Bytes 26 and 27: tokens 5 and 6.
        converge_text: "\u{1a}\u{1b}".into(),
        ..triggers(1, 9)
    });
    let mut one = scheduled(&mut injecting, vec![0, 1, 5]);
    one.prompts.truncate(1);
    let mut mock = MockBackend::scripted(1, VOCAB, 1, ROOM, Box::new(fixed));
    let o = go(&mut mock, &injecting, vec![one]).one().clone();
    assert_eq!(o.tokens[..4], [5, 6, 7, 5]);

    // An agent that takes over has said nothing yet.
    let mut chain = with_chain(cfg, sequential(&["a", "b"], Handoff::Text));
    chain_of(&mut chain).roles[1].notes = "{notes}".into();
    let o = penalised(&chain, 2);
    let printed: Vec<u32> = o
        .trace
        .as_ref()
        .unwrap()
        .token
        .iter()
        .flatten()
        .copied()
        .collect();
    assert_eq!(printed, [5, 6, 7, 5, 6, 7]);
    assert_eq!(o.tokens, [5, 6, 7]);
}

#[test]
fn agents_of_a_row_have_their_lanes_to_themselves() {
    // The recorder tells slots and agents apart, which the tests above lean on.
    let mut backend = Recorder::new(MockBackend::hashed(2, VOCAB, 2, ROOM));
    go(&mut backend, &config(Gate::AlwaysLatent, 0.5), jobs(2, 2));
    for slot in 0..2 {
        for agent in 0..2 {
            let ids = prompt(slot, agent);
            assert_eq!(backend.of(slot, agent)[..ids.len()], fed_tokens(&ids));
            let held = backend.of(slot, agent).len() as u32;
            assert_eq!(backend.forwarded[&lane(slot, agent)], held);
        }
    }
}
