//! The readout of a row against textbook formulas.

use dlmom_core::{
    Calibrate, Center, Consensus, ConsensusSpec, Draw, MergeGate, Method, Request, RowReadout,
    SamplingSpec, Scratch, Stream, Tempered, Trim, Views, WeightRule, Weights, compare_rows, draw,
    read_row, stats,
};
use proptest::prelude::*;

use crate::common::{assert_near, floats, golden, ids, rows, singles, slices, softmax, wide};

fn read(experts: &[Vec<f32>], consensus: &dyn Consensus, request: &Request<'_>) -> RowReadout {
    let mut out = RowReadout::default();
    read_row(
        &slices(experts),
        consensus,
        request,
        &mut Scratch::default(),
        &mut out,
    );
    out
}

#[test]
fn readouts_match_the_oracle() {
    for case in golden("readout.json").as_array().unwrap() {
        let logits: Vec<Vec<f32>> = case["logits"]
            .as_array()
            .unwrap()
            .iter()
            .map(singles)
            .collect();
        let spec = ConsensusSpec::of(serde_json::from_value(case["method"].clone()).unwrap());
        let (role, targets) = (ids(&case["role"]), ids(&case["targets"]));
        let request = Request {
            top: 10,
            per_agent_top: 1,
            targets: Some(&targets),
            draw: None,
            role: &role,
            ..Request::default()
        };
        let row = read(&logits, &spec, &request);
        assert_eq!(row.ids, ids(&case["ids"]));
        let near = |got: &[f64], want: &[f64]| {
            assert_eq!(got.len(), want.len());
            got.iter()
                .zip(want)
                .for_each(|(&a, &b)| assert_near(a, b, 2e-6));
        };
        near(&row.entropies, &floats(&case["entropies"]));
        near(&wide(&row.probs), &floats(&case["probs"]));
        near(&row.target_logprobs, &floats(&case["target_logprobs"]));
        near(
            &[
                row.merged_entropy,
                f64::from(row.mass),
                f64::from(row.role_mass),
            ],
            &["merged_entropy", "mass", "role_mass"].map(|key| case[key].as_f64().unwrap()),
        );
        for (own, want) in row
            .per_agent
            .iter()
            .zip(case["per_agent_top1"].as_array().unwrap())
        {
            let want = floats(want);
            assert_eq!(own[0].0, want[0] as u32);
            assert_near(f64::from(own[0].1), want[1], 1e-6);
        }
    }
}

/// One specification per code path of consensus.
fn any_operator() -> Vec<ConsensusSpec> {
    let methods = [
        Method::Ties,
        Method::Mean,
        Method::Arith,
        Method::Poe,
        Method::Best,
        Method::Mixture,
    ];
    let mut specs: Vec<ConsensusSpec> = methods.map(ConsensusSpec::of).to_vec();
    let centres = [Center::Mean, Center::TopkUnion, Center::Reference];
    let trims = [Trim::Abs, Trim::Density, Trim::Std];
    specs.extend(
        centres
            .into_iter()
            .zip(trims)
            .map(|(center, trim)| ConsensusSpec {
                center,
                trim,
                spectral: Some(1),
                weights: Weights::Rule(WeightRule::Margin),
                calibrate: Calibrate::Zscore,
                gate: Some(MergeGate {
                    max_p: Some(0.9),
                    js: Some(0.1),
                    pivot: 0,
                }),
                ..ConsensusSpec::paper()
            }),
    );
    specs
}

