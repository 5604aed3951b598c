//! What a pilot of the reference pipeline found: the scale of entropies, and how the experts' scales differ.

use dlmom_core::Ranks;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Quantiles kept of a pilot's entropies.
pub const PILOT_QUANTILES: usize = 501;

/// A pilot's findings, recorded in the manifest and used by every resume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pilot {
    /// Ids of its items.
    pub items: Vec<String>,
    /// Steps behind the quantiles.
    pub steps: u64,
    /// Quantiles of the normalised entropies of the reference pipeline, all steps explicit.
    pub quantiles: Ranks,
    /// Temperature of every agent that makes its probabilities of the items' solutions largest; null where the benchmark has
    /// no solutions in text, or nobody asked.
    #[serde(default)]
    pub temperatures: Option<Vec<f64>>,
    /// Mean `-ln p` per token of the same solutions, by agent, at temperature 1.
    #[serde(default)]
    pub cross_entropies: Option<Vec<f64>>,
    /// SHA-256 of the recorded packets of other items, where a control feeds them.
    #[serde(default)]
    pub donors_sha256: Option<String>,
    /// Ids of the items they are of, in the order of the file.
    #[serde(default)]
    pub donor_items: Vec<String>,
}

impl Pilot {
    /// A pilot whose findings change nothing, for checks before there is one.
    #[must_use]
    pub fn assumed(agents: usize) -> Self {
        Self {
            items: Vec::new(),
            steps: 0,
            quantiles: Ranks::identity(),
            temperatures: Some(vec![1.0; agents]),
            cross_entropies: Some(vec![0.0; agents]),
            donors_sha256: None,
            donor_items: Vec::new(),
        }
    }

    /// Weights `exp(-cross-entropy)` of the agents (`PackLLM`, arXiv 2404.11531), relative to the best.
    #[must_use]
    pub fn weights(&self) -> Option<Vec<f64>> {
        let found = self.cross_entropies.as_ref()?;
        let least = found.iter().copied().fold(f64::INFINITY, f64::min);
        Some(found.iter().map(|c| (least - c).exp()).collect())
    }
}
