//! Long prompts are forwarded in parts, a few at a time, and no output depends on how many.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{
    Collect, Recorder, VOCAB, config, fed_tokens, job, lane, pair, run_into, timeless_all,
};
use dlmom_core::consensus::Views;
use dlmom_core::{Consensus, ConsensusSpec, Gate, Method, Weights};
use dlmom_runtime::{
    Follow, Handoff, Hooks, Job, LoopConfig, Message, MockBackend, PromptSource, Rival, RunOptions,
    RunStats, Share, Stop, run_shared,
};

const ROOM: u32 = 4096;

fn ids(length: u32, salt: u32) -> Vec<u32> {
    (0..length)
        .map(|i| 1 + (i * 7 + i / 11 + salt) % (VOCAB - 1))
        .collect()
}

/// A sample whose agents have prompts of these lengths.
fn long(index: u32, lengths: &[u32]) -> Job {
    Job {
        prompts: lengths
            .iter()
            .zip(0..)
            .map(|(&length, agent)| PromptSource::Tokens {
                ids: ids(length, index + agent),
            })
            .collect(),
        ..job(index, lengths.len() as u32)
    }
}

fn backend(agents: usize, slots: u32) -> Recorder {
    Recorder::new(MockBackend::hashed(agents, VOCAB, slots, ROOM))
}

fn go(backend: &mut Recorder, config: &LoopConfig, jobs: Vec<Job>) -> Collect {
    let configs = std::slice::from_ref(config);
    run_into(Collect::default(), backend, configs, Hooks::default(), jobs).unwrap()
}

/// Positions of a lane's feeds, call by call.
fn feeds(backend: &Recorder, slot: u32, agent: u32) -> Vec<usize> {
    let of = |call: &Vec<(_, usize)>| {
        let found = call.iter().find(|(l, _)| *l == lane(slot, agent));
        found.map_or(0, |(_, positions)| *positions)
    };
    backend.fed.iter().map(of).collect()
}

#[test]
fn a_prompt_is_cut_into_even_parts_of_at_most_512_tokens() {
    for (length, parts) in [
        (1, &[1][..]),
        (511, &[511]),
        (512, &[512]),
        (513, &[256, 257]),
        (1024, &[512, 512]),
        (1300, &[433, 433, 434]),
    ] {
        let mut mock = backend(1, 1);
        let run = go(
            &mut mock,
            &config(Gate::Threshold, 0.5),
            vec![long(0, &[length])],
        );
        let fed = feeds(&mock, 0, 0);
        assert_eq!(fed[..parts.len()], *parts);
        assert!(fed[parts.len()..].iter().all(|&n| n == 1), "{fed:?}");
        // In order, and nothing is decided before its end.
        let prompt = fed_tokens(&ids(length, 0));
        assert_eq!(mock.last(0)[..length as usize], prompt[..]);
        assert_eq!(run.one().prompt_tokens, [length]);
        assert_eq!(run.events[0].step, 0);
        assert_eq!(run.events.len(), fed.len() - parts.len() + 1);
    }
}

#[test]
fn agents_with_prompts_of_unequal_lengths_end_theirs_together() {
    let mut mock = backend(3, 1);
    let run = go(
        &mut mock,
        &config(Gate::Threshold, 0.5),
        vec![long(0, &[1200, 40, 600])],
    );
    let first: Vec<Vec<usize>> = (0..3).map(|a| feeds(&mock, 0, a)[..4].to_vec()).collect();
    assert_eq!(first[0], [400, 400, 400, 1]);
    assert_eq!(first[1], [0, 0, 40, 1]);
    assert_eq!(first[2], [0, 300, 300, 1]);
    assert_eq!(run.one().prompt_tokens, [1200, 40, 600]);
    assert!(run.one().error.is_none());
}

#[test]
fn prompts_wait_while_others_step_and_no_output_tells() {
    let cfg = config(Gate::Threshold, 0.5);
    let samples = || -> Vec<Job> {
        (0..9)
            .map(|i| long(i, &[if i % 3 == 0 { 30 } else { 700 + i }, 300]))
            .collect()
    };
    let run = |prefill: u32| {
        let mut mock = backend(2, 3);
        let options = RunOptions {
            prefill,
            ..RunOptions::default()
        };
        let mut sink = Collect::default();
        let mut jobs = samples().into_iter();
        run_shared(
            &mut mock,
            std::slice::from_ref(&cfg),
            &options,
            Hooks::default(),
            &mut jobs,
            &mut sink,
        )
        .unwrap();
        sink.outcomes.sort_by(|a, b| a.key.cmp(&b.key));
        (mock, timeless_all(&sink.outcomes))
    };
    let (_, all_at_once) = run(u32::MAX);
    for prefill in [0, 400, 1000] {
        let (mock, outcomes) = run(prefill);
        assert_eq!(outcomes, all_at_once);
        for call in &mock.fed {
            let spans: std::collections::BTreeMap<u32, usize> = call
                .iter()
                .filter(|(_, positions)| *positions > 1)
                .map(|(lane, positions)| (lane.slot.0, *positions))
                .collect();
            let total: usize = spans.values().sum();
            let steps = call.iter().any(|(_, positions)| *positions == 1);
            assert!(
                !steps || spans.len() <= 1 || total <= prefill as usize,
                "{prefill}: {spans:?}"
            );
        }
    }
}

