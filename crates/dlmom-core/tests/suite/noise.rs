//! Gumbel and Dirichlet noise.

use dlmom_core::noise::{Noised, apply};
use dlmom_core::{NoiseError, NoiseSpec, SpecError, Stream, sample_key};
use proptest::prelude::*;

use crate::common::{assert_near, counts_fit, floats, golden, hex, ids, singles};

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
        Err(NoiseError::Spec(SpecError::Tau { value: 0.0 }))
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
