//! `list`: what can be named on the command line.

use std::io::Write;
use std::path::PathBuf;

use clap::ValueEnum;
use dlmom_eval::{BenchInfo, BenchSpec};
use dlmom_runs::topologies::{builtin, prompts};
use dlmom_runs::{CellKind, Overrides, Plan, PlannedCell, Preset, Registry, Setting};
use dlmom_runtime::{Handoff, Role, Sequential, Topology};
use serde_json::{Map, Value, json};

use crate::host::Host;
use crate::report::table;
use crate::status::{CliError, ExitStatus};

/// What to list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Suites with their cells.
    Suites,
    /// Cells with the fields in which they differ from REF.
    Experiments,
    /// Words for --bench.
    Benches,
    /// Experts shipped with the Python package.
    Experts,
    /// Published methods, for --preset.
    Presets,
    /// Who the agents are and how they meet, for --topology.
    Topologies,
    /// Role prompts that topology files name.
    Prompts,
    /// All of these in brief.
    All,
}

/// How many models the agents are, and how they meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Agents {
    /// Two agents of one model in lockstep.
    OneModel,
    /// Two agents of different models in lockstep.
    SeveralModels,
    /// Two agents of one model, one after the other.
    Chain,
}

impl Agents {
    pub(crate) const ALL: [(Self, &'static str); 3] = [
        (Self::OneModel, "one model"),
        (Self::SeveralModels, "several models"),
        (Self::Chain, "a chain"),
    ];

    pub(crate) fn setting(self) -> Setting {
        let lockstep = Setting::lockstep(2, self != Self::SeveralModels);
        if self == Self::Chain {
            let roles = ["generalist", "specialist"].map(Role::named).to_vec();
            return Setting {
                topology: Topology::Sequential(Sequential {
                    roles,
                    handoff: Handoff::default(),
                    max_handoffs: None,
                    on_failure: None,
                }),
                ..lockstep
            };
        }
        lockstep
    }
}

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// What to list.
    #[arg(value_enum, default_value_t = What::All, value_name = "WHAT")]
    pub what: What,
    /// Only these suites.
    #[arg(long, num_args = 1.., value_name = "SUITE")]
    pub suite: Vec<String>,
    /// Suites file instead of the built-in one.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The setting that experiments are expanded for.
    #[arg(long, value_enum, default_value_t = Agents::OneModel)]
    pub agents: Agents,
    /// One JSON object, experiments with every field.
    #[arg(long)]
    pub json: bool,
}

pub(crate) fn command(
    args: &ListArgs,
    host: &mut dyn Host,
    out: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let registry = match &args.config {
        Some(path) => Registry::load(path)?,
        None => Registry::builtin()?,
    };
    let setting = args.agents.setting();
    let plan = registry.expand(&args.suite, &[], &setting, &Overrides::default())?;
    if args.json {
        let value = json_of(args.what, &plan, host)?;
        let text =
            serde_json::to_string_pretty(&value).map_err(|e| CliError::Failed(e.to_string()))?;
        writeln!(out, "{text}")?;
        return Ok(ExitStatus::Success);
    }
    match args.what {
        What::Suites => suites(&plan, out)?,
        What::Experiments => experiments(&plan, out)?,
        What::Benches => benches(out)?,
        What::Experts => experts(host, out)?,
        What::Presets => presets(out)?,
        What::Topologies => topologies(out)?,
        What::Prompts => role_prompts(out)?,
        What::All => {
            writeln!(out, "suites (`list experiments` shows their fields)")?;
            suites(&plan, out)?;
            writeln!(out, "\nbenchmarks")?;
            benches(out)?;
            writeln!(out, "\nexperts")?;
            experts(host, out)?;
            writeln!(out, "\npresets")?;
            presets(out)?;
            writeln!(out, "\ntopologies")?;
            topologies(out)?;
        }
    }
    Ok(ExitStatus::Success)
}

