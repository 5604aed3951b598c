//! From the logits of every row to the readout: one path for every backend whose logits are host slices.

use dlmom_core::{Consensus, Request, RowReadout, Stream, compare_rows};
use dlmom_kernels::{Kernel, KernelError, Logits, Scratch};
use dlmom_packet::BeliefPacket;

use crate::backend::{BackendError, EnsembleInfo, Payload, ReadRow, Readout, Row, Versus};
use crate::ids::{AgentId, SlotId};
use crate::link::{Link, LinkError, Uplink, Wire, expand};

/// What agents, and then groups, send up, and where merged preferences are kept.
type Buffers<'a> = (
    &'a mut Vec<Vec<f32>>,
    &'a mut Vec<Vec<f32>>,
    Option<&'a mut Vec<f32>>,
);

/// Reads rows out of host logits, with its buffers reused from call to call.
#[derive(Default)]
pub struct Assembler {
    kernel: Kernel,
    /// One per thread.
    scratch: Vec<Scratch>,
    own_scratch: Scratch,
    readouts: Vec<RowReadout>,
    /// Merged preferences of rows that are compared, by their place in the call.
    kept: Vec<(usize, Vec<f32>)>,
    /// What consensus makes of the agents' messages, one row of logits for each.
    received: Vec<Vec<f32>>,
    /// The same for the messages of groups.
    groups: Vec<Vec<f32>>,
    widened: Vec<f32>,
    own: RowReadout,
    wire: Wire,
}

impl Assembler {
    /// An assembler that reads large batches on several threads. No result depends on how many.
    ///
    /// # Errors
    /// [`KernelError::Threads`] where they cannot be started.
    pub fn new(threads: usize) -> Result<Self, KernelError> {
        Ok(Self {
            kernel: Kernel::new(threads)?,
            ..Self::default()
        })
    }

    /// Reads out every row. `logits(row, agent)` are the logits `[vocab]` of the agent's last position.
    ///
    /// # Errors
    /// [`BackendError::Invalid`] where a row merges an agent without logits, merges nobody, names
    /// a target beyond the vocabulary, or is compared with a row that is not in the call.
    pub fn assemble<'a>(
        &mut self,
        info: &EnsembleInfo,
        rows: &[Row<'_>],
        logits: &dyn Fn(usize, AgentId) -> Option<Logits<'a>>,
        out: &mut Readout,
    ) -> Result<(), BackendError> {
        let compared = compared(rows)?;
        self.kept.clear();
        self.kept
            .extend(compared.iter().map(|&index| (index, Vec::new())));
        out.rows.resize_with(rows.len(), ReadRow::default);
        let mut experts = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter().enumerate() {
            let own = experts_of(index, row, logits)?;
            check_targets(row, &own)?;
            experts.push(own);
            out.rows[index].slot = Some(row.slot);
            out.rows[index].uplink_bytes = 0;
        }
        // Operators of a user's own stay on this thread: they may need what only it holds.
        let (whole, single): (Vec<usize>, Vec<usize>) = (0..rows.len()).partition(|&index| {
            let row = &rows[index];
            let known = row.consensus.spec().is_some() || experts[index].len() == 1;
            known && row.want.uplink.is_none() && row.want.groups.is_none()
        });
        self.read_whole(info, rows, &experts, &whole, out);
        for index in single {
            self.read(info, rows, index, &experts[index], &mut out.rows[index])?;
        }
        self.kept
            .retain(|(index, _)| out.rows[*index].read.finite.iter().all(|&f| f));
        for (index, row) in rows.iter().enumerate() {
            out.rows[index].versus = row
                .want
                .versus
                .and_then(|other| self.versus(index, other, rows));
        }
        Ok(())
    }

