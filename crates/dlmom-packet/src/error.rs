//! One variant per way a packet, its bytes or a transcript can be wrong.

use std::fmt;

use crate::compact::{MAX_RICE, MAX_SCALE};
use crate::embed::MAX_EMBED;
use crate::packet::{MAX_K, MAX_VOCAB};
use crate::scalar::Scalar;
use crate::transcript::MAX_TRANSCRIPT_PACKETS;

/// Why values do not form a [`BeliefPacket`](crate::BeliefPacket), or a payload could not be encoded.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketError {
    /// The two parallel arrays differ in length.
    #[error("{ids} ids but {probs} probabilities")]
    LengthMismatch {
        /// Number of ids given.
        ids: usize,
        /// Number of probabilities given.
        probs: usize,
    },
    /// A packet, and a dense belief, holds at least one entry.
    #[error("a packet needs at least one entry")]
    KZero,
    /// More entries than the format allows.
    #[error("{k} entries, the limit is {MAX_K}")]
    KOverLimit {
        /// Number of entries given.
        k: usize,
    },
    /// A vocabulary larger than the format allows.
    #[error("vocabulary of {vocab}, the limit is {MAX_VOCAB}")]
    VocabOverLimit {
        /// Vocabulary size given.
        vocab: u32,
    },
    /// More entries than the vocabulary has tokens.
    #[error("{k} entries from a vocabulary of {vocab}")]
    KOverVocab {
        /// Number of entries given.
        k: usize,
        /// Vocabulary size given.
        vocab: u32,
    },
    /// An id that the vocabulary does not have.
    #[error("entry {index}: id {id} is outside the vocabulary of {vocab}")]
    IdOutOfRange {
        /// Position in the arrays given.
        index: usize,
        /// The id.
        id: u32,
        /// Vocabulary size given.
        vocab: u32,
    },
    /// The same id twice.
    #[error("entries {first} and {second} have the same id {id}")]
    DuplicateId {
        /// Position of the first occurrence.
        first: usize,
        /// Position of the next occurrence.
        second: usize,
        /// The id.
        id: u32,
    },
    /// A NaN or infinite probability.
    #[error("entry {index} (id {id}): probability {prob} is not finite")]
    ProbNotFinite {
        /// Position in the arrays given.
        index: usize,
        /// The id beside it.
        id: u32,
        /// The value.
        prob: f32,
    },
    /// A probability below zero.
    #[error("entry {index} (id {id}): probability {prob} is negative")]
    ProbNegative {
        /// Position in the arrays given.
        index: usize,
        /// The id beside it.
        id: u32,
        /// The value.
        prob: f32,
    },
    /// The probabilities do not sum to 1.
    #[error("probabilities sum to {sum}, which is not 1 within {tolerance}")]
    SumOff {
        /// Their sum in f64.
        sum: f64,
        /// The deviation allowed.
        tolerance: f64,
    },
    /// The top-k mass is not in (0, 1].
    #[error("mass {mass} is not in (0, 1]")]
    MassOutOfRange {
        /// The value.
        mass: f32,
    },
    /// An embedding without values.
    #[error("an embedding needs at least one value")]
    WidthZero,
    /// An embedding wider than the format allows.
    #[error("{width} values, the limit is {MAX_EMBED}")]
    WidthOverLimit {
        /// Number of values given.
        width: usize,
    },
    /// A NaN or infinite value in an embedding.
    #[error("value {index} is {value}, which is not finite")]
    ValueNotFinite {
        /// Position of the value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A value of an embedding that the type on the wire would round to infinity.
    #[error("value {index} is {value}, too large for {scalar}")]
    ValueOverflow {
        /// Position of the value.
        index: usize,
        /// The value.
        value: f32,
        /// The type on the wire.
        scalar: Scalar,
    },
    /// The output buffer could not grow; it is left as it was.
    #[error("no memory for {bytes} more bytes of output")]
    OutOfMemory {
        /// Bytes that were wanted.
        bytes: usize,
    },
}

/// A part of an encoded payload, for [`DecodeError::Truncated`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// The fixed header.
    Header,
    /// Scale and Rice parameter of the compact encoding.
    Params,
    /// The token ids.
    Ids,
    /// The probabilities.
    Probs,
    /// The values of an embedding.
    Values,
    /// The CRC-32.
    Checksum,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::Params => "compact parameters",
            Self::Ids => "ids",
            Self::Probs => "probabilities",
            Self::Values => "values",
            Self::Checksum => "checksum",
        })
    }
}

