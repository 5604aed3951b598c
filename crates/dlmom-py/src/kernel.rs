//! The fused kernel on tensors, for benchmarks and tests.

use std::sync::{Mutex, PoisonError};

use dlmom_core::{ConsensusSpec, Request, RowReadout};
use dlmom_kernels::{Attention, Kernel, Logits, Row, Scratch, Tier};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::errors::ConfigError;
use crate::tensors::{Borrowed, Dtype, Layout, grid, ranges};

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
            Some(name) => Tier::named(name)
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

    /// Softmax attention of one query per row: `query` `[rows, heads, 1, d]`, `keys` `[rows, kv_heads, n, d]`, `values`
    /// `[rows, kv_heads, n, dv]` of one type (float32, bfloat16, float16), `visible` bool `[rows, 1, 1, n]`, into `out`
    /// float32 `[rows, heads, dv]`, contiguous; all on the CPU, elements of a position next to each other.
    ///
    /// False, with nothing done, where a row's visible positions are none or not neighbours. Raises `TypeError` for other
    /// tensors, `ValueError` for sizes and types that do not fit each other.
    #[expect(clippy::too_many_arguments, reason = "the tensors of an attention")]
    fn attend(
        &self,
        py: Python<'_>,
        query: &Bound<'_, PyAny>,
        keys: &Bound<'_, PyAny>,
        values: &Bound<'_, PyAny>,
        visible: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        scale: f32,
    ) -> PyResult<bool> {
        let Some(ranges) = ranges(visible)? else {
            return Ok(false);
        };
        let [queries, keys, values] = [grid(query)?, grid(keys)?, grid(values)?];
        let target = Layout::of(out)?;
        let size: usize = target.shape.iter().product();
        let contiguous = target
            .shape
            .iter()
            .zip(&target.strides)
            .rev()
            .try_fold(1, |next, (&n, &stride)| {
                (n == 1 || stride == next).then_some(next * n)
            })
            .is_some();
        if (target.dtype, target.on_cpu, contiguous) != (Dtype::F32, true, true) || size == 0 {
            return Err(PyTypeError::new_err(
                "out must be a contiguous float32 tensor on the CPU",
            ));
        }
        // SAFETY: `size` float32 values lie there, as `out` is contiguous; the caller made it for this call and nobody else
        // reads or writes it meanwhile.
        let out = unsafe { std::slice::from_raw_parts_mut(target.address as *mut f32, size) };
        let call = Attention {
            queries,
            keys,
            values,
            visible: &ranges,
            scale,
        };
        py.detach(|| self.kernel.attend(&call, out))
            .map_err(|e| PyValueError::new_err(e.to_string()))?;
        Ok(true)
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
