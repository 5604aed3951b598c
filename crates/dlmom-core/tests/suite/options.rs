//! Every consensus operator with every option against its transcription, and what stays true of all.

use dlmom_core::{
    Calibrate, Center, Consensus, ConsensusSpec, Elect, MergeGate, Method, Stream, Tie, Trim,
    Views, WeightRule, Weights,
};
use proptest::prelude::*;

use crate::common::{assert_near, counts_fit, jensen_shannon, logit, softmax, wide};
use crate::transcription::{
    Experts, Poll, Verdict, Votes, calibrated, is_the_papers, transcribe, union, weigh,
};

const METHODS: [Method; 6] = [
    Method::Ties,
    Method::Mean,
    Method::Arith,
    Method::Poe,
    Method::Best,
    Method::Mixture,
];

const STREAM: Stream = Stream {
    seed: 3,
    sample: 1,
    step: 0,
};

fn merge_with(spec: &ConsensusSpec, experts: &Experts, stream: Option<Stream>) -> (Vec<f32>, bool) {
    let mut out = vec![f32::NAN; experts.centred[0].len()];
    let merged = experts.with_views(|views| spec.merge(&Views { stream, ..*views }, &mut out));
    (out, merged)
}

fn merge(spec: &ConsensusSpec, experts: &Experts) -> Vec<f32> {
    merge_with(spec, experts, Some(STREAM)).0
}

fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|v| v.to_bits()).collect()
}

fn near(got: &[f32], want: impl IntoIterator<Item = f64>) {
    let mut count = 0;
    for (&got, want) in got.iter().zip(want) {
        assert_near(f64::from(got), want, 2e-5 * (1.0 + want.abs()));
        count += 1;
    }
    assert_eq!(count, got.len());
}

/// Rows of two to eight experts: strangers, variations on one row, or copies; in half of them the
/// union of the 256 most probable tokens leaves some out.
fn logits() -> impl Strategy<Value = Vec<Vec<f32>>> {
    let vocab = prop_oneof![1_usize..40, 300_usize..700];
    (2_usize..9, vocab, 0..4).prop_flat_map(|(k, v, kind)| {
        prop::collection::vec(prop::collection::vec(logit(), v), k).prop_map(move |mut rows| {
            let first = rows[0].clone();
            for (e, row) in rows.iter_mut().enumerate().skip(1) {
                match kind {
                    0 => {}
                    1 => row
                        .iter_mut()
                        .zip(&first)
                        .for_each(|(z, b)| *z = b + 0.2 * *z),
                    2 => row.clone_from(&first),
                    _ if e % 2 == 0 => row.clone_from(&first),
                    _ => {}
                }
            }
            rows
        })
    })
}

/// Centred, or rows whose grid thresholds can hit exactly.
fn experts() -> impl Strategy<Value = Experts> {
    (logits(), any::<bool>()).prop_map(|(logits, bare)| {
        if bare {
            Experts::bare(&logits)
        } else {
            Experts::of(&logits)
        }
    })
}

fn weights() -> impl Strategy<Value = Weights> {
    prop_oneof![
        2 => Just(Weights::default()),
        1 => Just(Weights::Rule(WeightRule::Entropy)),
        1 => Just(Weights::Rule(WeightRule::Margin)),
        // Small integers and tenths, of which some polls come out even.
        3 => (prop::collection::vec(0_u8..4, 8), prop::sample::select(vec![1.0, 0.1])).prop_map(
            |(mut list, unit)| {
                list[0] = list[0].max(1);
                Weights::Fixed(list.into_iter().map(|w| f64::from(w) * unit).collect())
            }
        ),
    ]
}

fn gate() -> impl Strategy<Value = Option<MergeGate>> {
    let bar = || prop::option::of(0.01_f64..1.0);
    prop_oneof![
        3 => Just(None),
        1 => (bar(), bar(), 0_u32..8).prop_map(|(max_p, js, pivot)| Some(MergeGate {
            max_p: if js.is_none() { max_p.or(Some(0.5)) } else { max_p },
            js,
            pivot,
        })),
    ]
}

/// Knobs of `ties`.
fn ties() -> impl Strategy<Value = ConsensusSpec> {
    (
        prop::sample::select(vec![Center::Mean, Center::TopkUnion, Center::Reference]),
        prop_oneof![
            (
                Just(Trim::Abs),
                prop::sample::select(vec![0.0_f32, 0.1, 0.5, 3.0])
            ),
            (
                Just(Trim::Std),
                prop::sample::select(vec![0.0_f32, 0.3, 1.0, 2.0])
            ),
            (
                Just(Trim::Density),
                prop::sample::select(vec![0.01_f32, 0.2, 0.5, 1.0])
            ),
        ],
        prop::sample::select(vec![Elect::Count, Elect::Mass]),
        prop::sample::select(vec![Tie::Zero, Tie::Mean]),
        prop_oneof![2 => Just(None), 1 => (1_u32..9).prop_map(Some)],
        prop::sample::select(vec![0.0_f32, 1e-6, 0.5]),
        0_u32..8,
    )
        .prop_map(
            |(center, (trim, theta), elect, tie, spectral, eps, reference)| ConsensusSpec {
                theta,
                eps,
                center,
                reference,
                trim,
                elect,
                tie,
                spectral,
                ..ConsensusSpec::paper()
            },
        )
}

