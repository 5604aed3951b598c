//! Which files a path means.

use std::path::{Path, PathBuf};

use super::AggregateError;
use crate::rundir::{Manifest, read_manifest};

pub(super) struct RunFiles {
    /// The path as it was named.
    pub(super) name: String,
    /// The raw files, sorted.
    pub(super) files: Vec<PathBuf>,
    /// What `run.json` says, where there is one.
    pub(super) manifest: Option<Manifest>,
}

pub(super) fn find(path: &Path) -> Result<RunFiles, AggregateError> {
    let name = path.display().to_string();
    if path.is_file() {
        return Ok(RunFiles {
            name,
            files: vec![path.to_owned()],
            manifest: None,
        });
    }
    if !path.is_dir() {
        return Err(AggregateError::NotFound {
            path: path.to_owned(),
        });
    }
    let raw = path.join("raw");
    let files = jsonl_in(if raw.is_dir() { &raw } else { path })?;
    if files.is_empty() {
        return Err(AggregateError::NoRaw {
            path: path.to_owned(),
        });
    }
    Ok(RunFiles {
        name,
        files,
        manifest: read_manifest(path)?,
    })
}

fn jsonl_in(folder: &Path) -> Result<Vec<PathBuf>, AggregateError> {
    let read = |source| AggregateError::Read {
        path: folder.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|e| e == "jsonl") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
