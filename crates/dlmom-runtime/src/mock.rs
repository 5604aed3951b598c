//! A backend without a model: logits are a fixed function of what a lane was fed, or a script.

use std::collections::BTreeMap;

use dlmom_kernels::Logits;
use dlmom_packet::BeliefPacket;

use crate::assemble::{Assembler, check_rows};
use crate::backend::{
    Align, Backend, BackendError, Embeddings, EnsembleInfo, Feed, LaneSpec, MemoryStats, ModelInfo,
    Payload, PromptSource, Readout, Row,
};
use crate::ids::{AgentId, LaneId, ModelId, SlotId};

/// One position of a lane: the entries of the packet it took in.
pub type Position = Vec<(u32, f32)>;

/// Computes the logits `[vocab]` that follow a lane's positions.
pub type Script = dyn Fn(LaneId, &[Position], &mut [f32]) + Send;

struct Lane {
    positions: Vec<Position>,
    max_len: u32,
    /// The hidden state of the last position, where it was asked for.
    hidden: Option<Vec<f32>>,
}

/// The reference implementation of [`Backend`]: exact, small, without any model.
pub struct MockBackend {
    info: EnsembleInfo,
    lanes: BTreeMap<LaneId, Lane>,
    script: Box<Script>,
    assembler: Assembler,
    /// Calls to `advance` that still succeed before one fails; `None` never fails.
    fail_after: Option<u64>,
    /// Lanes of every call to `compress`, in order.
    compressed: Vec<LaneId>,
}

/// Width of the mock's embeddings.
const HIDDEN: u32 = 4;
/// First pseudo-id of an embedding's coordinates.
const EMBEDDED: u32 = 1 << 24;

/// Positions that the hashed mock's logits look back on.
const MEMORY: usize = 6;

impl MockBackend {
    /// Agents of one vocabulary whose logits are a fixed smooth function of the last positions a
    /// lane took in: which agent, which ids with which probabilities, at which position.
    ///
    /// Token id 0 ends an answer; id `v` prints as the byte `b'a' + v % 26`.
    #[must_use]
    pub fn hashed(agents: usize, vocab: u32, slots: u32, max_len: u32) -> Self {
        Self::scripted(agents, vocab, slots, max_len, Box::new(hashed_logits))
    }

    /// Agents whose logits come from `script`.
    #[must_use]
    pub fn scripted(
        agents: usize,
        vocab: u32,
        slots: u32,
        max_len: u32,
        script: Box<Script>,
    ) -> Self {
        let models = (0..agents)
            .map(|index| ModelInfo {
                name: format!("mock-{index}"),
                source: "mock".into(),
                architecture: "Mock".into(),
                vocab,
                rows: vocab,
                hidden: HIDDEN,
                fingerprint: u64::from(vocab),
                token_bytes: (0..vocab).map(|v| vec![b'a' + (v % 26) as u8]).collect(),
                eos: vec![0],
                dtype: "fp32".into(),
                path: "mock".into(),
                kv_bytes_per_position: u64::from(HIDDEN) * 8,
                ..ModelInfo::default()
            })
            .collect();
        Self {
            info: EnsembleInfo {
                models,
                agents: (0..agents as u32).map(ModelId).collect(),
                slots,
                max_len,
                device: "mock".into(),
                threads: 1,
                bit_invariant: true,
                bit_invariance_reason: "rows are computed one by one".into(),
                fixed_length: false,
                consensus_kernel: "rust".into(),
                graphs: false,
            },
            lanes: BTreeMap::new(),
            script,
            assembler: Assembler::default(),
            fail_after: None,
            compressed: Vec::new(),
        }
    }

    /// Lets `calls` further calls of `advance` succeed and the next ones fail without advancing.
    pub fn fail_after(&mut self, calls: Option<u64>) {
        self.fail_after = calls;
    }

    /// The lanes that were compressed, in order, once for every call.
    #[must_use]
    pub fn compressed(&self) -> &[LaneId] {
        &self.compressed
    }

    /// The facts, for tests that need others.
    pub fn info_mut(&mut self) -> &mut EnsembleInfo {
        &mut self.info
    }

    fn positions_of(&self, feed: &Feed<'_>) -> Result<Vec<Position>, BackendError> {
        let entries = |packet: &BeliefPacket| {
            packet
                .ids()
                .iter()
                .copied()
                .zip(packet.probs().iter().copied())
                .collect()
        };
        match feed {
            Feed::Tokens(ids) => Ok(ids.iter().map(|&id| vec![(id, 1.0)]).collect()),
            Feed::Packets(packets) => Ok(packets.iter().map(entries).collect()),
            Feed::Payload(Payload::Dense { probs, vocab }) => Ok(probs
                .chunks_exact((*vocab).max(1) as usize)
                .map(|row| {
                    row.iter()
                        .enumerate()
                        .map(|(id, &p)| (id as u32, p))
                        .collect()
                })
                .collect()),
            // Coordinates stand where ids would, beyond any vocabulary.
            Feed::Payload(Payload::Embed { values, hidden }) => Ok(values
                .chunks_exact((*hidden).max(1) as usize)
                .map(|row| {
                    row.iter()
                        .enumerate()
                        .map(|(at, &x)| (EMBEDDED + at as u32, x))
                        .collect()
                })
                .collect()),
            Feed::Hidden { from, align } => {
                let values = self.aligned(*from, *align)?;
                let hidden = HIDDEN;
                self.positions_of(&Feed::Payload(&Payload::Embed { values, hidden }))
            }
        }
    }

