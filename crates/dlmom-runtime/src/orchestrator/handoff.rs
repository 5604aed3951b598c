//! Control passing from one agent of a chain to the next.

use dlmom_core::Stream;

use super::decide::End;
use super::plan::Plan;
use super::prompt::{Prompt, chunks};
use super::{Backend, BackendError, HandoffRecord, LaneId, RunError, Session, Sink, SlotId, Stop};
use crate::backend::{Message, PromptSource};
use crate::config::LoopConfig;
use crate::controls::{HandoffControl, shuffled};
use crate::outcome::Follow;
use crate::sample::{Active, Pairing, Visit};
use crate::topology::{Handoff, Sequential, Trigger};

/// Whether the agent at a place hands over to the next when it is done, `used` handoffs behind it.
fn thinks(chain: &Sequential, place: usize, used: u32) -> bool {
    place + 1 < chain.roles.len() && used < chain.limit()
}

/// Agents that are yet to act from a place on, `used` handoffs behind it: handoffs may run out before the chain does.
fn to_come(chain: &Sequential, place: usize, used: u32) -> u32 {
    let left = chain.limit().saturating_sub(used).saturating_add(1);
    left.min((chain.roles.len() - place) as u32)
}

/// Latent steps of a visit: what the role says, else an even share of what is left among the agents to come, or all
/// that is left for the agent that answers.
pub(crate) fn latent_share(config: &LoopConfig, place: usize, taken: u32, handoffs: u32) -> u32 {
    let left = config.controller.max_latent_steps.saturating_sub(taken);
    let Some(chain) = config.topology.chain() else {
        return left;
    };
    match chain.roles[place].latent_steps {
        Some(given) => given.min(left),
        None if thinks(chain, place, handoffs) => left.div_ceil(to_come(chain, place, handoffs)),
        None => left,
    }
}

/// Most steps of a visit. An agent that thinks silently is bound by its latent steps alone; one that
/// writes notes has an even share of what is left; one that answers has half, while somebody could take
/// over from it, else all.
pub(super) fn step_share(plan: &Plan, active: &Active) -> u32 {
    let left = plan.config.max_steps.saturating_sub(active.steps());
    let Some(chain) = plan.chain() else {
        return left;
    };
    let used = active.handoff_log.len() as u32;
    if thinks(chain, active.current, used) {
        if chain.handoff == Handoff::Text {
            left.div_ceil(to_come(chain, active.current, used))
        } else {
            left
        }
    } else if chain.on_failure.is_some() && used < chain.limit() {
        left.div_ceil(2)
    } else {
        left
    }
}

impl Session {
    /// Whether the agent in control hands over when it is done, instead of answering.
    pub(super) fn thinks(&self, active: &Active) -> bool {
        self.plans[active.plan]
            .chain()
            .is_some_and(|chain| thinks(chain, active.current, active.handoff_log.len() as u32))
    }

    /// Who goes on after an agent has ended: `None` ends the sample, an error says that somebody should
    /// have and no handoff is left.
    pub(super) fn after_visit(
        &self,
        active: &Active,
        stop: Stop,
        sink: &mut dyn Sink,
    ) -> Result<Option<Trigger>, String> {
        let plan = &self.plans[active.plan];
        let Some(chain) = plan.chain() else {
            return Ok(None);
        };
        if active.steps() >= plan.config.max_steps {
            return Ok(None);
        }
        if self.thinks(active) {
            return Ok(Some(if stop == Stop::Eos {
                Trigger::Convergence
            } else {
                Trigger::StepBudget
            }));
        }
        if chain.on_failure.is_none() {
            return Ok(None);
        }
        let text = self.model_of(active).decode(&active.visit.text);
        if sink.answered(&active.job.key, &text) {
            return Ok(None);
        }
        let used = active.handoff_log.len() as u32;
        if used < chain.limit() {
            return Ok(Some(Trigger::Failure));
        }
        Err(format!(
            "{} gave no answer, and {used} of {} handoffs are used",
            chain.roles[active.current].name,
            chain.limit()
        ))
    }

