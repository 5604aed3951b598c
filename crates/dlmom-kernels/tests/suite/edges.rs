//! Single cases with a reason.

use dlmom_core::{
    Consensus, ConsensusSpec, Draw, MergeGate, Method, Request, RowReadout, SamplingSpec, Stream,
    Tempered, Views,
};
use dlmom_kernels::{Kernel, KernelError, Logits, Scratch, Tier};

use crate::common::{Kind, Owned, Recipe, Scalar, agree, bits, fused, golden};

fn kernel() -> Kernel {
    Kernel::new(1).unwrap()
}

fn rows(experts: usize, vocab: usize, kind: Kind) -> Vec<Owned> {
    let recipe = Recipe {
        experts,
        vocab,
        kind,
        scalar: Scalar::F32,
        seed: 7,
        poison: None,
    };
    recipe.rows()
}

#[test]
fn a_row_without_experts_or_tokens_is_empty() {
    let paper = ConsensusSpec::paper();
    let none = fused(&kernel(), &[], &paper, &Request::default());
    assert_eq!(none, (RowReadout::default(), Vec::new()));
    let empty = vec![Owned::F32(Vec::new()), Owned::Bf16(Vec::new())];
    let (out, _) = fused(&kernel(), &empty, &paper, &Request::default());
    assert_eq!(out.finite, [false, false]);
}

#[test]
fn one_value_that_is_not_finite_names_its_expert_wherever_it_is() {
    for at in [0, 15, 16, 1023, 1024, 2047, 2048, 2499] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut all = rows(3, 2500, Kind::Model);
            let Owned::F32(row) = &mut all[1] else {
                panic!()
            };
            row[at] = bad;
            let request = Request {
                top: 5,
                per_agent_top: 5,
                targets: Some(&[1]),
                ..Request::default()
            };
            let (out, _) = fused(&kernel(), &all, &ConsensusSpec::paper(), &request);
            let want = RowReadout {
                finite: vec![true, false, true],
                ..RowReadout::default()
            };
            assert_eq!(out, want);
        }
    }
}

#[test]
fn logits_that_overflow_once_centred_fail() {
    let good = Owned::F32(vec![1.0, 2.0, 3.0]);
    let huge = Owned::F32(vec![f32::MAX, f32::MIN, f32::MIN]);
    let (out, _) = fused(
        &kernel(),
        &[good, huge],
        &ConsensusSpec::paper(),
        &Request::default(),
    );
    assert_eq!(out.finite, [true, false]);
    assert!(out.entropies.is_empty());
}

/// Sums beyond float32 fail every expert, as in the reference.
#[test]
fn a_product_of_experts_may_overflow() {
    let rows = vec![Owned::F32(vec![3e38, -3e38, 0.0, 0.0]); 2];
    let poe = ConsensusSpec::of(Method::Poe);
    let (out, _) = fused(&kernel(), &rows, &poe, &Request::default());
    assert_eq!(out.finite, [false, false]);
    assert_eq!(out, golden(&rows, &poe, &Request::default()).0);
}

/// The experts' peaks cancel, so that the merged maximum is far below any of theirs.
#[test]
fn a_merged_row_far_below_its_experts_is_as_accurate() {
    let vocab = 5000;
    let row = |peak: usize| {
        let value = |id: usize| {
            if id == peak {
                800.0
            } else {
                (id % 7) as f32 * 0.3
            }
        };
        Owned::F32((0..vocab).map(value).collect())
    };
    let rows = vec![row(3), row(4000), row(2000)];
    let request = Request {
        top: 50,
        ..Request::default()
    };
    for spec in [ConsensusSpec::paper(), ConsensusSpec::of(Method::Mean)] {
        let got = fused(&kernel(), &rows, &spec, &request).0;
        agree(&got, &golden(&rows, &spec, &request).0).unwrap();
    }
}

