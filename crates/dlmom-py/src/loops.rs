//! The loop for Python callers: a session of turns, and the conformance kit.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use dlmom_core::{Controller, ControllerFailure, ControllerSpec, RuleController};
use dlmom_packet::BeliefPacket;
use dlmom_runs::{
    CellKind, Overrides, PRESETS, Placement, Preset, REF, Registry, Seating, Setting,
};
use dlmom_runtime::conformance::{
    Preset as Rules, Settings, check, check_consensus, check_controller,
};
use dlmom_runtime::{
    EnsembleInfo, Hooks, Job, LoopConfig, MemoryStats, Outcome, PromptSource, RunError, RunOptions,
    Session, Sink, StepEvent,
};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Value, json};

use crate::adapters::{PyConsensus, PyRule};
use crate::backend::PyBackend;
use crate::errors::{Cancelled, ConfigError, ProtocolError, run_error};
use crate::values::PyPacket;

/// A flag that stops a run from another thread, or from a notebook's next cell.
#[pyclass(frozen, name = "CancelToken", module = "dlmom_rs")]
#[derive(Default)]
pub struct CancelToken {
    flag: AtomicBool,
}

#[pymethods]
impl CancelToken {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Asks the run to stop before its next step; it raises :class:`Cancelled`.
    fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }

    /// Whether :meth:`cancel` has been called.
    #[getter]
    fn cancelled(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }
}

/// Collects what a turn brought; asks the interpreter and the flag whether to go on.
struct Collect<'a> {
    outcomes: Vec<Outcome>,
    events: Option<Vec<(Value, Option<BeliefPacket>)>>,
    interrupt: Option<PyErr>,
    cancel: Option<&'a CancelToken>,
    cancelled: bool,
}

impl Sink for Collect<'_> {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.outcomes.push(outcome);
        Ok(())
    }

    fn step(&mut self, event: &StepEvent<'_>) {
        if let Some(events) = &mut self.events {
            events.push((describe(event), event.packet.cloned()));
        }
    }

    fn poll(&mut self) -> ControlFlow<()> {
        if self.cancel.is_some_and(CancelToken::cancelled) {
            self.cancelled = true;
            return ControlFlow::Break(());
        }
        Python::attach(|py| match py.check_signals() {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.interrupt = Some(error);
                ControlFlow::Break(())
            }
        })
    }
}

/// Entries of a packet named in an event.
const EVENT_TOP: usize = 5;

fn describe(event: &StepEvent<'_>) -> Value {
    let read = event.read;
    let (ids, probs) = event
        .packet
        .map_or((&read.ids[..], &read.probs[..]), |p| (p.ids(), p.probs()));
    let keep = EVENT_TOP.min(ids.len());
    json!({
        "item_id": event.key.item_id,
        "step": event.step,
        "mode": event.decision.mode.as_str(),
        "reason": event.decision.reason.as_str(),
        "switched": event.decision.switched,
        "entropy": event.entropy,
        "observed": event.observed,
        "expert_entropy": read.entropies,
        "merged_entropy": read.merged_entropy,
        "mass": read.mass,
        "noise_kl": event.noise_kl,
        "noise_js": event.noise_js,
        "agent": event.agent,
        "token": event.token,
        "injected_tokens": event.injected.len(),
        "printed": event
            .token
            .iter()
            .chain(event.injected)
            .filter_map(|&t| event.model.token_bytes.get(t as usize))
            .flatten()
            .collect::<Vec<_>>(),
        "top_ids": &ids[..keep],
        "top_probs": &probs[..keep],
        "top_tokens": ids[..keep].iter().map(|&id| event.model.decode(&[id])).collect::<Vec<_>>(),
        "uplink_bytes": event.bytes.0,
        "downlink_bytes": event.bytes.1,
    })
}

