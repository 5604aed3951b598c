//! Topology files and role prompts: who sits where, what they are told, and every way in which a file is refused.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

use dlmom_core::{ConsensusSpec, Method};
use dlmom_runs::topologies::{builtin, check, lockstep, parse, prompts};
use dlmom_runs::{LOCKSTEP, RolePrompt, Seating, SeatingError, seating, yaml};
use dlmom_runtime::{
    Handoff, Hierarchy, Message, PromptSource, Sequential, Topology, TopologyError,
};
use proptest::prelude::*;

const SHIPPED: [&str; 4] = ["sequential", "panel", "debate", "latentmas"];

const GROUPS: &str = "\
name: two-and-one
kind: hierarchical
groups: {readers: [0, 1], writer: [2]}
meta: {method: mean}
";

const CHAIN: &str = "\
name: pair
kind: sequential
agents:
  - {role: planner}
  - {role: solver}
";

fn text_of(seating: &Seating) -> String {
    yaml::to_string(seating).unwrap()
}

/// The words in which a text is refused for so many experts.
fn refused(text: &str, experts: usize) -> String {
    match parse("mine.yaml", text, experts) {
        Err(error) => error.to_string(),
        Ok(seating) => panic!("{}", text_of(&seating)),
    }
}

fn chain(seating: &Seating) -> &Sequential {
    seating.topology.chain().unwrap()
}

fn message(role: &str, content: &str) -> Message {
    Message {
        role: role.into(),
        content: content.into(),
    }
}

fn chat(messages: &[(&str, &str)]) -> PromptSource {
    PromptSource::Chat {
        messages: messages.iter().map(|(r, c)| message(r, c)).collect(),
    }
}

mod shipped {
    use super::*;

    #[test]
    fn the_four_chains_of_one_model_are_these() {
        for name in SHIPPED {
            insta::assert_snapshot!(name, text_of(&seating(name, 1).unwrap()));
        }
    }

    #[test]
    fn their_list_begins_with_lockstep_and_says_a_line_on_each() {
        let listed = builtin();
        let names: Vec<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [&[LOCKSTEP], &SHIPPED[..]].concat());
        for (name, about) in &listed {
            assert!(!about.is_empty() && !about.contains('\n'), "{name}");
            assert_eq!(seating(name, 1).unwrap().name, *name);
        }
    }

    #[test]
    fn every_role_prompt_is_used_and_tells_its_agent_something() {
        let mut used: Vec<RolePrompt> = Vec::new();
        for name in SHIPPED {
            used.extend(
                seating(name, 1)
                    .unwrap()
                    .seats
                    .into_iter()
                    .map(|s| s.prompt),
            );
        }
        for (name, prompt) in prompts() {
            assert!(used.contains(&prompt), "{name}");
            assert!(prompt.system.is_some(), "{name}");
            assert!(prompt.question.contains("{question}"), "{name}");
            for slot in ["{sender}", "{notes}"] {
                assert!(prompt.notes.contains(slot), "{name}");
            }
        }
    }

    #[test]
    fn agents_of_one_model_share_it_and_others_are_seated_in_order() {
        assert_eq!(seating("panel", 1).unwrap().experts(), [0, 0, 0, 0]);
        assert_eq!(seating("panel", 4).unwrap().experts(), [0, 1, 2, 3]);
        let error = seating("panel", 3).unwrap_err();
        insta::assert_snapshot!(error, @"panel.yaml: role `solver` is expert 3, counted from 0; there are 3");
    }

    #[test]
    fn lockstep_asks_every_expert_the_bare_question() {
        let seats = seating(LOCKSTEP, 3).unwrap();
        assert_eq!(seats, lockstep(3));
        assert_eq!(seats.experts(), [0, 1, 2]);
        assert_eq!(seats.topology, Topology::Lockstep);
        let question = chat(&[("user", "How many?")]);
        assert_eq!(seats.prompts(&question), [(); 3].map(|()| question.clone()));
    }
}

mod files {
    use super::*;

