//! A configuration made ready for the loaded agents.

use dlmom_core::{
    Consensus, Controller, ControllerSpec, GateController, RuleController, ScheduleController,
    Triggers,
};
use dlmom_packet::{BeliefPacket, Scalar};

use super::{Donors, RuleSource, RunError, rule_failure};
use crate::backend::{Backend, EnsembleInfo, Payload, PromptSource};
use crate::config::{ConfigError, LoopConfig};
use crate::controls::{HandoffControl, PacketControl};
use crate::ids::{AgentId, ModelId};
use crate::link::LinkMessage;
use crate::outcome::Job;
use crate::topology::{Handoff, Sequential, Topology};

/// Facts about one agent that every step needs.
#[derive(Clone, Debug)]
pub(super) struct AgentFacts {
    pub(super) agent: AgentId,
    pub(super) model: ModelId,
    pub(super) vocab: u32,
    pub(super) fingerprint: u64,
    pub(super) hidden: u32,
    pub(super) eos: Vec<u32>,
    pub(super) dtype_bytes: u64,
    /// Of embeddings on the wire.
    pub(super) scalar: Scalar,
    pub(super) kv_bytes_per_position: u64,
}

impl AgentFacts {
    pub(super) fn all(info: &EnsembleInfo) -> Vec<Self> {
        info.agents
            .iter()
            .enumerate()
            .filter_map(|(at, &model)| {
                let facts = info.models.get(model.index())?;
                let (dtype_bytes, scalar) = match facts.dtype.as_str() {
                    "bf16" => (2, Scalar::Bf16),
                    "fp16" => (2, Scalar::F16),
                    _ => (4, Scalar::F32),
                };
                Some(Self {
                    agent: AgentId(at as u32),
                    model,
                    vocab: facts.vocab,
                    fingerprint: facts.fingerprint,
                    hidden: facts.hidden,
                    eos: facts.eos.clone(),
                    dtype_bytes,
                    scalar,
                    kv_bytes_per_position: facts.kv_bytes_per_position,
                })
            })
            .collect()
    }
}

/// Texts in every agent's tokens; empty where the configuration has none.
#[derive(Default)]
pub(super) struct Texts {
    pub(super) cue: Vec<Vec<u32>>,
    pub(super) converge: Vec<Vec<u32>>,
    pub(super) terminate: Vec<Vec<u32>>,
    pub(super) lock: Vec<Vec<u32>>,
    pub(super) enter: Vec<Vec<u32>>,
    pub(super) exit: Vec<Vec<u32>>,
}

pub(super) struct Plan {
    pub(super) config: LoopConfig,
    pub(super) texts: Texts,
    /// Input embeddings of the filler, by agent.
    pub(super) filler: Vec<Payload>,
    prototype: GateController,
}

impl Plan {
    /// Checks a configuration against the agents and tokenises its texts.
    pub(super) fn new(
        backend: &mut dyn Backend,
        config: &LoopConfig,
        facts: &[AgentFacts],
        donors: &Donors,
    ) -> Result<Self, RunError> {
        let info = backend.info().clone();
        check(config, &info, facts)?;
        if config.controls.needs_donors() && donors.is_empty() {
            return Err(RunError::NoDonors);
        }
        let one = |agents: &mut dyn Backend, what, text: Option<&String>, exactly_one| {
            tokens(agents, &info, what, text, exactly_one)
        };
        let texts = Texts {
            cue: one(backend, "answer_cue", config.answer_cue.as_ref(), false)?,
            converge: one(
                backend,
                "triggers.converge_text",
                config.triggers.as_ref().map(|t| &t.converge_text),
                false,
            )?,
            terminate: one(
                backend,
                "triggers.terminate_text",
                config.triggers.as_ref().map(|t| &t.terminate_text),
                false,
            )?,
            lock: one(backend, "lock_text", config.lock_text.as_ref(), true)?,
            enter: one(
                backend,
                "enter_signal.text",
                config.enter_signal.as_ref().map(|s| &s.text),
                true,
            )?,
            exit: one(
                backend,
                "exit_signal.text",
                config.exit_signal.as_ref().map(|s| &s.text),
                true,
            )?,
        };
        let filler = if config.controls.packet == PacketControl::Filler {
            filler(backend, facts)?
        } else {
            Vec::new()
        };
        Ok(Self {
            prototype: GateController::new(&config.controller).map_err(ConfigError::from)?,
            config: config.clone(),
            texts,
            filler,
        })
    }

