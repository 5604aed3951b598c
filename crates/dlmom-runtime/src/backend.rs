//! The boundary between decisions (Rust) and bytes (weights, KV caches, logits).

use std::fmt;

use dlmom_core::{Consensus, Draw, RowReadout, Stream, Tempered};
use dlmom_packet::BeliefPacket;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ids::{AgentId, LaneId, ModelId, SlotId};
use crate::link::Uplink;

/// What an agent is asked, before tokenisation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PromptSource {
    /// Rendered with the model's chat template; a model without one reads the contents joined by blank lines.
    Chat {
        /// The conversation so far.
        messages: Vec<Message>,
    },
    /// Plain text.
    Text {
        /// The text.
        text: String,
    },
    /// Token ids, taken as they are.
    Tokens {
        /// Ids of the model's tokenizer.
        ids: Vec<u32>,
    },
}

/// One message of a chat prompt.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text.
    pub content: String,
}

/// Facts about one model that the loop decides by.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct ModelInfo {
    /// Short name for tables.
    pub name: String,
    /// The path, hub id or `zoo:` name it was asked for by.
    pub source: String,
    /// Hub revision, where there is one.
    pub revision: Option<String>,
    /// Digest of the weight files.
    pub weights_sha256: Option<String>,
    /// Architecture class.
    pub architecture: String,
    /// Number of parameters.
    pub parameters: u64,
    /// Real tokens V: ids `0..vocab` exist in the tokenizer.
    pub vocab: u32,
    /// Rows of the embedding matrix, padding rows included.
    pub rows: u32,
    /// Width of an embedding.
    pub hidden: u32,
    /// Longest context in positions, where the model states one.
    pub context: Option<u32>,
    /// Digest of the vocabulary: equal fingerprints mean that one packet means the same to both.
    pub fingerprint: u64,
    /// Bytes each id prints as, empty for special tokens; length `vocab`.
    #[serde(skip)]
    pub token_bytes: Vec<Vec<u8>>,
    /// Ids that end an answer.
    pub eos: Vec<u32>,
    /// Storage type of weights and KV.
    pub dtype: String,
    /// `row_slot` or `per_row`: which cache serves the model.
    pub path: String,
    /// Why the model does not take the row-slot path, where it does not.
    pub path_reason: Option<String>,
    /// Attention implementation.
    pub attention: String,
    /// Bytes of keys and values of one position, over all layers.
    pub kv_bytes_per_position: u64,
}

impl ModelInfo {
    /// The text of `ids`: the bytes of every id joined, invalid UTF-8 replaced.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if let Some(piece) = self.token_bytes.get(id as usize) {
                bytes.extend_from_slice(piece);
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Facts about an ensemble as a backend loaded it.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct EnsembleInfo {
    /// The models, by [`ModelId`].
    pub models: Vec<ModelInfo>,
    /// The model of every agent, by [`AgentId`].
    pub agents: Vec<ModelId>,
    /// Rows of the running batch.
    pub slots: u32,
    /// Longest lane in positions.
    pub max_len: u32,
    /// Device in words.
    pub device: String,
    /// Threads of one forward.
    pub threads: u32,
    /// Whether a row's bits depend on its slot or its batch mates, as tested at start-up.
    pub bit_invariant: bool,
    /// What the start-up test found, or why it was not run.
    pub bit_invariance_reason: String,
    /// Whether every row sees the whole reserved length, because its bits depend on it.
    pub fixed_length: bool,
    /// What reads rows whose consensus sees the agents' own logits: `rust`, or a kernel where the logits are.
    pub consensus_kernel: String,
    /// Whether the forwards of steps are captured and replayed.
    pub graphs: bool,
}

impl EnsembleInfo {
    /// The model behind an agent.
    #[must_use]
    pub fn model_of(&self, agent: AgentId) -> Option<&ModelInfo> {
        self.agents
            .get(agent.index())
            .and_then(|m| self.models.get(m.index()))
    }
}

/// A lane to open at position 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneSpec {
    /// The lane.
    pub lane: LaneId,
    /// Most positions it may reach.
    pub max_len: u32,
}

/// How a hidden state of an agent becomes an input embedding, before it is rescaled to the mean norm of
/// the embeddings (`LatentMAS`, arXiv 2511.20639, section 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Align {
    /// As it is.
    Identity,
    /// Times the ridge solution `W_a = (U^T U + 1e-5 I)^-1 U^T E` of output embeddings U and input
    /// embeddings E.
    #[default]
    Ridge,
}

/// A message of suite A3 other than packets, in the bytes that crossed the link.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload {
    /// Input embeddings, `[positions, hidden]` in f32.
    Embed {
        /// Row-major values.
        values: Vec<f32>,
        /// Width of one embedding.
        hidden: u32,
    },
    /// Whole-vocabulary distributions, `[positions, vocab]` in f32, without ids.
    Dense {
        /// Row-major probabilities.
        probs: Vec<f32>,
        /// Width of one distribution.
        vocab: u32,
    },
}

