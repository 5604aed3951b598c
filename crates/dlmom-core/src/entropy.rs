//! Entropy and normaliser of one row of logits.

use crate::exp::exp_nonpositive;

/// Values whose exponentials are taken, and then summed, at a time.
pub const PARTITION_BLOCK: usize = 256;
/// Independent partials of a block, so that the sums need not wait for each other.
const LANES: usize = 4;

/// Logits whose sum is taken, and then added to that of the row, at a time.
pub const SUM_BLOCK: usize = 1024;
/// Independent partials of such a sum.
const SUM_LANES: usize = 16;

/// Sum of at most [`SUM_BLOCK`] logits in f64.
///
/// The i-th goes to partial i mod 16, and partials are added in pairs. A row's sum is that of its blocks
/// in order. A fused kernel takes its means from here too: a centred logit is a rounded difference
/// from the mean, so that one more bit in a sum could be another token at a tie.
#[expect(
    clippy::inline_always,
    reason = "compiled for the instruction set of its caller"
)]
#[inline(always)]
#[must_use]
pub fn block_sum(block: &[f32]) -> f64 {
    let (groups, rest) = block.as_chunks::<SUM_LANES>();
    let mut lanes = [0.0_f64; SUM_LANES];
    for group in groups {
        for (lane, &z) in lanes.iter_mut().zip(group) {
            *lane += f64::from(z);
        }
    }
    for (lane, &z) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(z);
    }
    let mut width = SUM_LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// `sum e_i` and `sum d_i e_i` with `e_i = exp(d_i)`, `d_i = (values_i - max) / temperature <= 0`,
/// in f64 and in an order that depends on the length alone.
pub(crate) fn partition(values: &[f32], max: f64, temperature: f64) -> (f64, f64) {
    let (mut sum, mut weighted) = (0.0, 0.0);
    let mut buffers = [[0.0; PARTITION_BLOCK]; 2];
    for block in values.chunks(PARTITION_BLOCK) {
        let (block_sum, block_weighted) = block_partition(block, max, temperature, &mut buffers);
        sum += block_sum;
        weighted += block_weighted;
    }
    (sum, weighted)
}

/// The parts of at most [`PARTITION_BLOCK`] values in the sums of a row, which are those of its blocks in
/// order. What `buffers` hold does not matter.
#[expect(
    clippy::inline_always,
    reason = "compiled for the instruction set of its caller"
)]
#[inline(always)]
#[must_use]
pub fn block_partition(
    block: &[f32],
    max: f64,
    temperature: f64,
    buffers: &mut [[f64; PARTITION_BLOCK]; 2],
) -> (f64, f64) {
    let [shifted, weights] = buffers;
    let (shifted, weights) = (&mut shifted[..block.len()], &mut weights[..block.len()]);
    for ((d, e), &value) in shifted.iter_mut().zip(&mut *weights).zip(block) {
        *d = (f64::from(value) - max) / temperature;
        *e = exp_nonpositive(*d);
    }
    let sum = lane_sum(weights);
    for (e, &d) in weights.iter_mut().zip(&*shifted) {
        *e *= d;
    }
    (sum, lane_sum(weights))
}

#[expect(
    clippy::inline_always,
    reason = "compiled for the instruction set of its caller"
)]
#[inline(always)]
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

impl Stats {
    /// Fills `log_z` and `entropy` from `S` and `T` of [`stats`], relative to `max`.
    pub fn set_partition(&mut self, sum: f64, weighted: f64) {
        let log_sum = libm::log(sum);
        self.log_z = f64::from(self.max) + log_sum;
        self.entropy = at_least_zero(log_sum - weighted / sum);
    }
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
    for &z in logits {
        finite &= z.is_finite();
        max = if z > max { z } else { max };
    }
    if !finite {
        return Stats::default();
    }
    let best = logits.iter().position(|&z| z >= max).unwrap_or(0) as u32;
    let (sum, weighted) = partition(logits, f64::from(max), 1.0);
    let total: f64 = logits.chunks(SUM_BLOCK).map(block_sum).sum();
    let mut stats = Stats {
        mean: total / logits.len() as f64,
        max,
        best,
        finite: true,
        ..Stats::default()
    };
    stats.set_partition(sum, weighted);
    stats
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