/// Any specification; lists and places are for eight experts until [`fit`] cuts them.
fn any_spec() -> impl Strategy<Value = ConsensusSpec> {
    let method = prop_oneof![
        5 => ties(),
        5 => prop::sample::select(METHODS[1..].to_vec()).prop_map(ConsensusSpec::of),
    ];
    let calibrate = prop_oneof![
        2 => Just(Calibrate::None),
        1 => Just(Calibrate::Temperature),
        1 => Just(Calibrate::Zscore),
    ];
    let temperatures = prop::collection::vec(0.3_f64..3.0, 8);
    (method, weights(), calibrate, temperatures, gate()).prop_map(
        |(spec, weights, calibrate, temperatures, gate)| ConsensusSpec {
            weights,
            calibrate,
            temperatures: if calibrate == Calibrate::Temperature {
                temperatures
            } else {
                Vec::new()
            },
            gate,
            ..spec
        },
    )
}

/// The specification for this many experts, valid.
fn fit(mut spec: ConsensusSpec, experts: usize) -> ConsensusSpec {
    if let Weights::Fixed(list) = &mut spec.weights {
        list.truncate(experts);
    }
    spec.temperatures.truncate(experts);
    if spec.center == Center::Reference {
        spec.reference %= experts as u32;
    } else {
        spec.reference = 0;
    }
    if let Some(gate) = &mut spec.gate {
        gate.pivot %= experts as u32;
    }
    spec.validate(Some(experts)).unwrap();
    spec
}

/// The same specification with the experts in another order; `order[i]` is who comes to place i.
fn reordered(spec: &ConsensusSpec, order: &[usize]) -> ConsensusSpec {
    let mut spec = spec.clone();
    let place = |e: u32| order.iter().position(|&o| o == e as usize).unwrap() as u32;
    if let Weights::Fixed(list) = &mut spec.weights {
        *list = order.iter().map(|&e| list[e]).collect();
    }
    if !spec.temperatures.is_empty() {
        spec.temperatures = order.iter().map(|&e| spec.temperatures[e]).collect();
    }
    if spec.center == Center::Reference {
        spec.reference = place(spec.reference);
    }
    if let Some(gate) = &mut spec.gate {
        gate.pivot = place(gate.pivot);
    }
    spec
}

