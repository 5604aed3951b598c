//! The loop: admits samples into slots, advances all of them together, decides each one's next input.

mod admit;
mod advance;
mod carry;
mod decide;
pub(crate) mod handoff;
pub(crate) mod plan;
mod prompt;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use dlmom_core::{Consensus, ConsensusSpec, ControllerFailure, Decision, Method, RowReadout, Rule};
use dlmom_packet::BeliefPacket;

use crate::backend::{Backend, BackendError, EnsembleInfo, LaneSpec, ModelInfo, Readout};
use crate::config::{ConfigError, LoopConfig};
use crate::controls::Donors;
use crate::ids::{AgentId, LaneId, SlotId};
use crate::link::{Link, Wire};
use crate::outcome::{HandoffRecord, Job, JobKey, Outcome, Stop};
use crate::sample::{Active, Pairing};

use plan::{AgentFacts, Plan};
use prompt::Beginnings;

pub use plan::check_config;

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

    /// Control has passed from one agent of a sample to another.
    fn handoff(&mut self, key: &JobKey, record: &HandoffRecord) {
        let _ = (key, record);
    }

    /// Whether a text answers its item, asked where an agent of a chain has ended; the loop cannot know.
    fn answered(&mut self, key: &JobKey, text: &str) -> bool {
        let _ = (key, text);
        true
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
    /// Place of the agent in control, in sequential topologies; 0 in others.
    pub agent: u32,
    /// The packet that the agents take in, in latent steps, as its receivers decoded it; for other messages the packet
    /// they were made from.
    pub packet: Option<&'a BeliefPacket>,
    /// `KL(fed || packet)` of filter, noise and control, nats; 0 in explicit steps, none where what is fed has other tokens.
    pub noise_kl: Option<f64>,
    /// Their Jensen-Shannon divergence, nats.
    pub noise_js: f64,
    /// The printed token of explicit steps; none for an end token, and where a text is injected instead.
    pub token: Option<u32>,
    /// The tokens of an injected text.
    pub injected: &'a [u32],
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
    /// Packets of other items, for the controls that feed them.
    pub donors: Donors,
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
    /// Positions of prompts and transcripts forwarded in one call while other samples wait for their next step; at least one
    /// sample's are. Those admitted first come first.
    pub prefill: u32,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            max_failures: 3,
            rows: None,
            prefill: 2048,
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

/// What the samples of one configuration took of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Samples finished.
    pub samples: u64,
    /// Rows advanced, summed over calls; rows of comparisons count with their own configuration.
    pub rows: u64,
    /// Seconds: every step's time, divided evenly among its rows.
    pub wall_s: f64,
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
    /// Calls and rows until a slot stayed free because no sample was left.
    pub full: (u64, u64),
    /// Positions of prompts, over all agents.
    pub prompts: u64,
    /// Those of them that the backend copied from an earlier forward of the same tokens; counted when a sample ends.
    pub copied: u64,
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
    /// Vectors of one model mean nothing to another.
    #[error(
        "link.message: {message} needs agents of one model, but there are {a} and {b}: a vector of one means nothing to the other"
    )]
    VectorLink {
        /// The message.
        message: &'static str,
        /// First model.
        a: String,
        /// Another one.
        b: String,
    },
    /// A control that feeds other items' packets, and none to feed.
    #[error(
        "controls: `other` needs packets of other items, and the pilot recorded none: no step of it was latent"
    )]
    NoDonors,
    /// A control that follows recorded modes, and none recorded.
    #[error(
        "item {item}: controls.same_exits needs the modes of the reference pipeline's sample, and there are none"
    )]
    NoSchedule {
        /// Item of the job.
        item: String,
    },
    /// A text that must be one token and is not.
    #[error("{what}: {text:?} is {tokens} tokens for {model}; it must be one")]
    NotOneToken {
        /// The field.
        what: &'static str,
        /// The text.
        text: String,
        /// The model.
        model: String,
        /// How many tokens it is.
        tokens: usize,
    },
    /// A job names a configuration that the session has not.
    #[error("item {item}: configuration {config} of {configs}")]
    UnknownConfig {
        /// Item of the job.
        item: String,
        /// The configuration named.
        config: u32,
        /// Configurations there are.
        configs: usize,
    },
    /// A comparison needs two rows.
    #[error("item {item}: a comparison needs 2 rows of the batch, there is 1")]
    OneRow {
        /// Item of the job.
        item: String,
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
    run_all(
        backend,
        std::slice::from_ref(config),
        options,
        hooks,
        jobs,
        sink,
    )
}

