//! The paper's table, typed out, and the ways a registry or a selection can be wrong.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{ENSEMBLE, SHARED, plan};
use dlmom_core::{
    AlphaUnit, Calibrate, Center, ConsensusSpec, Elect, FilterSpec, Gate, Method, SamplingSpec,
    Start, Tie, Trim, WeightRule, Weights,
};
use dlmom_runs::{
    CellKind, Comm, Experiment, Kv, Overrides, Pilot, Placement, REF, Registry, Setting, SoftMode,
    Unsupported,
};
use dlmom_runtime::{
    Align, Handoff, HandoffControl, PacketControl, Role, Sequential, Support, Topology,
    WireEncoding,
};
use proptest::prelude::*;
use serde_json::json;

/// The reference pipeline of an ensemble, every knob typed out.
fn reference() -> Experiment {
    Experiment {
        id: "REF".into(),
        suite: "REF".into(),
        soft_mode: SoftMode::Deterministic,
        tau: None,
        lambda: None,
        gate: Gate::Threshold,
        alpha: 0.60,
        alpha_unit: AlphaUnit::Normalized,
        w: None,
        cap: 10,
        min_dwell_latent: 1,
        min_dwell_explicit: 1,
        convergence_threshold: 0.15,
        slope_eps: 0.012,
        var_eps: (0.1f64 * 0.60).powi(2),
        start: Start::Gate,
        patience: 1,
        triggers: None,
        lock_text: None,
        enter_signal: None,
        exit_signal: None,
        filter: FilterSpec::NONE,
        max_latent_steps: 40,
        max_steps: 256,
        answer_reserve: 32,
        answer_cue: None,
        k: 50,
        comm: Comm::Belief,
        encoding: WireEncoding::F32,
        support: Support::Full,
        align: Align::Ridge,
        handoff: None,
        max_handoffs: None,
        packet_control: PacketControl::Real,
        handoff_control: HandoffControl::Real,
        same_exits: false,
        drop_latent: false,
        kv: Kv::None,
        consensus: ConsensusSpec {
            method: Method::Ties,
            theta: 0.1,
            eps: 1e-6,
            center: Center::Mean,
            reference: 0,
            trim: Trim::Abs,
            elect: Elect::Count,
            tie: Tie::Zero,
            spectral: None,
            weights: Weights::Rule(WeightRule::Uniform),
            calibrate: Calibrate::None,
            temperatures: Vec::new(),
            gate: None,
        },
        sampling: SamplingSpec {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        },
    }
}

const PAPER: [&str; 4] = ["A1", "A2", "A3", "A4"];

/// Two agents of one model or of two, one after the other.
fn chain(shared_model: bool) -> Setting {
    Setting {
        topology: Topology::Sequential(Sequential {
            roles: ["generalist", "specialist"].map(Role::named).to_vec(),
            handoff: Handoff::Transcript,
            max_handoffs: None,
            on_failure: None,
        }),
        ..Setting::lockstep(2, shared_model)
    }
}

/// Section 6.5.4 of the paper by hand; `None` where the cell is the reference pipeline under another name.
fn papers_table() -> Vec<(&'static str, Experiment)> {
    let cell = |id: &'static str, change: &dyn Fn(&mut Experiment)| {
        let mut experiment = reference();
        experiment.id = id.into();
        experiment.suite = id[..2].into();
        change(&mut experiment);
        (id, experiment)
    };
    let gumbel = |tau| {
        move |e: &mut Experiment| {
            e.soft_mode = SoftMode::Gumbel;
            e.tau = Some(tau);
        }
    };
    let dirichlet = |lambda| {
        move |e: &mut Experiment| {
            e.soft_mode = SoftMode::Dirichlet;
            e.lambda = Some(lambda);
        }
    };
    let trend = |w, cap| {
        move |e: &mut Experiment| {
            e.gate = Gate::Trend;
            e.w = Some(w);
            e.cap = cap;
        }
    };
    vec![
        cell("A1.1", &|_| {}),
        cell("A1.2", &gumbel(0.5)),
        cell("A1.3", &gumbel(1.0)),
        cell("A1.4", &gumbel(2.0)),
        cell("A1.5", &dirichlet(20.0)),
        cell("A1.6", &dirichlet(50.0)),
        cell("A1.7", &dirichlet(100.0)),
        cell("A2.1", &|e| e.cap = -1),
        cell("A2.2", &trend(3, -1)),
        cell("A2.3", &trend(5, -1)),
        cell("A2.4", &trend(10, -1)),
        cell("A2.5", &trend(5, 2)),
        cell("A2.6", &trend(5, 5)),
        cell("A2.7", &trend(5, 10)),
        cell("A3.1", &|e| e.comm = Comm::Embed),
        cell("A3.2", &|e| e.k = 10),
        cell("A3.3", &|_| {}),
        cell("A3.4", &|e| e.k = 100),
        cell("A3.5", &|e| {
            e.comm = Comm::Logits;
            e.k = -1;
        }),
        cell("A4.1", &|_| {}),
        cell("A4.2", &|e| e.kv = Kv::Kivi2bit),
        cell("A4.3", &|e| e.kv = Kv::Minicache),
        cell("A4.4", &|e| e.kv = Kv::MinicacheKivi2bit),
    ]
}

