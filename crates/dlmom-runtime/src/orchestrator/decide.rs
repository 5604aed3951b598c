//! From a row's readout to the sample's next input, or its end.

use std::borrow::Cow;

use dlmom_core::{Force, Inject, Mode, Reason, RowReadout, Stream, Triggers, noise, normalized};
use dlmom_packet::{BeliefPacket, Meta, embed_len};

use super::plan::{AgentFacts, Plan};
use super::{
    Backend, ConfigError, Donors, EOS_CERTAIN, LaneId, Link, RunError, Session, Sink, SlotId,
    StepEvent, Stop, rule_failure,
};
use crate::backend::{Payload, ReadRow};
use crate::config::Signal;
use crate::controls::{PacketControl, control, divergences, from_even};
use crate::link::{LinkMessage, Support};
use crate::outcome::Follow;
use crate::sample::{Active, NextFeed, Step, Taken, Thought};
use crate::topology::{Handoff, Trigger};

/// What becomes of a sample after a step.
pub(super) enum Flow {
    Go,
    /// The sample ends.
    End(Stop),
    /// The agent in control has ended; in a chain another may take over.
    EndVisit(Stop),
    /// Another agent takes over.
    HandOver(Trigger),
}

/// Why a sample goes no further.
pub(super) enum End {
    Sample(Stop, String),
    Run(RunError),
}

/// A message on its way to the agents.
struct Message {
    feed: NextFeed,
    taken: Taken,
    /// What a transcript keeps of it; vectors are kept once they are known.
    thought: Option<Thought>,
    bytes: u64,
}

/// What making a message needs besides the sample.
struct Sender<'a> {
    plan: &'a Plan,
    facts: &'a [AgentFacts],
    link: &'a mut dyn Link,
    donors: &'a Donors,
    meta: Meta,
}

fn broken(error: impl std::fmt::Display) -> (Stop, String) {
    (Stop::Backend, error.to_string())
}

impl Session {
    /// Notes how far a rival's row is from the sample's.
    pub(super) fn compare(&mut self, row: &ReadRow) {
        let Some(slot) = row.slot else { return };
        let Some(versus) = row.versus else { return };
        let Some((leader, _)) = self.active(slot).and_then(Active::leader) else {
            return;
        };
        if let Some(active) = self.slots[leader.index()].as_mut() {
            active.divergences.step.push(active.observed);
            active.divergences.kl.push(versus.kl);
            active.divergences.cosine.push(versus.cosine);
        }
    }

    /// Turns one row's readout into the sample's next input, or its end.
    pub(super) fn settle(
        &mut self,
        backend: &mut dyn Backend,
        row: &ReadRow,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let Some(slot) = row.slot else { return Ok(()) };
        let Some(mut active) = self.slots.get_mut(slot.index()).and_then(Option::take) else {
            return Ok(());
        };
        match self.step(backend, slot, &mut active, row, sink) {
            Ok(None) => {
                self.slots[slot.index()] = Some(active);
                Ok(())
            }
            Ok(Some((stop, error))) => self.finish(backend, slot, active, stop, error, sink),
            Err(End::Sample(stop, error)) => {
                self.finish(backend, slot, active, stop, Some(error), sink)
            }
            Err(End::Run(error)) => {
                // Still in its slot, so that closing the session frees its lanes.
                self.slots[slot.index()] = Some(active);
                Err(error)
            }
        }
    }

