//! Every preset against its published rule: the knobs, typed out, and whole runs on scripted logits, re-derived in float64.
//! Tokens that are drawn must lie in the published truncated set; the rule then follows what was drawn.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod cipher;
mod files;
mod knobs;
mod latent_then_explicit;
mod latentmas;
mod paper;
mod published;
mod rig;
mod soft_thinking;
mod stochastic_soft_thinking;
mod swir_golden;
mod swir_runs;

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
