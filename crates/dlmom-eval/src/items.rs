//! Benchmark items from JSON Lines in the layouts of the public data sets.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::code::defines;
use crate::json::{canonical_json, sha256_hex};

/// Most options a choice may have: letters A to J.
pub const MAX_OPTIONS: usize = 10;

/// The layout of a row, named after the data set it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schema {
    /// `question`, `answer` ("... #### N"); optionally `id` or `item_id`.
    Gsm8k,
    /// `task_id`, `prompt`, `canonical_solution`, `test` (which defines `check(candidate)`), `entry_point`.
    HumanEval,
    /// `id`, `question`, `choices` (`text`, `label`), `answerKey`; or `question` with `stem` and `choices` inside.
    Arc,
}

impl std::fmt::Display for Schema {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gsm8k => "GSM8K",
            Self::HumanEval => "HumanEval",
            Self::Arc => "ARC",
        })
    }
}

/// What answers an item, besides its gold answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// A number.
    Number,
    /// The letter of an option. Letters are given by position, A first, whatever labels the data set uses.
    Choice {
        /// The options in the order of the row, 2 to [`MAX_OPTIONS`].
        options: Vec<String>,
    },
    /// A function that passes a test.
    Code {
        /// Source that defines `check(candidate)`.
        test: String,
        /// Name of the function.
        entry_point: String,
    },
}

/// The letter that stands for option `index`.
#[must_use]
pub fn letter(index: usize) -> char {
    char::from(b'A' + (index % 26) as u8)
}

/// One question with its gold answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The data set's own id, else a digest of the row; never an index.
    pub id: String,
    /// The question as written; for code the prompt, which ends in the opened definition of the function.
    pub question: String,
    /// For a number, what follows the last `####` of the answer, calculator annotations `<<..>>` removed; for a choice, the
    /// letter of the right option; for code, the reference solution.
    pub gold: String,
    /// A worked answer in the form that models are asked for, where the data set has one: the whole answer of a number, without
    /// annotations; the reference solution of code; none for a choice.
    pub solution: Option<String>,
    /// What answers it.
    pub task: Task,
}

/// A loaded file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemSet {
    /// The items in file order; never empty, ids unique.
    pub items: Vec<Item>,
    /// SHA-256 of the file's bytes, 64 hexadecimal characters.
    pub data_sha256: String,
}

/// One way a data file can be wrong. Lines count from 1.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ItemsError {
    /// The file cannot be read.
    #[error("{file}: cannot read: {source}", file = file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bytes are not UTF-8.
    #[error("{file}:{line}: not UTF-8 text", file = file.display())]
    Utf8 {
        /// The file.
        file: PathBuf,
        /// Line of the first wrong byte.
        line: usize,
    },
    /// A line is not JSON.
    #[error("{file}:{line}: malformed JSON at column {column}: {message}", file = file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// The parser's words.
        message: String,
    },
    /// A line is JSON but not an object.
    #[error("{file}:{line}: expected a JSON object, found {found}", file = file.display())]
    NotObject {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
        /// What it is.
        found: &'static str,
    },
    /// A required field is absent.
    #[error("{file}:{line}: field `{field}` is missing", file = file.display())]
    MissingField {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
        /// The field.
        field: &'static str,
    },
    /// A field has another type than the schema's.
    #[error("{file}:{line}: field `{field}` must be {expected}, found {found}", file = file.display())]
    FieldType {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
        /// The field.
        field: &'static str,
        /// The type it must have.
        expected: &'static str,
        /// The type it has.
        found: &'static str,
    },
    /// A field holds only white space.
    #[error("{file}:{line}: field `{field}` is empty", file = file.display())]
    EmptyField {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
        /// The field.
        field: &'static str,
    },
    /// A field does not say what its schema wants.
    #[error("{file}:{line}: field `{field}` {problem}", file = file.display())]
    Invalid {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The answer does not end in `#### N`.
    #[error("{file}:{line}: field `answer` has no `####` followed by the gold answer", file = file.display())]
    NoGold {
        /// The file.
        file: PathBuf,
        /// The line.
        line: usize,
    },
    /// Two rows have one id.
    #[error("{file}:{line}: id `{id}` was already used on line {first}", file = file.display())]
    DuplicateId {
        /// The file.
        file: PathBuf,
        /// The second line.
        line: usize,
        /// The first line.
        first: usize,
        /// The id.
        id: String,
    },
    /// No rows.
    #[error("{file}: holds no items", file = file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
}

