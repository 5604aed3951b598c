//! One experiment's figures, recomputed from its raw rows.

use std::collections::BTreeMap;

use dlmom_eval::stats::{Interval, mean, quantile, sample_std, wilson};
use serde::{Deserialize, Serialize};

use crate::drift::DriftSummary;
use crate::fold::{CellRows, Slim};
use crate::paired::{Paired, compare, identical};
use crate::registry::REF;
use crate::row::Failure;

/// The seeds behind a summary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Seeds {
    /// Seeds cannot differ; one was run.
    Word(DeterministicWord),
    /// These were run.
    List(Vec<u64>),
}

/// The word `deterministic`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeterministicWord {
    /// Seeds cannot differ.
    Deterministic,
}

impl Seeds {
    /// `deterministic`, or the seeds separated by spaces.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Word(_) => "deterministic".to_owned(),
            Self::List(seeds) => seeds
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" "),
        }
    }
}

/// Share of right answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Mean over items of the item's mean over seeds and samples.
    pub value: f64,
    /// Wilson's 95 % interval over items; rows of one item are one trial.
    pub ci: Interval,
    /// Accuracy of each seed; empty where seeds cannot differ.
    pub per_seed: Vec<(u64, f64)>,
    /// Standard deviation over seeds (`ddof = 1`); null for fewer than two.
    pub seed_std: Option<f64>,
}

/// A mean over items with its normal 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean over items of the item's mean.
    pub value: f64,
    /// `value +- 1.96 s / sqrt(items)`; null for fewer than two items.
    pub ci: Option<Interval>,
}

/// Quantiles of a per-row quantity.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// Largest.
    pub max: f64,
}

/// Bytes per step over all rows, and per solved sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bytes {
    /// Over all rows.
    pub total: u64,
    /// Per step; null without steps.
    pub per_step: Option<f64>,
    /// Per row with a right strict answer; null without any.
    pub per_solved: Option<f64>,
}

/// Normalised entropy over all steps of all rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entropy {
    /// Mean over rows of the row's mean.
    pub mean: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// 10 %, 50 % and 90 % quantiles, read from the histogram; accurate to a bin, a factor of 1.8.
    pub quantiles: [Option<f64>; 3],
    /// Pooled histogram: below 1e-5, then 4 bins a decade up to 1, then 1 itself.
    pub hist: Vec<u64>,
}

/// The threshold that would have made a share of the recorded steps latent.
///
/// Approximate twice over: it is read from a histogram, and another threshold would have led to other steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AlphaFor {
    /// The share of latent steps.
    pub coverage: f64,
    /// In `alpha_unit: normalized`.
    pub normalized: Option<f64>,
    /// In `alpha_unit: nats`; null where the agents' vocabularies differ in size or are unknown.
    pub nats: Option<f64>,
}

