//! The knobs of the loop as plain data: what a configuration file says and what a run manifest records.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The rule by which the controller turns entropies into modes (DL-MoM paper, section 4.3 and Appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// Latent iff the entropy is above `alpha` (suite A2.1).
    Threshold,
    /// Slope, mean and variance over the last `w` entropies (suites A2.2 to A2.7).
    Trend,
    /// The entropy against that of the current block's first step (SwiReasoning): latent mode is left
    /// below it, explicit mode above it.
    Reference,
    /// One latent block, left for good after `patience` entropies below `alpha` (`LaTER`, arXiv
    /// 2605.07315; with a patience of many steps the cold stop of Soft Thinking, arXiv 2505.15778).
    LatentThenExplicit,
    /// Control: latent until the latent budget is spent.
    AlwaysLatent,
    /// Control: never latent.
    AlwaysExplicit,
}

/// The unit in which `alpha` and the thresholds derived from it are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AlphaUnit {
    /// Entropy divided by `ln V`, the paper's unit; in `[0, 1]`.
    Normalized,
    /// Entropy in nats.
    Nats,
    /// Rank of the entropy among those of a pilot run, in `[0, 1]`: see [`crate::Ranks`].
    Quantile,
}

/// What decides the mode of the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// The first step is latent whatever its entropy.
    Latent,
    /// The gate decides the first step as every other.
    Gate,
}

/// Every knob of a controller. Validate with [`ControllerSpec::validate`] before use.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ControllerSpec {
    /// Decision rule.
    pub gate: Gate,
    /// Window of the trend gate in steps, at least 2; ignored by the other gates.
    pub w: Option<u32>,
    /// Entropy threshold, in `alpha_unit`.
    pub alpha: f64,
    /// Unit of `alpha`, `convergence_threshold` and `slope_eps`; `var_eps` is in its square.
    pub alpha_unit: AlphaUnit,
    /// Most switches per sample, forced exits included; -1 is unlimited, 0 is explicit only.
    pub cap: i64,
    /// Fewest consecutive latent steps before the gate may leave latent mode.
    pub min_dwell_latent: u32,
    /// Fewest consecutive explicit steps before the gate may leave explicit mode.
    pub min_dwell_explicit: u32,
    /// Entropy below which the trend gate calls a sample converged; default `0.25 alpha`.
    pub convergence_threshold: Option<f64>,
    /// Slope per step below minus which entropy counts as falling; default `0.02 alpha`.
    pub slope_eps: Option<f64>,
    /// Variance below which a falling entropy counts as settled; default `(0.1 alpha)^2`.
    pub var_eps: Option<f64>,
    /// Most latent steps per sample; then the mode is explicit for good.
    pub max_latent_steps: u32,
    /// What decides the first step.
    pub start: Start,
    /// Entropies below `alpha`, one after another, that end the block of the `latent_then_explicit`
    /// gate, at least 1; ignored by the other gates.
    #[serde(default = "one")]
    pub patience: u32,
}

fn one() -> u32 {
    1
}

impl Default for ControllerSpec {
    /// The paper's threshold of the reference pipeline: `alpha = 0.60` of `ln V`, at most 10 switches, 40
    /// latent steps; the gate decides the first step.
    fn default() -> Self {
        Self {
            gate: Gate::Threshold,
            w: None,
            alpha: 0.60,
            alpha_unit: AlphaUnit::Normalized,
            cap: 10,
            min_dwell_latent: 1,
            min_dwell_explicit: 1,
            convergence_threshold: None,
            slope_eps: None,
            var_eps: None,
            max_latent_steps: 40,
            start: Start::Gate,
            patience: 1,
        }
    }
}

/// What is done at exits from latent mode, by their count (SwiReasoning's switch-count control).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TriggerSpec {
    /// From this exit on `converge_text` is injected, at least 1.
    pub converge_after: u32,
    /// Text that ends the thinking, such as `</think>`.
    pub converge_text: String,
    /// Beyond this exit `terminate_text` is injected instead, at least `converge_after`.
    pub terminate_after: u32,
    /// Text that asks for the answer.
    pub terminate_text: String,
    /// Printed tokens left to a sample after `terminate_text`, at least 1; then it ends.
    pub terminate_steps: u32,
}

