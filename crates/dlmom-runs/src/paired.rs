//! A cell against another one, item by item.

use dlmom_core::{Purpose, Stream};
use dlmom_eval::stats::{Interval, mcnemar_exact, mean, minimum_detectable_difference, quantile};
use serde::{Deserialize, Serialize};

use crate::fold::{CellRows, Slim};

/// Difference of two accuracies over shared items.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairedScore {
    /// This cell's accuracy minus the reference's, over the shared items.
    pub delta: f64,
    /// Items on which the cell does better.
    pub n01: u64,
    /// Items on which the reference does better.
    pub n10: u64,
    /// Exact two-sided p of that split under equal odds: McNemar's test where each item has one row, the sign test over
    /// items where it has several, because rows of one item are not independent.
    pub p_value: f64,
    /// The same, adjusted by Holm within the suite; null until the suite is aggregated.
    pub p_adjusted: Option<f64>,
    /// Smallest difference this many items would show with 80 % power at this discordance; null without discordant items.
    pub minimum_detectable: Option<f64>,
}

/// Comparison with the reference pipeline over shared samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Items both have.
    pub shared_items: u64,
    /// Pairs of rows behind them.
    pub shared_rows: u64,
    /// By strict answers.
    pub strict: PairedScore,
    /// By answers of any rule.
    pub flexible: PairedScore,
    /// Every pair agrees in text, latent steps, switches and the bits of the mean entropy.
    pub identical: bool,
}

/// Resamples of [`bootstrap`].
pub const RESAMPLES: usize = 10_000;

/// Compares over the items both have. Rows pair by seed and sample where both cells draw; where one of them cannot, its row of
/// the item pairs with every row of the other. `None` without a pair.
#[must_use]
pub fn compare(cell: &CellRows, reference: &CellRows) -> Option<Paired> {
    let mut rows = 0u64;
    let mut identical = true;
    let mut strict = Tally::default();
    let mut flexible = Tally::default();
    for pairs in pairs(cell, reference) {
        rows += pairs.len() as u64;
        identical &= pairs.iter().all(|(a, b)| a.output == b.output);
        strict.add(&pairs, |r| r.correct);
        flexible.add(&pairs, |r| r.correct_flexible);
    }
    (rows > 0).then(|| Paired {
        shared_items: strict.items,
        shared_rows: rows,
        strict: strict.score(),
        flexible: flexible.score(),
        identical,
    })
}

/// Whether every pair of rows agrees in what [`Paired::identical`] says, and there is one. Ends at the first that does not.
#[must_use]
pub fn identical(cell: &CellRows, other: &CellRows) -> bool {
    let mut pairs = pairs(cell, other).flatten().peekable();
    pairs.peek().is_some() && pairs.all(|(a, b)| a.output == b.output)
}

/// Pairs of rows of every item that both cells have, in the order of items; none is empty.
fn pairs<'a>(
    cell: &'a CellRows,
    other: &'a CellRows,
) -> impl Iterator<Item = Vec<(&'a Slim, &'a Slim)>> {
    let by_seed = !cell.deterministic && !other.deterministic;
    let same = |a: &Slim, b: &Slim| a.item == b.item;
    // Both are sorted by item.
    let mut theirs = other.rows.chunk_by(same).peekable();
    cell.rows.chunk_by(same).filter_map(move |group| {
        let item = &group[0].item;
        while theirs.next_if(|rows| rows[0].item < *item).is_some() {}
        let rows = theirs.next_if(|rows| rows[0].item == *item)?;
        let pairs: Vec<(&Slim, &Slim)> = group
            .iter()
            .flat_map(|a| rows.iter().map(move |b| (a, b)))
            .filter(|(a, b)| !by_seed || (a.seed, a.sample) == (b.seed, b.sample))
            .collect();
        (!pairs.is_empty()).then_some(pairs)
    })
}

/// The shares of an item's pairs in which the cell and the other are right, for each shared item.
#[must_use]
pub fn shares(cell: &CellRows, other: &CellRows, right: impl Fn(&Slim) -> bool) -> Vec<(f64, f64)> {
    pairs(cell, other)
        .map(|pairs| {
            let count = pairs.len() as f64;
            let ours = pairs.iter().filter(|(a, _)| right(a)).count();
            let theirs = pairs.iter().filter(|(_, b)| right(b)).count();
            (ours as f64 / count, theirs as f64 / count)
        })
        .collect()
}

/// The share of an item's pairs in which the cell is right, less that of the other: one number for each shared item, whose mean
/// is [`PairedScore::delta`].
#[must_use]
pub fn differences(cell: &CellRows, other: &CellRows, right: impl Fn(&Slim) -> bool) -> Vec<f64> {
    let score = |r: &Slim| f64::from(u8::from(right(r)));
    pairs(cell, other)
        .map(|pairs| {
            pairs.iter().map(|(a, b)| score(a) - score(b)).sum::<f64>() / pairs.len() as f64
        })
        .collect()
}

/// The paired bootstrap's 95 % interval of a mean: percentiles of the means of [`RESAMPLES`] samples of the items with
/// replacement (Efron and Tibshirani, 1993, chapter 13). The same values give the same interval. `None` for fewer than two.
#[must_use]
pub fn bootstrap(values: &[f64]) -> Option<Interval> {
    let n = values.len() as u64;
    if n < 2 {
        return None;
    }
    let place = |word: u64| ((u128::from(word) * u128::from(n)) >> 64) as usize;
    let mut means: Vec<f64> = (0..RESAMPLES as u64)
        .map(|sample| {
            let sum: f64 = (0..n.div_ceil(4))
                .flat_map(|step| {
                    let stream = Stream {
                        seed: n,
                        sample,
                        step,
                    };
                    stream.bits(0, Purpose::Resample, 0)
                })
                .take(values.len())
                .map(|word| values[place(word)])
                .sum();
            sum / n as f64
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let centre = mean(values)?;
    Some(Interval {
        lo: quantile(&means, 0.025)?.min(centre),
        hi: quantile(&means, 0.975)?.max(centre),
    })
}

#[derive(Default)]
struct Tally {
    items: u64,
    better: u64,
    worse: u64,
    delta: f64,
}

impl Tally {
    fn add(&mut self, pairs: &[(&Slim, &Slim)], right: impl Fn(&Slim) -> bool) {
        let ours = pairs.iter().filter(|(a, _)| right(a)).count();
        let theirs = pairs.iter().filter(|(_, b)| right(b)).count();
        self.items += 1;
        self.better += u64::from(ours > theirs);
        self.worse += u64::from(ours < theirs);
        self.delta += (ours as f64 - theirs as f64) / pairs.len() as f64;
    }

    fn score(&self) -> PairedScore {
        let items = self.items as f64;
        PairedScore {
            delta: self.delta / items,
            n01: self.better,
            n10: self.worse,
            p_value: mcnemar_exact(self.better, self.worse),
            p_adjusted: None,
            minimum_detectable: minimum_detectable_difference(
                self.items,
                (self.better + self.worse) as f64 / items,
            ),
        }
    }
}
