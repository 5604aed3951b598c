//! Every preset against its published rule: the knobs, typed out, and whole runs on scripted logits, re-derived in float64.
//! Tokens that are drawn must lie in the published truncated set; the rule then follows what was drawn.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod published;
mod rig;

use std::collections::BTreeSet;

use dlmom_core::{
    AlphaUnit, ConsensusSpec, FilterSpec, Gate, Method, Mode, Purpose, SamplingSpec, Start,
    TriggerSpec,
};
use dlmom_runs::{
    CellKind, Comm, Experiment, LOCKSTEP, Overrides, PRESETS, Preset, PresetError, REF, SoftMode,
    TokenKnob, topologies,
};
use dlmom_runtime::{
    Align, Handoff, LoopConfig, MockBackend, ModelId, Signal, Stop, Trigger, check_config,
};

use published::{
    EOS, Logits, Swir, SwirStep, SwitchCount, THINK, THINK_END, at, blend, gumbel, heaviest, keep,
    min_p, nats, softmax, swir, ties, top_k, top_p,
};
use rig::{
    Fed, Recorder, Script, Seen, assert_fed, by_call, loop_of, planned, planned_in, preset_loop,
    prompt, stream,
};

use Mode::{Explicit, Latent};

const NAMES: [&str; 7] = [
    "paper",
    "soft_thinking",
    "stochastic_soft_thinking",
    "swir",
    "latent_then_explicit",
    "cipher",
    "latentmas",
];

/// Rounding of what is fed, float32 from float32 logits.
const CLOSE: f64 = 2e-6;

