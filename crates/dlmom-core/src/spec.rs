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
}

/// Consensus operator over the experts' centred logits (DESIGN of the packet loop, step 5).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "method", rename_all = "snake_case", deny_unknown_fields)]
pub enum ConsensusSpec {
    /// Trim, elect, merge as the DL-MoM paper's Appendix C states it.
    Ties {
        /// Entries with `|v| < theta` are trimmed to 0; absolute, in logits.
        theta: f32,
        /// Added to the clamped agreement count in the divisor.
        eps: f32,
    },
    /// Mean of the centred logits, the logarithmic opinion pool.
    Mean,
}

impl ConsensusSpec {
    /// The paper's preset: `theta = 0.1`, `eps = 1e-6`.
    #[must_use]
    pub fn paper() -> Self {
        Self::Ties {
            theta: 0.1,
            eps: 1e-6,
        }
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
}

impl SamplingSpec {
    /// Greedy decoding.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
    };

    /// Whether the draw is the most probable token, so that seeds cannot matter.
    #[must_use]
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}
