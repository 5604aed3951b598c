//! Named random draws: a draw depends on what it is for, never on when or where it is made.

use crate::philox::philox4x64;

/// What a draw is for. The numbers are part of the stream's definition and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Purpose {
    /// Gumbel noise on a packet entry.
    Gumbel = 1,
    /// Gamma draw behind a Dirichlet packet entry.
    Dirichlet = 2,
    /// Choice of an explicit token.
    Token = 3,
    /// Permutation of ids in a control.
    Shuffle = 4,
    /// Choice of an expert.
    Expert = 5,
    /// Direction of the control noise of a given divergence.
    Tilt = 6,
    /// Choice of another item's packet or transcript in a control.
    Donor = 7,
    /// Choice of an item in a bootstrap sample.
    Resample = 8,
}

/// The stream of one sample at one step.
///
/// Draws come from Philox4x64-10 with `key = (seed, 0)` and
/// `counter = (sample, step, token, purpose << 32 | attempt)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stream {
    /// Seed of the run.
    pub seed: u64,
    /// Hash of item, sample index and agent: see [`sample_key`].
    pub sample: u64,
    /// Step within the sample.
    pub step: u64,
}

impl Stream {
    /// The 256 random bits of one (token, purpose, attempt).
    #[must_use]
    pub fn bits(&self, token: u64, purpose: Purpose, attempt: u32) -> [u64; 4] {
        let last = (u64::from(purpose as u32) << 32) | u64::from(attempt);
        philox4x64([self.sample, self.step, token, last], [self.seed, 0])
    }

    /// Uniform in the open interval (0, 1), from the first word of [`Stream::bits`].
    #[must_use]
    pub fn uniform(&self, token: u64, purpose: Purpose, attempt: u32) -> f64 {
        let [word, ..] = self.bits(token, purpose, attempt);
        unit(word)
    }

    /// Standard normal (Box and Muller), from the first two words of [`Stream::bits`].
    #[must_use]
    pub fn normal(&self, token: u64, purpose: Purpose, attempt: u32) -> f64 {
        let [radius, angle, ..] = self.bits(token, purpose, attempt);
        box_muller(radius, angle)
    }
}

/// Maps a word to the odd multiples of 2^-53 in (0, 1): `(word >> 12 + 1/2) 2^-52`.
///
/// One more bit would make the largest value round to 1.
pub(crate) fn unit(word: u64) -> f64 {
    const STEP: f64 = 1.0 / (1_u64 << 52) as f64;
    ((word >> 12) as f64 + 0.5) * STEP
}

/// `sqrt(-2 ln u) cos(2 pi w)` for the uniforms of two words.
pub(crate) fn box_muller(radius: u64, angle: u64) -> f64 {
    libm::sqrt(-2.0 * libm::log(unit(radius))) * libm::cos(std::f64::consts::TAU * unit(angle))
}

/// Stable 64-bit key of one sample of one item for one agent.
///
/// FNV-1a (64 bits) over the UTF-8 bytes of `item`, the byte `0xFF` (which UTF-8 never contains),
/// and `sample` and `agent` as little-endian u32; then the SplitMix64 finaliser. Part of what makes
/// a run reproducible: changing it changes every seeded result.
#[must_use]
pub fn sample_key(item: &str, sample: u32, agent: u32) -> u64 {
    const OFFSET: u64 = 0xCBF2_9CE4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01B3;
    let hash = item
        .bytes()
        .chain([0xFF])
        .chain(sample.to_le_bytes())
        .chain(agent.to_le_bytes())
        .fold(OFFSET, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(PRIME)
        });
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_open_at_both_ends_and_symmetric() {
        assert_eq!(unit(0), 2.0_f64.powi(-53));
        assert_eq!(unit(u64::MAX), 1.0 - 2.0_f64.powi(-53));
        assert_eq!(unit(1 << 63), 0.5 + 2.0_f64.powi(-53));
        assert_eq!(unit(12345 << 30) + unit(!(12345 << 30)), 1.0);
    }

    #[test]
    fn normals_are_finite_at_the_extremes() {
        assert!(box_muller(0, 0) > 8.5);
        assert!(box_muller(0, 1 << 63) < -8.5);
        assert!(box_muller(u64::MAX, 0).abs() < 1e-7);
    }
}
