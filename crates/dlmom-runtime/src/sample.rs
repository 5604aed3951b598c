//! A sample between admission and finish.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use dlmom_core::{Controller, Decision, Mode, RowReadout, Stream, sample_key};
use dlmom_packet::{BeliefPacket, Meta};

use crate::backend::{ModelInfo, Payload};
use crate::outcome::{ENTROPY_BINS, Job, Outcome, Spread, Stop, Trace, entropy_bin};

/// Entries of a packet kept in a trace.
pub(crate) const TRACE_TOP: usize = 5;

/// One observation and what the controller made of it.
#[derive(Clone, Copy)]
pub(crate) struct Step {
    pub(crate) decision: Decision,
    /// Mean of the experts' normalised entropies.
    pub(crate) entropy: f64,
    /// The same in the controller's unit.
    pub(crate) observed: f64,
}

/// The next input of a sample: its agents' own token ids, or one message for all of them.
pub(crate) enum NextFeed {
    Tokens(Vec<Vec<u32>>),
    Packet(BeliefPacket),
    Payload(Payload),
    /// A packet that the backend has yet to mix, before it can be sent as an embedding, and what travels beside it.
    Embed(BeliefPacket, Meta),
}

/// A sample in a slot.
pub(crate) struct Active {
    pub(crate) job: Job,
    pub(crate) controller: Box<dyn Controller>,
    pub(crate) next: NextFeed,
    pub(crate) key: u64,
    /// Observations so far: the step of the random streams.
    pub(crate) observed: u32,
    pub(crate) lengths: Vec<u32>,
    pub(crate) limits: Vec<u32>,
    /// Lengths at which the lanes were last compressed; 0 before the first time.
    pub(crate) compressed_at: Vec<u32>,
    /// Packets of latent steps, where a trace is kept.
    pub(crate) packets: Vec<(u32, BeliefPacket)>,
    pub(crate) text: Vec<u32>,
    pub(crate) explicit: u32,
    pub(crate) latent: u32,
    pub(crate) segments: Vec<u32>,
    pub(crate) prompt_tokens: Vec<u32>,
    pub(crate) uplink: u64,
    pub(crate) downlink: u64,
    pub(crate) entropy_sum: f64,
    pub(crate) entropy_min: f64,
    pub(crate) entropy_max: f64,
    pub(crate) hist: Vec<u32>,
    pub(crate) mass_sum: f64,
    pub(crate) kl_sum: f64,
    pub(crate) last_mode: Option<Mode>,
    pub(crate) admitted: Instant,
    pub(crate) started_at: f64,
    pub(crate) trace: Option<Trace>,
}

impl NextFeed {
    pub(crate) fn positions(&self, experts: usize) -> Vec<u32> {
        match self {
            Self::Tokens(tokens) => tokens.iter().map(|ids| ids.len() as u32).collect(),
            Self::Packet(_) | Self::Payload(_) | Self::Embed(..) => vec![1; experts],
        }
    }
}

impl Active {
    pub(crate) fn new(job: Job, controller: Box<dyn Controller>) -> Self {
        let key = sample_key(&job.key.item_id, job.key.sample, 0);
        let trace = job.trace.then(Trace::default);
        Self {
            job,
            controller,
            next: NextFeed::Tokens(Vec::new()),
            key,
            observed: 0,
            lengths: Vec::new(),
            limits: Vec::new(),
            compressed_at: Vec::new(),
            packets: Vec::new(),
            text: Vec::new(),
            explicit: 0,
            latent: 0,
            segments: Vec::new(),
            prompt_tokens: Vec::new(),
            uplink: 0,
            downlink: 0,
            entropy_sum: 0.0,
            entropy_min: f64::INFINITY,
            entropy_max: f64::NEG_INFINITY,
            hist: vec![0; ENTROPY_BINS],
            mass_sum: 0.0,
            kl_sum: 0.0,
            last_mode: None,
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

    pub(crate) fn note_entropy(&mut self, entropy: f64) {
        self.entropy_sum += entropy;
        self.entropy_min = self.entropy_min.min(entropy);
        self.entropy_max = self.entropy_max.max(entropy);
        self.hist[entropy_bin(entropy)] += 1;
    }

    pub(crate) fn outcome(self, stop: Stop, error: Option<String>, model: &ModelInfo) -> Outcome {
        let per_latent = |sum: f64| (self.latent > 0).then(|| sum / f64::from(self.latent));
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
            text: model.decode(&self.text),
            explicit_tokens: self.explicit,
            latent_steps: self.latent,
            latent_segments: self.segments,
            switches: self.controller.switches(),
            handoffs: 0,
            prompt_tokens: self.prompt_tokens,
            forward_tokens: self.lengths,
            uplink_bytes: self.uplink,
            downlink_bytes: self.downlink,
            entropy,
            entropy_hist: self.hist,
            topk_mass: per_latent(self.mass_sum),
            noise_kl: per_latent(self.kl_sum),
            latency_s: self.admitted.elapsed().as_secs_f64(),
            started_at: self.started_at,
            trace: self.trace,
            packets: self.packets,
            tokens: self.text,
            key: self.job.key,
        }
    }

    /// Adds a step to the trace, where one is kept; `fed` is the packet of a latent step.
    pub(crate) fn record(
        &mut self,
        read: &RowReadout,
        step: Step,
        kl: f64,
        token: Option<u32>,
        fed: Option<&BeliefPacket>,
        model: &ModelInfo,
    ) {
        let Some(trace) = &mut self.trace else { return };
        let (ids, probs) = fed.map_or((&read.ids[..], &read.probs[..]), |p| (p.ids(), p.probs()));
        let keep = TRACE_TOP.min(ids.len());
        trace.entropy.push(step.entropy);
        trace.observed.push(step.observed);
        trace.expert_entropy.push(read.entropies.clone());
        trace.merged_entropy.push(read.merged_entropy);
        trace.mode.push(step.decision.mode);
        trace.reason.push(step.decision.reason);
        trace.top_ids.push(ids[..keep].to_vec());
        trace.top_probs.push(probs[..keep].to_vec());
        trace
            .top_tokens
            .push(ids[..keep].iter().map(|&id| model.decode(&[id])).collect());
        trace.mass.push(read.mass);
        trace.noise_kl.push(kl);
        trace.token.push(token);
    }
}
