//! SwiReasoning on published traces.

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
