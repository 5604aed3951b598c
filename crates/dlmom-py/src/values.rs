//! Packets, transcripts, the controller and consensus as Python values.

use std::str::FromStr;

use dlmom_core::{
    ConsensusSpec, ControllerSpec, Decision, Force, GateController, Request, RowReadout, Scratch,
    Stream, read_row,
};
use dlmom_packet::{
    BeliefPacket, Encoding, Meta, PacketReader, Transcript, decode_exact, encode as encode_packet,
};
use pyo3::exceptions::{PyIndexError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};
use serde_json::{Value, json};

use crate::backend::floats;
use crate::errors::{ConfigError, PacketError};

fn encoding(name: &str) -> PyResult<Encoding> {
    Encoding::from_str(name).map_err(|e| PacketError::new_err(e.to_string()))
}

/// A sparse next-token distribution: the `k` most probable token ids with their probabilities.
///
/// ``ids`` are distinct and below ``vocab``; ``probs`` are finite, not negative and sum to 1 within
/// rounding (they are renormalised). Entries are kept by probability descending, then id ascending.
/// ``mass`` in (0, 1] is the probability of these tokens before renormalising.
///
/// Raises :class:`PacketError` naming what is wrong. Source: DL-MoM paper, section 4.1; CIPHER
/// (arXiv 2310.06272).
#[pyclass(frozen, name = "BeliefPacket", module = "dlmom_rs", eq)]
#[derive(Clone, PartialEq)]
pub struct PyPacket {
    packet: BeliefPacket,
}

impl PyPacket {
    /// Wraps a checked packet.
    pub fn new(packet: BeliefPacket) -> Self {
        Self { packet }
    }
}

#[pymethods]
impl PyPacket {
    #[new]
    #[pyo3(signature = (ids, probs, *, vocab, mass=1.0))]
    fn create(ids: Vec<u32>, probs: Vec<f32>, vocab: u32, mass: f32) -> PyResult<Self> {
        BeliefPacket::new(ids, probs, mass, vocab)
            .map(Self::new)
            .map_err(|e| PacketError::new_err(e.to_string()))
    }

    /// Token ids, most probable first.
    #[getter]
    fn ids(&self) -> Vec<u32> {
        self.packet.ids().to_vec()
    }

    /// Their probabilities, f32 values, summing to 1.
    #[getter]
    fn probs(&self) -> Vec<f32> {
        self.packet.probs().to_vec()
    }

    /// Probability of these tokens before renormalising, in (0, 1].
    #[getter]
    fn mass(&self) -> f32 {
        self.packet.mass()
    }

    /// Number of tokens that the ids index.
    #[getter]
    fn vocab(&self) -> u32 {
        self.packet.vocab()
    }

    /// Number of entries.
    #[getter]
    fn k(&self) -> usize {
        self.packet.k()
    }

    /// Entropy of the packet in nats.
    fn entropy(&self) -> f64 {
        -self
            .packet
            .probs()
            .iter()
            .map(|&p| f64::from(p))
            .filter(|p| *p > 0.0)
            .map(|p| p * p.ln())
            .sum::<f64>()
            + 0.0
    }

