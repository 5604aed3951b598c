//! `dlmom_rs._core`: the boundary to Python, and nothing else.

mod adapters;
mod backend;
mod errors;
mod host;
mod kernel;
mod loops;
mod reads;
mod table;
mod tensors;
mod values;

use pyo3::prelude::*;

/// The compiled core of `dlmom_rs`. Private: import from `dlmom_rs`.
#[pymodule]
mod _core {
    use std::io::Write;

    use pyo3::prelude::*;

    use crate::host::PyHost;

    #[pymodule_export]
    use crate::errors::{
        BackendFailure, Cancelled, ConfigError, DlmomError, PacketError, ProtocolError,
        RunDataError,
    };
    #[pymodule_export]
    use crate::kernel::PyKernel;
    #[pymodule_export]
    use crate::loops::{
        CancelToken, PySession, conformance, conformance_of_parts, loop_config, role_prompts,
        seating,
    };
    #[pymodule_export]
    use crate::table::{ArrowTable, run_table};
    #[pymodule_export]
    use crate::values::{PyController, PyDecision, PyPacket, PyTranscript, consensus_core};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("BackendError", module.py().get_type::<BackendFailure>())?;
        let profile = if cfg!(debug_assertions) {
            "debug"
        } else {
            "release"
        };
        module.add("build_profile", profile)
    }

    /// Runs the command line `argv` (program name first) and returns its exit status.
    ///
    /// The loop stays on the calling thread. A ``KeyboardInterrupt`` ends a run cleanly with 130.
    #[pyfunction]
    fn main(py: Python<'_>, argv: Vec<String>) -> u8 {
        py.detach(|| {
            let mut host = PyHost::default();
            let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
            let status = dlmom_cli::run(&argv, &mut host, &mut out, &mut err);
            let _ = out.flush();
            status.code()
        })
    }
}
