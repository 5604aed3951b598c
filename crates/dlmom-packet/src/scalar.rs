//! The three floating-point types of the wire.

use std::fmt;

use half::{bf16, f16};

/// A floating-point type of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Scalar {
    /// IEEE 754 binary32: lossless.
    #[default]
    F32,
    /// IEEE 754 binary16, rounded to nearest even.
    F16,
    /// bfloat16, rounded to nearest even.
    Bf16,
}

impl Scalar {
    /// Every type, in the order of their tags.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> usize {
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

    /// 1, 2 or 3: the place in [`ALL`](Self::ALL), from 1.
    pub(crate) const fn tag(self) -> u8 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
        }
    }

    pub(crate) const fn from_tag(tag: u8) -> Option<Self> {
        match tag {
            1 => Some(Self::F32),
            2 => Some(Self::F16),
            3 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Whether the nearest value of this type is finite.
    pub(crate) fn holds(self, value: f32) -> bool {
        match self {
            Self::F32 => value.is_finite(),
            Self::F16 => f16::from_f32(value).is_finite(),
            Self::Bf16 => bf16::from_f32(value).is_finite(),
        }
    }

    pub(crate) fn write(self, values: impl Iterator<Item = f32>, out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(values.flat_map(f32::to_le_bytes)),
            Self::F16 => out.extend(values.flat_map(|v| f16::from_f32(v).to_le_bytes())),
            Self::Bf16 => out.extend(values.flat_map(|v| bf16::from_f32(v).to_le_bytes())),
        }
    }

    /// The values that `bytes` are, widened exactly.
    pub(crate) fn read(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::F32 => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            Self::F16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b).to_f32())
                .collect(),
            Self::Bf16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b).to_f32())
                .collect(),
        }
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
