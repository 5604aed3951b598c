//! Version 1 of the wire format. The README of this crate is its specification.

use std::fmt;
use std::iter::FusedIterator;
use std::str::FromStr;

use half::{bf16, f16};

use crate::compact;
use crate::dense;
use crate::error::{DecodeError, PacketError, Part, UnknownEncodingName};
use crate::packet::{
    BeliefPacket, MAX_K, MAX_VOCAB, NORM_SLACK, first_duplicate, first_out_of_order, sum,
};
use crate::scalar::Scalar;

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
pub const MIN_PACKET_BYTES: usize = HEADER_LEN + compact::PARAMS_LEN + 1 + 1 + CHECKSUM_LEN;

pub(crate) const AT_VERSION: usize = 4;
pub(crate) const AT_FLAGS: usize = 5;
pub(crate) const AT_ENCODING: usize = 6;
pub(crate) const AT_RESERVED: usize = 7;
const AT_VOCAB: usize = 8;
const AT_FINGERPRINT: usize = 12;
const AT_STEP: usize = 20;
pub(crate) const AT_K: usize = 24;
pub(crate) const AT_MASS: usize = 28;
const ID_LEN: usize = 4;

/// How ids and probabilities are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Encoding {
    /// IEEE 754 binary32: lossless.
    #[default]
    F32,
    /// IEEE 754 binary16, rounded to nearest even; below 2^-25 it becomes zero.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// Gaps between sorted ids in Golomb-Rice code, probabilities in 255 logarithmic steps; the length depends on the
    /// content.
    Compact,
}

impl Encoding {
    /// Every encoding, in the order of the tags.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::Compact];

