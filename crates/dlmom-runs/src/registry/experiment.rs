//! A fully expanded experiment and the loop it runs.

use dlmom_core::{
    AlphaUnit, Calibrate, ConsensusSpec, ControllerSpec, FilterSpec, Gate, NoiseSpec, SamplingSpec,
    Start, TriggerSpec, WeightRule, Weights,
};
use dlmom_eval::{canonical_json, sha256_hex};
use dlmom_runtime::{
    Align, Controls, Handoff, HandoffControl, LinkSpec, LoopConfig, PacketControl, Sequential,
    Signal, Support, Topology, WireEncoding,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::knobs::{Comm, Kv, SoftMode};
use crate::pilot::Pilot;

/// Id and suite of the reference pipeline.
pub const REF: &str = "REF";

/// A cell with every knob explicit: what `configs/<ID>.yaml` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Experiment {
    /// Name of the cell.
    pub id: String,
    /// Suite it belongs to.
    pub suite: String,
    /// Perturbation of the mixture in latent steps.
    pub soft_mode: SoftMode,
    /// Gumbel-Softmax temperature.
    pub tau: Option<f64>,
    /// Dirichlet concentration.
    pub lambda: Option<f64>,
    /// Rule of the controller.
    pub gate: Gate,
    /// Entropy threshold in `alpha_unit`.
    pub alpha: f64,
    /// Unit of the thresholds.
    pub alpha_unit: AlphaUnit,
    /// Window of the trend gate in steps.
    pub w: Option<u32>,
    /// Most switches per sample; -1 is unlimited.
    pub cap: i64,
    /// Fewest consecutive latent steps.
    pub min_dwell_latent: u32,
    /// Fewest consecutive explicit steps.
    pub min_dwell_explicit: u32,
    /// Entropy below which the trend gate calls a sample converged.
    pub convergence_threshold: f64,
    /// Slope per step that counts as falling.
    pub slope_eps: f64,
    /// Variance that counts as settled.
    pub var_eps: f64,
    /// What decides the first step.
    pub start: Start,
    /// Entropies below `alpha`, one after another, that end the block of the one-block gate.
    #[serde(default = "one")]
    pub patience: u32,
    /// What exits from latent mode inject, by their count.
    #[serde(default)]
    pub triggers: Option<TriggerSpec>,
    /// Text of one token that makes the mode explicit for good.
    #[serde(default)]
    pub lock_text: Option<String>,
    /// A token mixed into the first input of a latent stretch that follows an explicit step.
    #[serde(default)]
    pub enter_signal: Option<Signal>,
    /// A token mixed with the packet into the input after a latent stretch.
    #[serde(default)]
    pub exit_signal: Option<Signal>,
    /// What is kept of a packet before it is mixed.
    #[serde(default)]
    pub filter: FilterSpec,
    /// Most latent steps per sample.
    pub max_latent_steps: u32,
    /// Most steps per sample.
    pub max_steps: u32,
    /// Last steps kept for the answer.
    pub answer_reserve: u32,
    /// Text fed when the latent budget is spent.
    pub answer_cue: Option<String>,
    /// Entries of a packet; -1 is the whole vocabulary.
    pub k: i64,
    /// What crosses a link.
    pub comm: Comm,
    /// How packets and whole-vocabulary messages are written.
    pub encoding: WireEncoding,
    /// What consensus sees of an agent.
    pub support: Support,
    /// How hidden states become input embeddings.
    #[serde(default)]
    pub align: Align,
    /// What an agent of a chain hands to the next; null without a chain.
    #[serde(default)]
    pub handoff: Option<Handoff>,
    /// Most handoffs of a sample; null without a chain.
    #[serde(default)]
    pub max_handoffs: Option<u32>,
    /// What is fed in latent steps in place of the packet.
    #[serde(default)]
    pub packet_control: PacketControl,
    /// What is handed over in place of the transcript.
    #[serde(default)]
    pub handoff_control: HandoffControl,
    /// Modes are those of the reference pipeline's sample.
    #[serde(default)]
    pub same_exits: bool,
    /// Latent stretches are cut out of the caches where they end.
    #[serde(default)]
    pub drop_latent: bool,
    /// KV cache compression.
    pub kv: Kv,
    /// How the experts' preferences meet.
    pub consensus: ConsensusSpec,
    /// How explicit tokens are chosen.
    pub sampling: SamplingSpec,
}

