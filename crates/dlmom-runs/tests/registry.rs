//! The paper's table, typed out, and the ways a registry or a selection can be wrong.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

mod common;

use common::{ENSEMBLE, SHARED, plan};
use dlmom_core::{AlphaUnit, ConsensusSpec, Gate, SamplingSpec, Start};
use dlmom_runs::{
    CellKind, Comm, Experiment, Kv, Overrides, REF, Registry, Setting, SoftMode, Unsupported,
};
use dlmom_runtime::{Support, WireEncoding};
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
        max_latent_steps: 40,
        max_steps: 256,
        answer_reserve: 32,
        answer_cue: None,
        k: 50,
        comm: Comm::Belief,
        encoding: WireEncoding::F32,
        support: Support::Full,
        kv: Kv::None,
        consensus: ConsensusSpec::Ties {
            theta: 0.1,
            eps: 1e-6,
        },
        sampling: SamplingSpec {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
        },
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
    let plan = plan(&[], &[], ENSEMBLE);
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
    for cell in plan(&[], &[], SHARED).cells {
        let expected = match cell.experiment.id.as_str() {
            "A3.2" | "A3.3" | "A3.4" => Comm::Belief,
            "A3.5" => Comm::Logits,
            _ => Comm::Embed,
        };
        assert_eq!(cell.experiment.comm, expected, "{}", cell.experiment.id);
    }
}

fn outline(suites: &[&str], only: &[&str], setting: Setting) -> String {
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
    insta::assert_snapshot!("plan_ensemble", outline(&[], &[], ENSEMBLE));
    insta::assert_snapshot!("plan_shared", outline(&["A4", "A3"], &[], SHARED));
    insta::assert_snapshot!(
        outline(&["A1", "A2"], &["A2.3", "A1.1", "A1.2"], ENSEMBLE),
        @r"
    REF run
    A1.1 = REF
    A1.2 run
    A2.3 run
    "
    );
    assert_eq!(outline(&[], &[REF], ENSEMBLE), "REF run");
}

fn expand(overrides: &Overrides) -> Result<dlmom_runs::Plan, dlmom_runs::RegistryError> {
    Registry::builtin()
        .unwrap()
        .expand(&[], &[], ENSEMBLE, overrides)
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
    let said = |suites: &[&str], setting| {
        plan(suites, &[], setting)
            .check_supported()
            .unwrap_err()
            .to_string()
    };
    for setting in [ENSEMBLE, SHARED] {
        plan(&["A1", "A2", "A3"], &[], setting)
            .check_supported()
            .unwrap();
    }
    plan(&[], &["A4.1"], SHARED).check_supported().unwrap();
    assert_eq!(
        said(&["A4"], SHARED),
        "A4.2: kv: kivi2bit is not built yet; none is"
    );
    let mut own = reference();
    own.kv = Kv::Minicache;
    assert!(matches!(
        own.loop_config(),
        Err(Unsupported::Kv {
            kv: "minicache",
            ..
        })
    ));
}

#[test]
fn cells_say_what_crosses_a_link() {
    let links = |setting, overrides: &Overrides| {
        Registry::builtin()
            .unwrap()
            .expand(&["A3".into()], &[], setting, overrides)
            .unwrap()
            .cells
            .into_iter()
            .map(|cell| {
                let what = match &cell.kind {
                    CellKind::Run => {
                        let config = cell.experiment.loop_config().unwrap();
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
        links(ENSEMBLE, &none),
        links(SHARED, &none),
        links(SHARED, &packet)
    ));
}

#[test]
fn every_runnable_cell_is_a_valid_loop() {
    for setting in [ENSEMBLE, SHARED] {
        for experiment in plan(&["A1", "A2", "A3"], &[], setting).runs() {
            let config = experiment.loop_config().unwrap();
            config.validate(Some(491)).unwrap();
            assert_eq!(config.is_deterministic(), experiment.is_deterministic());
        }
    }
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
        .expand(&[], &[], ENSEMBLE, &Overrides::default())
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
      max_latent_steps: 7
      max_steps: 99
      answer_reserve: 9
      answer_cue: 'So: '
      k: 5
      comm: belief
      kv: none
      consensus: {method: mean}
      sampling: {temperature: 0.7, top_k: 3, top_p: 0.9, min_p: 0.0}
";
    let registry = Registry::parse("own.yaml", text).unwrap();
    let plan = registry
        .expand(&[], &[], ENSEMBLE, &Overrides::default())
        .unwrap();
    let cell = &plan.cells[1].experiment;
    assert_eq!(cell.answer_cue.as_deref(), Some("So: "));
    assert_eq!(cell.consensus, ConsensusSpec::Mean);
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
    ];
    let said: Vec<String> = cells
        .iter()
        .map(|knobs| {
            let text = format!("suites: {{S: [{{id: x1, {knobs}}}]}}");
            let registry = Registry::parse("own.yaml", &text).unwrap();
            let plan = registry.expand(&[], &[], ENSEMBLE, &Overrides::default());
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
        let plan = registry.expand(&strings(s), &strings(o), ENSEMBLE, &none);
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
