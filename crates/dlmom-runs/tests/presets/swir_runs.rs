//! SwiReasoning in whole runs.

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
                Some(rule) if switched && !made.terminated && exits >= rule.converge_after => &[9],
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
                (rule.converge_after, rule.terminate_after) = [(1, 2), (2, 4)][seed as usize % 3];
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
