#![doc = include_str!("../README.md")]

pub mod consensus;
pub mod controller;
pub mod entropy;
mod exp;
pub mod noise;
pub mod philox;
pub mod readout;
pub mod sampling;
pub mod spec;
pub mod stream;
pub mod topk;
pub mod validate;

pub use consensus::Consensus;
pub use controller::{
    Controller, ControllerFailure, Decision, Force, GateController, Mode, Reason, Rule,
    RuleController,
};
pub use entropy::{Stats, normalized, stats};
pub use noise::{NoiseError, Noised};
pub use readout::{Divergence, Request, RowReadout, Scratch, compare_rows, read_row};
pub use sampling::{Draw, draw};
pub use spec::{AlphaUnit, ConsensusSpec, ControllerSpec, Gate, NoiseSpec, SamplingSpec, Start};
pub use stream::{Purpose, Stream, sample_key};
pub use topk::top_k;
pub use validate::SpecError;
