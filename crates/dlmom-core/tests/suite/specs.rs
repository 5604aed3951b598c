//! Ranges of the knobs: every error, by name and value.

use dlmom_core::{
    AlphaUnit, Calibrate, Center, ConsensusSpec, ControllerSpec, Elect, FilterSpec, Gate,
    GateController, MergeGate, Method, NoiseSpec, SamplingSpec, Start, Tie, TriggerSpec, Trim,
    WeightRule, Weights,
};
use serde_json::json;

fn controller() -> ControllerSpec {
    ControllerSpec {
        gate: Gate::Trend,
        w: Some(4),
        alpha: 0.6,
        alpha_unit: AlphaUnit::Normalized,
        cap: -1,
        min_dwell_latent: 0,
        min_dwell_explicit: 0,
        convergence_threshold: None,
        slope_eps: None,
        var_eps: None,
        max_latent_steps: 40,
        start: Start::Latent,
        patience: 1,
    }
}

#[test]
fn the_papers_alpha_gives_the_documented_defaults() {
    let spec = controller();
    spec.validate().unwrap();
    assert!((spec.convergence_threshold() - 0.15).abs() < 1e-15);
    assert!((spec.slope_eps() - 0.012).abs() < 1e-15);
    assert!((spec.var_eps() - 0.0036).abs() < 1e-15);
    let given = ControllerSpec {
        convergence_threshold: Some(0.3),
        slope_eps: Some(0.0),
        var_eps: Some(1.0),
        ..spec
    };
    assert_eq!(
        (
            given.convergence_threshold(),
            given.slope_eps(),
            given.var_eps()
        ),
        (0.3, 0.0, 1.0)
    );
}

#[test]
fn the_window_is_the_trend_gates_alone() {
    for gate in [
        Gate::Threshold,
        Gate::Reference,
        Gate::LatentThenExplicit,
        Gate::AlwaysLatent,
        Gate::AlwaysExplicit,
    ] {
        for w in [None, Some(0), Some(1)] {
            ControllerSpec {
                gate,
                w,
                ..controller()
            }
            .validate()
            .unwrap();
        }
    }
}

#[test]
fn messages_name_the_knob_and_the_value() {
    let ok = controller();
    let greedy = SamplingSpec::GREEDY;
    let bad_controllers = [
        ControllerSpec {
            alpha: f64::NAN,
            ..ok.clone()
        },
        ControllerSpec {
            alpha: -0.1,
            ..ok.clone()
        },
        ControllerSpec {
            alpha: f64::INFINITY,
            ..ok.clone()
        },
        ControllerSpec {
            cap: -2,
            ..ok.clone()
        },
        ControllerSpec {
            w: None,
            ..ok.clone()
        },
        ControllerSpec {
            w: Some(1),
            ..ok.clone()
        },
        ControllerSpec {
            convergence_threshold: Some(-1.0),
            ..ok.clone()
        },
        ControllerSpec {
            slope_eps: Some(f64::NAN),
            ..ok.clone()
        },
        ControllerSpec {
            var_eps: Some(-0.5),
            ..ok.clone()
        },
        ControllerSpec {
            alpha: 1.5,
            alpha_unit: AlphaUnit::Quantile,
            ..ok.clone()
        },
        ControllerSpec {
            patience: 0,
            ..ok.clone()
        },
    ];
    let mut messages: Vec<String> = bad_controllers
        .iter()
        .map(|spec| {
            let error = spec.validate().unwrap_err();
            GateController::new(spec).unwrap_err();
            error.to_string()
        })
        .collect();
    for (theta, eps) in [
        (-0.1, 1e-6),
        (f32::NAN, 1e-6),
        (0.1, -1.0),
        (0.1, f32::INFINITY),
    ] {
        messages.push(
            ConsensusSpec {
                theta,
                eps,
                ..ConsensusSpec::paper()
            }
            .validate(None)
            .unwrap_err()
            .to_string(),
        );
    }
    for value in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        messages.push(
            NoiseSpec::Gumbel { tau: value }
                .validate()
                .unwrap_err()
                .to_string(),
        );
        messages.push(
            NoiseSpec::Dirichlet { lambda: value }
                .validate()
                .unwrap_err()
                .to_string(),
        );
    }
    for spec in [
        SamplingSpec {
            temperature: -1.0,
            ..greedy
        },
        SamplingSpec {
            temperature: f64::NAN,
            ..greedy
        },
        SamplingSpec {
            top_p: 0.0,
            ..greedy
        },
        SamplingSpec {
            top_p: 1.1,
            ..greedy
        },
        SamplingSpec {
            min_p: 1.0,
            ..greedy
        },
        SamplingSpec {
            min_p: f64::NAN,
            ..greedy
        },
        SamplingSpec {
            repetition_penalty: 0.9,
            ..greedy
        },
        SamplingSpec {
            repetition_penalty: f64::NAN,
            ..greedy
        },
        SamplingSpec {
            repetition_penalty: f64::INFINITY,
            ..greedy
        },
    ] {
        messages.push(spec.validate().unwrap_err().to_string());
    }
    let filter = FilterSpec::NONE;
    for spec in [
        FilterSpec {
            temperature: 0.0,
            ..filter
        },
        FilterSpec {
            temperature: f64::NAN,
            ..filter
        },
        FilterSpec {
            top_p: 0.0,
            ..filter
        },
        FilterSpec {
            top_p: f64::NAN,
            ..filter
        },
        FilterSpec {
            min_p: -0.1,
            ..filter
        },
        FilterSpec {
            min_p: 1.0,
            ..filter
        },
    ] {
        messages.push(spec.validate().unwrap_err().to_string());
    }
    let triggers = triggers();
    for spec in [
        TriggerSpec {
            converge_after: 0,
            ..triggers.clone()
        },
        TriggerSpec {
            terminate_after: 1,
            ..triggers.clone()
        },
        TriggerSpec {
            converge_text: String::new(),
            ..triggers.clone()
        },
        TriggerSpec {
            terminate_text: String::new(),
            ..triggers.clone()
        },
        TriggerSpec {
            terminate_steps: 0,
            ..triggers.clone()
        },
    ] {
        messages.push(spec.validate().unwrap_err().to_string());
    }
    insta::assert_json_snapshot!(messages);
}

