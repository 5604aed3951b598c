//! One experiment's loop, as data.

use dlmom_core::{
    AlphaUnit, ConsensusSpec, ControllerSpec, FilterSpec, NoiseSpec, Ranks, SamplingSpec,
    SpecError, TriggerSpec,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::controls::{Controls, HandoffControl, PacketControl};
use crate::link::{LinkMessage, LinkSpec, Support, WireEncoding};
use crate::topology::{Handoff, Topology, TopologyError};

/// A token mixed into what is fed at a switch (SwiReasoning's control embeddings).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Signal {
    /// Text of exactly one token, such as `<think>`.
    pub text: String,
    /// Its share of the mixture, in `[0, 1]`.
    pub weight: f64,
}

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
    /// What is kept of a packet before it is mixed.
    #[serde(default)]
    pub filter: FilterSpec,
    /// Quantiles of a pilot's entropies; needed by `alpha_unit: quantile`.
    #[serde(default)]
    pub ranks: Option<Ranks>,
    /// What exits from latent mode inject, by their count.
    #[serde(default)]
    pub triggers: Option<TriggerSpec>,
    /// Text of exactly one token, such as `</think>`: once it is printed, or leads in latent mode, the mode is explicit for good.
    #[serde(default)]
    pub lock_text: Option<String>,
    /// Mixed into the first input of a latent stretch that follows an explicit step.
    #[serde(default)]
    pub enter_signal: Option<Signal>,
    /// Mixed with the packet into the input that follows a latent stretch, in place of the printed token.
    #[serde(default)]
    pub exit_signal: Option<Signal>,
    /// How the agents meet.
    #[serde(default)]
    pub topology: Topology,
    /// What takes the place of packets and transcripts; nothing by default.
    #[serde(default)]
    pub controls: Controls,
}

