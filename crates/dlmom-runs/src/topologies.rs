//! Topology files and role prompts: who the agents are, what they are told, and how they meet.

use std::path::Path;

use dlmom_core::ConsensusSpec;
use dlmom_eval::suggest::hint;
use dlmom_runtime::{
    Handoff, Hierarchy, Message, PromptSource, Role, Sequential, Topology, TopologyError,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::yaml::{self, OrderedMap, YamlError};

/// Topologies that are built into the program; `lockstep` is one more and has no file.
const BUILTIN: [(&str, &str); 4] = [
    (
        "sequential",
        include_str!("../../../configs/topologies/sequential.yaml"),
    ),
    (
        "panel",
        include_str!("../../../configs/topologies/panel.yaml"),
    ),
    (
        "debate",
        include_str!("../../../configs/topologies/debate.yaml"),
    ),
    (
        "latentmas",
        include_str!("../../../configs/topologies/latentmas.yaml"),
    ),
];

/// Role prompts that are built into the program.
const PROMPTS: [(&str, &str); 7] = [
    (
        "generalist",
        include_str!("../../../configs/prompts/generalist.yaml"),
    ),
    (
        "specialist",
        include_str!("../../../configs/prompts/specialist.yaml"),
    ),
    (
        "planner",
        include_str!("../../../configs/prompts/planner.yaml"),
    ),
    (
        "critic",
        include_str!("../../../configs/prompts/critic.yaml"),
    ),
    (
        "refiner",
        include_str!("../../../configs/prompts/refiner.yaml"),
    ),
    (
        "solver",
        include_str!("../../../configs/prompts/solver.yaml"),
    ),
    (
        "debater",
        include_str!("../../../configs/prompts/debater.yaml"),
    ),
];

/// Name of the topology in which all agents take every step together.
pub const LOCKSTEP: &str = "lockstep";

/// What an agent is told besides the question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RolePrompt {
    /// System message; null for none.
    pub system: Option<String>,
    /// The user message; `{question}` is replaced.
    pub question: String,
    /// What is put behind it where notes are handed over as text; `{sender}` and `{notes}` are replaced.
    pub notes: String,
}

impl Default for RolePrompt {
    fn default() -> Self {
        Self {
            system: None,
            question: "{question}".to_owned(),
            notes: Role::named("").notes,
        }
    }
}

impl RolePrompt {
    /// A bench's prompt as this agent is asked it. Prompts that are no conversation come back as they are.
    #[must_use]
    pub fn apply(&self, source: &PromptSource) -> PromptSource {
        let PromptSource::Chat { messages } = source else {
            return source.clone();
        };
        let mut asked = Vec::with_capacity(messages.len() + 1);
        if let Some(system) = &self.system {
            asked.push(Message {
                role: "system".to_owned(),
                content: system.clone(),
            });
        }
        let last = messages.iter().rposition(|m| m.role == "user");
        asked.extend(messages.iter().enumerate().map(|(at, message)| Message {
            content: if Some(at) == last {
                self.question.replace("{question}", &message.content)
            } else {
                message.content.clone()
            },
            ..message.clone()
        }));
        PromptSource::Chat { messages: asked }
    }
}

/// A topology file as YAML states it; its JSON schema is committed beside the suites'.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "dlmom-rs topology")]
pub struct TopologyFile {
    /// Its name in tables.
    name: String,
    /// A line on what it is.
    #[serde(default)]
    about: String,
    /// How the agents meet.
    kind: Kind,
    /// The agents, in order; for `lockstep` and `hierarchical` one for each expert where left out.
    #[serde(default)]
    agents: Option<Vec<AgentFile>>,
    /// Groups of `hierarchical`: names and the places of their agents, from 0.
    #[serde(default)]
    #[schemars(with = "Option<std::collections::BTreeMap<String, Vec<u32>>>")]
    groups: Option<OrderedMap<Vec<u32>>>,
    /// How the groups' packets are merged; default the paper's TIES.
    #[serde(default)]
    meta: Option<ConsensusSpec>,
    /// What an agent of `sequential` hands to the next; default `transcript`.
    #[serde(default)]
    handoff: Option<Handoff>,
    /// Most handoffs of `sequential`; default the length of the chain less one.
    #[serde(default)]
    max_handoffs: Option<u32>,
    /// Role that takes over in `sequential` where the answering one gave no answer; default nobody.
    #[serde(default)]
    on_failure: Option<String>,
}

/// How agents meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// All take every step together.
    Lockstep,
    /// The same, in groups.
    Hierarchical,
    /// One after another.
    Sequential,
}

/// One agent of a topology file.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct AgentFile {
    /// Its role, a name.
    role: String,
    /// What it is told: a shipped prompt's name, or the prompt itself; default the prompt named as the role.
    #[serde(default)]
    prompt: Option<PromptRef>,
    /// Which expert it is, from 0; default its place, and the only one where there is only one.
    #[serde(default)]
    expert: Option<u32>,
    /// Most latent steps of a visit; 0 prints from the start. Default an even share of what is left of the
    /// sample's, and all of it for the agent that answers.
    #[serde(default)]
    latent_steps: Option<u32>,
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum PromptRef {
    Name(String),
    Own(RolePrompt),
}

