//! How far a cell's preferences are from the reference pipeline's, step by step.

use std::collections::BTreeMap;
use std::path::Path;

use dlmom_eval::stats::{mean, quantile};
use dlmom_runtime::{Divergences, Follow, JobKey};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::fold::{FoldError, read_rows};
use crate::row::Drift;

/// KL divergence in nats above which a step counts towards a drift event.
pub const EVENT_KL: f64 = 0.1;
/// Steps in a row above [`EVENT_KL`] that make an event.
pub const EVENT_STEPS: usize = 3;

/// What was compared.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum DriftKind {
    /// Two runs side by side at equal step numbers, each on its own path (the paper's).
    Free,
    /// The cell fed the reference's inputs at every step: teacher-forced.
    Inputs,
    /// The reference's history, and the cell's own message at the last latent step only.
    OneStep,
    /// The cell's controller over the reference's entropies: the share of steps of another mode.
    Decisions,
}

impl DriftKind {
    /// All kinds, in the order of tables.
    pub const ALL: [Self; 4] = [Self::Free, Self::Inputs, Self::OneStep, Self::Decisions];

    /// The name in files and tables.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Inputs => "inputs",
            Self::OneStep => "one_step",
            Self::Decisions => "decisions",
        }
    }

    /// What the second row of the batch is fed; none where no model runs.
    #[must_use]
    pub fn follow(self) -> Option<Follow> {
        match self {
            Self::Free => Some(Follow::Free),
            Self::Inputs => Some(Follow::Inputs),
            Self::OneStep => Some(Follow::OneStep),
            Self::Decisions => None,
        }
    }
}

/// One line of `drift/<ID>.jsonl`: one comparison of one sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "dlmom-rs drift line")]
pub struct DriftLine {
    /// Id of the cell.
    pub experiment: String,
    /// The sample.
    #[serde(flatten)]
    pub key: JobKey,
    /// What was compared.
    pub kind: DriftKind,
    /// Steps compared.
    pub steps: u32,
    /// Steps of another mode, for `decisions`.
    pub changed: Option<u32>,
    /// The divergences of every step, for the other kinds.
    pub divergences: Option<Divergences>,
}

impl DriftLine {
    /// What a raw row says of it; none for `decisions` and without a step.
    #[must_use]
    pub fn row(&self) -> Option<Drift> {
        let found = self.divergences.as_ref()?;
        Some(Drift {
            kl: mean(&found.kl)?,
            cosine: mean(&found.cosine)?,
            events: events(&found.kl),
        })
    }
}

/// Stretches of at least [`EVENT_STEPS`] steps above [`EVENT_KL`]; each counts once, however long.
#[must_use]
pub fn events(kl: &[f64]) -> u32 {
    kl.split(|&x| x <= EVENT_KL)
        .filter(|stretch| stretch.len() >= EVENT_STEPS)
        .count() as u32
}

/// One kind of drift of one cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriftSummary {
    /// What was compared.
    pub kind: DriftKind,
    /// Samples.
    pub samples: u64,
    /// Steps of all of them.
    pub steps: u64,
    /// Mean over samples of the sample's mean KL, nats.
    pub kl: Option<f64>,
    /// Median and 90th percentile of the KL over all steps, and the largest.
    pub kl_steps: Option<[f64; 3]>,
    /// Mean over samples of the sample's mean cosine.
    pub cosine: Option<f64>,
    /// Events per sample.
    pub events: Option<f64>,
    /// Share of steps of another mode.
    pub changed: Option<f64>,
}

/// Summaries by kind; of several lines of one sample and kind the last counts.
#[must_use]
pub fn summarize_drift(lines: &[DriftLine]) -> Vec<DriftSummary> {
    let mut kept: BTreeMap<(DriftKind, &JobKey), &DriftLine> = BTreeMap::new();
    for line in lines {
        kept.insert((line.kind, &line.key), line);
    }
    DriftKind::ALL
        .into_iter()
        .filter_map(|kind| {
            let of_kind: Vec<&DriftLine> = kept
                .iter()
                .filter(|((k, _), _)| *k == kind)
                .map(|(_, line)| *line)
                .collect();
            (!of_kind.is_empty()).then(|| one_kind(kind, &of_kind))
        })
        .collect()
}

fn one_kind(kind: DriftKind, lines: &[&DriftLine]) -> DriftSummary {
    let steps: u64 = lines.iter().map(|l| u64::from(l.steps)).sum();
    let rows: Vec<Drift> = lines.iter().filter_map(|l| l.row()).collect();
    let mut all: Vec<f64> = lines
        .iter()
        .filter_map(|l| l.divergences.as_ref())
        .flat_map(|d| d.kl.iter().copied())
        .collect();
    all.sort_by(f64::total_cmp);
    let of = |value: &dyn Fn(&Drift) -> f64| mean(&rows.iter().map(value).collect::<Vec<_>>());
    let changed: Option<u64> = lines.iter().map(|l| l.changed.map(u64::from)).sum();
    DriftSummary {
        kind,
        samples: lines.len() as u64,
        steps,
        kl: of(&|d| d.kl),
        kl_steps: quantile(&all, 0.5)
            .zip(quantile(&all, 0.9))
            .zip(all.last().copied())
            .map(|((p50, p90), max)| [p50, p90, max]),
        cosine: of(&|d| d.cosine),
        events: of(&|d| f64::from(d.events)),
        changed: changed
            .filter(|_| steps > 0)
            .map(|changed| changed as f64 / steps as f64),
    }
}

/// The lines of a drift file; none where there is no file.
///
/// # Errors
/// [`FoldError`] for a whole line that is none.
pub fn read_drift(file: &Path) -> Result<Vec<DriftLine>, FoldError> {
    if !file.exists() {
        return Ok(Vec::new());
    }
    Ok(read_rows::<DriftLine>(file, |line| line)?.0)
}
