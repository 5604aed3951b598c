//! Values that no flag can take: one line on standard error and exit code 2.

use std::path::Path;

use dlmom_cli::ExitStatus;

use super::{Lab, bad, refusal};

#[test]
fn values_that_a_run_cannot_take_are_one_line_and_leave_no_folder() {
    let lab = Lab::new();
    let mut said = Vec::new();
    for more in [
        &["--max-switches", "-2"][..],
        &["--alpha", "-0.1"],
        &["--alpha", "nan"],
        &["--alpha-unit", "quantile", "--alpha", "1.5"],
        &["--alpha-unit", "quantiles"],
        &["--max-handoffs", "-1"],
        &["--max-handoffs", "1"],
        &["--handoff", "kv"],
        &["--topology", "sequential", "--handoff", "cache"],
        &["--topology", "lock-step"],
        &["--preset", "switr"],
        &["--suite", "C3"],
        &["--only", "A1.99"],
        &["--pilot-items", "0", "--alpha-unit", "quantile"],
        &["--drift", "-1"],
    ] {
        let mut words = vec!["--experts", "mock:1", "mock:2"];
        if !more
            .iter()
            .any(|word| ["--suite", "--preset"].contains(word))
        {
            words.extend(["--suite", "A1"]);
        }
        words.extend(more);
        let done = lab.call("run", &words);
        assert_eq!(done.status, ExitStatus::Usage, "{more:?} {}", done.out);
        said.push(format!(
            "{}: {}",
            more.join(" "),
            lab.plain(&refusal(&done))
        ));
        assert!(!lab.path("run").exists(), "{more:?}");
    }
    insta::assert_snapshot!(said.join("\n"));
}

#[test]
fn values_that_generate_cannot_take_are_one_line() {
    let mut said = Vec::new();
    for more in [
        &["--max-switches", "-2"][..],
        &["--k", "0"],
        &["--k", "-2"],
        &["--gumbel", "0"],
        &["--gumbel", "-1"],
        &["--dirichlet", "-2"],
        &["--gumbel", "1", "--dirichlet", "1"],
        &["--alpha-unit", "quantile"],
        &["--gate", "entropy"],
        &["--preset", "soft-thinking"],
        &["--topology", "sequentia"],
        &["--max-handoffs", "-1"],
        &["--max-handoffs", "1"],
        &["--temperature", "-1"],
        &["--top-p", "1.5"],
        &["--repetition-penalty", "0"],
    ] {
        let mut words = vec!["generate", "--prompt", "1 + 1?"];
        words.extend(["--experts", "mock:1", "mock:2"]);
        words.extend(more);
        said.push(format!(
            "{}: {}",
            more.join(" "),
            bad(&words, ExitStatus::Usage)
        ));
    }
    insta::assert_snapshot!(said.join("\n"));
}

/// A suites file of one cell.
fn suites(lab: &Lab, knobs: &str) -> String {
    lab.write(
        "suites.yaml",
        &format!("suites:\n  X:\n    - {{id: X.1, {knobs}}}\n"),
    )
}

#[test]
fn values_that_a_cell_cannot_have_name_the_cell() {
    let lab = Lab::new();
    let mut said = Vec::new();
    for knobs in [
        "cap: -2",
        "soft_mode: gumbel, tau: 0",
        "soft_mode: gumbel",
        "soft_mode: dirichlet, lambda: -1",
        "gate: entropy",
        "gate: null",
        "alpha: 1.5, alpha_unit: quantile",
        "packet_control: nothing",
        "handoff_control: others",
        "consensus: {method: tie}",
        "filter: {top_p: 0}",
    ] {
        let file = suites(&lab, knobs);
        let words = [
            "--config",
            &file,
            "--suite",
            "X",
            "--experts",
            "mock:1",
            "mock:2",
        ];
        let done = lab.call("run", &words);
        assert_eq!(done.status, ExitStatus::Usage, "{knobs} {}", done.out);
        said.push(format!("{knobs}: {}", lab.plain(&refusal(&done))));
        assert!(!Path::new(&lab.path("run")).exists(), "{knobs}");
    }
    insta::assert_snapshot!(said.join("\n"));
}