    #[test]
    fn groups_are_two_lines() {
        let seating = parse("mine.yaml", GROUPS, 3).unwrap();
        let expected = Topology::Hierarchical(Hierarchy {
            groups: vec![vec![0, 1], vec![2]],
            meta: ConsensusSpec::of(Method::Mean),
        });
        assert_eq!(seating.topology, expected);
        assert_eq!(seating.experts(), [0, 1, 2]);
        assert!(seating.seats.iter().all(|s| s.role.is_none()));
        insta::assert_snapshot!(text_of(&seating));
    }

    #[test]
    fn groups_keep_the_order_of_the_file_and_meet_by_the_paper_s_ties() {
        let text = "name: n\nkind: hierarchical\ngroups: {z: [2], a: [1, 0]}\n";
        let seating = parse("mine.yaml", text, 3).unwrap();
        let hierarchy = seating.topology.hierarchy().unwrap();
        assert_eq!(hierarchy.groups, [vec![2], vec![1, 0]]);
        assert_eq!(hierarchy.meta, ConsensusSpec::paper());
    }

    #[test]
    fn a_chain_hands_over_transcripts_once_along_it_and_never_back_by_default() {
        let seating = parse("mine.yaml", CHAIN, 1).unwrap();
        let chain = chain(&seating);
        assert_eq!(chain.handoff, Handoff::Transcript);
        assert_eq!((chain.max_handoffs, chain.limit()), (None, 1));
        assert_eq!(chain.on_failure, None);
        let names: Vec<_> = seating.seats.iter().map(|s| s.role.as_deref()).collect();
        assert_eq!(names, [Some("planner"), Some("solver")]);
    }

    #[test]
    fn a_chain_says_all_it_may() {
        let text = "\
name: mine
about: Three
kind: sequential
agents:
  - {role: a, prompt: planner, expert: 1, latent_steps: 7}
  - {role: b, prompt: {system: null, question: 'Think: {question}', notes: '{sender}/{notes}'}}
  - {role: solver, expert: 0}
handoff: text
max_handoffs: 5
on_failure: b
";
        let seating = parse("mine.yaml", text, 2).unwrap();
        let chain = chain(&seating);
        assert_eq!(chain.handoff, Handoff::Text);
        assert_eq!(chain.limit(), 5);
        assert_eq!(
            chain.on_failure,
            Some(1),
            "the place of the role that it names"
        );
        assert_eq!(chain.roles[0].latent_steps, Some(7));
        // The wording of notes is the prompt's.
        assert_eq!(chain.roles[1].notes, "{sender}/{notes}");
        assert_eq!(chain.roles[2].notes, seating.seats[2].prompt.notes);
        // `expert` wins over the place.
        assert_eq!(seating.experts(), [1, 1, 0]);
        let known = |name: &str| prompts().into_iter().find(|(n, _)| n == name).unwrap().1;
        assert_eq!(seating.seats[0].prompt, known("planner"));
        assert_eq!(seating.seats[1].prompt.system, None);
        assert_eq!(
            seating.seats[2].prompt,
            known("solver"),
            "by the role's own name"
        );
    }

    #[test]
    fn a_file_is_found_by_its_path_and_named_in_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(path("groups.yaml"), GROUPS).unwrap();
        assert_eq!(
            seating(&path("groups.yaml"), 3).unwrap(),
            parse("groups.yaml", GROUPS, 3).unwrap()
        );
        std::fs::write(path("typo.yaml"), GROUPS.replace("groups", "group")).unwrap();
        let error = seating(&path("typo.yaml"), 3).unwrap_err();
        assert!(matches!(error, SeatingError::Yaml(_)));
        assert!(error.to_string().starts_with(&path("typo.yaml")), "{error}");
        std::fs::write(path("binary.yaml"), [0xFF, 0xFE, 0x00]).unwrap();
        let error = seating(&path("binary.yaml"), 3).unwrap_err();
        assert!(matches!(error, SeatingError::Read { .. }), "{error}");
        let begin = format!("{}: cannot read: ", path("binary.yaml"));
        assert!(error.to_string().starts_with(&begin), "{error}");
        // A folder is no file.
        let error = seating(folder.path().to_str().unwrap(), 3).unwrap_err();
        assert!(matches!(error, SeatingError::Unknown { .. }), "{error}");
    }
}

