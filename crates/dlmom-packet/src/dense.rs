//! Beliefs over the whole vocabulary, without ids.

use crate::error::{DecodeError, PacketError, Part};
use crate::packet::{INPUT_TOLERANCE, MAX_VOCAB, NORM_SLACK, renormalise, sum};
use crate::scalar::Scalar;
use crate::wire::{
    AT_K, AT_MASS, CHECKSUM_LEN, HEADER_LEN, Header, Meta, check_probs, check_seal, seal,
};

/// Length in bytes of the longest dense belief.
pub const MAX_DENSE_BYTES: usize = dense_len(MAX_VOCAB as usize, Scalar::F32);

/// A dense belief has the tag of the packet encoding with the same type, plus this.
const TAGS_FROM: u8 = 4;

/// A whole next-token distribution read from bytes, with how it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodedDense {
    /// Probability of each token, in the order of their ids; as many as the vocabulary has tokens. They are in `[0, 1]`
    /// without a negative zero and sum to 1 within [`NORM_SLACK`].
    pub probs: Vec<f32>,
    /// What came with it.
    pub meta: Meta,
    /// How the probabilities were written.
    pub scalar: Scalar,
}

/// Length in bytes of an encoded dense belief over `vocab` tokens.
#[must_use]
pub const fn dense_len(vocab: usize, scalar: Scalar) -> usize {
    HEADER_LEN + vocab * scalar.bytes() + CHECKSUM_LEN
}

pub(crate) fn scalar_of_tag(tag: u8) -> Option<Scalar> {
    Scalar::from_tag(tag.checked_sub(TAGS_FROM)?)
}

/// Appends the encoded dense belief to `out` and returns its length in bytes, which is
/// [`dense_len(probs.len(), scalar)`](dense_len).
///
/// `probs` are in the order of the ids, one for each token of the vocabulary. They are treated as
/// [`BeliefPacket::new`](crate::BeliefPacket::new) treats those of a packet: divided by their sum, in f64, if that is
/// further than [`NORM_SLACK`] from 1, and otherwise kept bit for bit; a negative zero becomes zero.
///
/// # Errors
/// [`PacketError::KZero`], [`PacketError::VocabOverLimit`], [`PacketError::ProbNotFinite`],
/// [`PacketError::ProbNegative`], [`PacketError::SumOff`] if the sum is further than [`INPUT_TOLERANCE`] from 1, or
/// [`PacketError::OutOfMemory`]; `out` is then unchanged.
pub fn encode_dense_into(
    probs: &[f32],
    meta: Meta,
    scalar: Scalar,
    out: &mut Vec<u8>,
) -> Result<usize, PacketError> {
    if probs.is_empty() {
        return Err(PacketError::KZero);
    }
    let vocab = u32::try_from(probs.len()).unwrap_or(u32::MAX);
    if vocab > MAX_VOCAB {
        return Err(PacketError::VocabOverLimit { vocab });
    }
    for (index, &prob) in probs.iter().enumerate() {
        let id = index as u32;
        if !prob.is_finite() {
            return Err(PacketError::ProbNotFinite { index, id, prob });
        }
        if prob < 0.0 {
            return Err(PacketError::ProbNegative { index, id, prob });
        }
    }
    let sum = sum(probs);
    if (sum - 1.0).abs() > INPUT_TOLERANCE {
        return Err(PacketError::SumOff {
            sum,
            tolerance: INPUT_TOLERANCE,
        });
    }
    let bytes = dense_len(probs.len(), scalar);
    let header = Header {
        tag: TAGS_FROM + scalar.tag(),
        vocab,
        meta,
        k: vocab,
        mass: 1.0,
    };
    let start = header.begin(bytes, out)?;
    // The same values as `renormalise` gives, without a copy.
    let divide = (sum - 1.0).abs() > NORM_SLACK;
    let values = probs.iter().map(|&prob| {
        // -0.0 + 0.0 is +0.0.
        if divide {
            (f64::from(prob) / sum) as f32 + 0.0
        } else {
            prob.min(1.0) + 0.0
        }
    });
    scalar.write(values, out);
    seal(start, out);
    Ok(bytes)
}

/// Reads one dense belief from the front of `bytes`; also returns how many bytes it took.
///
/// Safe on bytes from anyone, as [`decode`](crate::decode()) is; allocates four bytes a token.
///
/// # Errors
/// One [`DecodeError`] for each way the bytes can be wrong; the first that holds in the order of the specification.
pub fn decode_dense(bytes: &[u8]) -> Result<(DecodedDense, usize), DecodeError> {
    let is_own = |tag| scalar_of_tag(tag).is_some();
    let (header, body) = Header::read(bytes, 0, "a dense belief", is_own)?;
    let scalar = scalar_of_tag(header.tag).unwrap_or_default();
    if header.k != header.vocab {
        return Err(DecodeError::KNotVocab {
            offset: AT_K,
            k: header.k,
            vocab: header.vocab,
        });
    }
    let needed = header.vocab as usize * scalar.bytes();
    let Some(values) = body.get(..needed) else {
        return Err(DecodeError::Truncated {
            offset: HEADER_LEN,
            part: Part::Probs,
            needed,
            available: body.len(),
        });
    };
    let consumed = check_seal(bytes, HEADER_LEN + needed, 0)?;
    if header.mass != 1.0 {
        return Err(DecodeError::MassNotOne {
            offset: AT_MASS,
            mass: header.mass,
        });
    }
    let mut probs = scalar.read(values);
    check_probs(&probs, scalar, HEADER_LEN)?;
    let sum = sum(&probs);
    let tolerance = sum_tolerance(probs.len(), scalar);
    if (sum - 1.0).abs() > tolerance {
        return Err(DecodeError::SumOff {
            offset: HEADER_LEN,
            sum,
            tolerance,
        });
    }
    renormalise(&mut probs, sum);
    let decoded = DecodedDense {
        probs,
        meta: header.meta,
        scalar,
    };
    Ok((decoded, consumed))
}

/// Reads the one dense belief that `bytes` is.
///
/// # Errors
/// As for [`decode_dense`], and [`DecodeError::TrailingBytes`].
pub fn decode_dense_exact(bytes: &[u8]) -> Result<DecodedDense, DecodeError> {
    let (decoded, consumed) = decode_dense(bytes)?;
    if consumed < bytes.len() {
        return Err(DecodeError::TrailingBytes {
            offset: consumed,
            count: bytes.len() - consumed,
        });
    }
    Ok(decoded)
}

/// What rounding a normalised belief can make of its sum, and no more; that of a packet with as many entries.
fn sum_tolerance(vocab: usize, scalar: Scalar) -> f64 {
    match scalar {
        Scalar::F32 => NORM_SLACK,
        Scalar::F16 | Scalar::Bf16 => {
            2.0 * NORM_SLACK + scalar.relative_error() + vocab as f64 * scalar.absolute_error()
        }
    }
}
