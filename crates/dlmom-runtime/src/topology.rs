//! How agents meet: consensus at every step, in groups, or one after another.

use dlmom_core::{ConsensusSpec, SpecError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backend::EnsembleInfo;
use crate::ids::ModelId;

/// How the agents of a sample meet.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Topology {
    /// All agents take every step together; consensus merges their preferences.
    #[default]
    Lockstep,
    /// As in lockstep, but consensus first merges every group by itself; what the groups send up as
    /// packets is merged once more.
    Hierarchical(Hierarchy),
    /// One agent at a time, each in its own lane, handing what it thought to the next.
    Sequential(Sequential),
}

/// Groups of agents with their own consensus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Hierarchy {
    /// Places of the agents of every group; each agent is in exactly one.
    pub groups: Vec<Vec<u32>>,
    /// How the groups' packets are merged; the agents of a group by the configuration's `consensus`.
    #[serde(default)]
    pub meta: ConsensusSpec,
}

/// A chain of agents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sequential {
    /// One role for each agent, in the order of the chain. The last one answers; so does any other
    /// once no handoff is left.
    pub roles: Vec<Role>,
    /// What an agent hands to the next.
    #[serde(default)]
    pub handoff: Handoff,
    /// Most handoffs of a sample; null is the length of the chain less one.
    #[serde(default)]
    pub max_handoffs: Option<u32>,
    /// Place of the agent that takes over where an answering agent has given no answer; null for
    /// nobody.
    #[serde(default)]
    pub on_failure: Option<u32>,
}

/// An agent's part in a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Role {
    /// Its name in traces and notes.
    pub name: String,
    /// Most latent steps of one visit; null is an even share of what is left of the sample's latent budget,
    /// and all of it for the agent that answers. 0 prints from the start.
    #[serde(default)]
    pub latent_steps: Option<u32>,
    /// What is put behind the prompt where notes are handed over as text: `{sender}` and `{notes}` are
    /// replaced.
    #[serde(default = "default_notes")]
    pub notes: String,
}

fn default_notes() -> String {
    "Notes of the {sender}:\n{notes}".to_owned()
}

impl Role {
    /// A role by its name alone.
    #[must_use]
    pub fn named(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            latent_steps: None,
            notes: default_notes(),
        }
    }
}

/// What an agent hands to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Handoff {
    /// The messages of its latent steps, in order, taken in after the receiver's prompt. Packets are
    /// mixed anew with the receiver's embeddings.
    #[default]
    Transcript,
    /// The text it has printed, in the receiver's prompt.
    Text,
    /// Its KV cache; the receiver's prompt follows it. Agents of one model only (`LatentMAS`, arXiv
    /// 2511.20639).
    Kv,
}

impl Handoff {
    /// The name under which it is recorded.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Transcript => "transcript",
            Self::Text => "text",
            Self::Kv => "kv",
        }
    }
}

/// Why control passed from one agent to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// Its latent budget is spent.
    LatentBudget,
    /// Its share of the steps is spent, or what is left is kept for the answer.
    StepBudget,
    /// Its controller left latent mode, or its text has ended.
    Convergence,
    /// It ended without an answer.
    Failure,
}

impl Trigger {
    /// The name under which it is recorded.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LatentBudget => "latent_budget",
            Self::StepBudget => "step_budget",
            Self::Convergence => "convergence",
            Self::Failure => "failure",
        }
    }
}

/// A topology that cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// A chain with another number of roles than there are agents.
    #[error("topology: {roles} roles for {agents} agents")]
    Roles {
        /// Roles named.
        roles: usize,
        /// Agents loaded.
        agents: usize,
    },
    /// A chain of one.
    #[error("topology: a chain needs at least 2 roles")]
    Short,
    /// A role without a name, or with another's.
    #[error("topology: role {place} is called `{name}`; names must be there and differ")]
    Name {
        /// Its place.
        place: usize,
        /// Its name.
        name: String,
    },
    /// `on_failure` names no agent.
    #[error("topology: on_failure is {place}; there are {agents} agents, from 0")]
    OnFailure {
        /// The place named.
        place: u32,
        /// Agents there are.
        agents: usize,
    },
    /// Groups that do not hold every agent exactly once.
    #[error("topology: agent {agent} is in {times} groups; every agent must be in one")]
    Groups {
        /// The agent.
        agent: u32,
        /// How often it occurs.
        times: usize,
    },
    /// An empty group.
    #[error("topology: group {place} is empty")]
    EmptyGroup {
        /// Its place.
        place: usize,
    },
    /// Caches that do not fit together.
    #[error("handoff: kv from {from} to {to}: {reason}")]
    Kv {
        /// The sender's model.
        from: String,
        /// The receiver's.
        to: String,
        /// What differs.
        reason: String,
    },
    /// The meta-level operator.
    #[error("topology: meta: {0}")]
    Meta(#[from] SpecError),
}