    fn aligned(&self, lane: LaneId, align: Align) -> Result<Vec<f32>, BackendError> {
        let held = self.lanes.get(&lane).and_then(|l| l.hidden.as_ref());
        let state =
            held.ok_or_else(|| BackendError::Invalid(format!("{lane} keeps no hidden state")))?;
        let factor = match align {
            Align::Identity => 1.0,
            Align::Ridge => 0.5,
        };
        Ok(state.iter().map(|x| factor * x).collect())
    }
}

fn mix(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

/// A stand-in for a hidden state: a fixed function of the lane's last positions.
fn hidden_state(positions: &[Position]) -> Vec<f32> {
    (0..u64::from(HIDDEN))
        .map(|at| {
            let mut sum = 0.0_f64;
            for (back, position) in positions.iter().rev().take(MEMORY).enumerate() {
                for &(id, p) in position {
                    let seed = (u64::from(id) << 16) ^ ((back as u64) << 8) ^ at ^ (7 << 40);
                    sum += f64::from(p) * (mix(seed) as f64 / u64::MAX as f64 - 0.5);
                }
            }
            sum as f32
        })
        .collect()
}

fn hashed_logits(lane: LaneId, positions: &[Position], out: &mut [f32]) {
    for (v, z) in out.iter_mut().enumerate() {
        let mut sum = 0.0_f64;
        for (back, position) in positions.iter().rev().take(MEMORY).enumerate() {
            let at = positions.len() - back;
            for &(id, p) in position {
                let seed = (u64::from(lane.agent.0) << 48)
                    ^ ((at as u64) << 32)
                    ^ (u64::from(id) << 16)
                    ^ v as u64;
                let unit = mix(seed) as f64 / u64::MAX as f64 - 0.5;
                sum += f64::from(p) * unit * 0.8_f64.powf(back as f64);
            }
        }
        *z = (6.0 * sum) as f32;
    }
}

impl Backend for MockBackend {
    fn info(&self) -> &EnsembleInfo {
        &self.info
    }

    fn encode(&mut self, model: ModelId, source: &PromptSource) -> Result<Vec<u32>, BackendError> {
        let vocab = self
            .info
            .models
            .get(model.index())
            .ok_or_else(|| BackendError::Invalid(format!("unknown model {model}")))?
            .vocab;
        let ids: Vec<u32> = match source {
            PromptSource::Chat { messages } => messages
                .iter()
                .flat_map(|m| m.content.bytes())
                .map(|b| 1 + u32::from(b) % (vocab - 1))
                .collect(),
            PromptSource::Text { text } => text
                .bytes()
                .map(|b| 1 + u32::from(b) % (vocab - 1))
                .collect(),
            PromptSource::Tokens { ids } => ids.clone(),
        };
        if ids.is_empty() {
            return Err(BackendError::Invalid("empty prompt".into()));
        }
        if let Some(bad) = ids.iter().find(|&&id| id >= vocab) {
            return Err(BackendError::Invalid(format!(
                "token id {bad} is beyond the vocabulary of {vocab}"
            )));
        }
        Ok(ids)
    }

    fn reserve(&mut self, slots: u32, max_len: u32) -> Result<(), BackendError> {
        self.lanes.clear();
        self.info.slots = slots;
        self.info.max_len = max_len;
        Ok(())
    }

    fn open(&mut self, lanes: &[LaneSpec]) -> Result<(), BackendError> {
        for spec in lanes {
            let lane = spec.lane;
            if lane.slot.0 >= self.info.slots || lane.agent.index() >= self.info.agents.len() {
                return Err(BackendError::Invalid(format!("{lane} does not exist")));
            }
            if spec.max_len > self.info.max_len {
                return Err(BackendError::Capacity {
                    lane,
                    wanted: spec.max_len,
                    limit: self.info.max_len,
                });
            }
        }
        for spec in lanes {
            self.lanes.insert(
                spec.lane,
                Lane {
                    positions: Vec::new(),
                    max_len: spec.max_len,
                    hidden: None,
                },
            );
        }
        Ok(())
    }

    fn advance(&mut self, rows: &[Row<'_>], out: &mut Readout) -> Result<(), BackendError> {
        check_rows(&self.info, rows)?;
        if let Some(left) = &mut self.fail_after {
            if *left == 0 {
                return Err(BackendError::Failed {
                    context: "mock".into(),
                    source: "scripted failure".into(),
                });
            }
            *left -= 1;
        }
        let mut taken = Vec::new();
        for row in rows {
            for (agent, feed) in row.feeds {
                let lane = LaneId {
                    slot: row.slot,
                    agent: *agent,
                };
                let positions = self.positions_of(feed)?;
                let held = self
                    .lanes
                    .get(&lane)
                    .ok_or_else(|| BackendError::Invalid(format!("{lane} is not open")))?;
                let wanted = (held.positions.len() + positions.len()) as u32;
                if wanted > held.max_len {
                    return Err(BackendError::Capacity {
                        lane,
                        wanted,
                        limit: held.max_len,
                    });
                }
                taken.push((lane, held.positions.len(), positions, row.want.hidden));
            }
        }
        let mut logits: BTreeMap<LaneId, Vec<f32>> = BTreeMap::new();
        let mut before = Vec::with_capacity(taken.len());
        for (lane, length, positions, keep) in taken {
            let vocab = self.info.model_of(lane.agent).map_or(0, |m| m.vocab);
            if let Some(held) = self.lanes.get_mut(&lane) {
                held.positions.extend(positions);
                held.hidden = keep.then(|| hidden_state(&held.positions));
                let mut z = vec![0.0; vocab as usize];
                (self.script)(lane, &held.positions, &mut z);
                logits.insert(lane, z);
                before.push((lane, length));
            }
        }
        let find = |row: usize, agent: AgentId| {
            logits
                .get(&LaneId {
                    slot: rows[row].slot,
                    agent,
                })
                .map(|row| Logits::F32(row))
        };
        let result = self.assembler.assemble(&self.info, rows, &find, out);
        if result.is_err() {
            for (lane, length) in before {
                if let Some(held) = self.lanes.get_mut(&lane) {
                    held.positions.truncate(length);
                }
            }
        }
        result
    }

    fn embed(&mut self, _: ModelId, packets: &[BeliefPacket]) -> Result<Embeddings, BackendError> {
        let mut values = Vec::with_capacity(packets.len() * HIDDEN as usize);
        for packet in packets {
            for at in 0..u64::from(HIDDEN) {
                let sum: f64 = packet
                    .iter()
                    .map(|(id, p)| {
                        let unit = mix(u64::from(id) << 8 | at) as f64 / u64::MAX as f64 - 0.5;
                        f64::from(p) * unit
                    })
                    .sum();
                values.push(sum as f32);
            }
        }
        Ok(Embeddings {
            values,
            hidden: HIDDEN,
        })
    }

    fn hidden(&mut self, lanes: &[LaneId], align: Align) -> Result<Embeddings, BackendError> {
        let mut values = Vec::with_capacity(lanes.len() * HIDDEN as usize);
        for &lane in lanes {
            values.extend(self.aligned(lane, align)?);
        }
        Ok(Embeddings {
            values,
            hidden: HIDDEN,
        })
    }

    fn compress(&mut self, lanes: &[LaneId]) -> Result<(), BackendError> {
        self.compressed.extend_from_slice(lanes);
        Ok(())
    }

    fn fork(&mut self, from: LaneId, to: LaneId, upto: Option<u32>) -> Result<(), BackendError> {
        let missing = |lane| BackendError::Invalid(format!("{lane} is not open"));
        if self.info.agents.get(from.agent.index()) != self.info.agents.get(to.agent.index()) {
            return Err(BackendError::Invalid(format!(
                "{from} and {to} are of different models"
            )));
        }
        let donor = self.lanes.get(&from).ok_or_else(|| missing(from))?;
        let length = upto.unwrap_or(donor.positions.len() as u32);
        let prefix = donor
            .positions
            .get(..length as usize)
            .ok_or_else(|| {
                BackendError::Invalid(format!(
                    "{from} holds {} positions, not {length}",
                    donor.positions.len()
                ))
            })?
            .to_vec();
        let state = donor.hidden.clone();
        let whole = length as usize == donor.positions.len();
        let target = self.lanes.get_mut(&to).ok_or_else(|| missing(to))?;
        if length > target.max_len {
            return Err(BackendError::Capacity {
                lane: to,
                wanted: length,
                limit: target.max_len,
            });
        }
        target.positions = prefix;
        target.hidden = state.filter(|_| whole);
        Ok(())
    }

    fn truncate(&mut self, lane: LaneId, len: u32) -> Result<(), BackendError> {
        let held = self
            .lanes
            .get_mut(&lane)
            .ok_or_else(|| BackendError::Invalid(format!("{lane} is not open")))?;
        if len as usize > held.positions.len() {
            return Err(BackendError::Invalid(format!(
                "{lane} holds {} positions, not {len}",
                held.positions.len()
            )));
        }
        held.positions.truncate(len as usize);
        held.hidden = None;
        Ok(())
    }

    fn close(&mut self, slots: &[SlotId]) {
        self.lanes.retain(|lane, _| !slots.contains(&lane.slot));
    }

    fn memory(&self) -> MemoryStats {
        let entries: usize = self
            .lanes
            .values()
            .flat_map(|l| &l.positions)
            .map(|p| p.len() * 8)
            .sum();
        MemoryStats {
            kv_bytes: entries as u64,
            ..MemoryStats::default()
        }
    }
}
