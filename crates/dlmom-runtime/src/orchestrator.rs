//! The loop: admits samples into slots, advances all of them together, decides each one's next input.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use dlmom_core::{
    AlphaUnit, Consensus, Controller, ControllerFailure, Decision, Draw, Force, GateController,
    Mode, Reason, RowReadout, Rule, RuleController, Stream, noise, normalized,
};
use dlmom_packet::{BeliefPacket, Meta, Scalar, embed_len};

use crate::backend::{
    Backend, BackendError, EnsembleInfo, Feed, LaneSpec, ModelInfo, Payload, ReadRow, Readout, Row,
    Want,
};
use crate::config::{ConfigError, LoopConfig};
use crate::ids::{AgentId, LaneId, SlotId};
use crate::link::{Link, LinkMessage, Support, Uplink, Wire};
use crate::outcome::{Job, JobKey, Outcome, Stop};
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

    /// A sample has decided its next input. Called once per sample and step, in the order of slots.
    fn step(&mut self, event: &StepEvent<'_>) {
        let _ = event;
    }

    /// Asked before every step; `Break` ends the run with [`RunError::Interrupted`].
    fn poll(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// One sample's decision, as it happens.
#[derive(Clone, Copy, Debug)]
pub struct StepEvent<'a> {
    /// The sample.
    pub key: &'a JobKey,
    /// Decisions of the sample before this one.
    pub step: u32,
    /// The controller's decision.
    pub decision: Decision,
    /// Mean of the experts' normalised entropies.
    pub entropy: f64,
    /// The same in the controller's unit.
    pub observed: f64,
    /// What consensus read: experts' entropies, merged entropy, mass, most probable tokens.
    pub read: &'a RowReadout,
    /// The packet that the agents take in, in latent steps, as its receivers decoded it; for other messages the packet
    /// they were made from.
    pub packet: Option<&'a BeliefPacket>,
    /// `KL(p' || p)` of the noise, nats; 0 in explicit steps.
    pub noise_kl: f64,
    /// The printed token of explicit steps; none for an end token, and where a cue is fed instead.
    pub token: Option<u32>,
    /// Bytes sent up and down in this step.
    pub bytes: (u64, u64),
    /// The model whose vocabulary the ids belong to.
    pub model: &'a ModelInfo,
}

/// Makes a user's own gate for every sample.
pub type RuleSource = dyn Fn(&JobKey) -> Result<Box<dyn Rule>, ControllerFailure> + Send;

/// A user's own parts in place of the built-in ones.
#[derive(Default)]
pub struct Hooks {
    /// In place of the gate; the specification's budget, cap and dwell still bind it.
    pub rule: Option<Box<RuleSource>>,
    /// In place of the configured operator.
    pub consensus: Option<Box<dyn Consensus>>,
    /// In place of the wire format.
    pub link: Option<Box<dyn Link>>,
    /// Lets the backend's compressor work on a lane after its prompt and whenever it has grown by this many positions.
    pub compress_every: Option<u32>,
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
    /// Embeddings of one model mean nothing to another.
    #[error(
        "link.message: embed needs agents of one model, but there are {a} and {b}: an embedding of one means nothing to the other"
    )]
    EmbedLink {
        /// First model.
        a: String,
        /// Another one.
        b: String,
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
    /// Of embeddings on the wire.
    scalar: Scalar,
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
    run_with(backend, config, options, Hooks::default(), jobs, sink)
}