/// What `summary/<ID>.json` holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Id of the cell.
    pub experiment: String,
    /// Its suite.
    pub suite: String,
    /// Name of the benchmark.
    pub bench: String,
    /// Digest of the configuration.
    pub config_hash: String,
    /// Rows.
    pub n: u64,
    /// Distinct items.
    pub n_items: u64,
    /// Seeds.
    pub seeds: Seeds,
    /// Of strict answers.
    pub accuracy: Accuracy,
    /// Of answers by any rule.
    pub accuracy_flexible: Accuracy,
    /// Rows by failure label, zeros included.
    pub failures: BTreeMap<String, u64>,
    /// Latent steps of all rows over all steps of all rows; null without steps.
    pub latent_coverage: Option<f64>,
    /// Latent segments by length.
    pub latent_segments: BTreeMap<u32, u64>,
    /// Changes of mode per sample.
    pub switches: Quantiles,
    /// Mean changes of mode.
    pub switches_mean: Mean,
    /// Mean handoffs.
    pub handoffs_mean: f64,
    /// Handed over between agents.
    #[serde(default)]
    pub handoff: Option<Bytes>,
    /// Mean printed tokens.
    pub explicit_tokens: Mean,
    /// Mean tokens of injected texts.
    #[serde(default)]
    pub injected_tokens: f64,
    /// Mean latent steps.
    pub latent_steps: Mean,
    /// Mean steps.
    pub total_steps: Mean,
    /// Mean prompt tokens, summed over agents.
    pub prompt_tokens: Mean,
    /// Mean positions forwarded, summed over agents.
    pub forward_tokens: Mean,
    /// From experts to consensus.
    pub uplink: Bytes,
    /// From consensus to experts.
    pub downlink: Bytes,
    /// Mean over rows of the mean top-k mass; null without latent steps.
    pub topk_mass: Option<f64>,
    /// Mean over rows of the mean noise KL in nats; null without latent steps.
    pub noise_kl: Option<f64>,
    /// Mean over rows of the mean Jensen-Shannon divergence of the same, nats.
    #[serde(default)]
    pub noise_js: Option<f64>,
    /// Mean over rows of the share of steps in which all experts have one most probable token; null for one expert.
    #[serde(default)]
    pub agreement: Option<f64>,
    /// Mean over rows of the share of steps in which experts were merged; null for one expert.
    #[serde(default)]
    pub merge_rate: Option<f64>,
    /// Drift from the reference pipeline by kind; empty where it was not measured.
    #[serde(default)]
    pub drift: Vec<DriftSummary>,
    /// Normalised entropy; null where no row has any.
    pub entropy: Option<Entropy>,
    /// Thresholds for 10 % and 50 % coverage.
    pub alpha_for_coverage: Vec<AlphaFor>,
    /// Seconds per sample.
    pub latency_s: Quantiles,
    /// Mean seconds per sample.
    pub latency_mean_s: Mean,
    /// Rows per second of time in which at least one sample ran; pauses between invocations do not count.
    pub samples_per_s: Option<f64>,
    /// Steps per second of the same time.
    pub steps_per_s: Option<f64>,
    /// Highest device allocation.
    pub peak_device_bytes: Option<u64>,
    /// Highest resident set.
    pub peak_rss_bytes: Option<u64>,
    /// Slots of the running batch, every value that occurs.
    pub batch_size: Vec<u32>,
    /// Paired comparison with the reference pipeline; null for itself and without shared items.
    pub versus_ref: Option<Paired>,
    /// No shared sample differs from the reference pipeline's in text, latent steps, switches or mean entropy.
    pub inert: bool,
    /// An earlier cell of the run whose every shared sample is this cell's in text, latent steps, switches, mean entropy and
    /// bytes.
    #[serde(default)]
    pub twin: Option<String>,
    /// What was odd about the file.
    pub warnings: Vec<String>,
}

