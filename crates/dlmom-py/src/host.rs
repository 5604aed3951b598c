//! The command line's surroundings, provided by the Python package.

use std::ops::ControlFlow;
use std::path::PathBuf;

use dlmom_cli::display::{CellProgress, CellStart, Display};
use dlmom_cli::host::{EngineSpec, Figures, Host, HostError};
use dlmom_cli::timeline::{Footer, Header, Step, Timeline};
use dlmom_runtime::Backend;
use pyo3::exceptions::{PyKeyboardInterrupt, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;

use crate::backend::{PyBackend, interrupt_again};

/// Python's side of the command line.
#[derive(Default)]
pub struct PyHost {
    /// The exception with which the user asked to stop.
    pub interrupt: Option<PyErr>,
}

impl PyHost {
    fn error(&mut self, py: Python<'_>, error: PyErr) -> HostError {
        if error.is_instance_of::<PyKeyboardInterrupt>(py) {
            self.interrupt = Some(error);
            return HostError::Interrupted;
        }
        let message = one_line(py, &error);
        let is_model_error = py
            .import("dlmom_rs.engine.errors")
            .and_then(|m| m.getattr("ModelError"))
            .is_ok_and(|class| error.matches(py, class).unwrap_or(false));
        if is_model_error {
            HostError::Usage(message)
        } else {
            HostError::Failed {
                message,
                source: Some(Box::new(error)),
            }
        }
    }
}

/// `Type: message` of an exception on one line.
pub fn one_line(py: Python<'_>, error: &PyErr) -> String {
    let value = error.value(py).to_string();
    let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
    let name = error
        .get_type(py)
        .name()
        .map_or_else(|_| "error".into(), |n| n.to_string());
    match name.as_str() {
        "ModelError" | "WeightsError" => value,
        _ if value.is_empty() => name,
        _ => format!("{name}: {value}"),
    }
}

/// Loads `dlmom_rs.engine.backend.Engine` with a specification's arguments.
pub fn load_engine<'py>(py: Python<'py>, spec: &EngineSpec) -> PyResult<Bound<'py, PyAny>> {
    let class = py.import("dlmom_rs.engine.backend")?.getattr("Engine")?;
    let options = PyDict::new(py);
    options.set_item("device", &spec.device)?;
    options.set_item("dtype", &spec.dtype)?;
    options.set_item("slots", spec.slots)?;
    options.set_item("max_len", 64)?;
    options.set_item("threads", spec.threads)?;
    options.set_item("trust_remote_code", spec.trust_remote_code)?;
    options.set_item("deterministic", spec.deterministic)?;
    options.set_item("fast", spec.fast)?;
    options.set_item("attn", &spec.attention)?;
    options.set_item("kernel", &spec.kernel)?;
    options.set_item("graphs", spec.graphs)?;
    class.call_method(
        "load",
        (spec.experts.clone(), spec.agents.clone()),
        Some(&options),
    )
}

impl Host for PyHost {
    fn load(&mut self, spec: &EngineSpec) -> Result<Box<dyn Backend>, HostError> {
        Python::attach(|py| {
            let backend = load_engine(py, spec).and_then(|engine| PyBackend::new(&engine));
            match backend {
                Ok(backend) => Ok(Box::new(backend) as Box<dyn Backend>),
                Err(error) => Err(self.error(py, error)),
            }
        })
    }

    fn environment(&mut self) -> Value {
        Python::attach(|py| {
            let text = py
                .import("dlmom_rs.environment")
                .and_then(|m| m.call_method0("as_json"))
                .and_then(|t| t.extract::<String>());
            text.ok()
                .and_then(|t| serde_json::from_str(&t).ok())
                .unwrap_or(Value::Null)
        })
    }

    fn data_dir(&self) -> Option<PathBuf> {
        Python::attach(|py| {
            let package = py.import("dlmom_rs").ok()?;
            let file: PathBuf = package.getattr("__file__").ok()?.extract().ok()?;
            Some(file.parent()?.join("data"))
        })
    }

