//! The loop for Python callers: `generate` and the conformance kit.

use std::ops::ControlFlow;

use dlmom_runs::{Overrides, Registry, Setting};
use dlmom_runtime::conformance::{Preset, Settings, check};
use dlmom_runtime::{EnsembleInfo, Job, LoopConfig, MemoryStats, Outcome, RunOptions, Sink, run};
use pyo3::prelude::*;

use crate::backend::PyBackend;
use crate::errors::{ConfigError, ProtocolError, run_error};

struct Collect {
    outcomes: Vec<Outcome>,
    interrupt: Option<PyErr>,
}

impl Sink for Collect {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.outcomes.push(outcome);
        Ok(())
    }

    fn poll(&mut self) -> ControlFlow<()> {
        Python::attach(|py| match py.check_signals() {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.interrupt = Some(error);
                ControlFlow::Break(())
            }
        })
    }
}

/// The reference pipeline's loop configuration as JSON, for `experts` agents.
#[pyfunction]
pub fn loop_config(experts: usize) -> PyResult<String> {
    let wrong = |e: String| ConfigError::new_err(e);
    let registry = Registry::builtin().map_err(|e| wrong(e.to_string()))?;
    let setting = Setting {
        shared_model: experts == 1,
        experts,
    };
    let plan = registry
        .expand(
            &["A1".to_owned()],
            &[dlmom_runs::REF.to_owned()],
            setting,
            &Overrides::default(),
        )
        .map_err(|e| wrong(e.to_string()))?;
    let config = plan
        .runs()
        .next()
        .map(dlmom_runs::Experiment::loop_config)
        .transpose()
        .map_err(|e| wrong(e.to_string()))?;
    serde_json::to_string(&config).map_err(|e| wrong(e.to_string()))
}

/// Runs `jobs` (a JSON list of `{key, prompts, trace}`) on a loaded engine with a loop
/// configuration (JSON) and returns the outcomes as a JSON list, in the order of finishing.
///
/// Raises `ConfigError` for a value out of range, and whatever the engine raised, with a note.
#[pyfunction]
#[pyo3(signature = (engine, config, jobs, max_failures=1, rows=None))]
pub fn generate(
    py: Python<'_>,
    engine: &Bound<'_, PyAny>,
    config: &str,
    jobs: &str,
    max_failures: u32,
    rows: Option<u32>,
) -> PyResult<String> {
    let wrong = |what: &str, e: serde_json::Error| ConfigError::new_err(format!("{what}: {e}"));
    let config: LoopConfig = serde_json::from_str(config).map_err(|e| wrong("config", e))?;
    let jobs: Vec<Job> = serde_json::from_str(jobs).map_err(|e| wrong("jobs", e))?;
    let mut backend = PyBackend::new(engine)?;
    let mut sink = Collect {
        outcomes: Vec::new(),
        interrupt: None,
    };
    let options = RunOptions { max_failures, rows };
    let result = py.detach(|| {
        run(
            &mut backend,
            &config,
            &options,
            &mut jobs.into_iter(),
            &mut sink,
        )
    });
    if let Some(interrupt) = sink.interrupt {
        return Err(interrupt);
    }
    result.map_err(|error| run_error(py, error))?;
    serde_json::to_string(&sink.outcomes).map_err(|e| wrong("outcomes", e))
}

/// Runs the backend conformance kit on a loaded engine; `tolerance` bounds differences of
/// entropies (nats) and probabilities that are meant to be equal.
///
/// Raises `ProtocolError` naming the first rule broken.
#[pyfunction]
pub fn conformance(py: Python<'_>, engine: &Bound<'_, PyAny>, tolerance: f64) -> PyResult<()> {
    let mut backend = PyBackend::new(engine)?;
    py.detach(|| {
        for preset in [Preset::Mean, Preset::Paper] {
            check(&mut backend, Settings { tolerance, preset })?;
        }
        Ok(())
    })
    .map_err(|e: dlmom_runtime::conformance::Violation| ProtocolError::new_err(e.to_string()))
}