proptest! {
    #[test]
    fn every_specification_is_its_transcription(
        experts in experts(), spec in any_spec(), step in 0_u64..1000
    ) {
        let spec = fit(spec, experts.centred.len());
        // A deviation is that of a centred row.
        let experts = match spec.calibrate {
            Calibrate::Zscore => Experts::of(&experts.centred),
            _ => experts,
        };
        let stream = Stream { step, ..STREAM };
        let (got, merged) = merge_with(&spec, &experts, Some(stream));
        let uniform = stream.uniform(0, dlmom_core::Purpose::Expert, 0);
        let rows = calibrated(&spec, &experts.centred);
        let is_row = |e: usize| {
            got.iter().zip(&rows[e]).all(|(&got, want)| {
                (f64::from(got) - want).abs() <= 1e-6 * want.abs()
            })
        };
        match transcribe(&spec, &experts.centred, uniform) {
            Verdict::Unclear => {}
            Verdict::Closed(pivot) => {
                prop_assert!(!merged);
                prop_assert!(is_row(pivot));
            }
            Verdict::Row(fits) => {
                prop_assert!(merged);
                prop_assert!(fits.into_iter().any(is_row));
            }
            Verdict::Values(values) => {
                prop_assert!(merged);
                for (j, (&got, told)) in got.iter().zip(values).enumerate() {
                    let error = (f64::from(got) - told.value).abs();
                    prop_assert!(
                        !told.clear || error <= 2e-5 * (1.0 + told.value.abs()),
                        "token {}: {} for {:?}", j, got, told
                    );
                }
            }
        }
    }

    /// Statistics of the logits before centring, or none: the rows say the same either way.
    #[test]
    fn statistics_are_a_convenience(logits in logits(), method in prop::sample::select(METHODS.to_vec())) {
        let given = Experts::of(&logits);
        let none = Experts { stats: Vec::new(), ..given.clone() };
        let spec = ConsensusSpec::of(method);
        if method == Method::Best {
            // Entropies of equal rows differ by rounding; which of them is copied does not matter.
            return Ok(());
        }
        near(&merge(&spec, &given), merge(&spec, &none).into_iter().map(f64::from));
    }

    #[test]
    fn one_expert_is_itself_under_every_specification(
        row in prop::collection::vec(logit(), 1..400), spec in any_spec()
    ) {
        let spec = fit(spec, 1);
        let experts = Experts::of(&[row]);
        let (out, merged) = merge_with(&spec, &experts, Some(STREAM));
        prop_assert_eq!(bits(&out), bits(&experts.centred[0]));
        prop_assert!(!merged);
    }

    #[test]
    fn the_order_of_experts_does_not_matter(
        (logits, order) in logits().prop_flat_map(|rows| {
            let order: Vec<usize> = (0..rows.len()).collect();
            (Just(rows), Just(order).prop_shuffle())
        }),
        spec in any_spec(),
    ) {
        let experts = Experts::of(&logits);
        let spec = fit(spec, logits.len());
        if matches!(spec.method, Method::Mixture | Method::Best) {
            return Ok(());
        }
        let Verdict::Values(values) = transcribe(&spec, &experts.centred, 0.5) else {
            return Ok(());
        };
        let shuffled: Vec<Vec<f32>> = order.iter().map(|&e| logits[e].clone()).collect();
        let a = merge(&spec, &experts);
        let b = merge(&reordered(&spec, &order), &Experts::of(&shuffled));
        for ((a, b), told) in a.iter().zip(&b).zip(values) {
            if told.clear {
                prop_assert!((a - b).abs() <= 2e-5 * (1.0 + a.abs()), "{} and {}", a, b);
            }
        }
    }

    /// What agrees is not changed, but for trimming, the offset, and the scale of a sum.
    #[test]
    fn equal_experts_merge_to_themselves(
        row in prop::collection::vec(logit(), 1..700), k in 2_usize..9, spec in any_spec()
    ) {
        // Temperatures differ and make equal rows unequal; scores do not.
        let calibrate = match spec.calibrate {
            Calibrate::Zscore => Calibrate::Zscore,
            _ => Calibrate::None,
        };
        let temperatures = Vec::new();
        let spec = fit(ConsensusSpec { gate: None, calibrate, temperatures, ..spec }, k);
        let experts = Experts::of(&vec![row; k]);
        let own = wide(&experts.centred[0]);
        let log_sum = own.iter().map(|v| v.exp()).sum::<f64>().ln();
        let out = merge(&spec, &experts);
        match spec.method {
            Method::Mean | Method::Best | Method::Mixture => near(&out, own),
            Method::Poe => near(&out, own.iter().map(|v| k as f64 * v)),
            Method::Arith => near(&out, own.iter().map(|v| v - log_sum)),
            // The base is all there is: no one differs from it.
            Method::Ties if spec.center == Center::Reference => {
                near(&out, own.iter().map(|v| v - log_sum));
            }
            Method::Ties => {
                let whole = ConsensusSpec {
                    center: Center::Mean, trim: Trim::Abs, theta: 0.0, eps: 0.0, ..spec
                };
                near(&merge(&whole, &experts), own);
            }
        }
    }

    /// The product of experts is the logarithmic pool at K times the sharpness.
    #[test]
    fn poe_is_k_times_the_mean(experts in experts(), weights in weights()) {
        let k = experts.centred.len();
        let of = |method| fit(ConsensusSpec { weights: weights.clone(), ..ConsensusSpec::of(method) }, k);
        let mean = merge(&of(Method::Mean), &experts);
        near(&merge(&of(Method::Poe), &experts), mean.iter().map(|&v| k as f64 * f64::from(v)));
    }

    /// The linear pool's row is the logarithm of a distribution.
    #[test]
    fn arith_is_the_logarithm_of_the_mean_of_the_probabilities(
        experts in experts(), weights in weights()
    ) {
        let k = experts.centred.len();
        let spec = fit(ConsensusSpec { weights, ..ConsensusSpec::of(Method::Arith) }, k);
        let p: Vec<Vec<f64>> = experts.centred.iter().map(|row| softmax(&wide(row))).collect();
        let weights = weigh(&spec, &p);
        let total: f64 = weights.iter().sum();
        let mut sum = 0.0;
        for (j, &got) in merge(&spec, &experts).iter().enumerate() {
            let pooled = (0..k).map(|e| weights[e] * p[e][j]).sum::<f64>() / total;
            let probability = f64::from(got).exp();
            prop_assert!((probability - pooled).abs() <= 1e-4 * pooled);
            sum += probability;
        }
        prop_assert!((sum - 1.0).abs() < 1e-5);
    }

    /// No token is farther from the experts' mean log-probability than some expert's own.
    #[test]
    fn arith_stays_among_the_experts(experts in experts(), weights in weights()) {
        let k = experts.centred.len();
        let spec = fit(ConsensusSpec { weights, ..ConsensusSpec::of(Method::Arith) }, k);
        let logs: Vec<Vec<f64>> = experts
            .centred
            .iter()
            .map(|row| softmax(&wide(row)).into_iter().map(f64::ln).collect())
            .collect();
        for (j, &got) in merge(&spec, &experts).iter().enumerate() {
            let low = logs.iter().map(|row| row[j]).fold(f64::INFINITY, f64::min);
            let high = logs.iter().map(|row| row[j]).fold(f64::NEG_INFINITY, f64::max);
            let slack = 1e-5 * (1.0 + low.abs());
            prop_assert!((low - slack..=high + slack).contains(&f64::from(got)));
        }
    }

    /// One expert's whole row, bit for bit.
    #[test]
    fn best_and_mixture_pick_whole_rows(experts in experts(), weights in weights(), step in 0_u64..1000) {
        let k = experts.centred.len();
        for method in [Method::Best, Method::Mixture] {
            let spec = fit(ConsensusSpec { weights: weights.clone(), ..ConsensusSpec::of(method) }, k);
            let (out, merged) = merge_with(&spec, &experts, Some(Stream { step, ..STREAM }));
            prop_assert!(merged);
            prop_assert!(experts.centred.iter().any(|row| bits(row) == bits(&out)));
        }
    }

    #[test]
    fn a_rank_of_all_experts_changes_nothing(experts in experts(), spec in ties(), over in 0_u32..3) {
        let k = experts.centred.len();
        let spec = fit(ConsensusSpec { elect: Elect::Mass, ..spec }, k);
        let voters = if spec.center == Center::Reference { k - 1 } else { k };
        let whole = ConsensusSpec { spectral: Some(voters as u32 + over), ..spec.clone() };
        let none = ConsensusSpec { spectral: None, ..spec };
        prop_assert_eq!(bits(&merge(&whole, &experts)), bits(&merge(&none, &experts)));
    }

    /// Preferences in proportion share one direction, so rank 1 holds them all.
    #[test]
    fn rank_one_holds_proportional_preferences(
        row in prop::collection::vec(logit(), 2..700),
        scales in prop::collection::vec(prop_oneof![-3.0_f32..-0.1, 0.1_f32..3.0], 2..9),
        spec in ties(),
    ) {
        let rows: Vec<Vec<f32>> = scales
            .iter()
            .map(|s| row.iter().map(|v| s * v).collect())
            .collect();
        // Differences of log-probabilities are not in proportion; trimming has its own tests.
        let none = ConsensusSpec {
            center: if spec.center == Center::Reference { Center::Mean } else { spec.center },
            reference: 0,
            theta: 0.0,
            trim: Trim::Abs,
            elect: Elect::Mass,
            spectral: None,
            ..spec
        };
        let Verdict::Values(values) = transcribe(&none, &rows, 0.5) else {
            return Ok(());
        };
        let one = ConsensusSpec { spectral: Some(1), ..none.clone() };
        let experts = Experts::bare(&rows);
        let projected = merge(&one, &experts);
        for (told, (a, b)) in values.iter().zip(projected.iter().zip(merge(&none, &experts))) {
            // Float32 leaves the rows not quite in proportion, so votes of almost 0 may turn.
            if told.clear && b.abs() > 1e-4 {
                prop_assert!((a - b).abs() <= 1e-4 * b.abs().max(1.0), "{} and {}", a, b);
            }
        }
    }

    /// The corrected stability bound, for every option of `ties`: with the votes as they are polled
    /// (centred, projected, before trimming) and m their weighted mean, the merged vote is m where all
    /// agree untrimmed; it is no farther from m than some vote where a sign is elected or a tie is
    /// averaged; and it is 0 where nothing is. Outside the union it is m.
    #[test]
    fn the_corrected_stability_bound_holds_for_every_option(
        experts in experts(), spec in ties(), weights in weights()
    ) {
        let k = experts.centred.len();
        let spec = fit(ConsensusSpec { weights, ..spec }, k);
        if is_the_papers(&spec) {
            return Ok(());
        }
        let rows: Vec<Vec<f64>> = experts.centred.iter().map(|row| wide(row)).collect();
        let p: Vec<Vec<f64>> = rows.iter().map(|row| softmax(row)).collect();
        let Some(told) = Votes::of(&spec, &rows, &weigh(&spec, &p)) else {
            return Ok(());
        };
        let out = wide(&merge(&spec, &experts));
        let mut outside = vec![true; out.len()];
        for (at, &id) in told.ids.iter().enumerate() {
            outside[id] = false;
            let poll = Poll::of(&spec, &told, at);
            if !poll.clear {
                continue;
            }
            let votes = || told.polled.iter().map(|row| row[at]);
            let (merged, mean) = (out[id] - told.base[id], told.mean(votes()));
            let slack = 4e-5 * (1.0 + merged.abs().max(mean.abs()) + told.base[id].abs());
            let distance = (merged - mean).abs();
            let (sum, count) = poll.elected(spec.tie);
            // The offset draws towards the centre, the more the less the agreeing experts weigh.
            let drawn = if count > 0.0 {
                (sum / count).abs() * f64::from(spec.eps) / (count + f64::from(spec.eps))
            } else {
                0.0
            };
            let one_sided = poll.above.count == 0.0 || poll.below.count == 0.0;
            if count == 0.0 {
                prop_assert!((distance - mean.abs()).abs() <= slack);
            } else if poll.complete && one_sided {
                prop_assert!(distance <= drawn + slack);
            } else {
                let farthest = votes().map(|v| (v - mean).abs()).fold(0.0, f64::max);
                prop_assert!(distance <= farthest + drawn + slack);
            }
        }
        for (j, value) in out.iter().enumerate().filter(|&(j, _)| outside[j]) {
            let mean = told.mean(told.preferences.iter().map(|row| row[j])) + told.base[j];
            prop_assert!((value - mean).abs() <= 4e-5 * (1.0 + mean.abs()));
        }
    }
}