proptest! {
    #[test]
    fn readouts_are_consistent(
        rows in rows(1..5, 1..60),
        top in 0_usize..70,
        per_agent_top in 0_usize..5,
        role in prop::collection::vec(0_u32..80, 0..6),
        targets in prop::collection::vec(0_u32..60, 0..6),
        mean in any::<bool>(),
    ) {
        let vocab = rows[0].len();
        let spec = if mean { ConsensusSpec::of(Method::Mean) } else { ConsensusSpec::paper() };
        let request =
            Request { top, per_agent_top, targets: Some(&targets), role: &role, ..Request::default() };
        let row = read(&rows, &spec, &request);

        let centred: Vec<Vec<f32>> = rows
            .iter()
            .map(|row| {
                let mean = wide(row).iter().sum::<f64>() / vocab as f64;
                row.iter().map(|&z| (f64::from(z) - mean) as f32).collect()
            })
            .collect();
        let mut merged = vec![0.0; vocab];
        let views = Views { centred: &slices(&centred), stats: &[], stream: None };
        spec.merge(&views, &mut merged);
        let p = softmax(&wide(&merged));

        prop_assert!(row.finite.iter().all(|&f| f));
        prop_assert_eq!(row.ids.len(), top.min(vocab));
        let ordered = row.ids.windows(2).zip(row.probs.windows(2)).all(|(ids, probs)| {
            probs[0] > probs[1] || (probs[0] == probs[1] && ids[0] < ids[1])
        });
        prop_assert!(ordered);
        let mass: f64 = row.ids.iter().map(|&id| p[id as usize]).sum();
        prop_assert!((f64::from(row.mass) - mass).abs() < 1e-6);
        for (&id, &got) in row.ids.iter().zip(&row.probs) {
            prop_assert!((f64::from(got) - p[id as usize] / mass).abs() < 1e-6);
        }
        let left_out = (0..vocab as u32)
            .filter(|id| !row.ids.contains(id))
            .map(|id| merged[id as usize])
            .fold(f32::MIN, f32::max);
        prop_assert!(row.ids.iter().all(|&id| merged[id as usize] >= left_out));
        if !row.probs.is_empty() {
            prop_assert!((wide(&row.probs).iter().sum::<f64>() - 1.0).abs() < 1e-5);
        }
        let mut distinct = role.clone();
        distinct.sort_unstable();
        distinct.dedup();
        let role_mass: f64 = distinct.iter().filter_map(|&id| p.get(id as usize)).sum();
        prop_assert!((f64::from(row.role_mass) - role_mass).abs() < 1e-6);
        for (index, &id) in targets.iter().enumerate() {
            let exact = p.get(id as usize).map_or(f64::NEG_INFINITY, |p| p.ln());
            let got = row.target_logprobs[index];
            prop_assert!(got == exact || (got - exact).abs() < 1e-6);
            for (own, logits) in row.per_agent_target_logprobs.iter().zip(&rows) {
                let p = softmax(&wide(logits));
                let exact = p.get(id as usize).map_or(f64::NEG_INFINITY, |p| p.ln());
                prop_assert!(own[index] == exact || (own[index] - exact).abs() < 1e-6);
            }
        }
        prop_assert_eq!(row.per_agent.len(), rows.len());
        for (own, logits) in row.per_agent.iter().zip(&rows) {
            prop_assert_eq!(own.len(), per_agent_top.min(vocab));
            let p = softmax(&wide(logits));
            prop_assert!(own.iter().all(|&(id, q)| (f64::from(q) - p[id as usize]).abs() < 1e-6));
        }
        prop_assert!((row.merged_entropy - stats(&merged).entropy).abs() < 1e-6);
    }

    #[test]
    fn any_bits_are_survived(
        rows in (1_usize..4, 0_usize..20).prop_flat_map(|(k, v)| {
            prop::collection::vec(prop::collection::vec(any::<f32>(), v), k)
        }),
    ) {
        let sampling = SamplingSpec {
            temperature: 1.0,
            top_p: 0.9,
            repetition_penalty: 1.5,
            ..SamplingSpec::GREEDY
        };
        let stream = Stream { seed: 0, sample: 0, step: 0 };
        let request = Request {
            top: 3,
            per_agent_top: 3,
            targets: Some(&[0, 99]),
            draw: Some(Draw { sampling, stream }),
            seen: &[1, 99],
            stream: Some(stream),
            tempered: Some(Tempered { target: 2, temperatures: &[0.5, 4.0] }),
            role: &[0, 99],
        };
        for spec in any_operator() {
            let row = read(&rows, &spec, &request);
            prop_assert_eq!(row.finite.len(), rows.len());
            if row.finite.iter().all(|&f| f) {
                prop_assert!(row.merged_entropy.is_finite());
                prop_assert!(row.probs.iter().all(|p| p.is_finite()));
                prop_assert!(row.drawn.is_some());
            } else {
                prop_assert_eq!(row.clone(), RowReadout { finite: row.finite, ..Default::default() });
            }
        }
    }

    /// Of every expert by itself, whatever they merge to.
    #[test]
    fn tempered_log_probabilities_are_those_of_divided_logits(
        rows in rows(1..5, 1..60),
        target in 0_u32..70,
        temperatures in prop::collection::vec(0.1_f64..10.0, 0..5),
    ) {
        let tempered = Some(Tempered { target, temperatures: &temperatures });
        let row = read(&rows, &ConsensusSpec::paper(), &Request { tempered, ..Request::default() });
        prop_assert_eq!(row.tempered.len(), rows.len());
        for (got, logits) in row.tempered.iter().zip(&rows) {
            prop_assert_eq!(got.len(), temperatures.len());
            for (got, t) in got.iter().zip(&temperatures) {
                let p = softmax(&wide(logits).iter().map(|z| z / t).collect::<Vec<_>>());
                let want = p.get(target as usize).map_or(f64::NEG_INFINITY, |p| p.ln());
                prop_assert!(*got == want || (got - want).abs() < 1e-9 * (1.0 + want.abs()));
            }
        }
        let plain = read(&rows, &ConsensusSpec::paper(), &Request::default());
        prop_assert!(plain.tempered.is_empty());
    }

    #[test]
    fn drift_matches_the_direct_sums(pair in rows(2..3, 1..200)) {
        let got = compare_rows(&pair[0], &pair[1]);
        let (p, q) = (softmax(&wide(&pair[0])), softmax(&wide(&pair[1])));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        prop_assert!((got.kl - kl).abs() < 1e-9 * (1.0 + kl));
        prop_assert!(got.kl >= 0.0 && got.cosine.abs() <= 1.0);
        let same = compare_rows(&pair[0], &pair[0]);
        prop_assert!(same.kl == 0.0 && (same.cosine - 1.0).abs() < 1e-12);
        let mirrored: Vec<f32> = pair[0].iter().map(|z| -z).collect();
        let constant = pair[0].iter().all(|z| *z == pair[0][0]);
        let opposite = compare_rows(&pair[0], &mirrored).cosine;
        let expected = if constant { 1.0 } else { -1.0 };
        prop_assert!((opposite - expected).abs() < 1e-12);
    }
}