fn one() -> u32 {
    1
}

/// What the expansion of a cell does not say, and its loop needs.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Placement {
    /// How the run's agents meet.
    pub topology: Topology,
    /// What a pilot has found, where one was run.
    pub pilot: Option<Pilot>,
}

/// Part of an experiment that this version cannot run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// Any KV compression.
    #[error("{cell}: kv: {kv} is not built yet; none is")]
    Kv {
        /// The cell.
        cell: String,
        /// Its compression.
        kv: &'static str,
    },
    /// A knob that reads a pilot's figures, where none was run.
    #[error("{cell}: {knob} needs a pilot run, and the folder records none")]
    NoPilot {
        /// The cell.
        cell: String,
        /// The knob and its value.
        knob: &'static str,
    },
}

impl Experiment {
    /// The noise that `soft_mode`, `tau` and `lambda` mean; a missing parameter is NaN, which no check passes.
    pub(super) fn noise(&self) -> NoiseSpec {
        match self.soft_mode {
            SoftMode::Deterministic => NoiseSpec::None,
            SoftMode::Gumbel => NoiseSpec::Gumbel {
                tau: self.tau.unwrap_or(f64::NAN),
            },
            SoftMode::Dirichlet => NoiseSpec::Dirichlet {
                lambda: self.lambda.unwrap_or(f64::NAN),
            },
        }
    }

    pub(super) fn controller(&self) -> ControllerSpec {
        ControllerSpec {
            gate: self.gate,
            w: self.w,
            alpha: self.alpha,
            alpha_unit: self.alpha_unit,
            cap: self.cap,
            min_dwell_latent: self.min_dwell_latent,
            min_dwell_explicit: self.min_dwell_explicit,
            convergence_threshold: Some(self.convergence_threshold),
            slope_eps: Some(self.slope_eps),
            var_eps: Some(self.var_eps),
            max_latent_steps: self.max_latent_steps,
            start: self.start,
            patience: self.patience,
        }
    }

    pub(super) fn controls(&self) -> Controls {
        Controls {
            packet: self.packet_control,
            handoff: self.handoff_control,
            same_exits: self.same_exits,
            drop_latent: self.drop_latent,
        }
    }

    /// Whether a pilot must have run before the cell can.
    #[must_use]
    pub fn needs_pilot(&self) -> bool {
        self.alpha_unit == AlphaUnit::Quantile || self.consensus.needs_pilot()
    }

    /// Whether packets of other items are needed.
    #[must_use]
    pub fn needs_donors(&self) -> bool {
        self.controls().needs_donors()
    }

    /// Consensus with what a pilot has fitted in the place of its rules.
    fn fitted_consensus(&self, pilot: Option<&Pilot>) -> Result<ConsensusSpec, Unsupported> {
        let mut consensus = self.consensus.clone();
        if consensus.calibrate == Calibrate::Temperature && consensus.temperatures.is_empty() {
            consensus.temperatures = pilot
                .and_then(|p| p.temperatures.clone())
                .ok_or_else(|| self.no_pilot("calibrate: temperature"))?;
        }
        if consensus.weights == Weights::Rule(WeightRule::Pilot) {
            let weights = pilot
                .and_then(Pilot::weights)
                .ok_or_else(|| self.no_pilot("weights: pilot"))?;
            consensus.weights = Weights::Fixed(weights);
        }
        Ok(consensus)
    }

    fn no_pilot(&self, knob: &'static str) -> Unsupported {
        Unsupported::NoPilot {
            cell: self.id.clone(),
            knob,
        }
    }