    /// The packet in the wire format; ``encoding`` is ``f32``, ``f16``, ``bf16`` or ``compact``.
    ///
    /// ``fingerprint`` names the vocabulary (64 bits), ``step`` the step of the sample.
    #[pyo3(signature = (encoding="f32", *, fingerprint=0, step=0))]
    fn to_bytes<'py>(
        &self,
        py: Python<'py>,
        encoding: &str,
        fingerprint: u64,
        step: u32,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let meta = Meta { fingerprint, step };
        encode_packet(&self.packet, meta, self::encoding(encoding)?)
            .map(|bytes| PyBytes::new(py, &bytes))
            .map_err(|e| PacketError::new_err(e.to_string()))
    }

    /// The packet that ``data`` is, in any encoding. Raises :class:`PacketError`, naming the offset.
    #[classmethod]
    fn from_bytes(_: &Bound<'_, PyType>, data: &[u8]) -> PyResult<Self> {
        decode_exact(data)
            .map(|decoded| Self::new(decoded.packet))
            .map_err(|e| PacketError::new_err(e.to_string()))
    }

    /// The packets written one after another in ``data``, each as ``(step, packet)``.
    #[staticmethod]
    fn read_all(data: &[u8]) -> PyResult<Vec<(u32, PyPacket)>> {
        PacketReader::new(data)
            .map(|item| item.map(|d| (d.meta.step, Self::new(d.packet))))
            .collect::<Result<_, _>>()
            .map_err(|e| PacketError::new_err(e.to_string()))
    }

    /// Copies and pickles are the packet's exact bytes.
    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let read = py.get_type::<Self>().getattr("from_bytes")?;
        Ok((read, (self.to_bytes(py, "f32", 0, 0)?,)))
    }

    fn __len__(&self) -> usize {
        self.packet.k()
    }

    fn __repr__(&self) -> String {
        let (id, p) = self.packet.top();
        format!(
            "BeliefPacket(k={}, vocab={}, mass={:.4}, top=({id}, {p:.4}))",
            self.packet.k(),
            self.packet.vocab(),
            self.packet.mass()
        )
    }

    fn __hash__(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        self.packet.ids().hash(&mut hasher);
        for p in self.packet.probs() {
            p.to_bits().hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// The packets of a latent span in order, each with its step: what a handoff transmits.
///
/// All packets index one vocabulary and steps ascend. Raises :class:`PacketError`.
#[pyclass(frozen, name = "Transcript", module = "dlmom_rs", eq)]
#[derive(Clone, PartialEq)]
pub struct PyTranscript {
    transcript: Transcript,
}

#[pymethods]
impl PyTranscript {
    #[new]
    #[pyo3(signature = (packets, *, vocab, fingerprint=0))]
    fn create(
        packets: Vec<(u32, PyRef<'_, PyPacket>)>,
        vocab: u32,
        fingerprint: u64,
    ) -> PyResult<Self> {
        let wrong = |e: dlmom_packet::TranscriptError| PacketError::new_err(e.to_string());
        let mut transcript = Transcript::new(vocab, fingerprint).map_err(wrong)?;
        for (step, packet) in packets {
            transcript
                .push(step, packet.packet.clone())
                .map_err(wrong)?;
        }
        Ok(Self { transcript })
    }

    /// Steps of the packets, ascending.
    #[getter]
    fn steps(&self) -> Vec<u32> {
        self.transcript.steps().to_vec()
    }

    /// The packets, in order.
    #[getter]
    fn packets(&self) -> Vec<PyPacket> {
        self.transcript
            .packets()
            .iter()
            .cloned()
            .map(PyPacket::new)
            .collect()
    }

    /// Number of tokens that the ids index.
    #[getter]
    fn vocab(&self) -> u32 {
        self.transcript.vocab()
    }

    /// Fingerprint of the vocabulary.
    #[getter]
    fn fingerprint(&self) -> u64 {
        self.transcript.fingerprint()
    }

    /// The transcript in the wire format; see :meth:`BeliefPacket.to_bytes`.
    #[pyo3(signature = (encoding="f32"))]
    fn to_bytes<'py>(&self, py: Python<'py>, encoding: &str) -> PyResult<Bound<'py, PyBytes>> {
        self.transcript
            .encode(self::encoding(encoding)?)
            .map(|bytes| PyBytes::new(py, &bytes))
            .map_err(|e| PacketError::new_err(e.to_string()))
    }

    /// The transcript that ``data`` is. Raises :class:`PacketError`, naming the offset.
    #[classmethod]
    fn from_bytes(_: &Bound<'_, PyType>, data: &[u8]) -> PyResult<Self> {
        Transcript::decode_exact(data)
            .map(|transcript| Self { transcript })
            .map_err(|e| PacketError::new_err(e.to_string()))
    }

    /// Copies and pickles are the transcript's exact bytes.
    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let read = py.get_type::<Self>().getattr("from_bytes")?;
        Ok((read, (self.to_bytes(py, "f32")?,)))
    }

    fn __len__(&self) -> usize {
        self.transcript.len()
    }

    fn __getitem__(&self, index: isize) -> PyResult<(u32, PyPacket)> {
        let at = if index < 0 {
            self.transcript.len().checked_sub(index.unsigned_abs())
        } else {
            usize::try_from(index).ok()
        };
        at.and_then(|at| {
            let packet = self.transcript.packets().get(at)?;
            Some((self.transcript.steps()[at], PyPacket::new(packet.clone())))
        })
        .ok_or_else(|| PyIndexError::new_err("transcript index out of range"))
    }

    fn __repr__(&self) -> String {
        format!(
            "Transcript({} packets, vocab={})",
            self.transcript.len(),
            self.transcript.vocab()
        )
    }
}

