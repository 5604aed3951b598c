//! `packet`: belief packets and the other payloads, from bytes to text and back.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use dlmom_packet::{
    BeliefPacket, Decoded, DecodedDense, DecodedEmbed, Encoding, Kind, Meta, PacketError,
    TRANSCRIPT_HEADER_LEN, Transcript, TranscriptError, decode, decode_dense, decode_embed,
    encode_into, kind_of,
};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::status::{CliError, ExitStatus};

/// Arguments of `packet`.
#[derive(Debug, Args)]
pub struct PacketArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: PacketCommand,
}

/// What `packet` can do.
#[derive(Debug, Subcommand)]
pub enum PacketCommand {
    /// Show packets, dense beliefs, embeddings and transcripts written one after another.
    Inspect(InspectArgs),
    /// Print payloads as JSON lines.
    Decode(DecodeArgs),
    /// Write packets from the JSON lines that decode prints.
    Encode(EncodeArgs),
}

/// Arguments of `packet inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// File (binary or hexadecimal), - for standard input, or hexadecimal digits (hex:DIGITS).
    #[arg(value_name = "INPUT")]
    pub input: String,
    /// One JSON object a line.
    #[arg(long)]
    pub json: bool,
    /// Likeliest tokens, or first values of an embedding, to show.
    #[arg(long, default_value_t = 5, value_name = "N")]
    pub top: usize,
}

/// Arguments of `packet decode`.
#[derive(Debug, Args)]
pub struct DecodeArgs {
    /// File (binary or hexadecimal), - for standard input, or hexadecimal digits (hex:DIGITS).
    #[arg(value_name = "INPUT")]
    pub input: String,
}

/// Arguments of `packet encode`.
#[derive(Debug, Args)]
pub struct EncodeArgs {
    /// File of JSON lines, or - for standard input.
    #[arg(value_name = "INPUT")]
    pub input: String,
    /// Encoding of every packet [default: the line's own, else f32].
    #[arg(long, value_parser = encoding, value_name = "f32|f16|bf16|compact")]
    pub encoding: Option<Encoding>,
    /// Write hexadecimal digits, a line for each packet.
    #[arg(long)]
    pub hex: bool,
    /// Write to FILE and not to standard output.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

fn encoding(text: &str) -> Result<Encoding, String> {
    text.parse()
        .map_err(|_| "give f32, f16, bf16 or compact".to_owned())
}

/// Standard input and what standard output is: what tests replace.
struct Streams<'a> {
    input: &'a mut dyn Read,
    terminal: bool,
}

pub(crate) fn command(
    args: &PacketArgs,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let mut streams = Streams {
        input: &mut std::io::stdin(),
        terminal: std::io::stdout().is_terminal(),
    };
    run(args, &mut streams, out, err)
}

fn run(
    args: &PacketArgs,
    streams: &mut Streams,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    match &args.command {
        PacketCommand::Inspect(args) => {
            let source = Source::payloads(&args.input, streams.input)?;
            source.walk(&mut |place, payload| {
                if args.json {
                    let line = Summary::new(place, payload, args.top);
                    writeln!(out, "{}", to_json(&line)?)?;
                } else {
                    show(place, payload, args.top, out)?;
                }
                Ok(())
            })?;
        }
        PacketCommand::Decode(args) => {
            let source = Source::payloads(&args.input, streams.input)?;
            source.walk(&mut |_, payload| {
                if let Some(line) = Line::new(payload) {
                    writeln!(out, "{}", to_json(&line)?)?;
                }
                Ok(())
            })?;
        }
        PacketCommand::Encode(args) => encode(args, streams, out, err)?,
    }
    Ok(ExitStatus::Success)
}