/// A topology with its agents as JSON; `name` is a shipped one's or a file's.
#[pyfunction]
pub fn seating(name: &str, experts: usize) -> PyResult<String> {
    let wrong = |e: String| ConfigError::new_err(e);
    let seating = dlmom_runs::seating(name, experts).map_err(|e| wrong(e.to_string()))?;
    serde_json::to_string(&seating).map_err(|e| wrong(e.to_string()))
}

/// A prompt (JSON) as every agent of a seating (JSON) is asked it: a JSON list.
#[pyfunction]
pub fn role_prompts(seating: &str, source: &str) -> PyResult<String> {
    let wrong = |e: serde_json::Error| ConfigError::new_err(format!("prompt: {e}"));
    let seating: Seating = serde_json::from_str(seating).map_err(wrong)?;
    let source: PromptSource = serde_json::from_str(source).map_err(wrong)?;
    serde_json::to_string(&seating.prompts(&source)).map_err(wrong)
}

/// The loop configuration of the reference pipeline, or of a preset, for the agents of a seating (JSON), of one model or of
/// several. JSON of `config`, the preset's `topology`, and the knobs to leave out for models without the token they name.
#[pyfunction]
#[pyo3(signature = (seating, shared_model, preset=None))]
pub fn loop_config(seating: &str, shared_model: bool, preset: Option<&str>) -> PyResult<String> {
    let wrong = |e: String| ConfigError::new_err(e);
    let seating: Seating = serde_json::from_str(seating).map_err(|e| wrong(e.to_string()))?;
    let preset = preset
        .map(Preset::named)
        .transpose()
        .map_err(|e| wrong(e.to_string()))?;
    if let Some(needed) = preset.as_ref().and_then(|p| p.topology.as_deref())
        && needed != seating.name
    {
        return Err(wrong(format!(
            "preset: it needs topology {needed}, and the ensemble was loaded with {}",
            seating.name
        )));
    }
    let mut registry = Registry::builtin().map_err(|e| wrong(e.to_string()))?;
    let (suite, id) = match &preset {
        None => ("A1", REF),
        Some(preset) => {
            registry.add(PRESETS, vec![preset.cell()]);
            (PRESETS, preset.name.as_str())
        }
    };
    let agents = Setting {
        shared_model,
        experts: seating.seats.len(),
        topology: seating.topology.clone(),
    };
    let plan = registry
        .expand(
            &[suite.to_owned()],
            &[id.to_owned()],
            &agents,
            &Overrides::default(),
        )
        .map_err(|e| wrong(e.to_string()))?;
    let cell = plan
        .cells
        .iter()
        .find(|cell| cell.experiment.id == id)
        .ok_or_else(|| wrong(format!("{id} is missing")))?;
    if let CellKind::Skip { reason } = &cell.kind {
        return Err(wrong(format!("{id}: {reason}")));
    }
    let placement = Placement {
        topology: seating.topology.clone(),
        pilot: None,
    };
    let config = cell
        .experiment
        .loop_config(&placement)
        .map_err(|e| wrong(e.to_string()))?;
    let where_known: Vec<&str> = preset
        .iter()
        .flat_map(|p| p.where_known.iter().map(|knob| knob.as_str()))
        .collect();
    Ok(json!({ "config": config, "where_known": where_known }).to_string())
}

/// What a turn brings: whether there is more to do, the events with their packets, the finished samples with theirs.
type Turn = (
    bool,
    Vec<(String, Option<PyPacket>)>,
    Vec<(String, Vec<(u32, PyPacket)>)>,
);

struct Inner {
    backend: PyBackend,
    session: Session,
    jobs: VecDeque<Job>,
    ended: bool,
}

/// A run of the loop, one turn at a time. Private: ``DeepLatentMoM`` drives it.
#[pyclass(frozen, name = "Session", module = "dlmom_rs._core")]
pub struct PySession {
    inner: Mutex<Inner>,
    cancel: Option<Py<CancelToken>>,
    process: u32,
}

