//! Statistics of small binary samples and paired comparisons.

use serde::{Deserialize, Serialize};

/// Two-sided 95 % quantile of the normal distribution.
const Z95: f64 = 1.959_963_984_540_054;

/// A closed interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Lower end.
    pub lo: f64,
    /// Upper end.
    pub hi: f64,
}

/// Wilson's 95 % interval for a proportion `p` seen in `n` independent trials; `None` for `n = 0`.
///
/// `p` may be a mean over seeds, so `p n` need not be a whole number. (E. B. Wilson, JASA 22, 1927.)
#[must_use]
pub fn wilson(p: f64, n: u64) -> Option<Interval> {
    if n == 0 || !(0.0..=1.0).contains(&p) {
        return None;
    }
    let n = n as f64;
    let z2 = Z95 * Z95;
    let centre = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    // At the edges the exact ends are 0 and 1; rounding may miss them by one unit in the last place.
    let lo = if p == 0.0 {
        0.0
    } else {
        (centre - half).max(0.0)
    };
    let hi = if p == 1.0 {
        1.0
    } else {
        (centre + half).min(1.0)
    };
    Some(Interval { lo, hi })
}

/// Arithmetic mean; `None` without values.
#[must_use]
pub fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// Sample standard deviation (`ddof = 1`); `None` for fewer than two values.
#[must_use]
pub fn sample_std(values: &[f64]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let m = mean(values)?;
    let squares: f64 = values.iter().map(|v| (v - m) * (v - m)).sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// Two-sided exact McNemar test: the probability, under equal odds, of a split of the `n01 + n10` discordant pairs at least
/// as uneven as this one. 1 where no pair is discordant.
#[must_use]
pub fn mcnemar_exact(n01: u64, n10: u64) -> f64 {
    let n = n01 + n10;
    if n == 0 {
        return 1.0;
    }
    // ln C(n, k) - n ln 2, built up term by term; summed from the smallest term.
    let ln_half_n = -(n as f64) * std::f64::consts::LN_2;
    let mut ln_choose = 0.0;
    let mut tail = 0.0;
    for k in 0..=n01.min(n10) {
        if k > 0 {
            ln_choose += ((n - k + 1) as f64).ln() - (k as f64).ln();
        }
        tail += (ln_choose + ln_half_n).exp();
    }
    (2.0 * tail).min(1.0)
}

/// Holm's step-down adjustment of p-values, in the order given. (S. Holm, Scand. J. Statist. 6, 1979.)
#[must_use]
pub fn holm(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    let mut adjusted = vec![0.0; p_values.len()];
    let mut floor: f64 = 0.0;
    for (rank, index) in order.into_iter().enumerate() {
        let scaled = (p_values.len() - rank) as f64 * p_values[index];
        floor = floor.max(scaled.min(1.0));
        adjusted[index] = floor;
    }
    adjusted
}

/// Smallest difference of two accuracies that `n` paired items of which a share `discordance` differ would show with 80 %
/// power at the 5 % level: `2.8 sqrt(d / n)`. `None` without items or discordant pairs.
#[must_use]
pub fn minimum_detectable_difference(n: u64, discordance: f64) -> Option<f64> {
    (n > 0 && discordance > 0.0).then(|| 2.8 * (discordance / n as f64).sqrt())
}

/// The `q` quantile of ascending `sorted` values, linear between neighbours (NumPy's default); `None` without values.
#[must_use]
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    let position = q.clamp(0.0, 1.0) * last as f64;
    let below = position.floor() as usize;
    let above = (below + 1).min(last);
    Some(sorted[below] + (position - below as f64) * (sorted[above] - sorted[below]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn close(a: f64, b: f64, tolerance: f64) {
        assert!((a - b).abs() <= tolerance, "{a} is not {b}");
    }

    #[test]
    fn wilson_matches_published_intervals() {
        // Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
        for (k, n, lo, hi) in [
            (81.0, 263, 0.2553, 0.3662),
            (15.0, 148, 0.0624, 0.1605),
            (0.0, 20, 0.0, 0.1611),
            (1.0, 29, 0.0061, 0.1718),
        ] {
            let interval = wilson(k / n as f64, n).unwrap();
            close(interval.lo, lo, 5e-5);
            close(interval.hi, hi, 5e-5);
        }
        assert_eq!(wilson(1.0, 7).unwrap().hi, 1.0);
        assert_eq!(wilson(0.5, 0), None);
        assert_eq!(wilson(f64::NAN, 3), None);
        let half = wilson(0.8, 50).unwrap();
        close((half.hi - half.lo) / 2.0, 0.109, 5e-4);
    }

    #[test]
    fn standard_deviation_divides_by_n_minus_one() {
        close(
            sample_std(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap(),
            2.138_089_935_299_395,
            1e-12,
        );
        assert_eq!(sample_std(&[1.0]), None);
        assert_eq!(mean(&[]), None);
    }

    #[test]
    fn mcnemar_is_the_exact_binomial_test() {
        close(mcnemar_exact(5, 1), 0.218_75, 1e-12);
        close(mcnemar_exact(10, 2), 0.038_574_218_75, 1e-12);
        assert_eq!(mcnemar_exact(0, 0), 1.0);
        assert_eq!(mcnemar_exact(3, 3), 1.0);
        close(mcnemar_exact(0, 10), 2.0 / 1024.0, 1e-15);
        // 2 sum_{k <= 480} C(1000, k) / 2^1000 in integer arithmetic.
        close(mcnemar_exact(480, 520), 0.217_448_293_204_140_94, 1e-12);
    }

    #[test]
    fn holm_steps_down_and_keeps_the_order() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (a, b) in adjusted.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            close(*a, b, 1e-12);
        }
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn detectable_differences_match_the_reference_table() {
        close(
            minimum_detectable_difference(30, 0.05).unwrap(),
            0.114,
            5e-4,
        );
        close(
            minimum_detectable_difference(1319, 0.2).unwrap(),
            0.034,
            5e-4,
        );
        assert_eq!(minimum_detectable_difference(0, 0.1), None);
        assert_eq!(minimum_detectable_difference(10, 0.0), None);
    }

    #[test]
    fn quantiles_are_numpys() {
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.5), Some(2.5));
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.9), Some(3.7));
        assert_eq!(quantile(&[5.0], 0.9), Some(5.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    proptest! {
        #[test]
        fn p_values_are_probabilities_and_symmetric(a in 0u64..3000, b in 0u64..3000) {
            let p = mcnemar_exact(a, b);
            prop_assert!((0.0..=1.0).contains(&p));
            prop_assert_eq!(p, mcnemar_exact(b, a));
        }

        #[test]
        fn wilson_holds_the_proportion(k in 0u64..500, extra in 0u64..500) {
            let n = k + extra;
            prop_assume!(n > 0);
            let p = k as f64 / n as f64;
            let interval = wilson(p, n).unwrap();
            prop_assert!(0.0 <= interval.lo && interval.lo <= p && p <= interval.hi && interval.hi <= 1.0);
        }
    }
}