#[test]
fn the_paper_is_expanded_exactly() {
    let plan = plan(&PAPER, &[], &ENSEMBLE);
    assert_eq!(plan.cells[0].experiment, reference());
    let expanded: Vec<_> = plan.cells[1..]
        .iter()
        .map(|c| c.experiment.clone())
        .collect();
    let typed: Vec<_> = papers_table().into_iter().map(|(_, e)| e).collect();
    assert_eq!(expanded, typed);
}

#[test]
fn agents_of_one_model_inherit_embed() {
    for cell in plan(&PAPER, &[], &SHARED).cells {
        let expected = match cell.experiment.id.as_str() {
            "A3.2" | "A3.3" | "A3.4" => Comm::Belief,
            "A3.5" => Comm::Logits,
            _ => Comm::Embed,
        };
        assert_eq!(cell.experiment.comm, expected, "{}", cell.experiment.id);
    }
}

fn outline(suites: &[&str], only: &[&str], setting: &Setting) -> String {
    let lines: Vec<String> = plan(suites, only, setting)
        .cells
        .iter()
        .map(|c| {
            let kind = match &c.kind {
                CellKind::Run => "run".to_owned(),
                CellKind::Alias { of } => format!("= {of}"),
                CellKind::Skip { reason } => format!("skip: {reason}"),
            };
            format!("{} {kind}", c.experiment.id)
        })
        .collect();
    lines.join("\n")
}

#[test]
fn equal_cells_run_once_and_impossible_ones_not_at_all() {
    insta::assert_snapshot!("plan_ensemble", outline(&PAPER, &[], &ENSEMBLE));
    insta::assert_snapshot!("plan_shared", outline(&["A4", "A3"], &[], &SHARED));
    insta::assert_snapshot!(
        outline(&["A1", "A2"], &["A2.3", "A1.1", "A1.2"], &ENSEMBLE),
        @r"
    REF run
    A1.1 = REF
    A1.2 run
    A2.3 run
    "
    );
    assert_eq!(outline(&[], &[REF], &ENSEMBLE), "REF run");
}

fn expand(overrides: &Overrides) -> Result<dlmom_runs::Plan, dlmom_runs::RegistryError> {
    Registry::builtin()
        .unwrap()
        .expand(&PAPER.map(String::from), &[], &ENSEMBLE, overrides)
}

#[test]
fn the_command_line_fills_only_what_a_cell_does_not_name() {
    let overrides = Overrides {
        alpha: Some(0.3),
        alpha_unit: Some(AlphaUnit::Nats),
        max_switches: Some(4),
        max_steps: Some(64),
        k: Some(20),
        ..Overrides::default()
    };
    for cell in expand(&overrides).unwrap().cells {
        let e = cell.experiment;
        assert_eq!(
            (e.alpha, e.alpha_unit, e.max_steps, e.answer_reserve),
            (0.3, AlphaUnit::Nats, 64, 16)
        );
        assert!((e.convergence_threshold - 0.075).abs() < 1e-12);
        let cap = match e.id.as_str() {
            "A2.1" | "A2.2" | "A2.3" | "A2.4" => -1,
            "A2.5" => 2,
            "A2.6" => 5,
            "A2.7" => 10,
            _ => 4,
        };
        assert_eq!(e.cap, cap, "{}", e.id);
        let k = match e.id.as_str() {
            "A3.2" => 10,
            "A3.3" => 50,
            "A3.4" => 100,
            "A3.5" => -1,
            _ => 20,
        };
        assert_eq!(e.k, k, "{}", e.id);
    }
}

