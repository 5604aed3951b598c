//! An exponential and a logarithm without branches and tables.
//!
//! The platform's differ in their last bits between systems and stand in the way of vectorisation; a
//! row of logits takes them V times per expert and step.

const LOG2_E: f64 = std::f64::consts::LOG2_E;
/// `ln 2` in two parts; multiples of the first by an exponent are exact.
const LN_2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// Adding it rounds to an integer, which then sits in the lowest bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// Below it results would be subnormal.
const LEAST: f64 = -708.0;

/// Taylor coefficients `1 / n!` from the highest; on `|r| <= ln 2 / 2` the rest is below 1e-14.
const COEFFICIENTS: [f64; 10] = [
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
];

/// `exp(x)` for `x <= 0` (or slightly above), to a relative error of 1e-14, and the same bits
/// everywhere; 0 below -708, where a double would soon underflow, and for NaN.
#[expect(
    clippy::inline_always,
    reason = "compiled for the instruction set of its caller"
)]
#[inline(always)]
#[must_use]
pub fn exp_nonpositive(x: f64) -> f64 {
    let clamped = if x > LEAST { x } else { LEAST };
    let shifted = clamped * LOG2_E + ROUND;
    let power = shifted - ROUND;
    let r = (clamped - power * LN_2_HIGH) - power * LN_2_LOW;
    let mut tail = COEFFICIENTS[0];
    for &coefficient in &COEFFICIENTS[1..] {
        tail = tail * r + coefficient;
    }
    let mantissa = (tail * r + 1.0) * r + 1.0;
    let scale = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x >= LEAST { mantissa * scale } else { 0.0 }
}

/// The mantissa from which on the exponent is one higher: the square root of a half.
const HALF_ROOT: u64 = 0x3FE6_A09E_667F_3BCD;
/// A double whose lowest bits hold an integer.
const INTEGER: u64 = 0x4330_0000_0000_0000;
/// Coefficients `2 / (2 n + 1)` of `ln m = sum c_n s^(2 n + 1)`, `s = (m - 1) / (m + 1)`, from the highest
/// and without the first; on `|s| <= 0.172` the rest is below 1e-16.
const ODD: [f64; 9] = [
    2.0 / 19.0,
    2.0 / 17.0,
    2.0 / 15.0,
    2.0 / 13.0,
    2.0 / 11.0,
    2.0 / 9.0,
    2.0 / 7.0,
    2.0 / 5.0,
    2.0 / 3.0,
];

/// `ln x` for a finite `x >= 1`, to an error of 4e-16 of the larger of 1 and the result; 0 at 1.
#[expect(
    clippy::inline_always,
    reason = "compiled for the instruction set of its caller"
)]
#[inline(always)]
#[must_use]
pub fn ln_from_one(x: f64) -> f64 {
    let exponent = x.to_bits().wrapping_sub(HALF_ROOT) >> 52;
    let m = f64::from_bits(x.to_bits().wrapping_sub(exponent << 52));
    let power = f64::from_bits(INTEGER | exponent) - f64::from_bits(INTEGER);
    let s = (m - 1.0) / (m + 1.0);
    let square = s * s;
    let mut tail = ODD[0];
    for &coefficient in &ODD[1..] {
        tail = tail * square + coefficient;
    }
    power * LN_2_HIGH + (power * LN_2_LOW + (2.0 * s + tail * square * s))
}

/// `ln sum_i exp(terms_i)`, relative to the largest term, so that none is lost.
#[expect(
    clippy::inline_always,
    reason = "compiled for the instruction set of its caller"
)]
#[inline(always)]
#[must_use]
pub fn log_sum_exp(terms: &[f64]) -> f64 {
    let mut largest = f64::NEG_INFINITY;
    for &term in terms {
        largest = if term > largest { term } else { largest };
    }
    let mut sum = 0.0;
    for &term in terms {
        sum += exp_nonpositive(term - largest);
    }
    largest + ln_from_one(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_logarithm() {
        for i in 0..1_000_000_u32 {
            let x = 1.0 + 100.0 * (f64::from(i) / 1e6).powi(4);
            let exact = libm::log(x);
            assert!(
                (ln_from_one(x) - exact).abs() <= 4e-16 * exact.max(1.0),
                "{x}"
            );
        }
        for x in [1.0, 2.0, 3.0, 8.0, 1e300, f64::MAX] {
            assert!((ln_from_one(x) - libm::log(x)).abs() <= 2e-15 * libm::log(x));
        }
        assert_eq!(ln_from_one(1.0), 0.0);
        assert_eq!(log_sum_exp(&[f64::NEG_INFINITY, -7.5]), -7.5);
    }

    #[test]
    fn it_is_the_exponential() {
        for i in 0..2_000_000_u32 {
            let x = -708.0 * (f64::from(i) / 2e6).powi(3);
            let exact = libm::exp(x);
            assert!((exp_nonpositive(x) - exact).abs() <= 2e-14 * exact, "{x}");
        }
    }

    #[test]
    fn its_ends_are_exact() {
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-0.0), 1.0);
        assert!(exp_nonpositive(-708.0) > 0.0);
        for x in [-708.1, -1e300, f64::NEG_INFINITY, f64::NAN] {
            assert_eq!(exp_nonpositive(x), 0.0);
        }
    }
}
