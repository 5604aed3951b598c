//! [`Backend`] over the Python engine: packs feeds into byte buffers, borrows logits without copying.

use dlmom_packet::BeliefPacket;
use dlmom_runtime::{
    AgentId, Align, Assembler, Backend, BackendError, Embeddings, EnsembleInfo, Feed, LaneId,
    LaneSpec, Logits, MemoryStats, ModelId, ModelInfo, Payload, PromptSource, ReadRow, Readout,
    Row, SlotId, check_rows,
};
use pyo3::exceptions::{
    PyKeyboardInterrupt, PyMemoryError, PyRuntimeError, PySystemExit, PyTypeError, PyValueError,
};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyList, PyTuple};

use crate::reads::{Answer, Read, plan};
use crate::tensors::Borrowed;

/// The Python engine behind the boundary.
pub struct PyBackend {
    engine: Py<PyAny>,
    info: EnsembleInfo,
    assembler: Assembler,
    /// Whether the engine reads plain rows where their logits are.
    reads: bool,
    /// Readouts of the other rows, where it does.
    others: Readout,
}

/// Each agent's logits on the host, of its steps and of its spans.
type Outputs = Vec<[Option<Borrowed>; 2]>;

/// One agent's share of a call.
#[derive(Default)]
struct Call {
    /// `(row, positions)` of rows that take in several positions, in order.
    spans: Vec<usize>,
    /// Rows that take in exactly one position, in order.
    steps: Vec<usize>,
    /// How many of the steps, and of the spans, have their logits come to the host.
    leaving: [usize; 2],
    /// Packed buffers, filled before the interpreter is entered.
    span_feeds: Vec<Packed>,
    step_slots: Vec<u32>,
    step_feed: Packed,
    /// Rows of the step that take in something other than a packet.
    step_payloads: [Values; 2],
    /// Slots whose last hidden states are kept.
    hidden: Vec<u32>,
}

/// Kinds of payload, in the order of [`Call::step_payloads`].
const KINDS: [&str; 2] = ["embed", "dense"];

/// Payloads of one kind: which rows of the step, and their values one after another, f32 little-endian.
#[derive(Default)]
struct Values {
    rows: Vec<usize>,
    bytes: Vec<u8>,
}

/// Row-major `[positions, k]` ids (i64, which is what tables are indexed by) and probabilities (f32), little-endian.
#[derive(Default)]
struct Packed {
    ids: Vec<u8>,
    probs: Vec<u8>,
    positions: usize,
    k: usize,
    /// Of a span that is no packets: the kind and the values; ids and probabilities are empty then.
    payload: Option<(usize, Vec<u8>)>,
}

/// The kind of a payload and its values as bytes.
fn payload_bytes(payload: &Payload) -> (usize, Vec<u8>) {
    let (kind, values) = match payload {
        Payload::Embed { values, .. } => (0, values),
        Payload::Dense { probs, .. } => (1, probs),
    };
    (kind, values.iter().flat_map(|x| x.to_le_bytes()).collect())
}

impl Packed {
    fn push(&mut self, entries: impl Iterator<Item = (u32, f32)>) {
        let mut last = 0;
        let mut count = 0;
        for (id, p) in entries.take(self.k) {
            self.ids.extend_from_slice(&i64::from(id).to_le_bytes());
            self.probs.extend_from_slice(&p.to_le_bytes());
            last = id;
            count += 1;
        }
        // Padding repeats a valid id at probability 0, so that a gather stays in range.
        for _ in count..self.k {
            self.ids.extend_from_slice(&i64::from(last).to_le_bytes());
            self.probs.extend_from_slice(&0.0_f32.to_le_bytes());
        }
        self.positions += 1;
    }
}

fn width(feed: &Feed<'_>) -> usize {
    match feed {
        Feed::Packets(packets) => packets.iter().map(BeliefPacket::k).max().unwrap_or(1),
        _ => 1,
    }
}

