//! What the loop hands back for a sample.

use dlmom_core::{Force, Mode, Reason, Schedule};
use dlmom_packet::BeliefPacket;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::PromptSource;
use crate::topology::{Handoff, Trigger};

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
    /// Which of the session's configurations it runs.
    #[serde(default)]
    pub config: u32,
    /// Modes of the reference pipeline's sample; needed by the control `same_exits`.
    #[serde(default)]
    pub schedule: Option<Schedule>,
    /// Another configuration that is run beside it and compared with it, step by step.
    #[serde(default)]
    pub rival: Option<Rival>,
}

/// A configuration whose preferences are compared with a sample's, on a second row of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rival {
    /// Which of the session's configurations.
    pub config: u32,
    /// What the second row is fed.
    pub follow: Follow,
}

/// What the second row of a comparison is fed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Follow {
    /// Its own inputs: free-running, compared at equal step numbers until either sample ends.
    Free,
    /// The first row's inputs, at every step: teacher-forced.
    Inputs,
    /// The first row's history, and its own message at the last latent step only.
    OneStep,
}

/// Divergences of a rival's preferences from a sample's; arrays of equal length, one entry per comparison.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Divergences {
    /// The sample's step.
    pub step: Vec<u32>,
    /// `KL(sample || rival)` of the merged distributions over the whole vocabulary, nats.
    pub kl: Vec<f64>,
    /// Cosine of the centred merged preferences.
    pub cosine: Vec<f64>,
}

/// Control passing from one agent to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HandoffRecord {
    /// The sample's step that led to it.
    pub step: u32,
    /// Place of the agent that had control.
    pub from: u32,
    /// Place of the agent that takes over.
    pub to: u32,
    /// Why.
    pub trigger: Trigger,
    /// What is handed over.
    pub payload: Handoff,
    /// Positions it takes in the receiver's lane, its prompt aside.
    pub positions: u32,
    /// Bytes it takes on the link.
    pub bytes: u64,
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
    /// The answering agent gave no answer, and no handoff was left.
    Handoffs,
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
    /// `KL(fed || packet)` of filter, noise and control, nats; 0 in explicit steps, null where what was fed has other tokens.
    pub noise_kl: Vec<Option<f64>>,
    /// Their Jensen-Shannon divergence, nats; 0 in explicit steps.
    #[serde(default)]
    pub noise_js: Vec<f64>,
    /// The printed token of explicit steps.
    pub token: Vec<Option<u32>>,
    /// Tokens of an injected text, fed in place of a printed one.
    #[serde(default)]
    pub injected: Vec<u32>,
    /// What the loop forced on the controller.
    #[serde(default)]
    pub force: Vec<Option<Force>>,
    /// Place of the agent that had control, in sequential topologies.
    #[serde(default)]
    pub agent: Vec<u32>,
    /// Handoffs, in order.
    #[serde(default)]
    pub handoffs: Vec<HandoffRecord>,
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
    /// Which of the session's configurations it ran.
    pub config: u32,
    /// How it ended.
    pub stop: Stop,
    /// Detail of a failure, one line.
    pub error: Option<String>,
    /// Printed token ids of the agent that answered, in its vocabulary.
    pub tokens: Vec<u32>,
    /// Printed text of the agent that answered.
    pub text: String,
    /// Printed tokens of all agents; an end token is neither printed nor counted.
    pub explicit_tokens: u32,
    /// Tokens of injected texts, which are fed and not counted as printed.
    pub injected_tokens: u32,
    /// Latent steps.
    pub latent_steps: u32,
    /// Lengths of the latent segments in order.
    pub latent_segments: Vec<u32>,
    /// Changes of mode.
    pub switches: u32,
    /// Stretches of equal mode, explicit first.
    pub schedule: Schedule,
    /// Handoffs between agents.
    pub handoffs: u32,
    /// What each was.
    pub handoff_log: Vec<HandoffRecord>,
    /// Bytes handed over between agents.
    pub handoff_bytes: u64,
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
    /// Mean `KL(fed || packet)` over latent steps in nats; `None` without any, or where one has none.
    pub noise_kl: Option<f64>,
    /// Mean Jensen-Shannon divergence of the same; `None` without latent steps.
    pub noise_js: Option<f64>,
    /// Share of steps in which all experts have the same most probable token; `None` for one expert.
    pub agreement: Option<f64>,
    /// Share of steps in which experts were merged; `None` for one expert.
    pub merge_rate: Option<f64>,
    /// How far a rival's preferences were, where there was one.
    pub divergences: Option<Divergences>,
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
