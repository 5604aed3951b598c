//! Rows as models leave them, and their conversion a block at a time.

use half::{bf16, f16};

/// Logits that are converted, weighed and merged at a time, so that everything made of them stays in the
/// nearest cache. The f64 sums of `dlmom-core` have the same blocks.
pub(crate) const BLOCK: usize = dlmom_core::entropy::SUM_BLOCK;
/// Loops over a block are multiples of this long, padding included.
pub(crate) const UNIT: usize = 64;

/// One block of a row as float32.
pub(crate) type Block = [f32; BLOCK];

/// One expert's logits of a row, `[V]`.
pub type Logits<'a> = Floats<'a>;

/// Numbers as models store them. Every value is read as the float32 that equals it.
#[derive(Clone, Copy, Debug)]
pub enum Floats<'a> {
    /// float32.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// float16.
    F16(&'a [f16]),
}

impl<'a> Floats<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(row) => row.len(),
            Self::Bf16(row) => row.len(),
            Self::F16(row) => row.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One of them, if there are so many.
    #[must_use]
    pub fn get(&self, id: usize) -> Option<f32> {
        match self {
            Self::F32(row) => row.get(id).copied(),
            Self::Bf16(row) => row.get(id).map(|&z| widen_bf16(z)),
            Self::F16(row) => row.get(id).map(|&z| widen_f16(z)),
        }
    }

    /// The first `vocab` as float32, in `out` if they have to be converted.
    #[must_use]
    pub fn widened<'b>(&self, vocab: usize, out: &'b mut Vec<f32>) -> &'b [f32]
    where
        'a: 'b,
    {
        out.clear();
        match self {
            Self::F32(row) => return &row[..vocab],
            Self::Bf16(row) => out.extend(row[..vocab].iter().map(|&z| widen_bf16(z))),
            Self::F16(row) => out.extend(row[..vocab].iter().map(|&z| widen_f16(z))),
        }
        out
    }

    /// The `len` numbers from `start`, followed by `pad`ding up to a whole unit. What follows that is
    /// anything. A whole block of float32 stays where it is.
    #[inline(always)]
    pub(crate) fn block<'b>(
        &self,
        start: usize,
        len: usize,
        pad: f32,
        buffer: &'b mut Block,
    ) -> &'b Block
    where
        'a: 'b,
    {
        match self {
            Self::F32(row) => {
                let row = &row[start..start + len];
                if let Some(whole) = row.first_chunk() {
                    return whole;
                }
                buffer[..len].copy_from_slice(row);
            }
            Self::Bf16(row) => {
                for (out, &z) in buffer.iter_mut().zip(&row[start..start + len]) {
                    *out = widen_bf16(z);
                }
            }
            Self::F16(row) => {
                for (out, &z) in buffer.iter_mut().zip(&row[start..start + len]) {
                    *out = widen_f16(z);
                }
            }
        }
        buffer[len..len.next_multiple_of(UNIT)].fill(pad);
        buffer
    }
}

/// A number that is read as the float32 that equals it.
pub(crate) trait Widen: Copy + Sync {
    fn widen(self) -> f32;

    /// Numbers that need no conversion.
    #[inline(always)]
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        let _ = values;
        None
    }
}

impl Widen for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
}

impl Widen for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_bf16(self)
    }
}

impl Widen for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_f16(self)
    }
}

/// Converts as many values as there are.
#[inline(always)]
pub(crate) fn widened_into<T: Widen>(values: &[T], out: &mut [f32]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = value.widen();
    }
}

#[inline(always)]
fn widen_bf16(z: bf16) -> f32 {
    f32::from_bits(u32::from(z.to_bits()) << 16)
}

/// Exact without a branch: the exponent's bias is a factor, which normalises subnormal numbers too. The
/// `half` crate looks up the processor's features for every value.
#[inline(always)]
fn widen_f16(z: f16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(z.to_bits());
    let magnitude = f32::from_bits((bits & 0x7FFF) << 13) * BIAS;
    let special = if bits & 0x7C00 == 0x7C00 {
        0x7F80_0000
    } else {
        0
    };
    f32::from_bits(magnitude.to_bits() | special | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_exactly() {
        for bits in 0..=u16::MAX {
            let (a, b) = (bf16::from_bits(bits), f16::from_bits(bits));
            for (got, want) in [
                (widen_bf16(a), a.to_f32_const()),
                (widen_f16(b), b.to_f32_const()),
            ] {
                assert!(
                    got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                    "{bits:#x}: {got} {want}"
                );
            }
        }
    }
}