#[test]
fn one_failed_expert_fails_the_row_and_says_which() {
    let mut out = RowReadout::default();
    let mut scratch = Scratch::default();
    let good = [1.0_f32, 2.0, 3.0];
    let request = Request {
        top: 2,
        per_agent_top: 2,
        targets: Some(&[1]),
        ..Request::default()
    };
    read_row(
        &[&good, &good],
        &ConsensusSpec::paper(),
        &request,
        &mut scratch,
        &mut out,
    );
    assert_eq!(out.per_agent.len(), 2);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let broken = [1.0, bad, 3.0];
        read_row(
            &[&good, &broken],
            &ConsensusSpec::paper(),
            &request,
            &mut scratch,
            &mut out,
        );
        assert_eq!(
            out,
            RowReadout {
                finite: vec![true, false],
                ..RowReadout::default()
            }
        );
    }
    // Finite, but not once centred in float32.
    let huge = [f32::MAX, f32::MIN, f32::MIN];
    read_row(
        &[&good, &huge],
        &ConsensusSpec::paper(),
        &request,
        &mut scratch,
        &mut out,
    );
    assert_eq!(
        out,
        RowReadout {
            finite: vec![true, false],
            ..RowReadout::default()
        }
    );
}

#[test]
fn a_row_without_experts_or_tokens_is_empty() {
    let out = read(&[], &ConsensusSpec::of(Method::Mean), &Request::default());
    assert_eq!(out, RowReadout::default());
    let out = read(
        &[vec![], vec![]],
        &ConsensusSpec::of(Method::Mean),
        &Request::default(),
    );
    assert_eq!(
        out,
        RowReadout {
            finite: vec![false, false],
            ..RowReadout::default()
        }
    );
}