/// The mean that bounds a projected merge is the projected one; about the experts' own it is false.
#[test]
fn projection_moves_the_mean_that_the_bound_is_about() {
    // What the experts dispute outweighs what they share, so rank 1 keeps the dispute alone.
    let rows = [vec![9.0_f32, -9.0, 1.0, -1.0], vec![-9.0, 9.0, 1.0, -1.0]];
    let spec = |spectral| ConsensusSpec {
        spectral,
        elect: Elect::Mass,
        tie: Tie::Mean,
        ..exact()
    };
    let merged = |spectral| merge(&spec(spectral), &Experts::bare(&rows));
    assert_eq!(merged(None), [0.0, 0.0, 1.0, -1.0]);
    // Both votes for token 2 are 1, and so is their mean; the merged one is 1 away from all three.
    assert_eq!(merged(Some(1)), [0.0; 4]);
}

fn bare(rows: &[&[f32]]) -> Experts {
    Experts::bare(&rows.iter().map(|row| row.to_vec()).collect::<Vec<_>>())
}

fn exact() -> ConsensusSpec {
    ConsensusSpec {
        eps: 0.0,
        ..ConsensusSpec::paper()
    }
}

#[test]
fn mass_elects_what_counting_outvotes() {
    let experts = bare(&[&[1.0, 2.0], &[1.0, -1.0], &[-5.0, -0.5]]);
    let mass = ConsensusSpec {
        elect: Elect::Mass,
        ..exact()
    };
    assert_eq!(merge(&exact(), &experts), [1.0, -0.75]);
    assert_eq!(merge(&mass, &experts), [-5.0, 2.0]);
}

