//! `show`: one recorded sample, step by step.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use dlmom_eval::suggest::hint;
use dlmom_runs::rundir::read_config;
use dlmom_runs::{RawRow, TraceLine, read_manifest};
use serde::de::DeserializeOwned;

use crate::generate::named;
use crate::host::Host;
use crate::status::{CliError, ExitStatus};
use crate::timeline::{Footer, Header, Plain, Step, Timeline};

/// Arguments of `show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Run folder.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Cell.
    #[arg(value_name = "ID")]
    pub id: String,
    /// Item of the sample, or the beginning of its id [default: the first traced one].
    #[arg(long, value_name = "ITEM")]
    pub item: Option<String>,
    /// Seed of the sample [default: the first recorded].
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Print the recorded row and trace as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Every line of a JSON Lines file.
fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>, CliError> {
    let file = File::open(path).map_err(|e| CliError::Usage(format!("{}: {e}", path.display())))?;
    let mut rows = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line?;
        if line.trim().is_empty() {
            continue;
        }
        rows.push(
            serde_json::from_str(&line)
                .map_err(|e| CliError::Usage(format!("{}:{}: {e}", path.display(), index + 1)))?,
        );
    }
    Ok(rows)
}

fn file_of(run: &Path, kind: &str, id: &str) -> Result<PathBuf, CliError> {
    let path = run.join(kind).join(format!("{id}.jsonl"));
    if path.is_file() {
        return Ok(path);
    }
    let mut known: Vec<String> = std::fs::read_dir(run.join(kind))
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_suffix(".jsonl").map(str::to_owned)
        })
        .collect();
    known.sort();
    Err(CliError::Usage(format!(
        "{}: no cell `{id}` with {kind} rows{}; there are: {}",
        run.display(),
        hint(id, known.iter().map(String::as_str)),
        known.join(", ")
    )))
}

/// The one row that `item` and `seed` mean.
fn choose<'a>(rows: &'a [RawRow], item: &str, seed: Option<u64>) -> Result<&'a RawRow, CliError> {
    let matches = |row: &&RawRow| seed.is_none_or(|seed| row.seed == seed);
    if let Some(row) = rows.iter().filter(matches).find(|row| row.item_id == item) {
        return Ok(row);
    }
    let mut ids: Vec<&str> = rows
        .iter()
        .filter(matches)
        .map(|row| row.item_id.as_str())
        .filter(|id| id.starts_with(item))
        .collect();
    ids.sort_unstable();
    ids.dedup();
    match ids[..] {
        [id] if !item.is_empty() => rows
            .iter()
            .filter(matches)
            .find(|row| row.item_id == id)
            .ok_or_else(|| CliError::Usage(format!("--item: no item `{item}`"))),
        [] => {
            let known = || rows.iter().map(|row| row.item_id.as_str());
            Err(CliError::Usage(format!(
                "--item: no sample of item `{item}`{}{}",
                seed.map_or_else(String::new, |s| format!(" with seed {s}")),
                hint(item, known()),
            )))
        }
        _ => Err(CliError::Usage(format!(
            "--item: `{item}` is the beginning of {} items; give more of it",
            ids.len()
        ))),
    }
}

