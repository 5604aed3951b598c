//! What this binary was built from and for.

use serde_json::{Value, json};

/// What `--version` prints after the program's name.
pub(crate) const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\nprofile  ",
    env!("DLMOM_BUILD_PROFILE"),
    "\ntarget   ",
    env!("DLMOM_BUILD_TARGET"),
    "\nrustc    ",
    env!("DLMOM_BUILD_RUSTC"),
    "\ncommit   ",
    env!("DLMOM_BUILD_COMMIT"),
    "\nfeatures ",
    env!("DLMOM_BUILD_FEATURES"),
);

/// The same facts with their names, for `doctor`.
pub(crate) const FACTS: [(&str, &str); 6] = [
    ("version", env!("CARGO_PKG_VERSION")),
    ("profile", env!("DLMOM_BUILD_PROFILE")),
    ("target", env!("DLMOM_BUILD_TARGET")),
    ("rustc", env!("DLMOM_BUILD_RUSTC")),
    ("commit", env!("DLMOM_BUILD_COMMIT")),
    ("features", env!("DLMOM_BUILD_FEATURES")),
];

/// The facts for `doctor --json`.
pub(crate) fn json() -> Value {
    FACTS
        .into_iter()
        .map(|(name, value)| (name.to_owned(), json!(value)))
        .collect()
}