#[test]
fn a_tie_gives_the_centre_or_the_mean_of_what_was_not_trimmed() {
    let experts = bare(&[&[5.0], &[-1.0], &[0.05]]);
    let tie = |tie, elect| {
        merge(
            &ConsensusSpec {
                tie,
                elect,
                ..exact()
            },
            &experts,
        )
    };
    assert_eq!(tie(Tie::Zero, Elect::Count), [0.0]);
    assert_eq!(tie(Tie::Mean, Elect::Count), [2.0]);
    assert_eq!(tie(Tie::Mean, Elect::Mass), [5.0]);
    let even = bare(&[&[5.0], &[-5.0]]);
    let mass = ConsensusSpec {
        elect: Elect::Mass,
        ..exact()
    };
    assert_eq!(merge(&mass, &even), [0.0]);
    let trimmed = bare(&[&[0.05], &[-0.01]]);
    let mean = ConsensusSpec {
        tie: Tie::Mean,
        ..exact()
    };
    assert_eq!(merge(&mean, &trimmed), [0.0]);
}

#[test]
fn density_keeps_a_share_of_every_experts_votes() {
    let row = [5.0_f32, -4.0, 3.0, -2.0, 1.0];
    let experts = bare(&[&row, &row]);
    let kept = |theta| {
        let spec = ConsensusSpec {
            trim: Trim::Density,
            theta,
            ..exact()
        };
        merge(&spec, &experts).iter().filter(|&&v| v != 0.0).count()
    };
    // A fifth of five is one, though 0.2 in float32 is above a fifth; never none; rounded up.
    assert_eq!(
        [0.01, 0.2, 0.21, 0.6, 0.61, 1.0].map(kept),
        [1, 1, 2, 3, 4, 5]
    );
    // Votes as large as the smallest that is kept are kept.
    let even = Experts::bare(&vec![vec![2.0, -2.0, 1.0, -1.0]; 2]);
    let quarter = ConsensusSpec {
        trim: Trim::Density,
        theta: 0.25,
        ..exact()
    };
    assert_eq!(merge(&quarter, &even), [2.0, -2.0, 0.0, 0.0]);
}

#[test]
fn a_trim_by_deviations_follows_the_scale_of_each_expert() {
    // Standard deviations 2 and 200.
    let experts = bare(&[&[3.0, -1.0, -3.0, 1.0], &[300.0, -100.0, -300.0, 100.0]]);
    let spec = ConsensusSpec {
        trim: Trim::Std,
        theta: 1.0,
        ..exact()
    };
    let out = merge(&spec, &experts);
    assert_eq!(out, [151.5, 0.0, -151.5, 0.0]);
}

#[test]
fn weights_vote_and_average() {
    let experts = bare(&[&[1.0, 4.0, 0.0], &[-5.0, 2.0, -3.0]]);
    let spec = |list: &[f64]| ConsensusSpec {
        weights: Weights::Fixed(list.to_vec()),
        ..exact()
    };
    // The heavier expert wins; agreement is the weighted mean; a light expert alone is not diluted.
    assert_eq!(merge(&spec(&[3.0, 1.0]), &experts), [1.0, 3.5, -3.0]);
    assert_eq!(merge(&spec(&[30.0, 10.0]), &experts), [1.0, 3.5, -3.0]);
    // Without weight there is no vote.
    assert_eq!(merge(&spec(&[0.0, 1.0]), &experts), [-5.0, 2.0, -3.0]);
    assert_eq!(merge(&spec(&[1.0, 0.0]), &experts), [1.0, 4.0, 0.0]);
}

/// One and two tenths weigh as much as three, whatever their sum in floating point.
#[test]
fn a_weighted_tie_is_a_tie_in_any_order() {
    let rows: [&[f32]; 3] = [&[1.0], &[1.0], &[-4.0]];
    let weights = [0.1, 0.2, 0.3];
    for order in [
        [0, 1, 2],
        [0, 2, 1],
        [1, 0, 2],
        [1, 2, 0],
        [2, 0, 1],
        [2, 1, 0],
    ] {
        let experts = bare(&order.map(|e| rows[e]));
        let spec = |tie| ConsensusSpec {
            weights: Weights::Fixed(order.map(|e| weights[e]).to_vec()),
            tie,
            ..exact()
        };
        assert_eq!(merge(&spec(Tie::Zero), &experts), [0.0]);
        near(&merge(&spec(Tie::Mean), &experts), [-1.5]);
    }
}

/// A thousand tokens of which 0 to 255 are the most probable of one expert and 200 to 455 of another.
fn overlapping() -> Experts {
    let row = |start: usize| -> Vec<f32> {
        (0..1000)
            .map(|j| {
                let inside = (start..start + 256).contains(&j);
                if inside {
                    5.0 + (j % 7) as f32
                } else {
                    -2.0 - (j % 5) as f32
                }
            })
            .collect()
    };
    Experts::bare(&[row(0), row(200)])
}

