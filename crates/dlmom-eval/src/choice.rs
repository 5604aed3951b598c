//! The option that a text chooses. Part of what [`EXTRACTOR_VERSION`](crate::EXTRACTOR_VERSION) counts.

use crate::extract::{
    Extraction, Method, after_reasoning, boxes_backwards, clean_text, lines_backwards, phrase_tail,
    unwrap_commands,
};
use crate::items::letter;

/// Words between which and an option's letter nothing is said.
const BEFORE_LETTER: [&str; 4] = ["option ", "choice ", "letter ", "most likely "];

/// What may follow "the answer is A" if A is the letter and no article.
const AFTER_LETTER: [&str; 10] = [
    "because", "since", "as", "is", "which", "due", "for", "given", "and", "with",
];

/// The letter that `text` chooses among `options`, which are lettered from A. The answer is a letter of an option or nothing.
#[must_use]
pub fn extract_choice(text: &str, options: &[String]) -> Extraction {
    let Some(start) = after_reasoning(text) else {
        return Extraction::none(Method::TruncatedReasoning);
    };
    let reader = Reader::new(&text[start..], options);
    let rules: [(Method, Rule<'_>); 5] = [
        (Method::Boxed, Reader::boxed),
        (Method::Hashes, Reader::hashes),
        (Method::Phrase, Reader::phrase),
        (Method::Marked, Reader::marked),
        (Method::OptionText, Reader::named),
    ];
    for (method, rule) in rules {
        if let Some(index) = rule(&reader) {
            let answer = letter(index).to_string();
            let strict = matches!(method, Method::Boxed | Method::Hashes);
            return Extraction {
                strict: strict.then(|| answer.clone()),
                flexible: Some(answer),
                method,
                span: None,
            };
        }
    }
    Extraction::none(Method::None)
}

/// Looks for the answer in one way.
type Rule<'a> = fn(&Reader<'a>) -> Option<usize>;

struct Reader<'a> {
    body: &'a str,
    /// Normalised texts of the options.
    options: Vec<String>,
}

/// Lower case, single spaces, without what dresses it or ends a sentence.
fn normal(text: &str) -> String {
    let words = clean_text(text).to_lowercase();
    let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
    words
        .trim_matches(|c: char| c.is_whitespace() || matches!(c, '.' | ',' | ';' | '!' | '"'))
        .to_owned()
}

fn dresses(c: char) -> bool {
    c.is_whitespace()
        || matches!(
            c,
            '*' | '_' | '`' | '$' | ':' | '"' | '\'' | '(' | '[' | '{'
        )
}

impl<'a> Reader<'a> {
    fn new(body: &'a str, options: &[String]) -> Self {
        Self {
            body,
            options: options.iter().map(|option| normal(option)).collect(),
        }
    }

