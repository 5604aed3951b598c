//! Explicit tokens against the exactly filtered distribution.

use dlmom_core::{Draw, Purpose, SamplingSpec, Stream, draw, sample_key};
use proptest::prelude::*;

use crate::common::{counts_fit, logit, softmax, wide};

fn stream(step: u64) -> Stream {
    Stream {
        seed: 4,
        sample: sample_key("draw", 0, 0),
        step,
    }
}

/// Probabilities after the repetition penalty: `p^r` for what was seen, renormalised.
fn penalised(row: &[f32], penalty: f64, seen: &[u32]) -> Vec<f64> {
    let p = softmax(&wide(row));
    let powers: Vec<f64> = (0..)
        .zip(p)
        .map(|(id, p)| {
            if seen.contains(&id) {
                p.powf(penalty)
            } else {
                p
            }
        })
        .collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

/// Filters as a chain of masks, each stage renormalised: probability of every id.
fn filtered(row: &[f32], spec: &SamplingSpec, seen: &[u32]) -> Vec<f64> {
    let first = penalised(row, spec.repetition_penalty, seen);
    let mut order: Vec<usize> = (0..row.len()).collect();
    if seen.is_empty() {
        // Distinct logits may be one probability.
        order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
    } else {
        order.sort_by(|&a, &b| first[b].total_cmp(&first[a]).then(a.cmp(&b)));
    }
    let scaled: Vec<f64> = first.iter().map(|p| p.ln() / spec.temperature).collect();
    let mut p = softmax(&scaled);
    let renormalise = |p: &mut Vec<f64>| {
        let sum: f64 = p.iter().sum();
        *p = p.iter().map(|x| x / sum).collect();
    };
    if spec.top_k > 0 {
        order
            .iter()
            .skip(spec.top_k as usize)
            .for_each(|&i| p[i] = 0.0);
        renormalise(&mut p);
    }
    if spec.top_p < 1.0 {
        let mut before = 0.0;
        for &i in &order {
            let own = p[i];
            if before >= spec.top_p {
                p[i] = 0.0;
            }
            before += own;
        }
        renormalise(&mut p);
    }
    let most = p[order[0]];
    p.iter_mut()
        .filter(|x| **x < spec.min_p * most)
        .for_each(|x| *x = 0.0);
    renormalise(&mut p);
    p
}

fn sampling() -> impl Strategy<Value = SamplingSpec> {
    (
        0.2_f64..20.0,
        prop_oneof![Just(0_u32), 1_u32..3000],
        prop_oneof![Just(1.0), 0.01_f64..1.0],
        prop_oneof![Just(0.0), 0.0_f64..0.9],
    )
        .prop_map(|(temperature, top_k, top_p, min_p)| SamplingSpec {
            temperature,
            top_k,
            top_p,
            min_p,
            ..SamplingSpec::GREEDY
        })
}

/// A plain draw with a repetition penalty.
fn repeated(penalty: f64) -> SamplingSpec {
    SamplingSpec {
        temperature: 1.0,
        repetition_penalty: penalty,
        ..SamplingSpec::GREEDY
    }
}

fn token(row: &[f32], sampling: SamplingSpec, step: u64, seen: &[u32]) -> u32 {
    draw(
        row,
        &Draw {
            sampling,
            stream: stream(step),
        },
        seen,
    )
}

proptest! {
    /// The same inverse, at the penalised distribution; tokens as probable as the drawn one up to
    /// float32 may be on either side of it.
    #[test]
    fn a_penalised_draw_inverts_the_penalised_distribution(
        row in prop::collection::vec(logit(), 1..600),
        seen in prop::collection::vec(0_u32..700, 0..40),
        penalty in 1.0_f64..3.0,
        step in 0_u64..1000,
    ) {
        let got = token(&row, repeated(penalty), step, &seen) as usize;
        let p = penalised(&row, penalty, &seen);
        let u = stream(step).uniform(0, Purpose::Token, 0);
        let share = |least: f64| p.iter().filter(|&&q| q > least).sum::<f64>();
        prop_assert!(share(p[got] * (1.0 + 2e-5)) <= u + 2e-5);
        prop_assert!(u <= share(p[got] * (1.0 - 2e-5)) + 2e-5);
    }

    #[test]
    fn a_penalised_greedy_draw_is_the_most_probable_after_the_penalty(
        row in prop::collection::vec(logit(), 1..600),
        seen in prop::collection::vec(0_u32..700, 0..40),
        penalty in 1.0_f64..3.0,
        step in 0_u64..1000,
    ) {
        let sampling = SamplingSpec { repetition_penalty: penalty, ..SamplingSpec::GREEDY };
        let got = token(&row, sampling, step, &seen) as usize;
        let p = penalised(&row, penalty, &seen);
        let most = p.iter().copied().fold(0.0, f64::max);
        prop_assert!(p[got] >= most * (1.0 - 2e-5));
    }

    #[test]
    fn what_cannot_be_penalised_changes_no_bit(
        row in prop::collection::vec(logit(), 1..400),
        sampling in sampling(),
        greedy in any::<bool>(),
        seen in prop::collection::vec(0_u32..600, 0..20),
        penalty in 1.0_f64..3.0,
        step in 0_u64..1000,
    ) {
        let sampling = if greedy { SamplingSpec::GREEDY } else { sampling };
        let plain = token(&row, sampling, step, &[]);
        let strict = SamplingSpec { repetition_penalty: penalty, ..sampling };
        // A penalty of 1, no token seen, tokens of another vocabulary.
        prop_assert_eq!(token(&row, sampling, step, &seen), plain);
        prop_assert_eq!(token(&row, strict, step, &[]), plain);
        let outside: Vec<u32> = seen.iter().map(|id| id + row.len() as u32).collect();
        prop_assert_eq!(token(&row, strict, step, &outside), plain);
        // Named twice is named once, and order says nothing.
        let twice: Vec<u32> = seen.iter().rev().chain(&seen).chain(&outside).copied().collect();
        prop_assert_eq!(token(&row, strict, step, &twice), token(&row, strict, step, &seen));
    }

    /// The draw is the inverse of the cumulative distribution at the one documented uniform.
    #[test]
    fn a_draw_inverts_the_filtered_distribution(
        row in prop::collection::vec(logit(), 1..2500),
        sampling in sampling(),
        step in 0_u64..1000,
    ) {
        let p = filtered(&row, &sampling, &[]);
        let u = stream(step).uniform(0, Purpose::Token, 0);
        let got = draw(&row, &Draw { sampling, stream: stream(step) }, &[]) as usize;
        prop_assert!(p[got] > 0.0);
        let ahead = |i: usize| row[i] > row[got] || (row[i] == row[got] && i < got);
        let before: f64 = (0..row.len()).filter(|&i| ahead(i)).map(|i| p[i]).sum();
        prop_assert!(before <= u + 1e-9, "{before} {u}");
        prop_assert!(u <= before + p[got] + 1e-9, "{before} {u}");
    }

    #[test]
    fn greedy_is_the_first_maximum(
        row in prop::collection::vec(logit(), 1..500),
        step in 0_u64..1000,
    ) {
        let got = draw(&row, &Draw { sampling: SamplingSpec::GREEDY, stream: stream(step) }, &[]);
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        prop_assert_eq!(got as usize, row.iter().position(|&z| z == max).unwrap());
    }

    #[test]
    fn any_row_is_survived(
        row in prop::collection::vec(any::<f32>(), 0..40),
        sampling in sampling(),
        penalty in 1.0_f64..1e30,
        seen in prop::collection::vec(any::<u32>().prop_map(|id| id % 50), 0..5),
    ) {
        let sampling = SamplingSpec { repetition_penalty: penalty, ..sampling };
        let id = token(&row, sampling, 0, &seen) as usize;
        prop_assert!(id < row.len() || row.is_empty());
    }
}

#[test]
fn frequencies_are_the_filtered_probabilities() {
    let row = [1.0, 3.0, 2.5, 3.0, -1.0, 0.5, 2.0, -4.0];
    let plain = SamplingSpec {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        ..SamplingSpec::GREEDY
    };
    let specs = [
        SamplingSpec {
            temperature: 1.5,
            ..plain
        },
        SamplingSpec { top_k: 3, ..plain },
        SamplingSpec {
            top_p: 0.8,
            ..plain
        },
        SamplingSpec {
            min_p: 0.2,
            ..plain
        },
        SamplingSpec {
            temperature: 0.7,
            top_k: 6,
            top_p: 0.97,
            min_p: 0.05,
            ..SamplingSpec::GREEDY
        },
    ];
    for sampling in specs {
        let mut counts = [0; 8];
        for step in 0..40_000 {
            counts[draw(
                &row,
                &Draw {
                    sampling,
                    stream: stream(step),
                },
                &[],
            ) as usize] += 1;
        }
        assert!(
            counts_fit(&counts, &filtered(&row, &sampling, &[])),
            "{sampling:?} {counts:?}"
        );
    }
}

#[test]
fn frequencies_are_the_penalised_probabilities() {
    // Logits on both sides of 0: on logits the penalty would depend on where 0 is.
    let row = [1.0, 3.0, 2.5, 3.0, -1.0, 0.5, 2.0, -2.0];
    let seen = [1, 4, 2, 4, 900];
    let specs = [
        repeated(1.3),
        SamplingSpec {
            temperature: 2.0,
            ..repeated(2.0)
        },
        SamplingSpec {
            top_k: 4,
            ..repeated(1.5)
        },
        SamplingSpec {
            temperature: 0.8,
            top_k: 7,
            top_p: 0.9,
            min_p: 0.05,
            repetition_penalty: 1.2,
        },
    ];
    for sampling in specs {
        for shift in [0.0, -50.0] {
            let row = row.map(|z| z + shift);
            let mut counts = [0; 8];
            for step in 0..40_000 {
                counts[token(&row, sampling, step, &seen) as usize] += 1;
            }
            let p = filtered(&row, &sampling, &seen);
            assert!(counts_fit(&counts, &p), "{sampling:?} {counts:?}");
            // The penalty shows: without it another distribution is drawn from.
            let plain = filtered(&row, &sampling, &[]);
            assert!(p.iter().zip(plain).any(|(p, q)| (p - q).abs() > 0.02));
        }
    }
}

#[test]
fn a_penalty_turns_greedy_away_from_what_was_printed() {
    // Probabilities 1/2, 3/10 and 1/5.
    let row = [0.5_f32, 0.3, 0.2].map(f32::ln);
    let greedy = |penalty, seen: &[u32]| {
        let sampling = SamplingSpec {
            repetition_penalty: penalty,
            ..SamplingSpec::GREEDY
        };
        token(&row, sampling, 0, seen)
    };
    // ln 0.3 / ln 0.5 = 1.737: there the two are as probable.
    assert_eq!(greedy(1.73, &[0]), 0);
    assert_eq!(greedy(1.74, &[0]), 1);
    assert_eq!(greedy(1.74, &[0, 1]), 0);
    // ln 0.2 / ln 0.3 = 1.337
    assert_eq!(greedy(5.0, &[0, 1]), 2);
    assert_eq!(greedy(5.0, &[]), 0);
    // Two logits nearer to each other than float32 log-probabilities are, and still apart.
    let close = [0.0_f32, 1e-12, -9.0];
    let sampling = SamplingSpec {
        repetition_penalty: 2.0,
        ..SamplingSpec::GREEDY
    };
    assert_eq!(token(&close, sampling, 0, &[2]), 1);
    assert!(SamplingSpec::GREEDY.is_argmax() && !sampling.is_argmax());
    assert!(sampling.is_greedy() && !repeated(1.0).is_argmax());
}

#[test]
fn a_nearly_flat_row_reaches_its_far_end() {
    let row = vec![0.0_f32; 5000];
    let sampling = SamplingSpec {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        ..SamplingSpec::GREEDY
    };
    let seen: Vec<u32> = (0..200)
        .map(|step| {
            draw(
                &row,
                &Draw {
                    sampling,
                    stream: stream(step),
                },
                &[],
            )
        })
        .collect();
    for (step, &id) in seen.iter().enumerate() {
        let u = stream(step as u64).uniform(0, Purpose::Token, 0);
        assert_eq!(id, (u * 5000.0) as u32);
    }
    assert!(seen.iter().any(|&id| id > 4500));
}

#[test]
fn a_tiny_temperature_is_greedy() {
    let sampling = SamplingSpec {
        temperature: f64::MIN_POSITIVE,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        ..SamplingSpec::GREEDY
    };
    assert_eq!(
        draw(
            &[1.0, 1.5, 1.4],
            &Draw {
                sampling,
                stream: stream(1)
            },
            &[],
        ),
        1
    );
}