/// Loads a JSON Lines file whose rows have the layout of `schema`.
///
/// CRLF line ends, a byte-order mark and blank lines are fine.
///
/// # Errors
/// [`ItemsError`], naming file, line and field.
pub fn load(schema: Schema, path: &Path) -> Result<ItemSet, ItemsError> {
    let bytes = std::fs::read(path).map_err(|source| ItemsError::Read {
        file: path.to_owned(),
        source,
    })?;
    parse(schema, path, &bytes)
}

/// [`load`] on bytes; `file` is only named in errors.
///
/// # Errors
/// [`ItemsError`], naming file, line and field.
pub fn parse(schema: Schema, file: &Path, bytes: &[u8]) -> Result<ItemSet, ItemsError> {
    let text = std::str::from_utf8(bytes).map_err(|e| ItemsError::Utf8 {
        file: file.to_owned(),
        line: bytes[..e.valid_up_to()].split(|b| *b == b'\n').count(),
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut items = Vec::new();
    let mut seen: HashMap<String, usize> = HashMap::new();
    for (index, raw) in text.split('\n').enumerate() {
        let line = index + 1;
        if raw.trim().is_empty() {
            continue;
        }
        let item = parse_row(schema, Place { file, line }, raw)?;
        if let Some(&first) = seen.get(&item.id) {
            return Err(ItemsError::DuplicateId {
                file: file.to_owned(),
                line,
                first,
                id: item.id,
            });
        }
        seen.insert(item.id.clone(), line);
        items.push(item);
    }
    if items.is_empty() {
        return Err(ItemsError::Empty {
            file: file.to_owned(),
        });
    }
    Ok(ItemSet {
        items,
        data_sha256: sha256_hex(bytes),
    })
}

fn parse_row(schema: Schema, place: Place<'_>, raw: &str) -> Result<Item, ItemsError> {
    let value: Value = serde_json::from_str(raw).map_err(|e| ItemsError::Json {
        file: place.file.to_owned(),
        line: place.line,
        column: e.column(),
        message: without_position(&e),
    })?;
    let Value::Object(row) = &value else {
        return Err(ItemsError::NotObject {
            file: place.file.to_owned(),
            line: place.line,
            found: kind(&value),
        });
    };
    let (question, gold, task) = match schema {
        Schema::Gsm8k => number(place, row)?,
        Schema::HumanEval => code(place, row)?,
        Schema::Arc => choice(place, row)?,
    };
    let solution = match schema {
        Schema::Gsm8k => row.get("answer").and_then(Value::as_str).map(plain),
        Schema::HumanEval => Some(gold.clone()),
        Schema::Arc => None,
    };
    let id = match own_id(place, row, schema)? {
        Some(id) => id,
        None => sha256_hex(canonical_json(&value).as_bytes())[..32].to_owned(),
    };
    Ok(Item {
        id,
        question,
        gold,
        solution,
        task,
    })
}

/// Question, gold and task of a row.
type Parts = (String, String, Task);
type Row = Map<String, Value>;

fn number(place: Place<'_>, row: &Row) -> Result<Parts, ItemsError> {
    let question = place.text(row.get("question"), "question")?;
    let answer = place.text(row.get("answer"), "answer")?;
    let gold = gold_of(answer).ok_or_else(|| ItemsError::NoGold {
        file: place.file.to_owned(),
        line: place.line,
    })?;
    Ok((question.to_owned(), gold, Task::Number))
}

fn code(place: Place<'_>, row: &Row) -> Result<Parts, ItemsError> {
    let prompt = place.text(row.get("prompt"), "prompt")?;
    let solution = place.text(row.get("canonical_solution"), "canonical_solution")?;
    let test = place.text(row.get("test"), "test")?;
    let entry_point = place.text(row.get("entry_point"), "entry_point")?;
    let name = |c: char| c.is_alphanumeric() || c == '_';
    if !entry_point.chars().all(name) || entry_point.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(place.invalid(
            "entry_point",
            format!("is no function name: `{entry_point}`"),
        ));
    }
    if !defines(prompt, entry_point) {
        return Err(place.invalid("prompt", format!("does not define `{entry_point}`")));
    }
    if !defines(test, "check") {
        return Err(place.invalid("test", "does not define `check`".into()));
    }
    let task = Task::Code {
        test: test.to_owned(),
        entry_point: entry_point.to_owned(),
    };
    Ok((prompt.to_owned(), solution.to_owned(), task))
}

fn choice(place: Place<'_>, row: &Row) -> Result<Parts, ItemsError> {
    let (stem, labelled) = match row.get("question") {
        Some(Value::Object(question)) => nested_choices(place, question)?,
        question => {
            let stem = place.text(question, "question")?;
            (stem, flat_choices(place, row)?)
        }
    };
    let key = place.text(row.get("answerKey"), "answerKey")?;
    let choices = format!("has {} choices", labelled.len());
    if !(2..=MAX_OPTIONS).contains(&labelled.len()) {
        let wanted = format!("{choices}, expected 2 to {MAX_OPTIONS}");
        return Err(place.invalid("choices", wanted));
    }
    for (index, (label, _)) in labelled.iter().enumerate() {
        if labelled[..index].iter().any(|(other, _)| other == label) {
            return Err(place.invalid("choices", format!("label `{label}` twice")));
        }
    }
    let gold = labelled
        .iter()
        .position(|(label, _)| *label == key)
        .ok_or_else(|| place.invalid("answerKey", format!("is `{key}`, no label of a choice")))?;
    let options = labelled.iter().map(|(_, text)| (*text).to_owned());
    let task = Task::Choice {
        options: options.collect(),
    };
    Ok((stem.to_owned(), letter(gold).to_string(), task))
}

/// Label and text of every choice.
type Labelled<'a> = Vec<(&'a str, &'a str)>;

/// `{"text": [..], "label": [..]}` in the field `choices`.
fn flat_choices<'a>(place: Place<'_>, row: &'a Row) -> Result<Labelled<'a>, ItemsError> {
    let value = place.present(row.get("choices"), "choices")?;
    let Value::Object(choices) = value else {
        return Err(place.wrong_type("choices", "an object", value));
    };
    let texts = place.array(choices.get("text"), "choices.text")?;
    let labels = place.array(choices.get("label"), "choices.label")?;
    if texts.len() != labels.len() {
        let problem = format!(
            "has {} entries, `choices.text` {}",
            labels.len(),
            texts.len()
        );
        return Err(place.invalid("choices.label", problem));
    }
    let pairs = labels.iter().zip(texts);
    pairs
        .map(|(label, text)| {
            let label = place.text(Some(label), "choices.label")?;
            Ok((label, place.text(Some(text), "choices.text")?))
        })
        .collect()
}

/// `{"stem": .., "choices": [{"text": .., "label": ..}, ..]}` in the field `question`.
fn nested_choices<'a>(
    place: Place<'_>,
    question: &'a Row,
) -> Result<(&'a str, Labelled<'a>), ItemsError> {
    let stem = place.text(question.get("stem"), "question.stem")?;
    let choices = place.array(question.get("choices"), "question.choices")?;
    let labelled = choices.iter().map(|choice| {
        let Value::Object(choice) = choice else {
            return Err(place.wrong_type("question.choices", "an array of objects", choice));
        };
        let label = place.text(choice.get("label"), "question.choices.label")?;
        Ok((
            label,
            place.text(choice.get("text"), "question.choices.text")?,
        ))
    });
    Ok((stem, labelled.collect::<Result<_, _>>()?))
}

