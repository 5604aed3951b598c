//! The loop: admits samples into slots, advances all of them together, decides each one's next input.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use dlmom_core::{
    AlphaUnit, Controller, Draw, Force, GateController, Mode, Reason, RowReadout, Stream, noise,
    normalized,
};
use dlmom_packet::{BeliefPacket, Encoding, Meta, decode_exact, encode_into, encoded_len};

use crate::backend::{
    Backend, BackendError, EnsembleInfo, Feed, LaneSpec, ModelInfo, ReadRow, Readout, Row, Want,
};
use crate::config::{ConfigError, LoopConfig};
use crate::ids::{AgentId, LaneId, SlotId};
use crate::outcome::{Job, Outcome, Stop};
use crate::sample::{Active, NextFeed, Step};

/// Probability of the end tokens from which a latent sample is taken to be done thinking.
pub const EOS_CERTAIN: f32 = 0.9;

/// Shortest time between two progress reports.
pub const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

/// Where a run's results go, and who may stop it.
pub trait Sink {
    /// A sample has finished, in whatever way. Called once per job, in order of finishing.
    ///
    /// # Errors
    /// A failure to store it ends the run with [`RunError::Sink`].
    fn finished(
        &mut self,
        outcome: Outcome,
        info: &EnsembleInfo,
        memory: crate::MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;

    /// The state of the run, at most every [`PROGRESS_INTERVAL`].
    fn progress(&mut self, progress: &Progress) {
        let _ = progress;
    }

    /// Asked before every step; `Break` ends the run with [`RunError::Interrupted`].
    fn poll(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Behaviour of a run that no output depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// Samples that may fail in the backend one after another before the run itself is given up
    /// with the last failure; 1 gives up at the first.
    pub max_failures: u32,
    /// Most samples in slots at once; `None` fills every slot of the backend.
    pub rows: Option<u32>,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            max_failures: 3,
            rows: None,
        }
    }
}

/// How far a run has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Samples finished.
    pub finished: u64,
    /// Samples in slots now.
    pub active: u32,
    /// Calls to the backend so far.
    pub steps: u64,
    /// Rows advanced so far, summed over calls.
    pub rows: u64,
}

/// What a finished run did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RunStats {
    /// Samples finished.
    pub samples: u64,
    /// Calls to the backend.
    pub steps: u64,
    /// Rows advanced, summed over calls; `rows / (steps * slots)` is the occupancy.
    pub rows: u64,
    /// Seconds inside the backend.
    pub backend_s: f64,
    /// Seconds in all.
    pub wall_s: f64,
}

/// Why a run ended early. Everything finished before has reached the sink.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The configuration cannot be run with these models.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Two experts read token ids differently, so a packet of one means nothing to the other.
    #[error(
        "experts {a} and {b} have different vocabularies ({a_vocab} and {b_vocab} tokens): \
         packets cannot pass between them without a vocabulary bridge, which is not built yet"
    )]
    Vocabulary {
        /// First expert.
        a: String,
        /// Second expert.
        b: String,
        /// Its number of tokens.
        a_vocab: u32,
        /// Its number of tokens.
        b_vocab: u32,
    },
    /// The ensemble has no agent.
    #[error("an ensemble needs at least one agent")]
    NoAgents,
    /// A job brings another number of prompts than there are agents.
    #[error("item {item}: {prompts} prompts for {agents} agents")]
    Prompts {
        /// Item of the job.
        item: String,
        /// Prompts it brings.
        prompts: usize,
        /// Agents there are.
        agents: usize,
    },
    /// The backend failed for good.
    #[error("{context}")]
    Backend {
        /// Where: step and samples.
        context: String,
        /// The failure.
        source: BackendError,
    },
    /// Results could not be stored.
    #[error("results could not be stored: {0}")]
    Sink(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted(Option<Box<dyn std::error::Error + Send + Sync>>),
}

/// Checks that one packet means the same to every agent.
///
/// # Errors
/// [`RunError::Vocabulary`] naming the first pair that differs, [`RunError::NoAgents`] for none.
pub fn check_vocabularies(info: &EnsembleInfo) -> Result<(), RunError> {
    let first = info.model_of(AgentId(0)).ok_or(RunError::NoAgents)?;
    for agent in 1..info.agents.len() {
        let other = info
            .model_of(AgentId(agent as u32))
            .ok_or(RunError::NoAgents)?;
        if other.fingerprint != first.fingerprint || other.vocab != first.vocab {
            return Err(RunError::Vocabulary {
                a: first.name.clone(),
                b: other.name.clone(),
                a_vocab: first.vocab,
                b_vocab: other.vocab,
            });
        }
    }
    Ok(())
}