fn to_json<T: Serialize>(line: &T) -> Result<String, CliError> {
    serde_json::to_string(line).map_err(|error| CliError::Failed(error.to_string()))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // A string takes anything.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes, and what to call the place they came from.
struct Source {
    name: String,
    bytes: Vec<u8>,
}

impl Source {
    /// A file, or `-` for standard input.
    fn read(name: &str, input: &mut dyn Read) -> Result<Self, CliError> {
        let mut bytes = Vec::new();
        let (name, result) = if name == "-" {
            let result = input.read_to_end(&mut bytes).map(|_| bytes);
            ("<stdin>".to_owned(), result)
        } else {
            (name.to_owned(), std::fs::read(Path::new(name)))
        };
        match result {
            Ok(bytes) => Ok(Self { name, bytes }),
            Err(error) => Err(CliError::Usage(format!("{name}: cannot read: {error}"))),
        }
    }

    /// Payloads: a file or standard input, binary or hexadecimal, or digits given in place.
    fn payloads(argument: &str, input: &mut dyn Read) -> Result<Self, CliError> {
        let digits = argument.strip_prefix("hex:");
        let bare = || {
            !argument.is_empty()
                && argument.bytes().all(|byte| byte.is_ascii_hexdigit())
                && !Path::new(argument).exists()
        };
        let source = if let Some(digits) = digits {
            Self::unhex("hex".to_owned(), digits)?
        } else if bare() {
            Self::unhex("hex".to_owned(), argument)?
        } else {
            let source = Self::read(argument, input)?;
            match std::str::from_utf8(&source.bytes) {
                Ok(text) if kind_of(&source.bytes).is_none() && is_hex(text) => {
                    Self::unhex(source.name, text)?
                }
                _ => source,
            }
        };
        if source.bytes.is_empty() {
            return Err(CliError::Usage(format!("{}: no bytes", source.name)));
        }
        Ok(source)
    }

    /// White space is skipped, and so is what follows a `#` on its line.
    fn unhex(name: String, text: &str) -> Result<Self, CliError> {
        let mut bytes = Vec::with_capacity(text.len() / 2);
        let mut high = None;
        for (line, digits) in text.lines().enumerate() {
            let digits = digits.split('#').next().unwrap_or_default();
            for (column, c) in digits.chars().enumerate() {
                if c.is_whitespace() {
                    continue;
                }
                let Some(digit) = c.to_digit(16) else {
                    return Err(CliError::Usage(format!(
                        "{name}:{}: {c:?} at column {} is no hexadecimal digit",
                        line + 1,
                        column + 1
                    )));
                };
                match high.take() {
                    None => high = Some(digit),
                    Some(high) => bytes.push((high << 4 | digit) as u8),
                }
            }
        }
        if high.is_some() {
            return Err(CliError::Usage(format!(
                "{name}: an odd number of hexadecimal digits, {}",
                2 * bytes.len() + 1
            )));
        }
        Ok(Self { name, bytes })
    }

    /// Calls `visit` on each payload in turn, and on the packets of a transcript after it.
    fn walk(
        &self,
        visit: &mut dyn FnMut(Place, &Payload) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let fail = |error: String| CliError::Usage(format!("{}: {error}", self.name));
        let mut offset = 0;
        while offset < self.bytes.len() {
            let rest = &self.bytes[offset..];
            let moved = |error: dlmom_packet::DecodeError| fail(error.shifted(offset).to_string());
            let (payload, bytes) = match kind_of(rest) {
                None if rest.len() >= 4 => {
                    return Err(fail(format!(
                        "offset {offset}: no packet, dense belief, embedding or transcript, \
                         starts with {:02x?}",
                        &rest[..4]
                    )));
                }
                // Too few bytes to tell fail as a packet cut short.
                Some(Kind::Packet) | None => {
                    let (decoded, bytes) = decode(rest).map_err(moved)?;
                    (Payload::Packet(decoded), bytes)
                }
                Some(Kind::Dense) => {
                    let (decoded, bytes) = decode_dense(rest).map_err(moved)?;
                    (Payload::Dense(decoded), bytes)
                }
                Some(Kind::Embed) => {
                    let (decoded, bytes) = decode_embed(rest).map_err(moved)?;
                    (Payload::Embed(decoded), bytes)
                }
                Some(Kind::Transcript) => {
                    let (transcript, bytes) = Transcript::decode(rest).map_err(|error| {
                        fail(match error {
                            TranscriptError::Packet { index, source } => format!(
                                "packet {index} of the transcript at {offset}: {}",
                                source.shifted(offset)
                            ),
                            other => format!("offset {offset}: {other}"),
                        })
                    })?;
                    (Payload::Transcript(transcript), bytes)
                }
            };
            let place = Place {
                offset,
                bytes,
                within: None,
            };
            visit(place, &payload)?;
            if matches!(payload, Payload::Transcript(_)) {
                let mut at = offset + TRANSCRIPT_HEADER_LEN;
                while at < offset + bytes {
                    let (decoded, bytes) = decode(&self.bytes[at..])
                        .map_err(|error| fail(error.shifted(at).to_string()))?;
                    let place = Place {
                        offset: at,
                        bytes,
                        within: Some(offset),
                    };
                    visit(place, &Payload::Packet(decoded))?;
                    at += bytes;
                }
            }
            offset += bytes;
        }
        Ok(())
    }
}

/// How many payloads of each kind a file holds, those that it does not hold left out.
pub(crate) fn census(path: &Path) -> Result<Vec<(Kind, usize)>, CliError> {
    let name = path.display().to_string();
    let source = Source::payloads(&name, &mut std::io::empty())?;
    let mut counts = Kind::ALL.map(|kind| (kind, 0));
    source.walk(&mut |place, payload| {
        for (kind, count) in &mut counts {
            if *kind == payload.kind() && place.within.is_none() {
                *count += 1;
            }
        }
        Ok(())
    })?;
    Ok(counts.into_iter().filter(|(_, count)| *count > 0).collect())
}

/// Nothing but hexadecimal digits, white space and comments.
fn is_hex(text: &str) -> bool {
    text.lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(str::chars)
        .all(|c| c.is_whitespace() || c.is_ascii_hexdigit())
}

/// Where a payload is.
#[derive(Clone, Copy)]
struct Place {
    offset: usize,
    bytes: usize,
    /// Offset of the transcript that holds it.
    within: Option<usize>,
}

enum Payload {
    Packet(Decoded),
    Dense(DecodedDense),
    Embed(DecodedEmbed),
    Transcript(Transcript),
}

impl Payload {
    fn kind(&self) -> Kind {
        match self {
            Self::Packet(_) => Kind::Packet,
            Self::Dense(_) => Kind::Dense,
            Self::Embed(_) => Kind::Embed,
            Self::Transcript(_) => Kind::Transcript,
        }
    }
}

/// In nats.
fn entropy(probs: &[f32]) -> f64 {
    let terms = probs.iter().filter(|p| **p > 0.0).map(|p| {
        let p = f64::from(*p);
        -p * p.ln()
    });
    // A sum of no terms is a negative zero.
    terms.sum::<f64>() + 0.0
}

/// A payload in a line of `inspect --json`.
#[derive(Default, Serialize)]
struct Summary {
    offset: usize,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    transcript: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'static str>,
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    vocab: Option<usize>,
    fingerprint: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    step: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    packets: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    k: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mass: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entropy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top: Option<Vec<(u32, f32)>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    width: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    norm: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first: Option<Vec<f32>>,
}

impl Summary {
    fn new(place: Place, payload: &Payload, top: usize) -> Self {
        let common = Self {
            offset: place.offset,
            kind: payload.kind().as_str(),
            transcript: place.within,
            bytes: place.bytes,
            ..Self::default()
        };
        let name = |fingerprint: u64| format!("{fingerprint:016x}");
        match payload {
            Payload::Packet(decoded) => Self {
                encoding: Some(decoded.encoding.as_str()),
                vocab: Some(decoded.packet.vocab() as usize),
                fingerprint: name(decoded.meta.fingerprint),
                step: Some(decoded.meta.step),
                k: Some(decoded.packet.k()),
                mass: Some(decoded.packet.mass()),
                entropy: Some(entropy(decoded.packet.probs())),
                top: Some(decoded.packet.iter().take(top).collect()),
                ..common
            },
            Payload::Dense(decoded) => {
                let mut entries: Vec<(u32, f32)> = (0..).zip(decoded.probs.clone()).collect();
                // The order of packets.
                entries.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                entries.truncate(top);
                Self {
                    encoding: Some(decoded.scalar.as_str()),
                    vocab: Some(decoded.probs.len()),
                    fingerprint: name(decoded.meta.fingerprint),
                    step: Some(decoded.meta.step),
                    k: Some(decoded.probs.len()),
                    mass: Some(1.0),
                    entropy: Some(entropy(&decoded.probs)),
                    top: Some(entries),
                    ..common
                }
            }
            Payload::Embed(decoded) => {
                let squares = decoded.values.iter().map(|v| f64::from(*v).powi(2));
                Self {
                    encoding: Some(decoded.scalar.as_str()),
                    fingerprint: name(decoded.meta.fingerprint),
                    step: Some(decoded.meta.step),
                    width: Some(decoded.values.len()),
                    norm: Some(squares.sum::<f64>().sqrt()),
                    first: Some(decoded.values.iter().copied().take(top).collect()),
                    ..common
                }
            }
            Payload::Transcript(transcript) => Self {
                vocab: Some(transcript.vocab() as usize),
                fingerprint: name(transcript.fingerprint()),
                packets: Some(transcript.len()),
                ..common
            },
        }
    }
}

fn show(place: Place, payload: &Payload, top: usize, out: &mut dyn Write) -> Result<(), CliError> {
    let summary = Summary::new(place, payload, top);
    write!(out, "offset {}: {}", summary.offset, summary.kind)?;
    if let Some(transcript) = summary.transcript {
        write!(out, " of the transcript at {transcript}")?;
    }
    if let Some(encoding) = summary.encoding {
        write!(out, ", {encoding}")?;
    }
    writeln!(out, ", {} bytes", summary.bytes)?;
    let mut row = |name: &str, value: String| writeln!(out, "  {name:<11} {value}");
    if let Some(vocab) = summary.vocab {
        row("vocab", vocab.to_string())?;
    }
    row("fingerprint", summary.fingerprint)?;
    if let Some(step) = summary.step {
        row("step", step.to_string())?;
    }
    if let Some(packets) = summary.packets {
        row("packets", packets.to_string())?;
    }
    if let Some(k) = summary.k {
        row("k", k.to_string())?;
    }
    if let Some(mass) = summary.mass {
        row("mass", mass.to_string())?;
    }
    if let Some(entropy) = summary.entropy {
        row("entropy", format!("{entropy:.4} nats"))?;
    }
    if let Some(top) = summary.top.filter(|top| !top.is_empty()) {
        let entries: Vec<String> = top.iter().map(|(id, p)| format!("{id} {p}")).collect();
        row("top", entries.join(", "))?;
    }
    if let Some(width) = summary.width {
        row("width", width.to_string())?;
    }
    if let Some(norm) = summary.norm {
        row("norm", format!("{norm:.4}"))?;
    }
    if let Some(first) = summary.first.filter(|first| !first.is_empty()) {
        let values: Vec<String> = first.iter().map(f32::to_string).collect();
        row("first", values.join(", "))?;
    }
    Ok(())
}

/// A payload in a line of `decode`. Floats are written as float64, which holds them exactly.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vocab: Option<usize>,
    fingerprint: String,
    step: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    k: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mass: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    probs: Option<Vec<f64>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    values: Option<Vec<f64>>,
    encoding: &'static str,
}