/// One agent, ready to be loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// Its role; none where the topology names none.
    pub role: Option<String>,
    /// Which expert it is.
    pub expert: usize,
    /// What it is told.
    pub prompt: RolePrompt,
}

/// A topology with its agents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Seating {
    /// Its name in tables.
    pub name: String,
    /// A line on what it is.
    pub about: String,
    /// How the agents meet.
    pub topology: Topology,
    /// The agents.
    pub seats: Vec<Seat>,
}

/// A topology that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SeatingError {
    /// The file cannot be read.
    #[error("{file}: cannot read: {source}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not YAML, or not of the schema.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// Neither a shipped topology nor a file.
    #[error("unknown topology `{name}`{hint}; known: {known}, or a file")]
    Unknown {
        /// The name asked for.
        name: String,
        /// `; did you mean ...?`, or empty.
        hint: String,
        /// All shipped ones.
        known: String,
    },
    /// No such role prompt.
    #[error("{file}: role `{role}`: no prompt is called `{name}`{hint}; known: {known}")]
    UnknownPrompt {
        /// The file.
        file: String,
        /// The role.
        role: String,
        /// The prompt.
        name: String,
        /// `; did you mean ...?`, or empty.
        hint: String,
        /// All shipped ones.
        known: String,
    },
    /// A key that this kind of topology does not read, lacks, or cannot use.
    #[error("{file}: {message}")]
    Field {
        /// The file.
        file: String,
        /// What is wrong.
        message: String,
    },
    /// The parts do not fit together.
    #[error("{file}: {source}")]
    Topology {
        /// The file.
        file: String,
        /// What does not fit.
        source: TopologyError,
    },
}

/// Names of the shipped topologies with a line on each, in order.
#[must_use]
pub fn builtin() -> Vec<(String, String)> {
    let mut known = vec![(
        LOCKSTEP.to_owned(),
        "All experts take every step together; consensus merges them".to_owned(),
    )];
    known.extend(BUILTIN.iter().filter_map(|(name, text)| {
        let file: TopologyFile = yaml::from_str(name, text).ok()?;
        Some(((*name).to_owned(), file.about))
    }));
    known
}

/// Names of the shipped role prompts, and the prompts.
#[must_use]
pub fn prompts() -> Vec<(String, RolePrompt)> {
    PROMPTS
        .iter()
        .filter_map(|(name, text)| Some(((*name).to_owned(), yaml::from_str(name, text).ok()?)))
        .collect()
}

/// The topology called `name`, or in the file of that name, for `experts` experts.
///
/// # Errors
/// [`SeatingError`].
pub fn seating(name: &str, experts: usize) -> Result<Seating, SeatingError> {
    if name == LOCKSTEP {
        return Ok(lockstep(experts));
    }
    if let Some((file, text)) = BUILTIN.iter().find(|(known, _)| *known == name) {
        return parse(&format!("{file}.yaml"), text, experts);
    }
    let path = Path::new(name);
    if !path.is_file() {
        let known = || std::iter::once(LOCKSTEP).chain(BUILTIN.iter().map(|(n, _)| *n));
        return Err(SeatingError::Unknown {
            name: name.to_owned(),
            hint: hint(name, known()),
            known: known().collect::<Vec<_>>().join(", "),
        });
    }
    let text = std::fs::read_to_string(path).map_err(|source| SeatingError::Read {
        file: name.to_owned(),
        source,
    })?;
    parse(name, &text, experts)
}

/// All experts in lockstep, each asked the bare question.
#[must_use]
pub fn lockstep(experts: usize) -> Seating {
    Seating {
        name: LOCKSTEP.to_owned(),
        about: String::new(),
        topology: Topology::Lockstep,
        seats: (0..experts)
            .map(|expert| Seat {
                role: None,
                expert,
                prompt: RolePrompt::default(),
            })
            .collect(),
    }
}

