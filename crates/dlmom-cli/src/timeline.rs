//! One sample's steps, as `generate --trace` shows them live and `show` prints them afterwards.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write;

use dlmom_core::{AlphaUnit, Gate, Mode};
use dlmom_runtime::{LoopConfig, ModelInfo, StepEvent, Trace};
use serde::Serialize;

use crate::visits::switches;

/// Entries of a packet named in a line.
pub(crate) const TOP: usize = 5;
/// Entries that a plain line has room for.
const PLAIN_TOP: usize = 3;
/// Cells of the entropy bar of plain lines.
const BAR: usize = 10;

/// What stands above the steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Header {
    /// What is shown: the prompt, or the recorded sample.
    pub title: String,
    /// Names of the experts.
    pub experts: Vec<String>,
    /// Entropy threshold, where the gate has one.
    pub alpha: Option<f64>,
    /// Unit of the entropies shown, that of alpha.
    pub unit: String,
    /// Entropy at the right end of the bar: twice alpha, so that alpha is its middle, but no more than the unit can hold.
    pub full: f64,
}

impl Header {
    /// The header of a loop; `ln_vocab` is the largest entropy there can be, in nats.
    #[must_use]
    pub fn new(
        title: String,
        experts: Vec<String>,
        config: &LoopConfig,
        ln_vocab: Option<f64>,
    ) -> Self {
        let controller = &config.controller;
        let (unit, ceiling) = match controller.alpha_unit {
            AlphaUnit::Normalized => ("of ln V", Some(1.0)),
            AlphaUnit::Nats => ("nats", ln_vocab),
            AlphaUnit::Quantile => ("as a rank among the pilot's", Some(1.0)),
        };
        let alpha = matches!(
            controller.gate,
            Gate::Threshold | Gate::Trend | Gate::LatentThenExplicit
        )
        .then_some(controller.alpha);
        Self {
            title,
            experts,
            alpha,
            unit: unit.to_owned(),
            full: full(alpha, ceiling.unwrap_or(1.0)),
        }
    }
}

/// The entropy at the right end of the bar.
fn full(alpha: Option<f64>, ceiling: f64) -> f64 {
    match alpha {
        Some(alpha) if alpha > 0.0 => (2.0 * alpha).min(ceiling.max(alpha)),
        _ => ceiling,
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// Its number, from 0.
    pub step: usize,
    /// `latent` or `explicit`.
    pub mode: &'static str,
    /// Place of the agent in control, in sequential topologies; 0 in others.
    pub agent: u32,
    /// Whether the mode has changed.
    pub switched: bool,
    /// Why the mode is what it is.
    pub reason: &'static str,
    /// The entropy that the controller saw, in its unit.
    pub entropy: f64,
    /// Top-k mass of the packet before renormalisation.
    pub mass: f32,
    /// The packet's first entries: text and probability.
    pub top: Vec<(String, f32)>,
    /// The printed text of explicit steps; null for an end token, and where a text is injected.
    pub token: Option<String>,
    /// Tokens of an injected text.
    pub injected: u32,
}

impl Step {
    /// The step of an event.
    #[must_use]
    pub fn of_event(event: &StepEvent<'_>) -> Self {
        let (ids, probs) = event
            .packet
            .map_or((&event.read.ids[..], &event.read.probs[..]), |p| {
                (p.ids(), p.probs())
            });
        Self {
            step: event.step as usize,
            mode: event.decision.mode.as_str(),
            agent: event.agent,
            switched: event.decision.switched,
            reason: event.decision.reason.as_str(),
            entropy: event.observed,
            mass: event.read.mass,
            top: ids
                .iter()
                .zip(probs)
                .take(TOP)
                .map(|(&id, &p)| (event.model.decode(&[id]), p))
                .collect(),
            token: event.token.map(|id| event.model.decode(&[id])),
            injected: event.injected.len() as u32,
        }
    }

    /// The steps of a recorded trace; columns end where the shortest does.
    pub fn of_trace(trace: &Trace) -> impl Iterator<Item = Self> + '_ {
        let steps = [
            trace.mode.len(),
            trace.reason.len(),
            trace.observed.len(),
            trace.mass.len(),
            trace.top_tokens.len(),
            trace.top_probs.len(),
            trace.top_ids.len(),
            trace.token.len(),
        ];
        let switched: BTreeSet<usize> = switches(&trace.mode, &trace.handoffs).collect();
        (0..steps.into_iter().min().unwrap_or(0)).map(move |at| {
            let token = trace.token[at].map(|id| {
                let known = trace.top_ids[at].iter().position(|other| *other == id);
                known
                    .and_then(|place| trace.top_tokens[at].get(place).cloned())
                    .unwrap_or_else(|| format!("<{id}>"))
            });
            Self {
                step: at,
                mode: trace.mode[at].as_str(),
                agent: trace.agent.get(at).copied().unwrap_or(0),
                switched: switched.contains(&at),
                reason: trace.reason[at].as_str(),
                entropy: trace.observed[at],
                mass: trace.mass[at],
                top: trace.top_tokens[at]
                    .iter()
                    .zip(&trace.top_probs[at])
                    .take(TOP)
                    .map(|(text, &p)| (text.clone(), p))
                    .collect(),
                token,
                injected: trace.injected.get(at).copied().unwrap_or(0),
            }
        })
    }

    fn latent(&self) -> bool {
        self.mode == Mode::Latent.as_str()
    }
}

