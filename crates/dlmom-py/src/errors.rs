//! Rust failures as Python exceptions; a Python exception that crossed Rust comes out as itself.

use dlmom_runtime::{BackendError, RunError};
use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyKeyboardInterrupt};
use pyo3::prelude::*;

create_exception!(
    dlmom_rs,
    DlmomError,
    PyException,
    "Base of every error of dlmom_rs."
);
create_exception!(
    dlmom_rs,
    ConfigError,
    DlmomError,
    "A knob is out of range or unknown."
);
create_exception!(
    dlmom_rs,
    PacketError,
    DlmomError,
    "A belief packet or its bytes are wrong."
);
create_exception!(
    dlmom_rs,
    ProtocolError,
    DlmomError,
    "A backend broke the contract."
);
create_exception!(
    dlmom_rs,
    BackendFailure,
    DlmomError,
    "A backend call failed."
);
create_exception!(
    dlmom_rs,
    RunDataError,
    DlmomError,
    "A run folder or one of its files is wrong."
);

create_exception!(
    dlmom_rs,
    Cancelled,
    DlmomError,
    "A run was stopped through its cancel flag."
);

fn original(
    py: Python<'_>,
    source: &(dyn std::error::Error + Send + Sync + 'static),
) -> Option<PyErr> {
    source
        .downcast_ref::<PyErr>()
        .map(|error| error.clone_ref(py))
}

/// The exception for a failed run: the original one with a note where Python raised it.
pub fn run_error(py: Python<'_>, error: RunError) -> PyErr {
    match error {
        RunError::Interrupted(source) => source
            .as_deref()
            .and_then(|s| original(py, s))
            .unwrap_or_else(|| PyKeyboardInterrupt::new_err("interrupted")),
        RunError::Backend { context, source } => match source {
            BackendError::Failed {
                context: inner,
                source,
            }
            | BackendError::Fatal {
                context: inner,
                source,
            } => match original(py, &*source) {
                Some(exception) => {
                    let note = format!("{context}: {inner}");
                    let _ = exception.value(py).call_method1("add_note", (note,));
                    exception
                }
                None => BackendFailure::new_err(format!("{context}: {inner}: {source}")),
            },
            other => BackendFailure::new_err(format!("{context}: {other}")),
        },
        RunError::Config(error) => ConfigError::new_err(error.to_string()),
        RunError::Sink(source) => {
            original(py, &*source).unwrap_or_else(|| RunDataError::new_err(source.to_string()))
        }
        other => ConfigError::new_err(other.to_string()),
    }
}