#[test]
fn what_is_not_built_yet_is_named() {
    let said = |suites: &[&str], setting: &Setting| {
        plan(suites, &[], setting)
            .check_supported()
            .unwrap_err()
            .to_string()
    };
    for setting in [ENSEMBLE, SHARED, chain(true), chain(false)] {
        plan(
            &["A1", "A2", "A3", "A1x", "K1", "K2", "C1", "C2"],
            &[],
            &setting,
        )
        .check_supported()
        .unwrap();
    }
    plan(&[], &["A4.1"], &SHARED).check_supported().unwrap();
    assert_eq!(
        said(&["A4"], &SHARED),
        "A4.2: kv: kivi2bit is not built yet; none is"
    );
    let mut own = reference();
    own.kv = Kv::Minicache;
    assert!(matches!(
        own.loop_config(&Placement::default()),
        Err(Unsupported::Kv {
            kv: "minicache",
            ..
        })
    ));
}

#[test]
fn cells_say_what_crosses_a_link() {
    let links = |setting: &Setting, overrides: &Overrides| {
        Registry::builtin()
            .unwrap()
            .expand(&["A3".into()], &[], setting, overrides)
            .unwrap()
            .cells
            .into_iter()
            .map(|cell| {
                let what = match &cell.kind {
                    CellKind::Run => {
                        let config = cell.experiment.loop_config(&Placement::default()).unwrap();
                        config.validate(Some(491)).unwrap();
                        let link = config.link;
                        format!(
                            "k {} {:?} {:?} {:?}",
                            config.k, link.message, link.encoding, link.support
                        )
                    }
                    CellKind::Alias { of } => format!("same as {of}"),
                    CellKind::Skip { reason } => format!("skipped: {reason}"),
                };
                format!("{}: {what}", cell.experiment.id)
            })
            .collect::<Vec<_>>()
            .join("\n")
    };
    let packet = Overrides {
        support: Some(Support::Packet),
        encoding: Some(WireEncoding::Compact),
        ..Overrides::default()
    };
    let none = Overrides::default();
    insta::assert_snapshot!(format!(
        "experts of two models\n{}\nagents of one model\n{}\nthe same, compact packets up and down\n{}",
        links(&ENSEMBLE, &none),
        links(&SHARED, &none),
        links(&SHARED, &packet)
    ));
}

#[test]
fn every_runnable_cell_is_a_valid_loop() {
    for setting in [ENSEMBLE, SHARED, chain(true), chain(false)] {
        let placement = Placement {
            topology: setting.topology.clone(),
            pilot: Some(Pilot::assumed(2)),
        };
        let mut cells = 0;
        for experiment in plan(&[], &[], &setting).runs() {
            if experiment.supported().is_err() {
                continue;
            }
            let config = experiment.loop_config(&placement).unwrap();
            config.validate(Some(491)).unwrap();
            config.validate_agents(2).unwrap();
            assert_eq!(
                config.is_deterministic(),
                experiment.is_deterministic(),
                "{}",
                experiment.id
            );
            cells += 1;
        }
        assert!(cells > 20);
    }
}

/// The knobs in which a cell is not the reference pipeline, as JSON.
fn differences(setting: &Setting, suite: &str) -> Vec<String> {
    let plan = plan(&[suite], &[], setting);
    let base = plan.cells[0].experiment.knobs().unwrap();
    plan.cells[1..]
        .iter()
        .map(|cell| {
            let own = cell.experiment.knobs().unwrap();
            let apart: Vec<String> = own
                .as_object()
                .unwrap()
                .iter()
                .filter(|(name, value)| base[name.as_str()] != **value)
                .map(|(name, value)| format!("{name}: {value}"))
                .collect();
            let fate = match &cell.kind {
                CellKind::Run => String::new(),
                CellKind::Alias { of } => format!(" (same as {of})"),
                CellKind::Skip { reason } => format!(" (skipped: {reason})"),
            };
            format!("{}: {}{fate}", cell.experiment.id, apart.join(", "))
        })
        .collect()
}

#[test]
fn controls_and_variants_take_one_thing_away() {
    insta::assert_snapshot!(
        "beyond_the_paper",
        format!(
            "in a chain\n{}\n{}\n\nin lockstep\n{}\n{}\n{}",
            differences(&chain(true), "C1").join("\n"),
            differences(&chain(true), "C2").join("\n"),
            differences(&ENSEMBLE, "C2").join("\n"),
            differences(&ENSEMBLE, "A1x").join("\n"),
            [differences(&ENSEMBLE, "K1"), differences(&ENSEMBLE, "K2")]
                .concat()
                .join("\n"),
        )
    );
}

