//! The body of the compact encoding: gaps between sorted ids in Golomb-Rice code, probabilities in logarithmic steps.
//!
//! Everything is integer arithmetic and IEEE 754 multiplication, division and square root, so that bytes and decoded
//! probabilities are the same on every machine. Source of the code: Rice and Plaunt, 1971.

use crate::error::{DecodeError, Part};
use crate::packet::BeliefPacket;

/// Largest parameter of the Golomb-Rice code that a list of ids can ask for.
pub(crate) const MAX_RICE: u8 = 23;

/// Largest scale: steps of 2^-10 octaves.
pub(crate) const MAX_SCALE: u8 = 7;

/// Bytes before the ids: scale and Rice parameter.
pub(crate) const PARAMS_LEN: usize = 2;

/// The code of probability zero; the codes below it count steps down from the largest probability.
const ZERO: u8 = 255;

/// The largest code of a probability that is not zero.
const LAST: u8 = ZERO - 1;

/// Steps to the octave at scale 0 are 2 to this power; each scale doubles them.
const COARSEST: u32 = 3;

/// A packet in the terms of the wire.
pub(crate) struct Body {
    rice: u8,
    scale: u8,
    /// (id, code), by id.
    entries: Vec<(u32, u8)>,
    /// Length of the ids part in bits.
    bits: usize,
}

impl Body {
    pub(crate) fn new(packet: &BeliefPacket) -> Self {
        let (scale, codes) = quantise(packet.probs());
        let mut entries: Vec<(u32, u8)> = packet.ids().iter().copied().zip(codes).collect();
        entries.sort_unstable();
        let (rice, bits) = {
            let gaps = || gaps(entries.iter().map(|entry| entry.0));
            let rice = best_rice(entries.len(), gaps);
            let quotients: usize = gaps().map(|gap| (gap >> rice) as usize).sum();
            (rice, entries.len() * (usize::from(rice) + 1) + quotients)
        };
        Self {
            rice,
            scale,
            entries,
            bits,
        }
    }

    /// Length in bytes: parameters, ids and codes.
    pub(crate) fn len(&self) -> usize {
        PARAMS_LEN + self.bits.div_ceil(8) + self.entries.len()
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.scale, self.rice]);
        let start = out.len();
        out.resize(start + self.bits.div_ceil(8), 0);
        let part = &mut out[start..];
        let width = usize::from(self.rice);
        let mut unary = self.entries.len() * width;
        for (index, gap) in gaps(self.entries.iter().map(|entry| entry.0)).enumerate() {
            let at = index * width;
            let low = (gap & ((1 << width) - 1)) << (at % 8);
            // A width of 23 and an offset of 7 still fit 32 bits.
            for (byte, bits) in part[at / 8..].iter_mut().zip(low.to_le_bytes()) {
                *byte |= bits;
            }
            unary += (gap >> self.rice) as usize;
            part[unary / 8] |= 1 << (unary % 8);
            unary += 1;
        }
        out.extend(self.entries.iter().map(|entry| entry.1));
    }
}

/// An upper bound of the length in bytes of the body of `k` ids below `vocab`.
pub(crate) const fn max_len(k: usize, vocab: u32) -> usize {
    // The gaps sum to at most this, and so do their quotients when shifted.
    let gaps = (vocab as usize).saturating_sub(k);
    let mut bits = usize::MAX;
    let mut rice = 0;
    while rice <= MAX_RICE as usize {
        let with = k * (rice + 1) + (gaps >> rice);
        if with < bits {
            bits = with;
        }
        rice += 1;
    }
    PARAMS_LEN + bits.div_ceil(8) + k
}

/// What stands between consecutive ids: the first id, then each less its predecessor and 1.
fn gaps(ids: impl Iterator<Item = u32>) -> impl Iterator<Item = u32> {
    ids.scan(0_u32, |next, id| {
        let gap = id - *next;
        *next = id + 1;
        Some(gap)
    })
}

/// By how many bits one more bit in the remainders shortens the quotients.
fn saved(gap: u32, rice: u8) -> usize {
    ((gap >> rice) as usize).div_ceil(2)
}

