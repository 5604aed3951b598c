//! Consensus of rows whose logits stay where the forward left them: what the engine is asked to read, and what of its
//! answer becomes a readout.

use dlmom_core::{Calibrate, Method, RowReadout, WeightRule, Weights};
use dlmom_runtime::{AgentId, EnsembleInfo, Row, SlotId};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

/// An operator over whole rows, as the engine's kernels know it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Operator {
    name: &'static str,
    theta: f32,
    eps: f32,
}

impl Operator {
    const MEAN: Self = Self {
        name: "mean",
        theta: 0.0,
        eps: 0.0,
    };

    /// The operator of a row; `None` where the engine has none that follows it to the letter.
    fn of(row: &Row<'_>) -> Option<Self> {
        if row.merge.len() == 1 {
            // One agent's row is never merged.
            return Some(Self::MEAN);
        }
        let spec = row.consensus.spec()?;
        if spec.gate.is_some()
            || spec.calibrate != Calibrate::None
            || spec.weights != Weights::Rule(WeightRule::Uniform)
        {
            return None;
        }
        let usable = |x: f32| x.is_finite() && x >= 0.0;
        match spec.method {
            Method::Mean => Some(Self::MEAN),
            Method::Arith => Some(Self {
                name: "arith",
                ..Self::MEAN
            }),
            Method::Ties if spec.is_plain_ties() && usable(spec.theta) && usable(spec.eps) => {
                Some(Self {
                    name: "ties",
                    theta: spec.theta,
                    eps: spec.eps,
                })
            }
            _ => None,
        }
    }
}

/// Rows that one call of the engine's consensus reads, by their places in the call.
#[derive(Debug)]
pub struct Read<'a> {
    merge: &'a [AgentId],
    operator: Operator,
    /// Entries of the packet, at most the vocabulary.
    top: usize,
    /// Targets of the row that has most.
    targets: usize,
    pub rows: Vec<usize>,
}

/// Sorts the plain rows of a call into reads. The others are for the host: those that ask for more than consensus and a
/// packet, draw by chance, have an operator with options, or want so much that their logits are not much more.
pub fn plan<'a>(info: &EnsembleInfo, rows: &[Row<'a>]) -> Vec<Read<'a>> {
    let compared: Vec<SlotId> = rows
        .iter()
        .filter_map(|row| row.want.versus.map(|other| [row.slot, other]))
        .flatten()
        .collect();
    let mut reads: Vec<Read<'a>> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        if compared.contains(&row.slot) {
            continue;
        }
        let Some((operator, top)) = plain(info, row) else {
            continue;
        };
        let targets = row.want.targets.map_or(0, <[u32]>::len);
        let same =
            |r: &&mut Read<'_>| r.merge == row.merge && r.operator == operator && r.top == top;
        if let Some(read) = reads.iter_mut().find(same) {
            read.rows.push(index);
            read.targets = read.targets.max(targets);
        } else {
            reads.push(Read {
                merge: row.merge,
                operator,
                top,
                targets,
                rows: vec![index],
            });
        }
    }
    reads
}

/// The operator of a plain row, and the entries of its packet.
fn plain(info: &EnsembleInfo, row: &Row<'_>) -> Option<(Operator, usize)> {
    let want = &row.want;
    let vocab = info.model_of(*row.merge.first()?)?.vocab;
    let top = want.top.min(vocab);
    let targets = want.targets.unwrap_or(&[]);
    let same = |&agent: &AgentId| info.model_of(agent).is_some_and(|m| m.vocab == vocab);
    let plain = want.uplink.is_none()
        && want.groups.is_none()
        && want.versus.is_none()
        && want.tempered.is_none()
        && want.per_agent_top == 0
        && want.draw.is_none_or(|draw| draw.sampling.is_argmax())
        && targets.iter().all(|&id| id < vocab)
        && 4 * (top as usize).max(targets.len()) <= vocab as usize
        && row.merge.iter().all(same);
    plain
        .then(|| Operator::of(row))
        .flatten()
        .map(|operator| (operator, top as usize))
}

