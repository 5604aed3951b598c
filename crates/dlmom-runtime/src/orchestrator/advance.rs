//! One backend call over the slots that move, and what the backend has to compute before the next.

use std::time::Instant;

use dlmom_core::Draw;
use dlmom_packet::Meta;

use super::{Backend, BackendError, LaneId, Plan, RunError, Session, Sink, SlotId, Stop, one_line};
use crate::backend::{Embeddings, Feed, Groups, Payload, Row, Want};
use crate::ids::{AgentId, ModelId};
use crate::link::{LinkMessage, Support, Uplink};
use crate::outcome::Follow;
use crate::sample::{Active, NextFeed, Thought};

/// A vector that is due on a link: whose, what travels beside it, and its values.
type Vector = (SlotId, Meta, Vec<f32>);

impl Session {
    /// The slots that take part in the next call. A sample that is compared step by step waits for the other.
    pub(super) fn moving(&self) -> Vec<SlotId> {
        let mut moving: Vec<SlotId> = self
            .occupied()
            .into_iter()
            .filter(|&slot| self.active(slot).is_some_and(|active| self.moves(active)))
            .collect();
        if let Some(last) = self.last_prefill(&moving) {
            moving.retain(|&slot| {
                self.active(slot)
                    .is_none_or(|active| active.order <= last || self.span(active) <= 1)
            });
        }
        moving
    }

    /// Positions of a sample's next feed.
    fn span(&self, active: &Active) -> u32 {
        let agents = self.movers(active).len();
        active.queue.front().map_or(0, |feed| feed.longest(agents))
    }

    /// The last sample, in the order of admission, whose prompt is forwarded in the next call; none where all are.
    fn last_prefill(&self, moving: &[SlotId]) -> Option<u64> {
        let mut spans: Vec<(u64, u32)> = moving
            .iter()
            .filter_map(|&slot| self.active(slot))
            .map(|active| (active.order, self.span(active)))
            .filter(|&(_, span)| span > 1)
            .collect();
        // Where nobody waits for a step, there is nobody to keep waiting.
        if spans.len() == moving.len() {
            return None;
        }
        spans.sort_unstable();
        let mut total = 0_u32;
        let mut last = None;
        for (order, span) in spans {
            total = total.saturating_add(span);
            match last {
                Some(last) if total > self.prefill && order != last => return Some(last),
                _ => last = Some(order),
            }
        }
        None
    }

    fn moves(&self, active: &Active) -> bool {
        if active.queue.is_empty() {
            return false;
        }
        let other = match (active.rival(), active.leader()) {
            (Some(rival), _) => self.active(rival),
            (_, Some((leader, _))) => self.active(leader),
            _ => None,
        };
        let free = |a: &Active| matches!(a.leader(), Some((_, Follow::Free)));
        match other {
            Some(other) if free(active) || free(other) => !active.is_due() || other.is_due(),
            _ => true,
        }
    }

    /// The sample whose preferences a row is compared with, where both are read in this call.
    fn compared_with(&self, active: &Active, slots: &[SlotId]) -> Option<SlotId> {
        let (leader, _) = active.leader()?;
        let due = self.active(leader)?.is_due() && active.is_due();
        (due && slots.contains(&leader)).then_some(leader)
    }

