//! Where the elements of CPU tensors are, and slices of them, without copying.

use std::slice::from_raw_parts;

use dlmom_kernels::{Floats, Grid, Logits};
use half::{bf16, f16};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyTuple;

/// Logits of one forward, borrowed from a live tensor.
pub struct Borrowed {
    /// Keeps the memory alive for as long as `data` is read.
    _tensor: Py<PyAny>,
    data: Data,
    rows: usize,
    vocab: usize,
    /// Elements from one row to the next.
    stride: usize,
}

/// Where the first number is, and what it is.
#[derive(Clone, Copy)]
enum Data {
    F32(*const f32),
    Bf16(*const bf16),
    F16(*const f16),
}

impl Data {
    /// Numbers of a type.
    fn new(dtype: Dtype, address: usize) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32(address as *const f32)),
            Dtype::Bf16 => Some(Self::Bf16(address as *const bf16)),
            Dtype::F16 => Some(Self::F16(address as *const f16)),
            Dtype::Bool | Dtype::Other => None,
        }
    }

    /// `count` numbers from the `start`-th on.
    ///
    /// # Safety
    /// They have to be there, and nobody may write them, for as long as they are read.
    unsafe fn read<'a>(self, start: usize, count: usize) -> Floats<'a> {
        // SAFETY: the caller's.
        unsafe {
            match self {
                Self::F32(data) => Floats::F32(from_raw_parts(data.add(start), count)),
                Self::Bf16(data) => Floats::Bf16(from_raw_parts(data.add(start), count)),
                Self::F16(data) => Floats::F16(from_raw_parts(data.add(start), count)),
            }
        }
    }

    /// Whether values can be read there.
    fn is_readable(self) -> bool {
        match self {
            Self::F32(data) => !data.is_null() && data.is_aligned(),
            Self::Bf16(data) => !data.is_null() && data.is_aligned(),
            Self::F16(data) => !data.is_null() && data.is_aligned(),
        }
    }
}

/// Types of elements that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
    Bool,
    Other,
}

impl Dtype {
    /// The type that a tensor names. torch has one object for each: to compare those takes no string.
    fn of(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        static KNOWN: PyOnceLock<[(Dtype, Py<PyAny>); 4]> = PyOnceLock::new();
        let py = tensor.py();
        let known = KNOWN.get_or_try_init(py, || -> PyResult<_> {
            let torch = py.import("torch")?;
            let named = |dtype, name| Ok::<_, PyErr>((dtype, torch.getattr(name)?.unbind()));
            Ok([
                named(Self::F32, "float32")?,
                named(Self::Bf16, "bfloat16")?,
                named(Self::F16, "float16")?,
                named(Self::Bool, "bool")?,
            ])
        })?;
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        let found = known.iter().find(|(_, object)| dtype.is(object));
        Ok(found.map_or(Self::Other, |(dtype, _)| *dtype))
    }
}

/// Where a tensor's elements are.
pub struct Layout {
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
    pub dtype: Dtype,
    pub on_cpu: bool,
    pub address: usize,
}

impl Layout {
    /// Asks a tensor.
    pub fn of(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = tensor.py();
        let sizes = |value: Bound<'_, PyAny>| -> PyResult<Vec<usize>> {
            value
                .cast::<PyTuple>()?
                .iter()
                .map(|n| n.extract())
                .collect()
        };
        Ok(Self {
            shape: sizes(tensor.getattr(intern!(py, "shape"))?)?,
            strides: sizes(tensor.call_method0(intern!(py, "stride"))?)?,
            dtype: Dtype::of(tensor)?,
            on_cpu: tensor.getattr(intern!(py, "is_cpu"))?.extract()?,
            address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
        })
    }

    /// What it is, for the line that says why it was not taken.
    fn describe(&self, tensor: &Bound<'_, PyAny>) -> String {
        let text = |name: &str| {
            let found = tensor
                .getattr(name)
                .and_then(|value| Ok(value.str()?.to_string()));
            found.unwrap_or_else(|_| "?".into())
        };
        format!(
            "{} {:?} with strides {:?} on {}",
            text("dtype"),
            self.shape,
            self.strides,
            text("device")
        )
    }
}

// SAFETY: `data` points into the tensor that `_tensor` keeps alive; the engine hands its logits
// over and never writes them again, so shared reads from any thread are sound.
unsafe impl Sync for Borrowed {}
// SAFETY: as above; dropping `_tensor` off the interpreter's thread is deferred by PyO3.
unsafe impl Send for Borrowed {}