/// Summarises `cell`, compared with `reference` where there is one. `ln_vocab` is `ln V` where all agents have one
/// vocabulary; `None` leaves thresholds in nats out.
///
/// The result does not depend on the order of rows in the file. `None` for a cell without rows.
#[must_use]
pub fn summarize(
    cell: &CellRows,
    reference: Option<&CellRows>,
    ln_vocab: Option<f64>,
) -> Option<Summary> {
    let rows = &cell.rows;
    if rows.is_empty() {
        return None;
    }
    let paired = reference
        .filter(|r| r.experiment != cell.experiment && r.bench == cell.bench)
        .and_then(|r| compare(cell, r));
    let steps: u64 = rows.iter().map(|r| u64::from(r.total_steps())).sum();
    let latent: u64 = rows.iter().map(|r| u64::from(r.latent_steps)).sum();
    let solved = rows.iter().filter(|r| r.correct).count();
    let busy = busy_seconds(rows);
    let rate = |count: f64| (busy > 0.0).then(|| count / busy);
    let entropy = entropy(rows);
    let mut segments = BTreeMap::new();
    for length in rows.iter().flat_map(|r| r.latent_segments.iter()) {
        *segments.entry(*length).or_insert(0) += 1;
    }
    let mut batch_size: Vec<u32> = rows.iter().map(|r| r.batch_size).collect();
    batch_size.sort_unstable();
    batch_size.dedup();
    Some(Summary {
        experiment: cell.experiment.clone(),
        suite: cell.suite.clone(),
        bench: cell.bench.clone(),
        config_hash: cell.config_hash.clone(),
        n: rows.len() as u64,
        n_items: items(rows) as u64,
        seeds: seeds(cell),
        accuracy: accuracy(cell, |r| r.correct)?,
        accuracy_flexible: accuracy(cell, |r| r.correct_flexible)?,
        failures: Failure::ALL
            .into_iter()
            .map(|f| {
                let count = rows.iter().filter(|r| r.failure == Some(f)).count();
                (f.label().to_owned(), count as u64)
            })
            .collect(),
        latent_coverage: (steps > 0).then(|| latent as f64 / steps as f64),
        latent_segments: segments,
        switches: quantiles(rows, |r| f64::from(r.switches))?,
        switches_mean: item_mean(rows, |r| f64::from(r.switches))?,
        handoffs_mean: mean_of(rows, |r| f64::from(r.handoffs))?,
        handoff: rows
            .iter()
            .any(|r| r.handoffs > 0)
            .then(|| bytes(rows, steps, solved, |r| r.handoff_bytes)),
        injected_tokens: mean_of(rows, |r| f64::from(r.injected_tokens))?,
        explicit_tokens: item_mean(rows, |r| f64::from(r.explicit_tokens))?,
        latent_steps: item_mean(rows, |r| f64::from(r.latent_steps))?,
        total_steps: item_mean(rows, |r| f64::from(r.total_steps()))?,
        prompt_tokens: item_mean(rows, |r| r.prompt_tokens as f64)?,
        forward_tokens: item_mean(rows, |r| r.forward_tokens as f64)?,
        uplink: bytes(rows, steps, solved, |r| r.uplink_bytes),
        downlink: bytes(rows, steps, solved, |r| r.downlink_bytes),
        topk_mass: known_mean(rows, |r| r.topk_mass),
        noise_kl: known_mean(rows, |r| r.noise_kl),
        noise_js: known_mean(rows, |r| r.noise_js),
        agreement: known_mean(rows, |r| r.agreement),
        merge_rate: known_mean(rows, |r| r.merge_rate),
        drift: Vec::new(),
        twin: None,
        alpha_for_coverage: [0.10, 0.50]
            .into_iter()
            .map(|coverage| {
                let hist = entropy.as_ref().map(|e| &e.hist);
                let normalized = hist.and_then(|h| hist_quantile(h, 1.0 - coverage));
                let nats = normalized.zip(ln_vocab).map(|(alpha, ln_v)| alpha * ln_v);
                AlphaFor {
                    coverage,
                    normalized,
                    nats,
                }
            })
            .collect(),
        entropy,
        latency_s: quantiles(rows, |r| r.latency_s)?,
        latency_mean_s: item_mean(rows, |r| r.latency_s)?,
        samples_per_s: rate(rows.len() as f64),
        steps_per_s: rate(steps as f64),
        peak_device_bytes: rows.iter().filter_map(|r| r.peak_device_bytes).max(),
        peak_rss_bytes: rows.iter().filter_map(|r| r.peak_rss_bytes).max(),
        batch_size,
        inert: cell.experiment != REF && paired.as_ref().is_some_and(|p| p.identical),
        versus_ref: paired,
        warnings: cell.warnings.clone(),
    })
}

/// The mean over the rows that have a value.
fn known_mean(rows: &[Slim], value: impl Fn(&Slim) -> Option<f64>) -> Option<f64> {
    mean(&rows.iter().filter_map(value).collect::<Vec<_>>())
}

/// The first of `earlier` whose shared samples are all this cell's, bytes included.
#[must_use]
pub fn twin<'a>(
    cell: &CellRows,
    earlier: impl IntoIterator<Item = &'a CellRows>,
) -> Option<String> {
    let bytes = |r: &Slim| (r.uplink_bytes, r.downlink_bytes, r.handoff_bytes);
    earlier
        .into_iter()
        .filter(|other| other.experiment != cell.experiment)
        .find(|other| {
            identical(cell, other) && {
                let theirs = crate::fold::by_item(&other.rows);
                cell.rows.iter().all(|row| {
                    theirs
                        .get(&*row.item)
                        .is_none_or(|rows| rows.iter().any(|r| bytes(r) == bytes(row)))
                })
            }
        })
        .map(|other| other.experiment.clone())
}