    fn last_line(&self) -> &'a str {
        let mut lines = lines_backwards(self.body).map(|(_, line)| line);
        lines.find(|line| !line.trim().is_empty()).unwrap_or("")
    }

    /// The option that `c` is the letter of, in either case.
    fn index(&self, c: char) -> Option<usize> {
        let at = (u32::from(c.to_ascii_uppercase())).checked_sub(u32::from('A'))? as usize;
        (at < self.options.len()).then_some(at)
    }

    fn upper(&self, c: char) -> Option<usize> {
        c.is_ascii_uppercase().then(|| self.index(c)).flatten()
    }

    /// The option whose text `text` is.
    fn is_text(&self, text: &str) -> Option<usize> {
        let text = normal(text);
        let mut same = (0..self.options.len()).filter(|i| self.options[*i] == text);
        let first = same.next()?;
        (same.next().is_none() && !text.is_empty()).then_some(first)
    }

    /// The option that `text` is the letter of, and nothing else.
    fn is_letter(&self, text: &str) -> Option<usize> {
        let bare = clean_text(text);
        let bare = bare.trim_matches(|c: char| dresses(c) || matches!(c, ')' | ']' | '}' | '.'));
        let lower = bare.to_lowercase();
        let skip = BEFORE_LETTER
            .iter()
            .find(|word| lower.starts_with(*word))
            .map_or(0, |word| word.len());
        let mut chars = bare.get(skip..)?.trim_start_matches(dresses).chars();
        let index = self.index(chars.next()?)?;
        chars.as_str().is_empty().then_some(index)
    }

    /// Splits `B. text`, `B) text`, `(B) text` into the option and the text.
    fn labelled<'t>(&self, text: &'t str) -> Option<(usize, &'t str)> {
        let open = text.strip_prefix(['(', '[']);
        let mut chars = open.unwrap_or(text).chars();
        let index = self.upper(chars.next()?)?;
        let rest = chars.as_str();
        if rest
            .trim_matches(|c: char| dresses(c) || c == ')')
            .is_empty()
        {
            return Some((index, ""));
        }
        let rest = match open {
            Some(_) => rest.strip_prefix([')', ']'])?,
            None => rest.strip_prefix(['.', ')', ':'])?,
        };
        // "B.2" and "A.D." are no labels.
        let apart = rest.is_empty() || rest.starts_with(|c: char| dresses(c) && c != ':');
        apart.then(|| (index, rest.trim()))
    }

    fn boxed(&self) -> Option<usize> {
        boxes_backwards(self.body).find_map(|span| {
            let content = &self.body[span];
            let labelled = || {
                let text = clean_text(content);
                self.labelled(text.trim()).map(|(index, _)| index)
            };
            self.is_letter(content)
                .or_else(labelled)
                .or_else(|| self.is_text(content))
        })
    }

    fn hashes(&self) -> Option<usize> {
        let last = self.last_line();
        lines_backwards(self.body).find_map(|(_, line)| {
            let at = line.rfind("####")? + "####".len();
            let content = line[at..].trim();
            // "#### B. Ice" may be a heading; on the last line it is an answer.
            let labelled = || {
                let (index, _) = self.labelled(content)?;
                (line == last).then_some(index)
            };
            self.is_letter(content)
                .or_else(labelled)
                .or_else(|| self.is_text(content))
        })
    }

    /// What the last "answer is", "correct option:" states.
    fn phrase(&self) -> Option<usize> {
        // ASCII lower case keeps every byte offset.
        let lower = self.body.to_ascii_lowercase();
        let mut end = lower.len();
        loop {
            let head = &lower[..end];
            let words = ["answer", "option", "choice"];
            let (at, word) = words
                .iter()
                .filter_map(|word| Some((head.rfind(word)?, word)))
                .max()?;
            end = at;
            let glued = head[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            let from = at + word.len();
            if let (false, Some(len)) = (glued, phrase_tail(&lower[from..]))
                && let Some(index) = self.stated(&self.body[from + len..])
            {
                return Some(index);
            }
        }
    }

    fn stated(&self, rest: &str) -> Option<usize> {
        let rest = rest.trim_start_matches(dresses);
        let line = unwrap_commands(rest.split('\n').next()?);
        let mut line = line.trim_start_matches(dresses);
        let lower = line.to_ascii_lowercase();
        if let Some(word) = BEFORE_LETTER.iter().find(|word| lower.starts_with(*word)) {
            line = line[word.len()..].trim_start_matches(dresses);
        }
        let mut chars = line.chars();
        let first = chars.next()?;
        let after = chars.as_str();
        if let Some(index) = self.index(first)
            && !after.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '\'' | '-'))
        {
            // "The answer is a mystery", "Answer: A plant": an article, unless something ends or explains the letter.
            let next = after.trim_start_matches(dresses);
            let word = next.split(|c: char| !c.is_alphanumeric()).next()?;
            let ends = next.is_empty() || !after.starts_with(' ') || word.is_empty();
            let explains = AFTER_LETTER.contains(&word.to_lowercase().as_str());
            let letter = first.is_ascii_uppercase() && !matches!(first, 'A' | 'I');
            if ends || letter || (explains && first.is_ascii_uppercase()) {
                return Some(index);
            }
        }
        self.only_named(line)
    }

    /// The one letter that is marked in the text, else in its last line.
    fn marked(&self) -> Option<usize> {
        let trimmed = self.body.trim();
        let mut all = Vec::new();
        for (nth, line) in trimmed.lines().enumerate() {
            self.marks(line, &mut all);
            all.extend(self.starts(line, nth == 0));
        }
        // Of a list of all options, the last line is no choice; a lone letter under it is.
        let end = self.last_line();
        let mut last = Vec::new();
        self.marks(end, &mut last);
        only(&all)
            .or_else(|| only(&last))
            .or_else(|| self.is_letter(end))
    }

    /// `**B**`, `**B. text**`, `(B)`.
    fn marks(&self, line: &str, out: &mut Vec<usize>) {
        for (nth, bold) in line.split("**").enumerate() {
            if nth % 2 == 1
                && let Some((index, _)) = self.labelled(bold.trim())
            {
                out.push(index);
            }
        }
        for (at, _) in line.match_indices('(') {
            let glued = line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            let mut chars = line[at + 1..].chars();
            let index = chars.next().and_then(|c| self.upper(c));
            if let (false, Some(index)) = (glued, index)
                && chars.next() == Some(')')
            {
                out.push(index);
            }
        }
    }

    /// The letter that a line starts with, if the line says no more than the option does: reasoning goes through all of them.
    fn starts(&self, line: &str, first: bool) -> Option<usize> {
        let start = line.trim().trim_start_matches(['-', '>', ' ']);
        let (index, rest) = self.labelled(start)?;
        let rest = normal(rest);
        let counts = match rest.strip_prefix(self.options[index].as_str()) {
            Some(tail) => tail.is_empty() || tail.starts_with(['.', ';']),
            None => rest.is_empty() || first,
        };
        counts.then_some(index)
    }

    /// The only option that the text names, else the only one that its last line names.
    fn named(&self) -> Option<usize> {
        self.only_named(self.body)
            .or_else(|| self.only_named(self.last_line()))
    }

    /// The one option whose text is in `text`, apart from where a longer option's is, and where it only follows its letter.
    fn only_named(&self, text: &str) -> Option<usize> {
        let text = normal(text);
        let mut order: Vec<usize> = (0..self.options.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(self.options[*i].len()));
        let mut taken: Vec<std::ops::Range<usize>> = Vec::new();
        let mut found = Vec::new();
        for index in order {
            let option = &self.options[index];
            // The text of one option may be the letter of another: "A. C" of a question about gases.
            let mut chars = option.chars();
            let lone = chars.next().and_then(|c| self.index(c)).is_some() && chars.next().is_none();
            if option.is_empty() || lone {
                continue;
            }
            for (at, _) in text.match_indices(option.as_str()) {
                let span = at..at + option.len();
                let inner = taken
                    .iter()
                    .any(|t| t.start < span.end && span.start < t.end);
                let word = |c: char| c.is_alphanumeric();
                let glued = text[..at].ends_with(word) || text[span.end..].starts_with(word);
                // Duplicated options both count: such a text is ambiguous.
                let same = taken.contains(&span);
                if glued || (inner && !same) {
                    continue;
                }
                if !is_label(&text[..at], index) {
                    found.push(index);
                }
                taken.push(span);
            }
        }
        only(&found)
    }
}

/// Whether `before` ends in the lower-case label of option `index`: `b. `, `b) `.
fn is_label(before: &str, index: usize) -> bool {
    let label = letter(index).to_ascii_lowercase();
    let Some(head) = before.trim_end().strip_suffix(['.', ')', ':']) else {
        return false;
    };
    head.strip_suffix(label)
        .is_some_and(|head| !head.ends_with(char::is_alphanumeric))
}

/// The value of `values`, if all are the same.
fn only(values: &[usize]) -> Option<usize> {
    let (first, rest) = values.split_first()?;
    rest.iter().all(|v| v == first).then_some(*first)
}
