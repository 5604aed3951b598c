//! What the loop hands back for a sample.

use dlmom_core::{Mode, Reason};
use dlmom_packet::BeliefPacket;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::PromptSource;

/// Identifies a sample within an experiment.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub struct JobKey {
    /// Stable id of the benchmark item.
    pub item_id: String,
    /// Run seed.
    pub seed: u64,
    /// Index among several samples of one item and seed.
    pub sample: u32,
}

/// One sample to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Its identity, from which every draw derives.
    pub key: JobKey,
    /// One prompt per agent.
    pub prompts: Vec<PromptSource>,
    /// Whether to keep the step-by-step record.
    pub trace: bool,
}

/// Why a sample has no answer of its own making.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// An end token was chosen in explicit mode.
    Eos,
    /// `max_steps` was spent.
    Budget,
    /// A lane reached the end of its context.
    Context,
    /// NaN or Inf in an expert's logits.
    NanInf,
    /// The prompt could not be encoded, or does not fit.
    Prompt,
    /// The backend failed on this sample.
    Backend,
}

/// Smallest, mean and largest value of a per-step quantity, with a histogram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Spread {
    /// Mean over steps.
    pub mean: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

/// Step-by-step record of a sample; arrays of equal length, one entry per step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Trace {
    /// Mean of the experts' normalised entropies.
    pub entropy: Vec<f64>,
    /// The entropy the controller saw, in its unit.
    pub observed: Vec<f64>,
    /// Every expert's entropy in nats, `[steps][experts]`.
    pub expert_entropy: Vec<Vec<f64>>,
    /// Entropy of the merged distribution in nats.
    pub merged_entropy: Vec<f64>,
    /// Mode of the step.
    pub mode: Vec<Mode>,
    /// Why.
    pub reason: Vec<Reason>,
    /// Ids of the packet's first entries, `[steps][<= 5]`.
    pub top_ids: Vec<Vec<u32>>,
    /// Their probabilities after noise.
    pub top_probs: Vec<Vec<f32>>,
    /// Their text.
    pub top_tokens: Vec<Vec<String>>,
    /// Top-k mass before renormalisation.
    pub mass: Vec<f32>,
    /// `KL(p' || p)` of the noise, nats; 0 in explicit steps.
    pub noise_kl: Vec<f64>,
    /// The printed token of explicit steps.
    pub token: Vec<Option<u32>>,
}

/// Bounds of the entropy histogram: 4 bins a decade from 1e-5 to 1 of normalised entropy.
pub const ENTROPY_BINS: usize = 22;

/// The bin of a normalised entropy: bin 0 is below 1e-5, bin `1 + floor(4 (log10 H + 5))` otherwise.
#[must_use]
pub fn entropy_bin(h: f64) -> usize {
    if h < 1e-5 {
        return 0;
    }
    let bin = 1.0 + (4.0 * (h.log10() + 5.0)).floor();
    (bin as usize).min(ENTROPY_BINS - 1)
}

/// What came out of one sample.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Its identity.
    pub key: JobKey,
    /// How it ended.
    pub stop: Stop,
    /// Detail of a failure, one line.
    pub error: Option<String>,
    /// Printed token ids.
    pub tokens: Vec<u32>,
    /// Printed text.
    pub text: String,
    /// Printed tokens; an end token is neither printed nor counted.
    pub explicit_tokens: u32,
    /// Latent steps.
    pub latent_steps: u32,
    /// Lengths of the latent segments in order.
    pub latent_segments: Vec<u32>,
    /// Changes of mode.
    pub switches: u32,
    /// Handoffs between agents.
    pub handoffs: u32,
    /// Prompt tokens of every agent.
    pub prompt_tokens: Vec<u32>,
    /// Positions forwarded by every agent, prompt included.
    pub forward_tokens: Vec<u32>,
    /// Bytes the experts sent to consensus. A single agent's link is a loopback: the same messages, to itself.
    pub uplink_bytes: u64,
    /// Bytes consensus sent to the experts.
    pub downlink_bytes: u64,
    /// Normalised entropy over steps (mean of the experts).
    pub entropy: Spread,
    /// Counts of the normalised entropies by [`entropy_bin`].
    pub entropy_hist: Vec<u32>,
    /// Mean top-k mass over latent steps; `None` without any.
    pub topk_mass: Option<f64>,
    /// Mean noise KL over latent steps in nats; `None` without any.
    pub noise_kl: Option<f64>,
    /// Wall time from admission to finish, seconds.
    pub latency_s: f64,
    /// Start as seconds since the Unix epoch.
    pub started_at: f64,
    /// Step-by-step record, where it was asked for.
    pub trace: Option<Trace>,
    /// With a trace: the packets of latent steps as the agents took them in, each with its step.
    #[serde(skip)]
    pub packets: Vec<(u32, BeliefPacket)>,
}

impl Outcome {
    /// All steps: `explicit_tokens + latent_steps`.
    #[must_use]
    pub fn total_steps(&self) -> u32 {
        self.explicit_tokens + self.latent_steps
    }
}