#[test]
fn the_options_reach_the_union_of_the_most_probable_and_no_farther() {
    let experts = overlapping();
    let rows: Vec<Vec<f64>> = experts.centred.iter().map(|row| wide(row)).collect();
    assert_eq!(union(&rows), (0..456).collect());
    let mean = |j: usize| f64::midpoint(rows[0][j], rows[1][j]);
    // Everything is trimmed, on the union alone.
    let all = ConsensusSpec {
        elect: Elect::Mass,
        theta: 100.0,
        ..exact()
    };
    let out = merge(&all, &experts);
    near(&out, (0..1000).map(|j| if j < 456 { 0.0 } else { mean(j) }));
    // The paper's operator has no union.
    let paper = ConsensusSpec {
        theta: 100.0,
        ..exact()
    };
    assert!(merge(&paper, &experts).iter().all(|&v| v == 0.0));
}

#[test]
fn the_union_is_a_centre_of_its_own() {
    let experts = overlapping();
    let spec = ConsensusSpec {
        center: Center::TopkUnion,
        ..exact()
    };
    let out = merge(&spec, &experts);
    let centre = |e: usize| wide(&experts.centred[e][..456]).iter().sum::<f64>() / 456.0;
    let vote = |e: usize, j: usize| f64::from(experts.centred[e][j]) - centre(e);
    for (j, &got) in out.iter().enumerate() {
        let (a, b) = (vote(0, j), vote(1, j));
        let want = match (j < 456, a * b < 0.0) {
            (true, true) => 0.0,
            _ => f64::midpoint(a, b),
        };
        assert_near(f64::from(got), want, 1e-5);
    }
    // About the vocabulary's mean the likely tokens are all above; about theirs, experts conflict.
    assert!(out[..200].iter().all(|&v| v == 0.0));
}

#[test]
fn a_reference_is_departed_from_and_does_not_vote() {
    // Log-probabilities of three tokens; the second expert is the base.
    let p = [[0.7_f64, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.1, 0.3]];
    let rows: Vec<Vec<f32>> = p
        .iter()
        .map(|row| row.iter().map(|p| p.ln() as f32).collect())
        .collect();
    let spec = ConsensusSpec {
        center: Center::Reference,
        reference: 1,
        theta: 0.0,
        ..exact()
    };
    let out = merge(&spec, &Experts::bare(&rows));
    // Token 0: both rise; 1: both fall; 2: they conflict, so the base stands.
    let mean = |j: usize| f64::midpoint(p[0][j].ln(), p[2][j].ln());
    near(&out, [mean(0), mean(1), p[1][2].ln()]);
    // Only one expert is left to vote: it has its way, but for what is trimmed.
    let pair = Experts::bare(&rows[..2]);
    near(&merge(&spec, &pair), p[0].map(f64::ln));
    let trimmed = ConsensusSpec { theta: 0.4, ..spec };
    near(
        &merge(&trimmed, &pair),
        [p[1][0].ln(), p[0][1].ln(), p[0][2].ln()],
    );
}

#[test]
fn a_shared_direction_is_kept_and_a_lonely_one_is_not() {
    let shared = [4.0_f32, -4.0, 0.0, 0.0];
    let experts = bare(&[&shared, &shared, &[0.0, 0.0, 1.0, -1.0]]);
    let spec = |spectral| ConsensusSpec {
        spectral,
        ..exact()
    };
    near(&merge(&spec(Some(1)), &experts), [4.0, -4.0, 0.0, 0.0]);
    near(&merge(&spec(None), &experts), [4.0, -4.0, 1.0, -1.0]);
    near(&merge(&spec(Some(2)), &experts), [4.0, -4.0, 1.0, -1.0]);
}

/// Probabilities `[p, rest, rest, ..]` over `n` tokens as logits.
fn peaked(p: f64, n: usize) -> Vec<f32> {
    let rest = (1.0 - p) / (n - 1) as f64;
    (0..n)
        .map(|j| if j == 0 { p } else { rest }.ln() as f32)
        .collect()
}

#[test]
fn weights_by_rule() {
    let rows = [peaked(0.9, 5), peaked(0.4, 5)];
    let p: Vec<Vec<f64>> = rows.iter().map(|row| softmax(&wide(row))).collect();
    let entropy = |p: f64| -(p * p.ln() + (1.0 - p) * ((1.0 - p) / 4.0).ln());
    let cases = [
        (WeightRule::Uniform, [1.0, 1.0]),
        (
            WeightRule::Entropy,
            [1.0 / (entropy(0.9) + 0.01), 1.0 / (entropy(0.4) + 0.01)],
        ),
        (WeightRule::Margin, [0.9 - 0.025 + 0.01, 0.4 - 0.15 + 0.01]),
        // Without its pilot; a run resolves it first.
        (WeightRule::Pilot, [1.0, 1.0]),
    ];
    for (rule, [a, b]) in cases {
        let spec = ConsensusSpec {
            weights: Weights::Rule(rule),
            ..ConsensusSpec::of(Method::Arith)
        };
        let out = merge(&spec, &Experts::of(&rows));
        let want = (0..5).map(|j| ((a * p[0][j] + b * p[1][j]) / (a + b)).ln());
        near(&out, want);
    }
}

