//! What the command line needs from its surroundings: models, drawing, signals. Python provides them, or nobody.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use dlmom_runtime::Backend;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::display::Display;
use crate::timeline::Timeline;

/// Why a host could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The request is wrong: unknown model folder, device that is not there. Exit status 2.
    #[error("{0}")]
    Usage(String),
    /// It failed: weights with NaN, no memory. Exit status 1.
    #[error("{message}")]
    Failed {
        /// One line.
        message: String,
        /// The original exception, where there is one.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// This build has no Python.
    #[error("{0} needs Python: use the dlmom-rs command of the Python package")]
    NeedsPython(&'static str),
}

/// What to load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineSpec {
    /// One entry per model: local path, hub id or `zoo:NAME`.
    pub experts: Vec<String>,
    /// Model of every agent.
    pub agents: Vec<u32>,
    /// `auto`, `cpu`, `cuda`, `hip` or `mps`, `cuda:1`; for one for each model, commas between.
    pub device: String,
    /// `bf16`, `fp16` or `fp32`.
    pub dtype: String,
    /// Rows wanted.
    pub slots: u32,
    /// Threads of one forward, where given.
    pub threads: Option<u32>,
    /// Whether model folders may run their own code.
    pub trust_remote_code: bool,
    /// Bit-equal rows demanded on a device.
    pub deterministic: bool,
    /// Bit-equal rows given up.
    pub fast: bool,
    /// Attention implementation, where given.
    pub attention: Option<String>,
    /// What reads logits, where given: `rust`, `torch` or `triton`.
    pub kernel: Option<String>,
    /// Steps captured and replayed.
    pub graphs: bool,
}

/// Which figures to draw.
#[derive(Clone, Copy, Debug)]
pub struct Figures<'a> {
    /// Run folder.
    pub run: &'a Path,
    /// Folder of the figures.
    pub out: &'a Path,
    /// `png`, `svg`, `pdf`.
    pub formats: &'a [String],
    /// `default` or `paper`.
    pub style: &'a str,
    /// Cell, item and seed of a sample whose timeline is wanted instead.
    pub trace: Option<(&'a str, &'a str, Option<u64>)>,
}

/// The surroundings of a command.
pub trait Host {
    /// Loads an ensemble.
    ///
    /// # Errors
    /// See [`HostError`].
    fn load(&mut self, spec: &EngineSpec) -> Result<Box<dyn Backend>, HostError>;

    /// Machine, library versions, devices: whatever a reader of the run wants to know.
    fn environment(&mut self) -> Value;

    /// Folder of the benchmarks shipped with the package.
    fn data_dir(&self) -> Option<PathBuf>;

    /// The interpreter that runs what models wrote, for benchmarks of code; `None` leaves it to the `python3` on `PATH`.
    fn python(&self) -> Option<PathBuf> {
        None
    }

    /// Draws figures; returns one line per figure made or left out.
    ///
    /// # Errors
    /// See [`HostError`].
    fn plot(&mut self, request: &Figures<'_>) -> Result<Vec<String>, HostError>;

    /// Versions, devices, memory and data of this machine, with what is missing and how to get it.
    ///
    /// # Errors
    /// See [`HostError`].
    fn doctor(&mut self) -> Result<Value, HostError>;

    /// Names of the shipped experts with a line on each.
    fn experts(&mut self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// The live view of a timeline on standard output, where there is one.
    fn timeline(&mut self) -> Option<Box<dyn Timeline>> {
        None
    }

    /// Whether standard output is a terminal.
    fn output_terminal(&self) -> bool {
        std::io::IsTerminal::is_terminal(&std::io::stdout())
    }

    /// The live display, where there is one.
    fn rich(&mut self) -> Option<Box<dyn Display>>;

    /// Asked at least every step: `Break` once the user wants to stop.
    fn poll(&mut self) -> ControlFlow<()>;

    /// Whether standard error is a terminal.
    fn terminal(&self) -> bool;
}

/// The host of the Python-free binary.
#[derive(Debug, Default)]
pub struct NoPython;

impl Host for NoPython {
    fn load(&mut self, _: &EngineSpec) -> Result<Box<dyn Backend>, HostError> {
        Err(HostError::NeedsPython("run"))
    }

    fn environment(&mut self) -> Value {
        Value::Null
    }

    fn data_dir(&self) -> Option<PathBuf> {
        None
    }

    fn plot(&mut self, _: &Figures<'_>) -> Result<Vec<String>, HostError> {
        Err(HostError::NeedsPython("plot"))
    }

    fn doctor(&mut self) -> Result<Value, HostError> {
        Err(HostError::NeedsPython("doctor"))
    }

    fn rich(&mut self) -> Option<Box<dyn Display>> {
        None
    }

    fn poll(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn terminal(&self) -> bool {
        std::io::IsTerminal::is_terminal(&std::io::stderr())
    }
}
