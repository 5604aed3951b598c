//! What a finished run prints: the table, the coverage diagnosis, the next command.

use std::collections::HashMap;
use std::io::Write;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use dlmom_core::{AlphaUnit, Gate};
use dlmom_eval::stats::minimum_detectable_difference;
use dlmom_runs::{CellKind, Experiment, Plan, RunDir, Summary};

use crate::args::RunArgs;
use crate::prepare::{Selection, seeds_of};
use crate::status::CliError;

fn percent(value: f64) -> String {
    format!("{:.1}", 100.0 * value)
}

fn optional(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".into(), |v| format!("{v:.digits$}"))
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}

fn unit(unit: AlphaUnit) -> &'static str {
    match unit {
        AlphaUnit::Normalized => "normalized",
        AlphaUnit::Nats => "nats",
    }
}

/// Prints what would run.
pub(crate) fn dry_run(
    out: &mut dyn Write,
    selection: &Selection,
    args: &RunArgs,
) -> Result<(), CliError> {
    let mut rows = table(&["cell", "what", "items", "seeds", "samples"]);
    for cell in &selection.plan.cells {
        let id = &cell.experiment.id;
        let seeds = seeds_of(&cell.experiment, &args.seeds, 0).len();
        let items = selection.items.len();
        match &cell.kind {
            CellKind::Run => rows.add_row([
                id.clone(),
                "runs".into(),
                items.to_string(),
                if cell.experiment.is_deterministic() {
                    "deterministic".into()
                } else {
                    seeds.to_string()
                },
                (items * seeds).to_string(),
            ]),
            CellKind::Alias { of } => rows.add_row([
                id.clone(),
                format!("same as {of}"),
                "-".into(),
                "-".into(),
                "0".into(),
            ]),
            CellKind::Skip { reason } => rows.add_row([
                id.clone(),
                format!("skipped: {reason}"),
                "-".into(),
                "-".into(),
                "0".into(),
            ]),
        };
    }
    writeln!(out, "{rows}")?;
    let n = selection.items.len() as u64;
    writeln!(
        out,
        "{} samples on {} with {}",
        selection.samples(&args.seeds),
        selection.bench.name(),
        selection.experts.join(" + ")
    )?;
    if let Some(difference) = minimum_detectable_difference(n, 0.1) {
        writeln!(
            out,
            "with {n} items a paired difference below about {:.1} points (10 % discordant) cannot be told from chance",
            100.0 * difference
        )?;
    }
    Ok(())
}

fn note(cell: &CellKind, summary: Option<&Summary>) -> String {
    match cell {
        CellKind::Alias { of } => format!("same as {of}"),
        CellKind::Skip { reason } => format!("skipped: {reason}"),
        CellKind::Run => {
            let Some(summary) = summary else {
                return "no rows".into();
            };
            let mut notes = Vec::new();
            if summary.inert {
                notes.push("inert: no sample differs from REF".to_owned());
            }
            for (label, count) in summary.failures.iter().filter(|(_, count)| **count > 0) {
                notes.push(format!("{count} {label}"));
            }
            notes.join(", ")
        }
    }
}