    /// One call's consequences for a sample; how it ends, where it does.
    fn step(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        active: &mut Active,
        row: &ReadRow,
        sink: &mut dyn Sink,
    ) -> Result<Option<(Stop, Option<String>)>, End> {
        let mut read = Vec::new();
        if let Some(fed) = active.queue.front() {
            for (at, place) in self.movers(active).enumerate() {
                let positions = fed.positions(at);
                active.lengths[place] += positions;
                active.forwarded[place] += positions;
                if positions > 0 {
                    read.push(place);
                }
            }
        }
        let due = active.is_due();
        active.queue.pop_front();
        if let Some(bad) = row.read.finite.iter().position(|finite| !finite) {
            let place = read
                .get(bad)
                .or(read.last())
                .copied()
                .unwrap_or(active.current);
            let name = &self.info.models[self.facts[place].model.index()].name;
            return Err(End::Sample(
                Stop::NanInf,
                format!(
                    "NaN or Inf in the logits of {name} at step {}",
                    active.observed
                ),
            ));
        }
        if !due || matches!(active.leader(), Some((_, Follow::Inputs | Follow::OneStep))) {
            return Ok(None);
        }
        let flow = self.decide(backend, slot, active, row, sink)?;
        let stop = match flow {
            Flow::Go => return Ok(None),
            Flow::End(stop) => return Ok(Some((stop, None))),
            Flow::HandOver(trigger) => {
                self.hand_over(backend, slot, active, trigger, sink)?;
                return Ok(None);
            }
            Flow::EndVisit(stop) => stop,
        };
        match self.after_visit(active, stop, sink) {
            Ok(Some(trigger)) => {
                self.hand_over(backend, slot, active, trigger, sink)?;
                Ok(None)
            }
            Ok(None) => Ok(Some((stop, None))),
            Err(error) => Ok(Some((Stop::Handoffs, Some(error)))),
        }
    }

    fn decide(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        active: &mut Active,
        row: &ReadRow,
        sink: &mut dyn Sink,
    ) -> Result<Flow, End> {
        let read = &row.read;
        let sent = (active.uplink, active.downlink);
        self.count_uplink(active, row);
        let step = self.observe(active, read)?;
        let decision = step.decision;
        let at = active.observed;
        let stream = active.stream();
        active.observed += 1;
        let hands_over = decision.mode == Mode::Explicit && self.thinks_silently(active);
        let left_latent = decision.switched && decision.mode == Mode::Explicit;
        if left_latent && !hands_over {
            self.drop_latent(backend, slot, active)?;
        }
        active.note_mode(decision.mode);
        let ended = |(stop, error)| End::Sample(stop, error);
        let (flow, taken) = if hands_over {
            let trigger = match decision.reason {
                Reason::LatentBudget => Trigger::LatentBudget,
                Reason::AnswerReserve => Trigger::StepBudget,
                _ => Trigger::Convergence,
            };
            (Flow::HandOver(trigger), Taken::default())
        } else if decision.mode == Mode::Latent {
            if active.segments.last() == Some(&1) {
                active.stretch_start.clone_from(&active.lengths);
            }
            self.latent(active, read, &stream, decision.switched)
                .map_err(ended)?
        } else {
            self.explicit(active, read, step).map_err(ended)?
        };
        let model = self.facts[active.current].model;
        active.record(read, step, &taken, &self.info.models[model.index()]);
        if active.leader().is_none() {
            sink.step(&StepEvent {
                key: &active.job.key,
                step: at,
                decision,
                entropy: step.entropy,
                observed: step.observed,
                read,
                agent: active.current as u32,
                packet: taken.packet.as_ref(),
                noise_kl: taken.kl,
                noise_js: taken.js,
                token: taken.token,
                injected: &taken.injected,
                bytes: (active.uplink - sent.0, active.downlink - sent.1),
                model: self.model_of(active),
            });
        }
        if let Some(packet) = taken.packet
            && active.trace.is_some()
        {
            active.packets.push((at, packet));
        }
        Ok(flow)
    }

    fn count_uplink(&self, active: &mut Active, row: &ReadRow) {
        if self.plans[active.plan].config.link.support == Support::Full {
            active.uplink += self
                .movers(active)
                .map(|place| {
                    let fact = &self.facts[place];
                    fact.dtype_bytes * u64::from(fact.vocab)
                })
                .sum::<u64>();
        }
        // What agents and groups sent up as messages.
        active.uplink += row.uplink_bytes;
    }