/// What stands below the steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Footer {
    /// The printed text.
    pub text: String,
    /// Lines about the sample: counts, bytes, time, failure.
    pub facts: Vec<String>,
}

/// Something that shows a timeline. Never fails: what cannot be shown is dropped.
pub trait Timeline {
    /// Before the first step.
    fn start(&mut self, header: &Header);
    /// A step.
    fn step(&mut self, step: &Step);
    /// After the last step.
    fn finish(&mut self, footer: &Footer);
}

/// Plain lines of at most 80 columns, without colours or any other escape codes.
pub struct Plain<W: Write> {
    out: W,
    header: Option<Header>,
    /// The agent of the last step.
    agent: u32,
    /// The first failure to write, for the caller to ask.
    pub error: Option<std::io::Error>,
}

impl<W: Write> Plain<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Self {
        Self {
            out,
            header: None,
            agent: 0,
            error: None,
        }
    }

    fn line(&mut self, text: &str) {
        if self.error.is_some() {
            return;
        }
        let written = writeln!(self.out, "{}", text.trim_end()).and_then(|()| self.out.flush());
        self.error = written.err();
    }
}

/// Text of a token as it can stand in a line: quoted, line ends and controls escaped.
#[must_use]
pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '"' => out.push_str("\\\""),
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn bar(entropy: f64, full: f64) -> String {
    let share = if full > 0.0 && entropy.is_finite() {
        (entropy / full).clamp(0.0, 1.0)
    } else {
        0.0
    };
    let filled = (share * BAR as f64).round() as usize;
    (0..BAR)
        .map(|at| if at < filled { '#' } else { '.' })
        .collect()
}

impl<W: Write> Timeline for Plain<W> {
    fn start(&mut self, header: &Header) {
        self.line(&header.title);
        let alpha = header
            .alpha
            .map_or_else(String::new, |a| format!("; alpha {a} is the bar's middle"));
        self.line(&format!(
            "experts: {}; entropy {}{alpha}",
            header.experts.join(" + "),
            header.unit
        ));
        self.line("");
        self.line("step mode      entropy            mass   next");
        self.header = Some(header.clone());
    }

    fn step(&mut self, step: &Step) {
        if step.agent != self.agent {
            self.agent = step.agent;
            let name = self
                .header
                .as_ref()
                .and_then(|h| h.experts.get(step.agent as usize).cloned())
                .unwrap_or_else(|| format!("agent {}", step.agent));
            self.line(&format!("     -> {name}"));
        }
        let full = self.header.as_ref().map_or(1.0, |header| header.full);
        let next = if step.latent() {
            step.top
                .iter()
                .take(PLAIN_TOP)
                .map(|(text, p)| format!("{} {p:.2}", quoted(text)))
                .collect::<Vec<_>>()
                .join("  ")
        } else {
            match &step.token {
                Some(text) => quoted(text),
                None if step.injected > 0 => format!("(a text of {} tokens)", step.injected),
                None => "(end)".to_owned(),
            }
        };
        let mark = if step.switched { ">" } else { " " };
        let text = format!(
            "{:4}{mark}{:9} {} {:6.4} {:.4} {next}",
            step.step,
            step.mode,
            bar(step.entropy, full),
            step.entropy,
            step.mass,
        );
        let line: String = text.chars().take(80).collect();
        self.line(&line);
    }