/// What one agent's lane takes in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Feed<'a> {
    /// Token ids, one position each.
    Tokens(&'a [u32]),
    /// Belief packets, one position each.
    Packets(&'a [BeliefPacket]),
    /// Another kind of message.
    Payload(&'a Payload),
    /// The last hidden state of another lane of the same width.
    Hidden {
        /// Donor lane.
        from: LaneId,
        /// Alignment on the way.
        align: Align,
    },
}

impl Payload {
    /// How many positions the message takes.
    #[must_use]
    pub fn positions(&self) -> usize {
        match self {
            Self::Embed { values, hidden } => values.len() / (*hidden).max(1) as usize,
            Self::Dense { probs, vocab } => probs.len() / (*vocab).max(1) as usize,
        }
    }
}

impl Feed<'_> {
    /// How many positions the feed takes.
    #[must_use]
    pub fn positions(&self) -> usize {
        match self {
            Self::Tokens(ids) => ids.len(),
            Self::Packets(packets) => packets.len(),
            Self::Payload(payload) => payload.positions(),
            Self::Hidden { .. } => 1,
        }
    }
}

/// What the readout of a row must hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Want<'a> {
    /// Entries of the merged distribution, independent of the packet's k.
    pub top: u32,
    /// Entries of every agent's own distribution.
    pub per_agent_top: u32,
    /// Log-likelihoods of these ids: router, rescoring, multiple choice.
    pub targets: Option<&'a [u32]>,
    /// A token's log-likelihood of every agent under several temperatures: for fitting one.
    pub tempered: Option<Tempered<'a>>,
    /// KL and cosine of the merged preferences against another row of this batch: drift.
    pub versus: Option<SlotId>,
    /// Sample the explicit token from the full merged distribution; `None` draws nothing.
    pub draw: Option<Draw>,
    /// Tokens that the draw's repetition penalty falls on.
    pub seen: &'a [u32],
    /// Randomness of consensus operators that draw.
    pub stream: Option<Stream>,
    /// Keep the last hidden states, so that a later [`Feed::Hidden`] may name this lane.
    pub hidden: bool,
    /// Consensus sees only what the agents send up; `None` shows it every logit.
    pub uplink: Option<Uplink>,
    /// Groups merged by themselves first; `None` merges all agents at once.
    pub groups: Option<Groups<'a>>,
}

/// Groups of a row's agents: each is merged by its own consensus, and sends a packet up to the row's.
#[derive(Clone, Copy)]
pub struct Groups<'a> {
    /// Places in [`Row::merge`] of the members of every group.
    pub members: &'a [Vec<u32>],
    /// Merges the members of a group.
    pub consensus: &'a dyn Consensus,
    /// What a group sends up.
    pub uplink: Uplink,
}

impl fmt::Debug for Groups<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Groups")
            .field("members", &self.members)
            .field("consensus", &self.consensus.name())
            .field("uplink", &self.uplink)
            .finish()
    }
}

/// One row of an [`Backend::advance`] call.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    /// The slot.
    pub slot: SlotId,
    /// What each moving agent of the slot takes in; agents not named do not move.
    pub feeds: &'a [(AgentId, Feed<'a>)],
    /// Whose logits meet in consensus, a subset of the agents fed.
    pub merge: &'a [AgentId],
    /// How they meet.
    pub consensus: &'a dyn Consensus,
    /// What to read out.
    pub want: Want<'a>,
}

impl fmt::Debug for Row<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Row")
            .field("slot", &self.slot)
            .field("feeds", &self.feeds)
            .field("merge", &self.merge)
            .field("consensus", &self.consensus.name())
            .field("want", &self.want)
            .finish()
    }
}

/// Divergence of a row's merged preferences from another row's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Versus {
    /// `KL(other || this)` in nats.
    pub kl: f64,
    /// Cosine of the centred preferences.
    pub cosine: f64,
}

/// The readout of one row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReadRow {
    /// The row's slot.
    pub slot: Option<SlotId>,
    /// Entropies, packet entries, draws and flags; experts in the order of the row's `merge`.
    pub read: RowReadout,
    /// Divergence, where it was asked for.
    pub versus: Option<Versus>,
    /// Bytes the agents sent up, where [`Want::uplink`] asked for messages; 0 otherwise.
    pub uplink_bytes: u64,
}

/// One small host buffer per call: a [`ReadRow`] for every row, in order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Readout {
    /// The rows.
    pub rows: Vec<ReadRow>,
}

/// Input embeddings of packets, exactly as a model of this dtype would take them in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Embeddings {
    /// Row-major values `[packets, hidden]`, rounded to the model's dtype.
    pub values: Vec<f32>,
    /// Width of one embedding.
    pub hidden: u32,
}

/// Memory in bytes at the moment of asking, and what keeping prompts has saved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats {
    /// KV caches.
    pub kv_bytes: u64,
    /// Highest device allocation so far; `None` on a CPU.
    pub peak_device_bytes: Option<u64>,
    /// Highest resident set of the process so far.
    pub peak_rss_bytes: Option<u64>,
    /// Positions of prompts that were copied from an earlier forward of the same tokens instead of forwarded, so far.
    pub copied_positions: u64,
}