impl Read<'_> {
    /// Appends this read in the form `RawRead` of `dlmom_rs.engine.reads`.
    pub fn append_to(
        &self,
        list: &Bound<'_, PyList>,
        info: &EnsembleInfo,
        rows: &[Row<'_>],
    ) -> PyResult<()> {
        let mine = || self.rows.iter().map(|&index| &rows[index]);
        let slots: Vec<u32> = mine().map(|row| row.slot.0).collect();
        let agents: Vec<u32> = self.merge.iter().map(|agent| agent.0).collect();
        let role = self
            .merge
            .first()
            .and_then(|&agent| info.model_of(agent))
            .map_or(&[][..], |m| &m.eos[..]);
        let targets: Vec<&[u32]> = mine().map(|row| row.want.targets.unwrap_or(&[])).collect();
        let Operator { name, theta, eps } = self.operator;
        list.append((slots, agents, name, theta, eps, self.top, role, targets))
    }

    /// Copies the engine's answer, a `RawReadout` of `dlmom_rs.engine.reads`.
    ///
    /// # Errors
    /// `TypeError` where it is none of this read's size.
    pub fn answer(&self, raw: &Bound<'_, PyAny>) -> PyResult<Answer> {
        let (batch, experts) = (self.rows.len(), self.merge.len());
        let mut parts = raw.try_iter()?;
        let mut next = |count: usize, width: usize| -> PyResult<Vec<u8>> {
            let part = parts.next().transpose()?;
            let bytes = part
                .as_ref()
                .and_then(|p| p.cast::<PyBytes>().ok())
                .map(PyBytesMethods::as_bytes)
                .filter(|bytes| bytes.len() == count * width);
            bytes.map(<[u8]>::to_vec).ok_or_else(|| {
                PyTypeError::new_err(format!(
                    "a readout of {batch} rows of {experts} agents must have {count} values of {width} bytes in every field; got {raw}"
                ))
            })
        };
        let answer = Answer {
            experts,
            top: self.top,
            targets: self.targets,
            finite: next(batch * experts, 1)?,
            entropies: f64s(&next(batch * experts, 8)?),
            agreed: next(batch, 1)?,
            merged_entropy: f64s(&next(batch, 8)?),
            best: u32s(&next(batch, 4)?),
            ids: u32s(&next(batch * self.top, 4)?),
            probs: f32s(&next(batch * self.top, 4)?),
            mass: f32s(&next(batch, 4)?),
            role_mass: f32s(&next(batch, 4)?),
            target_logprobs: f64s(&next(batch * self.targets, 8)?),
            agent_target_logprobs: f64s(&next(batch * experts * self.targets, 8)?),
        };
        Ok(answer)
    }
}

/// What the engine read of the rows of one [`Read`], row-major in their order.
pub struct Answer {
    experts: usize,
    top: usize,
    targets: usize,
    finite: Vec<u8>,
    entropies: Vec<f64>,
    agreed: Vec<u8>,
    merged_entropy: Vec<f64>,
    best: Vec<u32>,
    ids: Vec<u32>,
    probs: Vec<f32>,
    mass: Vec<f32>,
    role_mass: Vec<f32>,
    target_logprobs: Vec<f64>,
    agent_target_logprobs: Vec<f64>,
}

impl Answer {
    /// Fills the readout of the read's row `at`, as [`dlmom_core::read_row`] would.
    pub fn fill(&self, at: usize, row: &Row<'_>, out: &mut RowReadout) {
        let experts = at * self.experts..(at + 1) * self.experts;
        out.clear();
        let finite = self.finite[experts.clone()].iter().map(|&flag| flag != 0);
        out.finite.extend(finite);
        if out.finite.contains(&false) {
            return out.fail();
        }
        let top = at * self.top..(at + 1) * self.top;
        let wanted = row.want.targets.map_or(0, <[u32]>::len);
        out.entropies
            .extend_from_slice(&self.entropies[experts.clone()]);
        out.merged_entropy = self.merged_entropy[at];
        out.merged = self.experts > 1;
        out.agreed = self.agreed[at] != 0;
        out.ids.extend_from_slice(&self.ids[top.clone()]);
        out.probs.extend_from_slice(&self.probs[top]);
        out.mass = self.mass[at];
        out.role_mass = self.role_mass[at];
        // A plain row that draws takes its most probable token.
        out.drawn = row.want.draw.map(|_| self.best[at]);
        let logs = &self.target_logprobs[at * self.targets..][..wanted];
        out.target_logprobs.extend_from_slice(logs);
        out.per_agent.resize_with(self.experts, Vec::new);
        out.per_agent.iter_mut().for_each(Vec::clear);
        let of_agents = &mut out.per_agent_target_logprobs;
        of_agents.resize_with(self.experts, Vec::new);
        for (own, expert) in of_agents.iter_mut().zip(experts) {
            let logs = &self.agent_target_logprobs[expert * self.targets..][..wanted];
            own.clear();
            own.extend_from_slice(logs);
        }
    }
}

fn f64s(bytes: &[u8]) -> Vec<f64> {
    let (values, _) = bytes.as_chunks::<8>();
    values.iter().map(|b| f64::from_le_bytes(*b)).collect()
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    crate::backend::floats(bytes)
}

fn u32s(bytes: &[u8]) -> Vec<u32> {
    let (values, _) = bytes.as_chunks::<4>();
    values.iter().map(|b| u32::from_le_bytes(*b)).collect()
}