    fn finish(&mut self, footer: &Footer) {
        self.line("");
        self.line(&footer.text);
        self.line("");
        for fact in &footer.facts {
            self.line(fact);
        }
    }
}

/// The text of printed tokens as it grows: bytes that do not yet make a character wait for the rest of it.
#[derive(Debug, Default)]
pub(crate) struct Growing {
    pending: Vec<u8>,
}

impl Growing {
    /// What can be printed after one more token.
    pub(crate) fn push(&mut self, model: &ModelInfo, token: u32) -> String {
        if let Some(bytes) = model.token_bytes.get(token as usize) {
            self.pending.extend_from_slice(bytes);
        }
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (valid, rest) = self.pending.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let rest = match error.error_len() {
                        // Incomplete: its other bytes may come.
                        None => {
                            self.pending = rest.to_vec();
                            return text;
                        }
                        Some(len) => rest[len..].to_vec(),
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending = rest;
                }
            }
        }
    }

    /// What is left at the end.
    pub(crate) fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(mode: &'static str, token: Option<&str>) -> Step {
        Step {
            step: 7,
            mode,
            agent: 0,
            switched: true,
            reason: "above_alpha",
            entropy: 0.45,
            mass: 0.98,
            top: vec![(" the".into(), 0.6), ("\n".into(), 0.3), ("\"".into(), 0.1)],
            token: token.map(str::to_owned),
            injected: 0,
        }
    }

    fn header(alpha: Option<f64>) -> Header {
        Header {
            title: "prompt: How many?".into(),
            experts: vec!["a".into(), "b".into()],
            alpha,
            unit: "nats".into(),
            full: full(alpha, 6.0),
        }
    }

    #[test]
    fn plain_lines_fit_80_columns_and_hold_no_escape_codes() {
        let mut out = Vec::new();
        let mut plain = Plain::new(&mut out);
        plain.start(&header(Some(0.3)));
        plain.step(&step("latent", None));
        plain.step(&step("explicit", Some(" garden")));
        plain.step(&step("explicit", None));
        let mut long = step("latent", None);
        long.top = vec![("x".repeat(90), 1.0)];
        plain.step(&long);
        plain.finish(&Footer {
            text: "12 trees".into(),
            facts: vec!["3 steps".into()],
        });
        assert!(plain.error.is_none());
        let text = String::from_utf8(out).unwrap();
        assert!(!text.contains('\u{1b}'));
        assert!(text.lines().all(|line| line.chars().count() <= 80));
        insta::assert_snapshot!(text);
    }

    #[test]
    fn the_bar_has_alpha_in_its_middle() {
        assert_eq!(bar(0.3, header(Some(0.3)).full), "#####.....");
        assert_eq!(bar(9.0, header(Some(0.3)).full), "##########");
        assert_eq!(bar(f64::NAN, 1.0), "..........");
        assert_eq!(bar(3.0, header(None).full), "#####.....");
    }

    #[test]
    fn characters_wait_for_their_last_byte() {
        let model = ModelInfo {
            token_bytes: vec![b"a".to_vec(), vec![0xc3], vec![0xa9], vec![0xff]],
            ..ModelInfo::default()
        };
        let mut growing = Growing::default();
        let mut parts: Vec<String> = [0, 1, 2, 3, 1]
            .into_iter()
            .map(|token| growing.push(&model, token))
            .collect();
        parts.push(growing.finish());
        assert_eq!(parts, ["a", "", "é", "\u{fffd}", "", "\u{fffd}"]);
    }
}
