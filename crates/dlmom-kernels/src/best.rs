//! The largest entries of a row that comes in blocks.

use std::cmp::Ordering;

const LANES: usize = 16;

/// Gathers the `k` largest values under the project's order: value descending, then id ascending.
///
/// Candidates gather up to twice k, then only the best k stay and set the bar for the rest. Blocks come
/// in ascending order of ids, so that a value equal to the bar comes after it. NaN is passed over.
#[derive(Clone, Debug, Default)]
pub(crate) struct Best {
    k: usize,
    room: usize,
    bar: Option<f32>,
    entries: Vec<(u32, f32)>,
}

impl Best {
    pub(crate) fn reset(&mut self, k: usize, vocab: usize) {
        self.k = k.min(vocab);
        self.room = self.k.saturating_mul(2).min(vocab);
        self.bar = None;
        self.entries.clear();
    }

    /// The values from id `first` on, and their maximum.
    #[inline(always)]
    pub(crate) fn offer(&mut self, first: usize, values: &[f32], max: f32) {
        if self.k == 0 || self.bar.is_some_and(|bar| max <= bar) {
            return;
        }
        for (index, group) in values.chunks(LANES).enumerate() {
            if let (Some(bar), Ok(group)) = (self.bar, <&[f32; LANES]>::try_from(group)) {
                let mut above = false;
                for &value in group {
                    above |= value > bar;
                }
                if !above {
                    continue;
                }
            }
            self.push((first + index * LANES) as u32, group);
        }
    }

    #[inline(never)]
    fn push(&mut self, first: u32, group: &[f32]) {
        for (id, &value) in (first..).zip(group) {
            if self.bar.is_some_and(|bar| value <= bar) || value.is_nan() {
                continue;
            }
            self.entries.push((id, value));
            if self.entries.len() == self.room && self.k < self.room {
                self.keep();
                self.bar = self.entries.last().map(|entry| entry.1);
            }
        }
    }

    /// Leaves the best k, the last of them in its place.
    fn keep(&mut self) {
        if self.entries.len() > self.k {
            self.entries
                .select_nth_unstable_by(self.k - 1, by_value_then_id);
            self.entries.truncate(self.k);
        }
    }

    /// Appends the candidates of another part of the row.
    pub(crate) fn absorb(&mut self, other: &Self) {
        self.entries.extend_from_slice(&other.entries);
    }

    /// The best, in order.
    pub(crate) fn finish(&mut self) -> &mut Vec<(u32, f32)> {
        self.keep();
        self.entries.sort_unstable_by(by_value_then_id);
        &mut self.entries
    }
}

/// The order of every list in the project, without the reference's place for NaN, which would cost a round of the
/// loop 2 % of its instructions.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the shape of a sort's comparison"
)]
pub(crate) fn by_value_then_id(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    let values = b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal);
    values.then(a.0.cmp(&b.0))
}
