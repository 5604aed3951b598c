//! A sample between admission and finish.

use std::collections::VecDeque;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use dlmom_core::{
    Controller, Decision, Force, Mode, RowReadout, Schedule, Stream, Triggers, sample_key,
};
use dlmom_packet::{BeliefPacket, Meta};

use crate::backend::{ModelInfo, Payload};
use crate::ids::SlotId;
use crate::outcome::{
    Divergences, ENTROPY_BINS, Follow, HandoffRecord, Job, Outcome, Spread, Stop, Trace,
    entropy_bin,
};

/// Entries of a packet kept in a trace.
pub(crate) const TRACE_TOP: usize = 5;

/// One observation and what the controller made of it.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) decision: Decision,
    pub(crate) force: Option<Force>,
    /// Mean of the experts' normalised entropies.
    pub(crate) entropy: f64,
    /// The same in the controller's unit.
    pub(crate) observed: f64,
}

/// An input of a sample: its moving agents' own token ids, or one message for all of them.
#[derive(Clone)]
pub(crate) enum NextFeed {
    /// Of every moving agent, in order.
    Tokens(Vec<Vec<u32>>),
    Packet(BeliefPacket),
    /// A transcript.
    Packets(Vec<BeliefPacket>),
    Payload(Payload),
    /// Of every moving agent, in order.
    Payloads(Vec<Payload>),
    /// A packet that the backend has yet to mix, before it can be sent as an embedding, and what travels beside it.
    Embed(BeliefPacket, Meta),
    /// The moving agent's hidden state, which the backend has yet to align, and what travels beside it.
    Hidden(Meta),
}

impl NextFeed {
    /// Positions it takes in the lane of the `place`-th moving agent.
    pub(crate) fn positions(&self, place: usize) -> u32 {
        match self {
            Self::Tokens(tokens) => tokens.get(place).map_or(0, Vec::len) as u32,
            Self::Packets(packets) => packets.len() as u32,
            Self::Payload(payload) => payload.positions() as u32,
            Self::Payloads(payloads) => payloads.get(place).map_or(0, Payload::positions) as u32,
            Self::Packet(_) | Self::Embed(..) | Self::Hidden(_) => 1,
        }
    }

    /// Positions of the longest feed among `agents` moving agents.
    pub(crate) fn longest(&self, agents: usize) -> u32 {
        (0..agents).map(|at| self.positions(at)).max().unwrap_or(0)
    }
}

/// A message of a latent or printed step, as its receivers decoded it: what a transcript is made of.
#[derive(Clone, Debug)]
pub(crate) enum Thought {
    Packet(u32, BeliefPacket),
    Embed(u32, Vec<f32>),
    Dense(u32, Vec<f32>),
}

impl Thought {
    pub(crate) fn step(&self) -> u32 {
        match *self {
            Self::Packet(step, _) | Self::Embed(step, _) | Self::Dense(step, _) => step,
        }
    }
}

/// One agent's turn in a chain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Visit {
    /// Tokens printed in it.
    pub(crate) text: Vec<u32>,
    /// Steps and printed tokens before it.
    pub(crate) steps_before: u32,
    /// Most steps it may take.
    pub(crate) steps: u32,
}

/// Two rows that are compared.
#[derive(Clone, Debug)]
pub(crate) enum Pairing {
    /// This sample is compared with the rival in a slot, while there is one.
    Leader(Option<SlotId>),
    /// This sample is the rival of the one in a slot.
    Rival(SlotId, Follow),
}

