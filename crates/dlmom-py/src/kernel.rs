//! The fused kernel on tensors, for benchmarks and tests.

use std::sync::{Mutex, PoisonError};

use dlmom_core::{ConsensusSpec, Request, RowReadout};
use dlmom_kernels::{Kernel, Logits, Row, Scratch, Tier};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::backend::Borrowed;
use crate::errors::ConfigError;

/// A row's readout: entropies of the experts and of the merged distribution, ids, probabilities, mass; no ids where a logit
/// is not finite.
type Read = (Vec<f64>, f64, Vec<u32>, Vec<f32>, f32);

/// The fused consensus kernel. Private.
#[pyclass(frozen, name = "Kernel", module = "dlmom_rs._core")]
pub struct PyKernel {
    kernel: Kernel,
    buffers: Mutex<(Vec<Scratch>, Vec<RowReadout>)>,
}

#[pymethods]
impl PyKernel {
    /// A kernel of `threads` threads, on the instruction set named `tier` (`generic`, `avx2`, `avx512`) or the best.
    ///
    /// Raises `ValueError` for a tier that there is not here.
    #[new]
    #[pyo3(signature = (threads=1, tier=None))]
    fn new(threads: usize, tier: Option<&str>) -> PyResult<Self> {
        let tier = match tier {
            None => Tier::best(),
            Some(name) => Tier::ALL
                .into_iter()
                .find(|tier| tier.name() == name)
                .ok_or_else(|| PyValueError::new_err(format!("unknown tier {name:?}")))?,
        };
        let kernel =
            Kernel::with_tier(tier, threads).map_err(|e| PyValueError::new_err(e.to_string()))?;
        Ok(Self {
            kernel,
            buffers: Mutex::default(),
        })
    }

    /// Its instruction set.
    #[getter]
    fn tier(&self) -> &'static str {
        self.kernel.tier().name()
    }

    /// Reads every row of K CPU tensors `[rows, vocab]`, one per expert (float32, bfloat16 or float16), merged as `spec`
    /// (JSON) says, to packets of `k` entries. Nothing is copied.
    ///
    /// Raises `TypeError` for other tensors, `ConfigError` for a specification that is none.
    fn read(
        &self,
        py: Python<'_>,
        experts: Vec<Bound<'_, PyAny>>,
        k: usize,
        spec: &str,
    ) -> PyResult<Vec<Read>> {
        let wrong = |e: String| ConfigError::new_err(format!("consensus: {e}"));
        let spec: ConsensusSpec = serde_json::from_str(spec).map_err(|e| wrong(e.to_string()))?;
        let Some(first) = experts.first() else {
            return Ok(Vec::new());
        };
        spec.validate(Some(experts.len()))
            .map_err(|e| wrong(e.to_string()))?;
        let shape: (usize, usize) = first.getattr("shape")?.extract()?;
        let experts = experts
            .iter()
            .map(|tensor| Borrowed::new(tensor, shape.0, shape.1))
            .collect::<PyResult<Vec<_>>>()?;
        py.detach(|| {
            let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
            let (scratch, out) = &mut *buffers;
            let rows: Vec<Vec<Logits<'_>>> = (0..shape.0)
                .map(|row| experts.iter().filter_map(|e| e.row(row)).collect())
                .collect();
            let mut batch: Vec<Row<'_>> = rows
                .iter()
                .map(|experts| Row {
                    experts,
                    consensus: &spec,
                    request: Request {
                        top: k,
                        ..Request::default()
                    },
                    preferences: None,
                })
                .collect();
            self.kernel.read_rows(&mut batch, scratch, out);
            Ok(out
                .iter()
                .map(|read| {
                    (
                        read.entropies.clone(),
                        read.merged_entropy,
                        read.ids.clone(),
                        read.probs.clone(),
                        read.mass,
                    )
                })
                .collect())
        })
    }
}