/// Why bytes are not an encoded packet, dense belief or embedding.
///
/// `offset` is the byte position of the offending field, counted from the start of the slice given to the decoding
/// function, of the stream given to [`PacketReader`](crate::PacketReader), or of the transcript.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes end inside a part.
    #[error("offset {offset}: {part} cut short, needs {needed} bytes, {available} left")]
    Truncated {
        /// Where that part starts.
        offset: usize,
        /// The part that is incomplete.
        part: Part,
        /// Its length in bytes.
        needed: usize,
        /// Bytes left for it.
        available: usize,
    },
    /// These bytes are something else.
    #[error("offset {offset}: not {wanted}, starts with {found:02x?}")]
    BadMagic {
        /// Where the payload should start.
        offset: usize,
        /// What was to be read.
        wanted: &'static str,
        /// The four bytes found.
        found: [u8; 4],
    },
    /// A format version this crate does not know.
    #[error("offset {offset}: format version {version}, this decoder reads 1")]
    UnsupportedVersion {
        /// Where the version is.
        offset: usize,
        /// Its value.
        version: u8,
    },
    /// A flag bit that version 1 does not define.
    #[error("offset {offset}: unknown flags {flags:#04x}")]
    UnknownFlags {
        /// Where the flags are.
        offset: usize,
        /// Their value.
        flags: u8,
    },
    /// A probability encoding that this crate does not know.
    #[error("offset {offset}: unknown encoding {tag}")]
    UnknownEncoding {
        /// Where the tag is.
        offset: usize,
        /// Its value.
        tag: u8,
    },
    /// A dense belief where a packet was to be read, or a packet where a dense belief was.
    #[error("offset {offset}: not {wanted}, encoding {tag} is of the other kind")]
    WrongKind {
        /// Where the tag is.
        offset: usize,
        /// What was to be read.
        wanted: &'static str,
        /// The tag's value.
        tag: u8,
    },
    /// A byte that must be zero is not.
    #[error("offset {offset}: reserved byte is {value:#04x}, must be zero")]
    ReservedNotZero {
        /// Where the byte is.
        offset: usize,
        /// Its value.
        value: u8,
    },
    /// A vocabulary larger than the format allows.
    #[error("offset {offset}: vocabulary of {vocab}, the limit is {MAX_VOCAB}")]
    VocabOverLimit {
        /// Where the vocabulary size is.
        offset: usize,
        /// Its value.
        vocab: u32,
    },
    /// A packet without entries.
    #[error("offset {offset}: k is zero")]
    KZero {
        /// Where k is.
        offset: usize,
    },
    /// More entries than the format allows.
    #[error("offset {offset}: k is {k}, the limit is {MAX_K}")]
    KOverLimit {
        /// Where k is.
        offset: usize,
        /// Its value.
        k: u32,
    },
    /// More entries than the vocabulary has tokens.
    #[error("offset {offset}: k is {k} with a vocabulary of {vocab}")]
    KOverVocab {
        /// Where k is.
        offset: usize,
        /// Its value.
        k: u32,
        /// The vocabulary size.
        vocab: u32,
    },
    /// A dense belief whose count is not the size of its vocabulary.
    #[error("offset {offset}: k is {k}, a dense belief over {vocab} tokens has as many entries")]
    KNotVocab {
        /// Where k is.
        offset: usize,
        /// Its value.
        k: u32,
        /// The vocabulary size.
        vocab: u32,
    },
    /// An embedding without values.
    #[error("offset {offset}: width is zero")]
    WidthZero {
        /// Where the width is.
        offset: usize,
    },
    /// An embedding wider than the format allows.
    #[error("offset {offset}: width is {width}, the limit is {MAX_EMBED}")]
    WidthOverLimit {
        /// Where the width is.
        offset: usize,
        /// Its value.
        width: u32,
    },
    /// A Rice parameter that no ids ask for.
    #[error("offset {offset}: Rice parameter {rice}, the limit is {MAX_RICE}")]
    RiceOverLimit {
        /// Where the parameter is.
        offset: usize,
        /// Its value.
        rice: u8,
    },
    /// The quotients of the gaps sum to more than ids of this vocabulary can reach.
    #[error("offset {offset}: more than {limit} zero bits in the quotients of the ids")]
    IdsOverrun {
        /// Where the ids start.
        offset: usize,
        /// The most zero bits allowed.
        limit: usize,
    },
    /// The CRC-32 does not match the bytes before it.
    #[error("offset {offset}: checksum {stored:#010x}, the bytes give {computed:#010x}")]
    Checksum {
        /// Where the checksum is.
        offset: usize,
        /// The value read.
        stored: u32,
        /// The value computed.
        computed: u32,
    },
    /// The top-k mass is not in (0, 1].
    #[error("offset {offset}: mass {mass} is not in (0, 1]")]
    MassOutOfRange {
        /// Where the mass is.
        offset: usize,
        /// Its value.
        mass: f32,
    },
    /// The mass of a dense belief is not 1.
    #[error("offset {offset}: mass {mass}, a dense belief has 1")]
    MassNotOne {
        /// Where the mass is.
        offset: usize,
        /// Its value.
        mass: f32,
    },
    /// An id that the vocabulary does not have.
    #[error("offset {offset}: entry {index}: id {id} is outside the vocabulary of {vocab}")]
    IdOutOfRange {
        /// Where the id is; in the compact encoding, where the ids start.
        offset: usize,
        /// Which entry, in the order of the ids on the wire.
        index: usize,
        /// The id.
        id: u32,
        /// The vocabulary size.
        vocab: u32,
    },
    /// The same id twice.
    #[error("offset {offset}: entry {second} repeats id {id} of entry {first}")]
    DuplicateId {
        /// Where the second occurrence is.
        offset: usize,
        /// The first entry with this id.
        first: usize,
        /// The next entry with this id.
        second: usize,
        /// The id.
        id: u32,
    },
    /// A bit behind the last id is set.
    #[error("offset {offset}: bits behind the last id are set, the byte is {value:#04x}")]
    PaddingNotZero {
        /// Where the byte is.
        offset: usize,
        /// Its value.
        value: u8,
    },
    /// Another Rice parameter, or a smaller one, writes these ids as short.
    #[error(
        "offset {offset}: Rice parameter {rice} is not the least that writes these ids shortest"
    )]
    RiceNotCanonical {
        /// Where the parameter is.
        offset: usize,
        /// Its value.
        rice: u8,
    },
    /// A scale finer than the format has.
    #[error("offset {offset}: scale {scale}, the limit is {MAX_SCALE}")]
    ScaleOverLimit {
        /// Where the scale is.
        offset: usize,
        /// Its value.
        scale: u8,
    },
    /// No entry has code 0, the largest probability.
    #[error("offset {offset}: no probability has code 0")]
    TopMissing {
        /// Where the codes start.
        offset: usize,
    },
    /// A finer scale has room for these codes.
    #[error("offset {offset}: scale {scale} is coarser than these codes need")]
    ScaleNotCanonical {
        /// Where the scale is.
        offset: usize,
        /// Its value.
        scale: u8,
    },
    /// A NaN or infinite probability.
    #[error("offset {offset}: entry {index}: probability {prob} is not finite")]
    ProbNotFinite {
        /// Where the probability is.
        offset: usize,
        /// Which entry.
        index: usize,
        /// Its value.
        prob: f32,
    },
    /// A probability with its sign bit set, negative zero included.
    #[error("offset {offset}: entry {index}: probability {prob} is negative")]
    ProbNegative {
        /// Where the probability is.
        offset: usize,
        /// Which entry.
        index: usize,
        /// Its value.
        prob: f32,
    },
    /// A probability above 1.
    #[error("offset {offset}: entry {index}: probability {prob} is above 1")]
    ProbAboveOne {
        /// Where the probability is.
        offset: usize,
        /// Which entry.
        index: usize,
        /// Its value.
        prob: f32,
    },
    /// Entries are not by probability descending, then id ascending.
    #[error(
        "offset {offset}: entry {index} (id {id}, probability {prob}) must come before the entry \
         in front of it"
    )]
    WrongOrder {
        /// Where the id of the entry is.
        offset: usize,
        /// Which entry.
        index: usize,
        /// Its id.
        id: u32,
        /// Its probability.
        prob: f32,
    },
    /// The probabilities do not sum to 1 within what the encoding's rounding explains.
    #[error("offset {offset}: probabilities sum to {sum}, which is not 1 within {tolerance}")]
    SumOff {
        /// Where the probabilities start.
        offset: usize,
        /// Their sum in f64.
        sum: f64,
        /// The deviation allowed.
        tolerance: f64,
    },
    /// A NaN or infinite value in an embedding.
    #[error("offset {offset}: value {index} is {value}, which is not finite")]
    ValueNotFinite {
        /// Where the value is.
        offset: usize,
        /// Its position.
        index: usize,
        /// It.
        value: f32,
    },
    /// Bytes after the payload where there must be none.
    #[error("offset {offset}: the payload ends here, {count} more byte(s) follow")]
    TrailingBytes {
        /// Where the payload ends.
        offset: usize,
        /// Bytes left over.
        count: usize,
    },
}