#[test]
fn agents_of_a_chain_have_nothing_to_merge() {
    let kinds: Vec<_> = plan(&["K1"], &[], &chain(true))
        .cells
        .into_iter()
        .skip(1)
        .map(|cell| cell.kind)
        .collect();
    assert!(
        kinds.iter().all(
            |kind| matches!(kind, CellKind::Skip { reason } if reason.starts_with("consensus"))
        ),
        "{kinds:?}"
    );
}

#[test]
fn handoffs_belong_to_chains() {
    let expand = |setting: &Setting, overrides: &Overrides| {
        Registry::builtin()
            .unwrap()
            .expand(&["C2".into()], &[], setting, overrides)
    };
    let overrides = Overrides {
        handoff: Some(Handoff::Text),
        max_handoffs: Some(3),
        ..Overrides::default()
    };
    let said = expand(&ENSEMBLE, &overrides).unwrap_err().to_string();
    assert_eq!(
        said,
        "--max-handoffs: only a sequential topology hands anything over; add --topology sequential"
    );
    for cell in expand(&chain(true), &overrides).unwrap().cells {
        let e = cell.experiment;
        assert_eq!((e.handoff, e.max_handoffs), (Some(Handoff::Text), Some(3)));
        // A control of the transcript means nothing where none is handed over.
        assert_eq!(
            matches!(cell.kind, CellKind::Skip { .. }),
            e.id != REF,
            "{}",
            e.id
        );
    }
    let cache = Overrides {
        handoff: Some(Handoff::Kv),
        ..Overrides::default()
    };
    let refused = expand(&chain(false), &cache).unwrap().cells;
    assert!(
        matches!(&refused[1].kind, CellKind::Skip { reason } if reason.starts_with("handoff: kv needs agents of one model")),
        "{:?}",
        refused[1].kind
    );
}

#[test]
fn what_a_pilot_fits_takes_the_place_of_its_rules() {
    let text = "suites: {S: [{id: t, consensus: {method: mean, calibrate: temperature}}, {id: w, consensus: {method: mean, weights: pilot}}, {id: q, alpha_unit: quantile, alpha: 0.9}]}";
    let plan = Registry::parse("own.yaml", text)
        .unwrap()
        .expand(&[], &[], &ENSEMBLE, &Overrides::default())
        .unwrap();
    let cell = |id: &str| {
        plan.cells
            .iter()
            .find(|c| c.experiment.id == id)
            .unwrap()
            .experiment
            .clone()
    };
    let bare = Placement::default();
    let said: Vec<String> = ["t", "w", "q"]
        .iter()
        .map(|id| cell(id).loop_config(&bare).unwrap_err().to_string())
        .collect();
    assert_eq!(
        said,
        [
            "t: calibrate: temperature needs a pilot run, and the folder records none",
            "w: weights: pilot needs a pilot run, and the folder records none",
            "q: alpha_unit: quantile needs a pilot run, and the folder records none",
        ]
    );
    let fitted = Placement {
        pilot: Some(Pilot {
            temperatures: Some(vec![0.5, 2.0]),
            cross_entropies: Some(vec![0.1, 0.4]),
            ..Pilot::assumed(2)
        }),
        ..Placement::default()
    };
    let config = |id: &str| cell(id).loop_config(&fitted).unwrap();
    assert_eq!(config("t").consensus.temperatures, [0.5, 2.0]);
    let Weights::Fixed(weights) = config("w").consensus.weights else {
        panic!("weights are numbers now");
    };
    // exp(-c), of which only the ratio matters.
    assert!((weights[1] / weights[0] - (-0.3f64).exp()).abs() < 1e-12);
    assert_eq!(config("q").ranks, Some(dlmom_core::Ranks::identity()));
    assert_eq!(config("t").ranks, None);
}

#[test]
fn digests_cover_knobs_and_context_but_not_names() {
    let context = json!({"dtype": "bf16"});
    let (a, mut b) = (reference(), reference());
    b.id = "A1.1".into();
    b.suite = "A1".into();
    assert_eq!(
        a.config_hash(&context).unwrap(),
        b.config_hash(&context).unwrap()
    );
    assert_eq!(a.config_hash(&context).unwrap().len(), 64);
    b.max_steps = 255;
    assert_ne!(
        a.config_hash(&context).unwrap(),
        b.config_hash(&context).unwrap()
    );
    assert_ne!(
        a.config_hash(&context).unwrap(),
        a.config_hash(&json!({})).unwrap()
    );
}

