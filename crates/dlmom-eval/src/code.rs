//! The program that a text proposes. Part of what [`EXTRACTOR_VERSION`](crate::EXTRACTOR_VERSION) counts.

use crate::extract::{Extraction, Method, after_reasoning};

/// The complete source of the program that `text` proposes for `prompt`, which opens the definition of `entry_point`. Both
/// answers hold it: there is one reading, and whether it is a program at all is for the interpreter to say.
#[must_use]
pub fn extract_code(text: &str, prompt: &str, entry_point: &str) -> Extraction {
    let Some(start) = after_reasoning(text) else {
        return Extraction::none(Method::TruncatedReasoning);
    };
    let body = &text[start..];
    let Some((source, method)) = program(body, prompt, entry_point) else {
        return Extraction::none(Method::None);
    };
    Extraction {
        strict: Some(source.clone()),
        flexible: Some(source),
        method,
        span: None,
    }
}

fn program(body: &str, prompt: &str, entry_point: &str) -> Option<(String, Method)> {
    let blocks = python_blocks(body);
    let whole = blocks.iter().rev().find(|b| defines(b, entry_point));
    if let Some(block) = whole {
        return Some((with_prelude(prompt, entry_point, block), Method::CodeBlock));
    }
    let last = blocks.iter().rev().find(|b| !b.trim().is_empty());
    if let Some(block) = last {
        return Some((continued(prompt, block), Method::CodeBlock));
    }
    if body.trim().is_empty() {
        return None;
    }
    // An indented start belongs to the opened definition, whatever is defined further down.
    let indented = first_line(body).starts_with([' ', '\t']);
    if !indented && defines(body, entry_point) {
        return Some((with_prelude(prompt, entry_point, body), Method::Definition));
    }
    Some((continued(prompt, body), Method::Continuation))
}

/// Whether a line at the left margin defines function `name`.
pub(crate) fn defines(source: &str, name: &str) -> bool {
    definition(source, name).is_some()
}

/// Where the last such line starts.
fn definition(source: &str, name: &str) -> Option<usize> {
    let mut start = 0;
    let mut found = None;
    for line in source.split_inclusive('\n') {
        let after = line.strip_prefix("async ").unwrap_or(line);
        let after = after.strip_prefix("def ").map(str::trim_start);
        let named = after.and_then(|rest| rest.strip_prefix(name));
        if named.is_some_and(|rest| rest.trim_start().starts_with('(')) {
            found = Some(start);
        }
        start += line.len();
    }
    found
}

/// The contents of every fenced block of Python; one that does not end is as long as the text.
fn python_blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut open: Option<(bool, String)> = None;
    for line in text.lines() {
        let fence = line.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (None, Some(info)) => {
                let language = info.split_whitespace().next().unwrap_or("").to_lowercase();
                let python = matches!(language.as_str(), "" | "python" | "python3" | "py");
                open = Some((python, String::new()));
            }
            (Some((python, block)), Some(_)) => {
                if *python {
                    blocks.push(std::mem::take(block));
                }
                open = None;
            }
            (Some((_, block)), None) => {
                block.push_str(line);
                block.push('\n');
            }
            (None, None) => {}
        }
    }
    if let Some((true, block)) = open {
        blocks.push(block);
    }
    blocks
}

/// `source`, which defines the function, after what the prompt holds before the function: its imports and helpers.
fn with_prelude(prompt: &str, entry_point: &str, source: &str) -> String {
    let end = definition(prompt, entry_point).unwrap_or(0);
    let prelude = prompt[..end].trim_end();
    if prelude.is_empty() {
        return source.to_owned();
    }
    // Future imports must come first.
    let future = |line: &&str| line.starts_with("from __future__ import");
    let (first, rest): (Vec<&str>, Vec<&str>) = source.split('\n').partition(future);
    let mut out = String::new();
    for line in first {
        out += line;
        out.push('\n');
    }
    out += prelude;
    out += "\n\n\n";
    out += &rest.join("\n");
    out
}

