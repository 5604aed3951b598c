//! What a suites file may say: every knob absent, null or a value.

use std::borrow::Cow;

use dlmom_core::{AlphaUnit, ConsensusSpec, FilterSpec, Gate, SamplingSpec, Start, TriggerSpec};
use dlmom_runtime::{
    Align, Handoff, HandoffControl, LinkMessage, PacketControl, Signal, Support, WireEncoding,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize};

/// How the mixture of a latent step is perturbed (suite A1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SoftMode {
    /// Not at all.
    Deterministic,
    /// Gumbel-Softmax at temperature `tau`.
    Gumbel,
    /// A draw from `Dirichlet(lambda p)`.
    Dirichlet,
}

/// What an agent sends to another (suite A3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Comm {
    /// The mixture embedding; means something only between agents of one model.
    Embed,
    /// A belief packet of `k` entries.
    Belief,
    /// The distribution over the whole vocabulary.
    Logits,
    /// The agent's last hidden state, aligned with its input embeddings; agents that move one at a time.
    Hidden,
}

impl From<Comm> for LinkMessage {
    fn from(comm: Comm) -> Self {
        match comm {
            Comm::Embed => Self::Embed,
            Comm::Belief => Self::Belief,
            Comm::Logits => Self::Logits,
            Comm::Hidden => Self::Hidden,
        }
    }
}

/// KV cache compression (suite A4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Kv {
    /// None.
    #[serde(rename = "none")]
    None,
    /// 2-bit quantisation (KIVI, arXiv 2402.02750).
    #[serde(rename = "kivi2bit")]
    Kivi2bit,
    /// Merging across layers (MiniCache, arXiv 2405.14366).
    #[serde(rename = "minicache")]
    Minicache,
    /// Both.
    #[serde(rename = "minicache+kivi2bit")]
    MinicacheKivi2bit,
}

/// A knob as a file says it: absent, null or a value. Absent is filled from the next layer; null is itself a value.
#[derive(Clone, Debug, PartialEq, Default)]
pub enum Knob<T> {
    /// The key is not there.
    #[default]
    Absent,
    /// The key is there and null.
    Null,
    /// The key is there with a value.
    Value(T),
}

impl<T> Knob<T> {
    /// Whether the key is there.
    pub fn is_present(&self) -> bool {
        !matches!(self, Self::Absent)
    }

    /// The value of a knob that may be null: `Some(None)` is null, `None` absent.
    pub fn nullable(&self) -> Option<Option<&T>> {
        match self {
            Self::Absent => None,
            Self::Null => Some(None),
            Self::Value(value) => Some(Some(value)),
        }
    }
}

impl<T: Copy> Knob<T> {
    /// The value, where there is one.
    pub fn value(&self) -> Option<T> {
        match self {
            Self::Value(value) => Some(*value),
            Self::Absent | Self::Null => None,
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Knob<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Option::<T>::deserialize(deserializer).map(|v| v.map_or(Self::Null, Self::Value))
    }
}

impl<T: JsonSchema> JsonSchema for Knob<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Nullable_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Option::<T>::json_schema(generator)
    }
}

