#![doc = include_str!("../README.md")]

pub mod assemble;
pub mod backend;
pub mod config;
pub mod conformance;
pub mod ids;
pub mod mock;
pub mod orchestrator;
pub mod outcome;
mod sample;

pub use assemble::{Assembler, check_rows};
pub use backend::{
    Align, Backend, BackendError, EnsembleInfo, Feed, LaneSpec, MemoryStats, Message, ModelInfo,
    Payload, PromptSource, ReadRow, Readout, Row, Versus, Want,
};
pub use config::{ConfigError, LoopConfig};
pub use ids::{AgentId, LaneId, ModelId, SlotId};
pub use mock::MockBackend;
pub use orchestrator::{Progress, RunError, RunOptions, RunStats, Sink, check_vocabularies, run};
pub use outcome::{Job, JobKey, Outcome, Spread, Stop, Trace, entropy_bin};
