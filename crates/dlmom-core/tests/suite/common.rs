//! Golden files, statistics and strategies shared by the tests.

use proptest::prelude::*;
use serde_json::Value;

/// Reads a golden file written by `tests/test_core_oracles.py`.
pub(crate) fn golden(name: &str) -> Value {
    let path = format!(
        "{}/../../tests/golden/core/{name}",
        env!("CARGO_MANIFEST_DIR")
    );
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

pub(crate) fn floats(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

pub(crate) fn singles(value: &Value) -> Vec<f32> {
    floats(value).into_iter().map(|x| x as f32).collect()
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_u64().unwrap() as u32)
        .collect()
}

pub(crate) fn hex(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap(), 16).unwrap()
}

pub(crate) fn assert_near(a: f64, b: f64, tolerance: f64) {
    assert!(
        (a - b).abs() <= tolerance,
        "{a} and {b} differ by more than {tolerance}"
    );
}

/// Whether counts fit probabilities by Pearson's test, with a bound that a right generator passes
/// for all but about one seed in 10^5. Cells of probability 0 must be empty.
pub(crate) fn counts_fit(counts: &[u64], probabilities: &[f64]) -> bool {
    let total: u64 = counts.iter().sum();
    let (mut statistic, mut cells) = (0.0, 0_u32);
    for (&count, &p) in counts.iter().zip(probabilities) {
        if p == 0.0 {
            if count > 0 {
                return false;
            }
            continue;
        }
        let expected = p * total as f64;
        assert!(expected > 5.0, "the test needs more draws");
        statistic += (count as f64 - expected).powi(2) / expected;
        cells += 1;
    }
    let freedom = f64::from(cells - 1);
    statistic < freedom + 5.0 * (2.0 * freedom).sqrt() + 10.0
}

/// Kolmogorov-Smirnov distance of a sample from the uniform distribution, times `sqrt(n)`.
pub(crate) fn ks_uniform(mut sample: Vec<f64>) -> f64 {
    sample.sort_by(f64::total_cmp);
    let n = sample.len() as f64;
    let distance = sample
        .iter()
        .enumerate()
        .map(|(i, &x)| (x - i as f64 / n).max((i + 1) as f64 / n - x))
        .fold(0.0, f64::max);
    distance * n.sqrt()
}

/// Probabilities of a row by the textbook formula.
pub(crate) fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = row.iter().map(|z| (z - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// `-sum p ln p`, nothing times its logarithm being nothing.
pub(crate) fn entropy(p: &[f64]) -> f64 {
    -p.iter()
        .filter(|&&p| p > 0.0)
        .map(|p| p * p.ln())
        .sum::<f64>()
}

/// `sum q ln(q / p)` over the support of q.
pub(crate) fn kl(q: &[f64], p: &[f64]) -> f64 {
    q.iter()
        .zip(p)
        .filter(|(q, _)| **q > 0.0)
        .map(|(q, p)| q * (q / p).ln())
        .sum()
}

/// Mean divergence of some distributions from their mean.
pub(crate) fn jensen_shannon(all: &[Vec<f64>]) -> f64 {
    let mean: Vec<f64> = (0..all[0].len())
        .map(|j| all.iter().map(|p| p[j]).sum::<f64>() / all.len() as f64)
        .collect();
    all.iter().map(|p| kl(p, &mean)).sum::<f64>() / all.len() as f64
}

pub(crate) fn wide(row: &[f32]) -> Vec<f64> {
    row.iter().map(|&z| f64::from(z)).collect()
}

/// Logits with ties: on a coarse grid or anywhere.
pub(crate) fn logit() -> impl Strategy<Value = f32> {
    prop_oneof![-30.0_f32..30.0, (-8_i8..8).prop_map(|i| f32::from(i) * 0.5)]
}

/// K rows of one length.
pub(crate) fn rows(
    experts: std::ops::Range<usize>,
    vocab: std::ops::Range<usize>,
) -> impl Strategy<Value = Vec<Vec<f32>>> {
    (experts, vocab)
        .prop_flat_map(|(k, v)| prop::collection::vec(prop::collection::vec(logit(), v), k))
}

pub(crate) fn slices(rows: &[Vec<f32>]) -> Vec<&[f32]> {
    rows.iter().map(Vec::as_slice).collect()
}