#[test]
fn rows_that_are_compared_take_in_their_prompts_together() {
    let cfg = config(Gate::Threshold, 0.5);
    for follow in [Follow::Free, Follow::Inputs, Follow::OneStep] {
        let mut outcomes = Vec::new();
        for (slots, prefill) in [(2, 0), (6, 0), (6, 700), (6, u32::MAX)] {
            let mut mock = backend(2, slots);
            let options = RunOptions {
                prefill,
                ..RunOptions::default()
            };
            let mut jobs = (0..6).map(|i| Job {
                rival: Some(Rival { config: 1, follow }),
                ..long(i, &[900 - 100 * i, 20])
            });
            let mut sink = Collect::default();
            run_shared(
                &mut mock,
                &[cfg.clone(), cfg.clone()],
                &options,
                Hooks::default(),
                &mut jobs,
                &mut sink,
            )
            .unwrap();
            sink.outcomes.sort_by(|a, b| a.key.cmp(&b.key));
            for outcome in &sink.outcomes {
                let divergences = outcome.divergences.as_ref().unwrap();
                assert!(!divergences.kl.is_empty());
                assert!(divergences.kl.iter().all(|&kl| kl == 0.0));
            }
            outcomes.push(timeless_all(&sink.outcomes));
        }
        assert!(outcomes.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn a_role_prompt_is_cut_as_well() {
    let mut mock = backend(2, 1);
    let run = go(
        &mut mock,
        &pair(Handoff::Transcript),
        vec![long(0, &[800, 700])],
    );
    let second: Vec<usize> = feeds(&mock, 0, 1).into_iter().filter(|&n| n > 0).collect();
    assert_eq!(second[..2], [350, 350]);
    assert_eq!(run.one().prompt_tokens, [800, 700]);
    assert_eq!(run.handoffs.len(), 1);
}

#[test]
fn a_compressor_sees_whole_prompts() {
    let mut mock = backend(2, 1);
    let hooks = Hooks {
        compress_every: Some(1000),
        ..Hooks::default()
    };
    let cfg = config(Gate::Threshold, 0.5);
    let configs = std::slice::from_ref(&cfg);
    run_into(
        Collect::default(),
        &mut mock,
        configs,
        hooks,
        vec![long(0, &[1300, 600])],
    )
    .unwrap();
    assert_eq!(mock.compressed, [(lane(0, 0), 1300), (lane(0, 1), 600)]);
}

#[test]
fn a_failure_within_a_prompt_names_the_agent_that_was_fed() {
    let script = |lane: dlmom_runtime::LaneId,
                  positions: &[dlmom_runtime::mock::Position],
                  out: &mut [f32]| {
        out.fill(0.0);
        if lane.agent.0 == 1 && positions.len() >= 400 {
            out[3] = f32::NAN;
        }
    };
    let mock = MockBackend::scripted(2, VOCAB, 1, ROOM, Box::new(script));
    let mut mock = Recorder::new(mock);
    mock.inner.info_mut().models[0].name = "short".into();
    mock.inner.info_mut().models[1].name = "long".into();
    let run = go(
        &mut mock,
        &config(Gate::Threshold, 0.5),
        vec![long(0, &[20, 900])],
    );
    assert_eq!(run.one().stop, Stop::NanInf);
    insta::assert_snapshot!(run.one().error.as_deref().unwrap(), @"NaN or Inf in the logits of long at step 0");
}

/// Runs samples of two configurations, and says what each took.
fn shared(slots: u32, samples: u32) -> (RunStats, Vec<Share>) {
    let mut mock = backend(1, slots);
    let configs = [
        config(Gate::AlwaysExplicit, 0.5),
        config(Gate::AlwaysLatent, 0.5),
    ];
    let mut jobs = (0..samples).map(|i| Job {
        config: i % 3 / 2,
        ..long(i, &[12])
    });
    run_shared(
        &mut mock,
        &configs,
        &RunOptions::default(),
        Hooks::default(),
        &mut jobs,
        &mut Collect::default(),
    )
    .unwrap()
}

#[test]
fn what_configurations_took_adds_up_to_the_run() {
    let (stats, shares) = shared(5, 40);
    assert_eq!(
        shares.iter().map(|s| s.samples).collect::<Vec<_>>(),
        [27, 13]
    );
    assert_eq!(shares.iter().map(|s| s.rows).sum::<u64>(), stats.rows);
    let seconds: f64 = shares.iter().map(|s| s.wall_s).sum();
    assert!(seconds > 0.0 && seconds <= stats.wall_s);
}

#[test]
fn every_slot_is_in_use_until_the_last_sample_is_admitted() {
    for slots in [1, 4, 16] {
        let (stats, _) = shared(slots, 100);
        let (steps, rows) = stats.full;
        assert_eq!(rows, steps * u64::from(slots));
        assert!(steps > 0 && steps <= stats.steps);
    }
}

/// Operators that say something of every agent, or that are somebody's own, meet all of them or are not asked.
#[test]
fn consensus_is_asked_of_whole_rows_only() {
    struct Counting;
    impl Consensus for Counting {
        fn name(&self) -> &'static str {
            "counting"
        }
        fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool {
            assert_eq!(views.centred.len(), 3);
            out.copy_from_slice(views.centred[2]);
            true
        }
    }
    let job = || vec![long(0, &[1200, 40, 600])];
    for method in [Method::Mean, Method::Arith, Method::Poe, Method::Best] {
        let mut cfg = config(Gate::Threshold, 0.5);
        cfg.consensus = ConsensusSpec::of(method);
        if method != Method::Best {
            cfg.consensus.weights = Weights::Fixed(vec![1.0, 2.0, 3.0]);
        }
        let run = go(&mut backend(3, 1), &cfg, job());
        assert_eq!(run.one().error, None, "{method:?}");
    }
    let cfg = config(Gate::Threshold, 0.5);
    let hooks = Hooks {
        consensus: Some(Box::new(Counting)),
        ..Hooks::default()
    };
    let configs = std::slice::from_ref(&cfg);
    let run = run_into(
        Collect::default(),
        &mut backend(3, 1),
        configs,
        hooks,
        job(),
    )
    .unwrap();
    assert_eq!(run.one().error, None);
}

/// A chat of instructions and a question, as the mock reads it: a token for every byte.
fn chat(index: u32, instructions: &str, question: &str) -> Job {
    let message = |role: &str, content: &str| Message {
        role: role.into(),
        content: content.into(),
    };
    Job {
        prompts: vec![PromptSource::Chat {
            messages: vec![message("system", instructions), message("user", question)],
        }],
        ..job(index, 1)
    }
}

#[test]
fn prompts_are_cut_behind_the_instructions_they_have_in_common() {
    let question = "how many are left?";
    for (instructions, parts) in [
        (64, &[64, 18][..]),
        (63, &[81]),
        (100, &[100, 18]),
        (1000, &[500, 500, 18]),
    ] {
        let text: String = "think step by step. "
            .chars()
            .cycle()
            .take(instructions)
            .collect();
        let mut mock = backend(1, 1);
        let run = go(
            &mut mock,
            &config(Gate::Threshold, 0.5),
            vec![chat(0, &text, question)],
        );
        let fed = feeds(&mock, 0, 0);
        assert_eq!(fed[..parts.len()], *parts, "{instructions}");
        assert_eq!(run.one().prompt_tokens, [instructions as u32 + 18]);
        let bytes = text.bytes().chain(question.bytes());
        let ids: Vec<u32> = bytes.map(|b| 1 + u32::from(b) % (VOCAB - 1)).collect();
        assert_eq!(mock.last(0)[..ids.len()], fed_tokens(&ids)[..]);
    }
}

#[test]
fn where_a_prompt_is_cut_depends_on_the_prompt_alone() {
    let text: String = "think step by step. ".chars().cycle().take(90).collect();
    let other: String = "answer at once, please ".chars().cycle().take(90).collect();
    let cut = |jobs: Vec<Job>, sample: u32| {
        let mut mock = backend(1, 1);
        go(&mut mock, &config(Gate::Threshold, 0.5), jobs);
        let starts: Vec<usize> = feeds(&mock, 0, 0);
        let spans: Vec<usize> = starts.into_iter().filter(|&n| n > 1).collect();
        spans[2 * sample as usize..][..2].to_vec()
    };
    // A question that begins like nothing else, and one that begins like what the beginning is looked for with.
    for question in ["why so?", "a pear and a fig", "0 apples"] {
        let alone = cut(vec![chat(0, &text, question)], 0);
        assert_eq!(alone.iter().sum::<usize>(), 90 + question.len());
        let among = vec![
            chat(1, &text, "how many?"),
            chat(2, &other, "how many?"),
            chat(0, &text, question),
        ];
        assert_eq!(cut(among, 2), alone, "{question}");
    }
    assert_eq!(cut(vec![chat(0, &text, "why so?")], 0), [90, 7]);
}

#[test]
fn agents_with_and_without_instructions_end_their_prompts_together() {
    let text: String = "think step by step. ".chars().cycle().take(90).collect();
    let mut sample = chat(0, &text, "how many?");
    sample.prompts.extend(chat(0, "", "how many?").prompts);
    let mut mock = backend(2, 1);
    let run = go(&mut mock, &config(Gate::Threshold, 0.5), vec![sample]);
    assert_eq!(feeds(&mock, 0, 0)[..3], [90, 9, 1]);
    assert_eq!(feeds(&mock, 0, 1)[..3], [0, 9, 1]);
    assert_eq!(run.one().prompt_tokens, [99, 9]);
}
