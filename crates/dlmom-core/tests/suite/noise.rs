//! Filters, Gumbel and Dirichlet noise, and the control noise of a given divergence.

use std::collections::BTreeMap;
use std::f64::consts::LN_2;

use dlmom_core::noise::{Noised, apply, mix, tilt};
use dlmom_core::{
    FilterSpec, Mixed, NoiseError, NoiseSpec, Purpose, SpecError, Stream, sample_key,
};
use proptest::prelude::*;

use crate::common::{
    assert_near, counts_fit, floats, golden, hex, ids, jensen_shannon, kl, singles, wide,
};

const IDS: [u32; 5] = [900, 3, 77, 151_000, 12];
const PROBS: [f32; 5] = [0.5, 0.25, 0.15, 0.08, 0.02];

fn stream(step: u64) -> Stream {
    Stream {
        seed: 99,
        sample: sample_key("noise", 0, 0),
        step,
    }
}

fn argmax(probs: &[f32]) -> usize {
    (0..probs.len())
        .max_by(|&a, &b| probs[a].total_cmp(&probs[b]))
        .unwrap()
}

fn total(noised: &Noised) -> f64 {
    noised.probs.iter().map(|&p| f64::from(p)).sum()
}

#[test]
fn noise_matches_the_oracle() {
    for case in golden("noise.json").as_array().unwrap() {
        let parameter = case["parameter"].as_f64().unwrap();
        let spec = match case["kind"].as_str().unwrap() {
            "gumbel" => NoiseSpec::Gumbel { tau: parameter },
            _ => NoiseSpec::Dirichlet { lambda: parameter },
        };
        let stream = Stream {
            seed: case["seed"].as_u64().unwrap(),
            sample: hex(&case["sample"]),
            step: case["step"].as_u64().unwrap(),
        };
        let noised = apply(&spec, &ids(&case["ids"]), &singles(&case["probs"]), &stream).unwrap();
        for (&got, want) in noised.probs.iter().zip(floats(&case["noised"])) {
            assert_near(f64::from(got), want, 1e-7);
        }
        assert_near(noised.kl, case["kl"].as_f64().unwrap(), 1e-9);
    }
}

#[test]
fn no_noise_is_no_change() {
    let noised = apply(&NoiseSpec::None, &IDS, &PROBS, &stream(0)).unwrap();
    assert_eq!(
        noised,
        Noised {
            probs: PROBS.to_vec(),
            kl: 0.0
        }
    );
    assert_eq!(
        apply(&NoiseSpec::None, &[], &[], &stream(0)).unwrap().kl,
        0.0
    );
}

#[test]
fn the_largest_gumbel_entry_is_a_fair_draw() {
    for tau in [0.1, 1.0, 3.0] {
        let mut counts = [0; 5];
        for step in 0..20_000 {
            let noised = apply(&NoiseSpec::Gumbel { tau }, &IDS, &PROBS, &stream(step)).unwrap();
            counts[argmax(&noised.probs)] += 1;
        }
        assert!(counts_fit(&counts, &PROBS.map(f64::from)), "{counts:?}");
    }
}

#[test]
fn dirichlet_has_its_mean_and_variance() {
    let n = 20_000;
    for lambda in [0.3, 3.0, 40.0] {
        let spec = NoiseSpec::Dirichlet { lambda };
        let (mut sum, mut square) = ([0.0; 5], [0.0; 5]);
        for step in 0..n {
            let noised = apply(&spec, &IDS, &PROBS, &stream(step)).unwrap();
            for (i, &p) in noised.probs.iter().enumerate() {
                sum[i] += f64::from(p);
                square[i] += f64::from(p).powi(2);
            }
        }
        for (i, &p) in PROBS.iter().enumerate() {
            let p = f64::from(p);
            let mean = sum[i] / n as f64;
            let variance = square[i] / n as f64 - mean * mean;
            let expected = p * (1.0 - p) / (lambda + 1.0);
            assert_near(mean, p, 5.0 * (expected / n as f64).sqrt());
            // The fourth moment is at most the variance's, as values lie in [0, 1].
            assert_near(variance, expected, 6.0 * (expected / n as f64).sqrt());
        }
    }
}

