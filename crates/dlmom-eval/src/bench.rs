//! Which data a `--bench` word means, and how an item becomes a prompt.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use dlmom_runtime::backend::{Message, PromptSource};

use crate::items::{Item, Schema, Task, letter};
use crate::suggest::hint;

/// What follows a question of `gsm8k:PATH`.
pub const STEP_BY_STEP: &str = "Reason step by step. Finish with a line of the form\n#### <number>\nholding only the final answer.";

/// What follows a prompt of `humaneval:PATH`.
pub const WHOLE_FUNCTION: &str = "Complete this function. Answer with one block that starts with ```python and ends with ```, holding the complete function\nand whatever it imports.";

/// What follows a question of `arc:PATH`.
pub const BEST_OPTION: &str = "Reason briefly. Finish with a line of the form\n#### <letter>\nholding only the letter of the best option.";

/// A benchmark: how its items are asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bench {
    name: String,
    instruction: Option<&'static str>,
}

impl Bench {
    /// Name in tables.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What follows every question after a blank line. `None` asks the bare question, which is what experts trained on the bare
    /// rendering expect.
    #[must_use]
    pub fn instruction(&self) -> Option<&'static str> {
        self.instruction
    }

    /// What every agent is asked about `item`: one user message.
    #[must_use]
    pub fn prompt(&self, item: &Item) -> PromptSource {
        let mut content = item.question.clone();
        if let Task::Choice { options } = &item.task {
            for (index, option) in options.iter().enumerate() {
                // Writing to a String cannot fail.
                let _ = write!(content, "\n{}. {option}", letter(index));
            }
        }
        if let Some(instruction) = self.instruction {
            if matches!(item.task, Task::Code { .. }) {
                content.truncate(content.trim_end().len());
            }
            content += "\n\n";
            content += instruction;
        }
        PromptSource::Chat {
            messages: vec![Message {
                role: "user".to_owned(),
                content,
            }],
        }
    }
}

/// A benchmark that `--bench` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BenchInfo {
    /// How it is named: `tinygsm`, `gsm8k:PATH`.
    pub word: &'static str,
    /// Layout of its rows.
    pub schema: Schema,
    /// How an answer is scored, in a few words.
    pub scored_by: &'static str,
    instruction: Option<&'static str>,
}

const EXACT_NUMBER: &str = "the number, exactly";
const CHOSEN_LETTER: &str = "the letter of the option";
const RUN_AGAINST_TESTS: &str = "running the code against its test";

const KNOWN: [BenchInfo; 6] = [
    BenchInfo {
        word: "tinygsm",
        schema: Schema::Gsm8k,
        scored_by: EXACT_NUMBER,
        instruction: None,
    },
    BenchInfo {
        word: "tinycode",
        schema: Schema::HumanEval,
        scored_by: RUN_AGAINST_TESTS,
        instruction: None,
    },
    BenchInfo {
        word: "tinymc",
        schema: Schema::Arc,
        scored_by: CHOSEN_LETTER,
        instruction: None,
    },
    BenchInfo {
        word: "gsm8k:PATH",
        schema: Schema::Gsm8k,
        scored_by: EXACT_NUMBER,
        instruction: Some(STEP_BY_STEP),
    },
    BenchInfo {
        word: "humaneval:PATH",
        schema: Schema::HumanEval,
        scored_by: RUN_AGAINST_TESTS,
        instruction: Some(WHOLE_FUNCTION),
    },
    BenchInfo {
        word: "arc:PATH",
        schema: Schema::Arc,
        scored_by: CHOSEN_LETTER,
        instruction: Some(BEST_OPTION),
    },
];

impl BenchInfo {
    /// The word without `:PATH`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.word.split(':').next().unwrap_or(self.word)
    }

    /// Whether the word needs a path; the others are shipped with the tiny experts.
    #[must_use]
    pub fn takes_path(&self) -> bool {
        self.word.contains(':')
    }

    /// Whether scoring runs the answers: needs a [`CodeJudge`](crate::CodeJudge) that can.
    #[must_use]
    pub fn runs_code(&self) -> bool {
        self.schema == Schema::HumanEval
    }
}