fn pack(feed: &Feed<'_>, into: &mut Packed) -> Result<(), BackendError> {
    match feed {
        Feed::Tokens(ids) => ids
            .iter()
            .for_each(|&id| into.push(std::iter::once((id, 1.0)))),
        Feed::Packets(packets) => {
            for packet in *packets {
                let entries = packet
                    .ids()
                    .iter()
                    .copied()
                    .zip(packet.probs().iter().copied());
                into.push(entries);
            }
        }
        Feed::Payload(payload) => {
            into.payload = Some(payload_bytes(payload));
            into.positions = feed.positions();
        }
        Feed::Hidden { .. } => {
            return Err(BackendError::Invalid(
                "a hidden state must be read before it is packed".into(),
            ));
        }
    }
    Ok(())
}

/// Sorts a Python exception into what the loop distinguishes; the exception itself travels along.
pub fn backend_error(py: Python<'_>, error: PyErr, context: impl Into<String>) -> BackendError {
    if error.is_instance_of::<PyKeyboardInterrupt>(py) || error.is_instance_of::<PySystemExit>(py) {
        return BackendError::Cancelled(Some(Box::new(error)));
    }
    BackendError::Failed {
        context: context.into(),
        source: Box::new(error),
    }
}

/// Lets the loop see, at its next look, an interrupt that arrived in a call which has no failures.
pub fn interrupt_again(py: Python<'_>, error: &PyErr) {
    if error.is_instance_of::<PyKeyboardInterrupt>(py) {
        // SAFETY: it sets the flag of a signal; any thread may, at any time.
        unsafe { pyo3::ffi::PyErr_SetInterrupt() };
    }
}

fn text<'py, T: FromPyObjectOwned<'py>>(dict: &Bound<'py, PyDict>, key: &str) -> PyResult<T> {
    dict.get_item(key)?
        .ok_or_else(|| PyValueError::new_err(format!("engine info lacks '{key}'")))?
        .extract()
        .map_err(Into::into)
}

/// What the engine loaded, and whether it reads plain rows where their logits are.
fn read_info(engine: &Bound<'_, PyAny>) -> PyResult<(EnsembleInfo, bool)> {
    let info = engine.call_method0("info")?;
    let info = info.cast::<PyDict>()?;
    let mut models = Vec::new();
    let list: Bound<'_, PyAny> = text(info, "models")?;
    for model in list.try_iter()? {
        let model = model?;
        let model = model.cast::<PyDict>()?;
        let roles: Bound<'_, PyAny> = text(model, "roles")?;
        let roles = roles.cast::<PyDict>()?;
        let token_bytes: Bound<'_, PyAny> = text(model, "token_bytes")?;
        let token_bytes = token_bytes
            .try_iter()?
            .map(|piece| piece?.extract::<Vec<u8>>())
            .collect::<PyResult<Vec<_>>>()?;
        models.push(ModelInfo {
            name: text(model, "name")?,
            source: text(model, "source")?,
            revision: text(model, "revision")?,
            weights_sha256: text(model, "weights_sha256")?,
            architecture: text(model, "architecture")?,
            parameters: text(model, "parameters")?,
            vocab: text(model, "vocab")?,
            rows: text(model, "rows")?,
            hidden: text(model, "hidden")?,
            context: text(model, "context")?,
            fingerprint: text(model, "fingerprint")?,
            token_bytes,
            eos: text(roles, "eos")?,
            dtype: text(model, "dtype")?,
            path: text(model, "path")?,
            path_reason: text(model, "path_reason")?,
            attention: text(model, "attention")?,
            kv_bytes_per_position: text(model, "kv_bytes_per_position")?,
        });
    }
    let agents: Vec<u32> = text(info, "agents")?;
    let info = EnsembleInfo {
        models,
        agents: agents.into_iter().map(ModelId).collect(),
        slots: text(info, "slots")?,
        max_len: text(info, "max_len")?,
        device: text(info, "device")?,
        threads: text(info, "threads")?,
        bit_invariant: text(info, "bit_invariant")?,
        bit_invariance_reason: text(info, "bit_invariance_reason")?,
        fixed_length: text(info, "fixed_length")?,
        consensus_kernel: text(info, "consensus_kernel")?,
        graphs: text(info, "graphs")?,
    };
    let reads = info.consensus_kernel != "rust";
    Ok((info, reads))
}