pub(crate) fn command(
    args: &ShowArgs,
    host: &mut dyn Host,
    out: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let Some(manifest) = read_manifest(&args.run)? else {
        return Err(CliError::Usage(format!(
            "{}: no run folder (it has no run.json)",
            args.run.display()
        )));
    };
    let alias = manifest
        .cells
        .iter()
        .find(|cell| cell.id == args.id)
        .and_then(|cell| cell.alias_of.clone());
    let id = alias.as_deref().unwrap_or(&args.id);
    let rows: Vec<RawRow> = lines(&file_of(&args.run, "raw", id)?)?;
    let traces: Vec<TraceLine> = match file_of(&args.run, "traces", id) {
        Ok(path) => lines(&path)?,
        Err(_) => Vec::new(),
    };
    let item = match &args.item {
        Some(item) => item.clone(),
        None => traces
            .first()
            .map(|trace| trace.key.item_id.clone())
            .or_else(|| rows.first().map(|row| row.item_id.clone()))
            .ok_or_else(|| CliError::Usage(format!("cell `{id}` has no rows")))?,
    };
    let row = choose(&rows, &item, args.seed)?;
    let key = row.key();
    // The last line of a sample counts.
    let trace = traces.iter().rev().find(|trace| trace.key == key);
    if args.json {
        let value = serde_json::json!({ "row": row, "trace": trace.map(|t| &t.trace) });
        writeln!(out, "{value}")?;
        return Ok(ExitStatus::Success);
    }
    let facts = facts(row);
    let Some(trace) = trace else {
        writeln!(out, "{}", row.text)?;
        writeln!(out)?;
        for fact in facts {
            writeln!(out, "{fact}")?;
        }
        let traced: Vec<&str> = traces.iter().map(|t| t.key.item_id.as_str()).collect();
        writeln!(
            out,
            "no steps were recorded for this sample; traced items: {}",
            if traced.is_empty() {
                "none".to_owned()
            } else {
                traced.join(", ")
            }
        )?;
        return Ok(ExitStatus::Success);
    };
    let experiment = read_config(&args.run, id)?.ok_or_else(|| {
        CliError::Usage(format!(
            "{}: configs/{id}.yaml is missing",
            args.run.display()
        ))
    })?;
    let config = experiment.loop_config(&manifest.placement(&args.run.join("run.json"))?)?;
    let experts = names(&manifest.context, &manifest.models);
    let header = Header::new(
        format!(
            "{id}, item {}, seed {}, {}",
            key.item_id, key.seed, row.bench
        ),
        experts,
        &config,
        manifest.ln_vocab,
    );
    let footer = Footer {
        text: row.text.clone(),
        facts,
    };
    let terminal = host.output_terminal();
    if let Some(mut view) = terminal.then(|| host.timeline()).flatten() {
        view.start(&header);
        Step::of_trace(&trace.trace).for_each(|step| view.step(&step));
        view.finish(&footer);
        return Ok(ExitStatus::Success);
    }
    let mut view = Plain::new(out);
    view.start(&header);
    Step::of_trace(&trace.trace).for_each(|step| view.step(&step));
    view.finish(&footer);
    view.error
        .map_or(Ok(ExitStatus::Success), |e| Err(e.into()))
}

/// Names of the experts, by agent.
fn names(context: &serde_json::Value, models: &serde_json::Value) -> Vec<String> {
    let name = |model: usize| models[model]["name"].as_str().unwrap_or("?").to_owned();
    context["agents"]
        .as_array()
        .map_or_else(Vec::new, |agents| {
            agents
                .iter()
                .enumerate()
                .filter_map(|(place, m)| {
                    let role = context["topology"]["seats"][place]["role"].as_str();
                    Some(named(&name(m.as_u64()? as usize), role))
                })
                .collect()
        })
}

fn facts(row: &RawRow) -> Vec<String> {
    let mut facts = vec![
        format!(
            "{}; answer {} (gold {}){}",
            if row.correct { "correct" } else { "wrong" },
            row.answer
                .as_deref()
                .or(row.answer_flexible.as_deref())
                .unwrap_or("none"),
            row.gold,
            row.failure
                .map_or_else(String::new, |f| format!("; failure: {}", f.label())),
        ),
        format!(
            "{} steps: {} latent, {} printed; {} switches; bytes up {}, down {}; {:.2} s",
            row.total_steps,
            row.latent_steps,
            row.explicit_tokens,
            row.switches,
            row.uplink_bytes,
            row.downlink_bytes,
            row.latency_s
        ),
    ];
    if row.handoffs > 0 {
        let triggers: Vec<String> = row
            .handoff_triggers
            .iter()
            .map(|t| t.as_str().replace('_', " "))
            .collect();
        facts.push(format!(
            "{} handoffs ({}), {} bytes",
            row.handoffs,
            triggers.join(", "),
            row.handoff_bytes
        ));
    }
    facts.extend(row.error.clone());
    facts
}