impl Default for LoopConfig {
    /// The reference pipeline in lockstep, at the paper's threshold.
    fn default() -> Self {
        Self {
            k: 50,
            link: LinkSpec::default(),
            controller: ControllerSpec::default(),
            consensus: ConsensusSpec::paper(),
            noise: NoiseSpec::None,
            sampling: SamplingSpec::GREEDY,
            max_steps: 256,
            answer_reserve: 32,
            answer_cue: None,
            filter: FilterSpec::NONE,
            ranks: None,
            triggers: None,
            lock_text: None,
            enter_signal: None,
            exit_signal: None,
            topology: Topology::Lockstep,
            controls: Controls::default(),
        }
    }
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
    /// `alpha_unit: quantile` without a pilot's quantiles.
    #[error("controller.alpha_unit: quantile needs the quantiles of a pilot run")]
    NoRanks,
    /// A knob of consensus that a pilot has not fitted yet.
    #[error("consensus: {knob} needs a pilot run")]
    NotFitted {
        /// The knob and its value.
        knob: &'static str,
    },
    /// Hidden states where more than one agent moves at a time, or where consensus should see them.
    #[error(
        "link.message: hidden needs agents that move one at a time (one agent, or topology sequential) and link.support: full"
    )]
    HiddenLink,
    /// Noise or a filter where no packet is mixed.
    #[error("{knob} needs packets; link.message is hidden, so it would reach nothing")]
    HiddenPackets {
        /// The knob.
        knob: &'static str,
    },
    /// The weight of a signal.
    #[error("{signal}.weight is {weight}; it must be at least 0 and at most 1")]
    SignalWeight {
        /// Which signal.
        signal: &'static str,
        /// The value.
        weight: f64,
    },
    /// A control beside something it cannot work with.
    #[error("controls.{control}: {reason}")]
    Control {
        /// The control and its value.
        control: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// How the agents meet.
    #[error(transparent)]
    Topology(#[from] TopologyError),
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
            LinkMessage::Hidden if link.support == Support::Packet => {
                return Err(ConfigError::HiddenLink);
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
        if self.controller.alpha_unit == AlphaUnit::Quantile && self.ranks.is_none() {
            return Err(ConfigError::NoRanks);
        }
        self.consensus.validate(None)?;
        if self.consensus.needs_pilot() {
            let knob = if self.consensus.temperatures.is_empty()
                && self.consensus.calibrate == dlmom_core::Calibrate::Temperature
            {
                "calibrate: temperature"
            } else {
                "weights: pilot"
            };
            return Err(ConfigError::NotFitted { knob });
        }
        self.noise.validate()?;
        self.filter.validate()?;
        self.sampling.validate()?;
        if let Some(triggers) = &self.triggers {
            triggers.validate()?;
        }
        for (signal, given) in [
            ("enter_signal", &self.enter_signal),
            ("exit_signal", &self.exit_signal),
        ] {
            if let Some(Signal { weight, .. }) = *given
                && !(0.0..=1.0).contains(&weight)
            {
                return Err(ConfigError::SignalWeight { signal, weight });
            }
        }
        self.check_controls()
    }

    /// Controls and signals beside what they cannot work with.
    fn check_controls(&self) -> Result<(), ConfigError> {
        let no = |control, reason| Err(ConfigError::Control { control, reason });
        let controls = self.controls;
        let signals = self.enter_signal.is_some() || self.exit_signal.is_some();
        if self.link.message == LinkMessage::Hidden {
            let reached = [
                ("noise", self.noise != NoiseSpec::None),
                ("filter", self.filter != FilterSpec::NONE),
            ];
            if let Some((knob, _)) = reached.into_iter().find(|(_, set)| *set) {
                return Err(ConfigError::HiddenPackets { knob });
            }
            if controls.packet != PacketControl::Real {
                return no("packet", "link.message is hidden: no packet is fed");
            }
            if signals {
                return no(
                    "packet",
                    "enter_signal and exit_signal need packets; link.message is hidden",
                );
            }
        }
        if controls.packet == PacketControl::Filler && signals {
            return no(
                "packet: filler",
                "a filler has no tokens to mix a signal with",
            );
        }
        if controls.handoff == HandoffControl::Real {
            return Ok(());
        }
        match self.topology.chain().map(|chain| chain.handoff) {
            None => no("handoff", "only a sequential topology hands anything over"),
            Some(Handoff::Kv) => no(
                "handoff",
                "handoff: kv hands a cache over, not a transcript",
            ),
            Some(Handoff::Text) if controls.handoff == HandoffControl::Zero => no(
                "handoff: zero",
                "a text of zeros is none; use transcript, or none",
            ),
            Some(Handoff::Text) if controls.handoff == HandoffControl::Other => no(
                "handoff: other",
                "texts of other items are not recorded; use transcript",
            ),
            Some(_) => Ok(()),
        }
    }

    /// Whether one agent moves at a time, given how many there are.
    #[must_use]
    pub fn moves_singly(&self, agents: usize) -> bool {
        agents == 1 || self.topology.chain().is_some()
    }

    /// Checks what depends on the number of agents.
    ///
    /// # Errors
    /// As [`LoopConfig::validate`].
    pub fn validate_agents(&self, agents: usize) -> Result<(), ConfigError> {
        self.topology.validate(agents)?;
        match &self.topology {
            Topology::Lockstep => self.consensus.validate(Some(agents))?,
            // The operator meets groups of several sizes; what counts experts fits them all or none.
            Topology::Hierarchical(hierarchy) => {
                for group in &hierarchy.groups {
                    self.consensus.validate(Some(group.len()))?;
                }
            }
            Topology::Sequential(_) => {}
        }
        if self.link.message == LinkMessage::Hidden && !self.moves_singly(agents) {
            return Err(ConfigError::HiddenLink);
        }
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
        matches!(self.noise, NoiseSpec::None)
            && self.sampling.is_greedy()
            && !self.consensus.draws()
            && !self.controls.draws()
            && self.topology.hierarchy().is_none_or(|h| !h.meta.draws())
    }
}