fn triggers() -> TriggerSpec {
    TriggerSpec {
        converge_after: 2,
        converge_text: "</think>".into(),
        terminate_after: 2,
        terminate_text: "Answer:".into(),
        terminate_steps: 1,
    }
}

/// The message for a specification written as in a file, for three experts.
fn message(spec: serde_json::Value) -> String {
    let spec: ConsensusSpec = serde_json::from_value(spec).unwrap();
    spec.validate(Some(3)).unwrap_err().to_string()
}

#[test]
fn consensus_messages_name_the_knob_and_the_value() {
    let gate = |gate| message(json!({ "method": "mean", "gate": gate }));
    let weights = |weights| message(json!({ "method": "mean", "weights": weights }));
    let messages = [
        message(json!({ "trim": "density", "theta": 0.0 })),
        message(json!({ "trim": "density", "theta": 1.5 })),
        message(json!({ "spectral": 0 })),
        weights(json!([1, -2, 1])),
        weights(json!([0, 0, 0])),
        weights(json!([1e308, 1e308, 1e308])),
        weights(json!([1, 2])),
        weights(json!([1, 2, 3, 4])),
        weights(json!([])),
        message(json!({ "calibrate": "temperature", "temperatures": [1, 0, 1] })),
        message(json!({ "calibrate": "temperature", "temperatures": [1, -1, 1] })),
        message(json!({ "calibrate": "temperature", "temperatures": [1, 1] })),
        gate(json!({})),
        gate(json!({ "pivot": 1 })),
        gate(json!({ "max_p": 0.0 })),
        gate(json!({ "max_p": 1.1 })),
        gate(json!({ "js": -0.1 })),
        gate(json!({ "js": 0.1, "pivot": 3 })),
        message(json!({ "center": "reference", "reference": 3 })),
    ];
    insta::assert_json_snapshot!(messages);
}

/// A knob that would reach nothing is an error, not silence.
#[test]
fn inert_knobs_are_refused() {
    let other = |knob: &str, value: serde_json::Value| {
        ["mean", "arith", "poe", "best", "mixture"].map(|method| {
            let mut spec = json!({ "method": method });
            spec[knob] = value.clone();
            message(spec)
        })
    };
    for (knob, value) in [
        ("theta", json!(0.2)),
        ("eps", json!(0.0)),
        ("center", json!("topk_union")),
        ("trim", json!("std")),
        ("elect", json!("mass")),
        ("tie", json!("mean")),
        ("spectral", json!(1)),
    ] {
        for message in other(knob, value) {
            assert_eq!(
                message,
                format!("{knob} reaches nothing beside a method other than ties")
            );
        }
    }
    assert_eq!(
        message(json!({ "reference": 1 })),
        "reference reaches nothing without center: reference"
    );
    for calibrate in ["none", "zscore"] {
        assert_eq!(
            message(json!({ "calibrate": calibrate, "temperatures": [1, 1, 1] })),
            "temperatures reaches nothing without calibrate: temperature"
        );
    }
}

