//! From a selection of cells to an ordered plan.

use dlmom_core::{AlphaUnit, ConsensusSpec, FilterSpec, Gate, SamplingSpec, Start};
use dlmom_eval::suggest::hint;
use dlmom_runtime::{
    Handoff, HandoffControl, LoopConfig, PacketControl, Support, Topology, WireEncoding,
};

use super::RegistryError;
use super::experiment::{Experiment, REF, Unsupported};
use super::file::Registry;
use super::knobs::{Comm, Knob, Knobs, Kv, SoftMode};

/// Fewest explicit steps between two latent stretches of the reference gate (SwiReasoning).
const REFERENCE_DWELL: u32 = 512;

/// Facts about the agents that decide what a cell means.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// All agents share one model's weights.
    pub shared_model: bool,
    /// Number of agents.
    pub experts: usize,
    /// How they meet.
    pub topology: Topology,
}

impl Setting {
    /// Agents in lockstep.
    #[must_use]
    pub fn lockstep(experts: usize, shared_model: bool) -> Self {
        Self {
            shared_model,
            experts,
            topology: Topology::Lockstep,
        }
    }
}

/// Values from the command line. Each fills a knob that a cell itself does not name, before the file's defaults.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Overrides {
    /// `--alpha`.
    pub alpha: Option<f64>,
    /// `--alpha-unit`.
    pub alpha_unit: Option<AlphaUnit>,
    /// `--max-switches`; a cell's own `cap` wins, even -1.
    pub max_switches: Option<i64>,
    /// `--max-steps`.
    pub max_steps: Option<u32>,
    /// `--max-latent-steps`.
    pub max_latent_steps: Option<u32>,
    /// `--answer-reserve`.
    pub answer_reserve: Option<u32>,
    /// `--answer-cue`.
    pub answer_cue: Option<String>,
    /// `--k`.
    pub k: Option<i64>,
    /// `--start`.
    pub start: Option<Start>,
    /// `--consensus`.
    pub consensus: Option<ConsensusSpec>,
    /// Sampling flags.
    pub sampling: Option<SamplingSpec>,
    /// `--encoding`.
    pub encoding: Option<WireEncoding>,
    /// `--support`.
    pub support: Option<Support>,
    /// `--gate`.
    pub gate: Option<Gate>,
    /// `--w`.
    pub w: Option<u32>,
    /// `--handoff`.
    pub handoff: Option<Handoff>,
    /// `--max-handoffs`.
    pub max_handoffs: Option<u32>,
}

impl Overrides {
    fn knobs(&self) -> Knobs {
        fn knob<T: Clone>(value: Option<&T>) -> Knob<T> {
            value.map_or(Knob::Absent, |v| Knob::Value(v.clone()))
        }
        Knobs {
            alpha: knob(self.alpha.as_ref()),
            alpha_unit: knob(self.alpha_unit.as_ref()),
            cap: knob(self.max_switches.as_ref()),
            max_steps: knob(self.max_steps.as_ref()),
            max_latent_steps: knob(self.max_latent_steps.as_ref()),
            answer_reserve: knob(self.answer_reserve.as_ref()),
            answer_cue: knob(self.answer_cue.as_ref()),
            k: knob(self.k.as_ref()),
            start: knob(self.start.as_ref()),
            consensus: knob(self.consensus.as_ref()),
            sampling: knob(self.sampling.as_ref()),
            encoding: knob(self.encoding.as_ref()),
            support: knob(self.support.as_ref()),
            gate: knob(self.gate.as_ref()),
            w: knob(self.w.as_ref()),
            handoff: knob(self.handoff.as_ref()),
            max_handoffs: knob(self.max_handoffs.as_ref()),
            ..Knobs::default()
        }
    }