#[test]
fn the_divergence_falls_as_the_noise_does() {
    let mean_kl = |spec: NoiseSpec| {
        (0..500)
            .map(|s| apply(&spec, &IDS, &PROBS, &stream(s)).unwrap().kl)
            .sum::<f64>()
            / 500.0
    };
    let strong = mean_kl(NoiseSpec::Dirichlet { lambda: 1.0 });
    let weak = mean_kl(NoiseSpec::Dirichlet { lambda: 100.0 });
    let none = mean_kl(NoiseSpec::Dirichlet { lambda: 1e15 });
    assert!(
        strong > weak && weak > none && none < 1e-12,
        "{strong} {weak} {none}"
    );
}

#[test]
fn extreme_parameters_stay_finite() {
    let tiny = [1.0_f32, 1e-30, f32::from_bits(1), 0.0];
    let ids = [0, 1, 2, 3];
    let specs = [
        NoiseSpec::Gumbel {
            tau: f64::MIN_POSITIVE,
        },
        NoiseSpec::Gumbel { tau: f64::MAX },
        NoiseSpec::Dirichlet {
            lambda: f64::from_bits(1),
        },
        NoiseSpec::Dirichlet { lambda: 1e-300 },
        NoiseSpec::Dirichlet { lambda: 1e-3 },
        NoiseSpec::Dirichlet { lambda: 1e300 },
        NoiseSpec::Dirichlet { lambda: f64::MAX },
    ];
    for spec in specs {
        for step in 0..200 {
            let noised = apply(&spec, &ids, &tiny, &stream(step)).unwrap();
            assert!(noised.probs.iter().all(|p| p.is_finite() && *p >= 0.0));
            assert_near(total(&noised), 1.0, 1e-6);
            assert!(noised.kl.is_finite() && noised.kl >= 0.0);
            assert_eq!(noised.probs[3], 0.0);
        }
    }
}

#[test]
fn a_vanishing_concentration_picks_one_token_fairly() {
    for lambda in [f64::from_bits(1), 1e-310, 1e-6] {
        let mut counts = [0; 5];
        for step in 0..5000 {
            let spec = NoiseSpec::Dirichlet { lambda };
            let noised = apply(&spec, &IDS, &PROBS, &stream(step)).unwrap();
            counts[argmax(&noised.probs)] += 1;
        }
        assert!(
            counts_fit(&counts, &PROBS.map(f64::from)),
            "{lambda}: {counts:?}"
        );
    }
}

#[test]
fn what_cannot_be_perturbed_is_an_error() {
    let gumbel = NoiseSpec::Gumbel { tau: 1.0 };
    let go = |spec: &NoiseSpec, ids: &[u32], probs: &[f32]| apply(spec, ids, probs, &stream(0));
    assert_eq!(
        go(&gumbel, &[1], &[0.5, 0.5]),
        Err(NoiseError::LengthMismatch { ids: 1, probs: 2 })
    );
    assert_eq!(go(&gumbel, &[], &[]), Err(NoiseError::NoMass));
    assert_eq!(go(&gumbel, &[1, 2], &[0.0, 0.0]), Err(NoiseError::NoMass));
    assert_eq!(
        go(&gumbel, &[1, 2], &[0.5, -0.5]),
        Err(NoiseError::BadProbability { id: 2, value: -0.5 })
    );
    assert!(matches!(
        go(&gumbel, &[1], &[f32::NAN]),
        Err(NoiseError::BadProbability { id: 1, .. })
    ));
    assert_eq!(
        go(&NoiseSpec::Gumbel { tau: 0.0 }, &[1], &[1.0]),
        Err(NoiseError::Spec(SpecError::Range {
            knob: "tau",
            value: "0".into(),
            must: "a finite number above 0",
        }))
    );
}

fn packet() -> impl Strategy<Value = Vec<(u32, f32)>> {
    prop::collection::btree_map(0_u32..200_000, 1e-6_f32..1.0, 1..12)
        .prop_map(|map| map.into_iter().collect::<Vec<_>>())
        .prop_shuffle()
}

fn spec() -> impl Strategy<Value = NoiseSpec> {
    prop_oneof![
        (0.05_f64..5.0).prop_map(|tau| NoiseSpec::Gumbel { tau }),
        (0.05_f64..500.0).prop_map(|lambda| NoiseSpec::Dirichlet { lambda }),
    ]
}