/// 64 well mixed bits.
fn hash(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Fixed logits between 0 and `scale`, other ones for every `seed`.
fn noise(seed: u64, vocab: usize, scale: f32) -> Logits {
    (0..vocab as u64)
        .map(|id| hash(hash(seed.wrapping_add(77)) ^ id) as f32 / u64::MAX as f32 * scale)
        .collect()
}

/// `x` at one id and 0 elsewhere.
fn spike(vocab: usize, id: usize, x: f32) -> Logits {
    let mut logits = vec![0.0; vocab];
    logits[id] = x;
    logits
}

/// `p` at one id; the others share the rest.
fn with_mass(vocab: usize, id: usize, p: f64) -> Logits {
    let odds = p / (1.0 - p) * (vocab - 1) as f64;
    spike(vocab, id, odds.ln() as f32)
}

/// The step whose logits follow a lane of so many positions, where every step feeds one.
fn step_of(held: usize) -> usize {
    held - prompt(0).len()
}

/// Checks that the tokens printed from a step on lie in the published truncated sets, are what is fed, and are drawn.
fn assert_drawn(seen: &Seen, from: usize, set: impl Fn(usize) -> Vec<f64>) {
    let (mut drawn, mut unlikely) = (0, 0);
    for (t, token) in seen.tokens().into_iter().enumerate() {
        assert_eq!(token.is_some(), t >= from, "step {t}");
        let Some(token) = token else { continue };
        let allowed = set(t);
        assert!(
            allowed[token as usize] > 0.0,
            "step {t} prints {token}, which was cut off"
        );
        unlikely += u32::from(token as usize != heaviest(&allowed));
        drawn += 1;
        if let Some(fed) = seen.fed().get(t) {
            assert_eq!(*fed, Fed::Token(token), "step {t}");
        }
    }
    assert!(
        drawn > 0 && unlikely * 5 > drawn,
        "{unlikely} of {drawn} are not the most probable"
    );
}

mod files {
    use dlmom_runtime::Backend;

    use super::*;

    fn all() -> Vec<Preset> {
        Preset::all().unwrap()
    }

    #[test]
    fn the_shipped_presets_are_these_seven() {
        let names: Vec<String> = all().into_iter().map(|p| p.name).collect();
        assert_eq!(names, NAMES);
        for preset in all() {
            assert_eq!(preset.cell().id, preset.name);
            assert_eq!(Preset::named(&preset.name).unwrap(), preset);
        }
    }

    #[test]
    fn all_but_the_paper_s_say_where_they_deviate() {
        for preset in all() {
            assert!(!preset.source.is_empty(), "{}", preset.name);
            assert_eq!(
                preset.deviations.is_empty(),
                preset.name == "paper",
                "{}",
                preset.name
            );
            for deviation in &preset.deviations {
                assert!(deviation.ends_with('.'), "{}: {deviation}", preset.name);
            }
        }
    }

    #[test]
    fn knobs_left_out_for_models_without_their_token_are_set() {
        for preset in all() {
            let (cell, _) = planned(&preset.name, 1, &Overrides::default());
            let Experiment {
                lock_text,
                enter_signal,
                exit_signal,
                ..
            } = cell.experiment;
            let set = [
                (TokenKnob::LockText, lock_text.is_some()),
                (TokenKnob::EnterSignal, enter_signal.is_some()),
                (TokenKnob::ExitSignal, exit_signal.is_some()),
            ];
            // All of them, or a model without the token could not run the preset at all.
            for (knob, set) in set {
                let named = preset.where_known.contains(&knob);
                assert_eq!(named, set, "{}: {}", preset.name, knob.as_str());
            }
        }
    }

    /// Agents of one model of 64 tokens.
    fn one_model(agents: usize) -> MockBackend {
        let mut mock = MockBackend::hashed(agents, 64, 1, 512);
        mock.info_mut().agents.fill(ModelId(0));
        mock
    }

    #[test]
    fn every_preset_is_a_valid_loop_in_its_topology_or_in_any() {
        for preset in all() {
            let any: Vec<String> = topologies::builtin().into_iter().map(|(n, _)| n).collect();
            let topologies = match &preset.topology {
                Some(topology) => vec![topology.clone()],
                None => any,
            };
            for topology in topologies {
                let (plan, seating) = planned_in(&preset, &topology, 1, &Overrides::default());
                let cell = plan.cells.last().unwrap();
                assert_eq!(cell.experiment.id, preset.name);
                assert_eq!(cell.experiment.suite, PRESETS);
                let skipped = matches!(cell.kind, CellKind::Skip { .. });
                assert!(!skipped, "{} in {topology}: {:?}", preset.name, cell.kind);
                let config = loop_of(&cell.experiment, &seating);
                let agents = seating.seats.len();
                config.validate(Some(64)).unwrap();
                config.validate_agents(agents).unwrap();
                check_config(&config, one_model(agents).info()).unwrap();
            }
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest_and_with_all() {
        let error = Preset::named("soft-thinking").unwrap_err();
        assert!(matches!(error, PresetError::Unknown { .. }));
        insta::assert_snapshot!(error, @"unknown preset `soft-thinking`; did you mean `soft_thinking`?; known: paper, soft_thinking, stochastic_soft_thinking, swir, latent_then_explicit, cipher, latentmas");
    }

    #[test]
    fn a_file_that_is_none_is_refused_at_its_place() {
        let refused = |text: &str| match Preset::parse("mine.yaml", text) {
            Err(PresetError::Yaml(error)) => error.to_string(),
            other => panic!("{other:?}"),
        };
        let head = "name: mine\nsource: me\ndeviations: []\n";
        let unknown_knob = refused(&format!("{head}knobs: {{gates: trend}}\n"));
        let begin = "mine.yaml:4:9: unknown key `gates`; did you mean `gate`?; known: soft_mode,";
        assert!(unknown_knob.starts_with(begin), "{unknown_knob}");
        let unknown_token = format!("{head}knobs: {{}}\nwhere_known: [lock]\n");
        insta::assert_snapshot!(refused(&unknown_token), @"mine.yaml:5:15: unknown value `lock`; known: lock_text, enter_signal, exit_signal");
        insta::assert_snapshot!(refused("name: mine\nsource: me\nknobs: {}\n"), @"mine.yaml:3:1: missing field `deviations`");
    }

    #[test]
    fn a_null_that_means_nothing_is_refused() {
        let file = "name: mine\nsource: me\ndeviations: []\nknobs: {gate: null}\n";
        let error = Preset::parse("mine.yaml", file).unwrap_err();
        insta::assert_snapshot!(error, @"mine.yaml: gate of preset mine is null; only a value makes sense");
    }
}

mod knobs {
    use super::*;

    /// What a preset says, and nothing else apart from the reference pipeline.
    fn assert_knobs(name: &str, published: impl FnOnce(&mut Experiment)) {
        let preset = Preset::named(name).unwrap();
        let topology = preset.topology.as_deref().unwrap_or(LOCKSTEP);
        let (plan, _) = planned_in(&preset, topology, 1, &Overrides::default());
        let [reference, cell] = &plan.cells[..] else {
            panic!("{:?}", plan.cells)
        };
        assert_eq!(reference.experiment.id, REF);
        let mut expected = Experiment {
            id: name.into(),
            suite: PRESETS.into(),
            ..reference.experiment.clone()
        };
        published(&mut expected);
        // Thresholds of the trend gate, which no preset has, follow from alpha.
        expected.convergence_threshold = 0.25 * expected.alpha;
        expected.slope_eps = 0.02 * expected.alpha;
        expected.var_eps = (0.1 * expected.alpha).powi(2);
        assert_eq!(cell.experiment, expected);
    }

    const fn drawn(top_k: u32, min_p: f64) -> SamplingSpec {
        SamplingSpec {
            temperature: 0.6,
            top_k,
            top_p: 0.95,
            min_p,
            repetition_penalty: 1.0,
        }
    }

    #[test]
    fn paper_has_the_unified_default_and_the_constants_of_appendix_c() {
        assert_knobs("paper", |e| {
            e.soft_mode = SoftMode::Deterministic;
            e.gate = Gate::Threshold;
            e.alpha = 0.60;
            e.alpha_unit = AlphaUnit::Normalized;
            e.cap = 10;
            e.max_latent_steps = 40;
            e.k = 50;
            e.consensus = ConsensusSpec::of(Method::Ties);
            e.consensus.theta = 0.1;
            e.consensus.eps = 1e-6;
            e.sampling = SamplingSpec::GREEDY;
        });
        // So its cell is the reference pipeline under another name, with agents of one model or of several.
        for experts in [1, 2, 3] {
            let (cell, _) = planned("paper", experts, &Overrides::default());
            assert_eq!(cell.kind, CellKind::Alias { of: REF.into() });
        }
    }

    #[test]
    fn soft_thinking_has_the_recipe_of_its_readme() {
        assert_knobs("soft_thinking", |e| {
            e.gate = Gate::LatentThenExplicit;
            e.start = Start::Latent;
            // Delta and L of the cold stop.
            (e.alpha, e.alpha_unit, e.patience) = (0.01, AlphaUnit::Nats, 256);
            e.max_latent_steps = 32_768;
            e.cap = -1;
            e.k = 30;
            e.filter = FilterSpec {
                temperature: 0.6,
                top_p: 0.95,
                min_p: 0.001,
                keep: 10,
            };
            e.lock_text = Some("</think>".into());
            e.sampling = drawn(30, 0.001);
        });
    }

    #[test]
    fn stochastic_soft_thinking_has_the_gumbel_recipe_of_aime() {
        assert_knobs("stochastic_soft_thinking", |e| {
            e.soft_mode = SoftMode::Gumbel;
            e.tau = Some(0.5);
            e.gate = Gate::LatentThenExplicit;
            e.start = Start::Latent;
            // No entropy is below 0: the cold stop is off.
            (e.alpha, e.alpha_unit, e.patience) = (0.0, AlphaUnit::Nats, 1);
            e.max_latent_steps = 32_768;
            e.cap = -1;
            e.k = 30;
            e.filter = FilterSpec {
                temperature: 0.6,
                top_p: 0.95,
                min_p: 0.0,
                keep: 15,
            };
            e.lock_text = Some("</think>".into());
            e.sampling = drawn(30, 0.0);
        });
    }

    #[test]
    fn swir_has_the_defaults_of_the_code_and_the_command_line() {
        assert_knobs("swir", |e| {
            e.gate = Gate::Reference;
            e.start = Start::Latent;
            e.min_dwell_explicit = 512;
            e.max_latent_steps = 32_768;
            e.cap = -1;
            // The soft vector is of the whole vocabulary.
            (e.k, e.comm) = (-1, Comm::Logits);
            e.lock_text = Some("</think>".into());
            // alpha_0 is 1: nothing is mixed in on the way in. beta_0 is 0.7.
            e.enter_signal = None;
            e.exit_signal = Some(Signal {
                text: "</think>".into(),
                weight: 0.3,
            });
            // C is 2: it converges at counts C to 2C and terminates beyond; of a budget of 32, 31 tokens are printed.
            e.triggers = Some(TriggerSpec {
                converge_after: 2,
                converge_text: "</think>".into(),
                terminate_after: 4,
                terminate_text: "</think>\n\nThe final answer is".into(),
                terminate_steps: 31,
            });
            e.sampling = drawn(20, 0.0);
        });
    }

    #[test]
    fn latent_then_explicit_has_the_code_s_entropy_and_length() {
        assert_knobs("latent_then_explicit", |e| {
            (e.comm, e.align) = (Comm::Hidden, Align::Identity);
            e.gate = Gate::LatentThenExplicit;
            e.start = Start::Latent;
            (e.alpha, e.alpha_unit, e.patience) = (1.2, AlphaUnit::Nats, 1);
            e.max_latent_steps = 50;
            e.cap = -1;
            e.sampling = drawn(0, 0.0);
        });
    }

    #[test]
    fn cipher_sends_messages_without_any_draw() {
        assert_knobs("cipher", |e| {
            e.gate = Gate::AlwaysLatent;
            e.comm = Comm::Belief;
            e.k = 50;
            e.filter = FilterSpec {
                temperature: 0.7,
                ..FilterSpec::NONE
            };
            // Two debaters of 40.
            e.max_latent_steps = 80;
            e.cap = -1;
            e.handoff = Some(Handoff::Transcript);
            e.max_handoffs = Some(2);
        });
    }

    #[test]
    fn latentmas_has_ten_aligned_states_for_each_of_three_roles() {
        assert_knobs("latentmas", |e| {
            (e.comm, e.align) = (Comm::Hidden, Align::Ridge);
            e.gate = Gate::AlwaysLatent;
            e.max_latent_steps = 30;
            e.cap = -1;
            e.sampling = drawn(0, 0.0);
            e.handoff = Some(Handoff::Kv);
            e.max_handoffs = Some(3);
        });
    }
}

mod paper {
    use super::*;

    const VOCAB: usize = 64;

    /// Two experts, each as sure as its own row makes it.
    fn logits(agent: u32, step: usize, doubt: f32) -> Logits {
        let seed = 2 * step as u64 + u64::from(agent);
        let scale = doubt * (0.3 + (hash(seed + 5) % 100) as f32 / 100.0);
        noise(seed, VOCAB, scale)
    }

    /// Section 4.3 and Appendices B and C on two experts: modes, and what both are fed.
    fn derived(config: &LoopConfig, doubt: f32) -> (Vec<Mode>, Vec<Vec<f64>>) {
        let (mut modes, mut fed) = (Vec::new(), Vec::new());
        let (mut switches, mut latent) = (0, 0);
        let mut mode = None;
        for t in 0..config.max_steps as usize {
            let experts = [logits(0, t, doubt), logits(1, t, doubt)];
            let nats = experts.iter().map(|z| nats(&softmax(z, 1.0))).sum::<f64>();
            let h = nats / 2.0 / (VOCAB as f64).ln();
            assert!((h - 0.60).abs() > 1e-6, "too near to call");
            // Entering is paid for together with the exit, and nothing exceeds 10.
            let price = if mode.is_none() { 1 } else { 2 };
            let pays = mode == Some(Latent) || switches + price <= 10;
            let left = config.max_steps as usize - t;
            let wants = h > 0.60 && pays && latent < 40 && left > config.answer_reserve as usize;
            let next = if wants { Latent } else { Explicit };
            switches += usize::from(mode.is_some_and(|before| before != next));
            latent += usize::from(next == Latent);
            mode = Some(next);
            modes.push(next);
            let merged = ties(&experts, 0.1, 1e-6);
            let as_f32: Logits = merged.iter().map(|&v| v as f32).collect();
            let p = softmax(&as_f32, 1.0);
            fed.push(match next {
                Latent => keep(p, 50),
                Explicit => blend(&p, 0.0, heaviest(&p)),
            });
        }
        (modes, fed)
    }

    fn check(doubt: f32) -> Seen {
        let config = preset_loop("paper", 2, 256);
        assert_eq!(config.answer_reserve, 32);
        let script: Script =
            Box::new(move |agent, held| logits(agent, held - prompt(agent).len(), doubt));
        let seen = Recorder::of_models(2, VOCAB as u32, &[], script).go(&config);
        let (modes, fed) = derived(&config, doubt);
        assert_eq!(seen.modes(), modes);
        for agent in 0..2 {
            let lane = &seen.lanes[&agent][prompt(agent).len()..];
            // The last token is not forwarded any more.
            assert_eq!(lane.len(), 255);
            for (t, (found, expected)) in lane.iter().zip(&fed).enumerate() {
                assert_eq!(found.entries(), if modes[t] == Latent { 50 } else { 1 });
                assert_fed(found, expected, 1e-5, &format!("agent {agent}, step {t}"));
            }
        }
        seen
    }

    #[test]
    fn latent_above_alpha_until_ten_switches_are_spent() {
        for (doubt, first, switches) in [(16.0, Explicit, 10), (13.5, Latent, 9)] {
            let seen = check(doubt);
            let modes = seen.modes();
            assert_eq!(modes[0], first);
            // The tenth would be an entry, and its exit could not be paid for.
            assert_eq!(seen.outcome.switches, switches);
            assert!(modes[100..].iter().all(|&m| m == Explicit));
        }
    }

    #[test]
    fn latent_for_forty_steps_at_most() {
        let seen = check(1.0);
        assert_eq!(seen.outcome.schedule.runs(), [0, 40, 216]);
    }
}

/// The vocabulary of the methods that keep 30 tokens; id 9 is `</think>`, 0 the end token.
const SOFT: usize = 40;
const END: usize = 0;

/// Rows of all kinds, none of which ends the thinking.
fn thinking(step: usize) -> Logits {
    let mut row = match step % 5 {
        // Whether the eight reach top-p depends on how much of the tail top-k leaves.
        4 => (0..SOFT as u8)
            .map(|id| f32::from(u8::from((20..28).contains(&id))) * 2.3 - f32::from(id) * 1e-3)
            .collect(),
        0 => noise(step as u64, SOFT, 0.4),
        1 => noise(step as u64, SOFT, 4.0),
        2 => noise(step as u64, SOFT, 9.0),
        _ => spike(SOFT, 12 + step % 20, 3.0),
    };
    // Neither the end token nor `</think>` is ever among the first 30.
    row[END] = -30.0;
    row[THINK_END] = -30.0;
    row
}

/// Steps 3.1.2 to 3.1.6 of Soft Thinking without noise: temperature, top-k, top-p, min-p, and the `n` largest.
fn kept(logits: &[f32], share: f64, n: usize) -> Vec<f64> {
    keep(truncated(logits, 30, share), n)
}

/// The distribution that printed tokens are drawn from.
fn truncated(logits: &[f32], k: usize, share: f64) -> Vec<f64> {
    min_p(top_p(top_k(softmax(logits, 0.6), k), 0.95), share)
}

#[test]
fn the_derivation_reproduces_the_vectors_of_the_published_codes() {
    let close = |p: &[f64], expected: &[f64]| {
        for (p, expected) in p.iter().zip(expected) {
            assert!((p - expected).abs() < 1e-5, "{p} is not {expected}");
        }
    };
    let logits = [3.0, 2.5, 1.0, 0.5, 0.0, -2.0];
    let p = softmax(&logits, 0.6);
    close(&p, &[0.66990, 0.29114, 0.02390, 0.01039, 0.00451, 0.00016]);
    assert!((nats(&p) - 0.790_085).abs() < 1e-6);
    assert!((nats(&softmax(&logits, 1.0)) - 1.143_203).abs() < 1e-6);
    // Soft Thinking.
    let cut = top_p(top_k(p, 5), 0.95);
    close(&cut, &[0.697_059, 0.302_941, 0.0, 0.0, 0.0, 0.0]);
    assert_eq!(min_p(cut.clone(), 0.05), cut);
    let g = [-0.2, 0.9, 0.0, 0.0, 0.0, 0.0];
    let noisy = gumbel(&keep(cut, 2), 0.5, |id| g[id]);
    close(&noisy, &[0.369_740, 0.630_260, 0.0, 0.0, 0.0, 0.0]);
    // CIPHER.
    let p = softmax(&logits, 0.85);
    close(&p, &[0.57627, 0.32000, 0.05480]);
    let three = top_k(p, 3);
    close(&three, &[0.605_915, 0.336_469, 0.057_616, 0.0, 0.0, 0.0]);
    close(&top_p(three, 0.9), &[0.642_960, 0.357_040, 0.0]);
}

#[test]
fn every_token_of_the_published_truncated_set_is_drawn_and_no_other() {
    const VOCAB: usize = 64;
    // 24 ids share nearly all of the mass, so that top-k, top-p and the temperature all cut among them. No two are equal:
    // the sources keep what ties with the k-th, and this loop the lower ids.
    let row = || {
        let mut row: Logits = (0..VOCAB as u8)
            .map(|id| -2.0 - f32::from(id) * 1e-3)
            .collect();
        row[20..44].copy_from_slice(&noise(5, 24, 1.2));
        row
    };
    let mut sizes = Vec::new();
    for (name, agents, k) in [
        ("soft_thinking", 1, 30),
        ("stochastic_soft_thinking", 1, 30),
        ("swir", 1, 20),
        ("latent_then_explicit", 1, VOCAB),
        ("latentmas", 4, VOCAB),
    ] {
        let mut config = preset_loop(name, 1, 700);
        config.controller.gate = Gate::AlwaysExplicit;
        let script: Script = Box::new(move |_, _| row());
        let seen = Recorder::shared(agents, VOCAB as u32, &[], script)
            .knowing(&[
                ("</think>", &[1]),
                ("</think>\n\nThe final answer is", &[1, 2]),
            ])
            .go(&config);
        assert_eq!(seen.outcome.tokens.len(), 700);
        let drawn: BTreeSet<usize> = seen.outcome.tokens.iter().map(|&t| t as usize).collect();
        let allowed = truncated(&row(), k, 0.0);
        let expected = (0..VOCAB).filter(|&id| allowed[id] > 0.0);
        assert_eq!(drawn, expected.collect(), "{name}");
        sizes.push(drawn.len());
    }
    assert!(sizes[2] < sizes[0] && sizes[0] <= sizes[3], "{sizes:?}");
}

mod soft_thinking {
    use super::*;

    /// Nearly one-hot by its entropy at temperature 1.
    fn cold(step: usize) -> Logits {
        let row = spike(SOFT, 12 + step % 20, 12.0);
        assert!(nats(&softmax(&row, 1.0)) < 0.01);
        row
    }

    /// By its entropy at the sampling temperature only.
    fn lukewarm(step: usize) -> Logits {
        let row = spike(SOFT, 12 + step % 20, 10.5);
        assert!(nats(&softmax(&row, 0.6)) < 0.01 && nats(&softmax(&row, 1.0)) > 0.01);
        row
    }

    fn check(steps: u32, logits: fn(usize) -> Logits, thinks: usize) -> Seen {
        let config = preset_loop("soft_thinking", 1, steps);
        let script: Script = Box::new(move |_, held| logits(step_of(held)));
        let seen = Recorder::shared(1, SOFT as u32, &[END], script)
            .knowing(&[("</think>", &[THINK_END])])
            .go(&config);
        for (t, mode) in seen.modes().into_iter().enumerate() {
            assert_eq!(mode == Latent, t < thinks, "step {t}");
        }
        for (t, fed) in seen.fed()[..thinks].iter().enumerate() {
            let expected = kept(&logits(t), 0.001, 10);
            assert_fed(fed, &expected, CLOSE, &format!("step {t}"));
        }
        seen
    }

    #[test]
    fn the_vector_of_the_published_code_is_fed() {
        let seen = check(
            40,
            |_| {
                let mut row = vec![-60.0; SOFT];
                row[12..18].copy_from_slice(&[3.0, 2.5, 1.0, 0.5, 0.0, -2.0]);
                row
            },
            30,
        );
        let mut expected = vec![0.0; SOFT];
        (expected[12], expected[13]) = (0.697_059, 0.302_941);
        assert_fed(&seen.fed()[0], &expected, 1e-6, "step 0");
    }

    #[test]
    fn the_cold_stop_comes_after_256_entropies_below_a_hundredth_one_after_another() {
        let rows = |step: usize| match step {
            20..120 | 121..377 => cold(step),
            120 => lukewarm(step),
            _ => thinking(step),
        };
        // The last of the 256 is the first explicit step.
        let seen = check(600, rows, 376);
        assert_drawn(&seen, 376, |t| truncated(&rows(t), 30, 0.001));
        assert_eq!(
            (seen.outcome.switches, seen.outcome.stop),
            (1, Stop::Budget)
        );
        // What is kept differs in length, or the filters were not seen at work.
        let kept: BTreeSet<usize> = seen.fed()[..20].iter().map(Fed::entries).collect();
        assert!(kept.contains(&10) && kept.len() > 2, "{kept:?}");
    }

    #[test]
    fn an_entropy_of_delta_itself_is_not_below_it() {
        let thinks = |alpha: Option<f64>| {
            let mut config = preset_loop("soft_thinking", 1, 60);
            // A patience of one, or the 45 steps for the thinking would not do.
            config.controller.patience = 1;
            config.controller.alpha = alpha.unwrap_or(config.controller.alpha);
            let script: Script = Box::new(|_, _| lukewarm(0));
            Recorder::shared(1, SOFT as u32, &[END], script)
                .knowing(&[("</think>", &[THINK_END])])
                .go(&config)
        };
        let seen = thinks(None);
        let h = seen.events[0].observed;
        assert!((h - nats(&softmax(&lukewarm(0), 1.0))).abs() < 1e-9);
        assert_eq!(seen.outcome.latent_steps, 45);
        assert_eq!(thinks(Some(h)).outcome.latent_steps, 45);
        // The first step is latent whatever its entropy.
        assert_eq!(thinks(Some(h.next_up())).outcome.latent_steps, 1);
    }

    #[test]
    fn the_thinking_ends_where_its_end_leads() {
        let rows = |step: usize| match step {
            15 => with_mass(SOFT, THINK_END, 0.5),
            _ => thinking(step),
        };
        let seen = check(100, rows, 15);
        assert_drawn(&seen, 15, |t| truncated(&rows(t), 30, 0.001));
    }

    #[test]
    fn the_thinking_ends_at_a_certain_end_and_not_at_a_likely_one() {
        let rows = |step: usize| match step {
            8 => with_mass(SOFT, END, 0.85),
            12.. => with_mass(SOFT, END, 0.95),
            _ => thinking(step),
        };
        let seen = check(100, rows, 12);
        assert_eq!(seen.outcome.stop, Stop::Eos);
    }

    #[test]
    fn without_any_end_it_lasts_until_the_steps_for_it_are_spent() {
        let seen = check(60, thinking, 45);
        assert_eq!(seen.outcome.explicit_tokens, 15);
    }
}

mod stochastic_soft_thinking {
    use super::*;

    /// What the source mixes at a step: the 15 kept, and Gumbel noise by the step's named draws.
    fn mixed(logits: &[f32], step: usize) -> Vec<f64> {
        gumbel(&kept(logits, 0.0, 15), 0.5, |id| {
            -(-stream(step).uniform(id as u64, Purpose::Gumbel, 0).ln()).ln()
        })
    }

    fn rows(step: usize) -> Logits {
        match step {
            // Second before the noise, and so heaviest behind it now and then.
            5..25 => {
                let mut row = vec![0.0; SOFT];
                (row[THINK_END], row[20]) = (6.0, 6.2);
                row
            }
            32 => with_mass(SOFT, THINK_END, 0.4),
            _ => thinking(step),
        }
    }

    #[test]
    fn mixtures_are_filtered_kept_and_then_perturbed_by_named_gumbel_draws() {
        let config = preset_loop("stochastic_soft_thinking", 1, 120);
        let script: Script = Box::new(|_, held| rows(step_of(held)));
        let seen = Recorder::shared(1, SOFT as u32, &[END], script)
            .knowing(&[("</think>", &[THINK_END])])
            .go(&config);
        let mut overtaken = 0;
        for (t, fed) in seen.fed()[..32].iter().enumerate() {
            let expected = mixed(&rows(t), t);
            let heaviest = heaviest(&expected);
            overtaken += u32::from(heaviest == THINK_END);
            assert_fed(fed, &expected, 1e-5, &format!("step {t}"));
        }
        // The thinking ends where `</think>` leads before the noise, and nowhere else.
        assert!(overtaken > 0);
        for (t, mode) in seen.modes().into_iter().enumerate() {
            assert_eq!(mode == Latent, t < 32, "step {t}");
        }
        assert_drawn(&seen, 32, |t| truncated(&rows(t), 30, 0.0));
        let kept: BTreeSet<usize> = seen.fed()[..32].iter().map(Fed::entries).collect();
        assert!(kept.contains(&15) && kept.len() > 2, "{kept:?}");
    }

    #[test]
    fn certainty_never_stops_it_and_a_certain_end_does() {
        let rows = |step: usize| match step {
            40.. => with_mass(SOFT, END, 0.95),
            _ => spike(SOFT, 20, 30.0),
        };
        let config = preset_loop("stochastic_soft_thinking", 1, 200);
        let script: Script = Box::new(move |_, held| rows(step_of(held)));
        let seen = Recorder::shared(1, SOFT as u32, &[END], script)
            .knowing(&[("</think>", &[THINK_END])])
            .go(&config);
        assert_eq!(seen.outcome.latent_steps, 40);
        assert!(seen.events[..40].iter().all(|e| e.observed < 1e-9));
    }
}

mod latent_then_explicit {
    use super::*;

    const VOCAB: usize = 64;

    /// Entropies above 1.2 nats but for the steps that say otherwise; the end token never leads there.
    fn doubt(step: usize) -> Logits {
        let mut row = noise(step as u64, VOCAB, 3.0);
        row[END] = 0.0;
        row
    }

    fn sure(step: usize) -> Logits {
        let row = spike(VOCAB, 5 + step % 20, 6.0);
        assert!(nats(&softmax(&row, 1.0)) < 1.2);
        row
    }

    fn check(rows: fn(usize) -> Logits, thinks: usize) -> Seen {
        let config = preset_loop("latent_then_explicit", 1, 160);
        let script: Script = Box::new(move |_, held| rows(step_of(held)));
        let seen = Recorder::shared(1, VOCAB as u32, &[END], script).go(&config);
        let start = prompt(0).len();
        // The first input is the state behind the prompt, every other the state behind the last.
        for (t, fed) in seen.fed()[..thinks].iter().enumerate() {
            let state = Fed::State {
                agent: 0,
                held: start + t,
                align: Align::Identity,
            };
            assert_eq!(*fed, state, "step {t}");
        }
        for (t, mode) in seen.modes().into_iter().enumerate() {
            assert_eq!(mode == Latent, t < thinks, "step {t}");
        }
        seen
    }

    #[test]
    fn one_block_that_an_entropy_below_1_2_nats_ends_for_good() {
        let rows = |step: usize| match step {
            // The first step is latent whatever its entropy.
            0 | 7 => sure(step),
            _ => doubt(step),
        };
        let seen = check(rows, 7);
        assert_eq!(
            (seen.outcome.switches, seen.outcome.stop),
            (1, Stop::Budget)
        );
        assert_drawn(&seen, 7, |t| top_p(softmax(&rows(t), 0.6), 0.95));
    }

    #[test]
    fn or_that_ends_after_50_steps() {
        let seen = check(doubt, 50);
        assert_drawn(&seen, 50, |t| top_p(softmax(&doubt(t), 0.6), 0.95));
    }
}

mod cipher {
    use super::*;

    const VOCAB: usize = 64;
    /// Messages are of 40 positions.
    const LENGTH: usize = 40;

    /// Logits of an agent whose lane holds so many positions; the end token is never among the first.
    fn logits(agent: u32, held: usize) -> Logits {
        let seed = 1000 * u64::from(agent) + held as u64;
        let mut row = noise(seed, VOCAB, 2.0 + (seed % 7) as f32);
        row[END] = -1.0;
        row
    }

    /// One position of a message: temperature first, then the most probable 50.
    fn position(logits: &[f32]) -> Vec<f64> {
        keep(softmax(logits, 0.7), 50)
    }

    fn run(rows: fn(u32, usize) -> Logits) -> Seen {
        let config = preset_loop("cipher", 1, 200);
        Recorder::shared(3, VOCAB as u32, &[END], Box::new(rows)).go(&config)
    }

    /// Checks every lane: the prompt, the messages handed over, and what the agent wrote itself.
    fn check(seen: &Seen, rows: fn(u32, usize) -> Logits, lengths: [usize; 2]) {
        let mut said: Vec<Vec<f64>> = Vec::new();
        for agent in 0..3 {
            let prompt: Vec<Fed> = prompt(agent).into_iter().map(Fed::Token).collect();
            let lane = &seen.lanes[&agent];
            assert_eq!(lane[..prompt.len()], prompt);
            let own = lengths.get(agent as usize).copied().unwrap_or(0);
            for _ in 0..own {
                // Behind the prompt and all that was said before, by others and by itself.
                said.push(position(&rows(agent, prompt.len() + said.len())));
            }
            let messages = &lane[prompt.len()..];
            for (at, (fed, expected)) in messages.iter().zip(&said).enumerate() {
                assert_eq!(fed.entries(), 50);
                assert_fed(
                    fed,
                    expected,
                    CLOSE,
                    &format!("agent {agent}, position {at}"),
                );
            }
            if agent < 2 {
                assert_eq!(messages.len(), said.len());
                continue;
            }
            // The answer is text, and nothing of it is drawn.
            let answer = &messages[said.len()..];
            assert!(!answer.is_empty());
            for (at, fed) in answer.iter().enumerate() {
                let p = softmax(&rows(2, prompt.len() + said.len() + at), 1.0);
                assert_eq!(*fed, Fed::Token(heaviest(&p) as u32));
            }
        }
        let explicit = seen.events.iter().filter(|e| e.token.is_some());
        assert!(explicit.into_iter().all(|e| e.agent == 2));
    }

    #[test]
    fn two_messages_of_mixtures_then_an_answer_in_text() {
        let seen = run(logits);
        check(&seen, logits, [LENGTH, LENGTH]);
        let handoffs: Vec<_> = seen
            .handoffs
            .iter()
            .map(|h| (h.from, h.to, h.step, h.trigger, h.positions))
            .collect();
        // The step after the last of a message finds it at its end.
        let spent = Trigger::LatentBudget;
        assert_eq!(handoffs, [(0, 1, 40, spent, 40), (1, 2, 81, spent, 80)]);
        assert_eq!(seen.outcome.latent_steps, 80);
    }

    #[test]
    fn a_message_ends_where_the_end_is_certain_and_the_answer_is_text_all_the_same() {
        let rows = |agent: u32, held: usize| match (agent, held - prompt(agent).len()) {
            (0, 3) => with_mass(VOCAB, END, 0.85),
            (0, 5) => with_mass(VOCAB, END, 0.95),
            _ => logits(agent, held),
        };
        let seen = run(rows);
        check(&seen, rows, [5, LENGTH]);
        let triggers: Vec<Trigger> = seen.handoffs.iter().map(|h| h.trigger).collect();
        assert_eq!(triggers, [Trigger::Convergence, Trigger::LatentBudget]);
        // What the first has left over is nobody's.
        assert_eq!(seen.outcome.latent_steps, 45);
    }
}

mod latentmas {
    use super::*;

    const VOCAB: usize = 64;

    fn logits(agent: u32, held: usize) -> Logits {
        let seed = 1000 * u64::from(agent) + held as u64;
        let mut row = noise(seed, VOCAB, 4.0);
        row[END] = -1.0;
        row
    }

    fn run(rows: fn(u32, usize) -> Logits) -> Seen {
        let config = preset_loop("latentmas", 1, 120);
        Recorder::shared(4, VOCAB as u32, &[END], Box::new(rows)).go(&config)
    }

    /// Checks that every lane is the one before it, the agent's prompt, and so many states; then the answer's draws.
    fn check(seen: &Seen, rows: fn(u32, usize) -> Logits, states: [usize; 3]) {
        let mut cache: Vec<Fed> = Vec::new();
        for agent in 0..4 {
            cache.extend(prompt(agent).into_iter().map(Fed::Token));
            for _ in 0..states.get(agent as usize).copied().unwrap_or(0) {
                // The first is the state behind the prompt's last position; none is sampled or skipped.
                cache.push(Fed::State {
                    agent,
                    held: cache.len(),
                    align: Align::Ridge,
                });
            }
            let lane = &seen.lanes[&agent];
            assert_eq!(lane[..cache.len()], cache, "agent {agent}");
            assert!(agent == 3 || lane.len() == cache.len());
        }
        let mut unlikely = 0;
        let tokens: Vec<u32> = seen.events.iter().filter_map(|e| e.token).collect();
        for (at, &token) in tokens.iter().enumerate() {
            let held = cache.len() + at;
            let allowed = top_p(softmax(&rows(3, held), 0.6), 0.95);
            assert!(allowed[token as usize] > 0.0, "{token} was cut off");
            unlikely += usize::from(token as usize != heaviest(&allowed));
            if let Some(fed) = seen.lanes[&3].get(held) {
                assert_eq!(*fed, Fed::Token(token));
            }
        }
        assert!(unlikely * 3 > tokens.len());
        assert_eq!(tokens, seen.outcome.tokens);
    }

    #[test]
    fn ten_aligned_states_behind_every_prompt_on_one_growing_cache() {
        let seen = run(logits);
        check(&seen, logits, [10, 10, 10]);
        let handoffs: Vec<_> = seen
            .handoffs
            .iter()
            .map(|h| (h.from, h.to, h.step, h.trigger))
            .collect();
        let spent = Trigger::LatentBudget;
        let expected = [(0, 1, 10, spent), (1, 2, 21, spent), (2, 3, 32, spent)];
        assert_eq!(handoffs, expected);
        // The cache grows by prompt and states exactly, and is handed over whole.
        let positions: Vec<u32> = seen.handoffs.iter().map(|h| h.positions).collect();
        assert_eq!(positions, [3 + 10, 3 + 4 + 20, 3 + 4 + 5 + 30]);
        assert_eq!(seen.outcome.latent_steps, 30);
    }

    #[test]
    fn a_role_stops_early_at_a_certain_end_and_the_answer_is_text_all_the_same() {
        let rows = |agent: u32, held: usize| match (agent, held) {
            // The fifth step of the second.
            (1, 21) => with_mass(VOCAB, END, 0.95),
            _ => logits(agent, held),
        };
        let seen = run(rows);
        check(&seen, rows, [10, 4, 10]);
        assert_eq!(seen.handoffs[1].trigger, Trigger::Convergence);
        assert_eq!(seen.outcome.latent_steps, 24);
    }
}

mod swir_golden {
    //! The traces of SwiReasoning's own code, first against the derivation, then against the preset.
    use super::*;

    fn modes(letters: &str) -> Vec<Mode> {
        letters
            .chars()
            .map(|c| if c == 'L' { Latent } else { Explicit })
            .collect()
    }

    /// A published trace: its knobs, its script, the modes after each step and the printed ids.
    struct Trace {
        window: usize,
        alpha_0: f64,
        script: Vec<Logits>,
        modes: &'static str,
    }

    fn a() -> Trace {
        Trace {
            window: 2,
            alpha_0: 0.6,
            script: vec![
                at(2.0, 1),
                at(3.0, 1),
                at(3.0, 1),
                at(2.0, 2),
                at(1.0, 3),
                at(1.0, 4),
                at(3.0, 1),
            ],
            modes: "LXXLLLX",
        }
    }

    fn b() -> Trace {
        Trace {
            window: 1,
            alpha_0: 1.0,
            script: vec![at(2.0, 1), at(2.0, 1), at(3.0, 1), at(3.0, 1), at(2.9, 2)],
            modes: "LLXXL",
        }
    }

    fn c() -> Trace {
        Trace {
            window: 3,
            alpha_0: 1.0,
            script: vec![
                at(2.0, 1),
                at(3.0, 1),
                at(1.0, 2),
                at(1.0, 2),
                at(1.0, 2),
                at(0.5, 3),
                at(3.0, 1),
            ],
            modes: "LXXXLLX",
        }
    }

    fn d() -> Trace {
        Trace {
            window: 1,
            alpha_0: 1.0,
            script: vec![at(2.0, 1), at(3.0, 9), at(1.0, 2), at(1.0, 2)],
            modes: "LXXX",
        }
    }

    fn l() -> Trace {
        Trace {
            window: 1,
            alpha_0: 1.0,
            script: vec![at(2.0, 1), at(1.0, 9), at(3.0, 2), at(1.0, 3), at(1.0, 3)],
            modes: "LLXXX",
        }
    }

    fn derived(trace: &Trace, count: Option<SwitchCount<'_>>) -> Vec<SwirStep> {
        let knobs = Swir {
            window: trace.window,
            alpha_0: trace.alpha_0,
            beta_0: 0.7,
            count,
        };
        let steps = swir(&knobs, &trace.script);
        let found: Vec<Mode> = steps.iter().map(|s| s.mode).collect();
        assert_eq!(found, modes(trace.modes));
        steps
    }

    fn printed(steps: &[SwirStep]) -> Vec<usize> {
        steps.iter().map(|s| s.printed).collect()
    }

    /// Weights as the traces give them, three digits of some ids.
    fn assert_weights(fed: &[f64], expected: &[(usize, f64)], what: &str) {
        for &(id, weight) in expected {
            assert!((fed[id] - weight).abs() < 6e-4, "{what}: {fed:?}");
        }
    }

    const fn only(close: &[usize]) -> SwitchCount<'_> {
        SwitchCount {
            c: 1,
            converge: close,
            terminate: &[9, 10, 6, 5],
            budget: 6,
        }
    }

    #[test]
    fn the_derivation_reproduces_the_published_traces() {
        let steps = derived(&a(), None);
        for (t, weights) in [
            (0, vec![(1, 0.362), (7, 0.149)]),
            (1, vec![(1, 0.480), (9, 0.281)]),
            (2, vec![(1, 1.0)]),
            (3, vec![(2, 0.310), (8, 0.271)]),
            (4, vec![(3, 0.198)]),
            (5, vec![(4, 0.198)]),
        ] {
            assert_weights(&steps[t].fed, &weights, &format!("A, step {t}"));
        }
        let steps = derived(&b(), None);
        assert_weights(&steps[3].fed, &[(1, 1.0)], "B");
        let steps = derived(&c(), None);
        assert_weights(
            &steps[5].fed,
            &softmax(&at(0.5, 3), 1.0)
                .into_iter()
                .enumerate()
                .collect::<Vec<_>>(),
            "C",
        );
        let steps = derived(&d(), None);
        assert_weights(&steps[1].fed, &[(9, 0.726)], "D");
        assert_weights(&steps[3].fed, &[(2, 1.0)], "D");
        assert_eq!(printed(&steps), [1, 9, 2, 2]);
        let steps = derived(&l(), Some(only(&[9])));
        assert_weights(&steps[1].fed, &[(9, 1.0)], "L");
        assert_weights(&steps[2].fed, &[(2, 0.530), (9, 0.206)], "L");
        assert_eq!(printed(&steps), [1, 9, 2, 9, 3]);
    }

    #[test]
    fn the_derivation_reproduces_the_published_injections() {
        // K: a `</think>` that was drawn and overwritten locks all the same.
        let script = [
            at(2.0, 1),
            at(3.0, 2),
            at(3.0, 9),
            at(3.0, 4),
            at(1.0, 4),
            at(1.0, 4),
        ];
        let knobs = |close| Swir {
            window: 1,
            alpha_0: 1.0,
            beta_0: 0.7,
            count: Some(only(close)),
        };
        let steps = swir(&knobs(&[10, 9, 10]), &script);
        assert_eq!(printed(&steps), [1, 2, 10, 9, 10, 4]);
        assert_weights(&steps[4].fed, &[(10, 1.0)], "K");
        assert_weights(&steps[5].fed, &[(4, 1.0)], "K");
        // I: the third exit of C = 1 terminates, and a budget of 6 prints 5 more.
        let mut script = vec![at(2.0, 1)];
        for _ in 0..2 {
            script.extend([at(3.0, 2), at(1.0, 3)]);
        }
        script.push(at(3.0, 2));
        script.resize(20, at(3.0, 4));
        let steps = swir(&knobs(&[9]), &script);
        assert_eq!(printed(&steps), [1, 2, 9, 2, 9, 2, 9, 10, 6, 5, 4]);
    }

    /// The preset with a trace's window and its greedy draws, without switch counts. Its weights are one for a run: they
    /// are those of the traces at the step where they are read.
    fn preset(trace: &Trace, exit_step: f64, enter_step: Option<f64>) -> Seen {
        let budget = trace.script.len() as f64;
        let mut config = preset_loop("swir", 1, 200);
        config.controller.min_dwell_explicit = trace.window as u32;
        config.sampling = SamplingSpec::GREEDY;
        config.triggers = None;
        let signal = |text: &str, weight| {
            Some(Signal {
                text: text.into(),
                weight,
            })
        };
        config.exit_signal = signal("</think>", 0.3 * (1.0 - exit_step / budget));
        config.enter_signal =
            enter_step.and_then(|t| signal("<think>", (1.0 - trace.alpha_0) * (1.0 - t / budget)));
        let mut script = trace.script.clone();
        script.push(at(12.0, EOS));
        recorder(script).go(&config)
    }

    pub(super) fn recorder(script: Vec<Logits>) -> Recorder {
        Recorder::shared(1, 12, &[EOS], by_call(script)).knowing(&[
            ("<think>", &[THINK]),
            ("</think>", &[THINK_END]),
            ("</think>\n\nThe final answer is", &[9, 10, 6, 5]),
        ])
    }

    fn assert_modes(seen: &Seen, expected: &str) {
        assert_eq!(seen.modes()[..expected.len()], modes(expected));
    }

    /// Behind the first input, which has no line break here.
    fn assert_same_fed(seen: &Seen, source: &[SwirStep]) {
        for (t, step) in source.iter().enumerate().skip(1) {
            assert_fed(&seen.fed()[t], &step.fed, CLOSE, &format!("step {t}"));
        }
    }

    fn weights(seen: &Seen, step: usize) -> Vec<f64> {
        seen.fed()[step].weights(12)
    }

    #[test]
    fn trace_a_switches_and_mixes_as_published() {
        let seen = preset(&a(), 1.0, Some(3.0));
        assert_modes(&seen, a().modes);
        let source = derived(&a(), None);
        for (t, expected) in [
            (1, vec![(1, 0.480), (9, 0.281)]),
            (2, vec![(1, 1.0)]),
            (3, vec![(2, 0.310), (8, 0.271)]),
            (4, vec![(3, 0.198)]),
            (5, vec![(4, 0.198)]),
        ] {
            assert_weights(&weights(&seen, t), &expected, &format!("step {t}"));
            assert_fed(&seen.fed()[t], &source[t].fed, CLOSE, &format!("step {t}"));
        }
        // No line break at the first step, where the source has 0.362 and 0.149.
        assert_fed(&seen.fed()[0], &softmax(&at(2.0, 1), 1.0), CLOSE, "step 0");
    }

    #[test]
    fn trace_b_switches_only_where_entropies_differ() {
        let seen = preset(&b(), 2.0, None);
        assert_modes(&seen, b().modes);
        let source = derived(&b(), None);
        assert_same_fed(&seen, &source[..5]);
    }

    #[test]
    fn trace_c_returns_first_when_the_window_has_passed() {
        let seen = preset(&c(), 1.0, None);
        assert_modes(&seen, c().modes);
        let source = derived(&c(), None);
        // The exit at step 6 has another weight in the source.
        assert_same_fed(&seen, &source[..6]);
    }

    #[test]
    fn trace_d_is_locked_by_the_end_of_thinking() {
        let seen = preset(&d(), 1.0, None);
        assert_modes(&seen, d().modes);
        assert_eq!(seen.tokens()[..4], [None, Some(9), Some(2), Some(2)]);
        assert_weights(&weights(&seen, 1), &[(9, 0.726)], "step 1");
        for t in [2, 3] {
            assert_eq!(seen.fed()[t], Fed::Token(2));
        }
    }

    #[test]
    fn trace_l_parts_where_the_end_of_thinking_leads_in_a_latent_stretch() {
        // The source feeds the token at step 1, stays latent, and exits at step 2; here step 1 is the exit.
        let seen = preset(&l(), 1.0, None);
        assert_modes(&seen, "LXXXX");
        let mixed = blend(&softmax(&at(1.0, 9), 1.0), 0.7 + 0.3 / 5.0, THINK_END);
        assert_fed(&seen.fed()[1], &mixed, CLOSE, "step 1");
        // From there on both are locked, and print the same but for what the source injects.
        assert_eq!(seen.tokens()[1..5], [Some(9), Some(2), Some(3), Some(3)]);
        assert_eq!(seen.outcome.switches, 1);
    }
}

mod swir_runs {
    use super::swir_golden::recorder;
    use super::*;

    /// The source's rule with the preset's stated deviations: by step, the mode and what is fed; the tokens that were
    /// drawn are followed, and must be ones that could be.
    struct Derived {
        modes: Vec<Mode>,
        fed: Vec<Vec<f64>>,
        injected: Vec<Vec<u32>>,
        locked: bool,
        terminated: bool,
        stop: Stop,
    }

    fn derived(config: &LoopConfig, script: &[Logits], tokens: &[Option<u32>]) -> Derived {
        let triggers = config.triggers.as_ref();
        let mut made = Derived {
            modes: Vec::new(),
            fed: Vec::new(),
            injected: Vec::new(),
            locked: false,
            terminated: false,
            stop: Stop::Budget,
        };
        let (mut mode, mut stay, mut reference) = (None, 0, f64::NAN);
        let (mut exits, mut steps, mut left) = (0, 0, 0);
        for (t, logits) in script.iter().enumerate() {
            let p = softmax(logits, 1.0);
            let h = nats(&p);
            let leads = heaviest(&p);
            let closes = leads == THINK_END;
            let certain = leads == EOS && p[EOS] >= 0.9;
            let reserved = config.max_steps - steps <= config.answer_reserve;
            let forced = made.terminated || made.locked || closes || certain || reserved;
            made.locked |= closes && mode == Some(Latent);
            stay += 1;
            let wish = match mode {
                None => Latent,
                Some(Latent) if h < reference => Explicit,
                Some(Explicit) if h > reference && stay >= config.controller.min_dwell_explicit => {
                    Latent
                }
                Some(mode) => mode,
            };
            let next = if forced { Explicit } else { wish };
            let switched = mode.is_some_and(|mode| mode != next);
            if switched || mode.is_none() {
                (stay, reference) = (0, h);
            }
            mode = Some(next);
            made.modes.push(next);
            made.injected.push(Vec::new());
            if next == Latent {
                made.fed.push(p);
                steps += 1;
            } else {
                exits += u32::from(switched);
                let text: &[u32] = match triggers {
                    Some(rule) if switched && !made.terminated && exits > rule.terminate_after => {
                        made.terminated = true;
                        left = rule.terminate_steps;
                        &[9, 10, 6, 5]
                    }
                    Some(rule) if switched && !made.terminated && exits >= rule.converge_after => {
                        &[9]
                    }
                    _ => &[],
                };
                made.injected[t] = text.to_vec();
                if !text.is_empty() {
                    for &id in text {
                        made.fed.push(blend(&p, 0.0, id as usize));
                    }
                    continue;
                }
                let allowed = top_p(top_k(softmax(logits, 0.6), 20), 0.95);
                let Some(token) = tokens[t] else {
                    assert!(allowed[EOS] > 0.0, "step {t} ends");
                    made.stop = Stop::Eos;
                    return made;
                };
                assert!(allowed[token as usize] > 0.0, "step {t}: {token}");
                made.locked |= token as usize == THINK_END;
                made.fed.push(if switched {
                    blend(&p, 0.7, THINK_END)
                } else {
                    blend(&p, 0.0, token as usize)
                });
                steps += 1;
                left -= u32::from(made.terminated);
                if made.terminated && left == 0 {
                    return made;
                }
            }
            if steps == config.max_steps {
                return made;
            }
        }
        panic!("the script is too short");
    }

    /// Rows of few kinds, so that equal entropies meet; a kind has its own id, so that they are equal to the bit.
    fn script(seed: u64) -> Vec<Logits> {
        (0..80)
            .map(|step| match hash(seed * 1000 + step) % 40 {
                0 => at(2.5, THINK_END),
                1 => at(0.7, THINK_END),
                2 if step > 20 => at(6.0, EOS),
                3 if step > 20 => at(1.8, EOS),
                4..13 => at(0.5, 1),
                13..22 => at(1.0, 2),
                22..31 => at(2.0, 3),
                _ => at(3.0, 4),
            })
            .collect()
    }

    #[test]
    fn runs_follow_the_rule_with_the_stated_deviations() {
        let (mut locked, mut terminated, mut converged, mut ended, mut reserved) = (0, 0, 0, 0, 0);
        let mut switches = BTreeSet::new();
        for seed in 0..200 {
            let rows = script(seed);
            // The window is shrunk from 512, and the 31 tokens behind the last text, to be met in 40 steps.
            let mut config = preset_loop("swir", 1, 40);
            assert_eq!(config.answer_reserve, 10);
            config.controller.min_dwell_explicit = 1 + (seed % 4) as u32;
            match config.triggers.as_mut() {
                Some(rule) if seed % 3 < 2 => {
                    (rule.converge_after, rule.terminate_after) =
                        [(1, 2), (2, 4)][seed as usize % 3];
                    rule.terminate_steps = 5;
                }
                _ => config.triggers = None,
            }
            let seen = recorder(rows.clone()).go(&config);
            let derived = derived(&config, &rows, &seen.tokens());
            assert_eq!(seen.modes(), derived.modes, "seed {seed}");
            let injected: Vec<_> = seen.events.iter().map(|e| e.injected.clone()).collect();
            assert_eq!(injected, derived.injected, "seed {seed}");
            assert_eq!(seen.outcome.stop, derived.stop, "seed {seed}");
            let forwarded = seen.fed();
            // The last input is not forwarded where the run ends by itself.
            let behind = usize::from(derived.stop == Stop::Budget);
            assert_eq!(forwarded.len() + behind, derived.fed.len(), "seed {seed}");
            for (at, (found, expected)) in forwarded.iter().zip(&derived.fed).enumerate() {
                assert_fed(
                    found,
                    expected,
                    CLOSE,
                    &format!("seed {seed}, position {at}"),
                );
            }
            locked += u32::from(derived.locked);
            terminated += u32::from(derived.terminated);
            converged += u32::from(injected.iter().any(|ids| ids == &[9]));
            ended += u32::from(derived.stop == Stop::Eos);
            reserved += u32::from(derived.modes.len() > 30 && !derived.locked);
            switches.insert(seen.outcome.switches);
        }
        for (what, count) in [
            ("locked", locked),
            ("terminated", terminated),
            ("converged", converged),
            ("ended", ended),
            ("reserved", reserved),
        ] {
            assert!(count >= 5, "{what}: {count}");
        }
        assert!(switches.len() > 6, "{switches:?}");
    }

    #[test]
    fn exits_two_to_four_close_the_thinking_and_the_fifth_leaves_31_tokens() {
        const WINDOW: usize = 8;
        // Latent at 0, 10, 20, ...; explicit in between, for longer than the window and any text.
        let mut rows: Vec<Logits> = Vec::new();
        for _ in 0..5 {
            rows.push(at(1.0, 3));
            rows.extend(std::iter::repeat_n(at(3.0, 2), 9));
        }
        rows.resize(100, at(3.0, 2));
        let mut config = preset_loop("swir", 1, 140);
        config.controller.min_dwell_explicit = WINDOW as u32;
        config.sampling = SamplingSpec::GREEDY;
        let seen = recorder(rows.clone()).go(&config);
        let knobs = Swir {
            window: WINDOW,
            alpha_0: 1.0,
            beta_0: 0.7,
            count: Some(SwitchCount {
                c: 2,
                converge: &[9],
                terminate: &[9, 10, 6, 5],
                budget: 32,
            }),
        };
        let source = swir(&knobs, &rows);
        // The same modes as the source, step by step, as long as both run.
        let modes: Vec<Mode> = source.iter().map(|s| s.mode).collect();
        let (both, theirs) = (&seen.modes()[..modes.len()], &modes[..]);
        assert_eq!(both, theirs);
        // The source prints an injected text from the next step on, this loop in the step of the exit.
        let injected: Vec<(usize, Vec<u32>)> = (0..)
            .zip(seen.events.iter().map(|e| e.injected.clone()))
            .filter(|(_, ids)| !ids.is_empty())
            .collect();
        let expected: Vec<(usize, Vec<u32>)> = [
            (11, vec![9]),
            (21, vec![9]),
            (31, vec![9]),
            (41, vec![9, 10, 6, 5]),
        ]
        .into();
        assert_eq!(injected, expected);
        for (step, ids) in &injected {
            let printed: Vec<u32> = source[step + 1..][..ids.len()]
                .iter()
                .map(|s| s.printed as u32)
                .collect();
            assert_eq!(printed, *ids);
        }
        // 31 tokens behind the last exit: in the source with the text, here without.
        assert_eq!(source.len(), 42 + 31);
        let own = seen.events[42..].iter().map(|e| e.token.unwrap());
        assert_eq!(own.collect::<Vec<_>>(), [2; 31]);
        assert_eq!(seen.outcome.stop, Stop::Budget);
        // The first exit feeds the mixture; the others feed their text.
        let fed = seen.fed();
        assert_fed(
            &fed[1],
            &blend(&softmax(&rows[1], 1.0), 0.7, THINK_END),
            CLOSE,
            "exit 1",
        );
        assert_eq!(fed[11], Fed::Token(9));
    }

    #[test]
    fn an_injected_end_of_thinking_does_not_lock() {
        let mut config = preset_loop("swir", 1, 60);
        config.controller.min_dwell_explicit = 2;
        config.sampling = SamplingSpec::GREEDY;
        if let Some(rule) = config.triggers.as_mut() {
            rule.converge_after = 1;
        }
        let rows = vec![
            at(1.0, 3),
            at(3.0, 2),
            at(3.0, 2),
            at(1.0, 3),
            at(12.0, EOS),
        ];
        let seen = recorder(rows).go(&config);
        assert_eq!(seen.events[1].injected, [9]);
        assert_eq!(seen.modes()[..4], [Latent, Explicit, Explicit, Latent]);
    }
}