impl Borrowed {
    /// Borrows a CPU tensor of shape `[rows, vocab]`: float32, bfloat16 or float16, rows contiguous, one behind the
    /// other or further apart.
    pub fn new(tensor: &Bound<'_, PyAny>, rows: usize, vocab: usize) -> PyResult<Self> {
        let layout = Layout::of(tensor)?;
        let Layout { shape, strides, .. } = &layout;
        // The stride of a dimension of one element means nothing.
        let fits = shape[..] == [rows, vocab]
            && (vocab <= 1 || strides[1] == 1)
            && (rows <= 1 || strides[0] >= vocab);
        let data = Data::new(layout.dtype, layout.address);
        let (Some(data), true, true) = (data, fits, layout.on_cpu) else {
            return Err(PyTypeError::new_err(format!(
                "logits must be a CPU tensor of shape [{rows}, {vocab}], float32, bfloat16 or float16, with contiguous rows; got {}",
                layout.describe(tensor)
            )));
        };
        if rows * vocab > 0 && !data.is_readable() {
            return Err(PyTypeError::new_err("logits are not aligned to their type"));
        }
        Ok(Self {
            _tensor: tensor.clone().unbind(),
            data,
            rows,
            vocab,
            stride: if rows > 1 { strides[0] } else { vocab },
        })
    }

    /// The logits of one row.
    pub fn row(&self, index: usize) -> Option<Logits<'_>> {
        if index >= self.rows {
            return None;
        }
        if self.vocab == 0 {
            return Some(Logits::F32(&[]));
        }
        let start = index * self.stride;
        // SAFETY: `new` checked dtype, device, strides and alignment, and that the tensor holds `rows` rows of `vocab`
        // values, `stride` apart, from `data` on; `index < rows`.
        Some(unsafe { self.data.read(start, self.vocab) })
    }
}

/// The elements of a 4-dimensional CPU tensor.
///
/// # Errors
/// `TypeError` for other tensors, and where the elements of a position are not neighbours.
pub fn grid<'a>(tensor: &'a Bound<'_, PyAny>) -> PyResult<Grid<'a>> {
    let layout = Layout::of(tensor)?;
    let wrong = || {
        PyTypeError::new_err(format!(
            "attention needs CPU tensors of 4 dimensions, float32, bfloat16 or float16, with contiguous positions; got {}",
            layout.describe(tensor)
        ))
    };
    let shape: [usize; 4] = layout.shape[..].try_into().map_err(|_| wrong())?;
    let strides: [usize; 4] = layout.strides[..].try_into().map_err(|_| wrong())?;
    let data = Data::new(layout.dtype, layout.address).filter(|data| data.is_readable());
    let (Some(data), true, false) = (data, layout.on_cpu, shape.contains(&0)) else {
        return Err(wrong());
    };
    if shape[3] > 1 && strides[3] != 1 {
        return Err(wrong());
    }
    let last: usize = shape
        .iter()
        .zip(strides)
        .map(|(n, stride)| (n - 1) * stride)
        .sum();
    // SAFETY: a tensor's elements lie between its first and the one with the highest indices, which is `last` further on as no
    // stride is negative; the tensor outlives the grid, and the callers write nothing to it meanwhile.
    let data = unsafe { data.read(0, last + 1) };
    Ok(Grid {
        data,
        shape,
        strides: [strides[0], strides[1], strides[2]],
    })
}

/// Each row's visible positions of a mask `[rows, 1, 1, n]`; `None` where a row has none, or a gap between them.
///
/// # Errors
/// `TypeError` for anything but a bool CPU tensor of that shape, with contiguous rows.
pub fn ranges(mask: &Bound<'_, PyAny>) -> PyResult<Option<Vec<(usize, usize)>>> {
    let mask = Layout::of(mask)?;
    let ([rows, 1, 1, n], Dtype::Bool, true) = (&mask.shape[..], mask.dtype, mask.on_cpu) else {
        return Err(PyTypeError::new_err(
            "visible must be a bool tensor of shape [rows, 1, 1, n] on the CPU",
        ));
    };
    let (&rows, &n, step) = (rows, n, mask.strides[3]);
    if rows * n == 0 || mask.address == 0 || (n > 1 && step != 1) {
        return Err(PyTypeError::new_err(
            "visible must have contiguous rows of at least one position",
        ));
    }
    let mut found = Vec::with_capacity(rows);
    for row in 0..rows {
        let start = mask.address + row * mask.strides[0];
        // SAFETY: a row of a bool tensor is `n` bytes of 0 or 1, which the caller holds and does not write meanwhile.
        let seen = unsafe { from_raw_parts(start as *const u8, n) };
        let from = seen.iter().position(|&s| s != 0);
        let to = seen.iter().rposition(|&s| s != 0);
        let (Some(from), Some(to)) = (from, to) else {
            return Ok(None);
        };
        if seen[from..=to].contains(&0) {
            return Ok(None);
        }
        found.push((from, to + 1));
    }
    Ok(Some(found))
}
