//! Small typed indices: what crosses the backend boundary instead of tensors.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! index {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u32);

        impl $name {
            /// The index as a `usize`.
            #[must_use]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

index!(
    /// One row of the running batch.
    SlotId
);
index!(
    /// One agent of the ensemble: a model, a role prompt and its own lanes.
    AgentId
);
index!(
    /// One set of weights with its tokenizer.
    ModelId
);

/// One KV cache with its own position counter: a slot of one agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LaneId {
    /// Row of the running batch.
    pub slot: SlotId,
    /// Agent whose cache it is.
    pub agent: AgentId,
}

impl fmt::Display for LaneId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {} of agent {}", self.slot, self.agent)
    }
}
