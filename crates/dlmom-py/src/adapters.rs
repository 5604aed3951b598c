//! A user's own Python objects in the Rust loop: gates and consensus operators.

use std::sync::Mutex;

use dlmom_core::{Consensus, ControllerFailure, Mode, Rule, Views};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};

use crate::backend::floats;

/// A user's gate: an object with `observe(entropy, mode) -> "latent" | "explicit"`.
pub struct PyRule {
    object: Py<PyAny>,
}

impl PyRule {
    /// The gate of one sample, made by a class or another callable without arguments.
    pub fn make(factory: &Py<PyAny>) -> Result<Self, ControllerFailure> {
        Python::attach(|py| {
            let object = factory.bind(py).call0()?;
            if !object.hasattr("observe")? {
                return Err(PyTypeError::new_err(format!(
                    "controller: {} has no method observe(entropy, mode)",
                    object.get_type().name()?
                )));
            }
            Ok(Self {
                object: object.unbind(),
            })
        })
        .map_err(|e: PyErr| Box::new(e) as ControllerFailure)
    }
}

impl Rule for PyRule {
    fn wish(&mut self, entropy: f64, mode: Option<Mode>) -> Result<Mode, ControllerFailure> {
        Python::attach(|py| {
            let answer = self
                .object
                .bind(py)
                .call_method1("observe", (entropy, mode.map(Mode::as_str)))?;
            match answer.extract::<String>().as_deref() {
                Ok("latent") => Ok(Mode::Latent),
                Ok("explicit") => Ok(Mode::Explicit),
                _ => Err(PyValueError::new_err(format!(
                    "controller: observe answered {}; it must be 'latent' or 'explicit'",
                    answer.repr()?
                ))),
            }
        })
        .map_err(|e: PyErr| Box::new(e) as ControllerFailure)
    }
}

/// A user's consensus: an object with `merge(centred) -> row` on numpy arrays.
pub struct PyConsensus {
    object: Py<PyAny>,
    name: String,
    failure: Mutex<Option<PyErr>>,
}

impl PyConsensus {
    /// Wraps `object`; its name is its `name` attribute, else its class.
    pub fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        if !object.hasattr("merge")? {
            return Err(PyTypeError::new_err(format!(
                "consensus: {} has no method merge(centred)",
                object.get_type().name()?
            )));
        }
        let name = match object.getattr("name").and_then(|n| n.extract::<String>()) {
            Ok(name) => name,
            Err(_) => object.get_type().name()?.to_string(),
        };
        Ok(Self {
            object: object.clone().unbind(),
            name,
            failure: Mutex::new(None),
        })
    }

    fn call(&self, py: Python<'_>, centred: &[&[f32]], out: &mut [f32]) -> PyResult<()> {
        let bytes: Vec<u8> = centred
            .iter()
            .flat_map(|row| row.iter())
            .flat_map(|x| x.to_le_bytes())
            .collect();
        let answer = py.import("dlmom_rs.adapters")?.call_method1(
            "call_merge",
            (
                &self.object,
                PyByteArray::new(py, &bytes),
                centred.len(),
                out.len(),
            ),
        )?;
        let answer = answer.cast::<PyBytes>()?;
        let values = floats(answer.as_bytes());
        if values.len() != out.len() {
            return Err(PyValueError::new_err(format!(
                "consensus: merge answered {} values for a vocabulary of {}",
                values.len(),
                out.len()
            )));
        }
        out.copy_from_slice(&values);
        Ok(())
    }
}

impl Consensus for PyConsensus {
    fn name(&self) -> &str {
        &self.name
    }

    fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool {
        Python::attach(|py| {
            if let Err(error) = self.call(py, views.centred, out) {
                // Zeros are finite, so the row is read out; the loop asks for the failure before it uses the row.
                out.fill(0.0);
                if let Ok(mut failure) = self.failure.lock() {
                    failure.get_or_insert(error);
                }
            }
        });
        true
    }

    fn take_failure(&self) -> Option<Box<dyn std::error::Error + Send + Sync>> {
        let mut failure = self.failure.lock().ok()?;
        failure
            .take()
            .map(|error| Box::new(error) as Box<dyn std::error::Error + Send + Sync>)
    }
}
