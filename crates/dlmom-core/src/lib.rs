#![doc = include_str!("../README.md")]

pub mod consensus;
pub mod controller;
pub mod entropy;
pub mod exp;
pub mod noise;
pub mod philox;
pub mod ranks;
pub mod readout;
pub mod sampling;
pub mod spec;
pub mod stream;
pub mod topk;
pub mod validate;

pub use consensus::{Consensus, Views};
pub use controller::{
    Controller, ControllerFailure, Decision, Force, GateController, Inject, Mode, Reason, Rule,
    RuleController, Schedule, ScheduleController, Triggers,
};
pub use entropy::{Stats, normalized, stats};
pub use noise::{Mixed, NoiseError, Noised};
pub use ranks::{Ranks, RanksError};
pub use readout::{Divergence, Request, RowReadout, Scratch, Tempered, compare_rows, read_row};
pub use sampling::{Draw, draw};
pub use spec::{
    AlphaUnit, Calibrate, Center, ConsensusSpec, ControllerSpec, Elect, FilterSpec, Gate,
    MergeGate, Method, NoiseSpec, SamplingSpec, Start, Tie, TriggerSpec, Trim, WeightRule, Weights,
};
pub use stream::{Purpose, Stream, sample_key};
pub use topk::top_k;
pub use validate::SpecError;