/// A sample in a slot.
pub(crate) struct Active {
    pub(crate) job: Job,
    pub(crate) plan: usize,
    /// Its place in the order of admission; a rival has that of its sample.
    pub(crate) order: u64,
    pub(crate) controller: Box<dyn Controller>,
    pub(crate) triggers: Option<Triggers>,
    /// What is fed next, and after it; a decision is due when only one is left.
    pub(crate) queue: VecDeque<NextFeed>,
    pub(crate) key: u64,
    /// Place of the agent in control, in a chain.
    pub(crate) current: usize,
    pub(crate) visit: Visit,
    /// All that was thought and printed so far, in a chain.
    pub(crate) thoughts: Vec<Thought>,
    /// Printed texts of visits that were handed over, with the place of their agent.
    pub(crate) notes: Vec<(usize, String)>,
    pub(crate) handoff_log: Vec<HandoffRecord>,
    pub(crate) handoff_bytes: u64,
    /// Switches and latent steps of earlier visits.
    pub(crate) earlier: (u32, u32),
    /// Observations so far: the step of the random streams.
    pub(crate) observed: u32,
    /// Positions of every agent's lane, their limits, and those ever fed.
    pub(crate) lengths: Vec<u32>,
    pub(crate) limits: Vec<u32>,
    pub(crate) forwarded: Vec<u32>,
    /// Lengths at which the lanes were last compressed; 0 before the first time.
    pub(crate) compressed_at: Vec<u32>,
    /// Lengths of the lanes where the current latent stretch began.
    pub(crate) stretch_start: Vec<u32>,
    /// Packets of latent steps, where a trace is kept.
    pub(crate) packets: Vec<(u32, BeliefPacket)>,
    pub(crate) locked: bool,
    pub(crate) explicit: u32,
    pub(crate) injected: u32,
    pub(crate) latent: u32,
    pub(crate) segments: Vec<u32>,
    pub(crate) schedule: Schedule,
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) uplink: u64,
    pub(crate) downlink: u64,
    pub(crate) entropy_sum: f64,
    pub(crate) entropy_min: f64,
    pub(crate) entropy_max: f64,
    pub(crate) hist: Vec<u32>,
    pub(crate) mass_sum: f64,
    pub(crate) kl_sum: Option<f64>,
    pub(crate) js_sum: f64,
    pub(crate) agreed: u32,
    pub(crate) merged: u32,
    pub(crate) last_mode: Option<Mode>,
    pub(crate) pairing: Option<Pairing>,
    pub(crate) divergences: Divergences,
    pub(crate) admitted: Instant,
    pub(crate) started_at: f64,
    pub(crate) trace: Option<Trace>,
}

