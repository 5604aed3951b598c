//! Presets: the knobs of published methods, each with its source and where it deviates.

use dlmom_eval::suggest::hint;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::registry::{Cell, DefaultsFile, Knobs};
use crate::yaml::{self, YamlError};

const BUILTIN: [(&str, &str); 7] = [
    ("paper", include_str!("../../../configs/presets/paper.yaml")),
    (
        "soft_thinking",
        include_str!("../../../configs/presets/soft_thinking.yaml"),
    ),
    (
        "stochastic_soft_thinking",
        include_str!("../../../configs/presets/stochastic_soft_thinking.yaml"),
    ),
    ("swir", include_str!("../../../configs/presets/swir.yaml")),
    (
        "latent_then_explicit",
        include_str!("../../../configs/presets/latent_then_explicit.yaml"),
    ),
    (
        "cipher",
        include_str!("../../../configs/presets/cipher.yaml"),
    ),
    (
        "latentmas",
        include_str!("../../../configs/presets/latentmas.yaml"),
    ),
];

/// Suite of the cells that presets make.
pub const PRESETS: &str = "presets";

/// A preset file as YAML states it.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "dlmom-rs preset")]
pub struct PresetFile {
    /// Its name, also that of its cell.
    name: String,
    /// The method it follows.
    source: String,
    /// Where it does something else, one sentence or two each.
    deviations: Vec<String>,
    /// The topology it needs; null for any.
    #[serde(default)]
    topology: Option<String>,
    /// Its knobs.
    knobs: DefaultsFile,
    /// Knobs that hold a text of one token, and are left out for models that have no such token.
    #[serde(default)]
    where_known: Vec<TokenKnob>,
}

/// A knob that holds a text of one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenKnob {
    /// `lock_text`.
    LockText,
    /// `enter_signal`.
    EnterSignal,
    /// `exit_signal`.
    ExitSignal,
}

impl TokenKnob {
    /// The knob's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::LockText => "lock_text",
            Self::EnterSignal => "enter_signal",
            Self::ExitSignal => "exit_signal",
        }
    }
}

/// A published method's knobs.
#[derive(Clone, Debug, PartialEq)]
pub struct Preset {
    /// Its name, also that of its cell.
    pub name: String,
    /// The method it follows.
    pub source: String,
    /// Where it does something else.
    pub deviations: Vec<String>,
    /// The topology it needs; none for any.
    pub topology: Option<String>,
    /// Knobs that are left out for models without the token they name.
    pub where_known: Vec<TokenKnob>,
    knobs: Knobs,
}

/// A preset that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PresetError {
    /// Not YAML, or not of the schema.
    #[error(transparent)]
    Yaml(#[from] YamlError),
    /// No preset of that name.
    #[error("unknown preset `{name}`{hint}; known: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// `; did you mean ...?`, or empty.
        hint: String,
        /// All of them.
        known: String,
    },
    /// A knob that has no null is null.
    #[error("{file}: {field} of preset {name} is null; only a value makes sense")]
    Null {
        /// Name of the file.
        file: String,
        /// The preset's name.
        name: String,
        /// The knob.
        field: &'static str,
    },
}

impl Preset {
    /// The shipped preset of a name.
    ///
    /// # Errors
    /// [`PresetError::Unknown`], with the nearest name.
    pub fn named(name: &str) -> Result<Self, PresetError> {
        let known = || BUILTIN.iter().map(|(name, _)| *name);
        let Some((_, text)) = BUILTIN.iter().find(|(known, _)| *known == name) else {
            return Err(PresetError::Unknown {
                name: name.to_owned(),
                hint: hint(name, known()),
                known: known().collect::<Vec<_>>().join(", "),
            });
        };
        Self::parse(&format!("{name}.yaml"), text)
    }

    /// Every shipped preset, in order.
    ///
    /// # Errors
    /// None that a test does not exclude.
    pub fn all() -> Result<Vec<Self>, PresetError> {
        BUILTIN.iter().map(|(name, _)| Self::named(name)).collect()
    }

    /// A preset from its text; `file` is only named in errors.
    ///
    /// # Errors
    /// [`PresetError::Yaml`].
    pub fn parse(file: &str, text: &str) -> Result<Self, PresetError> {
        let parsed: PresetFile = yaml::from_str(file, text)?;
        let knobs = Knobs::from(parsed.knobs);
        if let Some(field) = knobs.wrong_null() {
            return Err(PresetError::Null {
                file: file.to_owned(),
                name: parsed.name,
                field,
            });
        }
        Ok(Self {
            name: parsed.name,
            source: parsed.source,
            deviations: parsed.deviations,
            topology: parsed.topology,
            where_known: parsed.where_known,
            knobs,
        })
    }

    /// The cell it makes.
    #[must_use]
    pub fn cell(&self) -> Cell {
        Cell {
            id: self.name.clone(),
            knobs: self.knobs.clone(),
        }
    }
}
