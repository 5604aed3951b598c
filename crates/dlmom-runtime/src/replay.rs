//! The controller again over a recorded sample.

use dlmom_core::{
    AlphaUnit, Controller, Decision, Force, GateController, Ranks, Schedule, ScheduleController,
    SpecError,
};

use crate::config::LoopConfig;
use crate::orchestrator::handoff::latent_share;
use crate::orchestrator::plan::visit_spec;
use crate::outcome::HandoffRecord;

/// What the controller saw of a sample, one entry a step.
#[derive(Clone, Copy, Debug)]
pub struct Observations<'a> {
    /// Mean of the experts' normalised entropies.
    pub entropy: &'a [f64],
    /// Every expert's entropy in nats.
    pub expert_entropy: &'a [Vec<f64>],
    /// What the loop forced.
    pub force: &'a [Option<Force>],
    /// Where control passed on.
    pub handoffs: &'a [HandoffRecord],
    /// Modes of the reference pipeline's sample, for the control `same_exits`.
    pub schedule: Option<&'a Schedule>,
}

/// A sample that cannot be replayed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// The controller's knobs.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Entropies in ranks of a pilot, without the pilot.
    #[error("alpha_unit: quantile needs the quantiles of the run's pilot")]
    NoRanks,
    /// A control that follows recorded modes, without them.
    #[error("controls.same_exits: the modes of the reference pipeline's sample are missing")]
    NoSchedule,
    /// The controller itself failed.
    #[error("step {step}: {message}")]
    Failed {
        /// The step.
        step: usize,
        /// Why.
        message: String,
    },
}

/// A step's entropy in a unit, computed as the loop computes it. `None` for quantiles without ranks.
#[must_use]
pub fn observed(
    unit: AlphaUnit,
    entropy: f64,
    experts: &[f64],
    ranks: Option<&Ranks>,
) -> Option<f64> {
    match unit {
        AlphaUnit::Normalized => Some(entropy),
        AlphaUnit::Nats => Some(experts.iter().sum::<f64>() / experts.len().max(1) as f64),
        AlphaUnit::Quantile => ranks.map(|ranks| ranks.rank(entropy)),
    }
}

/// Decides every step of a sample again by `config`'s controller: budgets, cap, dwell, forced exits and
/// handoffs included. The same configuration decides the same.
///
/// # Errors
/// [`ReplayError`].
pub fn replay(config: &LoopConfig, seen: Observations<'_>) -> Result<Vec<Decision>, ReplayError> {
    let spec = &config.controller;
    // As many as the loop makes: one for every visit.
    let fresh = |place: usize, switches: u32, latent: u32, handoffs: u32, first: u32| {
        let left = match config.topology.chain() {
            None => spec.max_latent_steps,
            Some(_) => latent_share(config, place, latent, handoffs),
        };
        let spec = visit_spec(spec, left, switches);
        let made: Box<dyn Controller> = if config.controls.same_exits {
            let schedule = seen.schedule.ok_or(ReplayError::NoSchedule)?;
            Box::new(ScheduleController::new(&spec, schedule.clone())?.at(first))
        } else {
            Box::new(GateController::new(&spec)?)
        };
        Ok::<_, ReplayError>(made)
    };
    let mut controller = fresh(0, 0, 0, 0, 0)?;
    let (mut switches, mut latent) = (0, 0);
    let mut decisions = Vec::with_capacity(seen.entropy.len());
    let mut handoffs = seen.handoffs.iter().zip(1_u32..).peekable();
    for (step, &entropy) in seen.entropy.iter().enumerate() {
        let experts = seen.expert_entropy.get(step).map_or(&[][..], Vec::as_slice);
        let observed = observed(spec.alpha_unit, entropy, experts, config.ranks.as_ref())
            .ok_or(ReplayError::NoRanks)?;
        let force = seen.force.get(step).copied().flatten();
        let decision =
            controller
                .observe(observed, force)
                .map_err(|error| ReplayError::Failed {
                    step,
                    message: error.to_string(),
                })?;
        decisions.push(decision);
        if let Some((record, count)) = handoffs.next_if(|(h, _)| h.step as usize == step) {
            switches += controller.switches();
            latent += controller.latent_steps();
            controller = fresh(record.to as usize, switches, latent, count, step as u32 + 1)?;
        }
    }
    Ok(decisions)
}