#[pymethods]
impl PySession {
    /// Prepares `jobs` (a JSON list of `{key, prompts, trace}`) with a loop configuration (JSON).
    ///
    /// Raises `ConfigError` for a value out of range.
    #[expect(clippy::too_many_arguments, reason = "keywords of a Python call")]
    #[new]
    #[pyo3(signature = (engine, config, jobs, *, max_failures=1, rows=None, controller=None, consensus=None, compress_every=None, cancel=None))]
    fn new(
        engine: &Bound<'_, PyAny>,
        config: &str,
        jobs: &str,
        max_failures: u32,
        rows: Option<u32>,
        controller: Option<Py<PyAny>>,
        consensus: Option<&Bound<'_, PyAny>>,
        compress_every: Option<u32>,
        cancel: Option<Py<CancelToken>>,
    ) -> PyResult<Self> {
        let py = engine.py();
        let wrong = |what: &str, e: serde_json::Error| ConfigError::new_err(format!("{what}: {e}"));
        let config: LoopConfig = serde_json::from_str(config).map_err(|e| wrong("config", e))?;
        let jobs: VecDeque<Job> = serde_json::from_str(jobs).map_err(|e| wrong("jobs", e))?;
        let mut backend = PyBackend::new(engine)?;
        let mut hooks = Hooks {
            compress_every,
            ..Hooks::default()
        };
        if let Some(factory) = controller {
            hooks.rule = Some(Box::new(move |_| {
                Ok(Box::new(PyRule::make(&factory)?) as Box<dyn dlmom_core::Rule>)
            }));
        }
        if let Some(object) = consensus {
            hooks.consensus = Some(Box::new(PyConsensus::new(object)?));
        }
        let options = RunOptions {
            max_failures,
            rows,
            ..RunOptions::default()
        };
        let session = py
            .detach(|| Session::new(&mut backend, &[config], &options, hooks))
            .map_err(|e| run_error(py, e))?;
        Ok(Self {
            inner: Mutex::new(Inner {
                backend,
                session,
                jobs,
                ended: false,
            }),
            cancel,
            process: std::process::id(),
        })
    }

    /// Advances every running sample by one step. With `events`, says what each decided.
    ///
    /// Raises whatever the engine raised, with a note; `Cancelled` where the flag is set. The session is over then.
    fn turn(&self, py: Python<'_>, events: bool) -> PyResult<Turn> {
        if std::process::id() != self.process {
            return Err(PyRuntimeError::new_err(
                "this session belongs to another process: after os.fork() the child must load its own ensemble",
            ));
        }
        let mut sink = Collect {
            outcomes: Vec::new(),
            events: events.then(Vec::new),
            interrupt: None,
            cancel: self.cancel.as_ref().map(Py::get),
            cancelled: false,
        };
        let result = py.detach(|| {
            let mut inner = self.inner.lock().map_err(|_| None)?;
            if inner.ended {
                return Err(None);
            }
            let Inner {
                backend,
                session,
                jobs,
                ended,
            } = &mut *inner;
            let mut source = std::iter::from_fn(|| jobs.pop_front());
            let turn = session.turn(backend, &mut source, &mut sink);
            if !matches!(turn, Ok(true)) {
                *ended = true;
                session.close(backend);
            }
            turn.map_err(Some)
        });
        if let Some(interrupt) = sink.interrupt {
            return Err(interrupt);
        }
        if sink.cancelled {
            return Err(Cancelled::new_err("cancelled"));
        }
        let more = result.map_err(|error: Option<RunError>| match error {
            Some(error) => run_error(py, error),
            None => ProtocolError::new_err("the session has ended"),
        })?;
        let text = |value: Value| value.to_string();
        let mut outcomes = Vec::with_capacity(sink.outcomes.len());
        for mut outcome in sink.outcomes {
            let packets = std::mem::take(&mut outcome.packets)
                .into_iter()
                .map(|(step, packet)| (step, PyPacket::new(packet)))
                .collect();
            let outcome = serde_json::to_string(&outcome)
                .map_err(|e| ConfigError::new_err(format!("outcome: {e}")))?;
            outcomes.push((outcome, packets));
        }
        let events = sink.events.unwrap_or_default();
        Ok((
            more,
            events
                .into_iter()
                .map(|(event, packet)| (text(event), packet.map(PyPacket::new)))
                .collect(),
            outcomes,
        ))
    }

