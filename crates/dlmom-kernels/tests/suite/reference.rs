//! Fuzzed rows: everything the reference says, and entropies by the textbook.

use dlmom_core::{
    Calibrate, ConsensusSpec, Draw, Method, Request, RowReadout, SamplingSpec, Stream, WeightRule,
    Weights,
};
use dlmom_kernels::Kernel;
use proptest::prelude::*;

use crate::common::{Kind, Owned, Recipe, Scalar, agree, bits, fused, golden, recipe};

fn spec() -> impl Strategy<Value = ConsensusSpec> {
    let method = prop_oneof![
        4 => Just(Method::Ties),
        2 => Just(Method::Mean),
        1 => Just(Method::Poe),
        1 => Just(Method::Arith),
        1 => Just(Method::Best),
    ];
    let theta = prop::sample::select(vec![0.1_f32, 0.0, 0.5, 3.0, f32::INFINITY]);
    let eps = prop::sample::select(vec![1e-6_f32, 0.0, 1.0]);
    let weights = prop::option::of(prop::collection::vec(0.0_f64..3.0, 1..9));
    (method, theta, eps, weights, 0_usize..8).prop_map(|(method, theta, eps, weights, rare)| {
        let mut spec = ConsensusSpec {
            method,
            theta,
            eps,
            ..ConsensusSpec::paper()
        };
        if let (Some(mut weights), false) = (weights, method == Method::Ties) {
            weights[0] += 0.1;
            spec.weights = Weights::Fixed(weights);
        }
        match rare {
            0 => {
                spec.calibrate = Calibrate::Temperature;
                spec.temperatures = vec![0.5, 2.0, 1.3, 0.9];
            }
            1 => spec.calibrate = Calibrate::Zscore,
            2 => spec.weights = Weights::Rule(WeightRule::Entropy),
            _ => {}
        }
        spec
    })
}

/// What is asked: lengths of lists, ids, and whether and how a token is drawn.
#[derive(Clone, Debug)]
struct Asked {
    top: usize,
    per_agent_top: usize,
    ids: Vec<u32>,
    sampling: Option<SamplingSpec>,
}

impl Asked {
    fn request(&self) -> Request<'_> {
        let stream = Stream {
            seed: 1,
            sample: 2,
            step: 3,
        };
        Request {
            top: self.top,
            per_agent_top: self.per_agent_top,
            targets: Some(&self.ids),
            role: &self.ids,
            seen: &self.ids,
            draw: self.sampling.map(|sampling| Draw { sampling, stream }),
            ..Request::default()
        }
    }
}

fn asked() -> impl Strategy<Value = Asked> {
    let sampling = (
        prop::sample::select(vec![0.0, 0.7, 1.0]),
        prop::sample::select(vec![1.0, 1.3]),
    )
        .prop_map(|(temperature, repetition_penalty)| SamplingSpec {
            temperature,
            repetition_penalty,
            ..SamplingSpec::GREEDY
        });
    let top = prop_oneof![
        Just(0_usize),
        Just(1),
        Just(50),
        0_usize..300,
        Just(usize::MAX)
    ];
    (
        top,
        prop::sample::select(vec![0_usize, 1, 7, 50]),
        prop::collection::vec(0_u32..3000, 0..5),
        prop::option::of(sampling),
    )
        .prop_map(|(top, per_agent_top, ids, sampling)| Asked {
            top,
            per_agent_top,
            ids,
            sampling,
        })
}

fn check(recipe: &Recipe, spec: &ConsensusSpec, asked: &Asked) -> Result<(), TestCaseError> {
    let rows = recipe.rows();
    let kernel = Kernel::new(1).unwrap();
    let request = asked.request();
    let (got, preferences) = fused(&kernel, &rows, spec, &request);
    let (want, reference) = golden(&rows, spec, &request);
    if let Err(field) = agree(&got, &want) {
        return Err(TestCaseError::fail(format!("{field}: {got:?} {want:?}")));
    }
    if want.finite.iter().all(|&f| f) {
        prop_assert_eq!(bits(&preferences), bits(&reference));
        let worst = entropy_error(&rows, &preferences, &got);
        prop_assert!(worst < 1e-6, "{}", worst);
    }
    Ok(())
}

/// `-sum p ln p` by the textbook, in f64.
fn entropy(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::MIN, f32::max);
    let max = f64::from(max);
    let weights: Vec<f64> = row.iter().map(|&z| libm::exp(f64::from(z) - max)).collect();
    let sum: f64 = weights.iter().sum();
    let terms = weights.iter().map(|w| w / sum).filter(|&p| p > 0.0);
    -terms.map(|p| p * libm::log(p)).sum::<f64>()
}

fn entropy_error(rows: &[Owned], preferences: &[f32], got: &RowReadout) -> f64 {
    let own = rows.iter().zip(&got.entropies);
    own.map(|(row, &h)| (entropy(&row.wide()) - h).abs())
        .fold((entropy(preferences) - got.merged_entropy).abs(), f64::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn short_rows_are_the_references(recipe in recipe(1..200), spec in spec(), asked in asked()) {
        check(&recipe, &spec, &asked)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn rows_of_some_blocks_are_the_references(
        recipe in recipe(900..5000),
        spec in spec(),
        asked in asked(),
    ) {
        check(&recipe, &spec, &asked)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn long_rows_are_the_references(
        recipe in recipe(30_000..200_000),
        spec in spec(),
        mut asked in asked(),
    ) {
        asked.top = asked.top.min(1000);
        check(&recipe, &spec, &asked)?;
    }
}

/// The accuracy that is promised, on rows as models have them and on the worst that are known.
#[test]
fn entropies_of_a_full_vocabulary_are_far_within_their_tolerance() {
    let kernel = Kernel::new(1).unwrap();
    for scalar in [Scalar::F32, Scalar::Bf16, Scalar::F16] {
        for (kind, bound) in [
            (Kind::Model, 5e-8),
            (Kind::Plateau, 3e-7),
            (Kind::Comb, 6e-7),
        ] {
            for seed in 0..4 {
                let recipe = Recipe {
                    experts: 3,
                    vocab: 151_936,
                    kind,
                    scalar,
                    seed,
                    poison: None,
                };
                let rows = recipe.rows();
                let request = Request {
                    top: 50,
                    ..Request::default()
                };
                let (got, preferences) = fused(&kernel, &rows, &ConsensusSpec::paper(), &request);
                let worst = entropy_error(&rows, &preferences, &got);
                println!("{kind:?} {scalar:?} {worst:e}");
                assert!(worst < bound, "{kind:?} {scalar:?}: {worst:e}");
            }
        }
    }
}