fn own_id(place: Place<'_>, row: &Row, schema: Schema) -> Result<Option<String>, ItemsError> {
    let fields: &[&'static str] = match schema {
        Schema::Gsm8k => &["id", "item_id"],
        Schema::HumanEval => &["task_id"],
        Schema::Arc => &["id"],
    };
    for &field in fields {
        match row.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::Number(id)) if id.is_i64() || id.is_u64() => {
                return Ok(Some(id.to_string()));
            }
            Some(value @ Value::String(_)) => {
                return place.text(Some(value), field).map(|id| Some(id.to_owned()));
            }
            Some(other) => {
                return Err(place.wrong_type(field, "a string or an integer", other));
            }
        }
    }
    Ok(None)
}

/// Where a row is, for errors.
#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a Path,
    line: usize,
}

impl Place<'_> {
    fn invalid(self, field: &'static str, problem: String) -> ItemsError {
        ItemsError::Invalid {
            file: self.file.to_owned(),
            line: self.line,
            field,
            problem,
        }
    }

    fn wrong_type(self, field: &'static str, expected: &'static str, found: &Value) -> ItemsError {
        ItemsError::FieldType {
            file: self.file.to_owned(),
            line: self.line,
            field,
            expected,
            found: kind(found),
        }
    }

    fn present<'v>(
        self,
        value: Option<&'v Value>,
        field: &'static str,
    ) -> Result<&'v Value, ItemsError> {
        value.ok_or_else(|| ItemsError::MissingField {
            file: self.file.to_owned(),
            line: self.line,
            field,
        })
    }

    fn text<'v>(
        self,
        value: Option<&'v Value>,
        field: &'static str,
    ) -> Result<&'v str, ItemsError> {
        match self.present(value, field)? {
            Value::String(text) if text.trim().is_empty() => Err(ItemsError::EmptyField {
                file: self.file.to_owned(),
                line: self.line,
                field,
            }),
            Value::String(text) => Ok(text),
            other => Err(self.wrong_type(field, "a string", other)),
        }
    }

    fn array<'v>(
        self,
        value: Option<&'v Value>,
        field: &'static str,
    ) -> Result<&'v Vec<Value>, ItemsError> {
        match self.present(value, field)? {
            Value::Array(values) => Ok(values),
            other => Err(self.wrong_type(field, "an array", other)),
        }
    }
}