proptest! {
    #[test]
    fn a_draw_belongs_to_its_token_not_its_place(
        (a, b) in packet().prop_flat_map(|p| (Just(p.clone()), Just(p).prop_shuffle())),
        spec in spec(),
        step in 0_u64..1000,
    ) {
        let run = |list: &[(u32, f32)]| {
            let (ids, probs): (Vec<u32>, Vec<f32>) = list.iter().copied().unzip();
            let noised = apply(&spec, &ids, &probs, &stream(step)).unwrap();
            let mut pairs: Vec<_> = ids.into_iter().zip(noised.probs.clone()).collect();
            pairs.sort_by_key(|pair| pair.0);
            (pairs, noised.kl, total(&noised))
        };
        let ((x, kl_x, sum), (y, kl_y, _)) = (run(&a), run(&b));
        for (p, q) in x.iter().zip(&y) {
            prop_assert_eq!(p.0, q.0);
            prop_assert!((p.1 - q.1).abs() < 1e-6);
        }
        prop_assert!((kl_x - kl_y).abs() < 1e-9 * (1.0 + kl_x));
        prop_assert!(kl_x >= 0.0);
        prop_assert!((sum - 1.0).abs() < 1e-6);
    }
}

fn stream_of(case: &serde_json::Value) -> Stream {
    Stream {
        seed: case["seed"].as_u64().unwrap(),
        sample: hex(&case["sample"]),
        step: case["step"].as_u64().unwrap(),
    }
}

/// Filter, Dirichlet noise, the most probable of that, Gumbel noise: by an oracle in Python.
#[test]
fn what_is_mixed_matches_the_oracle() {
    let cases = golden("mix.json");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 45);
    for case in cases {
        let filter: FilterSpec = serde_json::from_value(case["filter"].clone()).unwrap();
        let noise: NoiseSpec = serde_json::from_value(case["noise"].clone()).unwrap();
        let probs = singles(&case["probs"]);
        let mixed = mix(
            &filter,
            &noise,
            &ids(&case["ids"]),
            &probs,
            &stream_of(case),
        )
        .unwrap();
        let want = case["mixed"].as_array().unwrap();
        assert_eq!(mixed.ids.len(), want.len(), "{filter:?} {noise:?}");
        let got: BTreeMap<u32, f32> = mixed.ids.iter().copied().zip(mixed.probs).collect();
        for ((id, q), want) in got.into_iter().zip(want) {
            let want = floats(want);
            assert_eq!(id, want[0] as u32);
            assert_near(f64::from(q), want[1], 1e-7);
        }
        assert_near(mixed.kl, case["kl"].as_f64().unwrap(), 1e-9);
        assert_near(mixed.js, case["js"].as_f64().unwrap(), 1e-9);
    }
}

/// The filter of a packet in its own words: every entry with its probability after temperature,
/// nucleus, min-p and `keep`, in falling order, those dropped at 0.
fn narrowed(filter: &FilterSpec, entries: &[(u32, f64)]) -> Vec<(u32, f64)> {
    let mut list = entries.to_vec();
    list.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let renormalise = |list: &mut Vec<(u32, f64)>| {
        let sum: f64 = list.iter().map(|e| e.1).sum();
        for entry in list.iter_mut() {
            entry.1 /= sum;
        }
    };
    for entry in &mut list {
        entry.1 = entry.1.powf(1.0 / filter.temperature);
    }
    renormalise(&mut list);
    let mut before = 0.0;
    for entry in &mut list {
        let own = entry.1;
        if before >= filter.top_p {
            entry.1 = 0.0;
        }
        before += own;
    }
    renormalise(&mut list);
    let most = list[0].1;
    for entry in &mut list {
        if entry.1 < filter.min_p * most {
            entry.1 = 0.0;
        }
    }
    renormalise(&mut list);
    if filter.keep > 0 {
        list.iter_mut()
            .skip(filter.keep as usize)
            .for_each(|e| e.1 = 0.0);
        renormalise(&mut list);
    }
    list
}

fn filter() -> impl Strategy<Value = FilterSpec> {
    (
        prop_oneof![Just(1.0), 0.3_f64..3.0],
        prop_oneof![Just(1.0), 0.05_f64..1.0],
        prop_oneof![Just(0.0), 0.0_f64..0.9],
        0_u32..14,
    )
        .prop_map(|(temperature, top_p, min_p, keep)| FilterSpec {
            temperature,
            top_p,
            min_p,
            keep,
        })
}

