//! What one block of a row adds to its statistics.

use crate::logits::{Block, UNIT};

/// Elements that go through a loop side by side, whatever the width of the registers.
const LANES: usize = 16;

/// One block's part of a row.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Part {
    /// Sum of the logits.
    pub(crate) total: f64,
    /// `sum e_i` and `sum d_i e_i` with `d_i = z_i - max`, `e_i = exp(d_i)`. Relative to the block's own
    /// maximum nothing underflows that matters, and where many logits are near it the products are small.
    pub(crate) sum: f64,
    pub(crate) weighted: f64,
    pub(crate) max: f32,
    pub(crate) min: f32,
}

/// `q` with `exp(r) = 1 + r + r^2 q(r)` on `|r| <= ln 2 / 2`, from the lowest power: a minimax fit in
/// float32, to a relative error of the exponential of 5e-9.
const COEFFICIENTS: [f32; 5] = [
    0.499_999_94,
    0.166_665_2,
    0.041_668_393,
    0.008_368_751,
    0.001_381_456,
];
/// `ln 2` in two parts. Twelve bits of the first leave its multiples by an exponent exact.
const LN_2_HIGH: f32 = 0.693_115_23;
const LN_2_LOW: f32 = 3.194_618_5e-5;
/// Adding it rounds to an integer, which then sits in the lowest bits as the exponent of a float.
const ROUND: f32 = 12_582_912.0 + 127.0;
/// Exponent 0, which makes the result 0: below it floats are subnormal.
const LEAST: f32 = -88.0;

/// `exp(d)` for [`LEAST`]` <= d <= 0` to a relative error of 1.2e-7; exactly 1 at 0, and exactly 0 from
/// -87.7 down.
#[inline(always)]
fn exp_clamped(d: f32) -> f32 {
    let shifted = d * std::f32::consts::LOG2_E + ROUND;
    let power = shifted - ROUND;
    let r = (d - power * LN_2_HIGH) - power * LN_2_LOW;
    // By squares: a shorter chain of operations than one power after the other.
    let [q0, q1, q2, q3, q4] = COEFFICIENTS;
    let square = r * r;
    let q = (q0 + q1 * r) + square * ((q2 + q3 * r) + square * q4);
    let mantissa = (q * square + r) + 1.0;
    mantissa * f32::from_bits(shifted.to_bits() << 23)
}

/// `exp(d)` for `d <= 0`, `-inf` included.
#[inline(always)]
pub(crate) fn exp_or_zero(d: f32) -> f32 {
    exp_clamped(if d > LEAST { d } else { LEAST })
}

/// `sum e_i` and `sum d_i e_i` of `len` values, padded with `-inf` to a whole unit, and their maximum.
#[inline(always)]
pub(crate) fn weigh(values: &Block, len: usize, max: f32) -> (f64, f64) {
    let (mut sums, mut products) = ([0.0_f64; LANES], [0.0_f64; LANES]);
    let padded = &values[..len.next_multiple_of(UNIT).min(values.len())];
    for unit in padded.as_chunks::<UNIT>().0 {
        let (groups, _) = unit.as_chunks::<LANES>();
        let (mut e, mut de) = ([[0.0_f32; LANES]; 4], [[0.0_f32; LANES]; 4]);
        for ((group, e), de) in groups.iter().zip(&mut e).zip(&mut de) {
            for ((&value, e), de) in group.iter().zip(e).zip(de) {
                let d = value - max;
                let d = if d > LEAST { d } else { LEAST };
                *e = exp_clamped(d);
                *de = d * *e;
            }
        }
        // In pairs, so that the sum of equal values is exact.
        for lane in 0..LANES {
            sums[lane] += f64::from((e[0][lane] + e[1][lane]) + (e[2][lane] + e[3][lane]));
            products[lane] += f64::from((de[0][lane] + de[1][lane]) + (de[2][lane] + de[3][lane]));
        }
    }
    (reduce(sums), reduce(products))
}

#[inline(always)]
fn reduce(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// The largest of values padded with `-inf` to a whole unit; NaN is passed over.
#[inline(always)]
pub(crate) fn largest(padded: &[f32]) -> f32 {
    let mut high = [f32::NEG_INFINITY; LANES];
    for group in padded.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let value = group[lane];
            high[lane] = if value > high[lane] {
                value
            } else {
                high[lane]
            };
        }
    }
    let mut max = f32::NEG_INFINITY;
    for value in high {
        max = if value > max { value } else { max };
    }
    max
}

/// Smallest and largest of the values; NaN is passed over.
#[inline(always)]
pub(crate) fn extremes(values: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (groups, rest) = values.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            let value = group[lane];
            low[lane] = if value < low[lane] { value } else { low[lane] };
            high[lane] = if value > high[lane] {
                value
            } else {
                high[lane]
            };
        }
    }
    let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
    for &value in low.iter().chain(rest) {
        min = if value < min { value } else { min };
    }
    for &value in high.iter().chain(rest) {
        max = if value > max { value } else { max };
    }
    (min, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_exponential() {
        let mut worst = 0.0_f64;
        for i in 0..4_000_000_u32 {
            let x = -87.6 * (f64::from(i) / 4e6).powi(3);
            let x = x as f32;
            let exact = libm::exp(f64::from(x));
            worst = worst.max((f64::from(exp_clamped(x)) - exact).abs() / exact);
        }
        assert!(worst < 1.2e-7, "{worst}");
    }

    #[test]
    fn its_ends_are_exact() {
        assert_eq!(exp_clamped(0.0), 1.0);
        assert_eq!(exp_clamped(-0.0), 1.0);
        assert!(exp_clamped(-87.6) > 0.0);
        for x in [-87.7, LEAST] {
            assert_eq!(exp_clamped(x), 0.0);
        }
    }
}