    /// The chain, where the topology is one.
    pub(super) fn chain(&self) -> Option<&Sequential> {
        self.config.topology.chain()
    }

    pub(super) fn triggers(&self) -> Result<Option<Triggers>, RunError> {
        let made = self.config.triggers.as_ref().map(Triggers::new).transpose();
        Ok(made.map_err(ConfigError::from)?)
    }

    /// The controller of one visit, with what is left of the sample's latent budget and switches.
    pub(super) fn controller(
        &self,
        rule: Option<&RuleSource>,
        job: &Job,
        latent_steps: u32,
        switches: u32,
        first_step: u32,
    ) -> Result<Box<dyn Controller>, RunError> {
        let spec = visit_spec(&self.config.controller, latent_steps, switches);
        if self.config.controls.same_exits {
            let schedule = job.schedule.clone().ok_or_else(|| RunError::NoSchedule {
                item: job.key.item_id.clone(),
            })?;
            let made = ScheduleController::new(&spec, schedule).map_err(ConfigError::from)?;
            return Ok(Box::new(made.at(first_step)));
        }
        if let Some(source) = rule {
            let rule = source(&job.key).map_err(|e| rule_failure(&job.key, e))?;
            let made = RuleController::new(&spec, rule).map_err(ConfigError::from)?;
            return Ok(Box::new(made));
        }
        if spec == self.config.controller {
            return Ok(Box::new(self.prototype.clone()));
        }
        Ok(Box::new(
            GateController::new(&spec).map_err(ConfigError::from)?,
        ))
    }

    /// How the agents of a row meet: the meta level in a hierarchy, else the operator itself.
    pub(super) fn consensus<'a>(&'a self, hook: Option<&'a dyn Consensus>) -> &'a dyn Consensus {
        match self.config.topology.hierarchy() {
            Some(hierarchy) => &hierarchy.meta,
            None => self.inner(hook),
        }
    }

    /// How the agents of a group meet.
    pub(super) fn inner<'a>(&'a self, hook: Option<&'a dyn Consensus>) -> &'a dyn Consensus {
        hook.unwrap_or(&self.config.consensus)
    }

    /// Tokens that injections may add to a sample at the most.
    pub(super) fn injections(&self, agent: usize) -> u32 {
        let length = |texts: &[Vec<u32>]| texts.get(agent).map_or(0, Vec::len) as u32;
        let closings = self
            .config
            .triggers
            .as_ref()
            .map_or(0, |t| t.terminate_after - t.converge_after + 1);
        length(&self.texts.cue)
            .saturating_add(closings.saturating_mul(length(&self.texts.converge)))
            .saturating_add(length(&self.texts.terminate))
    }
}

/// The controller's knobs in one visit: what is left of the sample's latent budget and switches.
pub(crate) fn visit_spec(
    controller: &ControllerSpec,
    latent_steps: u32,
    switches: u32,
) -> ControllerSpec {
    let mut spec = controller.clone();
    spec.max_latent_steps = latent_steps;
    if spec.cap >= 0 {
        spec.cap = (spec.cap - i64::from(switches)).max(0);
    }
    spec
}

/// Whether a configuration can be run with the loaded models, as far as that shows without running it.
///
/// # Errors
/// [`RunError`].
pub fn check_config(config: &LoopConfig, info: &EnsembleInfo) -> Result<(), RunError> {
    let facts = AgentFacts::all(info);
    if facts.is_empty() {
        return Err(RunError::NoAgents);
    }
    check(config, info, &facts)
}

