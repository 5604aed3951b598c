//! Which data a `--bench` word means, and how an item becomes a prompt.

use std::path::{Path, PathBuf};

use dlmom_runtime::backend::{Message, PromptSource};
use serde::{Deserialize, Serialize};

use crate::items::Item;
use crate::suggest::hint;

/// What follows a question of `gsm8k:PATH`.
pub const STEP_BY_STEP: &str = "Reason step by step. Finish with a line of the form\n#### <number>\nholding only the final answer.";

/// A benchmark: how its items are asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Bench {
    /// Word problems with one numeric answer, in GSM8K's schema.
    Gsm8kLike {
        /// Name in tables.
        name: String,
        /// What follows the question after a blank line; `None` asks the bare question, which is what experts trained on the
        /// bare rendering expect.
        instruction: Option<String>,
    },
}

impl Bench {
    /// Name in tables.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Gsm8kLike { name, .. } => name,
        }
    }

    /// What every agent is asked about `item`: one user message.
    #[must_use]
    pub fn prompt(&self, item: &Item) -> PromptSource {
        let Self::Gsm8kLike { instruction, .. } = self;
        let content = match instruction {
            Some(text) => format!("{}\n\n{text}", item.question),
            None => item.question.clone(),
        };
        PromptSource::Chat {
            messages: vec![Message {
                role: "user".to_owned(),
                content,
            }],
        }
    }
}

/// A parsed `--bench` word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BenchSpec {
    /// `tinygsm`: the problems shipped with the tiny experts; whoever ships them knows where they are.
    TinyGsm,
    /// `gsm8k:PATH`: a GSM8K-schema JSON Lines file.
    Gsm8k {
        /// The file.
        path: PathBuf,
    },
}

/// A `--bench` word that names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BenchSpecError {
    /// No such benchmark.
    #[error("unknown bench `{word}`{hint}; known: tinygsm, gsm8k:PATH")]
    Unknown {
        /// The word.
        word: String,
        /// `; did you mean ...?`, or empty.
        hint: String,
    },
    /// `gsm8k` without a path.
    #[error("bench `gsm8k` needs the path of a GSM8K-schema JSONL file: gsm8k:PATH")]
    NoPath,
    /// A path where none is taken.
    #[error("bench `tinygsm` takes no path, got `{0}`")]
    UnexpectedPath(String),
}

impl BenchSpec {
    /// Reads `tinygsm` or `gsm8k:PATH`.
    ///
    /// # Errors
    /// [`BenchSpecError`], naming the nearest known bench.
    pub fn parse(word: &str) -> Result<Self, BenchSpecError> {
        let (name, path) = match word.split_once(':') {
            Some((name, path)) => (name, Some(path)),
            None => (word, None),
        };
        match (name, path) {
            ("tinygsm", None) => Ok(Self::TinyGsm),
            ("tinygsm", Some(path)) => Err(BenchSpecError::UnexpectedPath(path.to_owned())),
            ("gsm8k", Some(path)) if !path.is_empty() => Ok(Self::Gsm8k { path: path.into() }),
            ("gsm8k", _) => Err(BenchSpecError::NoPath),
            _ => Err(BenchSpecError::Unknown {
                word: word.to_owned(),
                hint: hint(name, ["tinygsm", "gsm8k:PATH", "gsm8k"]),
            }),
        }
    }

    /// The data file, where the word names one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::TinyGsm => None,
            Self::Gsm8k { path } => Some(path),
        }
    }

    /// How the items are asked.
    #[must_use]
    pub fn bench(&self) -> Bench {
        match self {
            Self::TinyGsm => Bench::Gsm8kLike {
                name: "tinygsm".to_owned(),
                instruction: None,
            },
            Self::Gsm8k { .. } => Bench::Gsm8kLike {
                name: "gsm8k".to_owned(),
                instruction: Some(STEP_BY_STEP.to_owned()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item() -> Item {
        Item {
            id: "1".into(),
            question: "How many?".into(),
            gold: "3".into(),
        }
    }

    fn content(source: &PromptSource) -> (&str, &str) {
        let PromptSource::Chat { messages } = source else {
            panic!("a chat prompt")
        };
        assert_eq!(messages.len(), 1);
        (&messages[0].role, &messages[0].content)
    }

    #[test]
    fn tinygsm_asks_the_bare_question() {
        let prompt = BenchSpec::parse("tinygsm").unwrap().bench().prompt(&item());
        assert_eq!(content(&prompt), ("user", "How many?"));
    }

    #[test]
    fn gsm8k_asks_for_steps_and_hashes_after_a_blank_line() {
        let spec = BenchSpec::parse("gsm8k:/data/a:b.jsonl").unwrap();
        assert_eq!(spec.path(), Some(Path::new("/data/a:b.jsonl")));
        assert_eq!(spec.bench().name(), "gsm8k");
        let prompt = spec.bench().prompt(&item());
        let (role, text) = content(&prompt);
        assert_eq!(role, "user");
        assert!(text.starts_with("How many?\n\nReason step by step."));
        assert!(text.contains("#### <number>"));
    }

    #[test]
    fn wrong_words_are_explained() {
        let said = |word| BenchSpec::parse(word).unwrap_err().to_string();
        insta::assert_snapshot!(
            [said("tinygms"), said("gsm8k"), said("gsm8k:"), said("tinygsm:x"), said("mmlu"), said("")].join("\n"),
            @r"
        unknown bench `tinygms`; did you mean `tinygsm`?; known: tinygsm, gsm8k:PATH
        bench `gsm8k` needs the path of a GSM8K-schema JSONL file: gsm8k:PATH
        bench `gsm8k` needs the path of a GSM8K-schema JSONL file: gsm8k:PATH
        bench `tinygsm` takes no path, got `x`
        unknown bench `mmlu`; known: tinygsm, gsm8k:PATH
        unknown bench ``; known: tinygsm, gsm8k:PATH
        "
        );
    }
}
