//! Samples into free slots.

use super::prompt::chunks;
use super::{
    AgentFacts, Backend, BackendError, Job, LaneId, LaneSpec, Pairing, RunError, Session, Sink,
    SlotId, Stop,
};
use crate::outcome::{Follow, Rival};
use crate::sample::{Active, Visit};

/// Why a sample was not started.
enum NotStarted {
    /// It ends at once: how, and why.
    Sample(Box<Active>, Stop, String),
    /// The run ends.
    Run(RunError),
}

impl NotStarted {
    /// A backend's failure: the sample's, unless the user asked to stop.
    fn new(active: Active, stop: Stop, error: BackendError) -> Self {
        match error {
            BackendError::Cancelled(source) => Self::Run(RunError::Interrupted(source)),
            error => Self::Sample(Box::new(active), stop, error.to_string()),
        }
    }
}

impl Session {
    /// Fills free slots; true once there is nothing left to admit.
    pub(super) fn admit(
        &mut self,
        backend: &mut dyn Backend,
        jobs: &mut dyn Iterator<Item = Job>,
        sink: &mut dyn Sink,
    ) -> Result<bool, RunError> {
        loop {
            let free: Vec<SlotId> = (0..self.slots.len())
                .filter(|&s| self.slots[s].is_none())
                .map(|s| SlotId(s as u32))
                .collect();
            let Some(&slot) = free.first() else {
                return Ok(false);
            };
            let Some(job) = self.waiting.take().or_else(|| jobs.next()) else {
                return Ok(true);
            };
            self.check_job(&job)?;
            let Some(rival) = job.rival else {
                self.admit_one(backend, slot, job, sink)?;
                continue;
            };
            let Some(&second) = free.get(1) else {
                self.waiting = Some(job);
                return Ok(false);
            };
            self.admit_pair(backend, (slot, second), job, rival, sink)?;
        }
    }

    fn check_job(&self, job: &Job) -> Result<(), RunError> {
        let item = || job.key.item_id.clone();
        if job.prompts.len() != self.facts.len() {
            return Err(RunError::Prompts {
                item: item(),
                prompts: job.prompts.len(),
                agents: self.facts.len(),
            });
        }
        for config in [Some(job.config), job.rival.map(|r| r.config)]
            .into_iter()
            .flatten()
        {
            if config as usize >= self.plans.len() {
                return Err(RunError::UnknownConfig {
                    item: item(),
                    config,
                    configs: self.plans.len(),
                });
            }
        }
        if job.rival.is_some() && self.slots.len() < 2 {
            return Err(RunError::OneRow { item: item() });
        }
        Ok(())
    }

    fn admit_one(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        job: Job,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let mut active = self.new_active(job)?;
        active.order = self.next_order();
        match self.start(backend, slot, active) {
            Ok(active) => {
                self.slots[slot.index()] = Some(active);
                Ok(())
            }
            Err(NotStarted::Run(error)) => Err(error),
            Err(NotStarted::Sample(active, stop, error)) => {
                self.finish(backend, slot, *active, stop, Some(error), sink)
            }
        }
    }

    fn admit_pair(
        &mut self,
        backend: &mut dyn Backend,
        (slot, second): (SlotId, SlotId),
        job: Job,
        rival: Rival,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let twin = Job {
            config: rival.config,
            rival: None,
            trace: false,
            ..job.clone()
        };
        let mut leader = self.new_active(job)?;
        let mut follower = self.new_active(twin)?;
        leader.order = self.next_order();
        follower.order = leader.order;
        leader.pairing = Some(Pairing::Leader(Some(second)));
        follower.pairing = Some(Pairing::Rival(slot, rival.follow));
        let mut leader = match self.start(backend, slot, leader) {
            Ok(leader) => leader,
            Err(NotStarted::Run(error)) => return Err(error),
            Err(NotStarted::Sample(mut active, stop, error)) => {
                active.pairing = Some(Pairing::Leader(None));
                return self.finish(backend, slot, *active, stop, Some(error), sink);
            }
        };
        if rival.follow != Follow::Free {
            // It is fed what the sample is fed, so it needs the sample's room.
            follower.limits.clone_from(&leader.limits);
        }
        match self.start(backend, second, follower) {
            Ok(mut follower) => {
                if rival.follow == Follow::OneStep {
                    // Its lanes are made anew from the leader's before every comparison.
                    follower.queue.clear();
                }
                self.slots[second.index()] = Some(follower);
            }
            Err(NotStarted::Run(error)) => {
                backend.close(&[slot, second]);
                return Err(error);
            }
            Err(NotStarted::Sample(..)) => {
                // The sample itself can go on, without comparisons.
                leader.pairing = Some(Pairing::Leader(None));
                backend.close(&[second]);
            }
        }
        self.slots[slot.index()] = Some(leader);
        Ok(())
    }

