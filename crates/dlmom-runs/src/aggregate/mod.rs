//! Tables over one or several runs, from raw files alone.

mod arrow;
mod csv;
mod files;
mod latex;
mod table;

pub use arrow::raw_batch;
pub use table::{TidyRow, Value};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dlmom_eval::stats::holm;
use rayon::prelude::*;

use crate::drift::{read_drift, summarize_drift};
use crate::fold::{CellRows, FoldError, read_cell};
use crate::paired::PairedScore;
use crate::registry::REF;
use crate::rundir::{Kind, RunDirError};
use crate::summary::{Summary, summarize, twin};

/// Why runs could not be aggregated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AggregateError {
    /// No paths at all.
    #[error("nothing to aggregate: name at least one run folder")]
    NoPaths,
    /// A path that is not there.
    #[error("{path}: no such folder or file", path = path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// A folder without raw files.
    #[error("{path}: holds no raw rows (neither raw/*.jsonl nor *.jsonl)", path = path.display())]
    NoRaw {
        /// The folder.
        path: PathBuf,
    },
    /// A folder cannot be listed.
    #[error("{path}: cannot read: {source}", path = path.display())]
    Read {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Two files of one run hold one experiment.
    #[error("{run}: experiment {id} is in two files")]
    TwoFiles {
        /// The run.
        run: String,
        /// The experiment.
        id: String,
    },
    /// A raw file is wrong.
    #[error(transparent)]
    Rows(#[from] FoldError),
    /// `run.json` is wrong.
    #[error(transparent)]
    Manifest(#[from] RunDirError),
    /// Columns did not make a table.
    #[error("cannot build the table: {0}")]
    Arrow(String),
}

/// One line of the tables.
#[derive(Clone, Debug, PartialEq)]
pub struct AggregateCell {
    /// The run's folder as it was named.
    pub run: String,
    /// Id of the cell.
    pub experiment: String,
    /// Its suite.
    pub suite: String,
    /// The cell whose rows it shares.
    pub alias_of: Option<String>,
    /// Why it has no rows.
    pub skipped: Option<String>,
    /// Its figures; `None` for a skipped cell.
    pub summary: Option<Summary>,
}

/// Tables over one or several runs.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Aggregate {
    /// The cells, run by run: the reference first, then as planned, then by name.
    pub cells: Vec<AggregateCell>,
    /// What was odd but no error, one line each.
    pub warnings: Vec<String>,
}

/// Aggregates run folders, folders of `*.jsonl` files, or single files.
///
/// Nothing but raw rows is needed; `run.json`, where there is one, adds aliases, skipped cells, order and `ln V`. Comparisons
/// are with the `REF` of the same run; p-values are adjusted within a suite of a run, aliases counted once.
///
/// # Errors
/// [`AggregateError`].
pub fn aggregate<P: AsRef<Path>>(paths: &[P]) -> Result<Aggregate, AggregateError> {
    if paths.is_empty() {
        return Err(AggregateError::NoPaths);
    }
    let mut all = Aggregate::default();
    for path in paths {
        one_run(path.as_ref(), &mut all)?;
    }
    Ok(all)
}

fn one_run(path: &Path, all: &mut Aggregate) -> Result<(), AggregateError> {
    let run = files::find(path)?;
    let folded: Vec<_> = run.files.par_iter().map(|file| read_cell(file)).collect();
    let mut rows: BTreeMap<String, CellRows> = BTreeMap::new();
    for result in folded {
        match result {
            // A run killed before its first row leaves an empty file.
            Err(error @ FoldError::Empty { .. }) => all.warnings.push(error.to_string()),
            Err(error) => return Err(error.into()),
            Ok(cell) => {
                all.warnings.extend(cell.warnings.iter().cloned());
                let id = cell.experiment.clone();
                if rows.insert(id.clone(), cell).is_some() {
                    return Err(AggregateError::TwoFiles { run: run.name, id });
                }
            }
        }
    }
    if rows.is_empty() {
        return Err(AggregateError::NoRaw {
            path: path.to_owned(),
        });
    }
    let ln_vocab = run.manifest.as_ref().and_then(|m| m.ln_vocab);
    let reference = rows.get(REF);
    // Cells in the order in which they were planned, so that a twin is an earlier one.
    let mut order: Vec<&CellRows> = rows.values().collect();
    order.sort_by_cached_key(|cell| {
        let planned = run.manifest.iter().flat_map(|m| &m.cells);
        let place = planned.take_while(|c| c.id != cell.experiment).count();
        (place, natural(&cell.experiment))
    });
    let mut cells: Vec<AggregateCell> = order
        .par_iter()
        .enumerate()
        .map(|(place, cell)| {
            let lines = path
                .join("drift")
                .join(format!("{}.jsonl", cell.experiment));
            let drift = if path.is_dir() {
                read_drift(&lines)?
            } else {
                Vec::new()
            };
            let summary = summarize(cell, reference, ln_vocab).map(|summary| Summary {
                drift: summarize_drift(&drift),
                twin: twin(cell, order[..place].iter().copied()),
                ..summary
            });
            Ok(AggregateCell {
                run: run.name.clone(),
                experiment: cell.experiment.clone(),
                suite: cell.suite.clone(),
                alias_of: None,
                skipped: None,
                summary,
            })
        })
        .collect::<Result<_, AggregateError>>()?;
    adjust(&mut cells);
    for planned in run.manifest.iter().flat_map(|m| &m.cells) {
        if cells.iter().any(|c| c.experiment == planned.id) {
            continue;
        }
        let target = planned
            .alias_of
            .as_ref()
            .and_then(|of| cells.iter().find(|c| c.experiment == *of))
            .and_then(|c| c.summary.clone());
        match (planned.kind, target) {
            (Kind::Alias, Some(summary)) => cells.push(AggregateCell {
                run: run.name.clone(),
                experiment: planned.id.clone(),
                suite: planned.suite.clone(),
                alias_of: planned.alias_of.clone(),
                skipped: None,
                summary: Some(Summary {
                    experiment: planned.id.clone(),
                    suite: planned.suite.clone(),
                    ..summary
                }),
            }),
            (Kind::Skip, _) => cells.push(AggregateCell {
                run: run.name.clone(),
                experiment: planned.id.clone(),
                suite: planned.suite.clone(),
                alias_of: None,
                skipped: Some(planned.reason.clone().unwrap_or_default()),
                summary: None,
            }),
            _ => all
                .warnings
                .push(format!("{}: {} has no rows yet", run.name, planned.id)),
        }
    }
    let planned: Vec<&str> = run
        .manifest
        .iter()
        .flat_map(|m| &m.cells)
        .map(|c| c.id.as_str())
        .collect();
    cells.sort_by_cached_key(|cell| {
        let position = planned.iter().position(|id| *id == cell.experiment);
        let rank = position.unwrap_or(planned.len());
        (
            cell.experiment != REF,
            rank,
            natural(&cell.suite),
            natural(&cell.experiment),
        )
    });
    all.cells.extend(cells);
    Ok(())
}

/// Holm within every suite, for strict and flexible answers apart.
fn adjust(cells: &mut [AggregateCell]) {
    let mut suites: Vec<String> = cells.iter().map(|c| c.suite.clone()).collect();
    suites.sort();
    suites.dedup();
    for suite in suites {
        for choose in [
            (|p| &mut p.strict) as fn(&mut crate::paired::Paired) -> &mut PairedScore,
            |p| &mut p.flexible,
        ] {
            let mut scores: Vec<&mut PairedScore> = cells
                .iter_mut()
                .filter(|c| c.suite == suite)
                .filter_map(|c| c.summary.as_mut()?.versus_ref.as_mut())
                .map(choose)
                .collect();
            let p_values: Vec<f64> = scores.iter().map(|s| s.p_value).collect();
            for (score, adjusted) in scores.iter_mut().zip(holm(&p_values)) {
                score.p_adjusted = Some(adjusted);
            }
        }
    }
}

/// Sort key under which `A1.10` follows `A1.2`: pieces of text and numbers in turn.
fn natural(name: &str) -> Vec<(String, u64)> {
    let mut pieces = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (text, tail) = rest.split_at(digits);
        let end = tail
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(tail.len());
        pieces.push((text.to_owned(), tail[..end].parse().unwrap_or(u64::MAX)));
        rest = &tail[end..];
    }
    pieces
}
