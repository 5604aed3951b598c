//! Entropy and selection on one row.

use dlmom_core::{normalized, stats, top_k};
use proptest::prelude::*;

use crate::common::{assert_near, logit, softmax, wide};

proptest! {
    #[test]
    fn stats_match_the_direct_sums(row in prop::collection::vec(logit(), 1..3000)) {
        let s = stats(&row);
        let z = wide(&row);
        let p = softmax(&z);
        let direct: f64 = -p.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>();
        prop_assert!(s.finite);
        assert_near(s.entropy, direct, 1e-9);
        assert_near(s.log_z, z.iter().map(|z| z.exp()).sum::<f64>().ln(), 1e-9);
        assert_near(s.mean, z.iter().sum::<f64>() / z.len() as f64, 1e-9);
        prop_assert_eq!(f64::from(s.max), z.iter().copied().fold(f64::MIN, f64::max));
        // The first of several.
        prop_assert_eq!(Some(s.best as usize), row.iter().position(|&z| z == s.max));
        prop_assert!(s.entropy >= 0.0 && s.entropy <= (row.len() as f64).ln() + 1e-9);
        prop_assert!(normalized(s.entropy, row.len()) <= 1.0 + 1e-9);
    }

    #[test]
    fn one_bad_value_anywhere_is_seen(
        mut row in prop::collection::vec(logit(), 1..2000),
        at in any::<prop::sample::Index>(),
        bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        let at = at.index(row.len());
        row[at] = bad;
        let s = stats(&row);
        prop_assert!(!s.finite);
        prop_assert_eq!((s.entropy, s.log_z, s.mean, s.max, s.best), (0.0, 0.0, 0.0, 0.0, 0));
    }

    #[test]
    fn any_bits_are_survived(row in prop::collection::vec(any::<f32>(), 0..50)) {
        let s = stats(&row);
        prop_assert_eq!(s.finite, !row.is_empty() && row.iter().all(|z| z.is_finite()));
        prop_assert!(s.entropy.is_finite() && s.log_z.is_finite() && s.mean.is_finite());
    }

    #[test]
    fn top_k_is_the_head_of_a_full_sort(
        values in prop::collection::vec(
            prop_oneof![
                prop::sample::select(vec![
                    f32::NEG_INFINITY, -1.0, -0.0, 0.0, 1.0, f32::INFINITY, f32::NAN,
                ]),
                -2.0_f32..2.0,
            ],
            0..400,
        ),
        k in 0_usize..450,
    ) {
        // Selection by repeatedly removing the first maximum, NaN counting as less than anything.
        let rank = |v: f32| if v.is_nan() { (0, 0.0) } else { (1, v) };
        let mut left: Vec<(u32, f32)> = (0..).zip(values.iter().copied()).collect();
        let mut expected = Vec::new();
        while expected.len() < k && !left.is_empty() {
            let mut best = 0;
            for i in 1..left.len() {
                if rank(left[i].1) > rank(left[best].1) {
                    best = i;
                }
            }
            expected.push(left.remove(best));
        }
        let mut got = vec![(9, 9.0)];
        top_k(&values, k, &mut got);
        let bits = |list: &[(u32, f32)]| list.iter().map(|e| (e.0, e.1.to_bits())).collect::<Vec<_>>();
        prop_assert_eq!(bits(&got), bits(&expected));
    }
}

#[test]
fn entropy_of_known_rows() {
    assert_eq!(stats(&[3.5]).entropy, 0.0);
    assert_near(stats(&[-7.0; 1500]).entropy, 1500_f64.ln(), 1e-12);
    assert_near(stats(&[f32::MAX; 4]).entropy, 4_f64.ln(), 1e-12);
    assert_eq!(stats(&[f32::MAX, f32::MIN]).entropy, 0.0);
    assert!(!stats(&[]).finite);
}

#[test]
fn normalised_entropy_of_small_vocabularies_is_0() {
    assert_eq!(normalized(1.0, 0), 0.0);
    assert_eq!(normalized(1.0, 1), 0.0);
    assert_near(normalized(2_f64.ln(), 4), 0.5, 1e-15);
}

#[test]
fn selection_keeps_its_buffer() {
    let values: Vec<f32> = (0..1000_u16).map(|i| f32::from(i * 37 % 1000)).collect();
    let mut out = Vec::new();
    top_k(&values, 64, &mut out);
    let (pointer, capacity) = (out.as_ptr(), out.capacity());
    top_k(&values, 64, &mut out);
    assert_eq!((out.as_ptr(), out.capacity()), (pointer, capacity));
    assert_eq!(out[0].1, 999.0);
}
