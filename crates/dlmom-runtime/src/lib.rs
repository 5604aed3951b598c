#![doc = include_str!("../README.md")]

pub mod assemble;
pub mod backend;
pub mod config;
pub mod conformance;
pub mod ids;
pub mod link;
pub mod mock;
pub mod orchestrator;
pub mod outcome;
mod sample;

pub use assemble::{Assembler, check_rows};
pub use backend::{
    Align, Backend, BackendError, Embeddings, EnsembleInfo, Feed, LaneSpec, MemoryStats, Message,
    ModelInfo, Payload, PromptSource, ReadRow, Readout, Row, Versus, Want,
};
pub use config::{ConfigError, LoopConfig};
pub use ids::{AgentId, LaneId, ModelId, SlotId};
pub use link::{Link, LinkError, LinkMessage, LinkSpec, Support, Uplink, Wire, WireEncoding};
pub use mock::MockBackend;
pub use orchestrator::{
    Hooks, Progress, RuleSource, RunError, RunOptions, RunStats, Session, Sink, StepEvent,
    check_vocabularies, run, run_with,
};
pub use outcome::{Job, JobKey, Outcome, Spread, Stop, Trace, entropy_bin};
