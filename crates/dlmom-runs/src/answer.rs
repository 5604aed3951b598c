//! What `generate --json` prints: one answer with how it came about.

use dlmom_runtime::{HandoffRecord, LoopConfig, Outcome, Spread, Stop, Trace};
use schemars::JsonSchema;
use serde::Serialize;

/// Version of [`Answer`].
pub const ANSWER_SCHEMA_VERSION: u32 = 2;

/// One answer of an ensemble.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(title = "dlmom-rs generate --json")]
pub struct Answer {
    /// Version of this schema.
    pub schema_version: u32,
    /// The experts, as they were asked for.
    pub experts: Vec<String>,
    /// The prompt: the user's last message.
    pub prompt: String,
    /// Run seed; matters only where something is drawn.
    pub seed: u64,
    /// The printed text.
    pub text: String,
    /// Ids of the printed tokens.
    pub tokens: Vec<u32>,
    /// How the sample ended.
    pub stop: Stop,
    /// Detail of a failure, one line; null without one.
    pub error: Option<String>,
    /// Printed tokens; an end token is neither printed nor counted.
    pub explicit_tokens: u32,
    /// Latent steps.
    pub latent_steps: u32,
    /// `explicit_tokens + latent_steps`.
    pub total_steps: u32,
    /// Lengths of the latent segments, in order.
    pub latent_segments: Vec<u32>,
    /// Changes of mode.
    pub switches: u32,
    /// Handoffs between agents, in order.
    pub handoffs: Vec<HandoffRecord>,
    /// Tokens of injected texts, fed and not counted as printed.
    pub injected_tokens: u32,
    /// Prompt tokens of every agent.
    pub prompt_tokens: Vec<u32>,
    /// Positions forwarded by every agent, prompt included.
    pub forward_tokens: Vec<u32>,
    /// Bytes the agents sent to consensus.
    pub uplink_bytes: u64,
    /// Bytes consensus sent to the agents.
    pub downlink_bytes: u64,
    /// Normalised entropy (`H / ln V`, mean of the experts) over steps.
    pub entropy: Spread,
    /// Mean top-k mass over latent steps; null without any.
    pub topk_mass: Option<f64>,
    /// Mean `KL(fed || packet)` of filter, noise and control over latent steps, nats; null without any, and where what was fed
    /// has other tokens.
    pub noise_kl: Option<f64>,
    /// Wall time in seconds, loading not included.
    pub latency_s: f64,
    /// The loop that ran.
    pub config: LoopConfig,
    /// Step by step, where it was asked for.
    pub trace: Option<Trace>,
}

impl Answer {
    /// The answer that an outcome is; the trace goes along where `keep_trace`.
    #[must_use]
    pub fn new(
        experts: &[String],
        prompt: &str,
        config: &LoopConfig,
        outcome: Outcome,
        keep_trace: bool,
    ) -> Self {
        Self {
            schema_version: ANSWER_SCHEMA_VERSION,
            experts: experts.to_vec(),
            prompt: prompt.to_owned(),
            seed: outcome.key.seed,
            total_steps: outcome.total_steps(),
            text: outcome.text,
            tokens: outcome.tokens,
            stop: outcome.stop,
            error: outcome.error,
            explicit_tokens: outcome.explicit_tokens,
            latent_steps: outcome.latent_steps,
            latent_segments: outcome.latent_segments,
            switches: outcome.switches,
            handoffs: outcome.handoff_log,
            injected_tokens: outcome.injected_tokens,
            prompt_tokens: outcome.prompt_tokens,
            forward_tokens: outcome.forward_tokens,
            uplink_bytes: outcome.uplink_bytes,
            downlink_bytes: outcome.downlink_bytes,
            entropy: outcome.entropy,
            topk_mass: outcome.topk_mass,
            noise_kl: outcome.noise_kl,
            latency_s: outcome.latency_s,
            config: config.clone(),
            trace: outcome.trace.filter(|_| keep_trace),
        }
    }
}