/// The place of `offset` in a [`DecodeError`], shared or exclusive.
macro_rules! offset_in {
    ($error:expr) => {
        match $error {
            Self::Truncated { offset, .. }
            | Self::BadMagic { offset, .. }
            | Self::UnsupportedVersion { offset, .. }
            | Self::UnknownFlags { offset, .. }
            | Self::UnknownEncoding { offset, .. }
            | Self::WrongKind { offset, .. }
            | Self::ReservedNotZero { offset, .. }
            | Self::VocabOverLimit { offset, .. }
            | Self::KZero { offset, .. }
            | Self::KOverLimit { offset, .. }
            | Self::KOverVocab { offset, .. }
            | Self::KNotVocab { offset, .. }
            | Self::WidthZero { offset, .. }
            | Self::WidthOverLimit { offset, .. }
            | Self::RiceOverLimit { offset, .. }
            | Self::IdsOverrun { offset, .. }
            | Self::Checksum { offset, .. }
            | Self::MassOutOfRange { offset, .. }
            | Self::MassNotOne { offset, .. }
            | Self::IdOutOfRange { offset, .. }
            | Self::DuplicateId { offset, .. }
            | Self::PaddingNotZero { offset, .. }
            | Self::RiceNotCanonical { offset, .. }
            | Self::ScaleOverLimit { offset, .. }
            | Self::TopMissing { offset, .. }
            | Self::ScaleNotCanonical { offset, .. }
            | Self::ProbNotFinite { offset, .. }
            | Self::ProbNegative { offset, .. }
            | Self::ProbAboveOne { offset, .. }
            | Self::WrongOrder { offset, .. }
            | Self::SumOff { offset, .. }
            | Self::ValueNotFinite { offset, .. }
            | Self::TrailingBytes { offset, .. } => offset,
        }
    };
}