/// What a controller decided at one step.
#[pyclass(frozen, name = "Decision", module = "dlmom_rs", eq, get_all)]
#[derive(Clone, PartialEq)]
pub struct PyDecision {
    /// ``latent`` or ``explicit``: the mode of the next step.
    mode: &'static str,
    /// Whether it differs from the decision before; never true for the first.
    switched: bool,
    /// Why, one of the names recorded in traces.
    reason: &'static str,
}

#[pymethods]
impl PyDecision {
    fn __repr__(&self) -> String {
        format!(
            "Decision(mode='{}', switched={}, reason='{}')",
            self.mode,
            if self.switched { "True" } else { "False" },
            self.reason
        )
    }
}

impl From<Decision> for PyDecision {
    fn from(decision: Decision) -> Self {
        Self {
            mode: decision.mode.as_str(),
            switched: decision.switched,
            reason: decision.reason.as_str(),
        }
    }
}

fn controller_spec(json: &str) -> PyResult<ControllerSpec> {
    let wrong = |e: serde_json::Error| ConfigError::new_err(format!("controller: {e}"));
    let mut merged = serde_json::to_value(ControllerSpec::default()).map_err(wrong)?;
    let given: Value = serde_json::from_str(json).map_err(wrong)?;
    if let (Value::Object(merged), Value::Object(given)) = (&mut merged, given) {
        merged.extend(given);
    }
    serde_json::from_value(merged).map_err(wrong)
}

/// The mode controller of one sample, fed one entropy a step. Private: see ``dlmom_rs.Controller``.
#[pyclass(frozen, name = "ControllerCore", module = "dlmom_rs._core")]
pub struct PyController {
    spec: ControllerSpec,
    state: std::sync::Mutex<GateController>,
}

#[pymethods]
impl PyController {
    /// `spec` is a JSON object of controller knobs; those it leaves out have the reference pipeline's values.
    #[new]
    fn new(spec: &str) -> PyResult<Self> {
        let spec = controller_spec(spec)?;
        let state = GateController::new(&spec)
            .map_err(|e| ConfigError::new_err(format!("controller: {e}")))?;
        Ok(Self {
            spec,
            state: std::sync::Mutex::new(state),
        })
    }

    /// Decides the mode of the next step; `force` is None, `eos_certain`, `answer_reserve`, `locked` or `terminated`.
    #[pyo3(signature = (entropy, force=None))]
    fn observe(&self, entropy: f64, force: Option<&str>) -> PyResult<PyDecision> {
        if !entropy.is_finite() {
            return Err(PyValueError::new_err(format!(
                "entropy is {entropy}; it must be finite"
            )));
        }
        let known = [
            Force::EosCertain,
            Force::AnswerReserve,
            Force::Locked,
            Force::Terminated,
        ];
        let force = match force {
            None => None,
            Some(word) => match known.into_iter().find(|f| f.reason().as_str() == word) {
                Some(force) => Some(force),
                None => {
                    return Err(PyValueError::new_err(format!(
                        "force is {word:?}; it must be None, 'eos_certain', 'answer_reserve', 'locked' or 'terminated'"
                    )));
                }
            },
        };
        Ok(self.locked()?.observe(entropy, force).into())
    }

