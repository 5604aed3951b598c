//! Traces, invariants and replay of the controller.

use dlmom_core::{
    AlphaUnit, Controller, ControllerSpec, Decision, Force, Gate, GateController, Mode, Reason,
    Start,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::golden;

type Inputs = Vec<(f64, Option<Force>)>;

fn base(gate: Gate) -> ControllerSpec {
    ControllerSpec {
        gate,
        w: Some(3),
        alpha: 0.5,
        alpha_unit: AlphaUnit::Normalized,
        cap: -1,
        min_dwell_latent: 0,
        min_dwell_explicit: 0,
        convergence_threshold: None,
        slope_eps: None,
        var_eps: None,
        max_latent_steps: 40,
        start: Start::Gate,
    }
}

fn replay(spec: &ControllerSpec, inputs: &[(f64, Option<Force>)]) -> Vec<Decision> {
    let mut controller = GateController::new(spec).unwrap();
    inputs
        .iter()
        .map(|&(entropy, force)| controller.observe(entropy, force))
        .collect()
}

fn free(entropies: &[f64]) -> Inputs {
    entropies.iter().map(|&h| (h, None)).collect()
}

/// One letter per step, capital where the mode has just switched.
fn letters(decisions: &[Decision]) -> String {
    decisions
        .iter()
        .map(|d| match (d.mode, d.switched) {
            (Mode::Latent, false) => 'l',
            (Mode::Latent, true) => 'L',
            (Mode::Explicit, false) => 'e',
            (Mode::Explicit, true) => 'E',
        })
        .collect()
}

const WAVE: [f64; 8] = [0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1];

#[test]
fn decisions_match_the_oracle() {
    let cases = golden("controller.json");
    for case in cases.as_array().unwrap() {
        let spec: ControllerSpec = serde_json::from_value(case["spec"].clone()).unwrap();
        let inputs: Inputs = serde_json::from_value(case["inputs"].clone()).unwrap();
        let got: Vec<Value> = replay(&spec, &inputs)
            .iter()
            .map(|d| json!([d.mode.as_str(), d.switched, d.reason.as_str()]))
            .collect();
        assert_eq!(Value::from(got), case["decisions"], "{spec:?}");
    }
}

/// Entropies as a reasoning model shows them: a high start, a slow fall, a burst, a quiet end.
#[test]
fn traces_of_recorded_entropies() {
    let recorded = [
        0.62, 0.58, 0.55, 0.47, 0.41, 0.40, 0.39, 0.33, 0.12, 0.08, 0.31, 0.57, 0.66, 0.61, 0.44,
        0.43, 0.42, 0.41, 0.40, 0.21, 0.09, 0.05, 0.04, 0.04,
    ];
    let mut forced = free(&recorded);
    forced[13].1 = Some(Force::EosCertain);
    for step in &mut forced[20..] {
        step.1 = Some(Force::AnswerReserve);
    }
    let specs = [
        ("threshold", base(Gate::Threshold)),
        (
            "trend",
            ControllerSpec {
                start: Start::Latent,
                ..base(Gate::Trend)
            },
        ),
        (
            "trend_w4_dwell",
            ControllerSpec {
                w: Some(4),
                min_dwell_latent: 3,
                min_dwell_explicit: 2,
                ..base(Gate::Trend)
            },
        ),
        (
            "cap_2",
            ControllerSpec {
                cap: 2,
                ..base(Gate::Threshold)
            },
        ),
        (
            "budget_6",
            ControllerSpec {
                max_latent_steps: 6,
                ..base(Gate::Trend)
            },
        ),
        (
            "always_latent",
            ControllerSpec {
                max_latent_steps: 5,
                ..base(Gate::AlwaysLatent)
            },
        ),
        (
            "always_explicit",
            ControllerSpec {
                start: Start::Latent,
                ..base(Gate::AlwaysExplicit)
            },
        ),
    ];
    let traces: serde_json::Map<String, Value> = specs
        .iter()
        .flat_map(|(name, spec)| {
            [("free", free(&recorded)), ("forced", forced.clone())].map(|(kind, inputs)| {
                let decisions = replay(spec, &inputs);
                let reasons: Vec<&str> = decisions.iter().map(|d| d.reason.as_str()).collect();
                let trace = json!({ "modes": letters(&decisions), "reasons": reasons.join(" ") });
                (format!("{name}/{kind}"), trace)
            })
        })
        .collect();
    insta::assert_json_snapshot!(traces);
}

#[test]
fn decisions_are_recorded_under_stable_names() {
    let decision = Decision {
        mode: Mode::Latent,
        switched: true,
        reason: Reason::EosCertain,
    };
    assert_eq!(
        serde_json::to_value(decision).unwrap(),
        json!({ "mode": "latent", "switched": true, "reason": "eos_certain" })
    );
    let all = [
        Reason::AboveAlpha,
        Reason::BelowAlpha,
        Reason::WarmupAboveAlpha,
        Reason::WarmupBelowAlpha,
        Reason::Converged,
        Reason::Converging,
        Reason::Uncertain,
        Reason::Keep,
        Reason::Always,
        Reason::StartLatent,
        Reason::Dwell,
        Reason::Cap,
        Reason::LatentBudget,
        Reason::EosCertain,
        Reason::AnswerReserve,
        Reason::NotFinite,
    ];
    for reason in all {
        assert_eq!(serde_json::to_value(reason).unwrap(), reason.to_string());
    }
    assert_eq!(format!("{:>9}", Mode::Explicit), " explicit");
    assert_eq!(serde_json::to_value(Mode::Explicit).unwrap(), "explicit");
    assert_eq!(
        serde_json::to_value(Force::AnswerReserve).unwrap(),
        "answer_reserve"
    );
}

#[test]
fn the_threshold_is_strict() {
    let decisions = replay(&base(Gate::Threshold), &free(&[0.5, 0.500_001]));
    assert_eq!(letters(&decisions), "eL");
}

#[test]
fn the_first_decision_is_no_switch() {
    for (start, h, expected) in [
        (Start::Gate, 0.9, "l"),
        (Start::Gate, 0.1, "e"),
        (Start::Latent, 0.1, "l"),
    ] {
        let spec = ControllerSpec {
            start,
            ..base(Gate::Threshold)
        };
        let mut controller = GateController::new(&spec).unwrap();
        assert_eq!(controller.mode(), None);
        let decision = controller.observe(h, None);
        assert_eq!(letters(&[decision]), expected);
        assert_eq!(
            (controller.switches(), controller.mode()),
            (0, Some(decision.mode))
        );
    }
}

#[test]
fn the_cap_pays_for_exits() {
    let modes = |cap| {
        letters(&replay(
            &ControllerSpec {
                cap,
                ..base(Gate::Threshold)
            },
            &free(&WAVE),
        ))
    };
    assert_eq!(modes(-1), "lELELELE");
    assert_eq!(modes(0), "eeeeeeee");
    assert_eq!(modes(1), "lEeeeeee");
    assert_eq!(modes(2), "lEeeeeee");
    assert_eq!(modes(3), "lELEeeee");
    let late = |cap| {
        letters(&replay(
            &ControllerSpec {
                cap,
                ..base(Gate::Threshold)
            },
            &free(&WAVE[1..]),
        ))
    };
    assert_eq!(late(1), "eeeeeee");
    assert_eq!(late(2), "eLEeeee");
    assert_eq!(late(3), "eLEeeee");
    assert_eq!(late(4), "eLELEee");
}

#[test]
fn dwell_binds_the_gate_in_each_direction() {
    let spec = ControllerSpec {
        min_dwell_latent: 2,
        min_dwell_explicit: 3,
        ..base(Gate::Threshold)
    };
    let decisions = replay(&spec, &free(&[0.9, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9]));
    assert_eq!(letters(&decisions), "llEeeLl");
    assert_eq!(decisions[1].reason, Reason::Dwell);
    assert_eq!(decisions[4].reason, Reason::Dwell);
}

#[test]
fn dwell_binds_neither_forced_exits_nor_the_budget() {
    let spec = ControllerSpec {
        min_dwell_latent: 9,
        ..base(Gate::Threshold)
    };
    let decisions = replay(
        &spec,
        &[(0.9, None), (0.9, Some(Force::EosCertain)), (0.9, None)],
    );
    assert_eq!(letters(&decisions), "lEL");
    let spec = ControllerSpec {
        max_latent_steps: 2,
        ..spec
    };
    let decisions = replay(&spec, &free(&[0.9; 5]));
    assert_eq!(letters(&decisions), "llEee");
    assert_eq!(decisions[4].reason, Reason::LatentBudget);
}

#[test]
fn the_trend_follows_the_written_rule() {
    let spec = ControllerSpec {
        start: Start::Latent,
        ..base(Gate::Trend)
    };
    let last = |entropies: &[f64]| *replay(&spec, &free(entropies)).last().unwrap();
    // alpha 0.5: convergence 0.125, slope 0.01, variance 0.0025.
    assert_eq!(last(&[0.3, 0.3, 0.1]).reason, Reason::Converged);
    assert_eq!(last(&[0.34, 0.31, 0.28]).reason, Reason::Converging);
    // Falling as fast but scattered: neither converging nor uncertain.
    let kept = |mode| Decision {
        mode,
        switched: false,
        reason: Reason::Keep,
    };
    assert_eq!(last(&[0.52, 0.51, 0.2]), kept(Mode::Latent));
    assert_eq!(last(&[0.6, 0.3, 0.3]), kept(Mode::Explicit));
    // A plateau below alpha but above convergence is uncertain; so is a high mean.
    assert_eq!(last(&[0.3, 0.3, 0.3]).reason, Reason::Uncertain);
    assert_eq!(last(&[0.9, 0.6, 0.5]).reason, Reason::Uncertain);
    assert_eq!(last(&[0.3, 0.6]).reason, Reason::WarmupAboveAlpha);
}

#[test]
fn the_window_spans_both_modes() {
    // Two explicit entropies and a latent one make a full window of three.
    let decisions = replay(&base(Gate::Trend), &free(&[0.1, 0.9, 0.2]));
    assert_eq!(decisions[1].reason, Reason::WarmupAboveAlpha);
    assert_eq!(decisions[2].reason, Reason::Uncertain);
}

#[test]
fn the_trait_is_object_safe_and_sendable() {
    let mut boxed: Box<dyn Controller> =
        Box::new(GateController::new(&base(Gate::Threshold)).unwrap());
    boxed.observe(0.9, None).unwrap();
    let steps = std::thread::spawn(move || boxed.latent_steps())
        .join()
        .unwrap();
    assert_eq!(steps, 1);
}

fn spec() -> impl Strategy<Value = ControllerSpec> {
    (
        prop::sample::select(vec![
            Gate::Threshold,
            Gate::Trend,
            Gate::AlwaysLatent,
            Gate::AlwaysExplicit,
        ]),
        2_u32..6,
        0.05_f64..0.9,
        -1_i64..7,
        (0_u32..5, 0_u32..5),
        prop::option::of(0.0_f64..0.5),
        prop_oneof![0_u32..10, Just(1000)],
        any::<bool>(),
    )
        .prop_map(
            |(gate, w, alpha, cap, dwell, convergence_threshold, budget, latent)| ControllerSpec {
                gate,
                w: Some(w),
                alpha,
                cap,
                min_dwell_latent: dwell.0,
                min_dwell_explicit: dwell.1,
                convergence_threshold,
                max_latent_steps: budget,
                start: if latent { Start::Latent } else { Start::Gate },
                ..base(gate)
            },
        )
}

fn inputs() -> impl Strategy<Value = Inputs> {
    let force = prop_oneof![
        9 => Just(None),
        1 => prop::sample::select(vec![Some(Force::EosCertain), Some(Force::AnswerReserve)]),
    ];
    prop::collection::vec((0.0_f64..1.0, force), 0..80)
}

proptest! {
    #[test]
    fn every_sequence_keeps_the_promises(spec in spec(), inputs in inputs()) {
        let mut controller = GateController::new(&spec).unwrap();
        let mut modes: Vec<Mode> = Vec::new();
        let (mut switches, mut run) = (0_u32, 0_u32);
        for &(entropy, force) in &inputs {
            let decision = controller.observe(entropy, force);
            let before = modes.last().copied();
            prop_assert_eq!(decision.switched, before.is_some_and(|mode| mode != decision.mode));
            if decision.switched {
                switches += 1;
                let gated = !matches!(
                    decision.reason,
                    Reason::EosCertain | Reason::AnswerReserve | Reason::LatentBudget
                );
                let minimum = match before {
                    Some(Mode::Latent) => spec.min_dwell_latent,
                    _ => spec.min_dwell_explicit,
                };
                prop_assert!(!gated || run >= minimum);
                run = 0;
            }
            run += 1;
            modes.push(decision.mode);
            if force.is_some() {
                prop_assert_eq!(decision.mode, Mode::Explicit);
            }
            let latent = modes.iter().filter(|&&mode| mode == Mode::Latent).count() as u32;
            prop_assert_eq!(controller.latent_steps(), latent);
            prop_assert_eq!(controller.switches(), switches);
            prop_assert_eq!(controller.mode(), Some(decision.mode));
            prop_assert!(latent <= spec.max_latent_steps);
            if spec.cap >= 0 {
                prop_assert!(i64::from(switches) <= spec.cap);
                // The exit is always affordable.
                if decision.mode == Mode::Latent {
                    prop_assert!(i64::from(switches) < spec.cap);
                }
            }
            if spec.cap == 0 || spec.gate == Gate::AlwaysExplicit {
                prop_assert_eq!(decision.mode, Mode::Explicit);
            }
        }
        prop_assert_eq!(replay(&spec, &inputs).iter().map(|d| d.mode).collect::<Vec<_>>(), modes);
    }

    #[test]
    fn a_prefix_decides_as_the_whole(spec in spec(), inputs in inputs(), at in any::<prop::sample::Index>()) {
        let at = at.index(inputs.len() + 1);
        let whole = replay(&spec, &inputs);
        prop_assert_eq!(&replay(&spec, &inputs[..at])[..], &whole[..at]);
    }

    #[test]
    fn a_recorded_trace_replays_after_serialisation(spec in spec(), inputs in inputs()) {
        let decisions = replay(&spec, &inputs);
        let text = serde_json::to_string(&(&spec, &inputs, &decisions)).unwrap();
        let (spec, inputs, recorded): (ControllerSpec, Inputs, Vec<Decision>) =
            serde_json::from_str(&text).unwrap();
        prop_assert_eq!(replay(&spec, &inputs), recorded);
    }
}