/// How the experts' preferences meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Trim, elect, merge (DL-MoM paper, Appendix C; TIES-Merging, `NeurIPS` 2023).
    #[default]
    Ties,
    /// Weighted mean of the centred logits: the logarithmic opinion pool.
    #[serde(alias = "geo")]
    Mean,
    /// Logarithm of the weighted mean of the probabilities: the linear opinion pool.
    Arith,
    /// Sum of the centred logits, the product of experts: as sharp as there are experts.
    Poe,
    /// The expert of the largest weight; among equal ones that of the lowest entropy.
    Best,
    /// One expert drawn by its weight at every step: the linear pool in distribution.
    Mixture,
}

/// What a vote of `ties` is measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Center {
    /// The expert's mean logit over the vocabulary (the paper).
    #[default]
    Mean,
    /// Its mean logit over the union of the experts' most probable tokens.
    TopkUnion,
    /// The log-probabilities of the expert named by `reference`, which does not vote: the shared base of
    /// TIES-Merging.
    Reference,
}

/// Which votes of `ties` are too weak to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trim {
    /// Below `theta` logits (the paper).
    #[default]
    Abs,
    /// All but the share `theta` of largest magnitude (TIES-Merging).
    Density,
    /// Below `theta` standard deviations of the expert's votes.
    Std,
}

/// How `ties` elects a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Elect {
    /// By the number of votes (the paper).
    #[default]
    Count,
    /// By their sum (TIES-Merging).
    Mass,
}

/// What `ties` does where no sign wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tie {
    /// 0, the centre (the paper).
    #[default]
    Zero,
    /// The mean of all votes that were not trimmed.
    Mean,
}

/// How much an expert counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightRule {
    /// All the same.
    Uniform,
    /// By `1 / (H + 0.01)` of its entropy at this step, in nats.
    Entropy,
    /// By the difference of its two largest probabilities at this step, and 0.01.
    Margin,
    /// By `exp(-c)`, c its cross-entropy on the pilot's solutions in nats per token (`PackLLM`, arXiv
    /// 2404.11531, on solutions instead of prompts).
    Pilot,
}

/// A rule, or one number of at least 0 for every expert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Weights {
    /// A rule.
    Rule(WeightRule),
    /// Numbers in the order of the experts; only their ratios matter.
    Fixed(Vec<f64>),
}

impl Default for Weights {
    fn default() -> Self {
        Self::Rule(WeightRule::Uniform)
    }
}

/// How logits of unequal scale are made comparable before they are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Calibrate {
    /// Not at all.
    #[default]
    None,
    /// Divided by the expert's temperature.
    Temperature,
    /// Scaled to the geometric mean of the experts' standard deviations.
    Zscore,
}

/// Merge only where it may matter; elsewhere the pivot expert's distribution stands (after SAFE, arXiv
/// 2510.15346). With both conditions, either suffices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MergeGate {
    /// Merge where some expert's largest probability is below this, in `(0, 1]`.
    #[serde(default)]
    pub max_p: Option<f64>,
    /// Merge where the Jensen-Shannon divergence of the experts' distributions is above this, nats.
    #[serde(default)]
    pub js: Option<f64>,
    /// The expert that decides alone elsewhere, by its place.
    #[serde(default)]
    pub pivot: u32,
}

/// Consensus operator over the experts' centred logits. With one expert every operator is the identity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ConsensusSpec {
    /// Operator.
    pub method: Method,
    /// Trim threshold of `ties`, in the unit of `trim`.
    pub theta: f32,
    /// Added to the clamped agreement count in the divisor of `ties`.
    pub eps: f32,
    /// What a vote of `ties` is measured against.
    pub center: Center,
    /// The expert of `center: reference`, by its place.
    pub reference: u32,
    /// Which votes of `ties` are too weak to count.
    pub trim: Trim,
    /// How `ties` elects a sign.
    pub elect: Elect,
    /// What `ties` does where no sign wins.
    pub tie: Tie,
    /// Rank to which `ties` first projects the experts' preferences, by the largest eigenvalues of
    /// their Gram matrix; null for no projection.
    pub spectral: Option<u32>,
    /// How much an expert counts.
    pub weights: Weights,
    /// How unequal scales are made comparable.
    pub calibrate: Calibrate,
    /// Temperatures of `calibrate: temperature` in the order of the experts; empty until a pilot has
    /// fitted them.
    pub temperatures: Vec<f64>,
    /// Where to merge at all; null for everywhere.
    pub gate: Option<MergeGate>,
}