fn seeds(cell: &CellRows) -> Seeds {
    if cell.deterministic {
        return Seeds::Word(DeterministicWord::Deterministic);
    }
    let mut seeds: Vec<u64> = cell.rows.iter().map(|r| r.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    Seeds::List(seeds)
}

fn items(rows: &[Slim]) -> usize {
    rows.chunk_by(|a, b| a.item == b.item).count()
}

fn accuracy(cell: &CellRows, right: impl Fn(&Slim) -> bool) -> Option<Accuracy> {
    let score = |r: &Slim| f64::from(u8::from(right(r)));
    let value = item_mean(&cell.rows, score)?.value;
    let mut per_seed = Vec::new();
    if let Seeds::List(seeds) = seeds(cell) {
        for seed in seeds {
            let of_seed: Vec<f64> = cell
                .rows
                .iter()
                .filter(|r| r.seed == seed)
                .map(score)
                .collect();
            per_seed.extend(mean(&of_seed).map(|m| (seed, m)));
        }
    }
    let means: Vec<f64> = per_seed.iter().map(|(_, m)| *m).collect();
    // A mean of means may leave [0, 1] by rounding.
    let value = value.clamp(0.0, 1.0);
    Some(Accuracy {
        value,
        ci: wilson(value, items(&cell.rows) as u64)?,
        per_seed,
        seed_std: sample_std(&means),
    })
}

fn item_means(rows: &[Slim], value: impl Fn(&Slim) -> f64) -> Vec<f64> {
    rows.chunk_by(|a, b| a.item == b.item)
        .map(|group| group.iter().map(&value).sum::<f64>() / group.len() as f64)
        .collect()
}

fn item_mean(rows: &[Slim], value: impl Fn(&Slim) -> f64) -> Option<Mean> {
    let means = item_means(rows, value);
    let centre = mean(&means)?;
    let ci = sample_std(&means).map(|s| {
        let half = 1.96 * s / (means.len() as f64).sqrt();
        Interval {
            lo: centre - half,
            hi: centre + half,
        }
    });
    Some(Mean { value: centre, ci })
}

fn mean_of(rows: &[Slim], value: impl Fn(&Slim) -> f64) -> Option<f64> {
    mean(&rows.iter().map(value).collect::<Vec<_>>())
}

fn quantiles(rows: &[Slim], value: impl Fn(&Slim) -> f64) -> Option<Quantiles> {
    let mut values: Vec<f64> = rows.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    Some(Quantiles {
        p50: quantile(&values, 0.5)?,
        p90: quantile(&values, 0.9)?,
        max: quantile(&values, 1.0)?,
    })
}

fn bytes(rows: &[Slim], steps: u64, solved: usize, value: impl Fn(&Slim) -> u64) -> Bytes {
    let total: u64 = rows.iter().map(value).sum();
    let per = |count: u64| (count > 0).then(|| total as f64 / count as f64);
    Bytes {
        total,
        per_step: per(steps),
        per_solved: per(solved as u64),
    }
}

fn entropy(rows: &[Slim]) -> Option<Entropy> {
    let spreads: Vec<_> = rows.iter().filter_map(|r| r.entropy).collect();
    let bins = rows.iter().map(|r| r.entropy_hist.len()).max().unwrap_or(0);
    let mut hist = vec![0u64; bins];
    for row in rows {
        for (bin, count) in hist.iter_mut().zip(row.entropy_hist.iter()) {
            *bin += u64::from(*count);
        }
    }
    Some(Entropy {
        mean: mean(&spreads.iter().map(|s| s.mean).collect::<Vec<_>>())?,
        min: spreads.iter().map(|s| s.min).fold(f64::INFINITY, f64::min),
        max: spreads
            .iter()
            .map(|s| s.max)
            .fold(f64::NEG_INFINITY, f64::max),
        quantiles: [0.1, 0.5, 0.9].map(|q| hist_quantile(&hist, q)),
        hist,
    })
}

/// The `q` quantile of a histogram of normalised entropies (`dlmom_runtime::entropy_bin`), interpolated within its bin on the
/// logarithmic scale; everything in the first bin reads as its upper edge, 1e-5. `None` for an empty histogram.
#[must_use]
pub fn hist_quantile(hist: &[u64], q: f64) -> Option<f64> {
    let total: u64 = hist.iter().sum();
    if total == 0 {
        return None;
    }
    let target = q.clamp(0.0, 1.0) * total as f64;
    let mut below = 0.0;
    for (bin, count) in hist.iter().enumerate() {
        let count = *count as f64;
        if count > 0.0 && below + count >= target {
            if bin == 0 {
                return Some(1e-5);
            }
            let inside = ((target - below) / count).clamp(0.0, 1.0);
            let exponent = ((bin - 1) as f64 + inside) / 4.0 - 5.0;
            return Some(10f64.powf(exponent).min(1.0));
        }
        below += count;
    }
    Some(1.0)
}

/// Seconds in which at least one sample ran: the length of the union of the rows' intervals.
fn busy_seconds(rows: &[Slim]) -> f64 {
    let mut spans: Vec<(f64, f64)> = rows
        .iter()
        .map(|r| (r.started_at, r.started_at + r.latency_s))
        .collect();
    spans.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut busy = 0.0;
    let mut covered = f64::NEG_INFINITY;
    for (start, end) in spans {
        busy += (end - start.max(covered)).max(0.0);
        covered = covered.max(end);
    }
    busy
}