/// A topology from its text; `file` is only named in errors.
///
/// # Errors
/// [`SeatingError`].
pub fn parse(file: &str, text: &str, experts: usize) -> Result<Seating, SeatingError> {
    let parsed: TopologyFile = yaml::from_str(file, text)?;
    let wrong = |message: String| SeatingError::Field {
        file: file.to_owned(),
        message,
    };
    parsed.unread().map_or(Ok(()), |key| {
        Err(wrong(format!(
            "{key} reaches nothing in a topology of this kind"
        )))
    })?;
    let seats = match &parsed.agents {
        None if parsed.kind == Kind::Sequential => {
            return Err(wrong("agents is missing; a chain needs at least 2".into()));
        }
        None => lockstep(experts).seats,
        Some(agents) if agents.is_empty() => {
            return Err(wrong(
                "agents is empty; without the key there is one for each expert".into(),
            ));
        }
        Some(agents) => seats(file, agents, experts)?,
    };
    let topology = match parsed.kind {
        Kind::Lockstep => Topology::Lockstep,
        Kind::Hierarchical => Topology::Hierarchical(Hierarchy {
            groups: match parsed.groups {
                Some(groups) => groups.0.into_iter().map(|(_, members)| members).collect(),
                None => return Err(wrong("groups is missing".into())),
            },
            meta: parsed.meta.unwrap_or_default(),
        }),
        Kind::Sequential => {
            let roles = roles(parsed.agents.as_deref().unwrap_or(&[]), &seats);
            let on_failure =
                match &parsed.on_failure {
                    None => None,
                    Some(name) => {
                        Some(roles.iter().position(|r| r.name == *name).ok_or_else(|| {
                            wrong(format!("on_failure: no role is called `{name}`"))
                        })? as u32)
                    }
                };
            Topology::Sequential(Sequential {
                roles,
                handoff: parsed.handoff.unwrap_or_default(),
                max_handoffs: parsed.max_handoffs,
                on_failure,
            })
        }
    };
    topology
        .validate(seats.len())
        .map_err(|source| SeatingError::Topology {
            file: file.to_owned(),
            source,
        })?;
    Ok(Seating {
        name: parsed.name,
        about: parsed.about,
        topology,
        seats,
    })
}

/// A topology from its text, with as many experts as it needs.
///
/// # Errors
/// [`SeatingError`].
pub fn check(file: &str, text: &str) -> Result<Seating, SeatingError> {
    let parsed: TopologyFile = yaml::from_str(file, text)?;
    let experts = match (&parsed.agents, &parsed.groups) {
        (Some(agents), _) => {
            let named = agents.iter().filter_map(|a| a.expert).max();
            agents.len().max(named.map_or(0, |e| e as usize + 1))
        }
        (None, Some(groups)) => groups.0.iter().map(|(_, members)| members.len()).sum(),
        (None, None) => 1,
    };
    parse(file, text, experts)
}

impl TopologyFile {
    /// The first key that is there and that this kind does not read.
    fn unread(&self) -> Option<&'static str> {
        let chain = self.kind == Kind::Sequential;
        let groups = self.kind == Kind::Hierarchical;
        [
            ("groups", self.groups.is_some() && !groups),
            ("meta", self.meta.is_some() && !groups),
            ("handoff", self.handoff.is_some() && !chain),
            ("max_handoffs", self.max_handoffs.is_some() && !chain),
            ("on_failure", self.on_failure.is_some() && !chain),
            (
                "latent_steps",
                !chain
                    && self
                        .agents
                        .iter()
                        .flatten()
                        .any(|a| a.latent_steps.is_some()),
            ),
        ]
        .into_iter()
        .find_map(|(key, unread)| unread.then_some(key))
    }
}

fn seats(file: &str, agents: &[AgentFile], experts: usize) -> Result<Vec<Seat>, SeatingError> {
    agents
        .iter()
        .enumerate()
        .map(|(place, agent)| {
            let expert = match agent.expert {
                Some(expert) => expert as usize,
                None if experts == 1 => 0,
                None => place,
            };
            if expert >= experts {
                return Err(SeatingError::Field {
                    file: file.to_owned(),
                    message: format!(
                        "role `{}` is expert {expert}, counted from 0; there are {experts}",
                        agent.role
                    ),
                });
            }
            let prompt = match &agent.prompt {
                Some(PromptRef::Own(prompt)) => prompt.clone(),
                Some(PromptRef::Name(name)) => prompt(file, &agent.role, name)?,
                None => prompt(file, &agent.role, &agent.role)?,
            };
            Ok(Seat {
                role: Some(agent.role.clone()),
                expert,
                prompt,
            })
        })
        .collect()
}

fn prompt(file: &str, role: &str, name: &str) -> Result<RolePrompt, SeatingError> {
    let known = || PROMPTS.iter().map(|(name, _)| *name);
    let Some((_, text)) = PROMPTS.iter().find(|(known, _)| *known == name) else {
        return Err(SeatingError::UnknownPrompt {
            file: file.to_owned(),
            role: role.to_owned(),
            name: name.to_owned(),
            hint: hint(name, known()),
            known: known().collect::<Vec<_>>().join(", "),
        });
    };
    Ok(yaml::from_str(name, text)?)
}

fn roles(agents: &[AgentFile], seats: &[Seat]) -> Vec<Role> {
    agents
        .iter()
        .zip(seats)
        .map(|(agent, seat)| Role {
            name: agent.role.clone(),
            latent_steps: agent.latent_steps,
            notes: seat.prompt.notes.clone(),
        })
        .collect()
}

impl Seating {
    /// A bench's prompt as every agent is asked it.
    #[must_use]
    pub fn prompts(&self, source: &PromptSource) -> Vec<PromptSource> {
        self.seats
            .iter()
            .map(|seat| seat.prompt.apply(source))
            .collect()
    }

    /// Which expert every agent is.
    #[must_use]
    pub fn experts(&self) -> Vec<usize> {
        self.seats.iter().map(|seat| seat.expert).collect()
    }
}