/// Little-endian f32 values; a rest of fewer than 4 bytes is dropped.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

fn lane_tuple(lane: LaneId) -> (u32, u32) {
    (lane.slot.0, lane.agent.0)
}

impl PyBackend {
    /// Wraps a loaded `dlmom_rs.engine.backend.Engine`.
    pub fn new(engine: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (info, reads) = read_info(engine)?;
        let assembler = Assembler::new(info.threads as usize)
            .map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
        Ok(Self {
            info,
            engine: engine.clone().unbind(),
            assembler,
            reads,
            others: Readout::default(),
        })
    }

    /// Calls `advance` of the engine with every agent that moves; what it answers, and to the reads, where there are any.
    fn forward<'py>(
        &self,
        py: Python<'py>,
        calls: &[Call],
        reads: &[Read<'_>],
        rows: &[Row<'_>],
    ) -> PyResult<Bound<'py, PyAny>> {
        let list = PyList::empty(py);
        for (agent, call) in calls.iter().enumerate() {
            if call.spans.is_empty() && call.steps.is_empty() {
                continue;
            }
            let spans = PyList::empty(py);
            for (slot, packed) in call.step_slots_of_spans().zip(&call.span_feeds) {
                spans.append((
                    slot,
                    PyByteArray::new(py, &packed.ids),
                    PyByteArray::new(py, &packed.probs),
                    packed.positions,
                    packed.k,
                    packed
                        .payload
                        .as_ref()
                        .map(|(kind, bytes)| (KINDS[*kind], PyByteArray::new(py, bytes))),
                ))?;
            }
            let step = if call.steps.is_empty() {
                None
            } else {
                let payloads = PyList::empty(py);
                for (kind, values) in KINDS.iter().zip(&call.step_payloads) {
                    if !values.rows.is_empty() {
                        payloads.append((
                            *kind,
                            values.rows.clone(),
                            PyByteArray::new(py, &values.bytes),
                        ))?;
                    }
                }
                Some((
                    call.step_slots[call.spans.len()..].to_vec(),
                    PyByteArray::new(py, &call.step_feed.ids),
                    PyByteArray::new(py, &call.step_feed.probs),
                    call.step_feed.k,
                    payloads,
                ))
            };
            list.append((agent, spans, step, call.hidden.clone()))?;
        }
        let engine = self.engine.bind(py);
        if reads.is_empty() {
            return engine.call_method1(intern!(py, "advance"), (list,));
        }
        let raw = PyList::empty(py);
        for read in reads {
            read.append_to(&raw, &self.info, rows)?;
        }
        engine.call_method1(intern!(py, "advance"), (list, raw))
    }

    /// Takes the engine's answer apart: each agent's logits, and what was read.
    fn outputs(
        &self,
        answer: &Bound<'_, PyAny>,
        calls: &[Call],
        reads: &[Read<'_>],
    ) -> PyResult<(Outputs, Vec<Answer>)> {
        if reads.is_empty() {
            return Ok((self.borrow_logits(answer, calls)?, Vec::new()));
        }
        let (logits, raw): (Bound<'_, PyAny>, Vec<Bound<'_, PyAny>>) = answer.extract()?;
        if raw.len() != reads.len() {
            return Err(PyTypeError::new_err(format!(
                "advance must answer {} reads, not {}",
                reads.len(),
                raw.len()
            )));
        }
        let answers = reads.iter().zip(&raw).map(|(read, raw)| read.answer(raw));
        Ok((
            self.borrow_logits(&logits, calls)?,
            answers.collect::<PyResult<_>>()?,
        ))
    }

    /// Borrows each agent's step and span logits from the engine's answer.
    fn borrow_logits(&self, answer: &Bound<'_, PyAny>, calls: &[Call]) -> PyResult<Outputs> {
        let mut out: Outputs = calls.iter().map(|_| [None, None]).collect();
        let moved = (0..calls.len())
            .filter(|&agent| !calls[agent].spans.is_empty() || !calls[agent].steps.is_empty());
        let mut answers = answer.try_iter()?;
        for agent in moved {
            let item = answers.next().ok_or_else(|| {
                PyTypeError::new_err(
                    "advance must answer with one pair for every agent it was given",
                )
            })??;
            let pair = item.cast::<PyTuple>()?;
            let vocab = self
                .info
                .model_of(AgentId(agent as u32))
                .map_or(0, |m| m.vocab as usize);
            let [steps, spans] = calls[agent].leaving;
            let borrow = |at: usize, rows: usize| -> PyResult<Option<Borrowed>> {
                if rows == 0 {
                    return Ok(None);
                }
                Borrowed::new(&pair.get_item(at)?, rows, vocab).map(Some)
            };
            out[agent] = [borrow(1, steps)?, borrow(0, spans)?];
        }
        Ok(out)
    }
}

impl Call {
    fn step_slots_of_spans(&self) -> impl Iterator<Item = u32> + '_ {
        self.step_slots[..self.spans.len()].iter().copied()
    }
}

