//! Traces, invariants and replay of the controller.

use dlmom_core::{
    AlphaUnit, Controller, ControllerFailure, ControllerSpec, Decision, Force, Gate,
    GateController, Inject, Mode, Reason, Rule, RuleController, Schedule, ScheduleController,
    Start, TriggerSpec, Triggers,
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
        patience: 1,
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

const FORCES: [Force; 4] = [
    Force::EosCertain,
    Force::AnswerReserve,
    Force::Locked,
    Force::Terminated,
];

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
            "reference",
            ControllerSpec {
                min_dwell_explicit: 3,
                ..base(Gate::Reference)
            },
        ),
        (
            "one_block_patience_3",
            ControllerSpec {
                start: Start::Latent,
                patience: 3,
                ..base(Gate::LatentThenExplicit)
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
        Reason::AboveReference,
        Reason::BelowReference,
        Reason::Patience,
        Reason::NoReturn,
        Reason::Always,
        Reason::StartLatent,
        Reason::Dwell,
        Reason::Cap,
        Reason::LatentBudget,
        Reason::EosCertain,
        Reason::AnswerReserve,
        Reason::Locked,
        Reason::Terminated,
        Reason::Scheduled,
        Reason::NotFinite,
        Reason::Custom,
    ];
    for reason in all {
        assert_eq!(serde_json::to_value(reason).unwrap(), reason.to_string());
    }
    assert_eq!(format!("{:>9}", Mode::Explicit), " explicit");
    assert_eq!(serde_json::to_value(Mode::Explicit).unwrap(), "explicit");
    for force in FORCES {
        assert_eq!(
            serde_json::to_value(force).unwrap(),
            force.reason().as_str()
        );
    }
    assert_eq!(serde_json::to_value(Inject::Converge).unwrap(), "converge");
    assert_eq!(
        serde_json::to_value(Inject::Terminate).unwrap(),
        "terminate"
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

/// Nats of the logits `x` at one of twelve ids and 0 elsewhere: the rig on which `SwiReasoning`'s own
/// function was run.
fn rig(x: f64) -> f64 {
    match x {
        3.0 => 1.4983,
        2.9 => 1.5667,
        2.0 => 2.1081,
        1.0 => 2.4206,
        0.5 => 2.4724,
        _ => panic!("{x} was not run"),
    }
}

/// Its window W is the dwell in explicit mode; latent mode has none.
fn swi(window: u32) -> ControllerSpec {
    ControllerSpec {
        alpha_unit: AlphaUnit::Nats,
        min_dwell_explicit: window,
        max_latent_steps: u32::MAX,
        start: Start::Latent,
        ..base(Gate::Reference)
    }
}

/// Traces of the published function (7f3b278): strict on both sides of the entropy of the block's
/// first step, at once out of latent mode, after W steps into it.
#[test]
fn the_reference_gate_follows_swireasoning() {
    let modes = |window, script: &[f64]| {
        let entropies: Vec<f64> = script.iter().map(|&x| rig(x)).collect();
        letters(&replay(&swi(window), &free(&entropies)))
    };
    assert_eq!(modes(2, &[2.0, 3.0, 3.0, 2.0, 1.0, 1.0, 3.0]), "lEeLllE");
    assert_eq!(modes(1, &[2.0, 2.0, 3.0, 3.0, 2.9]), "llEeL");
    assert_eq!(modes(3, &[2.0, 3.0, 1.0, 1.0, 1.0, 0.5, 3.0]), "lEeeLlE");
}

#[test]
fn the_reference_is_the_blocks_first_entropy_until_the_mode_changes() {
    let decisions = replay(
        &base(Gate::Reference),
        &free(&[0.5, 0.7, 0.6, 0.5, 0.4, 0.3, 0.4, 0.41, 0.42]),
    );
    // Neither the highest of the block nor the last counts, and equal is on neither side.
    assert_eq!(letters(&decisions), "llllEeeLl");
    let reasons: Vec<Reason> = decisions.iter().map(|d| d.reason).collect();
    assert_eq!(reasons[0], Reason::StartLatent);
    assert_eq!(reasons[3], Reason::Keep);
    assert_eq!(reasons[4], Reason::BelowReference);
    assert_eq!(reasons[6], Reason::Keep);
    assert_eq!(reasons[7], Reason::AboveReference);
}

/// A forced exit begins a block like any other, with its own reference.
#[test]
fn a_forced_exit_sets_the_reference() {
    let decisions = replay(
        &base(Gate::Reference),
        &[
            (0.5, None),
            (0.8, Some(Force::EosCertain)),
            (0.7, None),
            (0.9, None),
        ],
    );
    assert_eq!(letters(&decisions), "lEeL");
}

/// The published trace with a hidden `</think>`: without the lock the last step but one would be
/// latent.
#[test]
fn a_locked_sample_stays_explicit() {
    let script = [2.0, 3.0, 3.0, 3.0, 1.0, 1.0];
    let inputs: Inputs = script
        .iter()
        .enumerate()
        .map(|(t, &x)| (rig(x), (t >= 2).then_some(Force::Locked)))
        .collect();
    let locked = replay(&swi(1), &inputs);
    assert_eq!(letters(&locked), "lEeeee");
    assert!(locked[2..].iter().all(|d| d.reason == Reason::Locked));
    let unlocked = free(&script.map(rig));
    assert_eq!(letters(&replay(&swi(1), &unlocked)), "lEeeLl");
}

#[test]
fn every_force_is_an_exit_with_its_own_reason() {
    for force in FORCES {
        for gate in [
            Gate::AlwaysLatent,
            Gate::Threshold,
            Gate::Reference,
            Gate::LatentThenExplicit,
        ] {
            let dwelling = ControllerSpec {
                min_dwell_latent: 9,
                ..base(gate)
            };
            let decisions = replay(&dwelling, &[(0.9, None), (0.9, Some(force))]);
            assert_eq!(
                decisions[1],
                Decision {
                    mode: Mode::Explicit,
                    switched: true,
                    reason: force.reason(),
                }
            );
            let first = replay(&dwelling, &[(0.9, Some(force))]);
            assert_eq!((first[0].mode, first[0].switched), (Mode::Explicit, false));
        }
    }
}

fn one_block(patience: u32) -> ControllerSpec {
    ControllerSpec {
        patience,
        max_latent_steps: 1000,
        ..base(Gate::LatentThenExplicit)
    }
}

/// The cold stop of Soft Thinking: so many entropies strictly below, one after another.
#[test]
fn one_block_ends_after_patience_and_for_good() {
    let modes =
        |patience, entropies: &[f64]| letters(&replay(&one_block(patience), &free(entropies)));
    assert_eq!(modes(1, &[0.9, 0.6, 0.4, 0.9, 0.9]), "llEee");
    assert_eq!(modes(3, &[0.4, 0.4, 0.4, 0.9]), "llEe");
    // A higher entropy begins the count again, and alpha itself is not below it.
    assert_eq!(modes(3, &[0.4, 0.4, 0.6, 0.4, 0.4, 0.4]), "lllllE");
    assert_eq!(modes(2, &[0.4, 0.5, 0.4, 0.5, 0.4, 0.499]), "lllllE");
    let decisions = replay(&one_block(2), &free(&[0.9, 0.4, 0.9, 0.4, 0.4, 0.9]));
    let reasons: Vec<&str> = decisions.iter().map(|d| d.reason.as_str()).collect();
    assert_eq!(
        reasons.join(" "),
        "above_alpha patience above_alpha patience below_alpha no_return"
    );
    // The first entropies count, also where the start needs none of them.
    let latent = ControllerSpec {
        start: Start::Latent,
        ..one_block(2)
    };
    assert_eq!(letters(&replay(&latent, &free(&[0.4, 0.4, 0.9]))), "lEe");
    assert_eq!(modes(1, &[0.4, 0.9]), "ee");
}

#[test]
fn one_block_has_its_limits_like_every_gate() {
    let high = free(&[0.9; 6]);
    let budget = ControllerSpec {
        max_latent_steps: 4,
        ..one_block(1)
    };
    assert_eq!(letters(&replay(&budget, &high)), "llllEe");
    let dwell = ControllerSpec {
        min_dwell_latent: 4,
        ..one_block(1)
    };
    let decisions = replay(&dwell, &free(&[0.9, 0.4, 0.4, 0.4, 0.4, 0.9]));
    assert_eq!(letters(&decisions), "llllEe");
    assert_eq!(decisions[2].reason, Reason::Dwell);
    let none = ControllerSpec {
        cap: 0,
        ..one_block(1)
    };
    assert_eq!(letters(&replay(&none, &high)), "eeeeee");
    // A forced exit ends the block too.
    let mut forced = high;
    forced[2].1 = Some(Force::AnswerReserve);
    assert_eq!(letters(&replay(&one_block(1), &forced)), "llEeee");
}

#[test]
fn patience_is_one_where_it_is_not_said() {
    let mut value = serde_json::to_value(one_block(7)).unwrap();
    assert_eq!(value["patience"], 7);
    value.as_object_mut().unwrap().remove("patience");
    let spec: ControllerSpec = serde_json::from_value(value).unwrap();
    assert_eq!(spec, one_block(1));
}

fn modes_of(letters: &str) -> Vec<Mode> {
    letters
        .chars()
        .map(|c| {
            if c == 'l' {
                Mode::Latent
            } else {
                Mode::Explicit
            }
        })
        .collect()
}

#[test]
fn a_schedule_is_lengths_of_stretches_explicit_first() {
    let runs = |text: &str| {
        modes_of(text)
            .into_iter()
            .collect::<Schedule>()
            .runs()
            .to_vec()
    };
    assert!(runs("").is_empty());
    assert_eq!(runs("eel"), [2, 1]);
    assert_eq!(runs("lleeel"), [0, 2, 3, 1]);
    let schedule: Schedule = serde_json::from_str("[0, 2, 3, 1]").unwrap();
    assert_eq!(schedule, Schedule::from(vec![0, 2, 3, 1]));
    assert_eq!(serde_json::to_string(&schedule).unwrap(), "[0,2,3,1]");
    let told: Vec<Mode> = (0..9).map(|step| schedule.mode(step)).collect();
    assert_eq!(told, modes_of("lleeeleee"));
    assert_eq!(schedule.mode(u32::MAX), Mode::Explicit);
    assert_eq!(Schedule::default().mode(0), Mode::Explicit);
    // Stretches of no length, as a user may write them.
    let odd = Schedule::from(vec![0, 0, 1, 1]);
    assert_eq!([odd.mode(0), odd.mode(1)], [Mode::Explicit, Mode::Latent]);
    let mut more = Schedule::from(vec![3]);
    more.push(Mode::Explicit);
    more.push(Mode::Latent);
    assert_eq!(more.runs(), [4, 1]);
}

fn scheduled(
    spec: &ControllerSpec,
    schedule: &str,
    inputs: &[(f64, Option<Force>)],
) -> Vec<Decision> {
    let schedule = modes_of(schedule).into_iter().collect();
    let mut controller = ScheduleController::new(spec, schedule).unwrap();
    inputs
        .iter()
        .map(|&(entropy, force)| controller.observe(entropy, force).unwrap())
        .collect()
}

#[test]
fn a_schedule_is_followed_within_budget_cap_and_forces_but_without_dwell() {
    let inputs = free(&WAVE);
    let dwelling = ControllerSpec {
        min_dwell_latent: 5,
        min_dwell_explicit: 5,
        start: Start::Latent,
        ..base(Gate::AlwaysLatent)
    };
    let decisions = scheduled(&dwelling, "ellel", &inputs);
    assert_eq!(letters(&decisions), "eLlELEee");
    assert!(decisions.iter().all(|d| d.reason == Reason::Scheduled));
    let capped = ControllerSpec {
        cap: 2,
        ..base(Gate::Threshold)
    };
    let decisions = scheduled(&capped, "ellel", &inputs);
    assert_eq!(letters(&decisions), "eLlEeeee");
    assert_eq!(decisions[4].reason, Reason::Cap);
    let budget = ControllerSpec {
        max_latent_steps: 1,
        ..base(Gate::Threshold)
    };
    assert_eq!(letters(&scheduled(&budget, "ellel", &inputs)), "eLEeeeee");
    let mut forced = inputs;
    forced[1].1 = Some(Force::EosCertain);
    assert_eq!(letters(&scheduled(&dwelling, "ellel", &forced)), "eeLELEee");
    let invalid = ControllerSpec {
        cap: -5,
        ..base(Gate::Threshold)
    };
    assert!(ScheduleController::new(&invalid, Schedule::default()).is_err());
}

fn trigger_spec() -> TriggerSpec {
    TriggerSpec {
        converge_after: 1,
        converge_text: "</think>".into(),
        terminate_after: 2,
        terminate_text: "The final answer is".into(),
        terminate_steps: 6,
    }
}

/// `SwiReasoning`'s switch-count control with C: `</think>` at exits C to 2C, the answer at the next.
#[test]
fn exits_converge_and_then_terminate() {
    for c in 1..5 {
        let spec = TriggerSpec {
            converge_after: c,
            terminate_after: 2 * c,
            ..trigger_spec()
        };
        let mut triggers = Triggers::new(&spec).unwrap();
        for exit in 1..20 {
            let wanted = match exit {
                n if n < c => None,
                n if n <= 2 * c => Some(Inject::Converge),
                n if n == 2 * c + 1 => Some(Inject::Terminate),
                _ => None,
            };
            assert_eq!(triggers.force().is_some(), exit > 2 * c + 1);
            assert_eq!(triggers.exit(), wanted, "exit {exit} with C = {c}");
            assert_eq!(triggers.exits(), exit);
        }
        assert_eq!(triggers.force(), Some(Force::Terminated));
    }
}

/// Tokens are counted from the answer's text on, and no later exit gives more of them.
#[test]
fn a_terminated_sample_prints_so_many_tokens() {
    let mut triggers = Triggers::new(&trigger_spec()).unwrap();
    assert!((0..100).all(|_| !triggers.printed()));
    assert_eq!(triggers.exit(), Some(Inject::Converge));
    assert!((0..100).all(|_| !triggers.printed()));
    assert_eq!(triggers.exit(), Some(Inject::Converge));
    assert_eq!(triggers.force(), None);
    assert_eq!(triggers.exit(), Some(Inject::Terminate));
    let ends: Vec<bool> = (0..8)
        .map(|printed| {
            if printed == 3 {
                assert_eq!(triggers.exit(), None);
            }
            triggers.printed()
        })
        .collect();
    // The sixth is the last; whoever prints on is told again.
    assert_eq!(ends, [false, false, false, false, false, true, true, true]);
    assert_eq!(triggers.force(), Some(Force::Terminated));
}

#[test]
fn triggers_need_something_to_inject() {
    let spec = TriggerSpec {
        converge_text: String::new(),
        ..trigger_spec()
    };
    let error = Triggers::new(&spec).unwrap_err().to_string();
    assert_eq!(
        error,
        "triggers.converge_text is empty; it must be a text to inject"
    );
}

/// A user's rule that records what it is asked and fails on request.
struct Recorder {
    seen: std::sync::mpsc::Sender<(f64, Option<Mode>)>,
}

impl Rule for Recorder {
    fn wish(&mut self, entropy: f64, mode: Option<Mode>) -> Result<Mode, ControllerFailure> {
        self.seen.send((entropy, mode))?;
        if entropy == 13.0 {
            return Err("thirteen".into());
        }
        Ok(if entropy > 0.5 {
            Mode::Latent
        } else {
            Mode::Explicit
        })
    }
}

#[test]
fn a_rule_sees_every_entropy_and_keeps_the_limits() {
    let (seen, asked) = std::sync::mpsc::channel();
    let spec = ControllerSpec {
        min_dwell_latent: 2,
        ..base(Gate::AlwaysExplicit)
    };
    let mut controller = RuleController::new(&spec, Box::new(Recorder { seen })).unwrap();
    let inputs = [
        (0.9, None),
        (0.1, None),
        (0.8, Some(Force::Locked)),
        (0.7, None),
    ];
    let decisions: Vec<Decision> = inputs
        .iter()
        .map(|&(entropy, force)| controller.observe(entropy, force).unwrap())
        .collect();
    assert_eq!(letters(&decisions), "llEL");
    assert_eq!(
        decisions.iter().map(|d| d.reason).collect::<Vec<_>>(),
        [
            Reason::Custom,
            Reason::Dwell,
            Reason::Locked,
            Reason::Custom
        ]
    );
    let latent = Some(Mode::Latent);
    assert_eq!(
        asked.try_iter().collect::<Vec<_>>(),
        [
            (0.9, None),
            (0.1, latent),
            (0.8, latent),
            (0.7, Some(Mode::Explicit))
        ]
    );
    let error = controller.observe(13.0, None).unwrap_err();
    assert_eq!(error.to_string(), "thirteen");
    assert_eq!((controller.switches(), controller.latent_steps()), (2, 3));
}

fn spec() -> impl Strategy<Value = ControllerSpec> {
    (
        prop::sample::select(vec![
            Gate::Threshold,
            Gate::Trend,
            Gate::Reference,
            Gate::LatentThenExplicit,
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
        1_u32..5,
    )
        .prop_map(
            |(gate, w, alpha, cap, dwell, convergence_threshold, budget, latent, patience)| {
                ControllerSpec {
                    gate,
                    w: Some(w),
                    alpha,
                    cap,
                    min_dwell_latent: dwell.0,
                    min_dwell_explicit: dwell.1,
                    convergence_threshold,
                    max_latent_steps: budget,
                    start: if latent { Start::Latent } else { Start::Gate },
                    patience,
                    ..base(gate)
                }
            },
        )
}

fn inputs() -> impl Strategy<Value = Inputs> {
    let force = prop_oneof![
        9 => Just(None),
        1 => prop::sample::select(FORCES.to_vec()).prop_map(Some),
    ];
    // Repeated values, so that equal entropies meet.
    let entropy = prop_oneof![0.0_f64..1.0, (0_u8..10).prop_map(|i| f64::from(i) / 10.0)];
    prop::collection::vec((entropy, force), 0..80)
}

/// A rule that wishes at random.
struct Whim(Vec<bool>);

impl Rule for Whim {
    fn wish(&mut self, _: f64, _: Option<Mode>) -> Result<Mode, ControllerFailure> {
        let latent = self.0.pop().unwrap_or(false);
        Ok(if latent { Mode::Latent } else { Mode::Explicit })
    }
}

/// What every controller keeps, whoever wishes: budget, cap, forces, and dwell where it has one.
fn keeps_the_promises(
    controller: &mut dyn Controller,
    spec: &ControllerSpec,
    dwells: bool,
    inputs: &[(f64, Option<Force>)],
) -> Result<Vec<Mode>, TestCaseError> {
    let mut modes: Vec<Mode> = Vec::new();
    let (mut switches, mut run) = (0_u32, 0_u32);
    for &(entropy, force) in inputs {
        let decision = controller.observe(entropy, force).unwrap();
        let before = modes.last().copied();
        prop_assert_eq!(
            decision.switched,
            before.is_some_and(|mode| mode != decision.mode)
        );
        if decision.switched {
            switches += 1;
            let forced = force.is_some_and(|force| force.reason() == decision.reason);
            let gated = !forced && decision.reason != Reason::LatentBudget;
            let minimum = match before {
                Some(Mode::Latent) => spec.min_dwell_latent,
                _ => spec.min_dwell_explicit,
            };
            prop_assert!(!(gated && dwells) || run >= minimum);
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
        if spec.cap == 0 {
            prop_assert_eq!(decision.mode, Mode::Explicit);
        }
    }
    Ok(modes)
}

proptest! {
    #[test]
    fn every_sequence_keeps_the_promises(spec in spec(), inputs in inputs()) {
        let mut controller = GateController::new(&spec).unwrap();
        let modes = keeps_the_promises(&mut controller, &spec, true, &inputs)?;
        if spec.gate == Gate::AlwaysExplicit {
            prop_assert!(modes.iter().all(|&mode| mode == Mode::Explicit));
        }
        if spec.gate == Gate::LatentThenExplicit {
            let first = modes.iter().position(|&mode| mode == Mode::Explicit).unwrap_or(modes.len());
            prop_assert!(modes[first..].iter().all(|&mode| mode == Mode::Explicit));
        }
        prop_assert_eq!(replay(&spec, &inputs).iter().map(|d| d.mode).collect::<Vec<_>>(), modes);
    }

    #[test]
    fn rules_and_schedules_keep_the_same_promises(
        spec in spec(), inputs in inputs(), wishes in prop::collection::vec(any::<bool>(), 80)
    ) {
        let mut rule = RuleController::new(&spec, Box::new(Whim(wishes.clone()))).unwrap();
        keeps_the_promises(&mut rule, &spec, true, &inputs)?;
        let schedule = wishes
            .iter()
            .map(|&latent| if latent { Mode::Latent } else { Mode::Explicit })
            .collect();
        let mut scheduled = ScheduleController::new(&spec, schedule).unwrap();
        keeps_the_promises(&mut scheduled, &spec, false, &inputs)?;
    }

    #[test]
    fn a_schedule_gives_back_its_modes(modes in prop::collection::vec(any::<bool>(), 0..60)) {
        let modes: Vec<Mode> =
            modes.into_iter().map(|l| if l { Mode::Latent } else { Mode::Explicit }).collect();
        let schedule: Schedule = modes.iter().copied().collect();
        let told: Vec<Mode> = (0..modes.len() as u32).map(|step| schedule.mode(step)).collect();
        prop_assert_eq!(told, &modes[..]);
        prop_assert_eq!(schedule.runs().iter().sum::<u32>() as usize, modes.len());
        // Only the first stretch may be empty.
        prop_assert!(schedule.runs().iter().skip(1).all(|&run| run > 0));
        let text = serde_json::to_string(&schedule).unwrap();
        prop_assert_eq!(serde_json::from_str::<Schedule>(&text).unwrap(), schedule);
    }

    /// A run's own exits, at other entropies and without what forced them: its modes again.
    #[test]
    fn a_scheduled_run_has_the_modes_of_the_run_it_follows(
        spec in spec(), inputs in inputs(), other in 0.0_f64..1.0
    ) {
        let modes: Vec<Mode> = replay(&spec, &inputs).iter().map(|d| d.mode).collect();
        let schedule = modes.iter().copied().collect();
        let mut controller = ScheduleController::new(&spec, schedule).unwrap();
        for mode in modes {
            prop_assert_eq!(controller.observe(other, None).unwrap().mode, mode);
        }
        // Beyond the end it is explicit.
        prop_assert_eq!(controller.observe(other, None).unwrap().mode, Mode::Explicit);
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