/// What follows the last `####`, without calculator annotations.
fn gold_of(answer: &str) -> Option<String> {
    let (_, tail) = answer.rsplit_once("####")?;
    let gold = plain(tail);
    let gold = gold.trim();
    (!gold.is_empty()).then(|| gold.to_owned())
}

/// A text without calculator annotations, `<<..>>`.
fn plain(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("<<") {
        kept.push_str(&rest[..start]);
        rest = match rest[start..].find(">>") {
            Some(end) => &rest[start + end + 2..],
            None => "",
        };
    }
    kept.push_str(rest);
    kept
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The parser's message without its own " at line 1 column N", which counts from the start of one line.
fn without_position(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ItemSet, ItemsError> {
        super::parse(Schema::Gsm8k, Path::new("data.jsonl"), text.as_bytes())
    }

    fn row(question: &str, answer: &str) -> String {
        serde_json::json!({"question": question, "answer": answer}).to_string()
    }

    #[test]
    fn gold_is_the_last_hash_line_without_annotations() {
        let set = parse(&row("q", "2+3=<<2+3=5>>5\n#### 1\nmore #### <<x>>2,125 ")).unwrap();
        assert_eq!(set.items[0].gold, "2,125");
        assert_eq!(set.data_sha256.len(), 64);
    }

    #[test]
    fn ids_are_the_rows_own_or_a_digest_of_the_canonical_row() {
        let text = [
            r#"{"id": 7, "question": "a", "answer": "a #### 1"}"#,
            r#"{"item_id": "x-1", "question": "a", "answer": "a #### 1"}"#,
            r#"{"question":"q","answer":"a #### 1"}"#,
        ]
        .join("\r\n")
            + "\r\n\r\n  \n";
        let set = parse(&text).unwrap();
        let ids: Vec<&str> = set.items.iter().map(|i| i.id.as_str()).collect();
        let digest = sha256_hex(br#"{"answer":"a #### 1","question":"q"}"#);
        assert_eq!(ids, ["7", "x-1", &digest[..32]]);
        let reordered = parse(r#"{"answer" : "a #### 1", "question" : "q"}"#).unwrap();
        assert_eq!(reordered.items[0].id, digest[..32]);
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_first_row() {
        assert_eq!(
            parse(&format!("\u{feff}{}", row("q", "#### 1")))
                .unwrap()
                .items
                .len(),
            1
        );
    }

    #[test]
    fn every_fault_names_file_line_and_field() {
        let good = row("q", "#### 1");
        let cases = [
            String::new(),
            "\n \n".to_owned(),
            format!("{good}\n{{\"question\": \"a\", \"answer\": \"#### 1\""),
            format!("{good}\n[1]"),
            format!("\n{good}\n{}", r#"{"answer": "x"}"#),
            r#"{"question": "q"}"#.to_owned(),
            r#"{"question": 3, "answer": "x"}"#.to_owned(),
            r#"{"question": "q", "answer": null}"#.to_owned(),
            row(" ", "#### 1"),
            row("q", ""),
            row("q", "no hashes"),
            row("q", "hashes #### "),
            r#"{"id": 1.5, "question": "q", "answer": "a #### 1"}"#.to_owned(),
            r#"{"id": "", "question": "q", "answer": "a #### 1"}"#.to_owned(),
            format!("{good}\n\n{good}"),
            r#"{"id": "1", "question": "q", "answer": "a #### 1"}
{"id": 1, "question": "r", "answer": "a #### 2"}"#
                .to_owned(),
        ];
        let said: Vec<String> = cases
            .iter()
            .map(|text| parse(text).unwrap_err().to_string())
            .collect();
        insta::assert_snapshot!(said.join("\n"));
        let error = super::parse(Schema::Gsm8k, Path::new("data.jsonl"), b"{}\n\xff").unwrap_err();
        assert_eq!(error.to_string(), "data.jsonl:2: not UTF-8 text");
        let error = load(Schema::Gsm8k, Path::new("no-such-file.jsonl")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("no-such-file.jsonl: cannot read: "),
            "{error}"
        );
    }

    fn faults(schema: Schema, good: &Value, changes: &[(&str, Value)]) -> String {
        let said = changes.iter().map(|(field, value)| {
            let mut row = good.clone();
            match (row.pointer_mut(field), value) {
                (_, Value::Null) => {
                    let (parent, key) = field.rsplit_once('/').unwrap();
                    let parent = row.pointer_mut(parent).unwrap().as_object_mut().unwrap();
                    parent.remove(key).unwrap();
                }
                (Some(place), value) => *place = value.clone(),
                (None, _) => panic!("no field {field}"),
            }
            let text = format!("\n{row}\n");
            super::parse(schema, Path::new("data.jsonl"), text.as_bytes())
                .unwrap_err()
                .to_string()
        });
        said.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn faults_of_code_rows_name_file_line_and_field() {
        let good = serde_json::json!({
            "task_id": "t/1", "prompt": "def double(x):\n", "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n", "entry_point": "double",
        });
        let set = super::parse(
            Schema::HumanEval,
            Path::new("d"),
            good.to_string().as_bytes(),
        );
        let item = &set.unwrap().items[0];
        assert_eq!(
            (item.id.as_str(), item.question.as_str(), item.gold.as_str()),
            ("t/1", "def double(x):\n", "    return 2 * x\n")
        );
        insta::assert_snapshot!(faults(
            Schema::HumanEval,
            &good,
            &[
                ("/prompt", Value::Null),
                ("/prompt", 3.into()),
                ("/prompt", "def other(x):\n".into()),
                ("/canonical_solution", Value::Null),
                ("/test", " ".into()),
                ("/test", "assert double(2) == 4".into()),
                ("/entry_point", Value::Null),
                ("/entry_point", "a b".into()),
                ("/entry_point", "2double".into()),
                ("/task_id", serde_json::json!([1])),
            ]
        ));
    }

    #[test]
    fn faults_of_choice_rows_name_file_line_and_field() {
        let flat = serde_json::json!({
            "id": "q-1", "question": "Which one flies?", "answerKey": "2",
            "choices": {"text": ["dog", "owl", "cod"], "label": ["1", "2", "3"]},
        });
        let nested = serde_json::json!({
            "id": "q-1", "answerKey": "2", "question": {"stem": "Which one flies?", "choices": [
                {"text": "dog", "label": "1"}, {"text": "owl", "label": "2"}, {"text": "cod", "label": "3"},
            ]},
        });
        let of = |row: &Value| {
            super::parse(Schema::Arc, Path::new("d"), row.to_string().as_bytes())
                .unwrap()
                .items
        };
        assert_eq!(of(&flat), of(&nested));
        let item = &of(&flat)[0];
        assert_eq!(item.gold, "B");
        let options = ["dog", "owl", "cod"].map(str::to_owned).to_vec();
        assert_eq!(item.task, Task::Choice { options });
        let eleven: Vec<String> = (0..11).map(|i| i.to_string()).collect();
        let of_flat = faults(
            Schema::Arc,
            &flat,
            &[
                ("/question", Value::Null),
                ("/choices", Value::Null),
                ("/choices", serde_json::json!(["a", "b"])),
                ("/choices/text", Value::Null),
                ("/choices/text", "dog".into()),
                ("/choices/text/1", "".into()),
                ("/choices/text/1", 4.into()),
                ("/choices/label", serde_json::json!(["1", "2"])),
                ("/choices/label", serde_json::json!(["1", "2", "2"])),
                (
                    "/choices",
                    serde_json::json!({"text": ["x"], "label": ["1"]}),
                ),
                (
                    "/choices",
                    serde_json::json!({"text": eleven, "label": eleven}),
                ),
                ("/answerKey", Value::Null),
                ("/answerKey", 2.into()),
                ("/answerKey", "B".into()),
                ("/id", " ".into()),
            ],
        );
        let of_nested = faults(
            Schema::Arc,
            &nested,
            &[
                ("/question/stem", Value::Null),
                ("/question/choices", Value::Null),
                ("/question/choices/0", "dog".into()),
                ("/question/choices/0/text", Value::Null),
                ("/question/choices/2/label", true.into()),
            ],
        );
        insta::assert_snapshot!([of_flat, of_nested].join("\n"));
    }
}
