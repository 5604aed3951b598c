//! Soft Thinking: filters, mixtures and the cold stop.

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