struct Broken;

impl Consensus for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn merge(&self, _views: &Views<'_>, out: &mut [f32]) -> bool {
        out.fill(f32::NAN);
        true
    }
}

#[test]
fn an_operator_that_breaks_the_row_fails_every_expert() {
    let rows = vec![vec![1.0_f32, 2.0]; 2];
    let request = Request {
        top: 1,
        ..Request::default()
    };
    let out = read(&rows, &Broken, &request);
    assert_eq!(
        out,
        RowReadout {
            finite: vec![false, false],
            ..RowReadout::default()
        }
    );
    // One expert needs no operator.
    assert_eq!(read(&rows[..1], &Broken, &request).ids, [1]);
}

#[test]
fn equal_probabilities_are_in_id_order() {
    // Distinct logits whose probabilities are one float32.
    let row = vec![0.0_f32, 1e-12, 2e-12, 0.0];
    let out = read(
        &[row],
        &ConsensusSpec::of(Method::Mean),
        &Request {
            top: 4,
            ..Request::default()
        },
    );
    assert_eq!(out.ids, [0, 1, 2, 3]);
    assert_eq!(out.probs, [0.25; 4]);
    assert_eq!(out.mass, 1.0);
}

#[test]
fn the_draw_is_from_the_whole_merged_row() {
    let sampling = SamplingSpec {
        temperature: 2.0,
        ..SamplingSpec::GREEDY
    };
    let rows = vec![vec![0.5_f32, -0.5, 0.25, -0.25]; 3];
    let mut seen = [false; 4];
    for step in 0..100 {
        let wanted = Draw {
            sampling,
            stream: Stream {
                seed: 1,
                sample: 2,
                step,
            },
        };
        let request = Request {
            top: 1,
            draw: Some(wanted),
            ..Request::default()
        };
        let out = read(&rows, &ConsensusSpec::of(Method::Mean), &request);
        assert_eq!(out.drawn, Some(draw(&rows[0], &wanted, &[])));
        seen[out.drawn.unwrap() as usize] = true;
    }
    assert_eq!(seen, [true; 4]);
}

#[test]
fn a_readout_says_whether_experts_were_merged_and_whether_they_agree() {
    let (a, b) = (vec![3.0_f32, 1.0, 0.0], vec![0.0_f32, 1.0, 3.0]);
    let close = vec![2.0_f32, 1.5, 0.0];
    let flags = |rows: &[Vec<f32>], spec: &ConsensusSpec| {
        let row = read(rows, spec, &Request::default());
        (row.merged, row.agreed)
    };
    let gated = |js| ConsensusSpec {
        gate: Some(MergeGate {
            max_p: None,
            js: Some(js),
            pivot: 1,
        }),
        ..ConsensusSpec::paper()
    };
    let paper = ConsensusSpec::paper();
    assert_eq!(flags(&[a.clone(), close.clone()], &paper), (true, true));
    assert_eq!(flags(&[a.clone(), b.clone()], &paper), (true, false));
    // Equal logits: the first of the most probable counts.
    let even = vec![3.0_f32, 3.0, 0.0];
    assert_eq!(flags(&[a.clone(), even], &paper), (true, true));
    // Alone there is nothing to merge and no one to disagree with, under any operator.
    for spec in any_operator() {
        assert_eq!(flags(std::slice::from_ref(&b), &spec), (false, true));
    }
    assert_eq!(flags(&[a.clone(), b.clone()], &gated(0.2)), (true, false));
    assert_eq!(
        flags(&[a.clone(), close.clone()], &gated(0.2)),
        (false, true)
    );
    // Where the gate is closed the pivot's distribution is read out.
    let request = Request {
        top: 3,
        ..Request::default()
    };
    let closed = read(&[a, close.clone()], &gated(0.2), &request);
    let alone = read(&[close], &paper, &request);
    assert_eq!((closed.ids, closed.probs), (alone.ids, alone.probs));
    assert_eq!(closed.entropies.len(), 2);
}