#[test]
fn lists_and_places_are_checked_where_the_experts_are_known() {
    let spec: ConsensusSpec = serde_json::from_value(json!({
        "weights": [1, 2],
        "calibrate": "temperature",
        "temperatures": [1, 2],
        "center": "reference",
        "reference": 1,
        "gate": { "max_p": 0.5, "pivot": 1 },
    }))
    .unwrap();
    spec.validate(None).unwrap();
    spec.validate(Some(2)).unwrap();
    for experts in [1, 3] {
        spec.validate(Some(experts)).unwrap_err();
    }
    // Before a pilot has fitted them there are no temperatures to count.
    let unfitted = ConsensusSpec {
        calibrate: Calibrate::Temperature,
        ..ConsensusSpec::paper()
    };
    unfitted.validate(Some(5)).unwrap();
    assert!(unfitted.needs_pilot());
}

#[test]
fn what_a_file_leaves_out_is_the_papers() {
    let read = |value| serde_json::from_value::<ConsensusSpec>(value);
    assert_eq!(read(json!({})).unwrap(), ConsensusSpec::paper());
    assert_eq!(ConsensusSpec::default(), ConsensusSpec::paper());
    let full = ConsensusSpec {
        method: Method::Ties,
        theta: 0.25,
        eps: 0.0,
        center: Center::Reference,
        reference: 2,
        trim: Trim::Density,
        elect: Elect::Mass,
        tie: Tie::Mean,
        spectral: Some(2),
        weights: Weights::Fixed(vec![1.0, 2.0, 3.5]),
        calibrate: Calibrate::Temperature,
        temperatures: vec![0.5, 1.0, 2.0],
        gate: Some(MergeGate {
            max_p: Some(0.75),
            js: Some(0.5),
            pivot: 1,
        }),
    };
    full.validate(Some(3)).unwrap();
    let text = json!({
        "method": "ties",
        "theta": 0.25,
        "eps": 0.0,
        "center": "reference",
        "reference": 2,
        "trim": "density",
        "elect": "mass",
        "tie": "mean",
        "spectral": 2,
        "weights": [1.0, 2.0, 3.5],
        "calibrate": "temperature",
        "temperatures": [0.5, 1.0, 2.0],
        "gate": { "max_p": 0.75, "js": 0.5, "pivot": 1 },
    });
    assert_eq!(serde_json::to_value(&full).unwrap(), text);
    assert_eq!(read(text).unwrap(), full);
    for rule in [
        WeightRule::Uniform,
        WeightRule::Entropy,
        WeightRule::Margin,
        WeightRule::Pilot,
    ] {
        let spec = read(json!({ "weights": rule })).unwrap();
        assert_eq!(spec.weights, Weights::Rule(rule));
        assert_eq!(spec.needs_pilot(), rule == WeightRule::Pilot);
    }
    // A misspelt knob is not a default.
    read(json!({ "thetta": 0.2 })).unwrap_err();
    read(json!({ "gate": { "max_q": 0.2 } })).unwrap_err();
    let filter: FilterSpec = serde_json::from_value(json!({ "top_p": 0.9 })).unwrap();
    let want = FilterSpec {
        top_p: 0.9,
        ..FilterSpec::NONE
    };
    assert_eq!(filter, want);
    let sampling: SamplingSpec = serde_json::from_value(
        json!({ "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0 }),
    )
    .unwrap();
    assert_eq!(sampling, SamplingSpec::GREEDY);
}

#[test]
fn defaults_and_controls_are_valid() {
    ConsensusSpec::paper().validate(None).unwrap();
    for method in [
        Method::Ties,
        Method::Mean,
        Method::Arith,
        Method::Poe,
        Method::Best,
        Method::Mixture,
    ] {
        ConsensusSpec::of(method).validate(Some(4)).unwrap();
    }
    ControllerSpec::default().validate().unwrap();
    ControllerSpec {
        alpha: 1.0,
        alpha_unit: AlphaUnit::Quantile,
        ..controller()
    }
    .validate()
    .unwrap();
    FilterSpec::NONE.validate().unwrap();
    triggers().validate().unwrap();
    NoiseSpec::None.validate().unwrap();
    NoiseSpec::Gumbel { tau: 0.5 }.validate().unwrap();
    SamplingSpec::GREEDY.validate().unwrap();
    SamplingSpec {
        temperature: 0.6,
        top_k: 30,
        top_p: 0.95,
        min_p: 0.001,
        repetition_penalty: 1.1,
    }
    .validate()
    .unwrap();
}
