//! An exponential made of additions and multiplications alone.
//!
//! The platform's `exp` differs in its last bits between systems and stands in the way of
//! vectorisation; a row of logits takes it V times per expert and step.

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
#[inline]
pub(crate) fn exp_nonpositive(x: f64) -> f64 {
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

#[cfg(test)]
mod tests {
    use super::*;

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
