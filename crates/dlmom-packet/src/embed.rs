//! Embeddings: the mixture vector itself, in the type of the model.

use crate::error::{DecodeError, PacketError, Part};
use crate::scalar::Scalar;
use crate::wire::{
    CHECKSUM_LEN, Meta, VERSION, check_flags, check_prologue, check_reserved, check_seal, field,
    seal,
};

/// The first four bytes of every encoded embedding, "DLEM".
pub const EMBED_MAGIC: [u8; 4] = *b"DLEM";

/// Bytes before the values of an embedding.
pub const EMBED_HEADER_LEN: usize = 24;

/// The most values an embedding may hold. Part of the format.
pub const MAX_EMBED: usize = 1 << 20;

const AT_FLAGS: usize = 5;
const AT_SCALAR: usize = 6;
const AT_RESERVED: usize = 7;
const AT_WIDTH: usize = 8;
const AT_FINGERPRINT: usize = 12;
const AT_STEP: usize = 20;

/// An embedding read from bytes, with how it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodedEmbed {
    /// The values, all finite, widened exactly.
    pub values: Vec<f32>,
    /// What came with it.
    pub meta: Meta,
    /// How the values were written.
    pub scalar: Scalar,
}

/// Length in bytes of an encoded embedding of `hidden` values.
#[must_use]
pub const fn embed_len(hidden: usize, scalar: Scalar) -> usize {
    EMBED_HEADER_LEN + hidden * scalar.bytes() + CHECKSUM_LEN
}

/// Appends the encoded embedding to `out` and returns its length in bytes, which is
/// [`embed_len(values.len(), scalar)`](embed_len).
///
/// Values are rounded to nearest even; values of a model in `scalar` are exact.
///
/// # Errors
/// [`PacketError::WidthZero`], [`PacketError::WidthOverLimit`], [`PacketError::ValueNotFinite`],
/// [`PacketError::ValueOverflow`] or [`PacketError::OutOfMemory`]; `out` is then unchanged.
pub fn encode_embed_into(
    values: &[f32],
    scalar: Scalar,
    meta: Meta,
    out: &mut Vec<u8>,
) -> Result<usize, PacketError> {
    let width = values.len();
    if width == 0 {
        return Err(PacketError::WidthZero);
    }
    if width > MAX_EMBED {
        return Err(PacketError::WidthOverLimit { width });
    }
    for (index, &value) in values.iter().enumerate() {
        if !value.is_finite() {
            return Err(PacketError::ValueNotFinite { index, value });
        }
        if !scalar.holds(value) {
            return Err(PacketError::ValueOverflow {
                index,
                value,
                scalar,
            });
        }
    }
    let bytes = embed_len(width, scalar);
    out.try_reserve(bytes)
        .map_err(|_| PacketError::OutOfMemory { bytes })?;
    let start = out.len();
    out.extend_from_slice(&EMBED_MAGIC);
    out.extend_from_slice(&[VERSION, 0, scalar.tag(), 0]);
    out.extend_from_slice(&(width as u32).to_le_bytes());
    out.extend_from_slice(&meta.fingerprint.to_le_bytes());
    out.extend_from_slice(&meta.step.to_le_bytes());
    scalar.write(values.iter().copied(), out);
    seal(start, out);
    Ok(bytes)
}

/// Reads one embedding from the front of `bytes`; also returns how many bytes it took.
///
/// Safe on bytes from anyone, as [`decode`](crate::decode()) is; allocates four bytes a value.
///
/// # Errors
/// One [`DecodeError`] for each way the bytes can be wrong; the first that holds in the order of the specification.
pub fn decode_embed(bytes: &[u8]) -> Result<(DecodedEmbed, usize), DecodeError> {
    check_prologue(bytes, 0, EMBED_MAGIC, "an embedding")?;
    let Some((header, body)) = bytes.split_first_chunk::<EMBED_HEADER_LEN>() else {
        return Err(DecodeError::Truncated {
            offset: 0,
            part: Part::Header,
            needed: EMBED_HEADER_LEN,
            available: bytes.len(),
        });
    };
    check_flags(header[AT_FLAGS], 0)?;
    let tag = header[AT_SCALAR];
    let Some(scalar) = Scalar::from_tag(tag) else {
        return Err(DecodeError::UnknownEncoding {
            offset: AT_SCALAR,
            tag,
        });
    };
    check_reserved(header[AT_RESERVED], 0)?;
    let width = u32::from_le_bytes(field::<AT_WIDTH, 4, _>(header));
    if width == 0 {
        return Err(DecodeError::WidthZero { offset: AT_WIDTH });
    }
    if width as usize > MAX_EMBED {
        return Err(DecodeError::WidthOverLimit {
            offset: AT_WIDTH,
            width,
        });
    }
    let needed = width as usize * scalar.bytes();
    let Some(values) = body.get(..needed) else {
        return Err(DecodeError::Truncated {
            offset: EMBED_HEADER_LEN,
            part: Part::Values,
            needed,
            available: body.len(),
        });
    };
    let consumed = check_seal(bytes, EMBED_HEADER_LEN + needed, 0)?;
    let values = scalar.read(values);
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(DecodeError::ValueNotFinite {
            offset: EMBED_HEADER_LEN + index * scalar.bytes(),
            index,
            value: values[index],
        });
    }
    let decoded = DecodedEmbed {
        values,
        meta: Meta {
            fingerprint: u64::from_le_bytes(field::<AT_FINGERPRINT, 8, _>(header)),
            step: u32::from_le_bytes(field::<AT_STEP, 4, _>(header)),
        },
        scalar,
    };
    Ok((decoded, consumed))
}

/// Reads the one embedding that `bytes` is.
///
/// # Errors
/// As for [`decode_embed`], and [`DecodeError::TrailingBytes`].
pub fn decode_embed_exact(bytes: &[u8]) -> Result<DecodedEmbed, DecodeError> {
    let (decoded, consumed) = decode_embed(bytes)?;
    if consumed < bytes.len() {
        return Err(DecodeError::TrailingBytes {
            offset: consumed,
            count: bytes.len() - consumed,
        });
    }
    Ok(decoded)
}
