//! Run tables through the Arrow C stream interface (`PyCapsule` protocol), without copying.

use std::path::PathBuf;

use arrow_array::ffi_stream::FFI_ArrowArrayStream;
use arrow_array::{RecordBatch, RecordBatchIterator};
use dlmom_runs::aggregate as tables;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::errors::RunDataError;

/// Columns that any Arrow consumer can read: `polars.DataFrame(table)`.
#[pyclass(frozen)]
pub struct ArrowTable {
    batch: RecordBatch,
}

#[pymethods]
impl ArrowTable {
    /// The Arrow C stream of the table, as a capsule (Arrow `PyCapsule` interface).
    #[pyo3(signature = (requested_schema=None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        // The protocol lets a producer answer with its own schema.
        let _ = requested_schema;
        let schema = self.batch.schema();
        let reader = RecordBatchIterator::new([Ok(self.batch.clone())], schema);
        let stream = FFI_ArrowArrayStream::new(Box::new(reader));
        PyCapsule::new_with_value(py, stream, c"arrow_array_stream")
    }

    /// Number of rows.
    fn __len__(&self) -> usize {
        self.batch.num_rows()
    }
}

/// The `raw`, `cells` or `tidy` table of a run folder; `text` adds the printed text to `raw`.
///
/// Raises `RunDataError` naming file, line and field.
#[pyfunction]
pub fn run_table(py: Python<'_>, path: PathBuf, table: &str, text: bool) -> PyResult<ArrowTable> {
    if !["raw", "cells", "tidy"].contains(&table) {
        return Err(PyValueError::new_err(format!(
            "table: unknown '{table}'; known: raw, cells, tidy"
        )));
    }
    let batch = py
        .detach(|| {
            if table == "raw" {
                return tables::raw_batch(&[&path], text).map(|(batch, _)| batch);
            }
            let folded = tables::aggregate(&[path])?;
            if table == "cells" {
                folded.cells_batch()
            } else {
                folded.tidy_batch()
            }
        })
        .map_err(|e| RunDataError::new_err(e.to_string()))?;
    Ok(ArrowTable { batch })
}
