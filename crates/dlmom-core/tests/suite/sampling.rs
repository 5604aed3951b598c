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

/// Filters as a chain of masks, each stage renormalised: probability of every id.
fn filtered(row: &[f32], spec: &SamplingSpec) -> Vec<f64> {
    let scaled: Vec<f64> = wide(row).iter().map(|z| z / spec.temperature).collect();
    let mut p = softmax(&scaled);
    let mut order: Vec<usize> = (0..row.len()).collect();
    order.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
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
        })
}

proptest! {
    /// The draw is the inverse of the cumulative distribution at the one documented uniform.
    #[test]
    fn a_draw_inverts_the_filtered_distribution(
        row in prop::collection::vec(logit(), 1..2500),
        sampling in sampling(),
        step in 0_u64..1000,
    ) {
        let p = filtered(&row, &sampling);
        let u = stream(step).uniform(0, Purpose::Token, 0);
        let got = draw(&row, &Draw { sampling, stream: stream(step) }) as usize;
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
        let got = draw(&row, &Draw { sampling: SamplingSpec::GREEDY, stream: stream(step) });
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        prop_assert_eq!(got as usize, row.iter().position(|&z| z == max).unwrap());
    }

    #[test]
    fn any_row_is_survived(
        row in prop::collection::vec(any::<f32>(), 0..40),
        sampling in sampling(),
    ) {
        let id = draw(&row, &Draw { sampling, stream: stream(0) }) as usize;
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
            ) as usize] += 1;
        }
        assert!(
            counts_fit(&counts, &filtered(&row, &sampling)),
            "{sampling:?} {counts:?}"
        );
    }
}

#[test]
fn a_nearly_flat_row_reaches_its_far_end() {
    let row = vec![0.0_f32; 5000];
    let sampling = SamplingSpec {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
    };
    let seen: Vec<u32> = (0..200)
        .map(|step| {
            draw(
                &row,
                &Draw {
                    sampling,
                    stream: stream(step),
                },
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
    };
    assert_eq!(
        draw(
            &[1.0, 1.5, 1.4],
            &Draw {
                sampling,
                stream: stream(1)
            }
        ),
        1
    );
}