/// The distribution over the packet's own entries, 0 where one was dropped.
fn spread(mixed: &Mixed, ids: &[u32]) -> Vec<f64> {
    let by_id: BTreeMap<u32, f32> = mixed.ids.iter().copied().zip(mixed.probs.clone()).collect();
    ids.iter()
        .map(|id| by_id.get(id).map_or(0.0, |&q| f64::from(q)))
        .collect()
}

proptest! {
    #[test]
    fn filters_are_temperature_then_nucleus_then_min_p_then_keep(
        packet in packet(), filter in filter(), step in 0_u64..1000, tau in prop::option::of(0.2_f64..3.0)
    ) {
        let (ids, probs): (Vec<u32>, Vec<f32>) = packet.into_iter().unzip();
        let sum: f64 = wide(&probs).iter().sum();
        let p: Vec<f64> = wide(&probs).iter().map(|p| p / sum).collect();
        let entries: Vec<(u32, f64)> = ids.iter().copied().zip(p.iter().copied()).collect();
        let noise = tau.map_or(NoiseSpec::None, |tau| NoiseSpec::Gumbel { tau });
        let mixed = mix(&filter, &noise, &ids, &probs, &stream(step)).unwrap();

        // A nucleus or a bar that an entry meets exactly is for rounding to decide.
        let slightly = |by: f64| FilterSpec {
            top_p: if filter.top_p < 1.0 { (filter.top_p + by).min(1.0 - 1e-12) } else { 1.0 },
            min_p: if filter.min_p > 0.0 { (filter.min_p + by).clamp(0.0, 1.0) } else { 0.0 },
            ..filter
        };
        let survivors = |filter: &FilterSpec| narrowed(filter, &entries).iter().filter(|e| e.1 > 0.0).count();
        if survivors(&slightly(1e-9)) != survivors(&slightly(-1e-9)) {
            return Ok(());
        }
        let mut want: Vec<(u32, f64)> =
            narrowed(&filter, &entries).into_iter().filter(|e| e.1 > 0.0).collect();
        if let Some(tau) = tau {
            let powers: Vec<f64> = want
                .iter()
                .map(|&(id, q)| {
                    let u = stream(step).uniform(u64::from(id), Purpose::Gumbel, 0);
                    (q / -u.ln()).powf(1.0 / tau)
                })
                .collect();
            let sum: f64 = powers.iter().sum();
            want.iter_mut().zip(powers).for_each(|(e, power)| e.1 = power / sum);
        }
        let untouched = filter == FilterSpec::NONE;
        if untouched {
            prop_assert_eq!(&mixed.ids, &ids);
        } else {
            // Sorted by the filter; noise does not sort again.
            prop_assert_eq!(&mixed.ids, &want.iter().map(|e| e.0).collect::<Vec<_>>());
        }
        if !(untouched && tau.is_none()) {
            let q = spread(&mixed, &ids);
            for &(id, want) in &want {
                let at = ids.iter().position(|&i| i == id).unwrap();
                prop_assert!((q[at] - want).abs() < 1e-6, "{} {} {}", id, q[at], want);
            }
        }
    }

    /// What was dropped counts in both: nothing of it in one, all of it in the other.
    #[test]
    fn divergences_are_the_textbooks(
        packet in packet(), filter in filter(), noise in spec(), plain in any::<bool>(), step in 0_u64..1000
    ) {
        let (ids, probs): (Vec<u32>, Vec<f32>) = packet.into_iter().unzip();
        let sum: f64 = wide(&probs).iter().sum();
        let p: Vec<f64> = wide(&probs).iter().map(|p| p / sum).collect();
        let noise = if plain { NoiseSpec::None } else { noise };
        let mixed = mix(&filter, &noise, &ids, &probs, &stream(step)).unwrap();
        if filter == FilterSpec::NONE && plain {
            prop_assert_eq!((mixed.kl, mixed.js), (0.0, 0.0));
            return Ok(());
        }
        let mut q = spread(&mixed, &ids);
        let total: f64 = q.iter().sum();
        prop_assert!((total - 1.0).abs() < 1e-6);
        for q in &mut q {
            *q /= total;
        }
        let (wanted_kl, wanted_js) = (kl(&q, &p), jensen_shannon(&[q, p]));
        prop_assert!((mixed.kl - wanted_kl).abs() < 2e-6 * (1.0 + wanted_kl), "{} {}", mixed.kl, wanted_kl);
        prop_assert!((mixed.js - wanted_js).abs() < 2e-6, "{} {}", mixed.js, wanted_js);
        prop_assert!(mixed.kl >= 0.0 && mixed.js >= 0.0 && mixed.js <= LN_2);
    }

    #[test]
    fn with_nothing_asked_the_packet_comes_back_as_it_is(packet in packet(), step in 0_u64..1000) {
        let (ids, probs): (Vec<u32>, Vec<f32>) = packet.into_iter().unzip();
        let mixed = mix(&FilterSpec::default(), &NoiseSpec::None, &ids, &probs, &stream(step)).unwrap();
        prop_assert_eq!(mixed, Mixed { ids, probs, kl: 0.0, js: 0.0 });
    }
}