impl Active {
    pub(crate) fn new(
        job: Job,
        plan: usize,
        agents: usize,
        controller: Box<dyn Controller>,
        triggers: Option<Triggers>,
    ) -> Self {
        let key = sample_key(&job.key.item_id, job.key.sample, 0);
        let trace = job.trace.then(Trace::default);
        Self {
            job,
            plan,
            order: 0,
            controller,
            triggers,
            queue: VecDeque::new(),
            key,
            current: 0,
            visit: Visit::default(),
            thoughts: Vec::new(),
            notes: Vec::new(),
            handoff_log: Vec::new(),
            handoff_bytes: 0,
            earlier: (0, 0),
            observed: 0,
            lengths: vec![0; agents],
            limits: vec![0; agents],
            forwarded: vec![0; agents],
            compressed_at: vec![0; agents],
            stretch_start: vec![0; agents],
            packets: Vec::new(),
            locked: false,
            explicit: 0,
            injected: 0,
            latent: 0,
            segments: Vec::new(),
            schedule: Schedule::default(),
            prompt_tokens: vec![0; agents],
            uplink: 0,
            downlink: 0,
            entropy_sum: 0.0,
            entropy_min: f64::INFINITY,
            entropy_max: f64::NEG_INFINITY,
            hist: vec![0; ENTROPY_BINS],
            mass_sum: 0.0,
            kl_sum: Some(0.0),
            js_sum: 0.0,
            agreed: 0,
            merged: 0,
            last_mode: None,
            pairing: None,
            divergences: Divergences::default(),
            admitted: Instant::now(),
            started_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |d| d.as_secs_f64()),
            trace,
        }
    }

    pub(crate) fn stream(&self) -> Stream {
        Stream {
            seed: self.job.key.seed,
            sample: self.key,
            step: u64::from(self.observed),
        }
    }

    /// Latent and printed steps so far.
    pub(crate) fn steps(&self) -> u32 {
        self.explicit + self.latent
    }

    /// Steps taken in the current visit.
    pub(crate) fn visit_steps(&self) -> u32 {
        self.steps() - self.visit.steps_before
    }

    /// The slot of the sample it is compared with, where it is the rival of one.
    pub(crate) fn leader(&self) -> Option<(SlotId, Follow)> {
        match self.pairing {
            Some(Pairing::Rival(slot, follow)) => Some((slot, follow)),
            _ => None,
        }
    }

    /// The slot of its rival.
    pub(crate) fn rival(&self) -> Option<SlotId> {
        match self.pairing {
            Some(Pairing::Leader(slot)) => slot,
            _ => None,
        }
    }

    /// Whether the next readout is one to decide by.
    pub(crate) fn is_due(&self) -> bool {
        self.queue.len() == 1
    }

    /// Counts one step's entropy and consensus.
    pub(crate) fn note(&mut self, entropy: f64, read: &RowReadout) {
        self.entropy_sum += entropy;
        self.entropy_min = self.entropy_min.min(entropy);
        self.entropy_max = self.entropy_max.max(entropy);
        self.hist[entropy_bin(entropy)] += 1;
        self.agreed += u32::from(read.agreed);
        self.merged += u32::from(read.merged);
    }

    /// Counts one step's mode.
    pub(crate) fn note_mode(&mut self, mode: Mode) {
        self.schedule.push(mode);
        if mode == Mode::Latent {
            match (self.last_mode, self.segments.last_mut()) {
                (Some(Mode::Latent), Some(last)) => *last += 1,
                _ => self.segments.push(1),
            }
        }
        self.last_mode = Some(mode);
    }

    pub(crate) fn outcome(
        self,
        stop: Stop,
        error: Option<String>,
        model: &ModelInfo,
        experts: usize,
    ) -> Outcome {
        let per_latent = |sum: f64| (self.latent > 0).then(|| sum / f64::from(self.latent));
        let per_step = |count: u32| {
            (experts > 1 && self.observed > 0).then(|| f64::from(count) / f64::from(self.observed))
        };
        let entropy = if self.observed == 0 {
            Spread::default()
        } else {
            Spread {
                mean: self.entropy_sum / f64::from(self.observed),
                min: self.entropy_min,
                max: self.entropy_max,
            }
        };
        Outcome {
            stop,
            error,
            text: model.decode(&self.visit.text),
            explicit_tokens: self.explicit,
            injected_tokens: self.injected,
            latent_steps: self.latent,
            latent_segments: self.segments,
            switches: self.earlier.0 + self.controller.switches(),
            schedule: self.schedule,
            handoffs: self.handoff_log.len() as u32,
            handoff_bytes: self.handoff_bytes,
            prompt_tokens: self.prompt_tokens,
            forward_tokens: self.forwarded,
            uplink_bytes: self.uplink,
            downlink_bytes: self.downlink,
            entropy,
            entropy_hist: self.hist,
            topk_mass: per_latent(self.mass_sum),
            noise_kl: self.kl_sum.and_then(per_latent),
            noise_js: per_latent(self.js_sum),
            agreement: per_step(self.agreed),
            merge_rate: per_step(self.merged),
            divergences: matches!(self.pairing, Some(Pairing::Leader(_)))
                .then_some(self.divergences),
            latency_s: self.admitted.elapsed().as_secs_f64(),
            started_at: self.started_at,
            trace: self.trace.map(|trace| Trace {
                handoffs: self.handoff_log.clone(),
                ..trace
            }),
            handoff_log: self.handoff_log,
            packets: self.packets,
            tokens: self.visit.text,
            config: self.job.config,
            key: self.job.key,
        }
    }

    /// Adds a step to the trace, where one is kept; `fed` is the packet of a latent step.
    pub(crate) fn record(
        &mut self,
        read: &RowReadout,
        step: Step,
        taken: &Taken,
        model: &ModelInfo,
    ) {
        let Some(trace) = &mut self.trace else { return };
        let (ids, probs) = taken
            .packet
            .as_ref()
            .map_or((&read.ids[..], &read.probs[..]), |p| (p.ids(), p.probs()));
        let keep = TRACE_TOP.min(ids.len());
        trace.entropy.push(step.entropy);
        trace.observed.push(step.observed);
        trace.expert_entropy.push(read.entropies.clone());
        trace.merged_entropy.push(read.merged_entropy);
        trace.mode.push(step.decision.mode);
        trace.reason.push(step.decision.reason);
        trace.force.push(step.force);
        trace.agent.push(self.current as u32);
        trace.injected.push(taken.injected.len() as u32);
        trace.top_ids.push(ids[..keep].to_vec());
        trace.top_probs.push(probs[..keep].to_vec());
        trace
            .top_tokens
            .push(ids[..keep].iter().map(|&id| model.decode(&[id])).collect());
        trace.mass.push(read.mass);
        trace.noise_kl.push(taken.kl);
        trace.noise_js.push(taken.js);
        trace.token.push(taken.token);
    }
}

/// What a step put before the agents.
#[derive(Clone)]
pub(crate) struct Taken {
    pub(crate) packet: Option<BeliefPacket>,
    pub(crate) kl: Option<f64>,
    pub(crate) js: f64,
    pub(crate) token: Option<u32>,
    /// Tokens of an injected text, fed in its place.
    pub(crate) injected: Vec<u32>,
}

impl Default for Taken {
    fn default() -> Self {
        Self {
            packet: None,
            kl: Some(0.0),
            js: 0.0,
            token: None,
            injected: Vec::new(),
        }
    }
}
