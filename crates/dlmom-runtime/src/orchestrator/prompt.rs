//! Where prompts are cut: behind what all prompts of an agent begin with, and into even parts.
//!
//! A cut shows in a prompt's last bits, so it depends on the prompt and the tokenizer alone, never on what else runs.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use super::{Backend, BackendError};
use crate::backend::{Message, PromptSource};
use crate::ids::ModelId;
use crate::sample::NextFeed;

/// Most positions of a prompt that are forwarded at once.
const CHUNK: usize = 512;

/// Fewest tokens of a common beginning that are worth a forward of their own.
const SHARED: usize = 64;

const USER: &str = "user";

/// What the user says last in a chat whose beginning is looked for: texts without a common first token.
const PROBES: [&str; 2] = ["a", "0"];

/// A prompt of one agent.
pub(super) struct Prompt {
    pub(super) ids: Vec<u32>,
    /// Tokens that it begins with like every prompt of the agent; 0 where they are too few to be forwarded by themselves.
    pub(super) shared: usize,
}

/// What chats begin with before the user's last message: instructions, examples.
#[derive(Default)]
pub(super) struct Beginnings {
    /// By the messages before that.
    known: HashMap<(ModelId, Vec<Message>), Vec<u32>>,
}

impl Beginnings {
    /// The prompt of a source whose tokens are `ids`.
    pub(super) fn prompt(
        &mut self,
        backend: &mut dyn Backend,
        model: ModelId,
        source: &PromptSource,
        ids: Vec<u32>,
    ) -> Result<Prompt, BackendError> {
        let before = match source {
            PromptSource::Chat { messages } => messages
                .iter()
                .rposition(|message| message.role == USER)
                .map_or(&[][..], |last| &messages[..last]),
            PromptSource::Text { .. } | PromptSource::Tokens { .. } => &[],
        };
        let shared = if before.is_empty() {
            0
        } else {
            let beginning = match self.known.entry((model, before.to_vec())) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => place.insert(beginning(backend, model, before)?),
            };
            common(beginning, &ids)
        };
        let worth = shared >= SHARED && shared + 1 < ids.len();
        Ok(Prompt {
            ids,
            shared: if worth { shared } else { 0 },
        })
    }
}

/// Tokens that chats have in common whatever the user says next; none where such a chat cannot be encoded.
fn beginning(
    backend: &mut dyn Backend,
    model: ModelId,
    before: &[Message],
) -> Result<Vec<u32>, BackendError> {
    let mut encoded = |probe: &str| {
        let last = Message {
            role: USER.to_owned(),
            content: probe.to_owned(),
        };
        let messages = before.iter().cloned().chain([last]).collect();
        match backend.encode(model, &PromptSource::Chat { messages }) {
            Err(error @ BackendError::Cancelled(_)) => Err(error),
            other => Ok(other.unwrap_or_default()),
        }
    };
    let [first, second] = PROBES;
    let (mut beginning, other) = (encoded(first)?, encoded(second)?);
    beginning.truncate(common(&beginning, &other));
    Ok(beginning)
}

/// Length of the longest common beginning.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// Parts of a prompt of at most [`CHUNK`] positions each: those of its common beginning, and those of the rest.
fn parts(prompt: &Prompt) -> Vec<Range<usize>> {
    // Of one length, give or take a token: a last part of one token would be a step like others.
    let even = |from: usize, length: usize| {
        let count = length.div_ceil(CHUNK);
        (0..count).map(move |at| from + at * length / count..from + (at + 1) * length / count)
    };
    let Prompt { ids, shared } = prompt;
    even(0, *shared)
        .chain(even(*shared, ids.len() - shared))
        .collect()
}

/// Prompts of the moving agents as feeds all of which end together: agents with fewer parts have no tokens in the first
/// ones.
pub(super) fn chunks(prompts: &[Prompt]) -> Vec<NextFeed> {
    let cut: Vec<Vec<Range<usize>>> = prompts.iter().map(parts).collect();
    let most = cut.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let part = |prompt: &Prompt, parts: &[Range<usize>], turn: usize| {
        let at = (turn + parts.len()).checked_sub(most);
        at.and_then(|at| parts.get(at))
            .map_or_else(Vec::new, |range| prompt.ids[range.clone()].to_vec())
    };
    (0..most)
        .map(|turn| {
            let of_agents = prompts.iter().zip(&cut);
            NextFeed::Tokens(of_agents.map(|(p, parts)| part(p, parts, turn)).collect())
        })
        .collect()
}
