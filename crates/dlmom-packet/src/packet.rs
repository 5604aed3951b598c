//! The belief packet itself: a sparse next-token distribution in one canonical order.

use crate::error::PacketError;

/// The most entries a packet may hold. Part of the format.
pub const MAX_K: usize = 1 << 20;

/// The largest vocabulary a packet may refer to. Part of the format.
pub const MAX_VOCAB: u32 = 1 << 24;

/// How far from 1 the probabilities given to [`BeliefPacket::new`] may sum, and how far above 1 a mass may lie.
pub const INPUT_TOLERANCE: f64 = 1e-3;

/// Probabilities whose f64 sum, taken in packet order, is within this of 1 count as normalised and are never touched.
/// Part of the format.
pub const NORM_SLACK: f64 = 1e-6;

/// The top-k of a next-token distribution: what one agent tells another at a latent step.
///
/// Entries are sorted by probability descending, then id ascending; ids are unique and below `vocab`; probabilities are
/// in `[0, 1]` without a negative zero and sum to 1 within [`NORM_SLACK`]; `mass`, in `(0, 1]`, is what those entries
/// held of the whole distribution before they were renormalised. A value of this type always satisfies all of it, so
/// equality of packets is equality of bits.
///
/// Source: the belief exchange of CIPHER (arXiv 2310.06272), made sparse by DL-MoM (Beckwith, 2025).
#[derive(Debug, Clone, PartialEq)]
pub struct BeliefPacket {
    ids: Vec<u32>,
    probs: Vec<f32>,
    mass: f32,
    vocab: u32,
}

// No NaN can enter, so equality is reflexive.
impl Eq for BeliefPacket {}

impl BeliefPacket {
    /// Builds a packet from parallel arrays in any order.
    ///
    /// The entries are sorted. Probabilities whose sum is further than [`NORM_SLACK`] from 1 are divided by it, in f64;
    /// otherwise they are kept bit for bit, so feeding a packet's own parts back gives the same packet. A mass up to
    /// [`INPUT_TOLERANCE`] above 1 becomes 1: a softmax in f32 may sum to that.
    ///
    /// # Errors
    /// One [`PacketError`] for each broken rule: lengths differ, no entry, too many entries, a vocabulary over the
    /// limit or smaller than k, an id out of range or repeated, a probability not finite or negative, a sum further
    /// than [`INPUT_TOLERANCE`] from 1, a mass not in (0, 1].
    pub fn new(
        ids: Vec<u32>,
        mut probs: Vec<f32>,
        mass: f32,
        vocab: u32,
    ) -> Result<Self, PacketError> {
        if ids.len() != probs.len() {
            return Err(PacketError::LengthMismatch {
                ids: ids.len(),
                probs: probs.len(),
            });
        }
        let k = ids.len();
        if k == 0 {
            return Err(PacketError::KZero);
        }
        if k > MAX_K {
            return Err(PacketError::KOverLimit { k });
        }
        if vocab > MAX_VOCAB {
            return Err(PacketError::VocabOverLimit { vocab });
        }
        if k > vocab as usize {
            return Err(PacketError::KOverVocab { k, vocab });
        }
        for (index, (&id, prob)) in ids.iter().zip(&mut probs).enumerate() {
            if id >= vocab {
                return Err(PacketError::IdOutOfRange { index, id, vocab });
            }
            if !prob.is_finite() {
                return Err(PacketError::ProbNotFinite {
                    index,
                    id,
                    prob: *prob,
                });
            }
            if *prob < 0.0 {
                return Err(PacketError::ProbNegative {
                    index,
                    id,
                    prob: *prob,
                });
            }
            // -0.0 + 0.0 is +0.0: one representation of zero, so that equal packets have equal bytes.
            *prob += 0.0;
        }
        let mass = if mass > 0.0 && f64::from(mass) <= 1.0 + INPUT_TOLERANCE {
            mass.min(1.0)
        } else {
            return Err(PacketError::MassOutOfRange { mass });
        };
        if let Some((first, second)) = first_duplicate(&ids) {
            return Err(PacketError::DuplicateId {
                first,
                second,
                id: ids[first],
            });
        }

        let mut packet = Self {
            ids,
            probs,
            mass,
            vocab,
        };
        // Sorted before it is summed: the decision to renormalise must not depend on the caller's order.
        packet.sort();
        let sum = sum(&packet.probs);
        if (sum - 1.0).abs() > INPUT_TOLERANCE {
            return Err(PacketError::SumOff {
                sum,
                tolerance: INPUT_TOLERANCE,
            });
        }
        if renormalise(&mut packet.probs, sum) {
            // Rounding may have made ties of values that were apart, and ties go by id.
            packet.sort();
        }
        Ok(packet)
    }

