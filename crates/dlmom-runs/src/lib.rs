#![doc = include_str!("../README.md")]

pub mod aggregate;
pub mod answer;
pub mod drift;
pub mod fold;
pub mod paired;
pub mod pilot;
pub mod presets;
pub mod registry;
pub mod row;
pub mod rundir;
pub mod schema;
pub mod summary;
pub mod topologies;
pub mod yaml;

pub use aggregate::{Aggregate, AggregateCell, AggregateError, aggregate, raw_batch};
pub use answer::Answer;
pub use drift::{DriftKind, DriftLine, DriftSummary, read_drift, summarize_drift};
pub use pilot::{PILOT_QUANTILES, Pilot};
pub use presets::{PRESETS, Preset, PresetError, TokenKnob};
pub use registry::{
    CellKind, Comm, Experiment, Kv, Overrides, Placement, Plan, PlannedCell, REF, Registry,
    RegistryError, Setting, SoftMode, Unsupported,
};
pub use row::{Failure, RawRow, RowContext, RowError};
pub use rundir::{
    Invocation, JsonlError, JsonlWriter, Manifest, ManifestCell, RawWriter, Repair, RunDir,
    RunDirError, TraceLine, read_manifest,
};
pub use summary::{Summary, summarize, twin};
pub use topologies::{LOCKSTEP, RolePrompt, Seat, Seating, SeatingError, seating};
pub use yaml::YamlError;