impl<'a> Line<'a> {
    /// None for a transcript, whose packets have lines of their own.
    fn new(payload: &'a Payload) -> Option<Self> {
        let exact = |values: &[f32]| Some(values.iter().copied().map(f64::from).collect());
        let base = |meta: Meta, encoding| Self {
            kind: None,
            vocab: None,
            fingerprint: format!("{:016x}", meta.fingerprint),
            step: meta.step,
            k: None,
            mass: None,
            ids: None,
            probs: None,
            values: None,
            encoding,
        };
        match payload {
            Payload::Packet(decoded) => Some(Self {
                vocab: Some(decoded.packet.vocab() as usize),
                k: Some(decoded.packet.k()),
                mass: Some(f64::from(decoded.packet.mass())),
                ids: Some(decoded.packet.ids()),
                probs: exact(decoded.packet.probs()),
                ..base(decoded.meta, decoded.encoding.as_str())
            }),
            Payload::Dense(decoded) => Some(Self {
                kind: Some(Kind::Dense.as_str()),
                vocab: Some(decoded.probs.len()),
                probs: exact(&decoded.probs),
                ..base(decoded.meta, decoded.scalar.as_str())
            }),
            Payload::Embed(decoded) => Some(Self {
                kind: Some(Kind::Embed.as_str()),
                values: exact(&decoded.values),
                ..base(decoded.meta, decoded.scalar.as_str())
            }),
            Payload::Transcript(_) => None,
        }
    }
}

