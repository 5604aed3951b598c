//! The one answer extractor. A change of its behaviour is a change of [`EXTRACTOR_VERSION`], which configuration hashes hold.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::number::{Number, find_numbers, scan};

/// Version of the rules in the crate documentation.
pub const EXTRACTOR_VERSION: u32 = 1;

/// The rule that found the flexible answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// `\boxed{..}` or `\fbox{..}`.
    Boxed,
    /// A line with `####`.
    Hashes,
    /// "The answer is ..".
    Phrase,
    /// The last number of the text.
    LastNumber,
    /// A letter that stands out: `(B)`, `**B**`, `B.` at the start of a line.
    Marked,
    /// The only option whose text is there.
    OptionText,
    /// A fenced block of Python.
    CodeBlock,
    /// The definition of the function, without a fence.
    Definition,
    /// What continues the prompt.
    Continuation,
    /// Nothing was found.
    None,
    /// The text ends inside `<think>`.
    TruncatedReasoning,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Boxed,
        Self::Hashes,
        Self::Phrase,
        Self::LastNumber,
        Self::Marked,
        Self::OptionText,
        Self::CodeBlock,
        Self::Definition,
        Self::Continuation,
        Self::None,
        Self::TruncatedReasoning,
    ];
}

/// What a text answers, in canonical form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extraction {
    /// The answer in a format that was asked for: a box or a `####` line.
    pub strict: Option<String>,
    /// The answer by any rule.
    pub flexible: Option<String>,
    /// The rule that found `flexible`.
    pub method: Method,
    /// Bytes of the text that `flexible` was read from; `None` where it was not kept.
    pub span: Option<Range<usize>>,
}

/// How an extraction compares with the gold answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Score {
    /// The strict answer is right.
    pub correct: bool,
    /// The flexible answer is right.
    pub correct_flexible: bool,
}

/// Looks for an answer in the text after the reasoning.
type Rule = fn(&str) -> Option<Found>;

struct Found {
    answer: String,
    span: Range<usize>,
}

impl Extraction {
    /// No answer, for the reason that `method` gives.
    pub(crate) fn none(method: Method) -> Self {
        Self {
            strict: None,
            flexible: None,
            method,
            span: None,
        }
    }
}

/// Where the text after the reasoning starts; `None` if the text was cut inside it.
pub(crate) fn after_reasoning(text: &str) -> Option<usize> {
    let start = text.rfind("</think>").map_or(0, |at| at + "</think>".len());
    (!text[start..].contains("<think>")).then_some(start)
}

/// The answer of `text` to a question whose answer is a number.
#[must_use]
pub fn extract(text: &str) -> Extraction {
    let Some(start) = after_reasoning(text) else {
        return Extraction::none(Method::TruncatedReasoning);
    };
    let body = &text[start..];
    let rules: [(Method, Rule); 4] = [
        (Method::Boxed, boxed),
        (Method::Hashes, hashes),
        (Method::Phrase, phrase),
        (Method::LastNumber, last_number),
    ];
    for (method, rule) in rules {
        if let Some(found) = rule(body) {
            let strict = matches!(method, Method::Boxed | Method::Hashes);
            return Extraction {
                strict: strict.then(|| found.answer.clone()),
                flexible: Some(found.answer),
                method,
                span: Some(start + found.span.start..start + found.span.end),
            };
        }
    }
    Extraction::none(Method::None)
}

/// Compares both answers with `gold`.
#[must_use]
pub fn score(gold: &str, extraction: &Extraction) -> Score {
    let right = |answer: &Option<String>| {
        answer
            .as_deref()
            .is_some_and(|answer| answers_equal(gold, answer))
    };
    Score {
        correct: right(&extraction.strict),
        correct_flexible: right(&extraction.flexible),
    }
}

/// Whether two answers are the same: exactly, as rational numbers, where both are numbers; as cleaned text, ignoring case and
/// white space, where neither is.
#[must_use]
pub fn answers_equal(gold: &str, answer: &str) -> bool {
    let (gold, answer) = (canonical(gold), canonical(answer));
    match (Number::parse(&gold), Number::parse(&answer)) {
        (Some(a), Some(b)) => a == b,
        (None, None) => !gold.is_empty() && comparable(&gold) == comparable(&answer),
        _ => false,
    }
}

fn comparable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_whitespace())
        .flat_map(char::to_lowercase)
        .collect()
}

