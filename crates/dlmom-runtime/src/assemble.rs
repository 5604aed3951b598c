//! From the logits of every row to the readout: one path for every backend whose logits are host slices.

use dlmom_core::{Consensus, Request, RowReadout, Scratch, compare_rows, read_row, stats};
use dlmom_packet::BeliefPacket;

use crate::backend::{BackendError, EnsembleInfo, Payload, ReadRow, Readout, Row, Versus};
use crate::ids::{AgentId, SlotId};
use crate::link::{Link, LinkError, Uplink, Wire, expand};

/// Reads rows out of host logits, with its buffers reused from call to call.
#[derive(Default)]
pub struct Assembler {
    scratch: Scratch,
    merged: [Vec<f32>; 2],
    centred: Vec<Vec<f32>>,
    /// What consensus makes of the agents' messages, one row of logits for each.
    received: Vec<Vec<f32>>,
    own: RowReadout,
    wire: Wire,
}

impl Assembler {
    /// Reads out every row. `logits(row, agent)` is the f32 slice `[vocab]` of the agent's last position.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] where a row merges an agent without logits, merges nobody, names
    /// a target beyond the vocabulary, or is compared with a row that is not in the call.
    pub fn assemble<'a>(
        &mut self,
        info: &EnsembleInfo,
        rows: &[Row<'_>],
        consensus: &dyn Consensus,
        logits: &dyn Fn(usize, AgentId) -> Option<&'a [f32]>,
        out: &mut Readout,
    ) -> Result<(), BackendError> {
        out.rows.resize_with(rows.len(), ReadRow::default);
        for (index, row) in rows.iter().enumerate() {
            let experts = experts(index, row, logits)?;
            let eos = row
                .merge
                .first()
                .and_then(|&agent| info.model_of(agent))
                .map_or(&[][..], |m| &m.eos[..]);
            let vocab = experts.first().map_or(0, |e| e.len());
            if let Some(bad) = row
                .want
                .targets
                .into_iter()
                .flatten()
                .find(|&&id| id as usize >= vocab)
            {
                return Err(BackendError::Invalid(format!(
                    "target {bad} is beyond the vocabulary of {vocab}"
                )));
            }
            let request = Request {
                top: row.want.top as usize,
                per_agent_top: row.want.per_agent_top as usize,
                targets: row.want.targets,
                draw: row.want.draw,
                role: eos,
            };
            let read = &mut out.rows[index];
            read.slot = Some(row.slot);
            read.uplink_bytes = 0;
            let seen: Vec<&[f32]> = match row.want.uplink {
                None => experts,
                Some(uplink) => {
                    read.uplink_bytes = self.send_up(&experts, consensus, uplink)?;
                    self.received[..experts.len()]
                        .iter()
                        .map(Vec::as_slice)
                        .collect()
                }
            };
            read_row(
                &seen,
                consensus,
                &request,
                &mut self.scratch,
                &mut read.read,
            );
            read.versus = None;
            if let Some(other) = row.want.versus {
                read.versus = self.versus(index, other, rows, consensus, logits)?;
            }
        }
        Ok(())
    }

    /// Sends every expert's distribution up in the form of `uplink`; returns the bytes. A row that is not finite arrives
    /// as it is, so that its flag stands.
    fn send_up(
        &mut self,
        experts: &[&[f32]],
        consensus: &dyn Consensus,
        uplink: Uplink,
    ) -> Result<u64, BackendError> {
        let failed = |e: LinkError| BackendError::Invalid(e.to_string());
        if self.received.len() < experts.len() {
            self.received.resize_with(experts.len(), Vec::new);
        }
        let mut bytes = 0;
        for (at, logits) in experts.iter().enumerate() {
            let vocab = logits.len();
            let request = Request {
                top: uplink.k.map_or(vocab, |k| k as usize),
                ..Request::default()
            };
            let own = &mut self.own;
            read_row(&[logits], consensus, &request, &mut self.scratch, own);
            let received = &mut self.received[at];
            if own.finite != [true] {
                received.clear();
                received.extend_from_slice(logits);
                continue;
            }
            if uplink.k.is_some() {
                let packet =
                    BeliefPacket::new(own.ids.clone(), own.probs.clone(), own.mass, vocab as u32)
                        .map_err(|e| failed(e.into()))?;
                let (packet, len) = self
                    .wire
                    .packet(&packet, uplink.meta, uplink.encoding)
                    .map_err(failed)?;
                bytes += len as u64;
                expand(&packet, received);
            } else {
                let mut probs = vec![0.0_f32; vocab];
                for (&id, &p) in own.ids.iter().zip(&own.probs) {
                    probs[id as usize] = p;
                }
                let (probs, len) = self
                    .wire
                    .dense(&probs, uplink.meta, uplink.encoding)
                    .map_err(failed)?;
                bytes += len as u64;
                received.clear();
                // A probability that underflowed is as small as a float can say.
                received.extend(probs.iter().map(|&p| p.max(f32::from_bits(1)).ln()));
            }
        }
        Ok(bytes)
    }

