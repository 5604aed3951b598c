//! Ranks of entropies among a pilot's.

use dlmom_core::{Ranks, RanksError};
use proptest::prelude::*;

/// Samples with repeated values, as entropies of certain steps are.
fn sample() -> impl Strategy<Value = Vec<f64>> {
    let value = prop_oneof![Just(0.0), Just(0.25), 0.0_f64..1.0];
    prop::collection::vec(value, 2..60)
}

proptest! {
    #[test]
    fn a_rank_is_above_q_where_the_entropy_is_above_the_quantile(
        sample in sample(), q in 0.0_f64..1.0, h in 0.0_f64..1.0
    ) {
        let ranks = Ranks::of(&sample, 101).unwrap();
        let bar = ranks.value(q);
        if (h - bar).abs() > 1e-9 {
            prop_assert_eq!(ranks.rank(h) > q, h > bar);
        }
    }

    #[test]
    fn ranks_and_quantiles_undo_each_other(sample in sample(), q in 0.0_f64..=1.0) {
        let ranks = Ranks::of(&sample, 37).unwrap();
        let value = ranks.value(q);
        // On a flat piece the smallest of the ranks with that quantile; the quantile itself may have been
        // rounded up to where such a piece begins.
        prop_assert!(ranks.rank(value - 1e-12) <= q + 1e-9);
        prop_assert!((ranks.value(ranks.rank(value)) - value).abs() < 1e-9);
    }

    #[test]
    fn ranks_rise_with_entropy_and_stay_in_the_unit_interval(
        sample in sample(), mut h in prop::collection::vec(-0.5_f64..1.5, 2)
    ) {
        let ranks = Ranks::of(&sample, 11).unwrap();
        h.sort_by(f64::total_cmp);
        let (low, high) = (ranks.rank(h[0]), ranks.rank(h[1]));
        prop_assert!(low <= high && (0.0..=1.0).contains(&low) && (0.0..=1.0).contains(&high));
    }

    #[test]
    fn about_a_share_of_the_sample_is_above_its_quantile(
        values in prop::collection::hash_set(0_u32..100_000, 20..80), q in 0.05_f64..0.95
    ) {
        let sample: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
        let ranks = Ranks::of(&sample, 1001).unwrap();
        let above = sample.iter().filter(|&&h| ranks.rank(h) > q).count() as f64;
        let expected = (1.0 - q) * sample.len() as f64;
        prop_assert!((above - expected).abs() <= 1.5, "{} against {}", above, expected);
    }
}

#[test]
fn quantiles_are_those_of_the_order_statistics() {
    let ranks = Ranks::of(&[3.0, 1.0, 2.0, 5.0], 4).unwrap();
    assert_eq!(ranks.values(), [1.0, 2.0, 3.0, 5.0]);
    assert_eq!(
        [0.0, 0.5, 5.0 / 6.0, 1.0, 7.0].map(|q| ranks.value(q)),
        [1.0, 2.5, 4.0, 5.0, 5.0]
    );
    assert_eq!(
        [0.0, 1.0, 1.5, 5.0, 6.0].map(|h| ranks.rank(h)),
        [0.0, 0.0, 1.0 / 6.0, 1.0, 1.0]
    );
}

#[test]
fn the_ranks_of_a_uniform_sample_are_its_values() {
    let ranks = Ranks::identity();
    for h in [0.0, 0.1, 0.5, 0.625, 1.0] {
        assert_eq!((ranks.rank(h), ranks.value(h)), (h, h));
    }
    assert_eq!((ranks.rank(-1.0), ranks.rank(2.0)), (0.0, 1.0));
}

#[test]
fn ties_take_the_lowest_rank_so_that_equal_is_not_above() {
    let ranks = Ranks::new(vec![0.0, 0.0, 0.0, 0.5, 1.0]).unwrap();
    assert_eq!(ranks.rank(0.0), 0.0);
    assert!(ranks.rank(1e-9) > 0.5);
}

#[test]
fn lists_that_are_no_quantiles_are_refused_also_when_read() {
    assert_eq!(Ranks::of(&[1.0], 5), Err(RanksError::TooFew { count: 1 }));
    assert_eq!(
        Ranks::of(&[1.0, f64::NAN], 5),
        Err(RanksError::Order { at: 1 })
    );
    assert_eq!(
        Ranks::new(vec![0.0, 2.0, 1.0]),
        Err(RanksError::Order { at: 2 })
    );
    let ranks: Ranks = serde_json::from_str("[0.0, 0.5, 1.0]").unwrap();
    assert_eq!(serde_json::to_string(&ranks).unwrap(), "[0.0,0.5,1.0]");
    let error = serde_json::from_str::<Ranks>("[1.0, 0.5]").unwrap_err();
    assert!(error.to_string().starts_with("quantile 1 is not"));
}
