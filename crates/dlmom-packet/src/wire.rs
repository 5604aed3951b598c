//! Version 1 of the wire format. The README of this crate is its specification.

use std::fmt;
use std::iter::FusedIterator;
use std::str::FromStr;

use half::{bf16, f16};

use crate::error::{DecodeError, PacketError, Part, UnknownEncodingName};
use crate::packet::{
    BeliefPacket, MAX_K, MAX_VOCAB, NORM_SLACK, first_duplicate, first_out_of_order, sum,
};

/// The first four bytes of every packet, "DLBP".
pub const MAGIC: [u8; 4] = *b"DLBP";

/// The format version written and read here.
pub const VERSION: u8 = 1;

/// Bytes before the ids.
pub const HEADER_LEN: usize = 32;

/// Bytes of the CRC-32 that ends a packet.
pub const CHECKSUM_LEN: usize = 4;

/// Length in bytes of the longest packet.
pub const MAX_PACKET_BYTES: usize = encoded_len(MAX_K, Encoding::F32);

/// Length in bytes of the shortest packet.
pub const MIN_PACKET_BYTES: usize = encoded_len(1, Encoding::F16);

const AT_VERSION: usize = 4;
const AT_FLAGS: usize = 5;
const AT_ENCODING: usize = 6;
const AT_RESERVED: usize = 7;
const AT_VOCAB: usize = 8;
const AT_FINGERPRINT: usize = 12;
const AT_STEP: usize = 20;
const AT_K: usize = 24;
const AT_MASS: usize = 28;
const ID_LEN: usize = 4;

/// How probabilities are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Encoding {
    /// IEEE 754 binary32: lossless.
    #[default]
    F32,
    /// IEEE 754 binary16, rounded to nearest even; below 2^-25 it becomes zero.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

impl Encoding {
    /// Every encoding, in the order of the tags.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// The tag on the wire.
    #[must_use]
    pub const fn tag(self) -> u8 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
        }
    }

    /// The encoding with this tag; tags 4 (compact) and 5 (dense) are reserved and unknown to version 1.
    #[must_use]
    pub const fn from_tag(tag: u8) -> Option<Self> {
        match tag {
            1 => Some(Self::F32),
            2 => Some(Self::F16),
            3 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Bytes of one probability.
    #[must_use]
    pub const fn prob_len(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The name used in configurations: `f32`, `f16` or `bf16`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// Largest relative error of rounding a normal number: 0, 2^-11 or 2^-8.
    #[must_use]
    pub fn relative_error(self) -> f64 {
        match self {
            Self::F32 => 0.0,
            Self::F16 => (-11.0_f64).exp2(),
            Self::Bf16 => (-8.0_f64).exp2(),
        }
    }

    /// Largest absolute error of rounding a number too small for the relative bound: 0, 2^-25 or 2^-134.
    #[must_use]
    pub fn absolute_error(self) -> f64 {
        match self {
            Self::F32 => 0.0,
            Self::F16 => (-25.0_f64).exp2(),
            Self::Bf16 => (-134.0_f64).exp2(),
        }
    }

    /// How far from 1 the `k` probabilities on the wire may sum: what rounding a normalised packet can cause, and no
    /// more. Part of the format.
    #[must_use]
    pub fn sum_tolerance(self, k: usize) -> f64 {
        match self {
            // Nothing was rounded, so the packet's own bound holds.
            Self::F32 => NORM_SLACK,
            Self::F16 | Self::Bf16 => {
                2.0 * NORM_SLACK + self.relative_error() + k as f64 * self.absolute_error()
            }
        }
    }

    fn round(self, prob: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(prob).to_bits(),
            Self::F16 | Self::F32 => f16::from_f32(prob).to_bits(),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Encoding {
    type Err = UnknownEncodingName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|encoding| encoding.as_str() == name)
            .ok_or_else(|| UnknownEncodingName(name.to_owned()))
    }
}

/// What travels beside a packet's entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Meta {
    /// Fingerprint of the vocabulary that the ids index; a receiver compares it with its own.
    pub fingerprint: u64,
    /// Step of the sample, counted from 0, that produced the packet.
    pub step: u32,
}

/// A packet read from bytes, with how it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The packet.
    pub packet: BeliefPacket,
    /// What came with it.
    pub meta: Meta,
    /// How its probabilities were written.
    pub encoding: Encoding,
}