/// A parsed `--bench` word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BenchSpec {
    info: &'static BenchInfo,
    path: Option<PathBuf>,
}

/// A `--bench` word that names nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BenchSpecError {
    /// No such benchmark.
    #[error("unknown bench `{word}`{hint}; known: {}", words().join(", "))]
    Unknown {
        /// The word.
        word: String,
        /// `; did you mean ...?`, or empty.
        hint: String,
    },
    /// A path is missing.
    #[error("bench `{name}` needs the path of a JSONL file in the schema of {schema}: {name}:PATH")]
    NoPath {
        /// The benchmark.
        name: &'static str,
        /// The layout of the rows.
        schema: Schema,
    },
    /// A path where none is taken.
    #[error("bench `{name}` takes no path, got `{path}`")]
    UnexpectedPath {
        /// The benchmark.
        name: &'static str,
        /// The path.
        path: String,
    },
}

fn words() -> [&'static str; KNOWN.len()] {
    KNOWN.map(|info| info.word)
}

impl BenchSpec {
    /// Every benchmark, in the order of help texts.
    #[must_use]
    pub fn known() -> &'static [BenchInfo] {
        &KNOWN
    }

    /// Reads one of [`BenchSpec::known`]: `tinygsm`, `gsm8k:PATH`.
    ///
    /// # Errors
    /// [`BenchSpecError`], naming the nearest known bench.
    pub fn parse(word: &str) -> Result<Self, BenchSpecError> {
        let (name, path) = match word.split_once(':') {
            Some((name, path)) => (name, Some(path)),
            None => (word, None),
        };
        let Some(info) = KNOWN.iter().find(|info| info.name() == name) else {
            return Err(BenchSpecError::Unknown {
                word: word.to_owned(),
                hint: hint(name, words().into_iter().chain(KNOWN.map(|i| i.name()))),
            });
        };
        match path {
            None if !info.takes_path() => Ok(Self { info, path: None }),
            Some(path) if !info.takes_path() => Err(BenchSpecError::UnexpectedPath {
                name: info.name(),
                path: path.to_owned(),
            }),
            Some(path) if !path.is_empty() => Ok(Self {
                info,
                path: Some(path.into()),
            }),
            _ => Err(BenchSpecError::NoPath {
                name: info.name(),
                schema: info.schema,
            }),
        }
    }

    /// What the word means.
    #[must_use]
    pub fn info(&self) -> &'static BenchInfo {
        self.info
    }

    /// Layout of the rows.
    #[must_use]
    pub fn schema(&self) -> Schema {
        self.info.schema
    }

    /// The data file, where the word names one. Otherwise it is `NAME.jsonl` among the files shipped with the tiny experts.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// How the items are asked.
    #[must_use]
    pub fn bench(&self) -> Bench {
        Bench {
            name: self.info.name().to_owned(),
            instruction: self.info.instruction,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(question: &str, task: Task) -> Item {
        Item {
            id: "1".into(),
            question: question.into(),
            gold: "3".into(),
            solution: None,
            task,
        }
    }

    fn asked(word: &str, item: &Item) -> String {
        let PromptSource::Chat { messages } = BenchSpec::parse(word).unwrap().bench().prompt(item)
        else {
            panic!("a chat prompt")
        };
        assert_eq!((messages.len(), messages[0].role.as_str()), (1, "user"));
        messages[0].content.clone()
    }

    #[test]
    fn shipped_benches_ask_the_bare_question() {
        assert_eq!(
            asked("tinygsm", &item("How many? ", Task::Number)),
            "How many? "
        );
        let code = Task::Code {
            test: "def check(candidate):\n    pass".into(),
            entry_point: "f".into(),
        };
        assert_eq!(asked("tinycode", &item("def f(x):\n", code)), "def f(x):\n");
        let options = ["fire", "ice", "tin"].map(str::to_owned).to_vec();
        assert_eq!(
            asked("tinymc", &item("Which is cold?", Task::Choice { options })),
            "Which is cold?\nA. fire\nB. ice\nC. tin"
        );
    }

    #[test]
    fn public_benches_say_after_a_blank_line_how_to_answer() {
        let spec = BenchSpec::parse("gsm8k:/data/a:b.jsonl").unwrap();
        assert_eq!(spec.path(), Some(Path::new("/data/a:b.jsonl")));
        assert_eq!(spec.bench().name(), "gsm8k");
        let text = asked("gsm8k:x", &item("How many?", Task::Number));
        assert!(text.starts_with("How many?\n\nReason step by step."));
        assert!(text.contains("#### <number>"));
        let code = Task::Code {
            test: "def check(candidate):\n    pass".into(),
            entry_point: "f".into(),
        };
        let text = asked("humaneval:x", &item("def f(x):\n    \"\"\"X\"\"\"\n", code));
        assert!(
            text.starts_with("def f(x):\n    \"\"\"X\"\"\"\n\nComplete this"),
            "{text}"
        );
        assert!(text.contains("```python"));
        let options = vec!["fire".to_owned(), "ice".to_owned()];
        let text = asked("arc:x", &item("Which is cold?", Task::Choice { options }));
        assert!(text.starts_with("Which is cold?\nA. fire\nB. ice\n\nReason briefly."));
        assert!(text.contains("#### <letter>"));
    }

    #[test]
    fn every_known_word_parses_and_its_name_alone_asks_for_what_it_lacks() {
        for info in BenchSpec::known() {
            let spec = BenchSpec::parse(info.word).unwrap();
            assert_eq!((spec.info(), spec.schema()), (info, info.schema));
            assert_eq!(spec.path().is_some(), info.takes_path());
            assert_eq!(BenchSpec::parse(info.name()).is_ok(), !info.takes_path());
            assert!(!info.scored_by.is_empty());
        }
    }

    #[test]
    fn wrong_words_are_explained() {
        let said = |word| BenchSpec::parse(word).unwrap_err().to_string();
        insta::assert_snapshot!(
            [
                said("tinygms"), said("gsm8k"), said("gsm8k:"), said("tinygsm:x"), said("mmlu"), said(""),
                said("tinycod"), said("humanevl"), said("human-eval:x"), said("arc"), said("ark:x"), said("tinymc:"),
            ]
            .join("\n"),
            @r"
        unknown bench `tinygms`; did you mean `tinygsm`?; known: tinygsm, tinycode, tinymc, gsm8k:PATH, humaneval:PATH, arc:PATH
        bench `gsm8k` needs the path of a JSONL file in the schema of GSM8K: gsm8k:PATH
        bench `gsm8k` needs the path of a JSONL file in the schema of GSM8K: gsm8k:PATH
        bench `tinygsm` takes no path, got `x`
        unknown bench `mmlu`; known: tinygsm, tinycode, tinymc, gsm8k:PATH, humaneval:PATH, arc:PATH
        unknown bench ``; known: tinygsm, tinycode, tinymc, gsm8k:PATH, humaneval:PATH, arc:PATH
        unknown bench `tinycod`; did you mean `tinycode`?; known: tinygsm, tinycode, tinymc, gsm8k:PATH, humaneval:PATH, arc:PATH
        unknown bench `humanevl`; did you mean `humaneval`?; known: tinygsm, tinycode, tinymc, gsm8k:PATH, humaneval:PATH, arc:PATH
        unknown bench `human-eval:x`; did you mean `humaneval`?; known: tinygsm, tinycode, tinymc, gsm8k:PATH, humaneval:PATH, arc:PATH
        bench `arc` needs the path of a JSONL file in the schema of ARC: arc:PATH
        unknown bench `ark:x`; did you mean `arc`?; known: tinygsm, tinycode, tinymc, gsm8k:PATH, humaneval:PATH, arc:PATH
        bench `tinymc` takes no path, got ``
        "
        );
    }
}