    /// Gives control to the next agent of the chain: its lane is opened, its prompt and what it is handed
    /// wait to be fed.
    pub(super) fn hand_over(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        active: &mut Active,
        trigger: Trigger,
        sink: &mut dyn Sink,
    ) -> Result<(), End> {
        let plan = &self.plans[active.plan];
        let Some(chain) = plan.chain().cloned() else {
            return Ok(());
        };
        let from = active.current;
        let to = match (trigger, chain.on_failure) {
            (Trigger::Failure, Some(place)) => place as usize,
            _ => from + 1,
        };
        if chain.handoff == Handoff::Text {
            let text = self.model_of(active).decode(&active.visit.text);
            active.notes.push((from, text));
        }
        active.queue.clear();
        let control = self.plans[active.plan].config.controls.handoff;
        let notes = notes(active, &chain, to, control);
        let asked = self.asked(backend, active, to, notes.as_deref())?;
        let (feeds, positions, bytes) = match chain.handoff {
            Handoff::Transcript => {
                let carried = self.transcript(backend, active, to)?;
                (carried.feeds, carried.positions, carried.bytes)
            }
            Handoff::Text => {
                let bytes = notes.as_ref().map_or(0, String::len) as u64;
                (Vec::new(), asked.notes, bytes)
            }
            Handoff::Kv => {
                let held = active.lengths[from];
                let bytes = u64::from(held) * self.facts[from].kv_bytes_per_position;
                (Vec::new(), held, bytes)
            }
        };
        let record = HandoffRecord {
            step: active.observed - 1,
            from: from as u32,
            to: to as u32,
            trigger,
            payload: chain.handoff,
            positions,
            bytes,
        };
        let carried = feeds.iter().map(|feed| feed.positions(0)).sum();
        self.open_visit(backend, slot, active, &chain, to, (asked.ids, carried))?;
        active.queue.extend(feeds);
        active.handoff_bytes += record.bytes;
        if active.leader().is_none() {
            sink.handoff(&active.job.key, &record);
        }
        active.handoff_log.push(record);
        self.start_visit(active, to)?;
        self.bring_rival(backend, slot, active, sink)
            .map_err(End::Run)
    }

    /// The next agent's lane, holding what a cache handed over, with the prompt waiting; behind it comes a
    /// transcript of so many positions.
    fn open_visit(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        active: &mut Active,
        chain: &Sequential,
        to: usize,
        (prompt, carried): (Vec<u32>, u32),
    ) -> Result<(), End> {
        let from = active.current;
        let fact = &self.facts[to];
        let length = prompt.len() as u32;
        let lane = self
            .lane(slot, fact, active, to, length)
            .map_err(|error| End::Sample(Stop::Prompt, error))?;
        let failed = |source: BackendError| match source {
            BackendError::Cancelled(source) => End::Run(RunError::Interrupted(source)),
            source => End::Sample(Stop::Backend, super::one_line(&source)),
        };
        let mut held = 0;
        if chain.handoff == Handoff::Kv {
            held = active.lengths[from];
            if held + length > lane.max_len {
                return Err(End::Sample(
                    Stop::Context,
                    format!(
                        "a cache of {held} positions and a prompt of {length} tokens, room for {}",
                        lane.max_len
                    ),
                ));
            }
        }
        if length + carried > lane.max_len {
            return Err(End::Sample(
                Stop::Context,
                format!(
                    "a prompt of {length} tokens and {carried} positions handed over, room for {}",
                    lane.max_len
                ),
            ));
        }
        // An agent that takes over from itself goes on in the lane it has.
        if !(chain.handoff == Handoff::Kv && to == from) {
            backend.open(&[lane]).map_err(failed)?;
            if chain.handoff == Handoff::Kv {
                let donor = LaneId {
                    slot,
                    agent: self.facts[from].agent,
                };
                backend.fork(donor, lane.lane, None).map_err(failed)?;
            }
        }
        active.lengths[to] = held;
        active.limits[to] = lane.max_len;
        active.compressed_at[to] = 0;
        active.prompt_tokens[to] += length;
        self.stats.prompts += u64::from(length);
        let prompt = if held == 0 {
            let source = &active.job.prompts[to];
            self.beginnings
                .prompt(backend, self.facts[to].model, source, prompt)
                .map_err(failed)?
        } else {
            Prompt {
                ids: prompt,
                shared: 0,
            }
        };
        active.queue.extend(chunks(&[prompt]));
        Ok(())
    }

    /// Fresh counts and a fresh controller for the agent that takes over.
    fn start_visit(&self, active: &mut Active, to: usize) -> Result<(), End> {
        let plan = &self.plans[active.plan];
        active.earlier.0 += active.controller.switches();
        active.earlier.1 += active.controller.latent_steps();
        active.current = to;
        active.locked = false;
        active.triggers = plan.triggers().map_err(End::Run)?;
        active.last_mode = None;
        let handoffs = active.handoff_log.len() as u32;
        active.visit = Visit {
            text: Vec::new(),
            steps_before: active.steps(),
            steps: 0,
        };
        active.visit.steps = step_share(plan, active);
        let latent = latent_share(&plan.config, to, active.earlier.1, handoffs);
        active.controller = plan
            .controller(
                self.rule.as_deref(),
                &active.job,
                latent,
                active.earlier.0,
                active.observed,
            )
            .map_err(End::Run)?;
        Ok(())
    }

