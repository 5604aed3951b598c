//! Entropies as ranks among those of a pilot run: the unit `quantile` of the controller.

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

/// Quantiles of a pilot's normalised entropies, at equal steps from the smallest to the largest.
///
/// Written as the list of its values. The rank of an entropy is the share of the pilot below it,
/// interpolated between neighbouring quantiles.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(transparent)]
pub struct Ranks {
    /// At least 2, ascending; the i-th of n is the quantile `i / (n - 1)`.
    values: Vec<f64>,
}

/// A list that cannot be quantiles.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RanksError {
    /// Fewer than two values.
    #[error("{count} quantiles; at least 2 are needed")]
    TooFew {
        /// How many there are.
        count: usize,
    },
    /// A value that is not finite, or below its predecessor.
    #[error("quantile {at} is not a finite number of at least the one before it")]
    Order {
        /// Its place, from 0.
        at: usize,
    },
}

impl<'de> Deserialize<'de> for Ranks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Vec::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

impl Ranks {
    /// Quantiles at equal steps, smallest first.
    ///
    /// # Errors
    /// [`RanksError`] for fewer than two values, and for one that is not finite or out of order.
    pub fn new(values: Vec<f64>) -> Result<Self, RanksError> {
        if values.len() < 2 {
            let count = values.len();
            return Err(RanksError::TooFew { count });
        }
        let bad = (0..values.len())
            .find(|&i| !values[i].is_finite() || (i > 0 && values[i] < values[i - 1]));
        match bad {
            Some(at) => Err(RanksError::Order { at }),
            None => Ok(Self { values }),
        }
    }

    /// The ranks of a uniform sample: every entropy of the unit interval is its own.
    #[must_use]
    pub fn identity() -> Self {
        Self {
            values: vec![0.0, 1.0],
        }
    }

    /// The `count` quantiles of a sample in any order, interpolated linearly between its order
    /// statistics (R's type 7).
    ///
    /// # Errors
    /// [`RanksError`] for fewer than two quantiles or values, and for a value that is not finite.
    pub fn of(sample: &[f64], count: usize) -> Result<Self, RanksError> {
        if sample.len() < 2 || count < 2 {
            let count = sample.len().min(count);
            return Err(RanksError::TooFew { count });
        }
        let mut sorted = sample.to_vec();
        sorted.sort_by(f64::total_cmp);
        let sorted = Self::new(sorted)?;
        let step = 1.0 / (count - 1) as f64;
        Self::new((0..count).map(|i| sorted.value(i as f64 * step)).collect())
    }

    /// The quantile `q`, clamped to `[0, 1]`.
    #[must_use]
    pub fn value(&self, q: f64) -> f64 {
        let last = self.values.len() - 1;
        let place = (q.clamp(0.0, 1.0) * last as f64).min(last as f64);
        let below = (place.floor() as usize).min(last - 1);
        let (a, b) = (self.values[below], self.values[below + 1]);
        // At either end the value itself: a + 1 (b - a) may round past b.
        match place - below as f64 {
            0.0 => a,
            1.0 => b,
            share => (a + share * (b - a)).clamp(a, b),
        }
    }

    /// The rank of `h`, in `[0, 1]`: the smallest q whose quantile is at least `h`; 1 above them all.
    ///
    /// So `rank(h) > q` exactly where `h` is above the quantile q, up to rounding.
    #[must_use]
    pub fn rank(&self, h: f64) -> f64 {
        let last = (self.values.len() - 1) as f64;
        let above = self.values.partition_point(|&v| v < h);
        if above == 0 {
            return 0.0;
        }
        let Some(&b) = self.values.get(above) else {
            return 1.0;
        };
        let a = self.values[above - 1];
        // Here a < h <= b.
        ((above - 1) as f64 + (h - a) / (b - a)) / last
    }

    /// The quantiles, smallest first.
    #[must_use]
    pub fn values(&self) -> &[f64] {
        &self.values
    }
}
