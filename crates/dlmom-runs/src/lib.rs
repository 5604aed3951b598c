#![doc = include_str!("../README.md")]

pub mod aggregate;
pub mod answer;
pub mod fold;
pub mod paired;
pub mod registry;
pub mod row;
pub mod rundir;
pub mod schema;
pub mod summary;
pub mod yaml;

pub use aggregate::{Aggregate, AggregateCell, AggregateError, aggregate, raw_batch};
pub use answer::Answer;
pub use registry::{
    CellKind, Comm, Experiment, Kv, Overrides, Plan, PlannedCell, REF, Registry, RegistryError,
    Setting, SoftMode, Unsupported,
};
pub use row::{Failure, RawRow, RowContext, RowError};
pub use rundir::{
    Invocation, JsonlError, JsonlWriter, Manifest, ManifestCell, RawWriter, Repair, RunDir,
    RunDirError, TraceLine, read_manifest,
};
pub use summary::{Summary, summarize};
pub use yaml::YamlError;