macro_rules! knobs {
    ($($(#[$doc:meta])* $field:ident: $ty:ty, $null:literal;)*) => {
        /// Every knob of an experiment, in one layer of a file.
        #[derive(Clone, Debug, PartialEq, Default)]
        pub struct Knobs { $($(#[$doc])* pub $field: Knob<$ty>,)* }

        /// One cell as the file writes it.
        #[derive(Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        #[schemars(rename = "Cell")]
        pub(super) struct CellFile {
            /// Unique name, also the name of its files.
            #[schemars(with = "String", regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"))]
            pub(super) id: serde_saphyr::Spanned<String>,
            $($(#[$doc])* #[serde(default)] $field: Knob<$ty>,)*
        }

        /// The layer below every cell.
        #[derive(Default, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        #[schemars(rename = "Defaults")]
        pub struct DefaultsFile { $($(#[$doc])* #[serde(default)] $field: Knob<$ty>,)* }

        impl CellFile {
            pub(super) fn into_parts(self) -> (serde_saphyr::Spanned<String>, Knobs) {
                (self.id, Knobs { $($field: self.$field,)* })
            }
        }

        impl From<DefaultsFile> for Knobs {
            fn from(file: DefaultsFile) -> Self {
                Self { $($field: file.$field,)* }
            }
        }

        impl Knobs {
            /// The first knob that is null although only a value makes sense.
            pub(crate) fn wrong_null(&self) -> Option<&'static str> {
                $(if !$null && self.$field == Knob::Null { return Some(stringify!($field)); })*
                None
            }

            /// Every knob of `self`, those it does not name from `below`.
            pub(super) fn over(&self, below: &Self) -> Self {
                Self {
                    $($field: if self.$field.is_present() { self.$field.clone() } else { below.$field.clone() },)*
                }
            }
        }
    };
}

knobs! {
    /// Perturbation of the mixture in latent steps; default `deterministic`.
    soft_mode: SoftMode, false;
    /// Gumbel-Softmax temperature, above 0; needed by `soft_mode: gumbel`.
    tau: f64, true;
    /// Dirichlet concentration, above 0; needed by `soft_mode: dirichlet`.
    lambda: f64, true;
    /// Rule of the controller; default `threshold`.
    gate: Gate, false;
    /// Entropy threshold in `alpha_unit`.
    alpha: f64, false;
    /// Unit of `alpha` and of the thresholds derived from it; default `normalized`.
    alpha_unit: AlphaUnit, false;
    /// Window of the trend gate in steps, at least 2; needed by `gate: trend`.
    w: u32, true;
    /// Most switches per sample; -1 is unlimited, 0 explicit only.
    cap: i64, false;
    /// Fewest consecutive latent steps; default 1.
    min_dwell_latent: u32, false;
    /// Fewest consecutive explicit steps; default 1, with `gate: reference` 512.
    min_dwell_explicit: u32, false;
    /// Entropy below which the trend gate calls a sample converged; null is `0.25 alpha`.
    convergence_threshold: f64, true;
    /// Slope per step that counts as falling; null is `0.02 alpha`.
    slope_eps: f64, true;
    /// Variance that counts as settled; null is `(0.1 alpha)^2`.
    var_eps: f64, true;
    /// What decides the first step; default `gate`, with `gate: reference` and `latent_then_explicit` `latent`.
    start: Start, false;
    /// Entropies below `alpha`, one after another, that end the block of `gate: latent_then_explicit`; default 1.
    patience: u32, false;
    /// What exits from latent mode inject, by their count; null is nothing.
    triggers: TriggerSpec, true;
    /// Text of one token: once it is printed, or leads in latent mode, the mode is explicit for good; null is none.
    lock_text: String, true;
    /// A token mixed into the first input of a latent stretch that follows an explicit step; null is none.
    enter_signal: Signal, true;
    /// A token mixed with the packet into the input after a latent stretch, in place of the printed token; null is none.
    exit_signal: Signal, true;
    /// What is kept of a packet before it is mixed; default all of it.
    filter: FilterSpec, false;
    /// Most latent steps per sample; default 40.
    max_latent_steps: u32, false;
    /// Most steps per sample; default 256.
    max_steps: u32, false;
    /// Last steps kept for the answer; null is `min(32, max_steps / 4)`.
    answer_reserve: u32, true;
    /// Text fed when the latent budget is spent; null is none.
    answer_cue: String, true;
    /// Entries of a packet; -1 is the whole vocabulary.
    k: i64, false;
    /// What crosses a link; default that of the reference pipeline.
    comm: Comm, false;
    /// How packets and whole-vocabulary messages are written; default `f32`.
    encoding: WireEncoding, false;
    /// What consensus sees of an agent; default `full`.
    support: Support, false;
    /// How hidden states become input embeddings under `comm: hidden`; default `ridge`.
    align: Align, false;
    /// What an agent of a chain hands to the next; default what the topology says.
    handoff: Handoff, false;
    /// Most handoffs of a sample; default what the topology says, else the length of the chain less one.
    max_handoffs: u32, false;
    /// What is fed in latent steps in place of the packet (suite C1); default `real`.
    packet_control: PacketControl, false;
    /// What is handed over in place of the transcript (suite C2); default `real`.
    handoff_control: HandoffControl, false;
    /// Modes are those of the reference pipeline's sample (suite C1); default false.
    same_exits: bool, false;
    /// Latent stretches are cut out of the caches where they end (suite C1); default false.
    drop_latent: bool, false;
    /// KV cache compression; default `none`.
    kv: Kv, false;
    /// How the experts' preferences meet; default the paper's TIES.
    consensus: ConsensusSpec, false;
    /// How explicit tokens are chosen; default greedy.
    sampling: SamplingSpec, false;
}