    fn versus<'a>(
        &mut self,
        index: usize,
        other: SlotId,
        rows: &[Row<'_>],
        consensus: &dyn Consensus,
        logits: &dyn Fn(usize, AgentId) -> Option<&'a [f32]>,
    ) -> Result<Option<Versus>, BackendError> {
        let reference = rows.iter().position(|r| r.slot == other).ok_or_else(|| {
            BackendError::Invalid(format!("slot {other} to compare with is not in this call"))
        })?;
        for (side, at) in [index, reference].into_iter().enumerate() {
            let experts = experts(at, &rows[at], logits)?;
            self.centred
                .resize_with(experts.len().max(self.centred.len()), Vec::new);
            for (buffer, expert) in self.centred.iter_mut().zip(&experts) {
                let stats = stats(expert);
                if !stats.finite {
                    return Ok(None);
                }
                buffer.clear();
                buffer.extend(expert.iter().map(|&z| (f64::from(z) - stats.mean) as f32));
            }
            let views: Vec<&[f32]> = self.centred[..experts.len()]
                .iter()
                .map(Vec::as_slice)
                .collect();
            self.merged[side].resize(experts[0].len(), 0.0);
            consensus.merge(&views, &mut self.merged[side]);
        }
        let divergence = compare_rows(&self.merged[1], &self.merged[0]);
        Ok(Some(Versus {
            kl: divergence.kl,
            cosine: divergence.cosine,
        }))
    }
}

fn experts<'a>(
    index: usize,
    row: &Row<'_>,
    logits: &dyn Fn(usize, AgentId) -> Option<&'a [f32]>,
) -> Result<Vec<&'a [f32]>, BackendError> {
    if row.merge.is_empty() {
        return Err(BackendError::Invalid(format!(
            "slot {} merges no agent",
            row.slot
        )));
    }
    row.merge
        .iter()
        .map(|&agent| {
            logits(index, agent).ok_or_else(|| {
                BackendError::Invalid(format!(
                    "slot {} merges agent {agent}, which was not fed",
                    row.slot
                ))
            })
        })
        .collect()
}

/// Checks everything about a call that does not depend on the backend's state.
///
/// # Errors
/// [`BackendError::Invalid`] naming the row: a slot named twice, an unknown slot or agent, an
/// empty feed, an id or packet beyond the vocabulary, an agent fed twice or merged unfed.
pub fn check_rows(info: &EnsembleInfo, rows: &[Row<'_>]) -> Result<(), BackendError> {
    use crate::backend::Feed;
    let invalid = |message: String| Err(BackendError::Invalid(message));
    let mut seen = vec![false; info.slots as usize];
    for row in rows {
        match seen.get_mut(row.slot.index()) {
            None => return invalid(format!("slot {} of {}", row.slot, info.slots)),
            Some(true) => return invalid(format!("slot {} is named twice", row.slot)),
            Some(flag) => *flag = true,
        }
        for (at, (agent, feed)) in row.feeds.iter().enumerate() {
            let Some(model) = info.model_of(*agent) else {
                return invalid(format!("slot {}: unknown agent {agent}", row.slot));
            };
            if row.feeds[..at].iter().any(|(other, _)| other == agent) {
                return invalid(format!("slot {}: agent {agent} is fed twice", row.slot));
            }
            if feed.positions() == 0 {
                return invalid(format!("slot {}: empty feed for agent {agent}", row.slot));
            }
            let bad = match feed {
                Feed::Tokens(ids) => ids.iter().find(|&&id| id >= model.vocab).copied(),
                Feed::Packets(packets) => packets
                    .iter()
                    .flat_map(dlmom_packet::BeliefPacket::ids)
                    .find(|&&id| id >= model.vocab)
                    .copied(),
                Feed::Payload(payload) => {
                    let (given, expected, what) = match payload {
                        Payload::Embed { hidden, .. } => (*hidden, model.hidden, "embedding"),
                        Payload::Dense { vocab, .. } => (*vocab, model.vocab, "distribution"),
                    };
                    if given != expected {
                        return invalid(format!(
                            "slot {}: {what} of width {given} for {}, which takes {expected}",
                            row.slot, model.name
                        ));
                    }
                    None
                }
                Feed::Hidden { .. } => None,
            };
            if let Some(id) = bad {
                return invalid(format!(
                    "slot {}: token id {id} is beyond the vocabulary of {} ({} tokens)",
                    row.slot, model.name, model.vocab
                ));
            }
        }
        for agent in row.merge {
            if !row.feeds.iter().any(|(fed, _)| fed == agent) {
                return invalid(format!(
                    "slot {} merges agent {agent}, which was not fed",
                    row.slot
                ));
            }
        }
    }
    Ok(())
}