impl Default for ConsensusSpec {
    fn default() -> Self {
        Self::paper()
    }
}

impl ConsensusSpec {
    /// The paper's preset: TIES with `theta = 0.1`, `eps = 1e-6` and no option.
    #[must_use]
    pub fn paper() -> Self {
        Self {
            method: Method::Ties,
            theta: 0.1,
            eps: 1e-6,
            center: Center::Mean,
            reference: 0,
            trim: Trim::Abs,
            elect: Elect::Count,
            tie: Tie::Zero,
            spectral: None,
            weights: Weights::default(),
            calibrate: Calibrate::None,
            temperatures: Vec::new(),
            gate: None,
        }
    }

    /// Another operator without options.
    #[must_use]
    pub fn of(method: Method) -> Self {
        Self {
            method,
            ..Self::paper()
        }
    }

    /// Whether it draws, so that seeds matter.
    #[must_use]
    pub fn draws(&self) -> bool {
        self.method == Method::Mixture
    }

    /// Whether a pilot must run first.
    #[must_use]
    pub fn needs_pilot(&self) -> bool {
        self.weights == Weights::Rule(WeightRule::Pilot)
            || (self.calibrate == Calibrate::Temperature && self.temperatures.is_empty())
    }
}

/// Noise on the packet in latent mode (suite A1).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum NoiseSpec {
    /// The packet as it is.
    None,
    /// Gumbel-Softmax `softmax((ln p + g) / tau)`; `tau > 0`.
    Gumbel {
        /// Temperature of the perturbed softmax.
        tau: f64,
    },
    /// `Dirichlet(lambda p)`; `lambda > 0`.
    Dirichlet {
        /// Concentration.
        lambda: f64,
    },
}

/// What is kept of a packet before it is mixed, in this order (Soft Thinking, arXiv 2505.15778). The
/// entries are those of the packet, so that its `k` is the `top_k` of the source.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FilterSpec {
    /// Probabilities are raised to `1 / temperature` and renormalised, above 0.
    pub temperature: f64,
    /// Keep the shortest prefix whose mass reaches this, in `(0, 1]`.
    pub top_p: f64,
    /// Keep entries of at least this share of the largest, in `[0, 1)`.
    pub min_p: f64,
    /// Keep this many entries at most; 0 keeps all.
    pub keep: u32,
}

impl FilterSpec {
    /// Keeps every entry as it is.
    pub const NONE: Self = Self {
        temperature: 1.0,
        top_p: 1.0,
        min_p: 0.0,
        keep: 0,
    };
}

impl Default for FilterSpec {
    fn default() -> Self {
        Self::NONE
    }
}

/// How an explicit token is drawn from the full merged distribution.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SamplingSpec {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f64,
    /// Keep the `top_k` most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens whose mass reaches `top_p`, in `(0, 1]`.
    pub top_p: f64,
    /// Keep tokens with at least `min_p` times the largest probability, in `[0, 1)`.
    pub min_p: f64,
    /// Log-probabilities of tokens printed before are multiplied by it before anything else, at
    /// least 1; 1 is no penalty (CTRL, arXiv 1909.05858, on log-probabilities, which do not depend on
    /// where the logits' zero is).
    #[serde(default = "no_penalty")]
    pub repetition_penalty: f64,
}

fn no_penalty() -> f64 {
    1.0
}

impl SamplingSpec {
    /// Greedy decoding.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
    };

    /// Whether the token is simply the most probable one.
    #[must_use]
    pub fn is_argmax(&self) -> bool {
        self.is_greedy() && self.repetition_penalty == 1.0
    }

    /// Whether the draw is the most probable token, so that seeds cannot matter.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}
