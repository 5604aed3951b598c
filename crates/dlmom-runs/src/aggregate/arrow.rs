//! The same tables as Arrow arrays.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use arrow_array::types::UInt32Type;
use arrow_array::{
    ArrayRef, BooleanArray, Float64Array, ListArray, RecordBatch, StringArray, UInt32Array,
    UInt64Array,
};
use rayon::prelude::*;
use serde::Serialize;

use super::table::{TidyRow, Value};
use super::{Aggregate, AggregateError, files};
use crate::fold::read_rows;
use crate::row::RawRow;

impl Aggregate {
    /// The long table.
    ///
    /// # Errors
    /// [`AggregateError::Arrow`], which no aggregate causes.
    pub fn tidy_batch(&self) -> Result<RecordBatch, AggregateError> {
        let rows: Vec<_> = self.tidy().iter().map(TidyRow::columns).collect();
        batch_of(&rows)
    }

    /// The wide table.
    ///
    /// # Errors
    /// [`AggregateError::Arrow`], which no aggregate causes.
    pub fn cells_batch(&self) -> Result<RecordBatch, AggregateError> {
        batch_of(&self.wide())
    }
}

fn batch_of(rows: &[Vec<(&'static str, Value)>]) -> Result<RecordBatch, AggregateError> {
    let Some(first) = rows.first() else {
        return Err(AggregateError::Arrow("no rows".to_owned()));
    };
    let columns = first.iter().enumerate().map(|(i, (name, kind))| {
        let values = || rows.iter().map(|row| &row[i].1);
        let array: ArrayRef = match kind {
            Value::Text(_) => Arc::new(values().map(text_of).collect::<StringArray>()),
            Value::Float(_) => Arc::new(values().map(float_of).collect::<Float64Array>()),
            Value::Count(_) => Arc::new(values().map(count_of).collect::<UInt64Array>()),
            Value::Flag(_) => Arc::new(values().map(flag_of).collect::<BooleanArray>()),
        };
        (*name, array)
    });
    build(columns)
}

fn text_of(value: &Value) -> Option<&str> {
    if let Value::Text(v) = value {
        v.as_deref()
    } else {
        None
    }
}

fn float_of(value: &Value) -> Option<f64> {
    if let Value::Float(v) = value {
        *v
    } else {
        None
    }
}

fn count_of(value: &Value) -> Option<u64> {
    if let Value::Count(v) = value {
        *v
    } else {
        None
    }
}

fn flag_of(value: &Value) -> Option<bool> {
    if let Value::Flag(v) = value { *v } else { None }
}

/// `nullable` for every column, so that batches of different runs have one schema.
fn build<'a>(
    columns: impl Iterator<Item = (&'a str, ArrayRef)>,
) -> Result<RecordBatch, AggregateError> {
    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, array)| (name, array, true)))
        .map_err(|e| AggregateError::Arrow(e.to_string()))
}

/// The raw rows of runs as one flat table in the order of files and keys, one row per sample; of several rows of one sample
/// the last in its file. Texts only where asked for: they dwarf the rest.
///
/// Aliased cells have no rows of their own.
///
/// # Errors
/// [`AggregateError`].
pub fn raw_batch<P: AsRef<Path>>(
    paths: &[P],
    with_text: bool,
) -> Result<(RecordBatch, Vec<String>), AggregateError> {
    if paths.is_empty() {
        return Err(AggregateError::NoPaths);
    }
    let mut runs: Vec<String> = Vec::new();
    let mut rows: Vec<RawRow> = Vec::new();
    let mut warnings = Vec::new();
    for path in paths {
        let run = files::find(path.as_ref())?;
        let lean = |mut row: RawRow| {
            if !with_text {
                row.text = String::new();
            }
            row
        };
        let read: Vec<_> = run
            .files
            .par_iter()
            .map(|file| read_rows(file, lean))
            .collect();
        for result in read {
            let (file_rows, odd) = result?;
            warnings.extend(odd);
            let unique = last_of_each(file_rows);
            runs.extend(std::iter::repeat_n(run.name.clone(), unique.len()));
            rows.extend(unique);
        }
    }
    Ok((raw_columns(&runs, &rows, with_text)?, warnings))
}

fn last_of_each(rows: Vec<RawRow>) -> Vec<RawRow> {
    let keyed: BTreeMap<_, RawRow> = rows
        .into_iter()
        .map(|row| {
            (
                (
                    row.experiment.clone(),
                    row.item_id.clone(),
                    row.seed,
                    row.sample,
                ),
                row,
            )
        })
        .collect();
    keyed.into_values().collect()
}