    fn validate(&self, setting: &Setting) -> Result<(), RegistryError> {
        let wrong = |flag, message: String| Err(RegistryError::Override { flag, message });
        if setting.topology.chain().is_none() {
            let unread = [
                ("--max-handoffs", self.max_handoffs.is_some()),
                ("--handoff", self.handoff.is_some()),
            ];
            if let Some((flag, _)) = unread.into_iter().find(|(_, given)| *given) {
                return wrong(
                    flag,
                    "only a sequential topology hands anything over; add --topology sequential"
                        .to_owned(),
                );
            }
        }
        match *self {
            Self {
                alpha: Some(alpha), ..
            } if !alpha.is_finite() || alpha < 0.0 => wrong(
                "--alpha",
                format!("{alpha} is not a finite number of at least 0"),
            ),
            Self {
                alpha: Some(alpha),
                alpha_unit: Some(AlphaUnit::Quantile),
                ..
            } if alpha > 1.0 => wrong(
                "--alpha",
                format!("{alpha} is no quantile; give a number from 0 to 1"),
            ),
            Self {
                max_switches: Some(cap),
                ..
            } if cap < -1 => wrong(
                "--max-switches",
                format!("{cap} is not a count; -1 is unlimited, 0 explicit only"),
            ),
            Self {
                max_steps: Some(0), ..
            } => wrong(
                "--max-steps",
                "0 leaves no step; give at least 1".to_owned(),
            ),
            Self { k: Some(k), .. } if k != -1 && k < 1 => wrong(
                "--k",
                format!("{k} is not at least 1, nor -1 for the whole vocabulary"),
            ),
            Self {
                answer_reserve: Some(reserve),
                max_steps,
                ..
            } if reserve > max_steps.unwrap_or(LoopConfig::default().max_steps) => {
                let limit = max_steps.unwrap_or(LoopConfig::default().max_steps);
                wrong(
                    "--answer-reserve",
                    format!("{reserve} exceeds the {limit} steps there are"),
                )
            }
            _ => Ok(()),
        }
    }
}

/// What becomes of a cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CellKind {
    /// It runs.
    Run,
    /// Its outputs are those of an earlier cell, apart from the name.
    Alias {
        /// The earlier cell.
        of: String,
    },
    /// It cannot exist in this setting.
    Skip {
        /// Why, in words for the table.
        reason: String,
    },
}

/// An expanded cell.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedCell {
    /// Its knobs.
    pub experiment: Experiment,
    /// What becomes of it.
    pub kind: CellKind,
}

/// Expanded cells in the order they run: the reference pipeline first, then the file's order.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The cells.
    pub cells: Vec<PlannedCell>,
}

impl Plan {
    /// The cells that run.
    pub fn runs(&self) -> impl Iterator<Item = &Experiment> {
        self.cells
            .iter()
            .filter(|c| c.kind == CellKind::Run)
            .map(|c| &c.experiment)
    }

    /// Whether this version can run every cell that runs.
    ///
    /// # Errors
    /// The first part that is not built yet.
    pub fn check_supported(&self) -> Result<(), Unsupported> {
        self.runs().try_for_each(Experiment::supported)
    }
}

