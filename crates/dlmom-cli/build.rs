//! Facts about the build that `--version` and `doctor` print.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let profile = env::var("PROFILE").unwrap_or_default();
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let rustc = say(&rustc, Path::new("."), &["--version"]);
    // A debug build does not name its commit, so that committing rebuilds nothing while developing.
    let commit = (profile == "release").then(commit).flatten();
    fact("PROFILE", &profile, "unknown");
    fact("TARGET", &env::var("TARGET").unwrap_or_default(), "unknown");
    fact(
        "RUSTC",
        rustc.unwrap_or_default().trim_start_matches("rustc "),
        "unknown",
    );
    fact("COMMIT", &commit.unwrap_or_default(), "not recorded");
    fact("FEATURES", &features(), "none");
}

fn fact(name: &str, value: &str, without: &str) {
    let value = if value.is_empty() { without } else { value };
    println!("cargo::rustc-env=DLMOM_BUILD_{name}={value}");
}

/// The first line a command prints; `None` where it cannot be run or fails.
fn say(program: impl AsRef<OsStr>, folder: &Path, arguments: &[&str]) -> Option<String> {
    let done = Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .ok()?;
    if !done.status.success() {
        return None;
    }
    let text = String::from_utf8(done.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (!line.is_empty()).then(|| line.to_owned())
}

fn features() -> String {
    let mut names: Vec<String> = env::vars()
        .filter_map(|(key, _)| {
            let name = key.strip_prefix("CARGO_FEATURE_")?;
            Some(name.to_lowercase().replace('_', "-"))
        })
        .filter(|name| name != "default")
        .collect();
    names.sort();
    names.join(" ")
}

/// The commit of the checkout this crate lies in; `None` for sources that were unpacked elsewhere, even within another checkout.
fn commit() -> Option<String> {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR")?);
    let workspace = here.parent()?.parent()?;
    let top = say("git", &here, &["rev-parse", "--show-toplevel"])?;
    if fs::canonicalize(top).ok()? != fs::canonicalize(workspace).ok()? {
        return None;
    }
    // HEAD names a branch, whose file changes with every commit; after packing it may be missing. A path that does not
    // exist would make every build run this script again.
    let branch = say("git", &here, &["symbolic-ref", "-q", "HEAD"]);
    for name in [Some("HEAD"), branch.as_deref(), Some("packed-refs")]
        .into_iter()
        .flatten()
    {
        if let Some(path) = say("git", &here, &["rev-parse", "--git-path", name]) {
            let path = here.join(path);
            if path.exists() {
                println!("cargo::rerun-if-changed={}", path.display());
            }
        }
    }
    say("git", &here, &["rev-parse", "--short=12", "HEAD"])
}