    /// The topology with this cell's own handoff in it.
    fn topology(&self, run: &Topology) -> Topology {
        match run {
            Topology::Sequential(chain) => Topology::Sequential(Sequential {
                handoff: self.handoff.unwrap_or(chain.handoff),
                max_handoffs: self.max_handoffs.or(chain.max_handoffs),
                ..chain.clone()
            }),
            other => other.clone(),
        }
    }

    /// The loop to run, with the agents and the pilot of `placement`.
    ///
    /// # Errors
    /// [`Unsupported`], naming the cell, where a part is not built yet or a pilot is missing.
    pub fn loop_config(&self, placement: &Placement) -> Result<LoopConfig, Unsupported> {
        self.supported()?;
        let pilot = placement.pilot.as_ref();
        let ranks = pilot.map(|p| p.quantiles.clone());
        if self.alpha_unit == AlphaUnit::Quantile && ranks.is_none() {
            return Err(self.no_pilot("alpha_unit: quantile"));
        }
        Ok(LoopConfig {
            k: self.k,
            link: LinkSpec {
                message: self.comm.into(),
                encoding: self.encoding,
                support: self.support,
                align: self.align,
            },
            controller: self.controller(),
            consensus: self.fitted_consensus(pilot)?,
            noise: self.noise(),
            sampling: self.sampling,
            max_steps: self.max_steps,
            answer_reserve: self.answer_reserve,
            answer_cue: self.answer_cue.clone(),
            filter: self.filter,
            ranks: ranks.filter(|_| self.alpha_unit == AlphaUnit::Quantile),
            triggers: self.triggers.clone(),
            lock_text: self.lock_text.clone(),
            enter_signal: self.enter_signal.clone(),
            exit_signal: self.exit_signal.clone(),
            topology: self.topology(&placement.topology),
            controls: self.controls(),
        })
    }

    /// Whether this version can run the cell.
    ///
    /// # Errors
    /// [`Unsupported::Kv`].
    pub fn supported(&self) -> Result<(), Unsupported> {
        let cell = || self.id.clone();
        let kv = match self.kv {
            Kv::None => None,
            Kv::Kivi2bit => Some("kivi2bit"),
            Kv::Minicache => Some("minicache"),
            Kv::MinicacheKivi2bit => Some("minicache+kivi2bit"),
        };
        if let Some(kv) = kv {
            return Err(Unsupported::Kv { cell: cell(), kv });
        }
        Ok(())
    }

    /// Whether no draw can change an output, so that all seeds give one result.
    #[must_use]
    pub fn is_deterministic(&self) -> bool {
        self.soft_mode == SoftMode::Deterministic
            && self.sampling.is_greedy()
            && !self.consensus.draws()
            && !self.controls().draws()
    }

    /// Whether the outputs are those of `other`: equal apart from name and suite.
    #[must_use]
    pub fn same_outputs(&self, other: &Self) -> bool {
        let renamed = Self {
            id: self.id.clone(),
            suite: self.suite.clone(),
            ..other.clone()
        };
        *self == renamed
    }

    /// The knobs as JSON, without name and suite.
    ///
    /// # Errors
    /// Never for a validated experiment: only non-finite numbers have no JSON.
    pub fn knobs(&self) -> Result<Value, serde_json::Error> {
        // Through text, so that a 32-bit 0.1 stays 0.1.
        let mut value: Value = serde_json::from_str(&serde_json::to_string(self)?)?;
        if let Value::Object(map) = &mut value {
            map.shift_remove("id");
            map.shift_remove("suite");
        }
        Ok(value)
    }

    /// SHA-256, 64 hexadecimal characters, of the canonical JSON of the knobs and of `context`: everything else that changes
    /// outputs (digests of models and data, dtype, threads, bench, extractor version; slots and lane length only where rows
    /// are not bit-invariant). Name and suite do not enter.
    ///
    /// # Errors
    /// As [`Experiment::knobs`].
    pub fn config_hash(&self, context: &Value) -> Result<String, serde_json::Error> {
        let all = json!({ "context": context, "experiment": self.knobs()? });
        Ok(sha256_hex(canonical_json(&all).as_bytes()))
    }
}