    /// The controller's decision on a readout.
    fn observe(&self, active: &mut Active, read: &RowReadout) -> Result<Step, End> {
        let plan = &self.plans[active.plan];
        let config = &plan.config;
        let fact = &self.facts[active.current];
        let nats = read.entropies.iter().sum::<f64>() / read.entropies.len().max(1) as f64;
        let entropy = normalized(nats, fact.vocab as usize);
        let observed = crate::replay::observed(
            config.controller.alpha_unit,
            entropy,
            &read.entropies,
            config.ranks.as_ref(),
        )
        .ok_or_else(|| End::Run(ConfigError::NoRanks.into()))?;
        let force = self.force(active, read);
        // Whatever is drawn in its place.
        active.locked |= active.last_mode == Some(Mode::Latent) && self.lock_leads(active, read);
        let decision = active
            .controller
            .observe(observed, force)
            .map_err(|e| End::Run(rule_failure(&active.job.key, e)))?;
        active.note(entropy, read);
        Ok(Step {
            decision,
            force,
            entropy,
            observed,
        })
    }

    /// Whether the token that ends the thinking is the most probable one.
    fn lock_leads(&self, active: &Active, read: &RowReadout) -> bool {
        let lock = self.plans[active.plan].texts.lock.get(active.current);
        lock.and_then(|ids| ids.first())
            .is_some_and(|lock| read.ids.first() == Some(lock))
    }

    fn force(&self, active: &Active, read: &RowReadout) -> Option<Force> {
        let plan = &self.plans[active.plan];
        let fact = &self.facts[active.current];
        let top = read.ids.first();
        let terminated = active.triggers.as_ref().and_then(Triggers::force);
        if terminated.is_some() {
            terminated
        } else if active.locked || self.lock_leads(active, read) {
            Some(Force::Locked)
        } else if top.is_some_and(|id| fact.eos.contains(id)) && read.role_mass >= EOS_CERTAIN {
            Some(Force::EosCertain)
        } else if (!self.thinks(active) || self.thinks_silently(active))
            && active.visit.steps.saturating_sub(active.visit_steps()) <= plan.config.answer_reserve
        {
            Some(Force::AnswerReserve)
        } else {
            None
        }
    }

    /// Cuts the latent stretch that has just ended out of every lane, where the control asks for it.
    fn drop_latent(
        &self,
        backend: &mut dyn Backend,
        slot: SlotId,
        active: &mut Active,
    ) -> Result<(), End> {
        if !self.plans[active.plan].config.controls.drop_latent {
            return Ok(());
        }
        // A rival that is fed the sample's inputs forgets what the sample forgets.
        let follower = active.rival().filter(|&rival| {
            let leader = self.active(rival).and_then(Active::leader);
            matches!(leader, Some((_, Follow::Inputs)))
        });
        for place in self.movers(active) {
            let start = active.stretch_start[place];
            let agent = self.facts[place].agent;
            for slot in [Some(slot), follower].into_iter().flatten() {
                backend
                    .truncate(LaneId { slot, agent }, start)
                    .map_err(|source| {
                        End::Run(RunError::Backend {
                            context: "cutting a latent stretch".into(),
                            source,
                        })
                    })?;
            }
            active.lengths[place] = start;
            active.compressed_at[place] = active.compressed_at[place].min(start);
        }
        Ok(())
    }