    fn next_order(&mut self) -> u64 {
        self.admitted += 1;
        self.admitted
    }

    fn new_active(&self, job: Job) -> Result<Active, RunError> {
        let place = job.config as usize;
        let plan = &self.plans[place];
        let latent = match plan.chain() {
            None => plan.config.controller.max_latent_steps,
            Some(_) => super::handoff::latent_share(&plan.config, 0, 0, 0),
        };
        let controller = plan.controller(self.rule.as_deref(), &job, latent, 0, 0)?;
        let mut active = Active::new(job, place, self.facts.len(), controller, plan.triggers()?);
        active.visit = Visit {
            steps: match plan.chain() {
                None => plan.config.max_steps,
                Some(_) => super::handoff::step_share(plan, &active),
            },
            ..Visit::default()
        };
        Ok(active)
    }

    fn start(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        mut active: Active,
    ) -> Result<Active, NotStarted> {
        let mut prompts = Vec::new();
        let mut lanes = Vec::new();
        for place in self.movers(&active) {
            let fact = &self.facts[place];
            let ids = match backend.encode(fact.model, &active.job.prompts[place]) {
                Ok(ids) => ids,
                Err(error) => return Err(NotStarted::new(active, Stop::Prompt, error)),
            };
            match self.lane(slot, fact, &active, place, ids.len() as u32) {
                Ok(lane) => lanes.push(LaneSpec {
                    max_len: lane.max_len.max(active.limits[place]),
                    ..lane
                }),
                Err(error) => {
                    return Err(NotStarted::Sample(Box::new(active), Stop::Prompt, error));
                }
            }
            let (model, source) = (fact.model, &active.job.prompts[place]);
            match self.beginnings.prompt(backend, model, source, ids) {
                Ok(prompt) => prompts.push(prompt),
                Err(error) => return Err(NotStarted::new(active, Stop::Prompt, error)),
            }
        }
        for (place, (prompt, lane)) in self.movers(&active).zip(prompts.iter().zip(&lanes)) {
            active.limits[place] = lane.max_len;
            active.prompt_tokens[place] += prompt.ids.len() as u32;
            self.stats.prompts += prompt.ids.len() as u64;
        }
        active.queue.extend(chunks(&prompts));
        match backend.open(&lanes) {
            Ok(()) => Ok(active),
            Err(error) => Err(NotStarted::new(active, Stop::Backend, error)),
        }
    }

    /// The lane of an agent whose prompt has `length` tokens.
    pub(super) fn lane(
        &self,
        slot: SlotId,
        fact: &AgentFacts,
        active: &Active,
        place: usize,
        length: u32,
    ) -> Result<LaneSpec, String> {
        let model = &self.info.models[fact.model.index()];
        let ceiling = model.context.unwrap_or(u32::MAX).min(self.info.max_len);
        if length == 0 || length >= ceiling {
            return Err(format!(
                "prompt of {length} tokens, room for 1 to {}",
                ceiling.saturating_sub(1)
            ));
        }
        let plan = &self.plans[active.plan];
        let max_len = match plan.chain() {
            // What is handed over is not known yet.
            Some(_) => ceiling,
            None => ceiling.min(
                length
                    .saturating_add(plan.config.max_steps)
                    .saturating_add(plan.injections(place)),
            ),
        };
        Ok(LaneSpec {
            lane: LaneId {
                slot,
                agent: fact.agent,
            },
            max_len,
        })
    }
}