#[test]
fn absent_is_filled_and_null_is_a_value() {
    let text = "defaults: {tau: 0.5, w: 4, cap: 3}\nsuites:\n  S:\n    - {id: a}\n    - {id: b, tau: null, w: null}\n";
    let registry = Registry::parse("own.yaml", text).unwrap();
    let plan = registry
        .expand(&[], &[], &ENSEMBLE, &Overrides::default())
        .unwrap();
    let facts: Vec<_> = plan
        .cells
        .iter()
        .map(|c| {
            (
                c.experiment.id.as_str(),
                c.experiment.tau,
                c.experiment.w,
                c.experiment.cap,
            )
        })
        .collect();
    assert_eq!(
        facts,
        [
            ("REF", Some(0.5), Some(4), 3),
            ("a", Some(0.5), Some(4), 3),
            ("b", None, None, 3)
        ]
    );
}

#[test]
fn an_own_file_may_set_every_knob() {
    let text = "
suites:
  mine:
    - id: all
      soft_mode: gumbel
      tau: 1
      lambda: null
      gate: trend
      alpha: 0.5
      alpha_unit: nats
      w: 3
      cap: 0
      min_dwell_latent: 2
      min_dwell_explicit: 3
      convergence_threshold: 0.1
      slope_eps: 0.2
      var_eps: 0.3
      start: latent
      patience: 2
      triggers: {converge_after: 1, converge_text: a, terminate_after: 2, terminate_text: b, terminate_steps: 3}
      lock_text: '</think>'
      enter_signal: {text: x, weight: 0.5}
      exit_signal: {text: y, weight: 0.25}
      filter: {temperature: 0.6, top_p: 0.95, min_p: 0.001, keep: 10}
      align: identity
      packet_control: shuffle
      same_exits: true
      drop_latent: true
      max_latent_steps: 7
      max_steps: 99
      answer_reserve: 9
      answer_cue: 'So: '
      k: 5
      comm: belief
      kv: none
      consensus: {method: mean, weights: [1, 2], gate: {max_p: 0.5, pivot: 1}}
      sampling: {temperature: 0.7, top_k: 3, top_p: 0.9, min_p: 0.0, repetition_penalty: 1.1}
";
    let registry = Registry::parse("own.yaml", text).unwrap();
    let plan = registry
        .expand(&[], &[], &ENSEMBLE, &Overrides::default())
        .unwrap();
    let cell = &plan.cells[1].experiment;
    assert_eq!(cell.answer_cue.as_deref(), Some("So: "));
    assert_eq!(cell.consensus.method, Method::Mean);
    assert_eq!(cell.consensus.weights, Weights::Fixed(vec![1.0, 2.0]));
    assert!(!cell.is_deterministic());
    let yaml = dlmom_runs::yaml::to_string(cell).unwrap();
    insta::assert_snapshot!("expanded_yaml", yaml);
    assert_eq!(
        dlmom_runs::yaml::from_str::<Experiment>("x", &yaml).unwrap(),
        *cell
    );
}

#[test]
fn wrong_files_are_explained() {
    let cases = [
        "suites: [",
        "",
        "suites: {}",
        "defaults: {alhpa: 0.6}\nsuites: {S: [{id: a}]}",
        "suites:\n  S:\n    - {id: a, soft_mod: gumbel}",
        "suites:\n  S:\n    - {id: a, gate: trends}",
        "suites:\n  S:\n    - {id: a, alpha: high}",
        "suites:\n  S:\n    - {id: a, k: 1.5}",
        "suites:\n  S:\n    - {id: a, k: 1, k: 2}",
        "suites:\n  S: [{id: a}]\n  S: [{id: b}]",
        "suites:\n  S:\n    - {id: a}\n    - {id: A}",
        "suites:\n  S:\n    - {gate: trend}",
        "suites:\n  S:\n    - {id: ref}",
        "suites:\n  S:\n    - {id: a/b}",
        "suites:\n  S:\n    - {id: .a}",
        "suites:\n  S:\n    - {id: a, cap: null}",
        "defaults: {k: null}\nsuites: {S: [{id: a}]}",
        "suites:\n  S:\n    - id: a\n    gate: trend",
        "suites: {S: [{id: a, consensus: {method: ties, thet: 1}}]}",
        "suites: {S: [{id: a, packet_control: unifrom}]}",
        "suites: {S: [{id: a, gate: swir}]}",
        "suites: {S: [{id: a, filter: {keep: -1}}]}",
        "base: &b {id: a}\nsuites: {S: [*b]}",
    ];
    let said: Vec<String> = cases
        .iter()
        .map(|text| {
            Registry::parse("own.yaml", text)
                .map(drop)
                .unwrap_err()
                .to_string()
        })
        .collect();
    insta::assert_snapshot!("file_errors", said.join("\n"));
}

