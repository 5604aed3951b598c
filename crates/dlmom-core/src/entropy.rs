//! Entropy and normaliser of one row of logits.

/// Elements summed into one f64 partial before it joins the row's total.
pub(crate) const BLOCK: usize = 1024;

/// What one pass over a row of logits yields.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Arithmetic mean of the logits.
    pub mean: f64,
    /// Largest logit.
    pub max: f32,
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
/// `H = ln S - T / S`. Exponentials and sums are f64, in blocks of a fixed size, so the result does
/// not depend on thread count. A NaN or an infinity of either sign anywhere, or an empty row, gives
/// `finite: false`; rows never use `-inf` as a mask (padding rows are cut off instead).
#[must_use]
pub fn stats(logits: &[f32]) -> Stats {
    let mut finite = !logits.is_empty();
    let mut max = f32::NEG_INFINITY;
    for &z in logits {
        finite &= z.is_finite();
        if z > max {
            max = z;
        }
    }
    if !finite {
        return Stats::default();
    }
    let shift = f64::from(max);
    let (mut sum, mut weighted, mut total) = (0.0_f64, 0.0_f64, 0.0_f64);
    for block in logits.chunks(BLOCK) {
        let (mut s, mut t, mut m) = (0.0_f64, 0.0_f64, 0.0_f64);
        for &z in block {
            let z = f64::from(z);
            let d = z - shift;
            let e = d.exp();
            s += e;
            t += d * e;
            m += z;
        }
        sum += s;
        weighted += t;
        total += m;
    }
    let log_sum = sum.ln();
    Stats {
        mean: total / logits.len() as f64,
        max,
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
        entropy_nats / (vocab as f64).ln()
    }
}

/// Clears the rounding error that can push a non-negative quantity below 0, and the sign of `-0`.
pub(crate) fn at_least_zero(value: f64) -> f64 {
    if value > 0.0 { value } else { 0.0 }
}