    /// Rows whose consensus sees the agents' own logits, all at once.
    fn read_whole(
        &mut self,
        info: &EnsembleInfo,
        rows: &[Row<'_>],
        experts: &[Vec<Logits<'_>>],
        whole: &[usize],
        out: &mut Readout,
    ) {
        self.readouts.clear();
        let mut kept = self.kept.iter_mut().peekable();
        let mut batch = Vec::with_capacity(whole.len());
        for &index in whole {
            let row = &rows[index];
            while kept.next_if(|(at, _)| *at < index).is_some() {}
            batch.push(dlmom_kernels::Row {
                experts: &experts[index],
                consensus: row.consensus,
                request: request(info, row),
                preferences: kept.next_if(|(at, _)| *at == index).map(|(_, row)| row),
            });
            self.readouts
                .push(std::mem::take(&mut out.rows[index].read));
        }
        self.kernel
            .read_rows(&mut batch, &mut self.scratch, &mut self.readouts);
        for (&index, read) in whole.iter().zip(self.readouts.drain(..)) {
            out.rows[index].read = read;
        }
    }

    fn read(
        &mut self,
        info: &EnsembleInfo,
        rows: &[Row<'_>],
        index: usize,
        experts: &[Logits<'_>],
        read: &mut ReadRow,
    ) -> Result<(), BackendError> {
        let row = &rows[index];
        let mut received = std::mem::take(&mut self.received);
        let mut grouped = std::mem::take(&mut self.groups);
        let place = self.kept.iter().position(|(at, _)| *at == index);
        let mut kept = place.map(|place| std::mem::take(&mut self.kept[place].1));
        let result = self.read_into(
            row,
            experts,
            &request(info, row),
            (&mut received, &mut grouped, kept.as_mut()),
            read,
        );
        self.received = received;
        self.groups = grouped;
        if let (Some(place), Some(kept)) = (place, kept) {
            self.kept[place].1 = kept;
        }
        result
    }

    fn read_into(
        &mut self,
        row: &Row<'_>,
        experts: &[Logits<'_>],
        request: &Request<'_>,
        (received, grouped, kept): Buffers<'_>,
        read: &mut ReadRow,
    ) -> Result<(), BackendError> {
        if let Some(uplink) = row.want.uplink {
            for (at, &logits) in experts.iter().enumerate() {
                // One agent's own distribution: consensus has nothing to merge.
                read.uplink_bytes +=
                    self.send_up(&[logits], row.consensus, None, uplink, slot(received, at))?;
            }
        }
        let seen: Vec<Logits<'_>> = match row.want.uplink {
            None => experts.to_vec(),
            Some(_) => received[..experts.len()]
                .iter()
                .map(|row| Logits::F32(row))
                .collect(),
        };
        let Some(groups) = row.want.groups else {
            self.read_merged(&seen, row.consensus, request, kept, &mut read.read);
            return Ok(());
        };
        // Entropies and flags are the agents', whatever their groups make of them.
        let (mut entropies, mut finite) = (Vec::new(), Vec::new());
        let mut agreed = true;
        let mut best = None;
        let most_probable = Request {
            top: 1,
            ..Request::default()
        };
        for &logits in &seen {
            let own = &mut self.own;
            let scratch = &mut self.own_scratch;
            self.kernel
                .read_row(&[logits], row.consensus, &most_probable, None, scratch, own);
            entropies.extend(&own.entropies);
            finite.extend(&own.finite);
            agreed &= *best.get_or_insert(own.ids.first().copied()) == own.ids.first().copied();
        }
        if finite.contains(&false) {
            // A failed row says which agent failed, and nothing else.
            self.read_merged(&seen, row.consensus, request, kept, &mut read.read);
            return Ok(());
        }
        let mut merged = false;
        for (at, members) in groups.members.iter().enumerate() {
            let views: Vec<Logits<'_>> = members
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
        let meta: Vec<Logits<'_>> = grouped[..groups.members.len()]
            .iter()
            .map(|row| Logits::F32(row))
            .collect();
        self.read_merged(&meta, row.consensus, request, kept, &mut read.read);
        if read.read.finite.iter().all(|&f| f) {
            read.read.entropies = entropies;
            read.read.finite = finite;
            read.read.agreed = agreed;
            read.read.merged |= merged;
        }
        Ok(())
    }

    fn read_merged(
        &mut self,
        experts: &[Logits<'_>],
        consensus: &dyn Consensus,
        request: &Request<'_>,
        kept: Option<&mut Vec<f32>>,
        out: &mut RowReadout,
    ) {
        let scratch = &mut self.own_scratch;
        self.kernel
            .read_row(experts, consensus, request, kept, scratch, out);
    }

    /// Merges experts and sends the result up in the form of `uplink`; returns the bytes. A row that is
    /// not finite arrives as it is, so that its flag stands.
    fn send_up(
        &mut self,
        experts: &[Logits<'_>],
        consensus: &dyn Consensus,
        stream: Option<Stream>,
        uplink: Uplink,
        received: &mut Vec<f32>,
    ) -> Result<u64, BackendError> {
        let failed = |e: LinkError| BackendError::Invalid(e.to_string());
        let vocab = experts.first().map_or(0, Logits::len);
        let request = Request {
            top: uplink.k.map_or(vocab, |k| k as usize),
            stream,
            ..Request::default()
        };
        let own = &mut self.own;
        let scratch = &mut self.own_scratch;
        self.kernel
            .read_row(experts, consensus, &request, None, scratch, own);
        received.clear();
        if own.finite.contains(&false) {
            if let Some(first) = experts.first() {
                received.extend_from_slice(first.widened(vocab, &mut self.widened));
            }
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
    places.sort_unstable();
    places.dedup();
    Ok(places)
}

/// What a row asks of its readout.
fn request<'a>(info: &'a EnsembleInfo, row: &Row<'a>) -> Request<'a> {
    let eos = row
        .merge
        .first()
        .and_then(|&agent| info.model_of(agent))
        .map_or(&[][..], |m| &m.eos[..]);
    Request {
        top: row.want.top as usize,
        per_agent_top: row.want.per_agent_top as usize,
        targets: row.want.targets,
        tempered: row.want.tempered,
        draw: row.want.draw,
        seen: row.want.seen,
        stream: row.want.stream,
        role: eos,
    }
}

fn check_targets(row: &Row<'_>, experts: &[Logits<'_>]) -> Result<(), BackendError> {
    let vocab = experts.first().map_or(0, Logits::len);
    let mut targets = row.want.targets.into_iter().flatten();
    match targets.find(|&&id| id as usize >= vocab) {
        Some(bad) => Err(BackendError::Invalid(format!(
            "target {bad} is beyond the vocabulary of {vocab}"
        ))),
        None => Ok(()),
    }
}

fn experts_of<'a>(
    index: usize,
    row: &Row<'_>,
    logits: &dyn Fn(usize, AgentId) -> Option<Logits<'a>>,
) -> Result<Vec<Logits<'a>>, BackendError> {
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