    fn sender(&mut self, plan: usize, meta: Meta) -> Sender<'_> {
        Sender {
            plan: &self.plans[plan],
            facts: &self.facts,
            link: &mut *self.link,
            donors: &self.donors,
            meta,
        }
    }

    fn latent(
        &mut self,
        active: &mut Active,
        read: &RowReadout,
        stream: &Stream,
        entering: bool,
    ) -> Result<(Flow, Taken), (Stop, String)> {
        let meta = self.meta(active);
        let movers = self.movers(active);
        let message = self.sender(active.plan, meta).message(
            active,
            read,
            stream,
            movers.clone(),
            entering,
        )?;
        if let Some(rival) = active.rival()
            && let Some(mut other) = self.slots[rival.index()].take()
        {
            if let Some((_, Follow::OneStep)) = other.leader() {
                // The same readout, by the rival's rules; where they make no message of it there is nothing to compare.
                let vocab = self.facts[active.current].vocab;
                let its = resized(read, self.plans[other.plan].config.entries(vocab));
                let its = self
                    .sender(other.plan, meta)
                    .message(active, &its, stream, movers, entering);
                other.current = active.current;
                other.observed = active.observed;
                other.queue.clear();
                other.queue.extend(its.ok().map(|message| message.feed));
            }
            self.slots[rival.index()] = Some(other);
        }
        let Message {
            feed,
            taken,
            thought,
            bytes,
        } = message;
        active.downlink += bytes;
        active.latent += 1;
        active.mass_sum += f64::from(read.mass);
        active.kl_sum = active.kl_sum.zip(taken.kl).map(|(sum, kl)| sum + kl);
        active.js_sum += taken.js;
        if self.plans[active.plan].chain().is_some() {
            active.thoughts.extend(thought);
        }
        active.queue.push_back(feed);
        Ok((self.spent(active), taken))
    }

    fn explicit(
        &mut self,
        active: &mut Active,
        read: &RowReadout,
        step: Step,
    ) -> Result<(Flow, Taken), (Stop, String)> {
        let left_latent = step.decision.switched;
        if let Some(texts) = self.injection(active, step) {
            let of_movers: Vec<Vec<u32>> = self.movers(active).map(|p| texts[p].clone()).collect();
            active.injected += of_movers[0].len() as u32;
            active.visit.text.extend_from_slice(&of_movers[0]);
            let taken = Taken {
                injected: of_movers[0].clone(),
                ..Taken::default()
            };
            active.queue.push_back(NextFeed::Tokens(of_movers));
            return Ok((self.spent(active), taken));
        }
        let plan = &self.plans[active.plan];
        let fact = &self.facts[active.current];
        let token = if plan.config.sampling.is_argmax() {
            read.ids.first().copied()
        } else {
            read.drawn
        };
        let token = token.ok_or_else(|| broken("the readout holds no token to print"))?;
        if fact.eos.contains(&token) {
            return Ok((Flow::EndVisit(Stop::Eos), Taken::default()));
        }
        let vocab = fact.vocab;
        active.locked |= plan
            .texts
            .lock
            .get(active.current)
            .is_some_and(|ids| ids.first() == Some(&token));
        let fed = match &plan.config.exit_signal {
            Some(signal) if left_latent => {
                let packet = as_read(read, vocab)?;
                with_signal(&packet, signal, plan.texts.exit[active.current][0])?
            }
            _ => BeliefPacket::one_hot(token, vocab).map_err(broken)?,
        };
        let encoding = plan.config.link.encoding;
        let meta = self.meta(active);
        let (received, bytes) = self.link.packet(&fed, meta, encoding).map_err(broken)?;
        let movers = self.movers(active);
        active.visit.text.push(token);
        active.explicit += 1;
        active.downlink += bytes as u64 * movers.len() as u64;
        if self.plans[active.plan].chain().is_some() {
            active
                .thoughts
                .push(Thought::Packet(active.observed - 1, received.clone()));
        }
        active.queue.push_back(if received.k() == 1 {
            NextFeed::Tokens(vec![received.ids().to_vec(); movers.len()])
        } else {
            NextFeed::Packet(received)
        });
        let last = active.triggers.as_mut().is_some_and(Triggers::printed);
        let taken = Taken {
            token: Some(token),
            ..Taken::default()
        };
        let flow = if last {
            Flow::EndVisit(Stop::Budget)
        } else {
            self.spent(active)
        };
        Ok((flow, taken))
    }

    /// The text, in every agent's tokens, that is fed in this step instead of a token.
    fn injection(&self, active: &mut Active, step: Step) -> Option<Vec<Vec<u32>>> {
        if !step.decision.switched {
            return None;
        }
        let texts = &self.plans[active.plan].texts;
        match active.triggers.as_mut().and_then(Triggers::exit) {
            Some(Inject::Converge) => Some(texts.converge.clone()),
            Some(Inject::Terminate) => Some(texts.terminate.clone()),
            None => (step.decision.reason == Reason::LatentBudget && !texts.cue.is_empty())
                .then(|| texts.cue.clone()),
        }
    }

    /// Whether the steps or the positions are spent.
    fn spent(&self, active: &Active) -> Flow {
        let plan = &self.plans[active.plan];
        if active.steps() >= plan.config.max_steps {
            return if plan.chain().is_some() {
                Flow::EndVisit(Stop::Budget)
            } else {
                Flow::End(Stop::Budget)
            };
        }
        let fed = active.queue.back();
        let full = self.movers(active).enumerate().any(|(at, place)| {
            let positions = fed.map_or(0, |f| f.positions(at));
            active.lengths[place] + positions > active.limits[place]
        });
        if full {
            return Flow::End(Stop::Context);
        }
        if active.visit_steps() >= active.visit.steps {
            return if self.thinks(active) {
                Flow::HandOver(Trigger::StepBudget)
            } else {
                Flow::EndVisit(Stop::Budget)
            };
        }
        Flow::Go
    }

    /// Whether the agent in control hands over without printing.
    fn thinks_silently(&self, active: &Active) -> bool {
        self.thinks(active)
            && self.plans[active.plan]
                .chain()
                .is_some_and(|chain| chain.handoff != Handoff::Text)
    }
}