    /// The tag on the wire.
    #[must_use]
    pub const fn tag(self) -> u8 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
            Self::Compact => 4,
        }
    }

    /// The encoding with this tag; those of dense beliefs are not among them.
    #[must_use]
    pub const fn from_tag(tag: u8) -> Option<Self> {
        match tag {
            1 => Some(Self::F32),
            2 => Some(Self::F16),
            3 => Some(Self::Bf16),
            4 => Some(Self::Compact),
            _ => None,
        }
    }

    /// The floating-point type of the probabilities; compact ones are no floats.
    #[must_use]
    pub const fn scalar(self) -> Option<Scalar> {
        match self {
            Self::F32 => Some(Scalar::F32),
            Self::F16 => Some(Scalar::F16),
            Self::Bf16 => Some(Scalar::Bf16),
            Self::Compact => None,
        }
    }

    /// Bytes of one probability.
    #[must_use]
    pub const fn prob_len(self) -> usize {
        match self.scalar() {
            Some(scalar) => scalar.bytes(),
            None => 1,
        }
    }

    /// The name used in configurations: `f32`, `f16`, `bf16` or `compact`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self.scalar() {
            Some(scalar) => scalar.as_str(),
            None => "compact",
        }
    }

    /// Largest relative error of rounding: 0, 2^-11 or 2^-8 for a normal number; 2^(1/16) - 1 (half a step) for a
    /// probability above the compact encoding's floor.
    #[must_use]
    pub fn relative_error(self) -> f64 {
        self.scalar()
            .map_or_else(|| 0.0625_f64.exp2() - 1.0, Scalar::relative_error)
    }

    /// Largest absolute error of rounding a number too small for the relative bound: 0, 2^-25, 2^-134 or 2^-31.75.
    #[must_use]
    pub fn absolute_error(self) -> f64 {
        self.scalar()
            .map_or_else(|| (-31.75_f64).exp2(), Scalar::absolute_error)
    }

    /// How far from 1 the `k` rounded probabilities may sum: what rounding a normalised packet can cause, and no
    /// more. Part of the format, except for compact packets, whose sum is not on the wire.
    #[must_use]
    pub fn sum_tolerance(self, k: usize) -> f64 {
        match self {
            // Nothing was rounded, so the packet's own bound holds.
            Self::F32 => NORM_SLACK,
            Self::F16 | Self::Bf16 | Self::Compact => {
                2.0 * NORM_SLACK + self.relative_error() + k as f64 * self.absolute_error()
            }
        }
    }

    /// Length in bytes of an encoded packet of `k` entries, if that is a function of `k` alone.
    #[must_use]
    pub const fn fixed_len(self, k: usize) -> Option<usize> {
        match self.scalar() {
            Some(scalar) => Some(HEADER_LEN + k * (ID_LEN + scalar.bytes()) + CHECKSUM_LEN),
            None => None,
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

/// Length in bytes of an encoded packet of `k` entries; in the compact encoding an upper bound, whatever the ids.
/// [`packet_len`] is exact.
#[must_use]
pub const fn encoded_len(k: usize, encoding: Encoding) -> usize {
    max_encoded_len(k, MAX_VOCAB, encoding)
}

/// Upper bound of the length in bytes of an encoded packet of `k` ids below `vocab`; exact unless it is compact.
#[must_use]
pub const fn max_encoded_len(k: usize, vocab: u32, encoding: Encoding) -> usize {
    match encoding.fixed_len(k) {
        Some(bytes) => bytes,
        None => HEADER_LEN + compact::max_len(k, vocab) + CHECKSUM_LEN,
    }
}

/// Length in bytes of `packet` when encoded.
#[must_use]
pub fn packet_len(packet: &BeliefPacket, encoding: Encoding) -> usize {
    encoding
        .fixed_len(packet.k())
        .unwrap_or_else(|| HEADER_LEN + compact::Body::new(packet).len() + CHECKSUM_LEN)
}

/// Appends the encoded packet to `out` and returns its length in bytes, which is
/// [`packet_len(packet, encoding)`](packet_len).
///
/// In `f16` and `bf16` the entries are re-sorted by rounded probability descending, then id ascending; in `compact`
/// they go by id, and come back in packet order.
///
/// # Errors
/// [`PacketError::OutOfMemory`] if `out` cannot grow; it is then unchanged.
pub fn encode_into(
    packet: &BeliefPacket,
    meta: Meta,
    encoding: Encoding,
    out: &mut Vec<u8>,
) -> Result<usize, PacketError> {
    let body = (encoding == Encoding::Compact).then(|| compact::Body::new(packet));
    let bytes = match &body {
        Some(body) => HEADER_LEN + body.len() + CHECKSUM_LEN,
        None => encoded_len(packet.k(), encoding),
    };
    let header = Header {
        tag: encoding.tag(),
        vocab: packet.vocab(),
        meta,
        // At most MAX_K, far below 2^32.
        k: packet.k() as u32,
        mass: packet.mass(),
    };
    let start = header.begin(bytes, out)?;
    match (body, encoding.scalar()) {
        (Some(body), _) => body.write(out),
        (None, None | Some(Scalar::F32)) => {
            out.extend(packet.ids().iter().flat_map(|id| id.to_le_bytes()));
            Scalar::F32.write(packet.probs().iter().copied(), out);
        }
        (None, Some(scalar)) => {
            let mut entries: Vec<(u16, u32)> = packet
                .iter()
                .map(|(id, prob)| (round(prob, scalar), id))
                .collect();
            // Non-negative floats are ordered like their bits. Rounding keeps the order but makes ties.
            entries.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
            out.extend(entries.iter().flat_map(|(_, id)| id.to_le_bytes()));
            out.extend(entries.iter().flat_map(|(bits, _)| bits.to_le_bytes()));
        }
    }
    seal(start, out);
    Ok(bytes)
}

fn round(prob: f32, scalar: Scalar) -> u16 {
    match scalar {
        Scalar::Bf16 => bf16::from_f32(prob).to_bits(),
        Scalar::F16 | Scalar::F32 => f16::from_f32(prob).to_bits(),
    }
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
/// The bytes may come from anyone: this never panics, and allocates at most sixteen bytes an entry, after having seen
/// that all of the packet is there.
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

/// The fields of a packet's fixed header that are not constant.
pub(crate) struct Header {
    pub(crate) tag: u8,
    pub(crate) vocab: u32,
    pub(crate) meta: Meta,
    pub(crate) k: u32,
    pub(crate) mass: f32,
}

impl Header {
    /// Makes room for a payload of `bytes` in all, writes the header, and returns where it starts.
    pub(crate) fn begin(&self, bytes: usize, out: &mut Vec<u8>) -> Result<usize, PacketError> {
        out.try_reserve(bytes)
            .map_err(|_| PacketError::OutOfMemory { bytes })?;
        let start = out.len();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, 0, self.tag, 0]);
        out.extend_from_slice(&self.vocab.to_le_bytes());
        out.extend_from_slice(&self.meta.fingerprint.to_le_bytes());
        out.extend_from_slice(&self.meta.step.to_le_bytes());
        out.extend_from_slice(&self.k.to_le_bytes());
        out.extend_from_slice(&self.mass.to_le_bytes());
        Ok(start)
    }

    /// Reads the header of a packet or a dense belief, whichever `is_own` says the tag is of; also returns what
    /// follows.
    pub(crate) fn read<'a>(
        bytes: &'a [u8],
        base: usize,
        wanted: &'static str,
        is_own: impl Fn(u8) -> bool,
    ) -> Result<(Self, &'a [u8]), DecodeError> {
        check_prologue(bytes, base, MAGIC, wanted)?;
        let Some((header, body)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return Err(DecodeError::Truncated {
                offset: base,
                part: Part::Header,
                needed: HEADER_LEN,
                available: bytes.len(),
            });
        };
        let tag = header[AT_ENCODING];
        check_flags(header[AT_FLAGS], base)?;
        if !is_own(tag) {
            let offset = base + AT_ENCODING;
            let known = Encoding::from_tag(tag).is_some() || dense::scalar_of_tag(tag).is_some();
            return Err(if known {
                DecodeError::WrongKind {
                    offset,
                    wanted,
                    tag,
                }
            } else {
                DecodeError::UnknownEncoding { offset, tag }
            });
        }
        check_reserved(header[AT_RESERVED], base)?;
        let vocab = u32::from_le_bytes(field::<AT_VOCAB, 4, _>(header));
        if vocab > MAX_VOCAB {
            return Err(DecodeError::VocabOverLimit {
                offset: base + AT_VOCAB,
                vocab,
            });
        }
        let k = u32::from_le_bytes(field::<AT_K, 4, _>(header));
        if k == 0 {
            return Err(DecodeError::KZero {
                offset: base + AT_K,
            });
        }
        let header = Self {
            tag,
            vocab,
            meta: Meta {
                fingerprint: u64::from_le_bytes(field::<AT_FINGERPRINT, 8, _>(header)),
                step: u32::from_le_bytes(field::<AT_STEP, 4, _>(header)),
            },
            k,
            mass: f32::from_le_bytes(field::<AT_MASS, 4, _>(header)),
        };
        Ok((header, body))
    }
}

