//! Suites, cells and their expansion into experiments.

mod expand;
mod experiment;
mod file;
mod knobs;

pub use expand::{CellKind, Overrides, Plan, PlannedCell, Setting};
pub use experiment::{Experiment, Placement, REF, Unsupported};
pub use file::{Cell, Registry, Suite, SuitesFile};
pub use knobs::{Comm, DefaultsFile, Knob, Knobs, Kv, SoftMode};

use std::path::PathBuf;

use crate::yaml::YamlError;

/// One way a registry or a selection from it can be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// The file cannot be read.
    #[error("{file}: cannot read: {source}", file = file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not YAML, or not of the schema.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// Two cells of one name.
    #[error("{file}:{line}: id `{id}` is already used on line {first}")]
    DuplicateId {
        /// The file.
        file: String,
        /// Line of the second.
        line: u64,
        /// Line of the first.
        first: u64,
        /// The name.
        id: String,
    },
    /// A name that cannot be a file name, or is taken.
    #[error("{file}:{line}: id `{id}` {reason}")]
    BadId {
        /// The file.
        file: String,
        /// Its line.
        line: u64,
        /// The name.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No cells at all.
    #[error("{file}: holds no cells")]
    Empty {
        /// The file.
        file: String,
    },
    /// A knob is null although only a value makes sense.
    #[error("{file}: {cell}: {field} is null; leave the key out for its default")]
    Null {
        /// The file.
        file: String,
        /// The cell, or `defaults`.
        cell: String,
        /// The knob.
        field: &'static str,
    },
    /// A knob out of range, or at odds with another.
    #[error("{file}: {cell}: {message}")]
    Field {
        /// The file.
        file: String,
        /// The cell.
        cell: String,
        /// Field, value and range.
        message: String,
    },
    /// A value from the command line is out of range.
    #[error("{flag}: {message}")]
    Override {
        /// The flag.
        flag: &'static str,
        /// Value and range.
        message: String,
    },
    /// No suite of that name.
    #[error("unknown suite `{name}`{hint}; known: {known}")]
    UnknownSuite {
        /// The name asked for.
        name: String,
        /// `; did you mean ...?`, or empty.
        hint: String,
        /// All suites.
        known: String,
    },
    /// A cell of a suite that was not asked for.
    #[error("id `{id}` is in suite {suite}, which was not asked for")]
    OtherSuite {
        /// The name asked for.
        id: String,
        /// Its suite.
        suite: String,
    },
    /// No cell of that name among the suites asked for.
    #[error("unknown id `{id}`{hint}; known: {known}")]
    UnknownId {
        /// The name asked for.
        id: String,
        /// `; did you mean ...?`, or empty.
        hint: String,
        /// All cells to choose from.
        known: String,
    },
}