/// An answer as written in a box or after hashes, in canonical form: the number it is, units aside, else its cleaned text.
#[must_use]
pub fn canonical(raw: &str) -> String {
    let value = raw.rsplit('=').next().unwrap_or(raw);
    let value = value.trim_matches(is_wrapper);
    let value = value
        .strip_prefix(r"\(")
        .unwrap_or(value)
        .trim_matches(is_wrapper);
    if let Some(number) = number_with_unit(value) {
        return number.to_string();
    }
    let text = clean_text(value);
    match number_with_unit(&text) {
        Some(number) => number.to_string(),
        None => text,
    }
}

fn is_wrapper(c: char) -> bool {
    c.is_whitespace() || matches!(c, '*' | '`')
}

/// The number that `text` starts with, if only a unit follows.
fn number_with_unit(text: &str) -> Option<Number> {
    // A dollar sign is either currency or the edge of inline mathematics; `scan` takes one of them.
    let (number, len) =
        scan(text).or_else(|| scan(text.strip_prefix('$')?).map(|(n, l)| (n, l + 1)))?;
    is_unit(&text[len..]).then_some(number)
}

/// Whether what follows a number only says what it counts.
fn is_unit(rest: &str) -> bool {
    let bare = replace_each(&unwrap_commands(rest), &[r"^\circ", "°"], " ");
    let bare = replace_each(&bare, &[r"\,", r"\;", r"\:", r"\ ", r"\)", r"\!"], " ");
    let bare = replace_each(&bare, &["~", "$", "*", "`"], " ");
    let unit = bare.trim_end_matches(|c: char| c.is_whitespace() || matches!(c, '.' | '!' | ','));
    if unit.is_empty() {
        return true;
    }
    let apart = unit.starts_with(char::is_whitespace);
    let letters = unit.chars().filter(|c| c.is_alphabetic()).count();
    let words = unit.chars().all(|c| {
        c.is_alphabetic() || c.is_whitespace() || matches!(c, '/' | '-' | '\'' | '(' | ')' | ',')
    });
    words && (letters >= 2 || (apart && letters == 1)) && !unit.starts_with(['-', ','])
}

/// Text without the LaTeX and Markdown that only dresses it.
pub(crate) fn clean_text(text: &str) -> String {
    let bare = unwrap_commands(text)
        .replace(r"\dfrac", r"\frac")
        .replace(r"\tfrac", r"\frac");
    let bare = replace_each(
        &bare,
        &[r"\left", r"\right", r"\!", r"\(", r"\)", "$", "*", "`"],
        "",
    );
    let bare = replace_each(&bare, &[r"\,", r"\;", r"\:", r"\ ", "~"], " ");
    let bare = bare.split_whitespace().collect::<Vec<_>>().join(" ");
    let bare = bare.trim_end_matches('.').trim();
    let inner = bare
        .strip_prefix('(')
        .and_then(|b| b.strip_suffix(')'))
        .unwrap_or(bare);
    if inner.chars().count() == 1 {
        inner.to_owned()
    } else {
        bare.to_owned()
    }
}

/// `\text{X}` and its kin read ` X`.
pub(crate) fn unwrap_commands(text: &str) -> String {
    let mut out = text.to_owned();
    for command in [r"\text{", r"\textbf{", r"\mathrm{", r"\mathbf{", r"\mbox{"] {
        while let Some(at) = out.find(command) {
            let body = at + command.len();
            let Some(end) = balanced_end(&out[body..]) else {
                break;
            };
            out = format!(
                "{} {}{}",
                &out[..at],
                &out[body..body + end],
                &out[body + end + 1..]
            );
        }
    }
    out
}

fn replace_each(text: &str, patterns: &[&str], with: &str) -> String {
    patterns
        .iter()
        .fold(text.to_owned(), |text, pattern| text.replace(pattern, with))
}