/// `prompt` continued by `body`. A body whose first line lost its indentation gets it back.
fn continued(prompt: &str, body: &str) -> String {
    let body = body.trim_start_matches(['\n', '\r']);
    let gap = if prompt.ends_with('\n') { "" } else { "\n" };
    let indent = if first_line(body).starts_with([' ', '\t']) {
        ""
    } else {
        "    "
    };
    format!("{prompt}{gap}{indent}{body}")
}

/// The first line that is not blank.
fn first_line(text: &str) -> &str {
    text.lines().find(|l| !l.trim().is_empty()).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPT: &str = "import math\n\n\ndef area(r):\n    \"\"\"Of a disc.\"\"\"\n";

    fn read(text: &str) -> (Method, String) {
        let found = extract_code(text, PROMPT, "area");
        assert_eq!(found.strict, found.flexible);
        (found.method, found.strict.unwrap_or_default())
    }

    #[test]
    fn a_block_that_defines_the_function_wins_and_keeps_the_prelude() {
        let text = "First:\n```python\ndef area(r):\n    return 0\n```\nBetter:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nUse it:\n```python\nprint(area(1))\n```\n";
        let (method, source) = read(text);
        assert_eq!(method, Method::CodeBlock);
        assert_eq!(
            source,
            "import math\n\n\ndef area(r):\n    return math.pi * r * r\n"
        );
        let (_, source) =
            read("```py\nfrom __future__ import annotations\ndef area(r): return 1\n```");
        assert_eq!(
            source,
            "from __future__ import annotations\nimport math\n\n\ndef area(r): return 1\n"
        );
        let (method, source) = read("```python\ndef area(r):\n    return 2");
        assert_eq!(method, Method::CodeBlock);
        assert!(source.ends_with("return 2\n"));
        let (method, _) = read("```bash\npip install x\n```\n```\ndef area(r):\n    return 3\n```");
        assert_eq!(method, Method::CodeBlock);
    }

    #[test]
    fn a_body_continues_the_prompt() {
        for (text, method) in [
            ("    return math.pi * r ** 2", Method::Continuation),
            ("\n\n    return math.pi * r ** 2", Method::Continuation),
            ("return math.pi * r ** 2", Method::Continuation),
            (
                "```python\n    return math.pi * r ** 2\n```",
                Method::CodeBlock,
            ),
            (
                "<think>def area(r): ...</think>    return math.pi * r ** 2",
                Method::Continuation,
            ),
        ] {
            let (found, source) = read(text);
            assert_eq!(found, method, "{text}");
            let expected = format!("{PROMPT}    return math.pi * r ** 2");
            assert_eq!(source.trim_end(), expected, "{text}");
        }
        // A model that goes on after the body still continued the prompt.
        let (method, source) = read("    return 1\n\n\ndef area(r):\n    return 2\n");
        assert_eq!(method, Method::Continuation);
        assert!(source.starts_with(PROMPT));
    }

    #[test]
    fn a_definition_without_a_fence_is_taken_as_it_is() {
        let (method, source) = read("def area(r):\n    return 1\n");
        assert_eq!(method, Method::Definition);
        assert_eq!(source, "import math\n\n\ndef area(r):\n    return 1\n");
    }

    #[test]
    fn nothing_is_no_program() {
        for (text, method) in [
            ("", Method::None),
            (" \n\t", Method::None),
            ("</think>", Method::None),
            ("<think>def area(r): return 1", Method::TruncatedReasoning),
        ] {
            assert_eq!(read(text), (method, String::new()), "{text}");
        }
    }

    #[test]
    fn only_the_left_margin_defines() {
        assert!(defines("x = 1\ndef f (a):\n", "f"));
        assert!(defines("async def f(a):\n", "f"));
        for other in [
            "    def f(a):\n",
            "def ff(a):\n",
            "def f\n",
            "define f(a)",
            "# def f(",
        ] {
            assert!(!defines(other, "f"), "{other}");
        }
    }
}