    /// The decisions of a fresh controller over `entropies`, whatever this one has seen.
    fn replay(&self, entropies: Vec<f64>) -> PyResult<Vec<PyDecision>> {
        let mut fresh = GateController::new(&self.spec)
            .map_err(|e| ConfigError::new_err(format!("controller: {e}")))?;
        entropies
            .into_iter()
            .enumerate()
            .map(|(step, entropy)| {
                if entropy.is_finite() {
                    Ok(fresh.observe(entropy, None).into())
                } else {
                    Err(PyValueError::new_err(format!(
                        "entropies[{step}] is {entropy}; it must be finite"
                    )))
                }
            })
            .collect()
    }

    /// Changes of mode so far.
    #[getter]
    fn switches(&self) -> PyResult<u32> {
        Ok(self.locked()?.switches())
    }

    /// Latent decisions so far.
    #[getter]
    fn latent_steps(&self) -> PyResult<u32> {
        Ok(self.locked()?.latent_steps())
    }

    /// The mode of the last decision, None before the first.
    #[getter]
    fn mode(&self) -> PyResult<Option<&'static str>> {
        Ok(self.locked()?.mode().map(dlmom_core::Mode::as_str))
    }

    /// The knobs as JSON, defaults filled in.
    #[getter]
    fn spec(&self) -> String {
        json!(self.spec).to_string()
    }
}

impl PyController {
    fn locked(&self) -> PyResult<std::sync::MutexGuard<'_, GateController>> {
        self.state
            .lock()
            .map_err(|_| PyValueError::new_err("the controller failed earlier"))
    }
}

/// Merges K rows of logits, `K * vocab` f32 values little-endian, and answers with `vocab` of them:
/// the merged preferences, and the K entropies and the merged one in nats. Operators that draw do so
/// from `seed`.
#[pyfunction]
pub fn consensus_core<'py>(
    py: Python<'py>,
    logits: &[u8],
    vocab: usize,
    spec: &str,
    seed: u64,
) -> PyResult<(Bound<'py, PyBytes>, Vec<f64>, f64)> {
    let spec: ConsensusSpec =
        serde_json::from_str(spec).map_err(|e| ConfigError::new_err(format!("consensus: {e}")))?;
    let wrong = |e: String| ConfigError::new_err(format!("consensus: {e}"));
    if spec.needs_pilot() {
        return Err(wrong(
            "what a pilot fits (weights: pilot, calibrate: temperature) has to be given as numbers"
                .into(),
        ));
    }
    let values = floats(logits);
    if vocab == 0 || values.is_empty() || !values.len().is_multiple_of(vocab) {
        return Err(PyTypeError::new_err(format!(
            "{} values are no rows of {vocab}",
            values.len()
        )));
    }
    spec.validate(Some(values.len() / vocab))
        .map_err(|e| wrong(e.to_string()))?;
    let (merged, entropies, entropy) = py.detach(|| {
        let rows: Vec<&[f32]> = values.chunks_exact(vocab).collect();
        let mut out = RowReadout::default();
        let mut scratch = Scratch::default();
        let request = Request {
            stream: Some(Stream {
                seed,
                sample: 0,
                step: 0,
            }),
            ..Request::default()
        };
        read_row(&rows, &spec, &request, &mut scratch, &mut out);
        let merged = if out.finite.iter().all(|f| *f) {
            scratch.preferences().to_vec()
        } else {
            Vec::new()
        };
        (
            (merged, out.finite.clone()),
            out.entropies,
            out.merged_entropy,
        )
    });
    let (merged, finite) = merged;
    if let Some(bad) = finite.iter().position(|f| !f) {
        return Err(PyValueError::new_err(format!(
            "logits of expert {bad} hold NaN or Inf"
        )));
    }
    let bytes: Vec<u8> = merged.iter().flat_map(|x| x.to_le_bytes()).collect();
    Ok((PyBytes::new(py, &bytes), entropies, entropy))
}