/// Everything about a configuration and its agents that no call of the backend has to show.
fn check(config: &LoopConfig, info: &EnsembleInfo, facts: &[AgentFacts]) -> Result<(), RunError> {
    let smallest = facts.iter().map(|f| f.vocab).min().unwrap_or(0);
    config.validate(Some(smallest))?;
    config.validate_agents(facts.len())?;
    let chain = config.topology.chain();
    if chain.is_none_or(Sequential::needs_one_vocabulary) {
        super::check_vocabularies(info)?;
    }
    if let Some(chain) = chain {
        chain.check_kv(info).map_err(ConfigError::from)?;
    }
    let vectors = matches!(
        config.link.message,
        LinkMessage::Embed | LinkMessage::Hidden
    );
    // In a chain a message stays with its agent unless a transcript hands it on.
    let crosses = match &config.topology {
        Topology::Sequential(chain) => chain.handoff == Handoff::Transcript,
        Topology::Lockstep | Topology::Hierarchical(_) => true,
    };
    if vectors
        && crosses
        && let Some(other) = facts.iter().find(|f| f.model != facts[0].model)
    {
        let name = |m: ModelId| info.models[m.index()].name.clone();
        return Err(RunError::VectorLink {
            message: config.link.message.as_str(),
            a: name(facts[0].model),
            b: name(other.model),
        });
    }
    if config.link.message == LinkMessage::Hidden
        && config.controls.handoff == HandoffControl::Other
    {
        return Err(RunError::Config(ConfigError::Control {
            control: "handoff: other",
            reason: "hidden states of other items are not recorded; link.message is hidden",
        }));
    }
    Ok(())
}

/// A text in the tokens of every agent's model; empty lists without a text.
fn tokens(
    backend: &mut dyn Backend,
    info: &EnsembleInfo,
    what: &'static str,
    text: Option<&String>,
    exactly_one: bool,
) -> Result<Vec<Vec<u32>>, RunError> {
    let Some(text) = text else {
        return Ok(Vec::new());
    };
    let source = PromptSource::Text { text: text.clone() };
    info.agents
        .iter()
        .map(|&model| {
            let ids = backend
                .encode(model, &source)
                .map_err(|source| RunError::Backend {
                    context: format!("{what} could not be tokenised"),
                    source,
                })?;
            if exactly_one && ids.len() != 1 {
                return Err(RunError::NotOneToken {
                    what,
                    text: text.clone(),
                    model: info.models[model.index()].name.clone(),
                    tokens: ids.len(),
                });
            }
            Ok(ids)
        })
        .collect()
}

/// The mean embedding of every agent's vocabulary.
fn filler(backend: &mut dyn Backend, facts: &[AgentFacts]) -> Result<Vec<Payload>, RunError> {
    let mut made: Vec<(ModelId, Payload)> = Vec::new();
    let mut by_agent = Vec::with_capacity(facts.len());
    for fact in facts {
        if let Some((_, payload)) = made.iter().find(|(model, _)| *model == fact.model) {
            by_agent.push(payload.clone());
            continue;
        }
        let failed = |source| RunError::Backend {
            context: "mean embedding of the vocabulary".into(),
            source,
        };
        let ids: Vec<u32> = (0..fact.vocab).collect();
        let probs = vec![1.0 / fact.vocab as f32; ids.len()];
        let even = BeliefPacket::new(ids, probs, 1.0, fact.vocab)
            .map_err(|e| failed(crate::BackendError::Invalid(e.to_string())))?;
        let embeddings = backend.embed(fact.model, &[even]).map_err(failed)?;
        let payload = Payload::Embed {
            values: embeddings.values,
            hidden: embeddings.hidden,
        };
        made.push((fact.model, payload.clone()));
        by_agent.push(payload);
    }
    Ok(by_agent)
}