impl Backend for PyBackend {
    fn info(&self) -> &EnsembleInfo {
        &self.info
    }

    fn encode(&mut self, model: ModelId, source: &PromptSource) -> Result<Vec<u32>, BackendError> {
        Python::attach(|py| {
            let call = || -> PyResult<Vec<u32>> {
                let dict = PyDict::new(py);
                match source {
                    PromptSource::Chat { messages } => {
                        dict.set_item("kind", "chat")?;
                        let list = PyList::empty(py);
                        for message in messages {
                            let entry = PyDict::new(py);
                            entry.set_item("role", &message.role)?;
                            entry.set_item("content", &message.content)?;
                            list.append(entry)?;
                        }
                        dict.set_item("messages", list)?;
                    }
                    PromptSource::Text { text } => {
                        dict.set_item("kind", "text")?;
                        dict.set_item("text", text)?;
                    }
                    PromptSource::Tokens { ids } => {
                        dict.set_item("kind", "tokens")?;
                        dict.set_item("ids", ids)?;
                    }
                }
                self.engine
                    .bind(py)
                    .call_method1("encode", (model.0, dict))?
                    .extract()
            };
            call().map_err(|error| {
                if error.is_instance_of::<PyValueError>(py) {
                    BackendError::Invalid(error.value(py).to_string())
                } else {
                    backend_error(py, error, "tokenisation")
                }
            })
        })
    }

    fn reserve(&mut self, slots: u32, max_len: u32) -> Result<(), BackendError> {
        Python::attach(|py| {
            let engine = self.engine.bind(py);
            engine
                .call_method1("reserve", (slots, max_len))
                .map_err(|error| {
                    if error.is_instance_of::<PyValueError>(py) {
                        BackendError::Invalid(error.value(py).to_string())
                    } else if error.is_instance_of::<PyMemoryError>(py) {
                        backend_error(py, error, "out of memory")
                    } else {
                        backend_error(py, error, "reserving KV caches")
                    }
                })?;
            (self.info, self.reads) =
                read_info(engine).map_err(|e| backend_error(py, e, "reading engine info"))?;
            Ok(())
        })
    }

    fn open(&mut self, lanes: &[LaneSpec]) -> Result<(), BackendError> {
        Python::attach(|py| {
            let specs: Vec<(u32, u32, u32)> = lanes
                .iter()
                .map(|s| (s.lane.slot.0, s.lane.agent.0, s.max_len))
                .collect();
            match self.engine.bind(py).call_method1("open", (specs,)) {
                Ok(_) => Ok(()),
                Err(error) => Err(backend_error(py, error, "opening lanes")),
            }
        })
    }

