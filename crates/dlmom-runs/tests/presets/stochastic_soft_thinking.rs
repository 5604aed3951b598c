//! Its stochastic variant: Gumbel-Softmax after the filters.

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
