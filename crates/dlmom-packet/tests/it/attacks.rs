//! The corpus in `tests/attacks`: bytes made to hurt a decoder, each with the error that must answer it.
//!
//! A file is hexadecimal with `#` comments; `# expect: NAME` and `# offset: N` say what the decoder must answer, and
//! `# kind: dense` or `# kind: embed` which decoder where it is not the one of packets.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use dlmom_packet::{decode_dense_exact, decode_embed_exact, decode_exact};

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
                .map(str::trim)
        };
        let bytes = unhex(&text);
        let error = match header("# kind:") {
            None => decode_exact(&bytes).unwrap_err(),
            Some("dense") => decode_dense_exact(&bytes).unwrap_err(),
            Some("embed") => decode_embed_exact(&bytes).unwrap_err(),
            Some(kind) => panic!("{}: kind {kind}", path.display()),
        };
        assert_eq!(
            Some(error.name()),
            header("# expect:"),
            "{}: {error}",
            path.display()
        );
        assert_eq!(
            Some(error.offset().to_string().as_str()),
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