    /// One backend call over `slots`, all of them occupied, into the session's readout.
    pub(super) fn advance(
        &mut self,
        backend: &mut dyn Backend,
        slots: &[SlotId],
    ) -> Result<(), BackendError> {
        self.copy_histories(backend, slots)?;
        let mut readout = std::mem::take(&mut self.readout);
        let actives: Vec<(&Active, SlotId)> = slots
            .iter()
            .filter_map(|&slot| Some((self.active(slot)?, slot)))
            .collect();
        let feeds: Vec<Vec<(AgentId, Feed<'_>)>> = actives
            .iter()
            .map(|(active, _)| self.feeds(active))
            .collect::<Result<_, _>>()?;
        // In the first parts of long prompts agents with shorter ones have nothing to read yet.
        let fed: Vec<Vec<AgentId>> = feeds
            .iter()
            .map(|feeds| feeds.iter().map(|&(agent, _)| agent).collect())
            .collect();
        let hook = self.consensus.as_deref();
        let rows: Vec<Row<'_>> = actives
            .iter()
            .zip(&feeds)
            .zip(&fed)
            .map(|((&(active, slot), feeds), fed)| {
                let plan = &self.plans[active.plan];
                Row {
                    slot,
                    feeds,
                    merge: fed,
                    consensus: if active.is_due() {
                        plan.consensus(hook)
                    } else {
                        &self.unread
                    },
                    want: self.want(active, self.compared_with(active, slots)),
                }
            })
            .collect();
        let started = Instant::now();
        let result = backend.advance(&rows, &mut readout);
        let spent = started.elapsed().as_secs_f64();
        let advanced = rows.len() as u64;
        let failure = rows.iter().find_map(|row| {
            Some((
                row.consensus.take_failure()?,
                row.consensus.name().to_owned(),
            ))
        });
        self.readout = readout;
        self.stats.backend_s += spent;
        self.stats.steps += 1;
        result?;
        self.stats.rows += advanced;
        if self.readout.rows.len() != slots.len() {
            return Err(BackendError::Poisoned(format!(
                "readout of {} rows for {} rows",
                self.readout.rows.len(),
                slots.len()
            )));
        }
        // The lanes have advanced on preferences that nobody merged: there is no way on.
        let inner = self
            .consensus
            .as_ref()
            .and_then(|c| Some((c.take_failure()?, c.name().to_owned())));
        match failure.or(inner) {
            Some((source, name)) => Err(BackendError::Fatal {
                context: format!("consensus `{name}`"),
                source,
            }),
            None => Ok(()),
        }
    }

    /// Gives rivals of one step the histories of the samples they are compared with.
    fn copy_histories(
        &mut self,
        backend: &mut dyn Backend,
        slots: &[SlotId],
    ) -> Result<(), BackendError> {
        for &slot in slots {
            let Some(active) = self.active(slot) else {
                continue;
            };
            if let Some((leader, Follow::OneStep)) = active.leader() {
                for place in self.movers(active) {
                    let agent = self.facts[place].agent;
                    let lane = |slot| LaneId { slot, agent };
                    backend.fork(lane(leader), lane(slot), None)?;
                }
            }
        }
        Ok(())
    }

    fn want<'a>(&'a self, active: &'a Active, versus: Option<SlotId>) -> Want<'a> {
        let plan = &self.plans[active.plan];
        let config = &plan.config;
        let fact = &self.facts[active.current];
        if !active.is_due() {
            // More is to come before anything is decided.
            return Want {
                top: 1,
                ..Want::default()
            };
        }
        let k = config.entries(fact.vocab);
        let rival = self.one_step_rival(active).map(|plan| &plan.config);
        let stream = active.stream();
        let uplink = Uplink {
            k: (config.link.message != LinkMessage::Logits).then_some(k),
            encoding: config.link.encoding,
            meta: self.meta(active),
        };
        Want {
            top: k,
            draw: (!config.sampling.is_argmax()).then_some(Draw {
                sampling: config.sampling,
                stream,
            }),
            seen: &active.visit.text,
            stream: Some(stream),
            hidden: [Some(config), rival]
                .into_iter()
                .flatten()
                .any(|c| c.link.message == LinkMessage::Hidden),
            // More entries than this row's own message has are those of the whole distribution.
            targets: rival
                .filter(|r| r.entries(fact.vocab) > k)
                .map(|_| &self.every_id[..fact.vocab as usize]),
            versus,
            uplink: (config.link.support == Support::Packet).then_some(uplink),
            groups: config.topology.hierarchy().map(|hierarchy| Groups {
                members: &hierarchy.groups,
                consensus: plan.inner(self.consensus.as_deref()),
                uplink,
            }),
            ..Want::default()
        }
    }

    /// The configuration of the rival that sends a message of its own from this row's readouts.
    fn one_step_rival(&self, active: &Active) -> Option<&Plan> {
        let rival = self.active(active.rival()?)?;
        matches!(rival.leader(), Some((_, Follow::OneStep))).then(|| &self.plans[rival.plan])
    }

    fn feeds<'f>(&self, active: &'f Active) -> Result<Vec<(AgentId, Feed<'f>)>, BackendError> {
        let movers = || self.movers(active).map(|place| self.facts[place].agent);
        let all = |feed: Feed<'f>| movers().map(|agent| (agent, feed)).collect();
        Ok(match active.queue.front() {
            Some(NextFeed::Tokens(tokens)) => movers()
                .zip(tokens)
                .filter(|(_, ids)| !ids.is_empty())
                .map(|(agent, ids)| (agent, Feed::Tokens(ids)))
                .collect(),
            Some(NextFeed::Packet(packet)) => all(Feed::Packets(std::slice::from_ref(packet))),
            Some(NextFeed::Packets(packets)) => all(Feed::Packets(packets)),
            Some(NextFeed::Payload(payload)) => all(Feed::Payload(payload)),
            Some(NextFeed::Payloads(payloads)) => movers()
                .zip(payloads)
                .map(|(agent, payload)| (agent, Feed::Payload(payload)))
                .collect(),
            Some(NextFeed::Embed(..) | NextFeed::Hidden(_)) | None => {
                return Err(BackendError::Invalid(
                    "a message is waiting for the backend".into(),
                ));
            }
        })
    }