impl Registry {
    /// Expands a selection. No suites mean all of them; no ids mean all cells of the suites. `REF` is always first.
    ///
    /// # Errors
    /// [`RegistryError`] for an unknown name, and for a knob that is out of range or at odds with another.
    pub fn expand(
        &self,
        suites: &[String],
        only: &[String],
        setting: &Setting,
        overrides: &Overrides,
    ) -> Result<Plan, RegistryError> {
        overrides.validate(setting)?;
        for name in suites {
            if !self.suites.iter().any(|s| s.name == *name) {
                let names = || self.suites.iter().map(|s| s.name.as_str());
                return Err(RegistryError::UnknownSuite {
                    name: name.clone(),
                    hint: hint(name, names()),
                    known: names().collect::<Vec<_>>().join(", "),
                });
            }
        }
        let chosen = || {
            self.suites
                .iter()
                .filter(|s| suites.is_empty() || suites.contains(&s.name))
        };
        let ids = || {
            std::iter::once(REF).chain(chosen().flat_map(|s| s.cells.iter().map(|c| c.id.as_str())))
        };
        for id in only {
            if !ids().any(|known| known == id) {
                if let Some(suite) = self
                    .suites
                    .iter()
                    .find(|s| s.cells.iter().any(|c| c.id == *id))
                {
                    let (id, suite) = (id.clone(), suite.name.clone());
                    return Err(RegistryError::OtherSuite { id, suite });
                }
                return Err(RegistryError::UnknownId {
                    id: id.clone(),
                    hint: hint(id, ids()),
                    known: ids().collect::<Vec<_>>().join(", "),
                });
            }
        }
        let below = overrides.knobs().over(&self.defaults);
        let reference = self.build(REF, REF, &below, setting)?;
        let mut cells = vec![PlannedCell {
            experiment: reference,
            kind: CellKind::Run,
        }];
        for suite in chosen() {
            for cell in &suite.cells {
                if !only.is_empty() && !only.contains(&cell.id) {
                    continue;
                }
                let knobs = cell.knobs.over(&below);
                let experiment = self.build(&cell.id, &suite.name, &knobs, setting)?;
                let kind = match out_of_reach(&cell.knobs, setting) {
                    Some(reason) => CellKind::Skip { reason },
                    None => kind_of(&experiment, &cells, setting),
                };
                cells.push(PlannedCell { experiment, kind });
            }
        }
        Ok(Plan { cells })
    }

    fn build(
        &self,
        id: &str,
        suite: &str,
        knobs: &Knobs,
        setting: &Setting,
    ) -> Result<Experiment, RegistryError> {
        let reference = LoopConfig::default();
        let alpha = knobs.alpha.value().unwrap_or(reference.controller.alpha);
        let max_steps = knobs.max_steps.value().unwrap_or(reference.max_steps);
        let gate = knobs.gate.value().unwrap_or(reference.controller.gate);
        let chain = setting.topology.chain();
        let consensus = match &knobs.consensus {
            Knob::Value(spec) => spec.clone(),
            Knob::Absent | Knob::Null => ConsensusSpec::paper(),
        };
        let answer_cue = optional(&knobs.answer_cue);
        let support = knobs.support.value().unwrap_or(Support::Full);
        let mut experiment = Experiment {
            id: id.to_owned(),
            suite: suite.to_owned(),
            soft_mode: knobs.soft_mode.value().unwrap_or(SoftMode::Deterministic),
            tau: knobs.tau.value(),
            lambda: knobs.lambda.value(),
            gate,
            alpha,
            alpha_unit: knobs.alpha_unit.value().unwrap_or(AlphaUnit::Normalized),
            w: knobs.w.value(),
            cap: knobs.cap.value().unwrap_or(reference.controller.cap),
            min_dwell_latent: knobs.min_dwell_latent.value().unwrap_or(1),
            min_dwell_explicit: knobs.min_dwell_explicit.value().unwrap_or(
                if gate == Gate::Reference {
                    REFERENCE_DWELL
                } else {
                    1
                },
            ),
            convergence_threshold: 0.0,
            slope_eps: 0.0,
            var_eps: 0.0,
            // Methods of one latent block, or of one at the start, begin with it.
            start: knobs.start.value().unwrap_or(match gate {
                Gate::Reference | Gate::LatentThenExplicit => Start::Latent,
                _ => Start::Gate,
            }),
            patience: knobs.patience.value().unwrap_or(1),
            triggers: optional(&knobs.triggers),
            lock_text: optional(&knobs.lock_text),
            enter_signal: optional(&knobs.enter_signal),
            exit_signal: optional(&knobs.exit_signal),
            filter: knobs.filter.value().unwrap_or(FilterSpec::NONE),
            max_latent_steps: knobs
                .max_latent_steps
                .value()
                .unwrap_or(reference.controller.max_latent_steps),
            max_steps,
            answer_reserve: knobs
                .answer_reserve
                .value()
                .unwrap_or((max_steps / 4).min(32)),
            answer_cue,
            k: knobs.k.value().unwrap_or(reference.k),
            // Consensus cannot merge embeddings, so agents that send it no more than their messages send packets.
            comm: knobs.comm.value().unwrap_or(
                if setting.shared_model && support == Support::Full {
                    Comm::Embed
                } else {
                    Comm::Belief
                },
            ),
            encoding: knobs.encoding.value().unwrap_or(WireEncoding::F32),
            support,
            align: knobs.align.value().unwrap_or_default(),
            handoff: chain.map(|chain| knobs.handoff.value().unwrap_or(chain.handoff)),
            max_handoffs: chain.map(|chain| knobs.max_handoffs.value().unwrap_or(chain.limit())),
            packet_control: knobs.packet_control.value().unwrap_or_default(),
            handoff_control: knobs.handoff_control.value().unwrap_or_default(),
            same_exits: knobs.same_exits.value().unwrap_or(false),
            drop_latent: knobs.drop_latent.value().unwrap_or(false),
            kv: knobs.kv.value().unwrap_or(Kv::None),
            consensus,
            sampling: knobs.sampling.value().unwrap_or(SamplingSpec::GREEDY),
        };
        let mut derived = experiment.controller();
        derived.convergence_threshold = knobs.convergence_threshold.value();
        derived.slope_eps = knobs.slope_eps.value();
        derived.var_eps = knobs.var_eps.value();
        experiment.convergence_threshold = derived.convergence_threshold();
        experiment.slope_eps = derived.slope_eps();
        experiment.var_eps = derived.var_eps();
        self.check(&experiment)?;
        Ok(experiment)
    }