    /// The packet of one certain token: how an explicit step is fed. Its mass is 1.
    ///
    /// # Errors
    /// [`PacketError::VocabOverLimit`], [`PacketError::KOverVocab`] (an empty vocabulary) or
    /// [`PacketError::IdOutOfRange`].
    pub fn one_hot(id: u32, vocab: u32) -> Result<Self, PacketError> {
        Self::new(vec![id], vec![1.0], 1.0, vocab)
    }

    /// The same ids and mass with other probabilities, given in the order of [`ids`](Self::ids): how noise is applied.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_probs(&self, probs: Vec<f32>) -> Result<Self, PacketError> {
        Self::new(self.ids.clone(), probs, self.mass, self.vocab)
    }

    /// Wraps parts that the decoder has checked: everything but the sum, which is `sum`.
    pub(crate) fn from_checked(
        ids: Vec<u32>,
        mut probs: Vec<f32>,
        mass: f32,
        vocab: u32,
        sum: f64,
    ) -> Self {
        renormalise(&mut probs, sum);
        Self {
            ids,
            probs,
            mass,
            vocab,
        }
    }

    /// Token ids, `k` of them, in packet order.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Probabilities, `k` of them, in packet order (descending).
    #[must_use]
    pub fn probs(&self) -> &[f32] {
        &self.probs
    }

    /// Probability that these entries held in the whole distribution, before renormalisation.
    #[must_use]
    pub fn mass(&self) -> f32 {
        self.mass
    }

    /// Number of tokens of the vocabulary that the ids belong to.
    #[must_use]
    pub fn vocab(&self) -> u32 {
        self.vocab
    }

    /// Number of entries, at least 1.
    #[must_use]
    pub fn k(&self) -> usize {
        self.ids.len()
    }

    /// The likeliest token and its probability.
    #[must_use]
    pub fn top(&self) -> (u32, f32) {
        (self.ids[0], self.probs[0])
    }

    /// Entries as (id, probability) in packet order.
    #[must_use]
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (u32, f32)> + '_ {
        self.ids.iter().copied().zip(self.probs.iter().copied())
    }

    /// Takes the arrays out: ids and probabilities in packet order.
    #[must_use]
    pub fn into_parts(self) -> (Vec<u32>, Vec<f32>) {
        (self.ids, self.probs)
    }

    fn sort(&mut self) {
        if first_out_of_order(&self.ids, &self.probs).is_none() {
            return;
        }
        let mut entries: Vec<(f32, u32)> = self
            .probs
            .iter()
            .copied()
            .zip(self.ids.iter().copied())
            .collect();
        entries.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for ((prob, id), (p, i)) in entries
            .into_iter()
            .zip(self.probs.iter_mut().zip(&mut self.ids))
        {
            *p = prob;
            *i = id;
        }
    }
}

/// Sum in f64, in the order of the slice; the order is part of the format.
pub(crate) fn sum(probs: &[f32]) -> f64 {
    probs.iter().copied().map(f64::from).sum()
}

/// Divides by `sum` if that is further than [`NORM_SLACK`] from 1, and says whether it did.
pub(crate) fn renormalise(probs: &mut [f32], sum: f64) -> bool {
    let divide = (sum - 1.0).abs() > NORM_SLACK;
    for prob in probs {
        // Within the slack a single value may still be a little above 1.
        *prob = if divide {
            (f64::from(*prob) / sum) as f32
        } else {
            prob.min(1.0)
        };
    }
    divide
}

/// Position of the first entry that belongs before its predecessor.
pub(crate) fn first_out_of_order(ids: &[u32], probs: &[f32]) -> Option<usize> {
    let before = ids.iter().zip(probs);
    let after = before.clone().skip(1);
    before
        .zip(after)
        .position(|((i, p), (j, q))| !(p > q || (p == q && i < j)))
        .map(|position| position + 1)
}

/// The two positions of an id that occurs twice. Allocates one copy of the ids.
pub(crate) fn first_duplicate(ids: &[u32]) -> Option<(usize, usize)> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    let repeated = sorted.windows(2).find(|pair| pair[0] == pair[1])?[0];
    let mut places = ids
        .iter()
        .enumerate()
        .filter(|&(_, &id)| id == repeated)
        .map(|(place, _)| place);
    Some((places.next()?, places.next()?))
}