struct Ensemble {
    agents: Vec<AgentId>,
    vocab: u32,
    fingerprint: u64,
    eos: Vec<u32>,
    dtype_bytes: Vec<u64>,
    cue: Vec<Vec<u32>>,
}

/// Runs every job of `jobs` with one configuration on the calling thread.
///
/// Samples occupy the backend's slots and are replaced as they finish. Each step is one
/// [`Backend::advance`] over all occupied slots; prompts of new samples ride along. A sample's
/// outcome depends on its job, the configuration and the models alone, as far as the backend's
/// rows are bit-invariant.
///
/// # Errors
/// See [`RunError`]; outcomes that reached the sink before stay valid.
pub fn run(
    backend: &mut dyn Backend,
    config: &LoopConfig,
    options: &RunOptions,
    jobs: &mut dyn Iterator<Item = Job>,
    sink: &mut dyn Sink,
) -> Result<RunStats, RunError> {
    let info = backend.info().clone();
    check_vocabularies(&info)?;
    let vocab = info.model_of(AgentId(0)).ok_or(RunError::NoAgents)?.vocab;
    config.validate(Some(vocab))?;
    let prototype = GateController::new(&config.controller).map_err(ConfigError::from)?;
    let mut cue = Vec::new();
    if let Some(text) = &config.answer_cue {
        for &model in &info.agents {
            let source = crate::PromptSource::Text { text: text.clone() };
            cue.push(
                backend
                    .encode(model, &source)
                    .map_err(|source| RunError::Backend {
                        context: "answer_cue could not be tokenised".into(),
                        source,
                    })?,
            );
        }
    }
    let first = info.model_of(AgentId(0)).ok_or(RunError::NoAgents)?;
    let ensemble = Ensemble {
        agents: (0..info.agents.len() as u32).map(AgentId).collect(),
        vocab,
        fingerprint: first.fingerprint,
        eos: first.eos.clone(),
        dtype_bytes: info
            .agents
            .iter()
            .map(
                |m| match info.models.get(m.index()).map(|m| m.dtype.as_str()) {
                    Some("fp32") => 4,
                    _ => 2,
                },
            )
            .collect(),
        cue,
    };
    let mut state = Loop {
        backend,
        config,
        info: &info,
        ensemble,
        slots: (0..options
            .rows
            .unwrap_or(info.slots)
            .clamp(1, info.slots.max(1)))
            .map(|_| None)
            .collect(),
        stats: RunStats::default(),
        failures: 0,
        max_failures: options.max_failures.max(1),
        prototype,
        wire: Vec::new(),
    };
    let started = Instant::now();
    let result = state.drive(jobs, sink);
    state.stats.wall_s = started.elapsed().as_secs_f64();
    let open: Vec<SlotId> = state.occupied();
    state.backend.close(&open);
    result.map(|()| state.stats)
}

struct Loop<'a> {
    backend: &'a mut dyn Backend,
    config: &'a LoopConfig,
    info: &'a EnsembleInfo,
    ensemble: Ensemble,
    slots: Vec<Option<Active>>,
    stats: RunStats,
    failures: u32,
    max_failures: u32,
    prototype: GateController,
    wire: Vec<u8>,
}

