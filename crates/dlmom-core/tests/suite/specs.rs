//! Ranges of the knobs: every error, by name and value.

use dlmom_core::{
    AlphaUnit, ConsensusSpec, ControllerSpec, Gate, GateController, NoiseSpec, SamplingSpec, Start,
};

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
    for gate in [Gate::Threshold, Gate::AlwaysLatent, Gate::AlwaysExplicit] {
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
            ConsensusSpec::Ties { theta, eps }
                .validate()
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
    ] {
        messages.push(spec.validate().unwrap_err().to_string());
    }
    insta::assert_json_snapshot!(messages);
}

#[test]
fn defaults_and_controls_are_valid() {
    ConsensusSpec::paper().validate().unwrap();
    ConsensusSpec::Mean.validate().unwrap();
    NoiseSpec::None.validate().unwrap();
    NoiseSpec::Gumbel { tau: 0.5 }.validate().unwrap();
    SamplingSpec::GREEDY.validate().unwrap();
    SamplingSpec {
        temperature: 0.6,
        top_k: 30,
        top_p: 0.95,
        min_p: 0.001,
    }
    .validate()
    .unwrap();
}
