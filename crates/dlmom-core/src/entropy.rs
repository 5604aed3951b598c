//! Entropy and normaliser of one row of logits.

use crate::exp::exp_nonpositive;

/// Values whose exponentials are taken, and then summed, at a time.
const BLOCK: usize = 256;
/// Independent partials of a block, so that the sums need not wait for each other.
const LANES: usize = 4;

/// `sum e_i` and `sum d_i e_i` with `e_i = exp(d_i)`, `d_i = (values_i - max) / temperature <= 0`,
/// in f64 and in an order that depends on the length alone.
pub(crate) fn partition(values: &[f32], max: f64, temperature: f64) -> (f64, f64) {
    let (mut sum, mut weighted) = (0.0, 0.0);
    let (mut shifted, mut weights) = ([0.0; BLOCK], [0.0; BLOCK]);
    for block in values.chunks(BLOCK) {
        let (shifted, weights) = (&mut shifted[..block.len()], &mut weights[..block.len()]);
        for ((d, e), &value) in shifted.iter_mut().zip(&mut *weights).zip(block) {
            *d = (f64::from(value) - max) / temperature;
            *e = exp_nonpositive(*d);
        }
        sum += lane_sum(weights);
        for (e, &d) in weights.iter_mut().zip(&*shifted) {
            *e *= d;
        }
        weighted += lane_sum(weights);
    }
    (sum, weighted)
}

fn lane_sum(values: &[f64]) -> f64 {
    let (quads, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for quad in quads {
        for (lane, value) in lanes.iter_mut().zip(quad) {
            *lane += value;
        }
    }
    let [a, b, c, d] = lanes;
    ((a + b) + (c + d)) + rest.iter().sum::<f64>()
}

/// What one pass over a row of logits yields.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Arithmetic mean of the logits.
    pub mean: f64,
    /// Largest logit.
    pub max: f32,
    /// Its place, the first of several.
    pub best: u32,
    /// `ln sum_i exp(z_i)`.
    pub log_z: f64,
    /// `-sum_i p_i ln p_i` of the softmax, in nats; at least 0.
    pub entropy: f64,
    /// Whether every logit is a finite number. When false, every other field is 0.
    pub finite: bool,
}

/// Mean, maximum, log-partition and entropy of a row of float32 logits.
///
/// With `d_i = z_i - max`, `S = sum exp(d_i)` and `T = sum d_i exp(d_i)`: `log_z = max + ln S` and
/// `H = ln S - T / S`. Exponentials and sums are f64, in blocks of a fixed size. A NaN or an infinity
/// of either sign anywhere, or an empty row, gives `finite: false`; rows never use `-inf` as a mask
/// (padding rows are cut off instead).
#[must_use]
pub fn stats(logits: &[f32]) -> Stats {
    let mut finite = !logits.is_empty();
    let mut max = f32::NEG_INFINITY;
    let mut total = 0.0_f64;
    for &z in logits {
        finite &= z.is_finite();
        max = if z > max { z } else { max };
        total += f64::from(z);
    }
    if !finite {
        return Stats::default();
    }
    let best = logits.iter().position(|&z| z >= max).unwrap_or(0) as u32;
    let shift = f64::from(max);
    let (sum, weighted) = partition(logits, shift, 1.0);
    let log_sum = libm::log(sum);
    Stats {
        mean: total / logits.len() as f64,
        max,
        best,
        log_z: shift + log_sum,
        entropy: at_least_zero(log_sum - weighted / sum),
        finite: true,
    }
}

/// Entropy as a fraction of its maximum, `H / ln V`; 0 for `vocab <= 1`.
///
/// This is the unit of `alpha` in the DL-MoM paper (section 4.3). `entropy_nats` is in nats.
#[must_use]
pub fn normalized(entropy_nats: f64, vocab: usize) -> f64 {
    if vocab <= 1 {
        0.0
    } else {
        entropy_nats / libm::log(vocab as f64)
    }
}

/// Clears the rounding error that can push a non-negative quantity below 0, and the sign of `-0`.
pub(crate) fn at_least_zero(value: f64) -> f64 {
    if value > 0.0 { value } else { 0.0 }
}