/// Prints the table of a finished run, why coverage is what it is, and what to do next.
pub(crate) fn finished(
    out: &mut dyn Write,
    plan: &Plan,
    summaries: &HashMap<String, Summary>,
    dir: &RunDir,
) -> Result<(), CliError> {
    let mut rows = table(&[
        "cell",
        "n",
        "seeds",
        "acc %",
        "95 % CI",
        "+-seed",
        "flex %",
        "d REF",
        "p",
        "latent %",
        "switch p50/p90",
        "steps",
        "mass",
        "KL",
        "up B/step",
        "down B/step",
        "note",
    ]);
    for column in 1..16 {
        if let Some(column) = rows.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for cell in &plan.cells {
        let id = &cell.experiment.id;
        let Some(s) = summaries.get(id) else {
            let mut row = vec![id.clone()];
            row.resize(16, "-".into());
            row.push(note(&cell.kind, None));
            rows.add_row(row);
            continue;
        };
        let paired = s.versus_ref.as_ref();
        rows.add_row([
            id.clone(),
            s.n.to_string(),
            s.seeds.label(),
            percent(s.accuracy.value),
            format!(
                "{} - {}",
                percent(s.accuracy.ci.lo),
                percent(s.accuracy.ci.hi)
            ),
            s.accuracy.seed_std.map_or_else(|| "-".into(), percent),
            percent(s.accuracy_flexible.value),
            paired.map_or_else(|| "-".into(), |p| format!("{:+.1}", 100.0 * p.strict.delta)),
            paired.map_or_else(|| "-".into(), |p| format!("{:.2}", p.strict.p_value)),
            s.latent_coverage.map_or_else(|| "-".into(), percent),
            format!("{:.0}/{:.0}", s.switches.p50, s.switches.p90),
            format!("{:.1}", s.total_steps.value),
            optional(s.topk_mass, 4),
            optional(s.noise_kl, 4),
            optional(s.uplink.per_step, 0),
            optional(s.downlink.per_step, 0),
            note(&cell.kind, Some(s)),
        ]);
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "acc: strict answers; CI: Wilson, over items; d REF: paired difference in points with exact McNemar p (uncorrected; `aggregate` adds Holm)"
    )?;
    diagnosis(out, plan, summaries)?;
    let root = dir.root().display();
    writeln!(
        out,
        "rows: {root}/raw  summaries: {root}/summary  traces: {root}/traces"
    )?;
    writeln!(
        out,
        "next: dlmom-rs aggregate {root} && dlmom-rs plot {root}"
    )?;
    Ok(())
}

/// Why the reference pipeline was latent as often as it was.
fn diagnosis(
    out: &mut dyn Write,
    plan: &Plan,
    summaries: &HashMap<String, Summary>,
) -> Result<(), CliError> {
    let Some(reference) = plan.cells.first().map(|c| &c.experiment) else {
        return Ok(());
    };
    let Some(summary) = summaries.get(&reference.id) else {
        return Ok(());
    };
    let (Some(entropy), Some(coverage)) = (&summary.entropy, summary.latent_coverage) else {
        return Ok(());
    };
    let scale = scale(reference, summary);
    let word = unit(reference.alpha_unit);
    writeln!(
        out,
        "coverage: {} is latent in {:.1} % of its steps at alpha {} ({word}); entropies seen: {:.4} to {:.4}, mean {:.4} ({word})",
        reference.id,
        100.0 * coverage,
        reference.alpha,
        entropy.min * scale,
        entropy.max * scale,
        entropy.mean * scale,
    )?;
    if coverage == 0.0 && reference.gate == Gate::Threshold {
        if entropy.max * scale <= reference.alpha {
            writeln!(
                out,
                "  no step's entropy exceeded alpha, so every step was explicit and soft-token knobs reached nothing"
            )?;
        } else {
            writeln!(out, "  the cap or the budget left no room for latent steps")?;
        }
    }
    let wanted: Vec<String> = summary
        .alpha_for_coverage
        .iter()
        .filter_map(|a| {
            let value = match reference.alpha_unit {
                AlphaUnit::Normalized => a.normalized,
                AlphaUnit::Nats => a.nats,
            }?;
            Some(format!("{value:.4} for about {:.0} %", 100.0 * a.coverage))
        })
        .collect();
    if !wanted.is_empty() {
        writeln!(
            out,
            "  by these entropies alpha would have to be {} (--alpha-unit {word}; approximate: latent steps change what follows)",
            wanted.join(", ")
        )?;
    }
    Ok(())
}

/// From normalised entropy to the unit of alpha.
fn scale(reference: &Experiment, summary: &Summary) -> f64 {
    match reference.alpha_unit {
        AlphaUnit::Normalized => 1.0,
        AlphaUnit::Nats => summary
            .alpha_for_coverage
            .iter()
            .find_map(|a| Some(a.nats? / a.normalized.filter(|n| *n > 0.0)?))
            .unwrap_or(f64::NAN),
    }
}
