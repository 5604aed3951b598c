//! From the logits of every row to the readout: one path for every backend whose logits are host slices.

use dlmom_core::{Consensus, Request, RowReadout, Scratch, Stream, compare_rows, read_row, stats};
use dlmom_packet::BeliefPacket;

use crate::backend::{BackendError, EnsembleInfo, Payload, ReadRow, Readout, Row, Versus};
use crate::ids::{AgentId, SlotId};
use crate::link::{Link, LinkError, Uplink, Wire, expand};

/// Reads rows out of host logits, with its buffers reused from call to call.
#[derive(Default)]
pub struct Assembler {
    scratch: Scratch,
    /// Merged preferences of rows that are compared, by their place in the call.
    kept: Vec<(usize, Vec<f32>)>,
    /// What consensus makes of the agents' messages, one row of logits for each.
    received: Vec<Vec<f32>>,
    /// The same for the messages of groups.
    groups: Vec<Vec<f32>>,
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
        logits: &dyn Fn(usize, AgentId) -> Option<&'a [f32]>,
        out: &mut Readout,
    ) -> Result<(), BackendError> {
        self.kept.clear();
        let compared = compared(rows)?;
        out.rows.resize_with(rows.len(), ReadRow::default);
        for (index, row) in rows.iter().enumerate() {
            let experts = experts(index, row, logits)?;
            self.read(info, row, &experts, &mut out.rows[index])?;
            if compared.contains(&index) && out.rows[index].read.finite.iter().all(|&f| f) {
                self.kept.push((index, self.scratch.preferences().to_vec()));
            }
        }
        for (index, row) in rows.iter().enumerate() {
            out.rows[index].versus = row
                .want
                .versus
                .and_then(|other| self.versus(index, other, rows));
        }
        Ok(())
    }

    fn read(
        &mut self,
        info: &EnsembleInfo,
        row: &Row<'_>,
        experts: &[&[f32]],
        read: &mut ReadRow,
    ) -> Result<(), BackendError> {
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
            tempered: row.want.tempered,
            draw: row.want.draw,
            seen: row.want.seen,
            stream: row.want.stream,
            role: eos,
        };
        read.slot = Some(row.slot);
        read.uplink_bytes = 0;
        let mut received = std::mem::take(&mut self.received);
        let mut grouped = std::mem::take(&mut self.groups);
        let result = self.read_into(row, experts, &request, &mut received, &mut grouped, read);
        self.received = received;
        self.groups = grouped;
        result
    }

    fn read_into(
        &mut self,
        row: &Row<'_>,
        experts: &[&[f32]],
        request: &Request<'_>,
        received: &mut Vec<Vec<f32>>,
        grouped: &mut Vec<Vec<f32>>,
        read: &mut ReadRow,
    ) -> Result<(), BackendError> {
        let seen: Vec<&[f32]> = match row.want.uplink {
            None => experts.to_vec(),
            Some(uplink) => {
                for (at, logits) in experts.iter().enumerate() {
                    // One agent's own distribution: consensus has nothing to merge.
                    read.uplink_bytes +=
                        self.send_up(&[logits], row.consensus, None, uplink, slot(received, at))?;
                }
                received[..experts.len()]
                    .iter()
                    .map(Vec::as_slice)
                    .collect()
            }
        };
        let Some(groups) = row.want.groups else {
            read_row(
                &seen,
                row.consensus,
                request,
                &mut self.scratch,
                &mut read.read,
            );
            return Ok(());
        };
        // Entropies and flags are the agents', whatever their groups make of them.
        let (mut entropies, mut finite) = (vec![0.0; seen.len()], vec![false; seen.len()]);
        let mut agreed = true;
        let mut best = None;
        for (at, logits) in seen.iter().enumerate() {
            let found = stats(logits);
            entropies[at] = found.entropy;
            finite[at] = found.finite;
            agreed &= *best.get_or_insert(found.best) == found.best;
        }
        if finite.contains(&false) {
            // A failed row says which agent failed, and nothing else.
            read_row(
                &seen,
                row.consensus,
                request,
                &mut self.scratch,
                &mut read.read,
            );
            return Ok(());
        }
        let mut merged = false;
        for (at, members) in groups.members.iter().enumerate() {
            let views: Vec<&[f32]> = members
                .iter()
                .filter_map(|&m| seen.get(m as usize).copied())
                .collect();
            read.uplink_bytes += self.send_up(
                &views,
                groups.consensus,
                row.want.stream.map(|stream| of_group(stream, at)),
                groups.uplink,
                slot(grouped, at),
            )?;
            merged |= self.own.merged;
        }
        let meta: Vec<&[f32]> = grouped[..groups.members.len()]
            .iter()
            .map(Vec::as_slice)
            .collect();
        read_row(
            &meta,
            row.consensus,
            request,
            &mut self.scratch,
            &mut read.read,
        );
        if read.read.finite.iter().all(|&f| f) {
            read.read.entropies = entropies;
            read.read.finite = finite;
            read.read.agreed = agreed;
            read.read.merged |= merged;
        }
        Ok(())
    }

    /// Merges experts and sends the result up in the form of `uplink`; returns the bytes. A row that is
    /// not finite arrives as it is, so that its flag stands.
    fn send_up(
        &mut self,
        experts: &[&[f32]],
        consensus: &dyn Consensus,
        stream: Option<Stream>,
        uplink: Uplink,
        received: &mut Vec<f32>,
    ) -> Result<u64, BackendError> {
        let failed = |e: LinkError| BackendError::Invalid(e.to_string());
        let vocab = experts.first().map_or(0, |e| e.len());
        let request = Request {
            top: uplink.k.map_or(vocab, |k| k as usize),
            stream,
            ..Request::default()
        };
        let own = &mut self.own;
        read_row(experts, consensus, &request, &mut self.scratch, own);
        received.clear();
        if own.finite.contains(&false) {
            received.extend_from_slice(experts.first().copied().unwrap_or(&[]));
            return Ok(0);
        }
        if uplink.k.is_some() {
            let packet =
                BeliefPacket::new(own.ids.clone(), own.probs.clone(), own.mass, vocab as u32)
                    .map_err(|e| failed(e.into()))?;
            let (packet, len) = self
                .wire
                .packet(&packet, uplink.meta, uplink.encoding)
                .map_err(failed)?;
            expand(&packet, received);
            return Ok(len as u64);
        }
        let mut probs = vec![0.0_f32; vocab];
        for (&id, &p) in own.ids.iter().zip(&own.probs) {
            probs[id as usize] = p;
        }
        let (probs, len) = self
            .wire
            .dense(&probs, uplink.meta, uplink.encoding)
            .map_err(failed)?;
        // A probability that underflowed is as small as a float can say.
        received.extend(probs.iter().map(|&p| p.max(f32::from_bits(1)).ln()));
        Ok(len as u64)
    }

    /// How far a row's merged preferences are from another's; none where either failed.
    fn versus(&self, index: usize, other: SlotId, rows: &[Row<'_>]) -> Option<Versus> {
        let kept = |at: usize| self.kept.iter().find(|(i, _)| *i == at).map(|(_, z)| z);
        let reference = rows.iter().position(|r| r.slot == other)?;
        let (a, b) = (kept(reference)?, kept(index)?);
        if a.len() != b.len() {
            return None;
        }
        let divergence = compare_rows(a, b);
        Some(Versus {
            kl: divergence.kl,
            cosine: divergence.cosine,
        })
    }
}

/// The stream of one group's draws: groups that each draw an expert do so independently.
fn of_group(stream: Stream, at: usize) -> Stream {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    Stream {
        sample: stream.sample ^ (at as u64 + 1).wrapping_mul(ODD),
        ..stream
    }
}

/// The buffer at a place, made where there is none yet.
fn slot(buffers: &mut Vec<Vec<f32>>, at: usize) -> &mut Vec<f32> {
    if buffers.len() <= at {
        buffers.resize_with(at + 1, Vec::new);
    }
    &mut buffers[at]
}

/// Places of the rows that are compared with another, or another with them.
fn compared(rows: &[Row<'_>]) -> Result<Vec<usize>, BackendError> {
    let mut places = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        if let Some(other) = row.want.versus {
            let reference = rows.iter().position(|r| r.slot == other).ok_or_else(|| {
                BackendError::Invalid(format!("slot {other} to compare with is not in this call"))
            })?;
            places.extend([index, reference]);
        }
    }
    Ok(places)
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