/// Soft Thinking's logits [3, 2.5, 1, .5, 0, -2] at temperature .6, top-k 5 and top-p .95.
#[test]
fn the_worked_vector_of_soft_thinking() {
    let ids = [0, 1, 2, 3, 4];
    let probs = [3.0_f32, 2.5, 1.0, 0.5, 0.0].map(f32::exp);
    let mixed = |min_p, keep| {
        let filter = FilterSpec {
            temperature: 0.6,
            top_p: 0.95,
            min_p,
            keep,
        };
        mix(&filter, &NoiseSpec::None, &ids, &probs, &stream(0)).unwrap()
    };
    for (min_p, keep) in [(0.0, 0), (0.05, 0), (0.05, 2), (0.0, 4)] {
        let mixed = mixed(min_p, keep);
        assert_eq!(mixed.ids, [0, 1]);
        assert_near(f64::from(mixed.probs[0]), 0.697_059, 1e-6);
        assert_near(f64::from(mixed.probs[1]), 0.302_941, 1e-6);
    }
    assert_eq!(mixed(0.5, 0).ids, [0]);
    assert_eq!(mixed(0.0, 1).probs, [1.0]);
}

#[test]
fn a_nucleus_is_the_shortest_prefix_that_reaches_its_mass() {
    let kept = |top_p, probs: &[f32]| {
        let ids: Vec<u32> = (0..probs.len() as u32).collect();
        let filter = FilterSpec {
            top_p,
            ..FilterSpec::NONE
        };
        mix(&filter, &NoiseSpec::None, &ids, probs, &stream(0))
            .unwrap()
            .ids
    };
    let probs = [0.125_f32, 0.5, 0.25, 0.125];
    assert_eq!(kept(0.5, &probs), [1]);
    assert_eq!(kept(0.500_001, &probs), [1, 2]);
    assert_eq!(kept(0.75, &probs), [1, 2]);
    // Equal probabilities go by id.
    assert_eq!(kept(0.8, &probs), [1, 2, 0]);
    assert_eq!(kept(1e-9, &probs), [1]);
}

#[test]
fn min_p_keeps_what_has_exactly_its_share_of_the_largest() {
    let kept = |min_p| {
        let filter = FilterSpec {
            min_p,
            ..FilterSpec::NONE
        };
        let probs = [0.25, 0.5, 0.125, 0.125];
        mix(&filter, &NoiseSpec::None, &[7, 8, 9, 4], &probs, &stream(0)).unwrap()
    };
    assert_eq!(kept(0.25).ids, [8, 7, 4, 9]);
    assert_eq!(kept(0.250_001).ids, [8, 7]);
    assert_eq!(kept(0.5).ids, [8, 7]);
    assert_eq!(kept(0.500_001).probs, [1.0]);
}

/// `keep` is what is left after Dirichlet noise and what Gumbel noise is given.
#[test]
fn keep_stands_between_the_noises() {
    let filter = FilterSpec {
        keep: 1,
        ..FilterSpec::NONE
    };
    let kept = |noise| {
        (0..300).map(move |step| {
            let mixed = mix(&filter, &noise, &IDS, &PROBS, &stream(step)).unwrap();
            assert_eq!(mixed.probs, [1.0]);
            mixed.ids[0]
        })
    };
    assert!(kept(NoiseSpec::Gumbel { tau: 1.0 }).all(|id| id == IDS[0]));
    let dirichlet = NoiseSpec::Dirichlet { lambda: 2.0 };
    let most = (0..300).map(|step| {
        let noised = apply(&dirichlet, &IDS, &PROBS, &stream(step)).unwrap();
        IDS[argmax(&noised.probs)]
    });
    assert!(kept(dirichlet).eq(most));
    assert!(kept(dirichlet).any(|id| id != IDS[0]));
}