/// The suites of a plan in order, each with its cells; the reference pipeline belongs to none.
fn by_suite(plan: &Plan) -> Vec<(&str, Vec<&PlannedCell>)> {
    let mut groups: Vec<(&str, Vec<&PlannedCell>)> = Vec::new();
    for cell in plan.cells.iter().skip(1) {
        let suite = cell.experiment.suite.as_str();
        match groups.iter_mut().find(|(name, _)| *name == suite) {
            Some((_, cells)) => cells.push(cell),
            None => groups.push((suite, vec![cell])),
        }
    }
    groups
}

fn suites(plan: &Plan, out: &mut dyn Write) -> Result<(), CliError> {
    let mut rows = table(&["suite", "cells", "names"]);
    for (suite, cells) in by_suite(plan) {
        let names: Vec<&str> = cells.iter().map(|c| c.experiment.id.as_str()).collect();
        rows.add_row([suite.to_owned(), names.len().to_string(), names.join(" ")]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

/// What becomes of a cell, beyond running.
fn fate(cell: &PlannedCell) -> String {
    match &cell.kind {
        CellKind::Alias { of } => format!("same as {of}"),
        CellKind::Skip { reason } => format!("skipped: {reason}"),
        CellKind::Run => match cell.experiment.supported() {
            Ok(()) => String::new(),
            Err(missing) => {
                let text = missing.to_string();
                let own = text.strip_prefix(&format!("{}: ", cell.experiment.id));
                own.unwrap_or(&text).to_owned()
            }
        },
    }
}

fn knobs(cell: &PlannedCell) -> Result<Map<String, Value>, CliError> {
    match cell.experiment.knobs() {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Ok(Map::new()),
        Err(error) => Err(CliError::Failed(error.to_string())),
    }
}

fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn experiments(plan: &Plan, out: &mut dyn Write) -> Result<(), CliError> {
    let Some(reference) = plan.cells.first() else {
        return Ok(());
    };
    let base = knobs(reference)?;
    writeln!(out, "{}", reference.experiment.id)?;
    let width = base.keys().map(String::len).max().unwrap_or(0);
    for (name, value) in &base {
        writeln!(out, "  {name:<width$}  {}", word(value))?;
    }
    writeln!(out)?;
    let mut rows = table(&["cell", "differs from REF in", "note"]);
    for (_, cells) in by_suite(plan) {
        for cell in cells {
            let differences: Vec<String> = knobs(cell)?
                .iter()
                .filter(|(name, value)| base.get(*name) != Some(*value))
                .map(|(name, value)| format!("{name} {}", word(value)))
                .collect();
            let differences = match differences.as_slice() {
                [] => "nothing".to_owned(),
                some => some.join(", "),
            };
            rows.add_row([cell.experiment.id.clone(), differences, fate(cell)]);
        }
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

fn benches(out: &mut dyn Write) -> Result<(), CliError> {
    let mut rows = table(&["bench", "rows like", "scored by", "data"]);
    for bench in BenchSpec::known() {
        rows.add_row([
            bench.word.to_owned(),
            bench.schema.to_string(),
            bench.scored_by.to_owned(),
            data(bench).to_owned(),
        ]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

fn data(bench: &BenchInfo) -> &'static str {
    if bench.takes_path() {
        "your JSONL file"
    } else {
        "in the Python package"
    }
}

/// An expert as --experts and --model name it.
fn zoo(name: &str) -> String {
    format!("zoo:{}", name.trim_start_matches("zoo:"))
}

fn experts(host: &mut dyn Host, out: &mut dyn Write) -> Result<(), CliError> {
    let shipped = host.experts();
    if shipped.is_empty() {
        writeln!(
            out,
            "experts ship with the Python package; this build has none"
        )?;
        return Ok(());
    }
    let mut rows = table(&["expert", "what"]);
    for (name, about) in shipped {
        rows.add_row([zoo(&name), about]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

fn presets(out: &mut dyn Write) -> Result<(), CliError> {
    let mut rows = table(&["preset", "topology", "after"]);
    for preset in Preset::all()? {
        rows.add_row([
            preset.name,
            preset.topology.unwrap_or_else(|| "any".to_owned()),
            preset.source,
        ]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

fn topologies(out: &mut dyn Write) -> Result<(), CliError> {
    let mut rows = table(&["topology", "what"]);
    for (name, about) in builtin() {
        rows.add_row([name, about]);
    }
    writeln!(out, "{rows}")?;
    Ok(())
}

fn role_prompts(out: &mut dyn Write) -> Result<(), CliError> {
    for (place, (name, prompt)) in prompts().into_iter().enumerate() {
        if place > 0 {
            writeln!(out)?;
        }
        writeln!(out, "{name}")?;
        for (part, text) in [
            ("system", prompt.system.as_deref().unwrap_or("none")),
            ("question", &prompt.question),
            ("notes", &prompt.notes),
        ] {
            writeln!(out, "  {part:<9} {}", text.replace('\n', "\n            "))?;
        }
    }
    Ok(())
}

fn json_of(what: What, plan: &Plan, host: &mut dyn Host) -> Result<Value, CliError> {
    let all = what == What::All;
    let mut object = Map::new();
    if all || what == What::Suites {
        let suites: Vec<Value> = by_suite(plan)
            .into_iter()
            .map(|(name, cells)| {
                let ids: Vec<&str> = cells.iter().map(|c| c.experiment.id.as_str()).collect();
                json!({ "name": name, "cells": ids })
            })
            .collect();
        object.insert("suites".into(), suites.into());
    }
    if all || what == What::Experiments {
        let cells: Result<Vec<Value>, CliError> = plan.cells.iter().map(cell_json).collect();
        object.insert("experiments".into(), cells?.into());
    }
    if all || what == What::Benches {
        let benches: Vec<Value> = BenchSpec::known()
            .iter()
            .map(|bench| {
                json!({
                    "word": bench.word,
                    "schema": bench.schema.to_string(),
                    "scored_by": bench.scored_by,
                    "shipped": !bench.takes_path(),
                    "runs_code": bench.runs_code(),
                })
            })
            .collect();
        object.insert("benches".into(), benches.into());
    }
    if all || what == What::Experts {
        let experts: Vec<Value> = host
            .experts()
            .into_iter()
            .map(|(name, about)| json!({ "name": zoo(&name), "about": about }))
            .collect();
        object.insert("experts".into(), experts.into());
    }
    if all || what == What::Presets {
        let presets: Vec<Value> = Preset::all()?
            .into_iter()
            .map(|preset| {
                json!({
                    "name": preset.name,
                    "source": preset.source,
                    "topology": preset.topology,
                    "deviations": preset.deviations,
                })
            })
            .collect();
        object.insert("presets".into(), presets.into());
    }
    if all || what == What::Topologies {
        let known: Vec<Value> = builtin()
            .into_iter()
            .map(|(name, about)| json!({ "name": name, "about": about }))
            .collect();
        object.insert("topologies".into(), known.into());
    }
    if all || what == What::Prompts {
        let known: Vec<Value> = prompts()
            .into_iter()
            .map(|(name, prompt)| {
                json!({
                    "name": name,
                    "system": prompt.system,
                    "question": prompt.question,
                    "notes": prompt.notes,
                })
            })
            .collect();
        object.insert("prompts".into(), known.into());
    }
    Ok(object.into())
}

fn cell_json(cell: &PlannedCell) -> Result<Value, CliError> {
    let (kind, alias_of, reason) = match &cell.kind {
        CellKind::Run => ("run", None, None),
        CellKind::Alias { of } => ("alias", Some(of), None),
        CellKind::Skip { reason } => ("skip", None, Some(reason)),
    };
    let unsupported = cell.experiment.supported().err().map(|e| e.to_string());
    Ok(json!({
        "id": cell.experiment.id,
        "suite": cell.experiment.suite,
        "kind": kind,
        "alias_of": alias_of,
        "reason": reason,
        "not_built": unsupported,
        "deterministic": cell.experiment.is_deterministic(),
        "knobs": knobs(cell)?,
    }))
}