#[test]
fn the_best_expert_is_the_heaviest_then_the_surest_then_the_first() {
    let mut rows = [0.5, 0.8, 0.95, 0.95].map(|p| peaked(p, 6));
    rows[3].reverse();
    let experts = Experts::of(&rows);
    let best = |weights| {
        let spec = ConsensusSpec {
            weights,
            ..ConsensusSpec::of(Method::Best)
        };
        let out = merge(&spec, &experts);
        experts.centred.iter().position(|row| *row == out).unwrap()
    };
    assert_eq!(best(Weights::default()), 2);
    assert_eq!(best(Weights::Rule(WeightRule::Entropy)), 2);
    assert_eq!(best(Weights::Rule(WeightRule::Margin)), 2);
    assert_eq!(best(Weights::Fixed(vec![3.0, 1.0, 1.0, 1.0])), 0);
    assert_eq!(best(Weights::Fixed(vec![2.0, 2.0, 1.0, 1.0])), 1);
    assert_eq!(best(Weights::Fixed(vec![0.0, 0.0, 0.0, 1.0])), 3);
    // The first of two that are the same, wherever they are.
    let out = merge(
        &ConsensusSpec::of(Method::Best),
        &Experts::of(&[vec![0.0, 1.0], vec![1.0, 0.0]]),
    );
    assert!(out[1] > out[0]);
}

#[test]
fn the_mixture_draws_experts_by_their_weights() {
    let rows: Vec<Vec<f32>> = (0..4_u8).map(|e| vec![f32::from(e), 0.0]).collect();
    let experts = Experts::of(&rows);
    let drawn = |weights: &Weights, step| {
        let spec = ConsensusSpec {
            weights: weights.clone(),
            ..ConsensusSpec::of(Method::Mixture)
        };
        let (out, merged) = merge_with(&spec, &experts, Some(Stream { step, ..STREAM }));
        assert!(merged);
        experts.centred.iter().position(|row| *row == out).unwrap()
    };
    for (weights, probabilities) in [
        (Weights::default(), [0.25; 4]),
        (
            Weights::Fixed(vec![1.0, 0.0, 2.0, 5.0]),
            [0.125, 0.0, 0.25, 0.625],
        ),
    ] {
        let mut counts = [0; 4];
        for step in 0..20_000 {
            counts[drawn(&weights, step)] += 1;
        }
        assert!(counts_fit(&counts, &probabilities), "{counts:?}");
    }
    // A draw is its stream's, and without a stream it is the middle.
    assert_eq!(drawn(&Weights::default(), 7), drawn(&Weights::default(), 7));
    let spec = ConsensusSpec::of(Method::Mixture);
    let (out, _) = merge_with(&spec, &experts, None);
    assert_eq!(out, experts.centred[2]);
    assert!(spec.draws());
    assert!(METHODS[..5].iter().all(|&m| !ConsensusSpec::of(m).draws()));
}

#[test]
fn temperatures_divide_the_rows() {
    let experts = bare(&[&[4.0, -4.0], &[1.0, -1.0]]);
    let spec = ConsensusSpec {
        calibrate: Calibrate::Temperature,
        temperatures: vec![2.0, 0.5],
        ..ConsensusSpec::of(Method::Poe)
    };
    assert_eq!(merge(&spec, &experts), [4.0, -4.0]);
    // Before a pilot has fitted them there is nothing to divide by.
    let unfitted = ConsensusSpec {
        temperatures: Vec::new(),
        ..spec
    };
    assert_eq!(merge(&unfitted, &experts), [5.0, -5.0]);
    assert!(unfitted.needs_pilot());
}

/// The statistics that operators read are those of the calibrated rows.
#[test]
fn calibration_comes_before_everything_that_looks_at_probabilities() {
    // The first is the surer, until it is cooled down.
    let experts = Experts::of(&[vec![4.0, 0.0, 0.0], vec![0.0, 2.0, 0.0]]);
    let spec = ConsensusSpec {
        calibrate: Calibrate::Temperature,
        temperatures: vec![4.0, 1.0],
        ..ConsensusSpec::of(Method::Best)
    };
    let out = merge(&spec, &experts);
    assert!(out[1] > out[0]);
    let gated = ConsensusSpec {
        gate: Some(MergeGate {
            max_p: Some(0.75),
            js: None,
            pivot: 0,
        }),
        temperatures: vec![1.0, 0.5],
        method: Method::Mean,
        ..spec
    };
    // The second is sure enough at temperature 1/2, so the gate is closed and the first decides.
    let (out, merged) = merge_with(&gated, &experts, None);
    assert!(!merged);
    assert_eq!(out, experts.centred[0]);
    let hot = ConsensusSpec {
        temperatures: vec![8.0, 0.5],
        ..gated
    };
    assert!(merge_with(&hot, &experts, None).1);
}

#[test]
fn scores_have_one_deviation_and_the_geometric_mean_of_scales() {
    let row = [3.0_f32, -1.0, 0.5, -2.5];
    let scaled = |by: f32| -> Vec<f32> { row.iter().map(|v| by * v).collect() };
    let spec = ConsensusSpec {
        calibrate: Calibrate::Zscore,
        ..ConsensusSpec::of(Method::Mean)
    };
    let out = merge(
        &spec,
        &Experts::of(&[scaled(1.0), scaled(9.0), scaled(27.0)]),
    );
    // (1 * 9 * 27)^(1/3)
    near(&out, row.iter().map(|&v| 243_f64.cbrt() * f64::from(v)));
}

/// A row of one value has no scale and must not set the others'.
#[test]
fn a_constant_row_has_no_scale() {
    let spec = ConsensusSpec {
        calibrate: Calibrate::Zscore,
        ..ConsensusSpec::of(Method::Poe)
    };
    let row = [4.0_f32, -3.0, -1.0];
    let out = merge(&spec, &Experts::of(&[row.to_vec(), vec![0.1; 3]]));
    near(&out, row.map(f64::from));
    let flat = merge(&spec, &Experts::of(&[vec![0.1; 3], vec![7.3; 3]]));
    assert!(flat.iter().all(|v| v.abs() < 1e-6));
}

