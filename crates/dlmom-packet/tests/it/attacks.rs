//! The corpus in `tests/attacks`: bytes made to hurt a decoder, each with the error that must answer it.
//!
//! A file is hexadecimal with `#` comments; `# expect: NAME` and `# offset: N` say what the decoder must answer.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dlmom_packet::decode_exact;

use crate::support::unhex;

#[test]
fn every_attack_gets_the_expected_answer() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/attacks");
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let header = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap()
                .trim()
        };
        let error = decode_exact(&unhex(&text)).unwrap_err();
        assert_eq!(
            error.name(),
            header("# expect:"),
            "{}: {error}",
            path.display()
        );
        assert_eq!(
            error.offset().to_string(),
            header("# offset:"),
            "{}: {error}",
            path.display()
        );
        seen.insert(error.name());
    }

    // Every error that the specification lists has an attack, and it lists every error.
    let readme = include_str!("../../README.md");
    let table = readme
        .split(
            "| name | when |
|---|---|
",
        )
        .nth(1)
        .unwrap();
    let listed: BTreeSet<&str> = table
        .lines()
        .map_while(|line| line.strip_prefix("| ")?.split(" |").next())
        .flat_map(|cell| cell.split(", ").map(|name| name.trim_matches('`')))
        .collect();
    assert_eq!(seen, listed);
}