#[test]
fn wrong_values_name_file_cell_field_and_value() {
    let cells = [
        "soft_mode: gumbel",
        "soft_mode: gumbel, tau: 0",
        "soft_mode: gumbel, tau: .nan",
        "tau: -1",
        "soft_mode: dirichlet",
        "soft_mode: dirichlet, lambda: -3",
        "gate: trend",
        "gate: trend, w: 1",
        "alpha: .nan",
        "alpha: -0.1",
        "alpha: .inf",
        "cap: -2",
        "k: 0",
        "k: -3",
        "k: 5000000000",
        "max_steps: 0",
        "max_steps: 4, answer_reserve: 5",
        "sampling: {temperature: -1, top_k: 0, top_p: 1, min_p: 0}",
        "consensus: {method: ties, theta: -1, eps: 0}",
        "convergence_threshold: -1",
        "alpha: 1.5, alpha_unit: quantile",
        "alpha: -0.5, alpha_unit: quantile",
        "gate: latent_then_explicit, patience: 0",
        "filter: {temperature: 0}",
        "filter: {top_p: 0}",
        "sampling: {temperature: 1, top_k: 0, top_p: 1, min_p: 0, repetition_penalty: 0.5}",
        "consensus: {method: mean, theta: 0.2}",
        "consensus: {method: ties, trim: density, theta: 1.5}",
        "consensus: {method: ties, spectral: 0}",
        "consensus: {method: mean, weights: [1, -1]}",
        "triggers: {converge_after: 3, converge_text: a, terminate_after: 2, terminate_text: b, terminate_steps: 1}",
    ];
    let said: Vec<String> = cells
        .iter()
        .map(|knobs| {
            let text = format!("suites: {{S: [{{id: x1, {knobs}}}]}}");
            let registry = Registry::parse("own.yaml", &text).unwrap();
            let plan = registry.expand(&[], &[], &ENSEMBLE, &Overrides::default());
            plan.map(drop).unwrap_err().to_string()
        })
        .collect();
    insta::assert_snapshot!("value_errors", said.join("\n"));
}

#[test]
fn wrong_words_and_flags_are_explained() {
    let registry = Registry::builtin().unwrap();
    let none = Overrides::default();
    let words = |s: &[&str], o: &[&str]| {
        let strings = |w: &[&str]| w.iter().map(ToString::to_string).collect::<Vec<_>>();
        let plan = registry.expand(&strings(s), &strings(o), &ENSEMBLE, &none);
        plan.map(drop).unwrap_err().to_string()
    };
    let flags = [
        Overrides {
            alpha: Some(f64::NAN),
            ..none.clone()
        },
        Overrides {
            alpha: Some(-1.0),
            ..none.clone()
        },
        Overrides {
            max_switches: Some(-2),
            ..none.clone()
        },
        Overrides {
            max_steps: Some(0),
            ..none.clone()
        },
        Overrides {
            k: Some(0),
            ..none.clone()
        },
        Overrides {
            answer_reserve: Some(300),
            ..none.clone()
        },
    ];
    let mut said = vec![
        words(&["a1"], &[]),
        words(&["B"], &[]),
        words(&["A1"], &["A1.8"]),
        words(&["A1"], &["A2.1"]),
    ];
    said.extend(flags.iter().map(|f| expand(f).unwrap_err().to_string()));
    insta::assert_snapshot!("selection_errors", said.join("\n"));
    let missing = Registry::load(std::path::Path::new("no-such-file.yaml")).unwrap_err();
    assert!(
        missing
            .to_string()
            .starts_with("no-such-file.yaml: cannot read: ")
    );
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic(text in "\\PC{0,80}|[-a-z:{}\\[\\], \n#&*!|>'\"0-9.]{0,120}") {
        let _ = Registry::parse("own.yaml", &text);
    }

    #[test]
    fn mutated_files_are_read_without_panic(at in 0usize..1500, byte in any::<u8>()) {
        let mut text = include_bytes!("../../../configs/suites.yaml").to_vec();
        let at = at % text.len();
        text[at] = byte;
        let _ = Registry::parse("own.yaml", &String::from_utf8_lossy(&text));
    }
}
