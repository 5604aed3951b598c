//! Every knob of every preset, typed out.

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
