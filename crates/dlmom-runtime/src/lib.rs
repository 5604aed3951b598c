#![doc = include_str!("../README.md")]

pub mod assemble;
pub mod backend;
pub mod config;
pub mod conformance;
pub mod controls;
pub mod ids;
pub mod link;
pub mod mock;
pub mod orchestrator;
pub mod outcome;
pub mod replay;
mod sample;
pub mod topology;

pub use assemble::{Assembler, check_rows};
pub use backend::{
    Align, Backend, BackendError, Embeddings, EnsembleInfo, Feed, Groups, LaneSpec, MemoryStats,
    Message, ModelInfo, Payload, PromptSource, ReadRow, Readout, Row, Versus, Want,
};
pub use config::{ConfigError, LoopConfig, Signal};
pub use controls::{Controls, Donor, Donors, HandoffControl, PacketControl};
pub use dlmom_kernels::{KernelError, Logits, Tier};
pub use ids::{AgentId, LaneId, ModelId, SlotId};
pub use link::{Link, LinkError, LinkMessage, LinkSpec, Support, Uplink, Wire, WireEncoding};
pub use mock::MockBackend;
pub use orchestrator::{
    Hooks, Progress, RuleSource, RunError, RunOptions, RunStats, Session, Share, Sink, StepEvent,
    check_config, check_vocabularies, run, run_all, run_shared, run_with,
};
pub use outcome::{
    Divergences, Follow, HandoffRecord, Job, JobKey, Outcome, Rival, Spread, Stop, Trace,
    entropy_bin,
};
pub use topology::{Handoff, Hierarchy, Role, Sequential, Topology, TopologyError, Trigger};