#[test]
fn extreme_filters_leave_a_distribution() {
    let tiny = [1.0_f32, 1e-30, f32::from_bits(1), 0.0];
    let ids = [3, 2, 1, 0];
    let mixed = |filter| mix(&filter, &NoiseSpec::None, &ids, &tiny, &stream(0)).unwrap();
    let at = |temperature| FilterSpec {
        temperature,
        ..FilterSpec::NONE
    };
    // Nothing is left of all but the first, and of zero there is nothing at any temperature.
    assert_eq!(mixed(at(f64::MIN_POSITIVE)).probs, [1.0, 0.0, 0.0, 0.0]);
    let flat = mixed(at(f64::MAX)).probs;
    assert_near(f64::from(flat[2]), 1.0 / 3.0, 1e-6);
    assert_eq!(flat[3], 0.0);
    // Two entries of which one goes are as far as can be from one that was all of the other.
    let one = FilterSpec {
        keep: 1,
        ..FilterSpec::NONE
    };
    let mixed = mix(&one, &NoiseSpec::None, &[7, 8], &[1.0, 1.0], &stream(0)).unwrap();
    assert_near(mixed.kl, LN_2, 1e-15);
    assert_near(
        mixed.js,
        jensen_shannon(&[vec![1.0, 0.0], vec![0.5, 0.5]]),
        1e-15,
    );
}

#[test]
fn what_cannot_be_mixed_is_an_error() {
    let go = |filter: &FilterSpec, ids: &[u32], probs: &[f32]| {
        mix(filter, &NoiseSpec::None, ids, probs, &stream(0))
    };
    let keep = FilterSpec {
        keep: 1,
        ..FilterSpec::NONE
    };
    let unequal = Err(NoiseError::LengthMismatch { ids: 1, probs: 2 });
    assert_eq!(go(&keep, &[1], &[0.5, 0.5]), unequal);
    assert_eq!(go(&FilterSpec::NONE, &[1], &[0.5, 0.5]), unequal);
    assert_eq!(go(&keep, &[], &[]), Err(NoiseError::NoMass));
    assert!(matches!(
        go(&keep, &[1], &[f32::NAN]),
        Err(NoiseError::BadProbability { id: 1, .. })
    ));
    let bad = FilterSpec { top_p: 0.0, ..keep };
    assert_eq!(
        go(&bad, &[1], &[1.0]).unwrap_err().to_string(),
        "filter.top_p is 0; it must be above 0 and at most 1"
    );
    assert_eq!(tilt(&[], &[], &stream(0)), Err(NoiseError::NoMass));
    assert_eq!(tilt(&[1], &[0.5, 0.5], &stream(0)), unequal);
    assert!(matches!(
        tilt(&[1, 2], &[0.5, -0.5], &stream(0)),
        Err(NoiseError::BadProbability { id: 2, .. })
    ));
}

fn direction(id: u32, step: u64) -> f64 {
    stream(step).normal(u64::from(id), Purpose::Tilt, 0)
}