impl DecodeError {
    /// The stable name of this kind of error, as listed in the format specification.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Truncated { part, .. } => match part {
                Part::Header => "truncated_header",
                Part::Params => "truncated_params",
                Part::Ids => "truncated_ids",
                Part::Probs => "truncated_probs",
                Part::Values => "truncated_values",
                Part::Checksum => "truncated_checksum",
            },
            Self::BadMagic { .. } => "bad_magic",
            Self::UnsupportedVersion { .. } => "unsupported_version",
            Self::UnknownFlags { .. } => "unknown_flags",
            Self::UnknownEncoding { .. } => "unknown_encoding",
            Self::WrongKind { .. } => "wrong_kind",
            Self::ReservedNotZero { .. } => "reserved_not_zero",
            Self::VocabOverLimit { .. } => "vocab_over_limit",
            Self::KZero { .. } => "k_zero",
            Self::KOverLimit { .. } => "k_over_limit",
            Self::KOverVocab { .. } => "k_over_vocab",
            Self::KNotVocab { .. } => "k_not_vocab",
            Self::WidthZero { .. } => "width_zero",
            Self::WidthOverLimit { .. } => "width_over_limit",
            Self::RiceOverLimit { .. } => "rice_over_limit",
            Self::IdsOverrun { .. } => "ids_overrun",
            Self::Checksum { .. } => "checksum",
            Self::MassOutOfRange { .. } => "mass_out_of_range",
            Self::MassNotOne { .. } => "mass_not_one",
            Self::IdOutOfRange { .. } => "id_out_of_range",
            Self::DuplicateId { .. } => "duplicate_id",
            Self::PaddingNotZero { .. } => "padding_not_zero",
            Self::RiceNotCanonical { .. } => "rice_not_canonical",
            Self::ScaleOverLimit { .. } => "scale_over_limit",
            Self::TopMissing { .. } => "top_missing",
            Self::ScaleNotCanonical { .. } => "scale_not_canonical",
            Self::ProbNotFinite { .. } => "prob_not_finite",
            Self::ProbNegative { .. } => "prob_negative",
            Self::ProbAboveOne { .. } => "prob_above_one",
            Self::WrongOrder { .. } => "wrong_order",
            Self::SumOff { .. } => "sum_off",
            Self::ValueNotFinite { .. } => "value_not_finite",
            Self::TrailingBytes { .. } => "trailing_bytes",
        }
    }

    /// The byte position of the offending field.
    #[must_use]
    pub fn offset(&self) -> usize {
        *offset_in!(self)
    }

    /// The same error with its offset counted from `by` bytes further in front: how a payload's error becomes one of
    /// the file that holds it.
    #[must_use]
    pub fn shifted(mut self, by: usize) -> Self {
        *offset_in!(&mut self) += by;
        self
    }
}