/// [`run`] with a user's own parts.
///
/// # Errors
/// As [`run`].
pub fn run_with(
    backend: &mut dyn Backend,
    config: &LoopConfig,
    options: &RunOptions,
    hooks: Hooks,
    jobs: &mut dyn Iterator<Item = Job>,
    sink: &mut dyn Sink,
) -> Result<RunStats, RunError> {
    let mut session = Session::new(backend, config, options, hooks)?;
    let result = loop {
        match session.turn(backend, jobs, sink) {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    session.close(backend);
    result.map(|()| session.stats())
}

/// A run between its first step and its last, for callers that want the steps one at a time.
///
/// The backend is handed in anew for every turn and must be the same one.
pub struct Session {
    config: LoopConfig,
    info: EnsembleInfo,
    ensemble: Ensemble,
    slots: Vec<Option<Active>>,
    stats: RunStats,
    failures: u32,
    max_failures: u32,
    prototype: GateController,
    rule: Option<Box<RuleSource>>,
    consensus: Box<dyn Consensus>,
    link: Box<dyn Link>,
    compress_every: Option<u32>,
    readout: Readout,
    started: Instant,
    last_report: Instant,
    exhausted: bool,
}

impl Session {
    /// Checks the configuration against the loaded models; nothing runs yet.
    ///
    /// # Errors
    /// [`RunError::Config`], [`RunError::Vocabulary`], [`RunError::EmbedLink`] or a cue that cannot be tokenised.
    pub fn new(
        backend: &mut dyn Backend,
        config: &LoopConfig,
        options: &RunOptions,
        hooks: Hooks,
    ) -> Result<Self, RunError> {
        let info = backend.info().clone();
        check_vocabularies(&info)?;
        let vocab = info.model_of(AgentId(0)).ok_or(RunError::NoAgents)?.vocab;
        config.validate(Some(vocab))?;
        if config.link.message == LinkMessage::Embed
            && let Some(other) = info.agents.iter().find(|&&m| m != info.agents[0])
        {
            let name = |m: crate::ModelId| info.models[m.index()].name.clone();
            return Err(RunError::EmbedLink {
                a: name(info.agents[0]),
                b: name(*other),
            });
        }
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
            scalar: match first.dtype.as_str() {
                "bf16" => Scalar::Bf16,
                "fp16" => Scalar::F16,
                _ => Scalar::F32,
            },
            cue,
        };
        let now = Instant::now();
        Ok(Self {
            slots: (0..options
                .rows
                .unwrap_or(info.slots)
                .clamp(1, info.slots.max(1)))
                .map(|_| None)
                .collect(),
            config: config.clone(),
            info,
            ensemble,
            stats: RunStats::default(),
            failures: 0,
            max_failures: options.max_failures.max(1),
            prototype,
            rule: hooks.rule,
            consensus: hooks
                .consensus
                .unwrap_or_else(|| Box::new(config.consensus.clone())),
            link: hooks.link.unwrap_or_else(|| Box::new(Wire::default())),
            compress_every: hooks.compress_every,
            readout: Readout::default(),
            started: now,
            last_report: now,
            exhausted: false,
        })
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> RunStats {
        RunStats {
            wall_s: self.started.elapsed().as_secs_f64(),
            ..self.stats
        }
    }

    /// Frees the lanes of whatever is still in slots.
    pub fn close(&mut self, backend: &mut dyn Backend) {
        let open = self.occupied();
        self.slots.iter_mut().for_each(|slot| *slot = None);
        backend.close(&open);
    }

    /// Admits waiting samples and advances every occupied slot by one call; false once nothing is left.
    ///
    /// # Errors
    /// See [`RunError`]. The caller then closes the session.
    pub fn turn(
        &mut self,
        backend: &mut dyn Backend,
        jobs: &mut dyn Iterator<Item = Job>,
        sink: &mut dyn Sink,
    ) -> Result<bool, RunError> {
        if sink.poll().is_break() {
            return Err(RunError::Interrupted(None));
        }
        if !self.exhausted {
            self.exhausted = self.admit(backend, jobs, sink)?;
        }
        let active = self.occupied();
        if active.is_empty() {
            return Ok(!self.exhausted);
        }
        if self.last_report.elapsed() >= PROGRESS_INTERVAL {
            self.last_report = Instant::now();
            sink.progress(&self.progress(active.len()));
        }
        match self.advance(backend, &active) {
            Ok(()) => {
                self.failures = 0;
                self.settle_all(backend, sink)?;
            }
            Err(error) => self.isolate(backend, &active, error, sink)?,
        }
        Ok(true)
    }

    /// Settles every row of the readout, then carries what has to be computed by the backend first.
    fn settle_all(
        &mut self,
        backend: &mut dyn Backend,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let readout = std::mem::take(&mut self.readout);
        let result = readout
            .rows
            .iter()
            .try_for_each(|row| self.settle(backend, row, sink));
        let slots: Vec<SlotId> = readout.rows.iter().filter_map(|row| row.slot).collect();
        self.readout = readout;
        result?;
        self.send_embeddings(backend, &slots)?;
        self.compress(backend, &slots)
    }

    /// Turns packets that travel as embeddings into what their receivers decode.
    fn send_embeddings(
        &mut self,
        backend: &mut dyn Backend,
        slots: &[SlotId],
    ) -> Result<(), RunError> {
        let mut waiting = Vec::new();
        let mut packets = Vec::new();
        for &slot in slots {
            if let Some(active) = &self.slots[slot.index()]
                && let NextFeed::Embed(packet, meta) = &active.next
            {
                waiting.push((slot, *meta));
                packets.push(packet.clone());
            }
        }
        if packets.is_empty() {
            return Ok(());
        }
        let steps = self.stats.steps;
        let failed = |source: BackendError| match source {
            BackendError::Cancelled(source) => RunError::Interrupted(source),
            source => RunError::Backend {
                context: format!("mixture embeddings after backend call {steps}"),
                source,
            },
        };
        let started = Instant::now();
        let result = backend.embed(self.info.agents[0], &packets);
        self.stats.backend_s += started.elapsed().as_secs_f64();
        let embeddings = result.map_err(failed)?;
        let hidden = embeddings.hidden;
        if hidden != self.first_model().hidden
            || embeddings.values.len() != packets.len() * hidden as usize
        {
            return Err(failed(BackendError::Poisoned(format!(
                "{} embedding values for {} packets of width {hidden}",
                embeddings.values.len(),
                packets.len()
            ))));
        }
        let rows = embeddings.values.chunks_exact(hidden as usize);
        for (&(slot, meta), values) in waiting.iter().zip(rows) {
            let Some(active) = &mut self.slots[slot.index()] else {
                continue;
            };
            let (values, _) = self
                .link
                .embed(values, meta, self.ensemble.scalar)
                .map_err(|e| failed(BackendError::Invalid(e.to_string())))?;
            active.next = NextFeed::Payload(Payload::Embed { values, hidden });
        }
        Ok(())
    }

    /// Lets the compressor work on the lanes that have grown enough.
    fn compress(&mut self, backend: &mut dyn Backend, slots: &[SlotId]) -> Result<(), RunError> {
        let Some(every) = self.compress_every else {
            return Ok(());
        };
        let mut due = Vec::new();
        for &slot in slots {
            let Some(active) = &mut self.slots[slot.index()] else {
                continue;
            };
            for (index, &length) in active.lengths.iter().enumerate() {
                let last = active.compressed_at[index];
                if last == 0 || length - last >= every.max(1) {
                    active.compressed_at[index] = length;
                    due.push(LaneId {
                        slot,
                        agent: self.ensemble.agents[index],
                    });
                }
            }
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

    fn occupied(&self) -> Vec<SlotId> {
        (0..self.slots.len())
            .filter(|&s| self.slots[s].is_some())
            .map(|s| SlotId(s as u32))
            .collect()
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
        backend: &mut dyn Backend,
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
                let controller = self.controller(&job.key)?;
                match self.start(backend, SlotId(slot as u32), Active::new(job, controller)) {
                    Ok(active) => self.slots[slot] = Some(active),
                    Err((active, stop, error)) => {
                        self.finish(backend, *active, stop, Some(error), sink)?;
                    }
                }
            }
        }
        Ok(false)
    }

    fn controller(&self, key: &JobKey) -> Result<Box<dyn Controller>, RunError> {
        let Some(source) = &self.rule else {
            return Ok(Box::new(self.prototype.clone()));
        };
        let rule = source(key).map_err(|e| rule_failure(key, e))?;
        Ok(Box::new(
            RuleController::new(&self.config.controller, rule).map_err(ConfigError::from)?,
        ))
    }

    fn start(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        mut active: Active,
    ) -> Result<Active, (Box<Active>, Stop, String)> {
        let mut lanes = Vec::with_capacity(self.ensemble.agents.len());
        let mut prompts = Vec::with_capacity(self.ensemble.agents.len());
        for (index, &agent) in self.ensemble.agents.iter().enumerate() {
            let model = self.info.agents[index];
            let ids = match backend.encode(model, &active.job.prompts[index]) {
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
            active.compressed_at.push(0);
            active.prompt_tokens.push(length);
            prompts.push(ids);
        }
        active.next = NextFeed::Tokens(prompts);
        match backend.open(&lanes) {
            Ok(()) => Ok(active),
            Err(error) => Err((Box::new(active), Stop::Backend, error.to_string())),
        }
    }

    /// One backend call over `slots`, all of them occupied, into the session's readout.
    fn advance(&mut self, backend: &mut dyn Backend, slots: &[SlotId]) -> Result<(), BackendError> {
        let k = self.config.entries(self.ensemble.vocab);
        let link = self.config.link;
        let sampling = self.config.sampling;
        let fingerprint = self.ensemble.fingerprint;
        let mut readout = std::mem::take(&mut self.readout);
        let actives: Vec<&Active> = slots
            .iter()
            .filter_map(|slot| self.slots[slot.index()].as_ref())
            .collect();
        let feeds: Vec<Vec<(AgentId, Feed<'_>)>> = actives
            .iter()
            .map(|active| self.feeds(&active.next))
            .collect::<Result<_, _>>()?;
        let rows: Vec<Row<'_>> = slots
            .iter()
            .zip(&actives)
            .zip(&feeds)
            .map(|((&slot, active), feeds)| Row {
                slot,
                feeds,
                merge: &self.ensemble.agents,
                want: Want {
                    top: k,
                    draw: (!sampling.is_greedy()).then(|| Draw {
                        sampling,
                        stream: active.stream(),
                    }),
                    uplink: (link.support == Support::Packet).then(|| Uplink {
                        k: (link.message == LinkMessage::Belief).then_some(k),
                        encoding: link.encoding,
                        meta: meta_of(fingerprint, active),
                    }),
                    ..Want::default()
                },
            })
            .collect();
        let started = Instant::now();
        let result = backend.advance(&rows, &*self.consensus, &mut readout);
        let spent = started.elapsed().as_secs_f64();
        let advanced = rows.len() as u64;
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
        match self.consensus.take_failure() {
            // The lanes have advanced on preferences that nobody merged: there is no way on.
            Some(source) => Err(BackendError::Fatal {
                context: format!("consensus `{}`", self.consensus.name()),
                source,
            }),
            None => Ok(()),
        }
    }

    fn feeds<'f>(&self, next: &'f NextFeed) -> Result<Vec<(AgentId, Feed<'f>)>, BackendError> {
        let agents = &self.ensemble.agents;
        let all = |feed: Feed<'f>| agents.iter().map(|&agent| (agent, feed)).collect();
        Ok(match next {
            NextFeed::Tokens(tokens) => agents
                .iter()
                .zip(tokens)
                .map(|(&agent, ids)| (agent, Feed::Tokens(ids)))
                .collect(),
            NextFeed::Packet(packet) => all(Feed::Packets(std::slice::from_ref(packet))),
            NextFeed::Payload(payload) => all(Feed::Payload(payload)),
            NextFeed::Embed(..) => {
                return Err(BackendError::Invalid(
                    "a packet is waiting to be embedded".into(),
                ));
            }
        })
    }

    fn meta(&self, active: &Active) -> Meta {
        meta_of(self.ensemble.fingerprint, active)
    }

    /// After a failed call nothing has advanced: tries every row once more, by itself. Those that fail again end, the others go on.
    fn isolate(
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
        if matches!(
            error,
            BackendError::Cancelled(_) | BackendError::Poisoned(_) | BackendError::Fatal { .. }
        ) {
            return Err(fatal(error, self.stats.steps));
        }
        for &slot in slots {
            if sink.poll().is_break() {
                return Err(RunError::Interrupted(None));
            }
            match self.advance(backend, &[slot]) {
                Ok(()) => {
                    self.failures = 0;
                    self.settle_all(backend, sink)?;
                }
                Err(
                    error @ (BackendError::Cancelled(_)
                    | BackendError::Poisoned(_)
                    | BackendError::Fatal { .. }),
                ) => {
                    return Err(fatal(error, self.stats.steps));
                }
                Err(error) => {
                    self.failures += 1;
                    let line = one_line(&error);
                    if let Some(active) = self.slots[slot.index()].take() {
                        backend.close(&[slot]);
                        self.finish(backend, active, Stop::Backend, Some(line), sink)?;
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
    fn settle(
        &mut self,
        backend: &mut dyn Backend,
        row: &ReadRow,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        let Some(slot) = row.slot else { return Ok(()) };
        let Some(mut active) = self.slots.get_mut(slot.index()).and_then(Option::take) else {
            return Ok(());
        };
        match self.decide(&mut active, row, sink) {
            Ok(None) => {
                self.slots[slot.index()] = Some(active);
                Ok(())
            }
            Ok(Some(stop)) => {
                backend.close(&[slot]);
                self.finish(backend, active, stop, None, sink)
            }
            Err(End::Sample(stop, error)) => {
                backend.close(&[slot]);
                self.finish(backend, active, stop, Some(error), sink)
            }
            Err(End::Run(error)) => {
                // Still in its slot, so that closing the session frees its lanes.
                self.slots[slot.index()] = Some(active);
                Err(error)
            }
        }
    }

    fn decide(
        &mut self,
        active: &mut Active,
        row: &ReadRow,
        sink: &mut dyn Sink,
    ) -> Result<Option<Stop>, End> {
        let read = &row.read;
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
            return Err(End::Sample(
                Stop::NanInf,
                format!(
                    "NaN or Inf in the logits of {name} at step {}",
                    active.observed
                ),
            ));
        }
        let sent = (active.uplink, active.downlink);
        active.uplink += match self.config.link.support {
            Support::Full => {
                let vocab = u64::from(self.ensemble.vocab);
                self.ensemble.dtype_bytes.iter().map(|b| b * vocab).sum()
            }
            Support::Packet => row.uplink_bytes,
        };
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
        let decision = active
            .controller
            .observe(observed, force)
            .map_err(|e| End::Run(rule_failure(&active.job.key, e)))?;
        active.note_entropy(entropy);
        let stream = active.stream();
        let at = active.observed;
        active.observed += 1;
        let step = Step {
            decision,
            entropy,
            observed,
        };
        let (ended, taken) = match decision.mode {
            Mode::Latent => self.latent(active, read, &stream, step),
            Mode::Explicit => self.explicit(active, read, step),
        }
        .map_err(|(stop, error)| End::Sample(stop, error))?;
        sink.step(&StepEvent {
            key: &active.job.key,
            step: at,
            decision,
            entropy,
            observed,
            read,
            packet: taken.packet.as_ref(),
            noise_kl: taken.kl,
            token: taken.token,
            bytes: (active.uplink - sent.0, active.downlink - sent.1),
            model: self.first_model(),
        });
        if let Some(packet) = taken.packet
            && active.trace.is_some()
        {
            active.packets.push((at, packet));
        }
        Ok(ended)
    }

    fn latent(
        &mut self,
        active: &mut Active,
        read: &RowReadout,
        stream: &Stream,
        step: Step,
    ) -> Result<(Option<Stop>, Taken), (Stop, String)> {
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
        let agents = self.ensemble.agents.len() as u64;
        let meta = self.meta(active);
        let encoding = self.config.link.encoding;
        // Receivers are fed what came through the link, so that its bytes are the real ones.
        let (next, taken) = match self.config.link.message {
            LinkMessage::Belief => {
                let (received, bytes) = self
                    .link
                    .packet(&packet, meta, encoding)
                    .map_err(|e| fail(e.to_string()))?;
                active.downlink += bytes as u64 * agents;
                (NextFeed::Packet(received.clone()), received)
            }
            LinkMessage::Logits => {
                let mut probs = vec![0.0_f32; self.ensemble.vocab as usize];
                for (id, p) in packet.iter() {
                    probs[id as usize] = p;
                }
                let (probs, bytes) = self
                    .link
                    .dense(&probs, meta, encoding)
                    .map_err(|e| fail(e.to_string()))?;
                active.downlink += bytes as u64 * agents;
                let vocab = self.ensemble.vocab;
                (NextFeed::Payload(Payload::Dense { probs, vocab }), packet)
            }
            LinkMessage::Embed => {
                // Its length is known before the backend has mixed it.
                let hidden = self.first_model().hidden as usize;
                active.downlink += embed_len(hidden, self.ensemble.scalar) as u64 * agents;
                (NextFeed::Embed(packet.clone(), meta), packet)
            }
        };
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
            Some(&taken),
            &self.info.models[self.info.agents[0].index()],
        );
        active.next = next;
        let taken = Taken {
            packet: Some(taken),
            kl: noised.kl,
            token: None,
        };
        Ok((self.spent(active), taken))
    }

    fn explicit(
        &mut self,
        active: &mut Active,
        read: &RowReadout,
        step: Step,
    ) -> Result<(Option<Stop>, Taken), (Stop, String)> {
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
        let model = &self.info.models[self.info.agents[0].index()];
        active.record(read, step, 0.0, token, None, model);
        let Some(token) = token else {
            active.text.extend_from_slice(&self.ensemble.cue[0]);
            active.next = NextFeed::Tokens(self.ensemble.cue.clone());
            return Ok((self.spent(active), Taken::default()));
        };
        if self.ensemble.eos.contains(&token) {
            return Ok((Some(Stop::Eos), Taken::default()));
        }
        let one = BeliefPacket::new(vec![token], vec![1.0], 1.0, self.ensemble.vocab)
            .map_err(|e| (Stop::Backend, e.to_string()))?;
        let meta = self.meta(active);
        let (received, bytes) = self
            .link
            .packet(&one, meta, self.config.link.encoding)
            .map_err(|e| (Stop::Backend, e.to_string()))?;
        active.text.push(token);
        active.explicit += 1;
        let experts = self.ensemble.agents.len();
        active.downlink += bytes as u64 * experts as u64;
        active.next = NextFeed::Tokens(vec![received.ids().to_vec(); experts]);
        let taken = Taken {
            token: Some(token),
            ..Taken::default()
        };
        Ok((self.spent(active), taken))
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
        backend: &mut dyn Backend,
        active: Active,
        stop: Stop,
        error: Option<String>,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        self.stats.samples += 1;
        let outcome = active.outcome(stop, error, self.first_model());
        sink.finished(outcome, &self.info, backend.memory())
            .map_err(RunError::Sink)
    }
}

/// What a step put before the agents.
#[derive(Default)]
struct Taken {
    packet: Option<BeliefPacket>,
    kl: f64,
    token: Option<u32>,
}

/// Why a sample goes no further.
enum End {
    Sample(Stop, String),
    Run(RunError),
}

fn meta_of(fingerprint: u64, active: &Active) -> Meta {
    Meta {
        fingerprint,
        step: active.explicit + active.latent,
    }
}

fn rule_failure(key: &JobKey, source: ControllerFailure) -> RunError {
    RunError::Backend {
        context: format!("item {}", key.item_id),
        source: BackendError::Failed {
            context: "controller".into(),
            source,
        },
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