proptest! {
    /// The control is as far from the packet as its top token is, in the direction of one normal draw
    /// per token: the logarithm of every ratio is the draw, by one slope and up to a constant.
    #[test]
    fn a_tilt_is_as_far_as_the_top_token(packet in packet(), step in 0_u64..1000) {
        let (ids, probs): (Vec<u32>, Vec<f32>) = packet.into_iter().unzip();
        let sum: f64 = wide(&probs).iter().sum();
        let p: Vec<f64> = wide(&probs).iter().map(|p| p / sum).collect();
        let target = -p.iter().copied().fold(0.0, f64::max).ln();
        let mixed = tilt(&ids, &probs, &stream(step)).unwrap();
        prop_assert_eq!(&mixed.ids, &ids);
        prop_assert!((mixed.kl - target).abs() <= 1e-9 * target + 1e-14, "{} {}", mixed.kl, target);

        let q = wide(&mixed.probs);
        prop_assert!((q.iter().sum::<f64>() - 1.0).abs() < 1e-6);
        // Float32 holds the probabilities to seven digits, and the divergence with them.
        prop_assert!((kl(&q, &p) - target).abs() < 2e-6 * (1.0 + target));
        prop_assert!((jensen_shannon(&[q.clone(), p.clone()]) - mixed.js).abs() < 2e-6);
        let strongest = (0..ids.len())
            .max_by(|&a, &b| direction(ids[a], step).total_cmp(&direction(ids[b], step)))
            .unwrap();
        if p[strongest] == p.iter().copied().fold(0.0, f64::max) {
            // The draw picks the top token: alone it is exactly that far.
            prop_assert!(q[strongest] > 1.0 - 1e-6);
        } else if ids.len() > 1 {
            let points: Vec<(f64, f64)> = (0..ids.len())
                .filter(|&i| q[i] > 1e-30)
                .map(|i| (direction(ids[i], step), (q[i] / p[i]).ln()))
                .collect();
            let by_draw = |a: &&(f64, f64), b: &&(f64, f64)| a.0.total_cmp(&b.0);
            let low = *points.iter().min_by(by_draw).unwrap();
            let high = *points.iter().max_by(by_draw).unwrap();
            if high.0 - low.0 > 1e-3 {
                let slope = (high.1 - low.1) / (high.0 - low.0);
                prop_assert!(slope > 0.0);
                for (g, ratio) in points {
                    let want = low.1 + slope * (g - low.0);
                    prop_assert!((ratio - want).abs() < 1e-5 * (1.0 + want.abs()), "{} {}", ratio, want);
                }
            }
        }
    }

    #[test]
    fn a_tilt_belongs_to_ids_not_to_places(
        (a, b) in packet().prop_flat_map(|p| (Just(p.clone()), Just(p).prop_shuffle())),
        step in 0_u64..1000,
    ) {
        let run = |list: &[(u32, f32)]| -> BTreeMap<u32, f32> {
            let (ids, probs): (Vec<u32>, Vec<f32>) = list.iter().copied().unzip();
            let mixed = tilt(&ids, &probs, &stream(step)).unwrap();
            mixed.ids.into_iter().zip(mixed.probs).collect()
        };
        for ((x, p), (y, q)) in run(&a).into_iter().zip(run(&b)) {
            prop_assert_eq!(x, y);
            prop_assert!((p - q).abs() < 1e-6);
        }
    }
}

#[test]
fn a_tilt_takes_another_direction_at_every_step_and_for_every_sample() {
    let at = |stream: Stream| tilt(&IDS, &PROBS, &stream).unwrap().probs;
    let base = stream(0);
    let others = [
        stream(1),
        Stream { seed: 1, ..base },
        Stream { sample: 1, ..base },
    ];
    assert_eq!(at(base), at(base));
    for other in others {
        assert_ne!(at(base), at(other));
    }
    // No token is favoured: each gains at some steps and loses at others.
    for (i, &p) in PROBS.iter().enumerate() {
        let gains = (0..200).filter(|&step| at(stream(step))[i] > p).count();
        assert!((20..180).contains(&gains), "token {i} gains {gains} of 200");
    }
}

#[test]
fn a_tilt_at_its_ends() {
    // A certain packet is no distance from itself.
    let certain = tilt(&[4, 9], &[1.0, 0.0], &stream(3)).unwrap();
    assert_eq!(
        (certain.probs, certain.kl, certain.js),
        (vec![1.0, 0.0], 0.0, 0.0)
    );
    // An entry of probability 0 stays 0, however strong its draw.
    for step in 0..50 {
        let mixed = tilt(&[1, 2, 3], &[0.6, 0.0, 0.4], &stream(step)).unwrap();
        assert_eq!(mixed.probs[1], 0.0);
        assert_near(mixed.kl, -0.6_f64.ln(), 1e-7);
    }
    // Of equal tokens, all but one must go.
    let flat = tilt(&[1, 2, 3, 4], &[0.25; 4], &stream(0)).unwrap();
    assert_near(flat.kl, 4_f64.ln(), 1e-9);
    assert_eq!(flat.probs.iter().filter(|&&q| q > 0.999).count(), 1);
}
