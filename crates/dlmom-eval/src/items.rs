//! Benchmark items from GSM8K-schema JSON Lines.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::json::{canonical_json, sha256_hex};

/// One question with its gold answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The data set's own id, else a digest of the row; never an index.
    pub id: String,
    /// The question as written.
    pub question: String,
    /// What follows the last `####` of the answer, calculator annotations `<<..>>` removed.
    pub gold: String,
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

/// Loads a GSM8K-schema file: one object per line with `question` and `answer` ("... #### N"), optionally `id` or `item_id`.
///
/// CRLF line ends, a byte-order mark and blank lines are fine.
///
/// # Errors
/// [`ItemsError`], naming file, line and field.
pub fn load_gsm8k(path: &Path) -> Result<ItemSet, ItemsError> {
    let bytes = std::fs::read(path).map_err(|source| ItemsError::Read {
        file: path.to_owned(),
        source,
    })?;
    parse_gsm8k(path, &bytes)
}

/// [`load_gsm8k`] on bytes; `file` is only named in errors.
///
/// # Errors
/// [`ItemsError`], naming file, line and field.
pub fn parse_gsm8k(file: &Path, bytes: &[u8]) -> Result<ItemSet, ItemsError> {
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
        let item = parse_row(file, line, raw)?;
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

fn parse_row(file: &Path, line: usize, raw: &str) -> Result<Item, ItemsError> {
    let value: Value = serde_json::from_str(raw).map_err(|e| ItemsError::Json {
        file: file.to_owned(),
        line,
        column: e.column(),
        message: without_position(&e),
    })?;
    let Value::Object(row) = &value else {
        return Err(ItemsError::NotObject {
            file: file.to_owned(),
            line,
            found: kind(&value),
        });
    };
    let question = text_field(file, line, row, "question")?.to_owned();
    let answer = text_field(file, line, row, "answer")?;
    let gold = gold_of(answer).ok_or_else(|| ItemsError::NoGold {
        file: file.to_owned(),
        line,
    })?;
    let id = match own_id(file, line, row)? {
        Some(id) => id,
        None => sha256_hex(canonical_json(&value).as_bytes())[..32].to_owned(),
    };
    Ok(Item { id, question, gold })
}

fn own_id(
    file: &Path,
    line: usize,
    row: &Map<String, Value>,
) -> Result<Option<String>, ItemsError> {
    for field in ["id", "item_id"] {
        match row.get(field) {
            None | Some(Value::Null) => {}
            Some(Value::String(id)) if id.trim().is_empty() => {
                return Err(ItemsError::EmptyField {
                    file: file.to_owned(),
                    line,
                    field,
                });
            }
            Some(Value::String(id)) => return Ok(Some(id.clone())),
            Some(Value::Number(id)) if id.is_i64() || id.is_u64() => {
                return Ok(Some(id.to_string()));
            }
            Some(other) => {
                return Err(ItemsError::FieldType {
                    file: file.to_owned(),
                    line,
                    field,
                    expected: "a string or an integer",
                    found: kind(other),
                });
            }
        }
    }
    Ok(None)
}

fn text_field<'a>(
    file: &Path,
    line: usize,
    row: &'a Map<String, Value>,
    field: &'static str,
) -> Result<&'a str, ItemsError> {
    match row.get(field) {
        None => Err(ItemsError::MissingField {
            file: file.to_owned(),
            line,
            field,
        }),
        Some(Value::String(text)) if text.trim().is_empty() => Err(ItemsError::EmptyField {
            file: file.to_owned(),
            line,
            field,
        }),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(ItemsError::FieldType {
            file: file.to_owned(),
            line,
            field,
            expected: "a string",
            found: kind(other),
        }),
    }
}

/// What follows the last `####`, without calculator annotations.
fn gold_of(answer: &str) -> Option<String> {
    let (_, tail) = answer.rsplit_once("####")?;
    let mut gold = String::with_capacity(tail.len());
    let mut rest = tail;
    while let Some(start) = rest.find("<<") {
        gold.push_str(&rest[..start]);
        rest = match rest[start..].find(">>") {
            Some(end) => &rest[start + end + 2..],
            None => "",
        };
    }
    gold.push_str(rest);
    let gold = gold.trim();
    (!gold.is_empty()).then(|| gold.to_owned())
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
        parse_gsm8k(Path::new("data.jsonl"), text.as_bytes())
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
        let error = parse_gsm8k(Path::new("data.jsonl"), b"{}\n\xff").unwrap_err();
        assert_eq!(error.to_string(), "data.jsonl:2: not UTF-8 text");
        let error = load_gsm8k(Path::new("no-such-file.jsonl")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("no-such-file.jsonl: cannot read: "),
            "{error}"
        );
    }
}