fn raw_columns(
    runs: &[String],
    rows: &[RawRow],
    with_text: bool,
) -> Result<RecordBatch, AggregateError> {
    let text = |f: &dyn Fn(&RawRow) -> Option<String>| -> ArrayRef {
        Arc::new(rows.iter().map(f).collect::<StringArray>())
    };
    let float = |f: &dyn Fn(&RawRow) -> Option<f64>| -> ArrayRef {
        Arc::new(rows.iter().map(f).collect::<Float64Array>())
    };
    let long = |f: &dyn Fn(&RawRow) -> Option<u64>| -> ArrayRef {
        Arc::new(rows.iter().map(f).collect::<UInt64Array>())
    };
    let int = |f: &dyn Fn(&RawRow) -> Option<u32>| -> ArrayRef {
        Arc::new(rows.iter().map(f).collect::<UInt32Array>())
    };
    let flag = |f: &dyn Fn(&RawRow) -> bool| -> ArrayRef {
        Arc::new(rows.iter().map(|r| Some(f(r))).collect::<BooleanArray>())
    };
    let list = |f: &dyn Fn(&RawRow) -> Vec<u32>| -> ArrayRef {
        Arc::new(ListArray::from_iter_primitive::<UInt32Type, _, _>(
            rows.iter().map(|r| Some(f(r).into_iter().map(Some))),
        ))
    };
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        ("run", Arc::new(StringArray::from_iter_values(runs))),
        ("experiment", text(&|r| Some(r.experiment.clone()))),
        ("suite", text(&|r| Some(r.suite.clone()))),
        ("bench", text(&|r| Some(r.bench.clone()))),
        ("config_hash", text(&|r| Some(r.config_hash.clone()))),
        ("item_id", text(&|r| Some(r.item_id.clone()))),
        ("seed", long(&|r| Some(r.seed))),
        ("sample", int(&|r| Some(r.sample))),
        ("deterministic", flag(&|r| r.deterministic)),
        ("extractor_version", int(&|r| Some(r.extractor_version))),
        ("correct", flag(&|r| r.correct)),
        ("correct_flexible", flag(&|r| r.correct_flexible)),
        ("answer", text(&|r| r.answer.clone())),
        ("answer_flexible", text(&|r| r.answer_flexible.clone())),
        ("answer_method", text(&|r| label(&r.answer_method))),
        ("gold", text(&|r| Some(r.gold.clone()))),
        (
            "failure",
            text(&|r| r.failure.map(|f| f.label().to_owned())),
        ),
        ("error", text(&|r| r.error.clone())),
        ("stop", text(&|r| label(&r.stop))),
        ("explicit_tokens", int(&|r| Some(r.explicit_tokens))),
        ("injected_tokens", int(&|r| Some(r.injected_tokens))),
        ("latent_steps", int(&|r| Some(r.latent_steps))),
        ("total_steps", int(&|r| Some(r.total_steps))),
        ("latent_segments", list(&|r| r.latent_segments.clone())),
        ("prompt_tokens", long(&|r| Some(r.prompt_tokens))),
        ("switches", int(&|r| Some(r.switches))),
        ("mode_runs", list(&|r| r.mode_runs.clone())),
        ("handoffs", int(&|r| Some(r.handoffs))),
        (
            "handoff_triggers",
            text(&|r| {
                let names: Vec<&str> = r.handoff_triggers.iter().map(|t| t.as_str()).collect();
                (!names.is_empty()).then(|| names.join(" "))
            }),
        ),
        ("handoff_bytes", long(&|r| Some(r.handoff_bytes))),
        ("forward_tokens", long(&|r| Some(r.forward_tokens))),
        (
            "forward_tokens_per_agent",
            list(&|r| r.forward_tokens_per_agent.clone()),
        ),
        ("uplink_bytes", long(&|r| Some(r.uplink_bytes))),
        ("downlink_bytes", long(&|r| Some(r.downlink_bytes))),
        ("entropy_mean", float(&|r| r.entropy.map(|e| e.mean))),
        ("entropy_min", float(&|r| r.entropy.map(|e| e.min))),
        ("entropy_max", float(&|r| r.entropy.map(|e| e.max))),
        ("entropy_hist", list(&|r| r.entropy_hist.clone())),
        ("topk_mass", float(&|r| r.topk_mass)),
        ("noise_kl", float(&|r| r.noise_kl)),
        ("noise_js", float(&|r| r.noise_js)),
        ("agreement", float(&|r| r.agreement)),
        ("merge_rate", float(&|r| r.merge_rate)),
        ("drift_kl", float(&|r| r.drift.map(|d| d.kl))),
        ("drift_cosine", float(&|r| r.drift.map(|d| d.cosine))),
        ("drift_events", int(&|r| r.drift.map(|d| d.events))),
        ("latency_s", float(&|r| Some(r.latency_s))),
        ("peak_device_bytes", long(&|r| r.peak_device_bytes)),
        ("peak_rss_bytes", long(&|r| r.peak_rss_bytes)),
        ("batch_size", int(&|r| Some(r.batch_size))),
        ("started_at", float(&|r| Some(r.started_at))),
    ];
    if with_text {
        columns.push(("text", text(&|r| Some(r.text.clone()))));
    }
    build(columns.into_iter())
}

/// The name a unit variant has in files.
fn label(value: &impl Serialize) -> Option<String> {
    serde_json::to_value(value)
        .ok()?
        .as_str()
        .map(str::to_owned)
}