fn gated(max_p: Option<f64>, js: Option<f64>, pivot: u32) -> ConsensusSpec {
    ConsensusSpec {
        gate: Some(MergeGate { max_p, js, pivot }),
        ..ConsensusSpec::of(Method::Mean)
    }
}

#[test]
fn a_gate_on_certainty_opens_where_some_expert_is_unsure() {
    let experts = Experts::of(&[peaked(0.9, 4), peaked(0.7, 4), peaked(0.8, 4)]);
    for (bar, pivot, opens) in [(0.71, 0, true), (0.69, 0, false), (0.69, 2, false)] {
        let (out, merged) = merge_with(&gated(Some(bar), None, pivot), &experts, None);
        assert_eq!(merged, opens);
        if opens {
            assert_eq!(out, merge(&ConsensusSpec::of(Method::Mean), &experts));
        } else {
            assert_eq!(out, experts.centred[pivot as usize]);
        }
    }
}

#[test]
fn a_gate_on_divergence_opens_where_experts_differ() {
    let rows = [peaked(0.9, 4), peaked(0.3, 4), vec![0.0, 3.0, 0.0, 0.0]];
    let experts = Experts::of(&rows);
    let p: Vec<Vec<f64>> = rows.iter().map(|row| softmax(&wide(row))).collect();
    let divergence = jensen_shannon(&p);
    assert!(divergence > 0.1);
    for (bar, opens) in [(divergence - 1e-5, true), (divergence + 1e-5, false)] {
        let (out, merged) = merge_with(&gated(None, Some(bar), 1), &experts, None);
        assert_eq!(merged, opens);
        assert_eq!(out == experts.centred[1], !opens);
    }
    // Experts with nothing in common are ln K apart, which is the most there is.
    let apart: Vec<Vec<f32>> = (0..3)
        .map(|e| (0..3).map(|j| if e == j { 60.0 } else { -60.0 }).collect())
        .collect();
    let apart = Experts::of(&apart);
    let most = 3_f64.ln();
    assert!(merge_with(&gated(None, Some(most - 1e-6), 0), &apart, None).1);
    assert!(!merge_with(&gated(None, Some(most + 1e-6), 0), &apart, None).1);
    // The same experts are 0 apart, up to rounding.
    let same = Experts::of(&[rows[0].clone(), rows[0].clone()]);
    assert!(!merge_with(&gated(None, Some(1e-6), 0), &same, None).1);
}

#[test]
fn either_condition_opens_a_gate() {
    // Both are sure, of different tokens.
    let experts = Experts::of(&[vec![9.0, 0.0], vec![0.0, 9.0]]);
    let opens = |max_p, js| merge_with(&gated(max_p, js, 0), &experts, None).1;
    assert!(!opens(Some(0.9), None));
    assert!(opens(None, Some(0.5)));
    assert!(opens(Some(0.9), Some(0.5)));
    assert!(!opens(Some(0.9), Some(0.6925)));
    assert!(opens(Some(0.9999), Some(0.6925)));
}

#[test]
fn names_are_the_specifications() {
    for method in METHODS {
        let spec = ConsensusSpec::of(method);
        assert_eq!(serde_json::to_value(method).unwrap(), spec.name());
    }
    let spec: ConsensusSpec = serde_json::from_str(r#"{ "method": "geo" }"#).unwrap();
    assert_eq!(spec, ConsensusSpec::of(Method::Mean));
}

/// A mistake of the caller's, which debug builds catch: what is read is the shortest length, and
/// statistics of longer rows say nothing about it.
#[test]
fn unequal_rows_are_cut_to_the_shortest() {
    if cfg!(debug_assertions) {
        return;
    }
    let long = Experts::of(&[vec![1.0, -2.0, 0.5, 9.0], vec![3.0, -2.5, 0.0, 0.5]]);
    let mut cut = long.clone();
    cut.centred[1].pop();
    let short = Experts::bare(
        &long
            .centred
            .iter()
            .map(|row| row[..3].to_vec())
            .collect::<Vec<_>>(),
    );
    for method in METHODS {
        let spec = ConsensusSpec {
            weights: Weights::Rule(WeightRule::Margin),
            ..ConsensusSpec::of(method)
        };
        let mut out = [f32::NAN; 5];
        cut.with_views(|views| spec.merge(views, &mut out));
        let (want, _) = merge_with(&spec, &short, None);
        assert_eq!(out[..3], want);
        assert_eq!(out[3..], [0.0, 0.0]);
    }
}

#[test]
fn rows_of_no_use_are_survived() {
    let huge = [f32::MAX, -f32::MAX, 0.0];
    let rows = bare(&[&huge, &[0.0, 0.0, 0.0], &[1.0, f32::MIN_POSITIVE, -1.0]]);
    let empty = Experts::bare(&[Vec::new(), Vec::new()]);
    for method in METHODS {
        for calibrate in [Calibrate::None, Calibrate::Zscore] {
            let spec = ConsensusSpec {
                calibrate,
                ..ConsensusSpec::of(method)
            };
            merge(&spec, &rows);
            assert!(!merge_with(&spec, &empty, None).1);
        }
    }
    for spec in [
        ConsensusSpec {
            center: Center::TopkUnion,
            trim: Trim::Std,
            spectral: Some(1),
            ..exact()
        },
        ConsensusSpec {
            center: Center::Reference,
            trim: Trim::Density,
            elect: Elect::Mass,
            ..exact()
        },
    ] {
        merge(&spec, &rows);
    }
}
