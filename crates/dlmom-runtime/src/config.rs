//! One experiment's loop, as data.

use dlmom_core::{ConsensusSpec, ControllerSpec, NoiseSpec, SamplingSpec, SpecError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::link::{LinkMessage, LinkSpec, Support, WireEncoding};

/// Everything that decides the output of a sample, given its prompts, its seed and the models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoopConfig {
    /// Entries of a belief packet, at least 1 and at most the vocabulary; -1 is the whole vocabulary.
    pub k: i64,
    /// What crosses the links between agents and consensus.
    #[serde(default)]
    pub link: LinkSpec,
    /// Mode control.
    pub controller: ControllerSpec,
    /// How the experts' preferences meet.
    pub consensus: ConsensusSpec,
    /// Noise on the packet in latent mode.
    pub noise: NoiseSpec,
    /// How explicit tokens are chosen.
    pub sampling: SamplingSpec,
    /// Most latent and explicit steps together.
    pub max_steps: u32,
    /// Of these, the last ones kept for the answer: in them the mode is explicit.
    pub answer_reserve: u32,
    /// Text injected, tokenised and fed but not counted as printed, when latent mode ends for good because its budget is spent.
    pub answer_cue: Option<String>,
}

/// A value of [`LoopConfig`] that cannot be run.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// `k` is 0 or larger than the vocabulary.
    #[error("k: {k} is outside 1..={vocab} (the vocabulary), and not -1 for all of it")]
    K {
        /// The value.
        k: i64,
        /// Its upper bound.
        vocab: u32,
    },
    /// A whole-vocabulary message with a number of entries.
    #[error("k: {k} with link.message: logits, which is the whole vocabulary; give -1")]
    LogitsK {
        /// The value.
        k: i64,
    },
    /// A form that the encoding lacks.
    #[error("link.encoding: compact is for packets; link.message is logits")]
    CompactLogits,
    /// An embedding cannot be merged by consensus.
    #[error(
        "link.support: packet needs link.message: belief or logits; consensus cannot merge embeddings"
    )]
    EmbedSupport,
    /// `max_steps` is 0.
    #[error("max_steps: must be at least 1")]
    MaxSteps,
    /// `answer_reserve` leaves no step.
    #[error("answer_reserve: {reserve} exceeds max_steps {max_steps}")]
    Reserve {
        /// The value.
        reserve: u32,
        /// Its upper bound.
        max_steps: u32,
    },
    /// A knob of the controller, noise, sampling or consensus is out of range.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

impl LoopConfig {
    /// Checks every range; `vocab` is the number of real tokens, where known.
    ///
    /// # Errors
    /// The first field that is out of range, named.
    pub fn validate(&self, vocab: Option<u32>) -> Result<(), ConfigError> {
        let most = vocab.unwrap_or(u32::MAX);
        if self.k != -1 && !(1..=i64::from(most)).contains(&self.k) {
            return Err(ConfigError::K {
                k: self.k,
                vocab: most,
            });
        }
        let link = self.link;
        match link.message {
            LinkMessage::Logits if self.k != -1 => {
                return Err(ConfigError::LogitsK { k: self.k });
            }
            LinkMessage::Logits if link.encoding == WireEncoding::Compact => {
                return Err(ConfigError::CompactLogits);
            }
            LinkMessage::Embed if link.support == Support::Packet => {
                return Err(ConfigError::EmbedSupport);
            }
            _ => {}
        }
        if self.max_steps == 0 {
            return Err(ConfigError::MaxSteps);
        }
        if self.answer_reserve > self.max_steps {
            return Err(ConfigError::Reserve {
                reserve: self.answer_reserve,
                max_steps: self.max_steps,
            });
        }
        self.controller.validate()?;
        self.consensus.validate()?;
        self.noise.validate()?;
        self.sampling.validate()?;
        Ok(())
    }

    /// Entries of a packet over a vocabulary of `vocab` tokens.
    #[must_use]
    pub fn entries(&self, vocab: u32) -> u32 {
        u32::try_from(self.k).unwrap_or(vocab)
    }

    /// Whether no draw can change an output, so that all seeds give one result.
    #[must_use]
    pub fn is_deterministic(&self) -> bool {
        matches!(self.noise, NoiseSpec::None) && self.sampling.is_greedy()
    }
}