impl Sender<'_> {
    /// The message of a latent step of `active`, by this plan's rules.
    fn message(
        &mut self,
        active: &Active,
        read: &RowReadout,
        stream: &Stream,
        movers: std::ops::Range<usize>,
        entering: bool,
    ) -> Result<Message, (Stop, String)> {
        let plan = self.plan;
        let config = &plan.config;
        let fact = &self.facts[active.current];
        let receivers = movers.len() as u64;
        let vector_bytes = |facts: &[AgentFacts]| -> u64 {
            facts
                .iter()
                .map(|f| embed_len(f.hidden as usize, f.scalar) as u64)
                .sum()
        };
        if config.link.message == LinkMessage::Hidden {
            return Ok(Message {
                feed: NextFeed::Hidden(self.meta),
                taken: Taken::default(),
                thought: None,
                bytes: vector_bytes(&self.facts[movers]),
            });
        }
        let (packet, taken) = self.packet(active, read, stream, entering)?;
        if config.controls.packet == PacketControl::Filler {
            return Ok(Message {
                feed: NextFeed::Payloads(plan.filler[movers.clone()].to_vec()),
                thought: match &plan.filler[active.current] {
                    Payload::Embed { values, .. } => {
                        Some(Thought::Embed(active.observed - 1, values.clone()))
                    }
                    Payload::Dense { .. } => None,
                },
                taken: Taken {
                    packet: None,
                    kl: None,
                    js: from_even(&as_read(read, fact.vocab)?),
                    token: None,
                    injected: Vec::new(),
                },
                bytes: vector_bytes(&self.facts[movers]),
            });
        }
        let encoding = config.link.encoding;
        // Receivers are fed what came through the link, so that its bytes are the real ones.
        Ok(match config.link.message {
            LinkMessage::Belief => {
                let (received, bytes) = self
                    .link
                    .packet(&packet, self.meta, encoding)
                    .map_err(broken)?;
                Message {
                    feed: NextFeed::Packet(received.clone()),
                    thought: Some(Thought::Packet(active.observed - 1, received.clone())),
                    taken: Taken {
                        packet: Some(received),
                        ..taken
                    },
                    bytes: bytes as u64 * receivers,
                }
            }
            LinkMessage::Logits => {
                let mut probs = vec![0.0_f32; fact.vocab as usize];
                for (id, p) in packet.iter() {
                    probs[id as usize] = p;
                }
                let (probs, bytes) = self
                    .link
                    .dense(&probs, self.meta, encoding)
                    .map_err(broken)?;
                let vocab = fact.vocab;
                Message {
                    thought: Some(Thought::Dense(active.observed - 1, probs.clone())),
                    feed: NextFeed::Payload(Payload::Dense { probs, vocab }),
                    taken: Taken {
                        packet: Some(packet),
                        ..taken
                    },
                    bytes: bytes as u64 * receivers,
                }
            }
            // Its length is known before the backend has mixed it.
            LinkMessage::Embed | LinkMessage::Hidden => Message {
                feed: NextFeed::Embed(packet.clone(), self.meta),
                thought: None,
                taken: Taken {
                    packet: Some(packet),
                    ..taken
                },
                bytes: vector_bytes(&self.facts[movers]),
            },
        })
    }

    /// The packet after filter, noise, control and signal, with its divergences.
    fn packet(
        &self,
        active: &Active,
        read: &RowReadout,
        stream: &Stream,
        entering: bool,
    ) -> Result<(BeliefPacket, Taken), (Stop, String)> {
        let plan = self.plan;
        let config = &plan.config;
        let vocab = self.facts[active.current].vocab;
        let mixed = noise::mix(
            &config.filter,
            &config.noise,
            &read.ids,
            &read.probs,
            stream,
        )
        .map_err(broken)?;
        let packet = BeliefPacket::new(mixed.ids, mixed.probs, read.mass, vocab).map_err(broken)?;
        let mut taken = Taken {
            kl: Some(mixed.kl),
            js: mixed.js,
            ..Taken::default()
        };
        let mut packet = packet;
        if config.controls.packet != PacketControl::Real {
            let made = control(
                config.controls.packet,
                &packet,
                &active.job.key.item_id,
                active.latent,
                self.donors,
                stream,
            )
            .map_err(broken)?;
            packet = made.packet;
            // What the filter and the noise did counts as well.
            (taken.kl, taken.js) = divergences(&packet, &as_read(read, vocab)?);
        }
        if let Some(signal) = &config.enter_signal
            && entering
        {
            packet = with_signal(&packet, signal, plan.texts.enter[active.current][0])?;
        }
        Ok((packet, taken))
    }
}