/// Why packets do not form a [`Transcript`](crate::Transcript), or bytes are not an encoded one.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TranscriptError {
    /// A vocabulary larger than the format allows.
    #[error("vocabulary of {vocab}, the limit is {MAX_VOCAB}")]
    VocabOverLimit {
        /// Vocabulary size.
        vocab: u32,
    },
    /// A packet over another vocabulary than the transcript's.
    #[error("packet {index} has a vocabulary of {found}, the transcript's is {expected}")]
    VocabMismatch {
        /// Position of the packet.
        index: usize,
        /// The transcript's vocabulary size.
        expected: u32,
        /// The packet's.
        found: u32,
    },
    /// A packet with another vocabulary fingerprint than the transcript's.
    #[error(
        "packet {index} has the vocabulary fingerprint {found:#018x}, the transcript's is \
         {expected:#018x}"
    )]
    FingerprintMismatch {
        /// Position of the packet.
        index: usize,
        /// The transcript's fingerprint.
        expected: u64,
        /// The packet's.
        found: u64,
    },
    /// Steps must grow.
    #[error("packet {index} is of step {step}, after step {previous}")]
    StepOrder {
        /// Position of the packet.
        index: usize,
        /// Step of the packet before.
        previous: u32,
        /// Step of this packet.
        step: u32,
    },
    /// More packets than the format allows.
    #[error("{count} packets, the limit is {MAX_TRANSCRIPT_PACKETS}")]
    TooManyPackets {
        /// Number of packets.
        count: usize,
    },
    /// The bytes end inside the transcript header.
    #[error("transcript header cut short, needs {needed} bytes, {available} left")]
    TruncatedHeader {
        /// Length of the header in bytes.
        needed: usize,
        /// Bytes there.
        available: usize,
    },
    /// These bytes are something else.
    #[error("not a transcript, starts with {found:02x?}")]
    BadMagic {
        /// The four bytes found.
        found: [u8; 4],
    },
    /// A format version this crate does not know.
    #[error("transcript format version {version}, this decoder reads 1")]
    UnsupportedVersion {
        /// Its value.
        version: u8,
    },
    /// A flag bit that version 1 does not define.
    #[error("unknown transcript flags {flags:#04x}")]
    UnknownFlags {
        /// Their value.
        flags: u8,
    },
    /// Bytes that must be zero are not.
    #[error("reserved transcript field is {value:#06x}, must be zero")]
    ReservedNotZero {
        /// Their value.
        value: u16,
    },
    /// The CRC-32 of the transcript header does not match.
    #[error("transcript header checksum {stored:#010x}, the bytes give {computed:#010x}")]
    Checksum {
        /// The value read.
        stored: u32,
        /// The value computed.
        computed: u32,
    },
    /// A packet of the transcript is wrong; the offset in `source` counts from the transcript's start.
    #[error("packet {index} of the transcript: {source}")]
    Packet {
        /// Position of the packet.
        index: usize,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// Bytes after the transcript where there must be none.
    #[error("offset {offset}: the transcript ends here, {count} more byte(s) follow")]
    TrailingBytes {
        /// Where the transcript ends.
        offset: usize,
        /// Bytes left over.
        count: usize,
    },
}

/// A name that is no probability encoding, from parsing an [`Encoding`](crate::Encoding).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown packet encoding {0:?}, expected one of f32, f16, bf16, compact")]
pub struct UnknownEncodingName(pub String);
