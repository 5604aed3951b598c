//! The one YAML parser and emitter of the project.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_saphyr::{DuplicateKeyPolicy, Error as SaphyrError};

use dlmom_eval::suggest::hint;

/// A mapping of names in the order of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct OrderedMap<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OrderedMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = OrderedMap<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping of names to lists")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<OrderedMap<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(OrderedMap(entries))
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

/// YAML that is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}:{column}: {message}")]
pub struct YamlError {
    /// Name of the file, as the user gave it.
    pub file: String,
    /// Line, from 1; 0 where the parser knows none.
    pub line: u64,
    /// Column, from 1; 0 where the parser knows none.
    pub column: u64,
    /// What is wrong there.
    pub message: String,
}

/// Reads one YAML document. Duplicate keys, unknown keys, merge keys and YAML 1.1 booleans (`yes`, `on`) are errors.
///
/// # Errors
/// [`YamlError`] at the first fault; an unknown key comes with the nearest known one.
pub fn from_str<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, YamlError> {
    let options = serde_saphyr::options! {
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: serde_saphyr::MergeKeyPolicy::Error,
        strict_booleans: true,
        with_snippet: false,
    };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| explain(file, text, &error))
}

fn explain(file: &str, text: &str, error: &SaphyrError) -> YamlError {
    let error = error.without_snippet();
    let location = error.location();
    let message = match error {
        SaphyrError::SerdeUnknownField {
            field, expected, ..
        } => {
            let known = expected.join(", ");
            format!(
                "unknown key `{field}`{}; known: {known}",
                hint(field, expected.iter().copied())
            )
        }
        SaphyrError::SerdeUnknownVariant {
            variant, expected, ..
        } => {
            let known = expected.join(", ");
            format!(
                "unknown value `{variant}`{}; known: {known}",
                hint(variant, expected.iter().copied())
            )
        }
        SaphyrError::DuplicateMappingKey { key: Some(key), .. } => {
            format!("key `{key}` is there twice")
        }
        SaphyrError::InvalidScalar { .. } => {
            let token = location.and_then(|l| token_at(text, l.line(), l.column()));
            format!(
                "{}{}",
                one_line(&error.to_string()),
                token.unwrap_or_default()
            )
        }
        other => one_line(&other.to_string()),
    };
    YamlError {
        file: file.to_owned(),
        line: location.map_or(0, |l| l.line()),
        column: location.map_or(0, |l| l.column()),
        message,
    }
}

/// " `token`" that starts at a place of the text, up to what ends a plain scalar.
fn token_at(text: &str, line: u64, column: u64) -> Option<String> {
    let line = text
        .lines()
        .nth(usize::try_from(line.checked_sub(1)?).ok()?)?;
    let rest: String = line
        .chars()
        .skip(usize::try_from(column.checked_sub(1)?).ok()?)
        .collect();
    let token = rest.split([',', '}', ']', '#']).next()?.trim();
    (!token.is_empty()).then(|| format!(" `{token}`"))
}

/// The first line of the parser's words, without the position it repeats.
fn one_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or(text);
    line.split(" at line ")
        .next()
        .unwrap_or(line)
        .trim_end_matches(':')
        .to_owned()
}

/// Writes one YAML document that [`from_str`] and PyYAML read back alike.
///
/// # Errors
/// The emitter's words for a value that YAML cannot hold.
pub fn to_string<T: Serialize>(value: &T) -> Result<String, String> {
    serde_saphyr::to_string(value).map_err(|e| e.to_string())
}