impl Loop<'_> {
    fn occupied(&self) -> Vec<SlotId> {
        (0..self.slots.len())
            .filter(|&s| self.slots[s].is_some())
            .map(|s| SlotId(s as u32))
            .collect()
    }

    fn drive(
        &mut self,
        jobs: &mut dyn Iterator<Item = Job>,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let mut readout = Readout::default();
        let mut last_report = Instant::now();
        let mut exhausted = false;
        loop {
            if sink.poll().is_break() {
                return Err(RunError::Interrupted(None));
            }
            if !exhausted {
                exhausted = self.admit(jobs, sink)?;
            }
            let active = self.occupied();
            if active.is_empty() {
                if exhausted {
                    return Ok(());
                }
                continue;
            }
            if last_report.elapsed() >= PROGRESS_INTERVAL {
                last_report = Instant::now();
                sink.progress(&self.progress(active.len()));
            }
            match self.advance(&active, &mut readout) {
                Ok(()) => {
                    self.failures = 0;
                    for row in &readout.rows {
                        self.settle(row, sink)?;
                    }
                }
                Err(error) => self.isolate(&active, error, &mut readout, sink)?,
            }
        }
    }

    /// The model whose token bytes print the answer; all agents share its vocabulary.
    fn first_model(&self) -> &ModelInfo {
        &self.info.models[self.info.agents[0].index()]
    }

    fn progress(&self, active: usize) -> Progress {
        Progress {
            finished: self.stats.samples,
            active: active as u32,
            steps: self.stats.steps,
            rows: self.stats.rows,
        }
    }

    /// Fills free slots; true once there is nothing left to admit.
    fn admit(
        &mut self,
        jobs: &mut dyn Iterator<Item = Job>,
        sink: &mut dyn Sink,
    ) -> Result<bool, RunError> {
        for slot in 0..self.slots.len() {
            while self.slots[slot].is_none() {
                let Some(job) = jobs.next() else {
                    return Ok(true);
                };
                if job.prompts.len() != self.ensemble.agents.len() {
                    return Err(RunError::Prompts {
                        item: job.key.item_id,
                        prompts: job.prompts.len(),
                        agents: self.ensemble.agents.len(),
                    });
                }
                match self.start(SlotId(slot as u32), job) {
                    Ok(active) => self.slots[slot] = Some(active),
                    Err((active, stop, error)) => {
                        self.finish(*active, stop, Some(error), sink)?;
                    }
                }
            }
        }
        Ok(false)
    }

    fn start(&mut self, slot: SlotId, job: Job) -> Result<Active, (Box<Active>, Stop, String)> {
        let mut active = Active::new(job, self.prototype.clone());
        let mut lanes = Vec::with_capacity(self.ensemble.agents.len());
        let mut prompts = Vec::with_capacity(self.ensemble.agents.len());
        for (index, &agent) in self.ensemble.agents.iter().enumerate() {
            let model = self.info.agents[index];
            let ids = match self.backend.encode(model, &active.job.prompts[index]) {
                Ok(ids) => ids,
                Err(error) => return Err((Box::new(active), Stop::Prompt, error.to_string())),
            };
            let context = self.info.models[model.index()].context.unwrap_or(u32::MAX);
            let ceiling = context.min(self.info.max_len);
            let length = ids.len() as u32;
            if ids.is_empty() || length >= ceiling {
                let error = format!("prompt of {length} tokens, room for 1 to {}", ceiling - 1);
                return Err((Box::new(active), Stop::Prompt, error));
            }
            let cue = self.ensemble.cue.get(index).map_or(0, Vec::len) as u32;
            let limit = ceiling.min(length.saturating_add(self.config.max_steps + cue));
            lanes.push(LaneSpec {
                lane: LaneId { slot, agent },
                max_len: limit,
            });
            active.limits.push(limit);
            active.lengths.push(0);
            active.prompt_tokens.push(length);
            prompts.push(ids);
        }
        active.next = NextFeed::Tokens(prompts);
        match self.backend.open(&lanes) {
            Ok(()) => Ok(active),
            Err(error) => Err((Box::new(active), Stop::Backend, error.to_string())),
        }
    }

    /// One backend call over `slots`, all of them occupied.
    fn advance(&mut self, slots: &[SlotId], readout: &mut Readout) -> Result<(), BackendError> {
        let draws: Vec<Option<Draw>> = slots
            .iter()
            .map(|slot| {
                let active = self.slots[slot.index()].as_ref()?;
                (!self.config.sampling.is_greedy()).then(|| Draw {
                    sampling: self.config.sampling,
                    stream: active.stream(),
                })
            })
            .collect();
        let feeds: Vec<Vec<(AgentId, Feed<'_>)>> = slots
            .iter()
            .map(
                |slot| match self.slots[slot.index()].as_ref().map(|a| &a.next) {
                    Some(NextFeed::Tokens(tokens)) => self
                        .ensemble
                        .agents
                        .iter()
                        .zip(tokens)
                        .map(|(&agent, ids)| (agent, Feed::Tokens(ids)))
                        .collect(),
                    Some(NextFeed::Packet(packet)) => self
                        .ensemble
                        .agents
                        .iter()
                        .map(|&agent| (agent, Feed::Packets(std::slice::from_ref(packet))))
                        .collect(),
                    None => Vec::new(),
                },
            )
            .collect();
        let rows: Vec<Row<'_>> = slots
            .iter()
            .zip(&feeds)
            .zip(&draws)
            .map(|((&slot, feeds), &draw)| Row {
                slot,
                feeds,
                merge: &self.ensemble.agents,
                want: Want {
                    top: self.config.k,
                    draw,
                    ..Want::default()
                },
            })
            .collect();
        let started = Instant::now();
        let result = self.backend.advance(&rows, &self.config.consensus, readout);
        self.stats.backend_s += started.elapsed().as_secs_f64();
        self.stats.steps += 1;
        result?;
        self.stats.rows += rows.len() as u64;
        if readout.rows.len() != slots.len() {
            return Err(BackendError::Poisoned(format!(
                "readout of {} rows for {} rows",
                readout.rows.len(),
                slots.len()
            )));
        }
        Ok(())
    }

    /// After a failed call nothing has advanced: tries every row once more, by itself. Those that fail again end, the others go on.
    fn isolate(
        &mut self,
        slots: &[SlotId],
        error: BackendError,
        readout: &mut Readout,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let fatal = |error: BackendError, steps: u64| match error {
            BackendError::Cancelled(source) => RunError::Interrupted(source),
            source => RunError::Backend {
                context: format!("backend call {steps}"),
                source,
            },
        };
        if matches!(
            error,
            BackendError::Cancelled(_) | BackendError::Poisoned(_)
        ) {
            return Err(fatal(error, self.stats.steps));
        }
        for &slot in slots {
            if sink.poll().is_break() {
                return Err(RunError::Interrupted(None));
            }
            let outcome = self.advance(&[slot], readout);
            match outcome {
                Ok(()) => {
                    self.failures = 0;
                    for row in &readout.rows {
                        self.settle(row, sink)?;
                    }
                }
                Err(error @ (BackendError::Cancelled(_) | BackendError::Poisoned(_))) => {
                    return Err(fatal(error, self.stats.steps));
                }
                Err(error) => {
                    self.failures += 1;
                    let line = one_line(&error);
                    if let Some(active) = self.slots[slot.index()].take() {
                        self.backend.close(&[slot]);
                        self.finish(active, Stop::Backend, Some(line), sink)?;
                    }
                    if self.failures >= self.max_failures {
                        return Err(fatal(error, self.stats.steps));
                    }
                }
            }
        }
        Ok(())
    }

    /// Turns one row's readout into the sample's next input, or its end.
    fn settle(&mut self, row: &ReadRow, sink: &mut dyn Sink) -> Result<(), RunError> {
        let Some(slot) = row.slot else { return Ok(()) };
        let Some(mut active) = self.slots.get_mut(slot.index()).and_then(Option::take) else {
            return Ok(());
        };
        match self.decide(&mut active, &row.read) {
            Ok(None) => {
                self.slots[slot.index()] = Some(active);
                Ok(())
            }
            Ok(Some(stop)) => {
                self.backend.close(&[slot]);
                self.finish(active, stop, None, sink)
            }
            Err((stop, error)) => {
                self.backend.close(&[slot]);
                self.finish(active, stop, Some(error), sink)
            }
        }
    }

    fn decide(
        &mut self,
        active: &mut Active,
        read: &RowReadout,
    ) -> Result<Option<Stop>, (Stop, String)> {
        let experts = self.ensemble.agents.len();
        for (length, fed) in active
            .lengths
            .iter_mut()
            .zip(active.next.positions(experts))
        {
            *length += fed;
        }
        if let Some(bad) = read.finite.iter().position(|finite| !finite) {
            let name = self
                .info
                .model_of(AgentId(bad as u32))
                .map_or("?", |m| m.name.as_str());
            return Err((
                Stop::NanInf,
                format!(
                    "NaN or Inf in the logits of {name} at step {}",
                    active.observed
                ),
            ));
        }
        if experts > 1 {
            let vocab = u64::from(self.ensemble.vocab);
            active.uplink += self
                .ensemble
                .dtype_bytes
                .iter()
                .map(|b| b * vocab)
                .sum::<u64>();
        }
        let nats = read.entropies.iter().sum::<f64>() / read.entropies.len().max(1) as f64;
        let entropy = normalized(nats, self.ensemble.vocab as usize);
        let observed = match self.config.controller.alpha_unit {
            AlphaUnit::Normalized => entropy,
            AlphaUnit::Nats => nats,
        };
        let top = read.ids.first().copied();
        let eos_top = top.is_some_and(|id| self.ensemble.eos.contains(&id));
        let left = self.config.max_steps - active.explicit - active.latent;
        let force = if eos_top && read.role_mass >= EOS_CERTAIN {
            Some(Force::EosCertain)
        } else if left <= self.config.answer_reserve {
            Some(Force::AnswerReserve)
        } else {
            None
        };
        let decision = active.controller.observe(observed, force);
        active.note_entropy(entropy);
        let stream = active.stream();
        active.observed += 1;
        let step = Step {
            decision,
            entropy,
            observed,
        };
        match decision.mode {
            Mode::Latent => self.latent(active, read, &stream, step),
            Mode::Explicit => self.explicit(active, read, step),
        }
    }

    fn latent(
        &mut self,
        active: &mut Active,
        read: &RowReadout,
        stream: &Stream,
        step: Step,
    ) -> Result<Option<Stop>, (Stop, String)> {
        let fail = |error: String| (Stop::Backend, error);
        let noised = noise::apply(&self.config.noise, &read.ids, &read.probs, stream)
            .map_err(|e| fail(e.to_string()))?;
        let packet = BeliefPacket::new(
            read.ids.clone(),
            noised.probs,
            read.mass,
            self.ensemble.vocab,
        )
        .map_err(|e| fail(e.to_string()))?;
        self.wire.clear();
        let meta = Meta {
            fingerprint: self.ensemble.fingerprint,
            step: active.explicit + active.latent,
        };
        let bytes = encode_into(&packet, meta, Encoding::F32, &mut self.wire)
            .map_err(|e| fail(e.to_string()))?;
        // Receivers are fed what came through the codec, so that its bytes are the real ones.
        let received = decode_exact(&self.wire)
            .map_err(|e| fail(e.to_string()))?
            .packet;
        if self.ensemble.agents.len() > 1 {
            active.downlink += bytes as u64 * self.ensemble.agents.len() as u64;
        }
        active.latent += 1;
        active.mass_sum += f64::from(read.mass);
        active.kl_sum += noised.kl;
        if active.last_mode == Some(Mode::Latent) {
            if let Some(last) = active.segments.last_mut() {
                *last += 1;
            }
        } else {
            active.segments.push(1);
        }
        active.last_mode = Some(Mode::Latent);
        active.record(
            read,
            step,
            noised.kl,
            None,
            Some(&received),
            self.first_model(),
        );
        active.next = NextFeed::Packet(received);
        Ok(self.spent(active))
    }

    fn explicit(
        &mut self,
        active: &mut Active,
        read: &RowReadout,
        step: Step,
    ) -> Result<Option<Stop>, (Stop, String)> {
        active.last_mode = Some(Mode::Explicit);
        let cue_due = step.decision.switched
            && step.decision.reason == Reason::LatentBudget
            && !self.ensemble.cue.is_empty();
        let token = if self.config.sampling.is_greedy() {
            read.ids.first().copied()
        } else {
            read.drawn
        };
        let token = (!cue_due).then_some(token).flatten();
        if token.is_none() && !cue_due {
            return Err((Stop::Backend, "the readout holds no token to print".into()));
        }
        active.record(read, step, 0.0, token, None, self.first_model());
        let Some(token) = token else {
            active.text.extend_from_slice(&self.ensemble.cue[0]);
            active.next = NextFeed::Tokens(self.ensemble.cue.clone());
            return Ok(self.spent(active));
        };
        if self.ensemble.eos.contains(&token) {
            return Ok(Some(Stop::Eos));
        }
        active.text.push(token);
        active.explicit += 1;
        let experts = self.ensemble.agents.len();
        if experts > 1 {
            active.downlink += encoded_len(1, Encoding::F32) as u64 * experts as u64;
        }
        active.next = NextFeed::Tokens(vec![vec![token]; experts]);
        Ok(self.spent(active))
    }

    fn spent(&self, active: &Active) -> Option<Stop> {
        if active.explicit + active.latent >= self.config.max_steps {
            return Some(Stop::Budget);
        }
        let experts = self.ensemble.agents.len();
        let full = active
            .lengths
            .iter()
            .zip(&active.limits)
            .zip(active.next.positions(experts))
            .any(|((length, limit), fed)| length + fed > *limit);
        full.then_some(Stop::Context)
    }

    fn finish(
        &mut self,
        active: Active,
        stop: Stop,
        error: Option<String>,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        self.stats.samples += 1;
        let outcome = active.outcome(stop, error, self.first_model());
        sink.finished(outcome, self.info, self.backend.memory())
            .map_err(RunError::Sink)
    }
}

fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let text = inner.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = inner.source();
    }
    line.replace(['\n', '\r'], " ")
}