    /// What travels beside a sample's messages.
    pub(super) fn meta(&self, active: &Active) -> Meta {
        Meta {
            fingerprint: self.facts[active.current].fingerprint,
            step: active.steps(),
        }
    }

    /// Settles every row of the readout, then has the backend compute what is due before the next call.
    pub(super) fn settle_all(
        &mut self,
        backend: &mut dyn Backend,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let readout = std::mem::take(&mut self.readout);
        for row in &readout.rows {
            self.compare(row);
        }
        // Rivals first: a sample that is settled gives its rival of one step the next message.
        let (rivals, others): (Vec<_>, Vec<_>) = readout.rows.iter().partition(|row| {
            let active = row.slot.and_then(|slot| self.active(slot));
            active.is_some_and(|active| active.leader().is_some())
        });
        let result = rivals
            .into_iter()
            .chain(others)
            .try_for_each(|row| self.settle(backend, row, sink));
        let slots = self.occupied();
        self.readout = readout;
        result?;
        self.send_vectors(backend, &slots)?;
        self.mirror(&slots);
        self.compress(backend, &slots)
    }

    /// Puts the inputs of samples before the rivals that follow them.
    fn mirror(&mut self, slots: &[SlotId]) {
        for &slot in slots {
            if let Some((leader, Follow::Inputs)) = self.active(slot).and_then(Active::leader) {
                let leads = self.active(leader).map(|a| (a.queue.clone(), a.observed));
                let (queue, observed) = leads.unwrap_or_default();
                if let Some(active) = self.slots[slot.index()].as_mut() {
                    active.queue = queue;
                    // A consensus that draws draws for the same step.
                    active.observed = observed;
                }
            }
        }
    }

    /// Turns packets that travel as embeddings, and hidden states, into what their receivers decode.
    fn send_vectors(
        &mut self,
        backend: &mut dyn Backend,
        slots: &[SlotId],
    ) -> Result<(), RunError> {
        let steps = self.stats.steps;
        let failed = |source: BackendError| match source {
            BackendError::Cancelled(source) => RunError::Interrupted(source),
            source => RunError::Backend {
                context: format!("messages after backend call {steps}"),
                source,
            },
        };
        let mut due: Vec<Vector> = self.mixtures(backend, slots).map_err(failed)?;
        due.extend(self.states(backend, slots).map_err(failed)?);
        for (slot, meta, values) in due {
            let Some(mut active) = self.slots[slot.index()].take() else {
                continue;
            };
            let fact = &self.facts[active.current];
            let (values, _) = self
                .link
                .embed(&values, meta, fact.scalar)
                .map_err(|e| failed(BackendError::Invalid(e.to_string())))?;
            if self.plans[active.plan].chain().is_some() {
                active
                    .thoughts
                    .push(Thought::Embed(active.observed - 1, values.clone()));
            }
            let hidden = fact.hidden;
            if let Some(front) = active.queue.front_mut() {
                *front = NextFeed::Payload(Payload::Embed { values, hidden });
            }
            self.slots[slot.index()] = Some(active);
        }
        Ok(())
    }

    fn mixtures(
        &mut self,
        backend: &mut dyn Backend,
        slots: &[SlotId],
    ) -> Result<Vec<Vector>, BackendError> {
        let mut waiting = Vec::new();
        let mut packets = Vec::new();
        // Messages of one kind are computed at once; all their models are the same.
        let mut models: Vec<ModelId> = Vec::new();
        for &slot in slots {
            if let Some(active) = self.active(slot)
                && let Some(NextFeed::Embed(packet, meta)) = active.queue.front()
            {
                waiting.push((slot, *meta));
                packets.push(packet.clone());
                models.push(self.facts[active.current].model);
            }
        }
        let mut due = Vec::with_capacity(waiting.len());
        let mut left: Vec<usize> = (0..waiting.len()).collect();
        while let Some(&first) = left.first() {
            let model = models[first];
            let (now, later): (Vec<usize>, Vec<usize>) =
                left.into_iter().partition(|&at| models[at] == model);
            left = later;
            let chosen: Vec<_> = now.iter().map(|&at| packets[at].clone()).collect();
            let started = Instant::now();
            let result = backend.embed(model, &chosen);
            self.stats.backend_s += started.elapsed().as_secs_f64();
            let rows = self.vectors(model, &result?, chosen.len())?;
            due.extend(now.into_iter().zip(rows).map(|(at, values)| {
                let (slot, meta) = waiting[at];
                (slot, meta, values)
            }));
        }
        Ok(due)
    }

