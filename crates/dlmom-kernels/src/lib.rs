#![doc = include_str!("../README.md")]
#![expect(
    clippy::inline_always,
    reason = "a function is compiled for the instruction set of the loop it is inlined into"
)]

mod attend;
mod best;
mod block;
mod hands;
mod kernel;
mod logits;
mod merge;
mod readout;
mod row;
mod scan;
mod tier;

pub use attend::{Attention, Grid, Misfit};
pub use kernel::{Kernel, KernelError, Row};
pub use logits::{Floats, Logits};
pub use row::Scratch;
pub use tier::Tier;
