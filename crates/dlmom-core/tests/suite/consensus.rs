//! The consensus operators against transcriptions, and the stability bound.

use dlmom_core::{Consensus, ConsensusSpec, Method, Views};
use proptest::prelude::*;

use crate::common::{rows, slices, wide};

/// Merges rows as they are, with statistics of their own.
fn merge(spec: &ConsensusSpec, rows: &[Vec<f32>]) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows[0].len()];
    let centred = slices(rows);
    let views = Views {
        centred: &centred,
        stats: &[],
        stream: None,
    };
    spec.merge(&views, &mut out);
    out
}

fn ties(theta: f32, eps: f32) -> ConsensusSpec {
    ConsensusSpec {
        theta,
        eps,
        ..ConsensusSpec::paper()
    }
}

fn mean() -> ConsensusSpec {
    ConsensusSpec::of(Method::Mean)
}

fn sgn(v: f64) -> i32 {
    if v > 0.0 {
        1
    } else if v < 0.0 {
        -1
    } else {
        0
    }
}

/// The sketch of Appendix C in f64, one coordinate at a time: sign votes, mask, clamped count.
/// Returns value, elected sign and the signs after trimming.
fn sketch(values: &[f64], theta: f64, eps: f64) -> (f64, i32, Vec<i32>) {
    let trimmed: Vec<f64> = values
        .iter()
        .map(|&v| if v.abs() < theta { 0.0 } else { v })
        .collect();
    let signs: Vec<i32> = trimmed.iter().map(|&v| sgn(v)).collect();
    let elected = signs.iter().sum::<i32>().signum();
    let mask: Vec<f64> = signs
        .iter()
        .map(|&s| f64::from(u8::from(s == elected)))
        .collect();
    let count = mask.iter().sum::<f64>().max(1.0);
    let sum: f64 = trimmed.iter().zip(&mask).map(|(v, m)| v * m).sum();
    (sum / (count + eps), elected, signs)
}

fn column(rows: &[Vec<f32>], j: usize) -> Vec<f64> {
    rows.iter().map(|row| f64::from(row[j])).collect()
}

/// A trim threshold that the grid of the logits can hit exactly.
fn theta() -> impl Strategy<Value = f32> {
    prop::sample::select(vec![0.0_f32, 0.1, 0.5, 1.0, 3.0])
}