    /// A rival that has the sample's history follows it to the next agent; one that is fed the sample's inputs
    /// ends here.
    fn bring_rival(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        active: &mut Active,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let Some(second) = active.rival() else {
            return Ok(());
        };
        let Some(mut other) = self.slots[second.index()].take() else {
            return Ok(());
        };
        match other.leader() {
            Some((_, Follow::OneStep)) => {
                other.current = active.current;
                other.queue.clear();
                let place = active.current;
                let lane = LaneId {
                    slot: second,
                    agent: self.facts[place].agent,
                };
                let spec = crate::LaneSpec {
                    lane,
                    max_len: active.limits[place],
                };
                match backend.open(&[spec]) {
                    Ok(()) => {
                        self.slots[second.index()] = Some(other);
                        Ok(())
                    }
                    Err(BackendError::Cancelled(source)) => Err(RunError::Interrupted(source)),
                    Err(_) => {
                        active.pairing = Some(Pairing::Leader(None));
                        self.finish(backend, second, other, Stop::Backend, None, sink)
                    }
                }
            }
            Some((_, Follow::Inputs)) => {
                active.pairing = Some(Pairing::Leader(None));
                // Its leader is not in its slot now, so there is nobody to tell.
                let _ = slot;
                self.finish(backend, second, other, Stop::Backend, None, sink)
            }
            _ => {
                self.slots[second.index()] = Some(other);
                Ok(())
            }
        }
    }

    fn asked(
        &self,
        backend: &mut dyn Backend,
        active: &Active,
        to: usize,
        notes: Option<&str>,
    ) -> Result<Asked, End> {
        let model = self.facts[to].model;
        let source = &active.job.prompts[to];
        let mut encode = |source: &PromptSource| {
            backend.encode(model, source).map_err(|error| match error {
                BackendError::Cancelled(source) => End::Run(RunError::Interrupted(source)),
                error => End::Sample(Stop::Prompt, error.to_string()),
            })
        };
        let bare = encode(source)?;
        let Some(notes) = notes else {
            return Ok(Asked {
                ids: bare,
                notes: 0,
            });
        };
        let ids = match source {
            PromptSource::Chat { messages } => encode(&PromptSource::Chat {
                messages: noted(messages, notes),
            })?,
            PromptSource::Text { text } => encode(&PromptSource::Text {
                text: format!("{text}\n\n{notes}"),
            })?,
            PromptSource::Tokens { ids } => {
                let mut ids = ids.clone();
                ids.extend(encode(&PromptSource::Text {
                    text: format!("\n\n{notes}"),
                })?);
                ids
            }
        };
        Ok(Asked {
            notes: (ids.len() as u32).saturating_sub(bare.len() as u32),
            ids,
        })
    }
}

/// A prompt's tokens and how many of them are notes.
struct Asked {
    ids: Vec<u32>,
    notes: u32,
}

/// The texts of earlier visits as the receiver's role words them; none where nothing is handed over as
/// text.
fn notes(
    active: &Active,
    chain: &Sequential,
    to: usize,
    control: HandoffControl,
) -> Option<String> {
    if chain.handoff != Handoff::Text || control == HandoffControl::None {
        return None;
    }
    let worded: Vec<String> = active
        .notes
        .iter()
        .filter(|(_, text)| !text.trim().is_empty())
        .map(|(place, text)| {
            let text = match control {
                HandoffControl::Shuffle => shuffled_words(text, &active.stream()),
                _ => text.trim().to_owned(),
            };
            chain.roles[to]
                .notes
                .replace("{sender}", &chain.roles[*place].name)
                .replace("{notes}", &text)
        })
        .collect();
    (!worded.is_empty()).then(|| worded.join("\n\n"))
}

fn shuffled_words(text: &str, stream: &Stream) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    shuffled(words.len(), stream)
        .into_iter()
        .map(|at| words[at])
        .collect::<Vec<_>>()
        .join(" ")
}

/// A conversation with notes at the end of its last user message.
fn noted(messages: &[Message], notes: &str) -> Vec<Message> {
    let mut messages = messages.to_vec();
    match messages.iter_mut().rfind(|m| m.role == "user") {
        Some(message) => {
            message.content.push_str("\n\n");
            message.content.push_str(notes);
        }
        None => messages.push(Message {
            role: "user".to_owned(),
            content: notes.to_owned(),
        }),
    }
    messages
}