/// Length in bytes of an encoded packet of `k` entries.
#[must_use]
pub const fn encoded_len(k: usize, encoding: Encoding) -> usize {
    HEADER_LEN + k * (ID_LEN + encoding.prob_len()) + CHECKSUM_LEN
}

/// Appends the encoded packet to `out` and returns its length in bytes, which is
/// [`encoded_len(packet.k(), encoding)`](encoded_len).
///
/// In `f16` and `bf16` the entries are re-sorted by rounded probability descending, then id ascending.
///
/// # Errors
/// [`PacketError::OutOfMemory`] if `out` cannot grow; it is then unchanged.
pub fn encode_into(
    packet: &BeliefPacket,
    meta: Meta,
    encoding: Encoding,
    out: &mut Vec<u8>,
) -> Result<usize, PacketError> {
    let bytes = encoded_len(packet.k(), encoding);
    out.try_reserve(bytes)
        .map_err(|_| PacketError::OutOfMemory { bytes })?;
    let start = out.len();

    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&[VERSION, 0, encoding.tag(), 0]);
    out.extend_from_slice(&packet.vocab().to_le_bytes());
    out.extend_from_slice(&meta.fingerprint.to_le_bytes());
    out.extend_from_slice(&meta.step.to_le_bytes());
    // k is at most MAX_K, far below 2^32.
    out.extend_from_slice(&(packet.k() as u32).to_le_bytes());
    out.extend_from_slice(&packet.mass().to_le_bytes());
    match encoding {
        Encoding::F32 => {
            out.extend(packet.ids().iter().flat_map(|id| id.to_le_bytes()));
            out.extend(packet.probs().iter().flat_map(|prob| prob.to_le_bytes()));
        }
        Encoding::F16 | Encoding::Bf16 => {
            let mut entries: Vec<(u16, u32)> = packet
                .iter()
                .map(|(id, prob)| (encoding.round(prob), id))
                .collect();
            // Non-negative floats are ordered like their bits. Rounding keeps the order but makes ties.
            entries.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
            out.extend(entries.iter().flat_map(|(_, id)| id.to_le_bytes()));
            out.extend(entries.iter().flat_map(|(bits, _)| bits.to_le_bytes()));
        }
    }
    let checksum = crc32fast::hash(&out[start..]);
    out.extend_from_slice(&checksum.to_le_bytes());
    Ok(bytes)
}

/// The encoded packet; see [`encode_into`].
///
/// # Errors
/// [`PacketError::OutOfMemory`].
pub fn encode(
    packet: &BeliefPacket,
    meta: Meta,
    encoding: Encoding,
) -> Result<Vec<u8>, PacketError> {
    let mut out = Vec::new();
    encode_into(packet, meta, encoding, &mut out)?;
    Ok(out)
}

/// Reads one packet from the front of `bytes`; also returns how many bytes it took.
///
/// The bytes may come from anyone: this never panics, and allocates at most twice the length of the packet, after
/// having seen that all of it is there.
///
/// # Errors
/// One [`DecodeError`] for each way the bytes can be wrong; the first that holds in the order of the specification.
pub fn decode(bytes: &[u8]) -> Result<(Decoded, usize), DecodeError> {
    decode_at(bytes, 0)
}