    fn states(
        &mut self,
        backend: &mut dyn Backend,
        slots: &[SlotId],
    ) -> Result<Vec<Vector>, BackendError> {
        let mut due = Vec::new();
        for &slot in slots {
            let Some(active) = self.active(slot) else {
                continue;
            };
            let Some(&NextFeed::Hidden(meta)) = active.queue.front() else {
                continue;
            };
            // A rival of one step has the sample's history, and with it its hidden state.
            let source = match active.leader() {
                Some((leader, Follow::OneStep)) => leader,
                _ => slot,
            };
            let fact = &self.facts[active.current];
            let (agent, model) = (fact.agent, fact.model);
            let align = self.plans[active.plan].config.link.align;
            let started = Instant::now();
            let lane = LaneId {
                slot: source,
                agent,
            };
            let result = backend.hidden(&[lane], align);
            self.stats.backend_s += started.elapsed().as_secs_f64();
            for values in self.vectors(model, &result?, 1)? {
                due.push((slot, meta, values));
            }
        }
        Ok(due)
    }

    /// Checks what a backend answered and cuts it into rows.
    fn vectors(
        &self,
        model: ModelId,
        embeddings: &Embeddings,
        count: usize,
    ) -> Result<Vec<Vec<f32>>, BackendError> {
        let hidden = embeddings.hidden;
        if hidden != self.info.models[model.index()].hidden
            || hidden == 0
            || embeddings.values.len() != count * hidden as usize
        {
            return Err(BackendError::Poisoned(format!(
                "{} values for {count} vectors of width {hidden}",
                embeddings.values.len(),
            )));
        }
        Ok(embeddings
            .values
            .chunks_exact(hidden as usize)
            .map(<[f32]>::to_vec)
            .collect())
    }

    /// Lets the compressor work on the lanes that have grown enough.
    fn compress(&mut self, backend: &mut dyn Backend, slots: &[SlotId]) -> Result<(), RunError> {
        let Some(every) = self.compress_every else {
            return Ok(());
        };
        let mut due = Vec::new();
        for &slot in slots {
            let Some(mut active) = self.slots[slot.index()].take() else {
                continue;
            };
            for place in self.movers(&active) {
                let length = active.lengths[place];
                let last = active.compressed_at[place];
                // The rest of a prompt comes first.
                let whole = self.span(&active) <= 1;
                if whole && length > 0 && (last == 0 || length.saturating_sub(last) >= every.max(1))
                {
                    active.compressed_at[place] = length;
                    let agent = self.facts[place].agent;
                    due.push(LaneId { slot, agent });
                }
            }
            self.slots[slot.index()] = Some(active);
        }
        if due.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let result = backend.compress(&due);
        self.stats.backend_s += started.elapsed().as_secs_f64();
        result.map_err(|source| match source {
            BackendError::Cancelled(source) => RunError::Interrupted(source),
            source => RunError::Backend {
                context: format!("KV compression after backend call {}", self.stats.steps),
                source,
            },
        })
    }

    /// After a failed call nothing has advanced: tries every row once more, by itself. Those that fail again end, the others go on.
    pub(super) fn isolate(
        &mut self,
        backend: &mut dyn Backend,
        slots: &[SlotId],
        error: BackendError,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let fatal = |error: BackendError, steps: u64| match error {
            BackendError::Cancelled(source) => RunError::Interrupted(source),
            source => RunError::Backend {
                context: format!("backend call {steps}"),
                source,
            },
        };
        if ends_the_run(&error) {
            return Err(fatal(error, self.stats.steps));
        }
        // Rows that go by themselves are not compared any more.
        for &slot in slots {
            if self.active(slot).is_some_and(|a| a.leader().is_some())
                && let Some(rival) = self.slots[slot.index()].take()
            {
                self.finish(backend, slot, rival, Stop::Backend, None, sink)?;
            }
        }
        for &slot in slots {
            if sink.poll().is_break() {
                return Err(RunError::Interrupted(None));
            }
            if self.active(slot).is_none() {
                continue;
            }
            match self.advance(backend, &[slot]) {
                Ok(()) => {
                    self.failures = 0;
                    self.settle_all(backend, sink)?;
                }
                Err(error) if ends_the_run(&error) => {
                    return Err(fatal(error, self.stats.steps));
                }
                Err(error) => {
                    self.failures += 1;
                    let line = one_line(&error);
                    if let Some(active) = self.slots[slot.index()].take() {
                        self.finish(backend, slot, active, Stop::Backend, Some(line), sink)?;
                    }
                    if self.failures >= self.max_failures {
                        return Err(fatal(error, self.stats.steps));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Whether trying rows by themselves would not help.
fn ends_the_run(error: &BackendError) -> bool {
    matches!(
        error,
        BackendError::Cancelled(_) | BackendError::Poisoned(_) | BackendError::Fatal { .. }
    )
}
