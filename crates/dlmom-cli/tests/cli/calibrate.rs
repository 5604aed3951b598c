//! `calibrate`: the concentration whose noise is as strong as asked for, on the packets of a pilot.

use dlmom_cli::ExitStatus;

use super::{Lab, bad, call, good, json};

fn words<'a>(bench: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut words = vec!["calibrate", "--backend", "mock", "--bench", bench];
    for (flag, value) in [
        ("--experts", "mock:1"),
        ("--target-kl", "0.05"),
        ("--alpha", "0.5"),
        ("--max-steps", "24"),
        ("--pilot-items", "6"),
        ("--draws", "8"),
    ] {
        let other = flag == "--experts" && more.contains(&"--model");
        if !(other || more.contains(&flag)) {
            words.extend([flag, value]);
        }
    }
    words.extend(more);
    words
}

#[test]
fn the_strength_found_is_the_one_asked_for() {
    let lab = Lab::new();
    let bench = lab.bench();
    let mut lambdas = Vec::new();
    for target in ["0.02", "0.05", "0.1"] {
        let said = good(&words(&bench, &["--target-kl", target, "--json"]));
        let found = json(&said);
        let wanted: f64 = target.parse().unwrap();
        assert!((found["kl"].as_f64().unwrap() - wanted).abs() < 0.02 * wanted);
        assert!(found["kl_p10"].as_f64() < found["kl"].as_f64());
        assert!(found["kl"].as_f64() < found["kl_p90"].as_f64());
        assert!(found["packets"].as_u64().unwrap() >= found["items"].as_u64().unwrap());
        lambdas.push(found["lambda"].as_f64().unwrap());
    }
    // Stronger noise has a smaller concentration.
    assert!(lambdas.is_sorted_by(|a, b| a > b), "{lambdas:?}");
}

#[test]
fn the_cells_of_the_suites_are_measured_on_the_same_packets() {
    let lab = Lab::new();
    let found = json(&good(&words(&lab.bench(), &["--json"])));
    let cells: Vec<(f64, f64)> = found["cells"]
        .as_array()
        .unwrap()
        .iter()
        .map(|cell| {
            (
                cell["lambda"].as_f64().unwrap(),
                cell["kl"].as_f64().unwrap(),
            )
        })
        .collect();
    assert!(cells.len() >= 6);
    for (lambda, kl) in &cells {
        for (other, weaker) in &cells {
            assert!(lambda >= other || kl > weaker, "{lambda} {other}");
        }
    }
}

#[test]
fn a_chain_is_calibrated_on_the_packets_of_its_agents() {
    let lab = Lab::new();
    let bench = lab.bench();
    let of = |agents: &[&str]| {
        let mut more = agents.to_vec();
        more.push("--json");
        json(&good(&words(&bench, &more)))["packets"].clone()
    };
    assert_ne!(of(&["--model", "mock:1"]), of(&["--experts", "mock:1"]));
}

#[test]
fn the_result_depends_on_the_seed_alone() {
    let lab = Lab::new();
    let bench = lab.bench();
    let of = |more: &[&str]| good(&words(&bench, more));
    assert_eq!(of(&["--batch-size", "1"]), of(&["--batch-size", "5"]));
    assert_ne!(of(&["--seed", "1"]), of(&["--seed", "2"]));
}

#[test]
fn what_cannot_be_calibrated_is_one_line() {
    let lab = Lab::new();
    let bench = lab.bench();
    let mut said = Vec::new();
    for more in [
        &["--target-kl", "0"][..],
        &["--target-kl", "-0.1"],
        &["--target-kl", "nan"],
        &["--target-kl", "1e9"],
        &["--draws", "0"],
        &["--pilot-items", "0"],
        &["--alpha", "-1"],
        &["--alpha", "1.5", "--alpha-unit", "quantile"],
        &["--topology", "sequental"],
        // No step of the reference is latent.
        &["--max-latent-steps", "0"],
    ] {
        let done = call(&words(&bench, more));
        assert_eq!(done.status, ExitStatus::Usage, "{more:?} {}", done.out);
        said.push(super::refusal(&done));
    }
    let said = lab.plain(&said.join("\n"));
    insta::assert_snapshot!(said);
    let none = bad(
        &["calibrate", "--experts", "mock:1", "--bench", &bench],
        ExitStatus::Usage,
    );
    assert!(none.contains("--target-kl"), "{none}");
}