/// Reads the one packet that `bytes` is.
///
/// # Errors
/// As for [`decode`], and [`DecodeError::TrailingBytes`].
pub fn decode_exact(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    let (decoded, consumed) = decode(bytes)?;
    if consumed < bytes.len() {
        return Err(DecodeError::TrailingBytes {
            offset: consumed,
            count: bytes.len() - consumed,
        });
    }
    Ok(decoded)
}

/// [`decode`] with offsets in errors counted from `base` bytes before `bytes`.
pub(crate) fn decode_at(bytes: &[u8], base: usize) -> Result<(Decoded, usize), DecodeError> {
    // Magic and version first, on whatever is there: what follows may be laid out otherwise in another version.
    if let Some(&found) = bytes.first_chunk::<4>()
        && found != MAGIC
    {
        return Err(DecodeError::BadMagic {
            offset: base,
            found,
        });
    }
    if let Some(&version) = bytes.get(AT_VERSION)
        && version != VERSION
    {
        return Err(DecodeError::UnsupportedVersion {
            offset: base + AT_VERSION,
            version,
        });
    }
    let truncated = |part, start: usize, needed| DecodeError::Truncated {
        offset: base + start,
        part,
        needed,
        available: bytes.len().saturating_sub(start),
    };
    let Some((header, body)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Err(truncated(Part::Header, 0, HEADER_LEN));
    };
    let vocab = u32::from_le_bytes(field::<AT_VOCAB, 4, _>(header));
    let meta = Meta {
        fingerprint: u64::from_le_bytes(field::<AT_FINGERPRINT, 8, _>(header)),
        step: u32::from_le_bytes(field::<AT_STEP, 4, _>(header)),
    };
    let wire_k = u32::from_le_bytes(field::<AT_K, 4, _>(header));
    let mass = f32::from_le_bytes(field::<AT_MASS, 4, _>(header));
    let (flags, tag, reserved) = (header[AT_FLAGS], header[AT_ENCODING], header[AT_RESERVED]);

    // What decides the length comes before the checksum, whose place it gives.
    if flags != 0 {
        return Err(DecodeError::UnknownFlags {
            offset: base + AT_FLAGS,
            flags,
        });
    }
    let Some(encoding) = Encoding::from_tag(tag) else {
        return Err(DecodeError::UnknownEncoding {
            offset: base + AT_ENCODING,
            tag,
        });
    };
    if reserved != 0 {
        return Err(DecodeError::ReservedNotZero {
            offset: base + AT_RESERVED,
            value: reserved,
        });
    }
    if vocab > MAX_VOCAB {
        return Err(DecodeError::VocabOverLimit {
            offset: base + AT_VOCAB,
            vocab,
        });
    }
    if wire_k == 0 {
        return Err(DecodeError::KZero {
            offset: base + AT_K,
        });
    }
    if wire_k as usize > MAX_K {
        return Err(DecodeError::KOverLimit {
            offset: base + AT_K,
            k: wire_k,
        });
    }
    if wire_k > vocab {
        return Err(DecodeError::KOverVocab {
            offset: base + AT_K,
            k: wire_k,
            vocab,
        });
    }

    let k = wire_k as usize;
    let probs_at = HEADER_LEN + k * ID_LEN;
    let checksum_at = probs_at + k * encoding.prob_len();
    let Some((id_bytes, body)) = body.split_at_checked(k * ID_LEN) else {
        return Err(truncated(Part::Ids, HEADER_LEN, k * ID_LEN));
    };
    let Some((prob_bytes, body)) = body.split_at_checked(k * encoding.prob_len()) else {
        return Err(truncated(Part::Probs, probs_at, k * encoding.prob_len()));
    };
    let Some(&stored) = body.first_chunk::<CHECKSUM_LEN>() else {
        return Err(truncated(Part::Checksum, checksum_at, CHECKSUM_LEN));
    };
    let stored = u32::from_le_bytes(stored);
    let computed = crc32fast::hash(&bytes[..checksum_at]);
    if stored != computed {
        return Err(DecodeError::Checksum {
            offset: base + checksum_at,
            stored,
            computed,
        });
    }

    if !(mass > 0.0 && mass <= 1.0) {
        return Err(DecodeError::MassOutOfRange {
            offset: base + AT_MASS,
            mass,
        });
    }
    let id_offset = |index: usize| base + HEADER_LEN + index * ID_LEN;
    let ids: Vec<u32> = id_bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    if let Some(index) = ids.iter().position(|&id| id >= vocab) {
        let offset = id_offset(index);
        return Err(DecodeError::IdOutOfRange {
            offset,
            index,
            id: ids[index],
            vocab,
        });
    }
    if let Some((first, second)) = first_duplicate(&ids) {
        let offset = id_offset(second);
        return Err(DecodeError::DuplicateId {
            offset,
            first,
            second,
            id: ids[second],
        });
    }
    let probs = read_probs(prob_bytes, encoding);
    for (index, &prob) in probs.iter().enumerate() {
        let offset = base + probs_at + index * encoding.prob_len();
        if !prob.is_finite() {
            return Err(DecodeError::ProbNotFinite {
                offset,
                index,
                prob,
            });
        }
        if prob.is_sign_negative() {
            return Err(DecodeError::ProbNegative {
                offset,
                index,
                prob,
            });
        }
        if prob > 1.0 {
            return Err(DecodeError::ProbAboveOne {
                offset,
                index,
                prob,
            });
        }
    }
    if let Some(index) = first_out_of_order(&ids, &probs) {
        let (offset, id, prob) = (id_offset(index), ids[index], probs[index]);
        return Err(DecodeError::WrongOrder {
            offset,
            index,
            id,
            prob,
        });
    }
    let sum = sum(&probs);
    let tolerance = encoding.sum_tolerance(k);
    if (sum - 1.0).abs() > tolerance {
        return Err(DecodeError::SumOff {
            offset: base + probs_at,
            sum,
            tolerance,
        });
    }
    // Values apart by a step of f16 or bf16 stay apart in f32 when divided, so the order needs no second look.
    let packet = BeliefPacket::from_checked(ids, probs, mass, vocab, sum);
    Ok((
        Decoded {
            packet,
            meta,
            encoding,
        },
        checksum_at + CHECKSUM_LEN,
    ))
}