    fn advance(&mut self, rows: &[Row<'_>], out: &mut Readout) -> Result<(), BackendError> {
        check_rows(&self.info, rows)?;
        let states = self.states(rows)?;
        let resolved = resolve(rows, &states);
        let reads = if self.reads {
            plan(&self.info, rows)
        } else {
            Vec::new()
        };
        let mut stays = vec![false; rows.len()];
        for &index in reads.iter().flat_map(|read| &read.rows) {
            stays[index] = true;
        }
        let agents = self.info.agents.len();
        let (calls, places) = pack_calls(rows, &resolved, &stays, agents)?;
        let context = || {
            format!(
                "{} rows of {agents} agents could not be advanced",
                rows.len()
            )
        };
        let (outputs, answers) = Python::attach(|py| {
            let answer = self
                .forward(py, &calls, &reads, rows)
                .map_err(|error| backend_error(py, error, context()))?;
            self.outputs(&answer, &calls, &reads).map_err(|error| {
                let error = backend_error(py, error, context());
                // The lanes have moved; an answer that cannot be used takes them back.
                self.take_back(rows).err().unwrap_or(error)
            })
        })?;
        let find = |row: usize, agent: AgentId| {
            let (span, at) = places[row][agent.index()]?;
            outputs[agent.index()][usize::from(span)].as_ref()?.row(at)
        };
        let result = if reads.is_empty() {
            self.assembler.assemble(&self.info, rows, &find, out)
        } else {
            self.assemble_others(rows, &stays, &find, out)
        };
        for (read, answer) in reads.iter().zip(&answers) {
            for (at, &index) in read.rows.iter().enumerate() {
                answer.fill(at, &rows[index], &mut out.rows[index].read);
            }
        }
        if result.is_err() {
            self.take_back(rows)?;
        }
        result
    }

    fn embed(
        &mut self,
        model: ModelId,
        packets: &[BeliefPacket],
    ) -> Result<Embeddings, BackendError> {
        let feed = Feed::Packets(packets);
        let mut packed = Packed {
            k: width(&feed),
            ..Packed::default()
        };
        pack(&feed, &mut packed)?;
        Python::attach(|py| {
            let call = || -> PyResult<Embeddings> {
                let answer = self.engine.bind(py).call_method1(
                    "embed_packets",
                    (
                        model.0,
                        PyByteArray::new(py, &packed.ids),
                        PyByteArray::new(py, &packed.probs),
                        packed.positions,
                        packed.k,
                    ),
                )?;
                let (bytes, hidden): (Bound<'_, PyBytes>, u32) = answer.extract()?;
                Ok(Embeddings {
                    values: floats(bytes.as_bytes()),
                    hidden,
                })
            };
            call().map_err(|error| backend_error(py, error, "mixture embeddings"))
        })
    }

    fn hidden(&mut self, lanes: &[LaneId], align: Align) -> Result<Embeddings, BackendError> {
        let lanes: Vec<(u32, u32)> = lanes.iter().map(|&lane| lane_tuple(lane)).collect();
        Python::attach(|py| {
            let call = || -> PyResult<Embeddings> {
                let answer = self
                    .engine
                    .bind(py)
                    .call_method1("hidden", (lanes, align == Align::Ridge))?;
                let (bytes, hidden): (Bound<'_, PyBytes>, u32) = answer.extract()?;
                Ok(Embeddings {
                    values: floats(bytes.as_bytes()),
                    hidden,
                })
            };
            call().map_err(|error| {
                if error.is_instance_of::<PyValueError>(py) {
                    BackendError::Invalid(error.value(py).to_string())
                } else {
                    backend_error(py, error, "hidden states")
                }
            })
        })
    }

    fn compress(&mut self, lanes: &[LaneId]) -> Result<(), BackendError> {
        let lanes: Vec<(u32, u32)> = lanes.iter().map(|&lane| lane_tuple(lane)).collect();
        // Whatever the user's compressor raises comes through as itself, a ValueError too.
        Python::attach(|py| {
            self.engine
                .bind(py)
                .call_method1("compress", (lanes,))
                .map(|_| ())
                .map_err(|error| backend_error(py, error, "KV compressor"))
        })
    }

    fn fork(&mut self, from: LaneId, to: LaneId, upto: Option<u32>) -> Result<(), BackendError> {
        self.call("fork", |py, engine| {
            engine.call_method1("fork", (lane_tuple(from), lane_tuple(to), upto))?;
            let _ = py;
            Ok(())
        })
    }

    fn truncate(&mut self, lane: LaneId, len: u32) -> Result<(), BackendError> {
        self.call("truncate", |_, engine| {
            engine.call_method1("truncate", (lane_tuple(lane), len))?;
            Ok(())
        })
    }

    fn close(&mut self, slots: &[SlotId]) {
        // Teardown is best effort: a failure here must not hide the error that led to it.
        let _ = Python::try_attach(|py| {
            let slots: Vec<u32> = slots.iter().map(|s| s.0).collect();
            let closed = self.engine.bind(py).call_method1("close", (slots,));
            if let Err(error) = closed {
                interrupt_again(py, &error);
            }
        });
    }

    fn memory(&self) -> MemoryStats {
        let read = |py: Python<'_>| -> PyResult<MemoryStats> {
            let answer = self.engine.bind(py).call_method0("memory")?;
            let dict = answer.cast::<PyDict>()?;
            let device: u64 = text(dict, "peak_device_bytes")?;
            Ok(MemoryStats {
                kv_bytes: text(dict, "kv_bytes")?,
                peak_device_bytes: (device > 0).then_some(device),
                peak_rss_bytes: Some(text(dict, "peak_rss_bytes")?),
                copied_positions: text(dict, "copied_positions")?,
            })
        };
        Python::attach(|py| {
            read(py).unwrap_or_else(|error| {
                interrupt_again(py, &error);
                MemoryStats::default()
            })
        })
    }
}

/// Embeddings that stand in for the hidden states a call names: row, place in its feeds, payload.
type States = Vec<(usize, usize, Payload)>;

/// The feeds of rows that name hidden states, with the embeddings in their place.
fn resolve<'a>(rows: &[Row<'a>], states: &'a States) -> Vec<Option<Vec<(AgentId, Feed<'a>)>>> {
    let mut resolved: Vec<Option<Vec<(AgentId, Feed<'a>)>>> = vec![None; rows.len()];
    for (row, place, payload) in states {
        let feeds = resolved[*row].get_or_insert_with(|| rows[*row].feeds.to_vec());
        feeds[*place].1 = Feed::Payload(payload);
    }
    resolved
}

/// For each row and agent: which of the agent's outputs holds its logits, the one of spans or of steps, and where in it;
/// `None` where they stay on the device.
type Places = Vec<Vec<Option<(bool, usize)>>>;

/// Sorts what rows feed into one call for each agent.
fn pack_calls(
    rows: &[Row<'_>],
    resolved: &[Option<Vec<(AgentId, Feed<'_>)>>],
    stays: &[bool],
    agents: usize,
) -> Result<(Vec<Call>, Places), BackendError> {
    let feeds_of = |index: usize| -> &[(AgentId, Feed<'_>)] {
        resolved[index].as_deref().unwrap_or(rows[index].feeds)
    };
    let mut calls: Vec<Call> = (0..agents).map(|_| Call::default()).collect();
    let mut places: Places = vec![vec![None; agents]; rows.len()];
    for (index, row) in rows.iter().enumerate() {
        if row.merge.is_empty() {
            return Err(BackendError::Invalid(format!(
                "slot {} merges no agent",
                row.slot
            )));
        }
        if row
            .want
            .versus
            .is_some_and(|other| !rows.iter().any(|r| r.slot == other))
        {
            return Err(BackendError::Invalid(format!(
                "slot {}: the slot to compare with is not in this call",
                row.slot
            )));
        }
        for (agent, feed) in feeds_of(index) {
            if feed.positions() == 1 {
                let call = &mut calls[agent.index()];
                call.step_feed.k = call.step_feed.k.max(width(feed));
            }
        }
    }
    for (index, row) in rows.iter().enumerate() {
        for (agent, feed) in feeds_of(index) {
            let call = &mut calls[agent.index()];
            if row.want.hidden {
                call.hidden.push(row.slot.0);
            }
            if feed.positions() == 1 {
                if let Feed::Payload(payload) = feed {
                    let (kind, bytes) = payload_bytes(payload);
                    let values = &mut call.step_payloads[kind];
                    values.rows.push(call.steps.len());
                    values.bytes.extend_from_slice(&bytes);
                    // Holds the row's place; the payload replaces what it embeds to.
                    call.step_feed.push(std::iter::once((0, 1.0)));
                } else {
                    pack(feed, &mut call.step_feed)?;
                }
                call.steps.push(index);
            } else {
                let mut packed = Packed {
                    k: width(feed),
                    ..Packed::default()
                };
                pack(feed, &mut packed)?;
                call.span_feeds.push(packed);
                call.spans.push(index);
            }
            if !stays[index] {
                let span = feed.positions() != 1;
                let place = &mut call.leaving[usize::from(span)];
                places[index][agent.index()] = Some((span, *place));
                *place += 1;
            }
        }
    }
    for call in &mut calls {
        call.step_slots = call
            .spans
            .iter()
            .chain(&call.steps)
            .map(|&r| rows[r].slot.0)
            .collect();
    }
    Ok((calls, places))
}

impl PyBackend {
    /// Reads out the rows that do not stay on the device, and makes room for the readouts of those that do.
    fn assemble_others<'a>(
        &mut self,
        rows: &[Row<'_>],
        stays: &[bool],
        find: &dyn Fn(usize, AgentId) -> Option<Logits<'a>>,
        out: &mut Readout,
    ) -> Result<(), BackendError> {
        out.rows.resize_with(rows.len(), ReadRow::default);
        for (row, out) in rows.iter().zip(&mut out.rows) {
            out.slot = Some(row.slot);
            out.versus = None;
            out.uplink_bytes = 0;
        }
        let places: Vec<usize> = (0..rows.len()).filter(|&index| !stays[index]).collect();
        let others: Vec<Row<'_>> = places.iter().map(|&index| rows[index]).collect();
        let find = |at: usize, agent: AgentId| find(places[at], agent);
        self.assembler
            .assemble(&self.info, &others, &find, &mut self.others)?;
        for (&index, read) in places.iter().zip(&mut self.others.rows) {
            std::mem::swap(&mut out.rows[index], read);
        }
        Ok(())
    }

    /// Reads the hidden states that rows name as feeds.
    fn states(&mut self, rows: &[Row<'_>]) -> Result<States, BackendError> {
        let mut states = Vec::new();
        for (index, row) in rows.iter().enumerate() {
            for (place, (_, feed)) in row.feeds.iter().enumerate() {
                if let Feed::Hidden { from, align } = *feed {
                    let Embeddings { values, hidden } = self.hidden(&[from], align)?;
                    states.push((index, place, Payload::Embed { values, hidden }));
                }
            }
        }
        Ok(states)
    }

    fn call(
        &self,
        what: &str,
        f: impl for<'py> FnOnce(Python<'py>, &Bound<'py, PyAny>) -> PyResult<()>,
    ) -> Result<(), BackendError> {
        Python::attach(|py| {
            f(py, self.engine.bind(py)).map_err(|error| {
                if error.is_instance_of::<PyValueError>(py) {
                    BackendError::Invalid(error.value(py).to_string())
                } else {
                    backend_error(py, error, what)
                }
            })
        })
    }

    /// Undoes an engine call that succeeded; where even that fails nobody knows where lanes are.
    fn take_back(&self, rows: &[Row<'_>]) -> Result<(), BackendError> {
        let back = |lane: LaneId, positions: u32| {
            let length = self.length(lane)?.saturating_sub(positions);
            self.call("truncate", |_, engine| {
                engine
                    .call_method1("truncate", (lane_tuple(lane), length))
                    .map(|_| ())
            })
        };
        for row in rows {
            for (agent, feed) in row.feeds {
                let lane = LaneId {
                    slot: row.slot,
                    agent: *agent,
                };
                back(lane, feed.positions() as u32)
                    .map_err(|error| BackendError::Poisoned(format!("{lane}: {error}")))?;
            }
        }
        Ok(())
    }

    fn length(&self, lane: LaneId) -> Result<u32, BackendError> {
        Python::attach(|py| {
            self.engine
                .bind(py)
                .call_method1("length", lane_tuple(lane))
                .and_then(|n| n.extract())
                .map_err(|error| backend_error(py, error, "lane length"))
        })
    }
}