mod errors {
    use super::*;

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest_and_with_all() {
        let error = seating("sequental", 1).unwrap_err();
        insta::assert_snapshot!(error, @"unknown topology `sequental`; did you mean `sequential`?; known: lockstep, sequential, panel, debate, latentmas, or a file");
        let error = seating("star", 1).unwrap_err();
        insta::assert_snapshot!(error, @"unknown topology `star`; known: lockstep, sequential, panel, debate, latentmas, or a file");
    }

    #[test]
    fn an_unknown_prompt_is_answered_with_the_nearest_and_with_all() {
        let named = CHAIN.replace("role: planner", "role: first, prompt: planer");
        insta::assert_snapshot!(refused(&named, 1), @"mine.yaml: role `first`: no prompt is called `planer`; did you mean `planner`?; known: generalist, specialist, planner, critic, refiner, solver, debater");
        // A role without a prompt needs one of its own name.
        let unnamed = CHAIN.replace("role: planner", "role: strategist");
        insta::assert_snapshot!(refused(&unnamed, 1), @"mine.yaml: role `strategist`: no prompt is called `strategist`; known: generalist, specialist, planner, critic, refiner, solver, debater");
    }

    #[test]
    fn a_key_that_reaches_nothing_is_an_error() {
        let lockstep = "name: mine\nkind: lockstep\n";
        let said = [
            format!("{lockstep}groups: {{a: [0]}}\n"),
            format!("{lockstep}meta: {{method: mean}}\n"),
            format!("{lockstep}handoff: kv\n"),
            format!("{GROUPS}max_handoffs: 2\n"),
            format!("{GROUPS}on_failure: writer\n"),
            format!("{GROUPS}agents: [{{role: solver, latent_steps: 4}}, {{role: critic}}, {{role: planner}}]\n"),
            format!("{CHAIN}groups: {{a: [0, 1]}}\n"),
            format!("{CHAIN}meta: {{}}\n"),
        ]
        .map(|text| refused(&text, 3))
        .join("\n");
        insta::assert_snapshot!(said, @r"
        mine.yaml: groups reaches nothing in a topology of this kind
        mine.yaml: meta reaches nothing in a topology of this kind
        mine.yaml: handoff reaches nothing in a topology of this kind
        mine.yaml: max_handoffs reaches nothing in a topology of this kind
        mine.yaml: on_failure reaches nothing in a topology of this kind
        mine.yaml: latent_steps reaches nothing in a topology of this kind
        mine.yaml: groups reaches nothing in a topology of this kind
        mine.yaml: meta reaches nothing in a topology of this kind
        ");
    }

    #[test]
    fn what_a_kind_needs_must_be_there() {
        let said = [
            "name: mine\nkind: hierarchical\n",
            "name: mine\nkind: sequential\n",
            "kind: lockstep\n",
            "name: mine\n",
            "name: mine\nkind: ring\n",
            "name: mine\nkind: lockstep\nagents: []\n",
            "name: mine\nkind: hierarchical\nagents: []\ngroups: {}\n",
            "name: mine\nkind: hierarchical\ngroups: {}\n",
            "name: mine\nkind: hierarchical\ngroups: {a: [0], a: [1]}\n",
            "name: mine\nkind: sequential\nagents: [{role: solver}]\n",
            "name: mine\nkind: sequential\nagents: [{prompt: solver}, {role: solver}]\n",
        ]
        .map(|text| refused(text, 1))
        .join("\n");
        insta::assert_snapshot!(said);
    }

    #[test]
    fn on_failure_names_a_role() {
        let text = format!("{CHAIN}on_failure: critic\n");
        insta::assert_snapshot!(refused(&text, 1), @"mine.yaml: on_failure: no role is called `critic`");
    }

    #[test]
    fn experts_are_among_those_there_are() {
        let text = CHAIN.replace("role: solver", "role: solver, expert: 2");
        insta::assert_snapshot!(refused(&text, 2), @"mine.yaml: role `solver` is expert 2, counted from 0; there are 2");
        assert!(parse("mine.yaml", &text, 3).is_ok());
    }

    fn topology_error(text: &str, experts: usize) -> TopologyError {
        match parse("mine.yaml", text, experts) {
            Err(SeatingError::Topology { file, source }) => {
                assert_eq!(file, "mine.yaml");
                source
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn roles_have_names_and_no_two_the_same() {
        for name in ["planner", "' '"] {
            let second = format!("role: {name}, prompt: solver");
            let text = CHAIN.replace("role: solver", &second);
            let name = name.trim_matches('\'').to_owned();
            let error = topology_error(&text, 1);
            assert_eq!(error, TopologyError::Name { place: 1, name });
        }
    }

    #[test]
    fn every_agent_is_in_one_group() {
        for (groups, experts, expected) in [
            // Missing, twice, beyond, and a group of nobody.
            (
                "{a: [0, 1]}",
                3,
                TopologyError::Groups { agent: 2, times: 0 },
            ),
            (
                "{a: [0, 1], b: [1, 2]}",
                3,
                TopologyError::Groups { agent: 1, times: 2 },
            ),
            (
                "{a: [0, 1], b: [2, 3]}",
                3,
                TopologyError::Groups { agent: 3, times: 1 },
            ),
            (
                "{a: [0, 1, 2], b: []}",
                3,
                TopologyError::EmptyGroup { place: 1 },
            ),
        ] {
            let text = format!("name: n\nkind: hierarchical\ngroups: {groups}\n");
            assert_eq!(topology_error(&text, experts), expected, "{groups}");
        }
    }

    #[test]
    fn the_meta_level_is_an_operator_for_as_many_groups() {
        let text = GROUPS.replace("{method: mean}", "{method: mean, weights: [1, 2, 3]}");
        let error = topology_error(&text, 3);
        assert!(matches!(error, TopologyError::Meta(_)), "{error}");
        let text = GROUPS.replace("{method: mean}", "{method: mean, weights: [1, 2]}");
        assert!(parse("mine.yaml", &text, 3).is_ok());
    }
}

mod checks {
    use super::*;

    /// Agents a text is checked with.
    fn agents(text: &str) -> usize {
        check("mine.yaml", text).unwrap().seats.len()
    }

    #[test]
    fn a_text_is_checked_with_as_many_experts_as_it_needs() {
        assert_eq!(agents("name: n\nkind: lockstep\n"), 1);
        assert_eq!(agents(GROUPS), 3);
        assert_eq!(agents(CHAIN), 2);
        // The agents are counted where they are named, and the experts they name.
        let text = CHAIN.replace("role: solver", "role: solver, expert: 6");
        assert_eq!(check("mine.yaml", &text).unwrap().experts(), [0, 6]);
        let named = "agents: [{role: solver}, {role: critic}, {role: planner}]\n";
        assert_eq!(agents(&format!("{GROUPS}{named}")), 3);
        for name in SHIPPED {
            let path = format!(
                "{}/../../configs/topologies/{name}.yaml",
                env!("CARGO_MANIFEST_DIR")
            );
            let text = std::fs::read_to_string(path).unwrap();
            assert_eq!(check(name, &text).unwrap().name, name);
        }
    }

    #[test]
    fn a_group_that_skips_an_agent_is_found_without_being_told_how_many_there_are() {
        for groups in [
            "{a: [0, 1], b: [3]}",
            "{a: [0, 1], b: [1]}",
            "{a: []}",
            "{}",
        ] {
            let text = format!("name: n\nkind: hierarchical\ngroups: {groups}\n");
            let error = check("mine.yaml", &text).unwrap_err();
            assert!(
                matches!(error, SeatingError::Topology { .. }),
                "{groups}: {error}"
            );
        }
    }

    /// A shipped or valid text with some of its characters taken out, doubled or replaced.
    fn damaged() -> impl Strategy<Value = String> {
        let latentmas = include_str!("../../../configs/topologies/latentmas.yaml");
        let texts = prop::sample::select(vec![GROUPS, CHAIN, latentmas]);
        let cuts =
            prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8, any::<char>()), 1..4);
        (texts, cuts).prop_map(|(text, cuts)| {
            let mut letters: Vec<char> = text.chars().collect();
            for (at, what, other) in cuts {
                if letters.is_empty() {
                    break;
                }
                let at = at.index(letters.len());
                match what {
                    0 => drop(letters.remove(at)),
                    1 => letters.insert(at, letters[at]),
                    2 => letters[at] = other,
                    _ => letters.truncate(at + 1),
                }
            }
            letters.into_iter().collect()
        })
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(
            text in "((name|kind|agents|groups|meta|role|expert|lockstep|hierarchical|sequential|[0-9])|[:,\\[\\]{}\\n '\"&*!-]|\\PC){0,60}",
            experts in 0..5_usize,
        ) {
            let _ = parse("any.yaml", &text, experts);
            let _ = check("any.yaml", &text);
        }

        #[test]
        fn any_damaged_file_is_read_or_refused_and_what_is_read_fits(text in damaged(), experts in 0..5_usize) {
            let _ = check("any.yaml", &text);
            if let Ok(seating) = parse("any.yaml", &text, experts) {
                prop_assert!(seating.experts().iter().all(|&e| e < experts));
                prop_assert!(seating.topology.validate(seating.seats.len()).is_ok());
            }
        }
    }
}

mod prompts_of_roles {
    use super::*;

    fn role(system: Option<&str>, question: &str) -> RolePrompt {
        RolePrompt {
            system: system.map(str::to_owned),
            question: question.into(),
            ..RolePrompt::default()
        }
    }

    #[test]
    fn the_system_message_comes_first_and_the_question_is_worded() {
        let asked =
            role(Some("Be brief."), "Q: {question}\nThink.").apply(&chat(&[("user", "1+1?")]));
        assert_eq!(
            asked,
            chat(&[("system", "Be brief."), ("user", "Q: 1+1?\nThink.")])
        );
    }

    #[test]
    fn examples_before_the_question_stay_as_they_are() {
        let shots = [
            ("system", "Bench."),
            ("user", "1?"),
            ("assistant", "1."),
            ("user", "2?"),
            ("assistant", "It is"),
        ];
        let asked = role(Some("You plan."), "<{question}>").apply(&chat(&shots));
        let expected = [&[("system", "You plan.")], &shots[..]].concat();
        let mut expected = expected;
        expected[4].1 = "<2?>";
        assert_eq!(asked, chat(&expected));
    }

    #[test]
    fn a_question_that_speaks_of_braces_is_not_worded_twice() {
        let asked =
            role(None, "{question} ({question})").apply(&chat(&[("user", "{question}{notes}")]));
        assert_eq!(
            asked,
            chat(&[("user", "{question}{notes} ({question}{notes})")])
        );
    }

    #[test]
    fn the_default_asks_the_bare_question() {
        let source = chat(&[("system", "s"), ("user", "q")]);
        assert_eq!(RolePrompt::default().apply(&source), source);
        let empty: RolePrompt = yaml::from_str("mine.yaml", "{}").unwrap();
        assert_eq!(empty, RolePrompt::default());
    }

    #[test]
    fn prompts_that_are_no_conversation_are_untouched() {
        let role = role(Some("Be brief."), "Q: {question}");
        for source in [
            PromptSource::Tokens { ids: vec![1, 2, 3] },
            PromptSource::Text {
                text: "1+1=".into(),
            },
        ] {
            assert_eq!(role.apply(&source), source);
        }
    }

    #[test]
    fn every_seat_is_asked_in_its_own_words() {
        let seating = seating("sequential", 1).unwrap();
        let asked = seating.prompts(&chat(&[("user", "How many?")]));
        let told = [
            "You are a generalist. Think step by step.",
            "You are a specialist. Give the final answer.",
        ];
        for (asked, system) in asked.iter().zip(told) {
            assert_eq!(*asked, chat(&[("system", system), ("user", "How many?")]));
        }
        assert_eq!(asked.len(), 2);
    }
}