    fn plot(&mut self, request: &Figures<'_>) -> Result<Vec<String>, HostError> {
        Python::attach(|py| {
            let draw = || -> PyResult<Vec<String>> {
                let figures = py.import("dlmom_rs.figures")?;
                let look = PyDict::new(py);
                look.set_item("formats", request.formats)?;
                look.set_item("style", request.style)?;
                let lines = match request.trace {
                    None => {
                        figures.call_method("draw_run", (request.run, request.out), Some(&look))?
                    }
                    Some((cell, item, seed)) => figures.call_method(
                        "draw_trace",
                        (request.run, request.out, cell, item, seed),
                        Some(&look),
                    )?,
                };
                lines.extract()
            };
            draw().map_err(|error| {
                if error.is_instance_of::<PyValueError>(py) {
                    HostError::Usage(error.value(py).to_string())
                } else {
                    self.error(py, error)
                }
            })
        })
    }

    fn python(&self) -> Option<PathBuf> {
        Python::attach(|py| {
            let executable = py.import("sys").ok()?.getattr("executable").ok()?;
            executable.extract().ok()
        })
    }

    fn doctor(&mut self) -> Result<Value, HostError> {
        Python::attach(|py| {
            let text = py
                .import("dlmom_rs.environment")
                .and_then(|m| m.call_method0("doctor_json"))
                .and_then(|text| text.extract::<String>())
                .map_err(|error| self.error(py, error))?;
            serde_json::from_str(&text).map_err(|e| HostError::Failed {
                message: format!("doctor: {e}"),
                source: None,
            })
        })
    }

    fn experts(&mut self) -> Vec<(String, String)> {
        Python::attach(|py| {
            py.import("dlmom_rs.zoo")
                .and_then(|m| m.call_method0("describe"))
                .and_then(|lines| lines.extract())
                .unwrap_or_default()
        })
    }

    fn timeline(&mut self) -> Option<Box<dyn Timeline>> {
        Python::attach(|py| {
            let module = py.import("dlmom_rs.display").ok()?;
            let object = module.call_method0("RichTimeline").ok()?.unbind();
            Some(Box::new(PyDisplay { object }) as Box<dyn Timeline>)
        })
    }

    fn rich(&mut self) -> Option<Box<dyn Display>> {
        Python::attach(|py| {
            let module = py.import("dlmom_rs.display").ok()?;
            let object = module.call_method0("RichDisplay").ok()?;
            Some(Box::new(PyDisplay {
                object: object.unbind(),
            }) as Box<dyn Display>)
        })
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

    fn terminal(&self) -> bool {
        std::io::IsTerminal::is_terminal(&std::io::stderr())
    }
}

struct PyDisplay {
    object: Py<PyAny>,
}

impl PyDisplay {
    fn call(&self, method: &str, payload: &Value) {
        Python::attach(|py| {
            // A display that fails must not take the run with it.
            let shown = self
                .object
                .bind(py)
                .call_method1(method, (payload.to_string(),));
            if let Err(error) = shown {
                interrupt_again(py, &error);
            }
        });
    }
}

impl Timeline for PyDisplay {
    fn start(&mut self, header: &Header) {
        self.call("start", &serde_json::to_value(header).unwrap_or_default());
    }
    fn step(&mut self, step: &Step) {
        self.call("step", &serde_json::to_value(step).unwrap_or_default());
    }
    fn finish(&mut self, footer: &Footer) {
        self.call("finish", &serde_json::to_value(footer).unwrap_or_default());
    }
}

impl Display for PyDisplay {
    fn start(&mut self, cell: &CellStart) {
        self.call("start", &serde_json::to_value(cell).unwrap_or_default());
    }
    fn update(&mut self, progress: &CellProgress) {
        self.call(
            "update",
            &serde_json::to_value(progress).unwrap_or_default(),
        );
    }
    fn finish(&mut self, progress: &CellProgress) {
        self.call(
            "finish",
            &serde_json::to_value(progress).unwrap_or_default(),
        );
    }
    fn line(&mut self, text: &str) {
        self.call("line", &Value::String(text.into()));
    }
    fn stop(&mut self) {
        self.call("stop", &Value::Null);
    }
}
