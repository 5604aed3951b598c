//! One latent block, left for good.

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