fn encode(
    args: &EncodeArgs,
    streams: &mut Streams,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<(), CliError> {
    if args.out.is_none() && !args.hex && streams.terminal {
        return Err(CliError::Usage(
            "packets are binary: give --hex, --out FILE, or redirect standard output".into(),
        ));
    }
    let source = Source::read(&args.input, streams.input)?;
    let mut written = Vec::new();
    let mut packets = 0;
    for (index, text) in source.bytes.split(|byte| *byte == b'\n').enumerate() {
        let fail =
            |error: String| CliError::Usage(format!("{}:{}: {error}", source.name, index + 1));
        let text = std::str::from_utf8(text).map_err(|_| fail("not UTF-8 text".into()))?;
        if text.trim().is_empty() {
            continue;
        }
        let (packet, meta, own) = parse(text).map_err(fail)?;
        let encoding = args.encoding.or(own).unwrap_or_default();
        let mut bytes = Vec::new();
        encode_into(&packet, meta, encoding, &mut bytes)
            .map_err(|error| CliError::Failed(error.to_string()))?;
        if args.hex {
            written.extend_from_slice(hex(&bytes).as_bytes());
            written.push(b'\n');
        } else {
            written.extend_from_slice(&bytes);
        }
        packets += 1;
    }
    if packets == 0 {
        return Err(CliError::Usage(format!("{}: no packets", source.name)));
    }
    if let Some(path) = &args.out {
        std::fs::write(path, &written)
            .map_err(|error| CliError::Failed(format!("{}: {error}", path.display())))?;
        let (path, bytes) = (path.display(), written.len());
        writeln!(err, "{path}: {packets} packets, {bytes} bytes")?;
    } else {
        out.write_all(&written)?;
    }
    Ok(())
}

/// One JSON line; an error names the field.
fn parse(text: &str) -> Result<(BeliefPacket, Meta, Option<Encoding>), String> {
    let value: Value = serde_json::from_str(text).map_err(|error| {
        let message = error.to_string();
        let message = message.split(" at line").next().unwrap_or_default();
        format!("malformed JSON at column {}: {message}", error.column())
    })?;
    let Value::Object(mut fields) = value else {
        return Err(format!(
            "expected a JSON object, found {}",
            describe(&value)
        ));
    };
    if let Some(kind) = fields.remove("kind")
        && kind != Kind::Packet.as_str()
    {
        return Err(format!(
            "field `kind` must be \"packet\", found {}",
            describe(&kind)
        ));
    }
    let vocab = integer(&take(&mut fields, "vocab")?, "vocab")?;
    let fingerprint = match take(&mut fields, "fingerprint")? {
        Value::String(digits)
            if digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit()) =>
        {
            u64::from_str_radix(&digits, 16).unwrap_or_default()
        }
        found => {
            return Err(must(
                "fingerprint",
                "a string of 16 hexadecimal digits",
                &found,
            ));
        }
    };
    let step = integer(&take(&mut fields, "step")?, "step")?;
    let mass = number(&take(&mut fields, "mass")?, "mass")?;
    let ids = list(&take(&mut fields, "ids")?, "ids", integer)?;
    let probs = list(&take(&mut fields, "probs")?, "probs", number)?;
    if let Some(found) = fields.remove("k") {
        let k = integer(&found, "k")?;
        if k as usize != ids.len() {
            return Err(format!("field `k` is {k}, but there are {} ids", ids.len()));
        }
    }
    let own = match fields.remove("encoding") {
        None => None,
        Some(Value::String(name)) => Some(
            encoding(&name)
                .map_err(|expected| format!("field `encoding` is {name:?}; {expected}"))?,
        ),
        Some(found) => return Err(must("encoding", "a string", &found)),
    };
    if let Some(name) = fields.keys().next() {
        return Err(format!("unknown field `{name}`"));
    }
    let packet = BeliefPacket::new(ids, probs, mass, vocab)
        .map_err(|error| format!("field `{}`: {error}", field_of(&error)))?;
    Ok((packet, Meta { fingerprint, step }, own))
}