/// The least parameter at which one more would not shorten the code. The saving only falls as the parameter grows, so
/// there the code is shortest.
fn best_rice<I: Iterator<Item = u32>>(k: usize, gaps: impl Fn() -> I) -> u8 {
    let (mut low, mut high) = (0, MAX_RICE);
    while low < high {
        let middle = u8::midpoint(low, high);
        if gaps().map(|gap| saved(gap, middle)).sum::<usize>() <= k {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
}

/// Half to the power of 2^-`roots`, by square roots.
fn root_of_half(roots: u32) -> f64 {
    (0..roots).fold(0.5, |root: f64, _| root.sqrt())
}

/// What each code stands for, as a fraction of the largest probability: half to the power `code` x 2^-(3 + scale), as
/// the product over the bits of the code, least significant first.
fn levels(scale: u8) -> [f64; LAST as usize + 1] {
    let depth = COARSEST + u32::from(scale);
    let mut levels = [1.0; LAST as usize + 1];
    for bit in 0..u8::BITS {
        let factor = if bit < depth {
            root_of_half(depth - bit)
        } else {
            (depth..bit).fold(0.5, |factor, _| factor * factor)
        };
        let below = 1 << bit;
        for code in 0..below.min(levels.len() - below) {
            levels[below + code] = levels[code] * factor;
        }
    }
    levels
}

/// Half a step at this scale, as a factor.
fn half_step(scale: u8) -> f64 {
    root_of_half(COARSEST + u32::from(scale) + 1)
}

/// The scale, and the code of each probability, given in packet order.
fn quantise(probs: &[f32]) -> (u8, Vec<u8>) {
    let largest = f64::from(probs[0]);
    let smallest = probs
        .iter()
        .rfind(|prob| **prob > 0.0)
        .map_or(largest, |prob| f64::from(*prob));
    let mut scale = 0;
    let mut levels = levels(scale);
    // As fine as 8 bits allow. A largest code of 127 may become 255, which 254 stands in for.
    while scale < MAX_SCALE && smallest >= largest * (levels[127] * half_step(scale)) {
        scale += 1;
        levels = self::levels(scale);
    }
    let half = half_step(scale);
    // Probabilities below the n-th bound are more than n steps down, rounded to nearest.
    let bounds: Vec<f64> = levels[..usize::from(LAST)]
        .iter()
        .map(|level| largest * (level * half))
        .collect();
    let codes = probs
        .iter()
        .map(|&prob| {
            if prob == 0.0 {
                ZERO
            } else {
                bounds.partition_point(|bound| f64::from(prob) < *bound) as u8
            }
        })
        .collect();
    (scale, codes)
}

/// A body whose extent is known and whose content is not yet checked.
pub(crate) struct Raw<'a> {
    k: usize,
    vocab: u32,
    scale: u8,
    rice: u8,
    ids: &'a [u8],
    /// Bits of `ids` in use.
    bits: usize,
    codes: &'a [u8],
    /// Where the body starts, for errors.
    offset: usize,
}

impl<'a> Raw<'a> {
    /// Finds where the body at the front of `bytes` ends. Allocates nothing.
    pub(crate) fn measure(
        bytes: &'a [u8],
        k: usize,
        vocab: u32,
        offset: usize,
    ) -> Result<Self, DecodeError> {
        let Some((&[scale, rice], rest)) = bytes.split_first_chunk::<PARAMS_LEN>() else {
            return Err(DecodeError::Truncated {
                offset,
                part: Part::Params,
                needed: PARAMS_LEN,
                available: bytes.len(),
            });
        };
        if rice > MAX_RICE {
            return Err(DecodeError::RiceOverLimit {
                offset: offset + 1,
                rice,
            });
        }
        let bits = ids_bits(rest, k, vocab, rice, offset + PARAMS_LEN)?;
        // It counted bits that are there.
        let (ids, rest) = rest.split_at(bits.div_ceil(8));
        let Some(codes) = rest.get(..k) else {
            return Err(DecodeError::Truncated {
                offset: offset + PARAMS_LEN + ids.len(),
                part: Part::Probs,
                needed: k,
                available: rest.len(),
            });
        };
        Ok(Self {
            k,
            vocab,
            scale,
            rice,
            ids,
            bits,
            codes,
            offset,
        })
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        PARAMS_LEN + self.ids.len() + self.codes.len()
    }

    /// Ids and probabilities in packet order; the probabilities are normalised.
    pub(crate) fn read(&self) -> Result<(Vec<u32>, Vec<f32>), DecodeError> {
        let sorted = self.read_ids()?;
        let levels = self.read_levels()?;
        // A counting sort by code; within a code the ids ascend as they come.
        let mut place = [0_usize; 257];
        for &code in self.codes {
            place[usize::from(code) + 1] += 1;
        }
        for code in 0..256 {
            place[code + 1] += place[code];
        }
        let mut ids = vec![0; self.k];
        let mut values = vec![0_u8; self.k];
        for (&id, &code) in sorted.iter().zip(self.codes) {
            let to = &mut place[usize::from(code)];
            ids[*to] = id;
            values[*to] = code;
            *to += 1;
        }
        let level = |code: &u8| levels.get(usize::from(*code)).copied().unwrap_or(0.0);
        let sum: f64 = values.iter().map(level).sum();
        let probs = values.iter().map(|code| (level(code) / sum) as f32);
        Ok((ids, probs.collect()))
    }

    fn read_ids(&self) -> Result<Vec<u32>, DecodeError> {
        let offset = self.offset + PARAMS_LEN;
        let width = usize::from(self.rice);
        let mut ids = Vec::with_capacity(self.k);
        let mut unary = self.k * width;
        // With this parameter and with one less.
        let (mut saving, mut saving_before) = (0, 0);
        let mut next = 0_u64;
        for index in 0..self.k {
            // `measure` saw k ones.
            let one = next_one(self.ids, unary).unwrap_or(unary);
            let gap = ((one - unary) as u64) << width
                | u64::from(bits_at(self.ids, index * width, width));
            let id = next + gap;
            if id >= u64::from(self.vocab) {
                return Err(DecodeError::IdOutOfRange {
                    offset,
                    index,
                    // At most twice the limit of the vocabulary.
                    id: id as u32,
                    vocab: self.vocab,
                });
            }
            saving += saved(gap as u32, self.rice);
            saving_before += saved(gap as u32, self.rice.saturating_sub(1));
            ids.push(id as u32);
            next = id + 1;
            unary = one + 1;
        }
        if let Some(&last) = self.ids.last()
            && !self.bits.is_multiple_of(8)
            && last >> (self.bits % 8) != 0
        {
            return Err(DecodeError::PaddingNotZero {
                offset: offset + self.ids.len() - 1,
                value: last,
            });
        }
        if saving > self.k || (self.rice > 0 && saving_before <= self.k) {
            return Err(DecodeError::RiceNotCanonical {
                offset: self.offset + 1,
                rice: self.rice,
            });
        }
        Ok(ids)
    }

    /// Checks scale and codes.
    fn read_levels(&self) -> Result<[f64; LAST as usize + 1], DecodeError> {
        let scale = self.scale;
        if scale > MAX_SCALE {
            return Err(DecodeError::ScaleOverLimit {
                offset: self.offset,
                scale,
            });
        }
        if !self.codes.contains(&0) {
            return Err(DecodeError::TopMissing {
                offset: self.offset + PARAMS_LEN + self.ids.len(),
            });
        }
        let largest = self.codes.iter().filter(|code| **code != ZERO).max();
        if scale < MAX_SCALE && largest.is_none_or(|code| *code < 128) {
            return Err(DecodeError::ScaleNotCanonical {
                offset: self.offset,
                scale,
            });
        }
        Ok(levels(scale))
    }
}

/// Length in bits of the ids part at the front of `bytes`, padding excluded.
fn ids_bits(
    bytes: &[u8],
    k: usize,
    vocab: u32,
    rice: u8,
    offset: usize,
) -> Result<usize, DecodeError> {
    // Ids below the vocabulary have no longer quotients in all; more zeros would be a search through what follows.
    let limit = (vocab as usize - 1) >> rice;
    let start = k * usize::from(rice);
    let (mut ones, mut zeros) = (0, 0);
    let mut at = start;
    while let Some(&byte) = bytes.get(at / 8) {
        let skip = at % 8;
        let byte = byte >> skip;
        let count = byte.count_ones() as usize;
        if ones + count >= k {
            let mut left = byte;
            for _ in 1..k - ones {
                left &= left - 1;
            }
            let end = at + left.trailing_zeros() as usize + 1;
            zeros = end - start - k;
            if zeros > limit {
                break;
            }
            return Ok(end);
        }
        ones += count;
        zeros += 8 - skip - count;
        if zeros > limit {
            break;
        }
        at += 8 - skip;
    }
    if zeros > limit {
        return Err(DecodeError::IdsOverrun { offset, limit });
    }
    Err(DecodeError::Truncated {
        offset,
        part: Part::Ids,
        // Each one that is missing is another bit, at least.
        needed: (start + zeros + k).div_ceil(8),
        available: bytes.len(),
    })
}

/// Position of the first set bit from bit `at` on.
fn next_one(bytes: &[u8], at: usize) -> Option<usize> {
    let first = bytes.get(at / 8)? >> (at % 8);
    if first != 0 {
        return Some(at + first.trailing_zeros() as usize);
    }
    let rest = &bytes[at / 8 + 1..];
    let skipped = rest.iter().position(|byte| *byte != 0)?;
    Some((at / 8 + 1 + skipped) * 8 + rest[skipped].trailing_zeros() as usize)
}

/// `width` bits, at most 23, from bit `at` on.
fn bits_at(bytes: &[u8], at: usize, width: usize) -> u32 {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(&bytes[at / 8..]) {
        *to = *from;
    }
    (u32::from_le_bytes(word) >> (at % 8)) & ((1 << width) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_powers_of_half() {
        for scale in 0..=MAX_SCALE {
            let steps = f64::from(1 << (COARSEST + u32::from(scale)));
            for (code, level) in levels(scale).into_iter().enumerate() {
                let exact = (-(code as f64) / steps).exp2();
                assert!(((level - exact) / exact).abs() < 1e-14, "{scale} {code}");
            }
            let exact = (-0.5 / steps).exp2();
            assert!((half_step(scale) - exact).abs() < 1e-14);
        }
    }

    #[test]
    fn the_parameter_makes_the_shortest_code() {
        let lists: [&[u32]; 6] = [
            &[0],
            &[16_777_215],
            &[0, 1, 2, 3, 4, 5],
            &[0, 1, 2, 3, 4, 151_664],
            &[17, 900, 901, 5_000, 80_000],
            &[3, 7, 11, 15, 19, 23],
        ];
        for ids in lists {
            let cost = |rice: u8| -> usize {
                gaps(ids.iter().copied())
                    .map(|gap| usize::from(rice) + 1 + (gap >> rice) as usize)
                    .sum()
            };
            let best = (0..=31).min_by_key(|rice| cost(*rice)).unwrap();
            assert_eq!(best_rice(ids.len(), || gaps(ids.iter().copied())), best);
        }
    }
}
