//! No readout depends on the instruction set, the number of threads or the rest of a batch.

use dlmom_core::{ConsensusSpec, Method, Request, RowReadout};
use dlmom_kernels::{Kernel, Logits, Row, Tier};
use proptest::prelude::*;

use crate::common::{KINDS, Owned, Recipe, Scalar, bits, fused, recipe};

fn kernels() -> Vec<Kernel> {
    Tier::ALL
        .into_iter()
        .filter(|tier| tier.is_available())
        .flat_map(|tier| [1, 2, 3].map(|threads| Kernel::with_tier(tier, threads).unwrap()))
        .collect()
}

fn specs() -> [ConsensusSpec; 4] {
    [Method::Ties, Method::Mean, Method::Poe, Method::Arith].map(ConsensusSpec::of)
}

fn request(ids: &[u32]) -> Request<'_> {
    Request {
        top: 50,
        per_agent_top: 5,
        targets: Some(ids),
        role: ids,
        ..Request::default()
    }
}

fn compare(recipe: &Recipe) -> Result<(), TestCaseError> {
    let rows = recipe.rows();
    let kernels = kernels();
    for spec in specs() {
        let read = |kernel| {
            let (out, preferences) = fused(kernel, &rows, &spec, &request(&[1, 5]));
            let failed = out.finite.contains(&false);
            (
                out,
                if failed {
                    Vec::new()
                } else {
                    bits(&preferences)
                },
            )
        };
        let first = read(&kernels[0]);
        for kernel in &kernels[1..] {
            prop_assert_eq!(
                &read(kernel),
                &first,
                "{} {}",
                kernel.tier(),
                kernel.threads()
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn tiers_and_threads_give_the_same_bits(recipe in recipe(1..9000)) {
        compare(&recipe)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    /// Long enough to be split.
    #[test]
    fn tiers_and_threads_give_the_same_bits_on_long_rows(recipe in recipe(16_384..60_000)) {
        compare(&recipe)?;
    }
}

#[test]
fn a_batch_is_its_rows() {
    let owned: Vec<Vec<Owned>> = (0..9_u64)
        .map(|seed| {
            let recipe = Recipe {
                experts: 1 + seed as usize % 4,
                vocab: 2000 + 311 * seed as usize,
                kind: KINDS[seed as usize % KINDS.len()],
                scalar: [Scalar::F32, Scalar::Bf16, Scalar::F16][seed as usize % 3],
                seed,
                poison: (seed == 4).then_some((0.5, f32::NAN)),
            };
            recipe.rows()
        })
        .collect();
    let views: Vec<Vec<Logits<'_>>> = owned
        .iter()
        .map(|rows| rows.iter().map(Owned::view).collect())
        .collect();
    let specs = specs();
    for kernel in kernels() {
        for count in [0, 1, 2, 9] {
            let mut kept: Vec<Vec<f32>> = vec![Vec::new(); count];
            let mut rows: Vec<Row<'_>> = views[..count]
                .iter()
                .zip(&mut kept)
                .enumerate()
                .map(|(at, (experts, kept))| Row {
                    experts,
                    consensus: &specs[at % specs.len()],
                    request: request(&[3]),
                    preferences: Some(kept),
                })
                .collect();
            let (mut scratch, mut out) = (Vec::new(), vec![RowReadout::default(); 4]);
            kernel.read_rows(&mut rows, &mut scratch, &mut out);
            drop(rows);
            assert_eq!(out.len(), count);
            for (at, out) in out.iter().enumerate() {
                let spec = &specs[at % specs.len()];
                let alone = fused(&kernel, &owned[at], spec, &request(&[3]));
                assert_eq!(*out, alone.0);
                if !out.finite.contains(&false) {
                    assert_eq!(bits(&kept[at]), bits(&alone.1));
                }
            }
        }
    }
}