#[test]
fn one_hot_and_constant_rows_have_exact_entropies() {
    let hot: Vec<f32> = (0..3000)
        .map(|id| if id == 1500 { 1000.0 } else { 0.0 })
        .collect();
    let (out, _) = fused(
        &kernel(),
        &[Owned::F32(hot)],
        &ConsensusSpec::paper(),
        &Request::default(),
    );
    assert_eq!((out.entropies[0], out.merged_entropy), (0.0, 0.0));
    let flat = Owned::F32(vec![-3.7; 3000]);
    let (out, _) = fused(
        &kernel(),
        &[flat],
        &ConsensusSpec::paper(),
        &Request::default(),
    );
    assert_eq!(out.entropies, [libm::log(3000.0)]);
}

struct Negate;

impl Consensus for Negate {
    fn name(&self) -> &'static str {
        "negate"
    }

    fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool {
        for (out, v) in out.iter_mut().zip(views.centred[0]) {
            *out = -v;
        }
        true
    }
}

/// Gates, other operators and tempered requests: bit for bit what the reference says.
#[test]
fn what_is_not_fused_is_the_references_own() {
    let rows = rows(3, 3000, Kind::Model);
    let gated = ConsensusSpec {
        gate: Some(MergeGate {
            max_p: None,
            js: Some(1e9),
            pivot: 1,
        }),
        ..ConsensusSpec::paper()
    };
    let request = Request {
        top: 20,
        ..Request::default()
    };
    let operators: [&dyn Consensus; 2] = [&gated, &Negate];
    for consensus in operators {
        let (got, preferences) = fused(&kernel(), &rows, consensus, &request);
        let (want, reference) = golden(&rows, consensus, &request);
        assert_eq!(got, want);
        assert_eq!(bits(&preferences), bits(&reference));
    }
    let tempered = Some(Tempered {
        target: 5,
        temperatures: &[0.5, 2.0],
    });
    let request = Request {
        tempered,
        ..request
    };
    let paper = ConsensusSpec::paper();
    assert_eq!(
        fused(&kernel(), &rows, &paper, &request).0,
        golden(&rows, &paper, &request).0
    );
}

/// Nothing of a row is left in the next one's readout.
#[test]
fn buffers_are_reused() {
    let paper = ConsensusSpec::paper();
    let kernel = kernel();
    let (mut scratch, mut out) = (Scratch::default(), RowReadout::default());
    let sampling = SamplingSpec {
        temperature: 1.0,
        ..SamplingSpec::GREEDY
    };
    let stream = Stream {
        seed: 1,
        sample: 1,
        step: 1,
    };
    for (experts, vocab, kind) in [
        (3, 5000, Kind::Model),
        (1, 300, Kind::Coarse),
        (9, 700, Kind::Model),
        (2, 2, Kind::Small),
        (2, 4000, Kind::Huge),
        (4, 1025, Kind::Model),
    ] {
        let rows = rows(experts, vocab, kind);
        let views: Vec<Logits<'_>> = rows.iter().map(Owned::view).collect();
        let request = Request {
            top: 10,
            per_agent_top: 3,
            targets: Some(&[1]),
            role: &[0],
            draw: Some(Draw { sampling, stream }),
            ..Request::default()
        };
        kernel.read_row(&views, &paper, &request, None, &mut scratch, &mut out);
        agree(&out, &golden(&rows, &paper, &request).0).unwrap();
    }
}

#[test]
fn a_tier_that_the_processor_lacks_is_an_error() {
    for tier in Tier::ALL {
        match Kernel::with_tier(tier, 0) {
            Ok(kernel) => assert_eq!((kernel.tier(), kernel.threads()), (tier, 1)),
            Err(KernelError::Tier { tier: missing }) => assert_eq!(missing, tier),
            Err(e) => panic!("{e}"),
        }
    }
    assert!(Tier::best().is_available());
    assert_eq!(Tier::Avx512.to_string(), "avx512");
}