proptest! {
    #[test]
    fn ties_match_the_sketch(rows in rows(2..7, 1..40), theta in theta()) {
        let eps = 1e-6_f32;
        let merged = merge(&ties(theta, eps), &rows);
        for (j, &got) in merged.iter().enumerate() {
            let values = column(&rows, j);
            let (value, elected, _) = sketch(&values, f64::from(theta), f64::from(eps));
            let clear = values.iter().all(|v| {
                let gap = (v.abs() - f64::from(theta)).abs();
                gap > 1e-5 || gap == 0.0
            });
            if clear {
                prop_assert_eq!(sgn(f64::from(got)), elected);
                prop_assert!((f64::from(got) - value).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn mean_is_the_mean(rows in rows(2..7, 1..40)) {
        for (j, &got) in merge(&mean(), &rows).iter().enumerate() {
            let mut mean = 0.0;
            for (n, v) in column(&rows, j).into_iter().enumerate() {
                mean += (v - mean) / (n + 1) as f64;
            }
            prop_assert!((f64::from(got) - mean).abs() < 1e-5);
        }
    }

    #[test]
    fn one_expert_is_unchanged(rows in rows(1..2, 1..40), theta in theta()) {
        prop_assert_eq!(&merge(&ties(theta, 1e-6), &rows), &rows[0]);
        prop_assert_eq!(&merge(&mean(), &rows), &rows[0]);
    }

    #[test]
    fn two_experts_commute_exactly(mut rows in rows(2..3, 1..40), theta in theta()) {
        for spec in [ties(theta, 1e-6), mean()] {
            let before = merge(&spec, &rows);
            rows.swap(0, 1);
            prop_assert_eq!(before, merge(&spec, &rows));
        }
    }

    #[test]
    fn the_order_of_experts_does_not_matter(
        (rows, shuffled) in rows(3..7, 1..40)
            .prop_flat_map(|rows| (Just(rows.clone()), Just(rows).prop_shuffle())),
        theta in theta(),
    ) {
        for spec in [ties(theta, 1e-6), mean()] {
            for (a, b) in merge(&spec, &rows).iter().zip(merge(&spec, &shuffled)) {
                prop_assert!((a - b).abs() <= 1e-5 * a.abs());
            }
        }
    }

    /// The corrected stability bound: the merged row leaves the mean only where experts conflict or
    /// were trimmed, there by no more than the farthest expert, or by the mean itself where no sign
    /// is elected.
    #[test]
    fn the_corrected_stability_bound_holds(rows in rows(2..7, 1..60), theta in theta()) {
        let eps = 1e-6_f32;
        let merged = wide(&merge(&ties(theta, eps), &rows));
        let (mut left, mut right) = (0.0_f64, 0.0_f64);
        for (j, &v) in merged.iter().enumerate() {
            let values = column(&rows, j);
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let (_, elected, signs) = sketch(&values, f64::from(theta), f64::from(eps));
            let slack = 3e-6 * (1.0 + mean.abs().max(v.abs()));
            let distance = (v - mean).abs();
            let unanimous = signs.iter().all(|&s| s != 0 && s == signs[0]);
            if unanimous {
                prop_assert!(distance <= slack);
            } else if elected == 0 {
                prop_assert!((distance - mean.abs()).abs() <= slack);
            } else {
                let farthest = values.iter().map(|x| (x - mean).abs()).fold(0.0, f64::max);
                prop_assert!(distance <= farthest + slack);
                left += distance.powi(2);
                right += (farthest + slack).powi(2);
            }
        }
        prop_assert!(left.sqrt() <= right.sqrt());
    }
}

/// Both sides of the bound as the paper prints it, `sqrt(K) rho max_i |v_i - m|`, where rho is the
/// fraction of coordinates on which untrimmed entries disagree in sign.
fn printed_bound(rows: &[Vec<f32>], theta: f32) -> (f64, f64) {
    let merged = wide(&merge(&ties(theta, 1e-6), rows));
    let vocab = merged.len();
    let mean: Vec<f64> = (0..vocab)
        .map(|j| column(rows, j).iter().sum::<f64>() / rows.len() as f64)
        .collect();
    let norm = |row: &[f64]| {
        row.iter()
            .zip(&mean)
            .map(|(v, m)| (v - m).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    let conflicts = (0..vocab).filter(|&j| {
        let (_, _, signs) = sketch(&column(rows, j), f64::from(theta), 1e-6);
        signs.contains(&1) && signs.contains(&-1)
    });
    let rho = conflicts.count() as f64 / vocab as f64;
    let spread = rows.iter().map(|row| norm(&wide(row))).fold(0.0, f64::max);
    (norm(&merged), (rows.len() as f64).sqrt() * rho * spread)
}

#[test]
fn the_printed_stability_bound_fails_on_a_conflict() {
    let mut rows = vec![vec![0.0_f32; 1000]; 2];
    rows[0][0] = 5.0;
    rows[1][0] = -1.0;
    let (left, right) = printed_bound(&rows, 0.1);
    assert!((left - 2.0).abs() < 1e-9);
    assert!((right - 0.004_242_6).abs() < 1e-6);
}

#[test]
fn the_printed_stability_bound_fails_on_trimming_alone() {
    let rows = vec![vec![0.09_f32, 1.0, -1.0], vec![0.07, 1.0, -1.0]];
    let (left, right) = printed_bound(&rows, 0.1);
    assert!(left > 0.07);
    assert_eq!(right, 0.0);
}

#[test]
fn hand_worked_coordinates() {
    let rows = [
        vec![2.0, 2.0, 0.05, 0.1, 3.0, -1.0],
        vec![4.0, -9.0, 0.09, -0.05, 0.0, -2.0],
        vec![6.0, 1.0, -0.02, 0.0, -3.0, 5.0],
    ];
    let merged = merge(&ties(0.1, 0.0), &rows);
    // Agreement; a minority outvoted whatever its size; all trimmed; theta itself is kept; a tie
    // gives 0; two against one.
    assert_eq!(merged, [4.0, 1.5, 0.0, 0.1, 0.0, -1.5]);
    let mean = merge(&mean(), &rows);
    assert_eq!(mean[0], 4.0);
    assert_eq!(mean[1], -2.0);
}

#[test]
fn the_offset_shrinks_the_merge() {
    let rows = [vec![1.0], vec![1.0]];
    assert_eq!(merge(&ties(0.1, 2.0), &rows), [0.5]);
}

#[test]
fn without_experts_there_is_no_preference() {
    let mut out = [1.0, 2.0];
    let views = Views {
        centred: &[],
        stats: &[],
        stream: None,
    };
    assert!(!ConsensusSpec::paper().merge(&views, &mut out));
    assert_eq!(out, [0.0, 0.0]);
}

#[test]
fn names_are_stable() {
    assert_eq!(ConsensusSpec::paper().name(), "ties");
    assert_eq!(mean().name(), "mean");
}