/// Magic and version, on whatever is there: what follows may be laid out otherwise in another version.
pub(crate) fn check_prologue(
    bytes: &[u8],
    base: usize,
    magic: [u8; 4],
    wanted: &'static str,
) -> Result<(), DecodeError> {
    if let Some(&found) = bytes.first_chunk::<4>()
        && found != magic
    {
        return Err(DecodeError::BadMagic {
            offset: base,
            wanted,
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
    Ok(())
}

pub(crate) fn check_flags(flags: u8, base: usize) -> Result<(), DecodeError> {
    if flags == 0 {
        return Ok(());
    }
    Err(DecodeError::UnknownFlags {
        offset: base + AT_FLAGS,
        flags,
    })
}

pub(crate) fn check_reserved(value: u8, base: usize) -> Result<(), DecodeError> {
    if value == 0 {
        return Ok(());
    }
    Err(DecodeError::ReservedNotZero {
        offset: base + AT_RESERVED,
        value,
    })
}

/// Appends the checksum of everything from `start` on.
pub(crate) fn seal(start: usize, out: &mut Vec<u8>) {
    let checksum = crc32fast::hash(&out[start..]);
    out.extend_from_slice(&checksum.to_le_bytes());
}

/// Checks the checksum at `at` and returns where the payload ends.
pub(crate) fn check_seal(bytes: &[u8], at: usize, base: usize) -> Result<usize, DecodeError> {
    let rest = &bytes[at..];
    let Some(&stored) = rest.first_chunk::<CHECKSUM_LEN>() else {
        return Err(DecodeError::Truncated {
            offset: base + at,
            part: Part::Checksum,
            needed: CHECKSUM_LEN,
            available: rest.len(),
        });
    };
    let stored = u32::from_le_bytes(stored);
    let computed = crc32fast::hash(&bytes[..at]);
    if stored != computed {
        return Err(DecodeError::Checksum {
            offset: base + at,
            stored,
            computed,
        });
    }
    Ok(at + CHECKSUM_LEN)
}

/// That each probability is one; `offset` is where they start.
pub(crate) fn check_probs(probs: &[f32], scalar: Scalar, offset: usize) -> Result<(), DecodeError> {
    for (index, &prob) in probs.iter().enumerate() {
        let offset = offset + index * scalar.bytes();
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
    Ok(())
}

/// [`decode`] with offsets in errors counted from `base` bytes before `bytes`.
pub(crate) fn decode_at(bytes: &[u8], base: usize) -> Result<(Decoded, usize), DecodeError> {
    let is_own = |tag| Encoding::from_tag(tag).is_some();
    let (header, body) = Header::read(bytes, base, "a belief packet", is_own)?;
    let Header {
        tag,
        vocab,
        meta,
        k,
        mass,
    } = header;
    // What decides the length comes before the checksum, whose place it gives.
    if k as usize > MAX_K {
        return Err(DecodeError::KOverLimit {
            offset: base + AT_K,
            k,
        });
    }
    if k > vocab {
        return Err(DecodeError::KOverVocab {
            offset: base + AT_K,
            k,
            vocab,
        });
    }
    let k = k as usize;
    let encoding = Encoding::from_tag(tag).unwrap_or_default();
    let (packet, consumed) = if let Some(scalar) = encoding.scalar() {
        decode_floats(bytes, body, base, encoding, scalar, (k, vocab, mass))?
    } else {
        let raw = compact::Raw::measure(body, k, vocab, base + HEADER_LEN)?;
        let consumed = check_seal(bytes, HEADER_LEN + raw.len(), base)?;
        check_mass(mass, base)?;
        let (ids, probs) = raw.read()?;
        // They were divided by their sum just now.
        let packet = BeliefPacket::from_checked(ids, probs, mass, vocab, 1.0);
        (packet, consumed)
    };
    let decoded = Decoded {
        packet,
        meta,
        encoding,
    };
    Ok((decoded, consumed))
}

fn check_mass(mass: f32, base: usize) -> Result<(), DecodeError> {
    if mass > 0.0 && mass <= 1.0 {
        return Ok(());
    }
    Err(DecodeError::MassOutOfRange {
        offset: base + AT_MASS,
        mass,
    })
}

/// The rest of [`decode_at`] where ids are integers and probabilities floats.
fn decode_floats(
    bytes: &[u8],
    body: &[u8],
    base: usize,
    encoding: Encoding,
    scalar: Scalar,
    (k, vocab, mass): (usize, u32, f32),
) -> Result<(BeliefPacket, usize), DecodeError> {
    let truncated = |part, start: usize, needed| DecodeError::Truncated {
        offset: base + start,
        part,
        needed,
        available: bytes.len().saturating_sub(start),
    };
    let probs_at = HEADER_LEN + k * ID_LEN;
    let checksum_at = probs_at + k * scalar.bytes();
    let Some((id_bytes, body)) = body.split_at_checked(k * ID_LEN) else {
        return Err(truncated(Part::Ids, HEADER_LEN, k * ID_LEN));
    };
    let Some(prob_bytes) = body.get(..k * scalar.bytes()) else {
        return Err(truncated(Part::Probs, probs_at, k * scalar.bytes()));
    };
    let consumed = check_seal(bytes, checksum_at, base)?;
    check_mass(mass, base)?;

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
    let probs = scalar.read(prob_bytes);
    check_probs(&probs, scalar, base + probs_at)?;
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
    Ok((packet, consumed))
}

/// The `N` bytes of a fixed header from `AT`; a field that leaves the header does not compile.
pub(crate) fn field<const AT: usize, const N: usize, const LEN: usize>(
    header: &[u8; LEN],
) -> [u8; N] {
    const { assert!(AT + N <= LEN) };
    std::array::from_fn(|i| header[AT + i])
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