    fn check(&self, experiment: &Experiment) -> Result<(), RegistryError> {
        let wrong = |message: String| {
            Err(RegistryError::Field {
                file: self.file.clone(),
                cell: experiment.id.clone(),
                message,
            })
        };
        let Experiment {
            soft_mode,
            tau,
            lambda,
            k,
            max_steps,
            answer_reserve,
            ..
        } = experiment;
        if *soft_mode == SoftMode::Gumbel && tau.is_none() {
            return wrong("tau is missing; soft_mode: gumbel needs a number above 0".to_owned());
        }
        if *soft_mode == SoftMode::Dirichlet && lambda.is_none() {
            return wrong(
                "lambda is missing; soft_mode: dirichlet needs a number above 0".to_owned(),
            );
        }
        for (name, value) in [("tau", tau), ("lambda", lambda)] {
            if let Some(value) = value
                && !(value.is_finite() && *value > 0.0)
            {
                return wrong(format!(
                    "{name} is {value}; it must be a finite number above 0"
                ));
            }
        }
        if *k != -1 && !(1..=i64::from(u32::MAX)).contains(k) {
            return wrong(format!(
                "k is {k}; it must be at least 1, or -1 for the whole vocabulary"
            ));
        }
        if *max_steps == 0 {
            return wrong("max_steps is 0; it must be at least 1".to_owned());
        }
        if answer_reserve > max_steps {
            return wrong(format!(
                "answer_reserve is {answer_reserve}; it must be at most max_steps, {max_steps}"
            ));
        }
        let checks = [
            experiment.controller().validate(),
            experiment.consensus.validate(None),
            experiment.noise().validate(),
            experiment.filter.validate(),
            experiment.sampling.validate(),
            experiment
                .triggers
                .as_ref()
                .map_or(Ok(()), dlmom_core::TriggerSpec::validate),
        ];
        match checks.into_iter().find_map(Result::err) {
            Some(error) => wrong(error.to_string()),
            None => Ok(()),
        }
    }
}

fn optional<T: Clone>(knob: &Knob<T>) -> Option<T> {
    match knob {
        Knob::Value(value) => Some(value.clone()),
        Knob::Absent | Knob::Null => None,
    }
}