    /// What has been done so far: samples finished, calls of the engine, rows advanced, both up to the last admission,
    /// positions of prompts, those of them that were copied, and seconds in the engine and in all. `RuntimeError` while a turn is under way.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let inner = self
            .inner
            .try_lock()
            .map_err(|_| PyRuntimeError::new_err("a turn is under way"))?;
        let stats = inner.session.stats();
        let dict = PyDict::new(py);
        dict.set_item("samples", stats.samples)?;
        dict.set_item("steps", stats.steps)?;
        dict.set_item("rows", stats.rows)?;
        dict.set_item("full_steps", stats.full.0)?;
        dict.set_item("full_rows", stats.full.1)?;
        dict.set_item("prompt_positions", stats.prompts)?;
        dict.set_item("copied_positions", stats.copied)?;
        dict.set_item("backend_s", stats.backend_s)?;
        dict.set_item("wall_s", stats.wall_s)?;
        Ok(dict)
    }

    /// Frees the lanes of samples that have not finished. Harmless when called twice.
    fn close(&self, py: Python<'_>) {
        if std::process::id() != self.process {
            return;
        }
        py.detach(|| {
            if let Ok(mut inner) = self.inner.lock()
                && !inner.ended
            {
                inner.ended = true;
                let Inner {
                    backend, session, ..
                } = &mut *inner;
                session.close(backend);
            }
        });
    }
}

/// Runs the backend conformance kit on a loaded engine; `tolerance` bounds differences of
/// entropies (nats) and probabilities that are meant to be equal.
///
/// Raises `ProtocolError` naming the first rule broken.
#[pyfunction]
pub fn conformance(py: Python<'_>, engine: &Bound<'_, PyAny>, tolerance: f64) -> PyResult<()> {
    let mut backend = PyBackend::new(engine)?;
    py.detach(|| {
        for preset in [Rules::Mean, Rules::Paper] {
            check(&mut backend, Settings { tolerance, preset })?;
        }
        Ok(())
    })
    .map_err(|e: dlmom_runtime::conformance::Violation| ProtocolError::new_err(e.to_string()))
}

/// Runs the conformance kit on a user's own parts: `controller` is a class or callable without
/// arguments, `consensus` an object with `merge`; either may be None.
///
/// Raises `ProtocolError` naming the first rule broken.
#[pyfunction]
#[pyo3(signature = (controller=None, consensus=None))]
pub fn conformance_of_parts(
    py: Python<'_>,
    controller: Option<Py<PyAny>>,
    consensus: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let broken = |e: dlmom_runtime::conformance::Violation| ProtocolError::new_err(e.to_string());
    if let Some(object) = consensus {
        let consensus = PyConsensus::new(object)?;
        py.detach(|| check_consensus(&consensus)).map_err(broken)?;
    }
    if let Some(factory) = controller {
        // Budgets wide enough that every wish counts.
        let spec = ControllerSpec {
            alpha: 0.5,
            cap: -1,
            max_latent_steps: 1_000,
            ..ControllerSpec::default()
        };
        let mut make = || -> Result<Box<dyn Controller>, ControllerFailure> {
            let rule = Box::new(PyRule::make(&factory)?);
            Ok(Box::new(RuleController::new(&spec, rule)?))
        };
        py.detach(|| check_controller(&mut make)).map_err(broken)?;
    }
    Ok(())
}