/// The `N` bytes of a fixed header from `AT`; a field that leaves the header does not compile.
pub(crate) fn field<const AT: usize, const N: usize, const LEN: usize>(
    header: &[u8; LEN],
) -> [u8; N] {
    const { assert!(AT + N <= LEN) };
    std::array::from_fn(|i| header[AT + i])
}

fn read_probs(bytes: &[u8], encoding: Encoding) -> Vec<f32> {
    match encoding {
        Encoding::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Encoding::F16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        Encoding::Bf16 => bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| bf16::from_le_bytes(*b).to_f32())
            .collect(),
    }
}

/// Reads packets written one after another.
///
/// Ends after the last packet, or after the first error: behind a broken packet there is no way to find the next.
#[derive(Debug, Clone)]
pub struct PacketReader<'a> {
    bytes: &'a [u8],
    offset: usize,
    failed: bool,
}

impl<'a> PacketReader<'a> {
    /// A reader over `bytes`; nothing is read yet.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            offset: 0,
            failed: false,
        }
    }

    /// Where the next packet starts, in bytes; after an error, where the broken one starts.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }
}

impl Iterator for PacketReader<'_> {
    type Item = Result<Decoded, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self
            .bytes
            .get(self.offset..)
            .filter(|rest| !rest.is_empty())?;
        if self.failed {
            return None;
        }
        match decode_at(rest, self.offset) {
            Ok((decoded, consumed)) => {
                self.offset += consumed;
                Some(Ok(decoded))
            }
            Err(error) => {
                self.failed = true;
                Some(Err(error))
            }
        }
    }
}

impl FusedIterator for PacketReader<'_> {}