fn kind_of(experiment: &Experiment, earlier: &[PlannedCell], setting: &Setting) -> CellKind {
    if let Some(reason) = cannot_exist(experiment, setting) {
        let reason = reason.to_owned();
        return CellKind::Skip { reason };
    }
    let twin = earlier
        .iter()
        .find(|cell| cell.kind == CellKind::Run && cell.experiment.same_outputs(experiment));
    match twin {
        Some(cell) => CellKind::Alias {
            of: cell.experiment.id.clone(),
        },
        None => CellKind::Run,
    }
}

/// Which of a cell's knobs reaches nothing in this topology, in words for the table.
fn out_of_reach(knobs: &Knobs, setting: &Setting) -> Option<String> {
    if setting.topology.chain().is_some() {
        return None;
    }
    let knob = match knobs {
        _ if knobs.handoff.is_present() => "handoff",
        _ if knobs.max_handoffs.is_present() => "max_handoffs",
        _ => return None,
    };
    Some(format!(
        "{knob}: only a sequential topology hands anything over"
    ))
}

/// Why a cell means nothing among these agents, in words for the table.
fn cannot_exist(experiment: &Experiment, setting: &Setting) -> Option<&'static str> {
    let chain = setting.topology.chain().is_some();
    let handoff = experiment.handoff;
    // In a chain a message stays with its agent unless a transcript hands it on.
    let crosses = !chain || handoff == Some(Handoff::Transcript);
    let singly = chain || setting.experts == 1;
    match experiment.comm {
        Comm::Embed if !setting.shared_model && crosses => Some(
            "comm: embed needs agents of one model: an embedding of one model means nothing to another",
        ),
        Comm::Embed if experiment.support == Support::Packet => {
            Some("comm: embed with support: packet: consensus cannot merge embeddings")
        }
        Comm::Logits if experiment.encoding == WireEncoding::Compact => {
            Some("comm: logits with encoding: compact: the compact encoding needs token ids")
        }
        Comm::Hidden if !singly => Some(
            "comm: hidden needs agents that move one at a time: consensus cannot merge hidden states",
        ),
        Comm::Hidden if !setting.shared_model && crosses => Some(
            "comm: hidden needs agents of one model: a hidden state of one model means nothing to another",
        ),
        Comm::Hidden if experiment.support == Support::Packet => {
            Some("comm: hidden with support: packet: a hidden state is no packet")
        }
        Comm::Hidden if experiment.soft_mode != SoftMode::Deterministic => {
            Some("soft_mode with comm: hidden: no packet is mixed")
        }
        Comm::Hidden if experiment.filter != FilterSpec::NONE => {
            Some("filter with comm: hidden: no packet is mixed")
        }
        Comm::Hidden if experiment.packet_control != PacketControl::Real => {
            Some("packet_control with comm: hidden: no packet is fed")
        }
        _ if handoff == Some(Handoff::Kv) && !setting.shared_model => Some(
            "handoff: kv needs agents of one model: a cache means something to its own weights alone",
        ),
        _ if experiment.handoff_control != HandoffControl::Real && !chain => {
            Some("handoff_control: only a sequential topology hands anything over")
        }
        _ if experiment.handoff_control != HandoffControl::Real
            && handoff != Some(Handoff::Transcript) =>
        {
            Some("handoff_control: what is handed over is no transcript")
        }
        _ if needs_several(&experiment.consensus) && singly => {
            Some("consensus: agents that move one at a time have nothing to merge")
        }
        _ if experiment.consensus.needs_pilot() && setting.topology.hierarchy().is_some() => Some(
            "consensus: a pilot fits all agents, and groups are merged apart; write the numbers of a group's members",
        ),
        _ => None,
    }
}

/// Whether an operator was asked for that only several experts can tell from the paper's.
fn needs_several(consensus: &ConsensusSpec) -> bool {
    *consensus != ConsensusSpec::paper()
}