fn take(fields: &mut Map<String, Value>, name: &str) -> Result<Value, String> {
    fields
        .remove(name)
        .ok_or_else(|| format!("field `{name}` is missing"))
}

fn must(name: &str, expected: &str, found: &Value) -> String {
    format!(
        "field `{name}` must be {expected}, found {}",
        describe(found)
    )
}

fn describe(value: &Value) -> String {
    match value {
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
        other => other.to_string(),
    }
}

fn integer(value: &Value, name: &str) -> Result<u32, String> {
    value
        .as_u64()
        .and_then(|number| u32::try_from(number).ok())
        .ok_or_else(|| must(name, "an integer below 2^32", value))
}

fn number(value: &Value, name: &str) -> Result<f32, String> {
    value
        .as_f64()
        .map(|number| number as f32)
        .ok_or_else(|| must(name, "a number", value))
}

fn list<T>(
    value: &Value,
    name: &str,
    item: impl Fn(&Value, &str) -> Result<T, String>,
) -> Result<Vec<T>, String> {
    let Value::Array(values) = value else {
        return Err(must(name, "an array", value));
    };
    values
        .iter()
        .enumerate()
        .map(|(index, value)| item(value, &format!("{name}[{index}]")))
        .collect()
}

fn field_of(error: &PacketError) -> &'static str {
    match error {
        PacketError::VocabOverLimit { .. } => "vocab",
        PacketError::MassOutOfRange { .. } => "mass",
        PacketError::LengthMismatch { .. }
        | PacketError::ProbNotFinite { .. }
        | PacketError::ProbNegative { .. }
        | PacketError::SumOff { .. } => "probs",
        _ => "ids",
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use dlmom_packet::{Scalar, encode_dense_into, encode_embed_into};

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: PacketArgs,
    }

    struct Answer {
        out: Vec<u8>,
        err: String,
        result: Result<ExitStatus, CliError>,
    }

    impl Answer {
        fn text(&self) -> &str {
            std::str::from_utf8(&self.out).unwrap()
        }

        fn error(&self) -> String {
            let error = self.result.as_ref().unwrap_err();
            assert_eq!(error.status(), ExitStatus::Usage);
            error.to_string()
        }
    }

    fn packet(argv: &[&str], mut input: &[u8], terminal: bool) -> Answer {
        let argv = std::iter::once("packet").chain(argv.iter().copied());
        let cli = Cli::try_parse_from(argv).unwrap();
        let mut streams = Streams {
            input: &mut input,
            terminal,
        };
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let result = run(&cli.args, &mut streams, &mut out, &mut err);
        let err = String::from_utf8(err).unwrap();
        Answer { out, err, result }
    }

    const META: Meta = Meta {
        fingerprint: 0x0123_4567_89ab_cdef,
        step: 4,
    };

    fn example() -> BeliefPacket {
        BeliefPacket::new(vec![7, 2, 5], vec![0.5, 0.25, 0.25], 0.875, 10).unwrap()
    }

    fn example_bytes(encoding: Encoding) -> Vec<u8> {
        dlmom_packet::encode(&example(), META, encoding).unwrap()
    }

    /// One of each payload, and their lengths.
    fn stream() -> (Vec<u8>, [usize; 4]) {
        let mut bytes = example_bytes(Encoding::Compact);
        let packet = bytes.len();
        let dense =
            encode_dense_into(&[0.0, 0.25, 0.5, 0.25], META, Scalar::F16, &mut bytes).unwrap();
        let embed = encode_embed_into(&[3.0, -4.0], Scalar::Bf16, META, &mut bytes).unwrap();
        let mut transcript = Transcript::new(10, META.fingerprint).unwrap();
        transcript.push(4, example()).unwrap();
        transcript
            .push(6, BeliefPacket::one_hot(9, 10).unwrap())
            .unwrap();
        let transcript = transcript.encode_into(Encoding::F32, &mut bytes).unwrap();
        (bytes, [packet, dense, embed, transcript])
    }

    #[test]
    fn inspect_shows_every_payload() {
        let (bytes, _) = stream();
        let answer = packet(&["inspect", "-", "--top", "2"], &bytes, true);
        assert_eq!(answer.result.as_ref().unwrap(), &ExitStatus::Success);
        insta::assert_snapshot!(answer.text());
    }

    #[test]
    fn inspect_has_a_json_form() {
        let (bytes, _) = stream();
        let answer = packet(&["inspect", "-", "--top", "2", "--json"], &bytes, true);
        insta::assert_snapshot!(answer.text());
        for line in answer.text().lines() {
            let value: Value = serde_json::from_str(line).unwrap();
            assert!(value["offset"].is_u64() && value["kind"].is_string());
        }
    }

    #[test]
    fn input_may_be_hexadecimal() {
        let bytes = example_bytes(Encoding::F16);
        let digits = hex(&bytes);
        let wanted = packet(&["decode", "-"], &bytes, true);
        let with_prefix = format!("hex:{digits}");
        for argument in [&digits, &with_prefix, &digits.to_uppercase()] {
            let answer = packet(&["decode", argument.as_str()], b"", true);
            assert_eq!(answer.text(), wanted.text());
        }
        let spaced = format!(
            "# a packet\n{} # its magic\n {}\n",
            &digits[..8],
            &digits[8..]
        );
        let answer = packet(&["decode", "-"], spaced.as_bytes(), true);
        assert_eq!(answer.text(), wanted.text());
    }

    #[test]
    fn what_decode_prints_encode_takes_back() {
        let folder = tempfile::tempdir().unwrap();
        let probs = vec![0.1, 0.2, 0.7 - 1e-8];
        let thirds = BeliefPacket::new(vec![1, 9, 4], probs, 0.3, 10).unwrap();
        let mut bytes = Vec::new();
        for encoding in Encoding::ALL {
            encode_into(&example(), META, encoding, &mut bytes).unwrap();
        }
        encode_into(&thirds, META, Encoding::F32, &mut bytes).unwrap();
        encode_into(&thirds, META, Encoding::Compact, &mut bytes).unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        std::fs::write(&from, &bytes).unwrap();
        let lines = packet(&["decode", from.to_str().unwrap()], b"", true);
        assert_eq!(lines.text().lines().count(), 6);
        assert!(lines.text().starts_with(
            "{\"vocab\":10,\"fingerprint\":\"0123456789abcdef\",\"step\":4,\"k\":3,\
             \"mass\":0.875,\"ids\":[7,2,5],\"probs\":[0.5,0.25,0.25],\"encoding\":\"f32\"}\n"
        ));

        let answer = packet(&["encode", "-"], &lines.out, false);
        assert_eq!(answer.out, bytes);
        let answer = packet(
            &["encode", "-", "--out", to.to_str().unwrap()],
            &lines.out,
            true,
        );
        assert!(answer.result.is_ok() && answer.out.is_empty());
        assert!(
            answer
                .err
                .ends_with(&format!(": 6 packets, {} bytes\n", bytes.len()))
        );
        assert_eq!(std::fs::read(&to).unwrap(), bytes);
        let answer = packet(&["encode", "-", "--hex"], &lines.out, true);
        assert_eq!(answer.text().lines().count(), 6);
        assert_eq!(answer.text().replace('\n', ""), hex(&bytes));

        let answer = packet(&["encode", "-", "--encoding", "compact"], &lines.out, false);
        let one = example_bytes(Encoding::Compact);
        assert_eq!(answer.out[..one.len()], one);
        let first = lines.text().lines().next().unwrap();
        let plain = first
            .replace(",\"encoding\":\"f32\"", "")
            .replace("\"k\":3,", "");
        let answer = packet(&["encode", "-"], plain.as_bytes(), false);
        assert_eq!(answer.out, example_bytes(Encoding::F32));
    }

    #[test]
    fn a_file_cut_short_says_where_what_is_missing() {
        let one = example_bytes(Encoding::F32);
        let mut bytes = [one.as_slice(), &one].concat();
        bytes.truncate(one.len() + 50);
        let answer = packet(&["decode", "-"], &bytes, true);
        assert_eq!(answer.text().lines().count(), 1);
        assert_eq!(
            answer.error(),
            "<stdin>: offset 104: probabilities cut short, needs 12 bytes, 6 left"
        );
        let (bytes, [packet_len, dense, embed, _]) = stream();
        let start = packet_len + dense + embed;
        let cut = |len: usize| packet(&["inspect", "-"], &bytes[..len], true).error();
        insta::assert_snapshot!(
            [
                cut(3),
                cut(packet_len + 34),
                cut(packet_len + dense + 25),
                cut(start + 27),
                cut(start + TRANSCRIPT_HEADER_LEN + 40),
                cut(bytes.len() - 1),
            ]
            .join("\n")
        );
    }

    #[test]
    fn bad_bytes_are_one_line() {
        let mut flipped = example_bytes(Encoding::F32);
        flipped[40] ^= 1;
        let cases: Vec<(&[&str], Vec<u8>)> = vec![
            (&["inspect", "-"], flipped),
            (&["inspect", "-"], b"GET / HTTP/1.1".to_vec()),
            (&["inspect", "-"], Vec::new()),
            (&["inspect", "-"], b"444c4".to_vec()),
            (&["inspect", "hex:44 4z"], Vec::new()),
            (&["inspect", "hex:"], Vec::new()),
            (&["decode", "444c4250"], Vec::new()),
        ];
        let report: Vec<String> = cases
            .iter()
            .map(|(argv, input)| packet(argv, input, true).error())
            .collect();
        insta::assert_snapshot!(report.join("\n"));
        let missing = packet(&["inspect", "no/such.bin"], b"", true).error();
        assert!(
            missing.starts_with("no/such.bin: cannot read: "),
            "{missing}"
        );
    }

    #[test]
    fn bad_lines_name_line_and_field() {
        let good = "{\"vocab\":10,\"fingerprint\":\"0123456789abcdef\",\"step\":4,\"k\":3,\
                    \"mass\":0.875,\"ids\":[7,2,5],\"probs\":[0.5,0.25,0.25],\"encoding\":\"f32\"}";
        let report: Vec<String> = [
            ("\"vocab\":10,", ""),
            ("\"vocab\":10", "\"vocab\":-1"),
            ("\"vocab\":10", "\"vocab\":16777217"),
            ("\"vocab\":10", "\"vocab\":2"),
            ("0123456789abcdef", "0123"),
            ("\"step\":4", "\"step\":4294967296"),
            ("\"k\":3", "\"k\":4"),
            ("0.875", "\"0.875\""),
            ("0.875", "1.5"),
            ("[7,2,5]", "7"),
            ("[7,2,5]", "[7,2,2]"),
            ("[7,2,5]", "[7,2,10]"),
            ("[7,2,5]", "[7,2.5,5]"),
            ("0.25,0.25", "0.25,null"),
            ("0.25,0.25", "0.25,1e99"),
            ("0.25,0.25", "-0.25,0.75"),
            ("0.25,0.25", "0.25,0.24"),
            ("0.25,0.25", "0.25"),
            ("\"f32\"", "\"f64\""),
            ("\"f32\"", "4"),
            ("\"f32\"", "\"f32\",\"extra\":1"),
            ("{", "{\"kind\":\"dense\","),
            ("{", "["),
            (good, "[1]"),
        ]
        .iter()
        .map(|(from, to)| {
            assert!(good.contains(from), "{from}");
            let input = format!("{good}\n\n{}\n", good.replacen(from, to, 1));
            let answer = packet(&["encode", "-", "--hex"], input.as_bytes(), true);
            // Nothing is written unless all of it is.
            assert!(answer.out.is_empty());
            answer.error()
        })
        .collect();
        insta::assert_snapshot!(report.join("\n"));
        let empty = packet(&["encode", "-", "--hex"], b"\n\n", true).error();
        assert_eq!(empty, "<stdin>: no packets");
        let binary = packet(&["encode", "-"], good.as_bytes(), true).error();
        assert!(binary.contains("--hex"), "{binary}");
    }
}