/// Operators that draw and the draw of a token each have their own request.
#[test]
fn streams_and_printed_tokens_reach_what_they_are_for() {
    let rows = vec![vec![5.0_f32, 0.0], vec![0.0_f32, 5.0]];
    let mixture = ConsensusSpec::of(Method::Mixture);
    let first = |step: Option<u64>| {
        let request = Request {
            top: 1,
            stream: step.map(|step| Stream {
                seed: 1,
                sample: 2,
                step,
            }),
            ..Request::default()
        };
        read(&rows, &mixture, &request).ids[0]
    };
    let drawn: Vec<u32> = (0..100).map(|step| first(Some(step))).collect();
    assert!(drawn.contains(&0) && drawn.contains(&1));
    assert_eq!(
        drawn,
        (0..100).map(|step| first(Some(step))).collect::<Vec<_>>()
    );
    assert!((0..100).all(|_| first(None) == 1));

    let stream = Stream {
        seed: 1,
        sample: 2,
        step: 0,
    };
    let sampling = SamplingSpec {
        repetition_penalty: 2.0,
        ..SamplingSpec::GREEDY
    };
    let printed = |seen: &[u32]| {
        let request = Request {
            draw: Some(Draw { sampling, stream }),
            seen,
            ..Request::default()
        };
        let close = vec![vec![1.0_f32, 0.9]; 2];
        read(&close, &ConsensusSpec::of(Method::Mean), &request).drawn
    };
    assert_eq!(printed(&[]), Some(0));
    assert_eq!(printed(&[0]), Some(1));
    assert_eq!(printed(&[1]), Some(0));
}

#[test]
fn a_warm_readout_keeps_its_buffers() {
    let row: Vec<f32> = (0..500_u16).map(|i| f32::from(i * 7 % 31)).collect();
    let request = Request {
        top: 64,
        per_agent_top: 8,
        targets: Some(&[1, 2]),
        ..Request::default()
    };
    let mut scratch = Scratch::default();
    let mut out = RowReadout::default();
    let mut go = |out: &mut RowReadout| {
        read_row(
            &[&row, &row],
            &ConsensusSpec::paper(),
            &request,
            &mut scratch,
            out,
        );
    };
    go(&mut out);
    let before = (out.clone(), addresses(&out));
    go(&mut out);
    assert_eq!((out.clone(), addresses(&out)), before);
}

fn addresses(out: &RowReadout) -> Vec<usize> {
    vec![
        out.ids.as_ptr() as usize,
        out.probs.as_ptr() as usize,
        out.entropies.as_ptr() as usize,
        out.per_agent.as_ptr() as usize,
        out.per_agent[1].as_ptr() as usize,
        out.per_agent_target_logprobs[1].as_ptr() as usize,
        out.target_logprobs.as_ptr() as usize,
    ]
}

#[test]
fn drift_of_degenerate_rows() {
    let flat = compare_rows(&[1.0, 1.0], &[5.0, 5.0]);
    assert_eq!((flat.kl, flat.cosine), (0.0, 1.0));
    assert_eq!(compare_rows(&[1.0, 1.0], &[0.0, 5.0]).cosine, 0.0);
    for bad in [
        compare_rows(&[f32::NAN, 1.0], &[1.0, 1.0]),
        compare_rows(&[], &[]),
    ] {
        assert!(bad.kl.is_nan() && bad.cosine.is_nan());
    }
}