/// [`run_with`] with several configurations: every job names its own, and rows of all of them share
/// the batch.
///
/// # Errors
/// As [`run`].
pub fn run_all(
    backend: &mut dyn Backend,
    configs: &[LoopConfig],
    options: &RunOptions,
    hooks: Hooks,
    jobs: &mut dyn Iterator<Item = Job>,
    sink: &mut dyn Sink,
) -> Result<RunStats, RunError> {
    run_shared(backend, configs, options, hooks, jobs, sink).map(|(stats, _)| stats)
}

/// [`run_all`], with what the samples of every configuration took of it.
///
/// # Errors
/// As [`run`].
pub fn run_shared(
    backend: &mut dyn Backend,
    configs: &[LoopConfig],
    options: &RunOptions,
    hooks: Hooks,
    jobs: &mut dyn Iterator<Item = Job>,
    sink: &mut dyn Sink,
) -> Result<(RunStats, Vec<Share>), RunError> {
    let mut session = Session::new(backend, configs, options, hooks)?;
    let result = loop {
        match session.turn(backend, jobs, sink) {
            Ok(true) => {}
            Ok(false) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    session.close(backend);
    result.map(|()| (session.stats(), session.shares))
}

/// A run between its first step and its last, for callers that want the steps one at a time.
///
/// The backend is handed in anew for every turn and must be the same one.
pub struct Session {
    info: EnsembleInfo,
    facts: Vec<AgentFacts>,
    plans: Vec<Plan>,
    slots: Vec<Option<Active>>,
    /// Ids of the largest vocabulary.
    every_id: Vec<u32>,
    beginnings: Beginnings,
    /// A job that waits for more free slots than there are.
    waiting: Option<Job>,
    stats: RunStats,
    /// What the backend had copied before this run.
    copied_before: u64,
    /// Merges rows of which nobody reads the merged preferences: an operator may want all agents, or be a user's own.
    unread: ConsensusSpec,
    /// By configuration.
    shares: Vec<Share>,
    /// Samples admitted so far.
    admitted: u64,
    prefill: u32,
    failures: u32,
    max_failures: u32,
    rule: Option<Box<RuleSource>>,
    consensus: Option<Box<dyn Consensus>>,
    link: Box<dyn Link>,
    donors: Donors,
    compress_every: Option<u32>,
    readout: Readout,
    started: Instant,
    last_report: Instant,
    exhausted: bool,
}

impl Session {
    /// Checks the configurations against the loaded models; nothing runs yet.
    ///
    /// # Errors
    /// [`RunError`]: a configuration that cannot be run with these models, a text that cannot be tokenised.
    pub fn new(
        backend: &mut dyn Backend,
        configs: &[LoopConfig],
        options: &RunOptions,
        hooks: Hooks,
    ) -> Result<Self, RunError> {
        let info = backend.info().clone();
        let facts = AgentFacts::all(&info);
        if facts.is_empty() || facts.len() != info.agents.len() {
            return Err(RunError::NoAgents);
        }
        let plans = configs
            .iter()
            .map(|config| Plan::new(backend, config, &facts, &hooks.donors))
            .collect::<Result<Vec<_>, _>>()?;
        let now = Instant::now();
        Ok(Self {
            slots: (0..options
                .rows
                .unwrap_or(info.slots)
                .clamp(1, info.slots.max(1)))
                .map(|_| None)
                .collect(),
            unread: ConsensusSpec::of(Method::Mean),
            shares: vec![Share::default(); plans.len()],
            admitted: 0,
            prefill: options.prefill,
            every_id: (0..facts.iter().map(|f| f.vocab).max().unwrap_or(0)).collect(),
            info,
            facts,
            plans,
            beginnings: Beginnings::default(),
            waiting: None,
            stats: RunStats::default(),
            copied_before: backend.memory().copied_positions,
            failures: 0,
            max_failures: options.max_failures.max(1),
            rule: hooks.rule,
            consensus: hooks.consensus,
            link: hooks.link.unwrap_or_else(|| Box::new(Wire::default())),
            donors: hooks.donors,
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
        let began = Instant::now();
        if !self.exhausted {
            self.exhausted = self.admit(backend, jobs, sink)?;
            if self.exhausted {
                self.stats.full = (self.stats.steps, self.stats.rows);
            }
        }
        let moving = self.moving();
        if moving.is_empty() {
            return Ok(!self.exhausted);
        }
        if self.last_report.elapsed() >= PROGRESS_INTERVAL {
            self.last_report = Instant::now();
            sink.progress(&Progress {
                finished: self.stats.samples,
                active: moving.len() as u32,
                steps: self.stats.steps,
                rows: self.stats.rows,
            });
        }
        let plans: Vec<usize> = moving
            .iter()
            .filter_map(|&slot| self.active(slot).map(|active| active.plan))
            .collect();
        match self.advance(backend, &moving) {
            Ok(()) => {
                self.failures = 0;
                self.settle_all(backend, sink)?;
            }
            Err(error) => self.isolate(backend, &moving, error, sink)?,
        }
        let part = began.elapsed().as_secs_f64() / plans.len() as f64;
        for plan in plans {
            self.shares[plan].rows += 1;
            self.shares[plan].wall_s += part;
        }
        Ok(true)
    }

    fn occupied(&self) -> Vec<SlotId> {
        (0..self.slots.len())
            .filter(|&s| self.slots[s].is_some())
            .map(|s| SlotId(s as u32))
            .collect()
    }

    fn active(&self, slot: SlotId) -> Option<&Active> {
        self.slots.get(slot.index()).and_then(Option::as_ref)
    }

    /// The model that speaks for a sample: its tokens are of this vocabulary.
    fn model_of(&self, active: &Active) -> &ModelInfo {
        &self.info.models[self.facts[active.current].model.index()]
    }

    /// Places of the agents that move in a sample's next call.
    fn movers(&self, active: &Active) -> std::ops::Range<usize> {
        if self.plans[active.plan].chain().is_some() {
            active.current..active.current + 1
        } else {
            0..self.facts.len()
        }
    }

    /// Ends a sample: its lanes are freed, its rival's too, and its outcome goes to the sink.
    fn finish(
        &mut self,
        backend: &mut dyn Backend,
        slot: SlotId,
        active: Active,
        stop: Stop,
        error: Option<String>,
        sink: &mut dyn Sink,
    ) -> Result<(), RunError> {
        backend.close(&[slot]);
        if let Some(rival) = active.rival() {
            self.slots[rival.index()] = None;
            backend.close(&[rival]);
        }
        if let Some((leader, _)) = active.leader() {
            // A rival's own end is nobody's outcome; the sample it was compared with goes on alone.
            if let Some(leader) = self.slots[leader.index()].as_mut() {
                leader.pairing = Some(Pairing::Leader(None));
            }
            return Ok(());
        }
        self.stats.samples += 1;
        self.shares[active.plan].samples += 1;
        let experts = self.movers(&active).len();
        let model = &self.info.models[self.facts[active.current].model.index()];
        let outcome = active.outcome(stop, error, model, experts);
        let memory = backend.memory();
        self.stats.copied = memory.copied_positions.saturating_sub(self.copied_before);
        sink.finished(outcome, &self.info, memory)
            .map_err(RunError::Sink)
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