/// The packet of a readout, before anything is done to it.
fn as_read(read: &RowReadout, vocab: u32) -> Result<BeliefPacket, (Stop, String)> {
    BeliefPacket::new(read.ids.clone(), read.probs.clone(), read.mass, vocab).map_err(broken)
}

/// A readout with another number of entries. More than it has are taken from the log-probabilities of the
/// whole vocabulary, which rows with such rivals ask for.
fn resized(read: &RowReadout, entries: u32) -> Cow<'_, RowReadout> {
    let entries = entries as usize;
    if entries == read.ids.len() {
        return Cow::Borrowed(read);
    }
    let mut chosen: Vec<(u32, f64)> = if entries < read.ids.len() {
        let mass = f64::from(read.mass);
        let own = read.ids.iter().zip(&read.probs);
        own.map(|(&id, &p)| (id, f64::from(p) * mass)).collect()
    } else {
        let logs = (0_u32..).zip(&read.target_logprobs);
        let mut all: Vec<(u32, f64)> = logs.map(|(id, &log)| (id, log)).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        all.into_iter().map(|(id, log)| (id, log.exp())).collect()
    };
    chosen.truncate(entries);
    let mass: f64 = chosen.iter().map(|(_, p)| p).sum();
    Cow::Owned(RowReadout {
        ids: chosen.iter().map(|&(id, _)| id).collect(),
        probs: chosen.iter().map(|&(_, p)| (p / mass) as f32).collect(),
        mass: mass.min(1.0) as f32,
        ..read.clone()
    })
}

/// A packet with a token mixed in: `(1 - w) p + w [token]`.
fn with_signal(
    packet: &BeliefPacket,
    signal: &Signal,
    token: u32,
) -> Result<BeliefPacket, (Stop, String)> {
    let keep = 1.0 - signal.weight;
    let (mut ids, mut probs): (Vec<u32>, Vec<f32>) = packet
        .iter()
        .map(|(id, p)| (id, (f64::from(p) * keep) as f32))
        .unzip();
    if let Some(at) = ids.iter().position(|&id| id == token) {
        probs[at] += signal.weight as f32;
    } else {
        ids.push(token);
        probs.push(signal.weight as f32);
    }
    BeliefPacket::new(ids, probs, packet.mass(), packet.vocab()).map_err(broken)
}