/// Where the brace that closes `text`, whose opening brace was just passed, is.
fn balanced_end(text: &str) -> Option<usize> {
    let mut depth = 0usize;
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

fn boxed(text: &str) -> Option<Found> {
    boxes_backwards(text).find_map(|span| {
        let answer = canonical(&text[span.clone()]);
        (!answer.is_empty()).then_some(Found { answer, span })
    })
}

/// What every box holds, last first.
pub(crate) fn boxes_backwards(text: &str) -> impl Iterator<Item = Range<usize>> {
    let mut end = text.len();
    std::iter::from_fn(move || {
        loop {
            let head = &text[..end];
            let at = head.rfind(r"\boxed").max(head.rfind(r"\fbox"))?;
            end = at;
            let name = if text[at..].starts_with(r"\boxed") {
                r"\boxed"
            } else {
                r"\fbox"
            };
            if let Some(span) = box_content(text, at + name.len()) {
                return Some(span);
            }
        }
    })
}

/// What a box whose name ends at `from` holds: a balanced group, or the word after white space.
fn box_content(text: &str, from: usize) -> Option<Range<usize>> {
    let rest = &text[from..];
    let start = from + (rest.len() - rest.trim_start_matches(' ').len());
    if let Some(body) = text[start..].strip_prefix('{') {
        return balanced_end(body).map(|len| start + 1..start + 1 + len);
    }
    if start == from {
        return None;
    }
    let word = &text[start..];
    let len = word
        .find(|c: char| c.is_whitespace() || matches!(c, '$' | '\\' | '}'))
        .unwrap_or(word.len());
    (len > 0).then(|| start..start + len)
}

/// Every line with its offset, last first.
pub(crate) fn lines_backwards(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut end = Some(text.len());
    std::iter::from_fn(move || {
        let stop = end?;
        let start = text[..stop].rfind('\n').map_or(0, |at| at + 1);
        end = start.checked_sub(1);
        Some((start, &text[start..stop]))
    })
}

fn hashes(text: &str) -> Option<Found> {
    lines_backwards(text).find_map(|(offset, line)| {
        let at = line.rfind("####")? + "####".len();
        let raw = line[at..].trim();
        let answer = canonical(raw);
        // "#### 2. Add the apples" is a heading, "#### 2 apples" an answer.
        let answers = Number::parse(&answer).is_some() || is_choice(&answer);
        let start = offset + at + (line[at..].len() - line[at..].trim_start().len());
        answers.then(|| Found {
            answer,
            span: start..start + raw.len(),
        })
    })
}

fn is_choice(text: &str) -> bool {
    matches!(text.as_bytes(), [b'A'..=b'J'])
}

fn phrase(text: &str) -> Option<Found> {
    // ASCII lower case keeps every byte offset.
    let lower = text.to_ascii_lowercase();
    let mut end = lower.len();
    while let Some(at) = lower[..end].rfind("answer") {
        end = at;
        let glued = lower[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if let (false, Some(len)) = (glued, phrase_tail(&lower[at + "answer".len()..]))
            && let Some(found) = stated(text, at + "answer".len() + len)
        {
            return Some(found);
        }
    }
    None
}

/// Length of " is", ":", "**:" and their combinations after the word "answer"; `None` if neither is there.
pub(crate) fn phrase_tail(rest: &str) -> Option<usize> {
    let dressing = |c: char| matches!(c, ' ' | '*' | '_');
    let trimmed = rest.trim_start_matches(dressing);
    let separated = trimmed.len() < rest.len();
    let after = match trimmed.strip_prefix("is") {
        Some(after) if separated && !after.starts_with(char::is_alphanumeric) => {
            let inner = after.trim_start_matches(dressing);
            inner.strip_prefix(':').unwrap_or(after)
        }
        _ => trimmed.strip_prefix(':')?,
    };
    Some(rest.len() - after.len())
}

/// The number or choice letter stated at `from`: in the rest of the sentence, or in the next line if nothing follows.
fn stated(text: &str, from: usize) -> Option<Found> {
    let dressing = |c: char| c.is_whitespace() || matches!(c, '*' | '_' | '`' | '$' | ':');
    let rest = text[from..].trim_start_matches(dressing);
    let mut start = text.len() - rest.len();
    // A sign or currency symbol belongs to the number.
    if text[..start].ends_with('$') {
        start -= 1;
    }
    let segment = sentence(&text[start..]);
    let value = segment.rfind('=').map_or(0, |at| at + 1);
    if let Some((number, span)) = find_numbers(&segment[value..]).into_iter().next() {
        let offset = start + value;
        return Some(Found {
            answer: number.to_string(),
            span: offset + span.start..offset + span.end,
        });
    }
    let trimmed = segment.trim_start_matches(['(', '$']);
    let at = start + (segment.len() - trimmed.len());
    let letter = trimmed.get(..1)?;
    let alone = !trimmed[1..].starts_with(|c: char| c.is_alphanumeric() || c == '\'');
    // "The answer is a number" is no choice.
    let ends = trimmed[1..].trim_start_matches(dressing);
    let stops = trimmed.len() == 1 || !trimmed[1..].starts_with(' ') || ends.is_empty();
    (is_choice(letter) && alone && stops).then(|| Found {
        answer: letter.to_owned(),
        span: at..at + 1,
    })
}

/// `text` up to its first line end or full stop.
fn sentence(text: &str) -> &str {
    let line = text.split('\n').next().unwrap_or(text);
    let stop = line
        .match_indices(". ")
        .map(|(at, _)| at)
        .next()
        .unwrap_or(line.len());
    &line[..stop]
}

fn last_number(text: &str) -> Option<Found> {
    find_numbers(text).pop().map(|(number, span)| Found {
        answer: number.to_string(),
        span,
    })
}