/// Why a backend call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The request itself is wrong: unknown slot, empty feed, id beyond the vocabulary.
    #[error("invalid request: {0}")]
    Invalid(String),
    /// The backend cannot do this, now or ever.
    #[error("not supported by this backend: {0}")]
    Unsupported(String),
    /// A lane would outgrow its positions.
    #[error("{lane} would reach {wanted} positions, its limit is {limit}")]
    Capacity {
        /// The lane.
        lane: LaneId,
        /// Positions after the call.
        wanted: u32,
        /// Its limit.
        limit: u32,
    },
    /// The user asked to stop; the original exception, where there is one, travels along.
    #[error("cancelled")]
    Cancelled(Option<Box<dyn std::error::Error + Send + Sync>>),
    /// A part that all rows share failed, a user's consensus for one: trying rows by themselves would not help.
    #[error("{context}: {source}")]
    Fatal {
        /// Where.
        context: String,
        /// The original error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An earlier failure left lanes in an unknown state; every later call says so.
    #[error("backend is poisoned by an earlier failure: {0}")]
    Poisoned(String),
    /// The forward itself failed; the original exception travels along.
    #[error("{context}: {source}")]
    Failed {
        /// Where: agent, phase.
        context: String,
        /// The original error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The one door to weights, KV caches and logits. Object-safe; state stays behind ids.
///
/// Contract, held by [`crate::conformance`]:
/// - on `Err` no lane has advanced, or the backend is poisoned and every later call says so;
/// - a numeric failure (NaN, Inf) is a flag of its row, never an error;
/// - lanes never share positions, and rows never see each other's content;
/// - consensus meets exactly the agents named in [`Row::merge`].
pub trait Backend: Send {
    /// What was loaded.
    fn info(&self) -> &EnsembleInfo;

    /// Token ids of a prompt for one model: chat template and tokenizer. Decoding is Rust's, from token bytes.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] for an empty prompt or one longer than the context.
    fn encode(&mut self, model: ModelId, source: &PromptSource) -> Result<Vec<u32>, BackendError>;

    /// Makes room for `slots` rows of `max_len` positions, closing every lane; [`Backend::info`] tells what was made.
    ///
    /// # Errors
    /// [`BackendError::Failed`] where memory does not suffice, [`BackendError::Invalid`] beyond a model's context.
    fn reserve(&mut self, slots: u32, max_len: u32) -> Result<(), BackendError>;

    /// Opens lanes at position 0, forgetting what they held.
    ///
    /// # Errors
    /// [`BackendError::Capacity`] for a lane longer than the backend can hold; nothing is opened then.
    fn open(&mut self, lanes: &[LaneSpec]) -> Result<(), BackendError>;

    /// Prefill, step and score: feeds rows, merges the logits of their last positions and reads them out.
    ///
    /// # Errors
    /// Any [`BackendError`]; no lane has advanced then.
    fn advance(&mut self, rows: &[Row<'_>], out: &mut Readout) -> Result<(), BackendError>;

    /// The mixture embeddings of packets under one model's table, without forwarding anything.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] where a backend has no embeddings.
    fn embed(
        &mut self,
        model: ModelId,
        packets: &[BeliefPacket],
    ) -> Result<Embeddings, BackendError> {
        let _ = packets;
        Err(BackendError::Unsupported(format!(
            "model {model} gives no embeddings"
        )))
    }

    /// The last hidden states of lanes whose last row asked for [`Want::hidden`], as input embeddings.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] where a backend has none, [`BackendError::Invalid`] for a lane that
    /// kept none, or of another model than the first.
    fn hidden(&mut self, lanes: &[LaneId], align: Align) -> Result<Embeddings, BackendError> {
        let _ = (lanes, align);
        Err(BackendError::Unsupported(
            "this backend gives no hidden states".into(),
        ))
    }

    /// Lets the backend's compressor work on these lanes' caches; positions stay as they are.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] without a compressor, [`BackendError::Failed`] with its own error.
    fn compress(&mut self, lanes: &[LaneId]) -> Result<(), BackendError> {
        let _ = lanes;
        Err(BackendError::Unsupported("no KV compressor is set".into()))
    }

    /// Copies the first `upto` positions (all, where `None`) of one lane over another of the same model.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] between models or beyond the donor's length.
    fn fork(&mut self, from: LaneId, to: LaneId, upto: Option<u32>) -> Result<(), BackendError>;

    /// Forgets all but the first `len` positions of a lane.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] where the lane is shorter.
    fn truncate(&mut self, lane: LaneId, len: u32) -> Result<(), BackendError>;

    /// Frees the lanes of these slots. Never fails; unknown slots are ignored.
    fn close(&mut self, slots: &[SlotId]);

    /// Memory now.
    fn memory(&self) -> MemoryStats;
}