impl Topology {
    /// Checks the topology against the number of agents.
    ///
    /// # Errors
    /// [`TopologyError`].
    pub fn validate(&self, agents: usize) -> Result<(), TopologyError> {
        match self {
            Self::Lockstep => Ok(()),
            Self::Hierarchical(hierarchy) => hierarchy.validate(agents),
            Self::Sequential(chain) => chain.validate(agents),
        }
    }

    /// The chain, where it is one.
    #[must_use]
    pub fn chain(&self) -> Option<&Sequential> {
        match self {
            Self::Sequential(chain) => Some(chain),
            Self::Lockstep | Self::Hierarchical(_) => None,
        }
    }

    /// The groups, where there are any.
    #[must_use]
    pub fn hierarchy(&self) -> Option<&Hierarchy> {
        match self {
            Self::Hierarchical(hierarchy) => Some(hierarchy),
            Self::Lockstep | Self::Sequential(_) => None,
        }
    }
}

impl Hierarchy {
    fn validate(&self, agents: usize) -> Result<(), TopologyError> {
        if let Some(place) = self.groups.iter().position(Vec::is_empty) {
            return Err(TopologyError::EmptyGroup { place });
        }
        let members = || self.groups.iter().flatten();
        let beyond = members().copied().filter(|&m| m as usize >= agents).min();
        for agent in (0..agents as u32).chain(beyond) {
            let times = members().filter(|&&m| m == agent).count();
            if times != usize::from((agent as usize) < agents) {
                return Err(TopologyError::Groups { agent, times });
            }
        }
        self.meta.validate(Some(self.groups.len()))?;
        Ok(())
    }
}

impl Sequential {
    fn validate(&self, agents: usize) -> Result<(), TopologyError> {
        let roles = self.roles.len();
        if roles < 2 {
            return Err(TopologyError::Short);
        }
        if roles != agents {
            return Err(TopologyError::Roles { roles, agents });
        }
        for (place, role) in self.roles.iter().enumerate() {
            let twice = self.roles[..place].iter().any(|r| r.name == role.name);
            if role.name.trim().is_empty() || twice {
                let name = role.name.clone();
                return Err(TopologyError::Name { place, name });
            }
        }
        match self.on_failure {
            Some(place) if place as usize >= agents => {
                Err(TopologyError::OnFailure { place, agents })
            }
            _ => Ok(()),
        }
    }

    /// Most handoffs of a sample.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.max_handoffs
            .unwrap_or(self.roles.len().saturating_sub(1) as u32)
    }

    /// Whether what crosses are token ids or mixtures, which mean something to one vocabulary only.
    #[must_use]
    pub fn needs_one_vocabulary(&self) -> bool {
        self.handoff != Handoff::Text
    }

    /// Checks that the cache of every agent fits its receivers.
    ///
    /// # Errors
    /// [`TopologyError::Kv`], naming the first pair and the first thing that differs.
    pub fn check_kv(&self, info: &EnsembleInfo) -> Result<(), TopologyError> {
        if self.handoff != Handoff::Kv {
            return Ok(());
        }
        let Some(&first) = info.agents.first() else {
            return Ok(());
        };
        for &other in &info.agents[1..] {
            kv_compatible(info, first, other)?;
        }
        Ok(())
    }
}

/// A cache means something to the very weights that made it, and to no others.
fn kv_compatible(info: &EnsembleInfo, a: ModelId, b: ModelId) -> Result<(), TopologyError> {
    if a == b {
        return Ok(());
    }
    let (x, y) = (&info.models[a.index()], &info.models[b.index()]);
    let checks = [
        (
            "architecture",
            x.architecture.clone(),
            y.architecture.clone(),
        ),
        ("width", x.hidden.to_string(), y.hidden.to_string()),
        (
            "bytes of KV per position",
            x.kv_bytes_per_position.to_string(),
            y.kv_bytes_per_position.to_string(),
        ),
        (
            "vocabulary",
            format!("{:016x}", x.fingerprint),
            format!("{:016x}", y.fingerprint),
        ),
        ("dtype", x.dtype.clone(), y.dtype.clone()),
    ];
    let differs = checks.into_iter().find(|(_, a, b)| a != b);
    Err(TopologyError::Kv {
        from: x.name.clone(),
        to: y.name.clone(),
        reason: match differs {
            Some((what, a, b)) => format!("{what} {a} is not {b}"),
            None => {
                "other weights; a cache means something to the weights that made it alone".into()
            }
        },
    })
}
