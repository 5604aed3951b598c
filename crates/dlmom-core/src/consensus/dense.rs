//! Operators over whole rows.

use super::Views;
use crate::entropy::{at_least_zero, stats};
use crate::exp::log_sum_exp;

/// Coordinates merged at a time, so that the votes stay in registers and the nearest cache.
const BLOCK: usize = 256;

/// The paper's TIES.
pub(super) fn ties(rows: &[&[f32]], theta: f32, eps: f64, out: &mut [f32]) {
    for (index, block) in out.chunks_mut(BLOCK).enumerate() {
        let (start, len) = (index * BLOCK, block.len());
        let rows = rows.iter().map(|row| &row[start..start + len]);
        ties_block(rows, theta, eps, block);
    }
}

/// Trim, elect, merge on at most [`BLOCK`] coordinates.
///
/// Free of branches on the values, since signs are hard to predict. Without an elected sign only
/// zeros agree, so the sketch's sum is 0 there.
fn ties_block<'a>(rows: impl Iterator<Item = &'a [f32]>, theta: f32, eps: f64, out: &mut [f32]) {
    /// Counts and sums of the entries above and below 0.
    #[derive(Clone, Copy, Default)]
    struct Votes {
        above: f64,
        below: f64,
        sum_above: f64,
        sum_below: f64,
    }
    let mut votes = [Votes::default(); BLOCK];
    for row in rows {
        for (votes, &v) in votes.iter_mut().zip(row) {
            let kept = if v.abs() < theta { 0.0 } else { f64::from(v) };
            votes.above += f64::from(u8::from(kept > 0.0));
            votes.below += f64::from(u8::from(kept < 0.0));
            votes.sum_above += if kept > 0.0 { kept } else { 0.0 };
            votes.sum_below += if kept < 0.0 { kept } else { 0.0 };
        }
    }
    for (merged, votes) in out.iter_mut().zip(&votes) {
        let Votes {
            above,
            below,
            sum_above,
            sum_below,
        } = *votes;
        let (sum, count) = if above > below {
            (sum_above, above)
        } else {
            (sum_below, below)
        };
        let agreed = sum / (count.max(1.0) + eps);
        *merged = if above == below { 0.0 } else { agreed as f32 };
    }
}

/// `sum_e w_e v_e / divisor`; with equal weights the sum is exact up to f64.
pub(super) fn weighted_sum(rows: &[&[f32]], weights: &[f64], divisor: f64, out: &mut [f32]) {
    for (j, merged) in out.iter_mut().enumerate() {
        let sum: f64 = rows
            .iter()
            .zip(weights)
            .map(|(row, w)| w * f64::from(row[j]))
            .sum();
        *merged = (sum / divisor) as f32;
    }
}

/// Logarithm of what `v` weighs under a row with these statistics.
fn log_p(v: f32, s: &crate::Stats, mean: f64) -> f64 {
    f64::from(v) + mean - s.log_z
}

/// The difference between a row and the one its statistics are of: `mean` where the row is centred, 0
/// where the statistics are its own.
pub(super) fn offsets(views: &Views<'_>) -> Vec<f64> {
    views
        .centred
        .iter()
        .zip(views.stats)
        .map(|(row, s)| {
            // The largest value of the row against that of its statistics.
            let best = row.get(s.best as usize).copied().unwrap_or(0.0);
            f64::from(s.max) - f64::from(best)
        })
        .collect()
}

/// Logarithm of the weighted mean of the probabilities.
pub(super) fn arith(views: &Views<'_>, weights: &[f64], out: &mut [f32]) {
    let offsets = offsets(views);
    let log_shares = log_shares(weights);
    let mut terms = vec![0.0_f64; weights.len()];
    for (j, merged) in out.iter_mut().enumerate() {
        for (e, term) in terms.iter_mut().enumerate() {
            *term = log_shares[e] + log_p(views.centred[e][j], &views.stats[e], offsets[e]);
        }
        *merged = log_sum_exp(&terms) as f32;
    }
}

/// Logarithms of the experts' shares; `-inf` for one that weighs nothing.
#[must_use]
pub fn log_shares(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| libm::log(w / sum)).collect()
}

/// `H(mean_e p_e) - mean_e H(p_e)` in nats, experts weighing the same.
pub(super) fn jensen_shannon(views: &Views<'_>) -> f64 {
    let experts = views.centred.len();
    let mut pooled = vec![0.0_f32; views.centred[0].len()];
    arith(views, &vec![1.0; experts], &mut pooled);
    let mean = views.stats.iter().map(|s| s.entropy).sum::<f64>() / experts as f64;
    at_least_zero(stats(&pooled).entropy - mean)
}
