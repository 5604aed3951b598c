//! Preset files, and what is refused of them.

use dlmom_runtime::Backend;

use super::*;

fn all() -> Vec<Preset> {
    Preset::all().unwrap()
}

#[test]
fn the_shipped_presets_are_these_seven() {
    let names: Vec<String> = all().into_iter().map(|p| p.name).collect();
    assert_eq!(names, NAMES);
    for preset in all() {
        assert_eq!(preset.cell().id, preset.name);
        assert_eq!(Preset::named(&preset.name).unwrap(), preset);
    }
}

#[test]
fn all_but_the_paper_s_say_where_they_deviate() {
    for preset in all() {
        assert!(!preset.source.is_empty(), "{}", preset.name);
        assert_eq!(
            preset.deviations.is_empty(),
            preset.name == "paper",
            "{}",
            preset.name
        );
        for deviation in &preset.deviations {
            assert!(deviation.ends_with('.'), "{}: {deviation}", preset.name);
        }
    }
}

#[test]
fn knobs_left_out_for_models_without_their_token_are_set() {
    for preset in all() {
        let (cell, _) = planned(&preset.name, 1, &Overrides::default());
        let Experiment {
            lock_text,
            enter_signal,
            exit_signal,
            ..
        } = cell.experiment;
        let set = [
            (TokenKnob::LockText, lock_text.is_some()),
            (TokenKnob::EnterSignal, enter_signal.is_some()),
            (TokenKnob::ExitSignal, exit_signal.is_some()),
        ];
        // All of them, or a model without the token could not run the preset at all.
        for (knob, set) in set {
            let named = preset.where_known.contains(&knob);
            assert_eq!(named, set, "{}: {}", preset.name, knob.as_str());
        }
    }
}

/// Agents of one model of 64 tokens.
fn one_model(agents: usize) -> MockBackend {
    let mut mock = MockBackend::hashed(agents, 64, 1, 512);
    mock.info_mut().agents.fill(ModelId(0));
    mock
}

#[test]
fn every_preset_is_a_valid_loop_in_its_topology_or_in_any() {
    for preset in all() {
        let any: Vec<String> = topologies::builtin().into_iter().map(|(n, _)| n).collect();
        let topologies = match &preset.topology {
            Some(topology) => vec![topology.clone()],
            None => any,
        };
        for topology in topologies {
            let (plan, seating) = planned_in(&preset, &topology, 1, &Overrides::default());
            let cell = plan.cells.last().unwrap();
            assert_eq!(cell.experiment.id, preset.name);
            assert_eq!(cell.experiment.suite, PRESETS);
            let skipped = matches!(cell.kind, CellKind::Skip { .. });
            assert!(!skipped, "{} in {topology}: {:?}", preset.name, cell.kind);
            let config = loop_of(&cell.experiment, &seating);
            let agents = seating.seats.len();
            config.validate(Some(64)).unwrap();
            config.validate_agents(agents).unwrap();
            check_config(&config, one_model(agents).info()).unwrap();
        }
    }
}

#[test]
fn an_unknown_name_is_answered_with_the_nearest_and_with_all() {
    let error = Preset::named("soft-thinking").unwrap_err();
    assert!(matches!(error, PresetError::Unknown { .. }));
    insta::assert_snapshot!(error, @"unknown preset `soft-thinking`; did you mean `soft_thinking`?; known: paper, soft_thinking, stochastic_soft_thinking, swir, latent_then_explicit, cipher, latentmas");
}

#[test]
fn a_file_that_is_none_is_refused_at_its_place() {
    let refused = |text: &str| match Preset::parse("mine.yaml", text) {
        Err(PresetError::Yaml(error)) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let head = "name: mine\nsource: me\ndeviations: []\n";
    let unknown_knob = refused(&format!("{head}knobs: {{gates: trend}}\n"));
    let begin = "mine.yaml:4:9: unknown key `gates`; did you mean `gate`?; known: soft_mode,";
    assert!(unknown_knob.starts_with(begin), "{unknown_knob}");
    let unknown_token = format!("{head}knobs: {{}}\nwhere_known: [lock]\n");
    insta::assert_snapshot!(refused(&unknown_token), @"mine.yaml:5:15: unknown value `lock`; known: lock_text, enter_signal, exit_signal");
    insta::assert_snapshot!(refused("name: mine\nsource: me\nknobs: {}\n"), @"mine.yaml:3:1: missing field `deviations`");
}

#[test]
fn a_null_that_means_nothing_is_refused() {
    let file = "name: mine\nsource: me\ndeviations: []\nknobs: {gate: null}\n";
    let error = Preset::parse("mine.yaml", file).unwrap_err();
    insta::assert_snapshot!(error, @"mine.yaml: gate of preset mine is null; only a value makes sense");
}
