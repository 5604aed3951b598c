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

pub(crate) fn percent(value: f64) -> String {
    format!("{:.1}", 100.0 * value)
}

pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    table
}

pub(crate) fn unit(unit: AlphaUnit) -> &'static str {
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

fn note(cell: &CellKind, summary: Option<&Summary>, reference: Option<&Summary>) -> String {
    match cell {
        CellKind::Alias { of } => format!("same as {of}"),
        CellKind::Skip { reason } => format!("skipped: {reason}"),
        CellKind::Run => {
            let Some(summary) = summary else {
                return "no rows".into();
            };
            let mut notes = Vec::new();
            if summary.inert {
                let bytes = |s: &Summary| (s.uplink.total, s.downlink.total);
                let same = reference.is_none_or(|r| bytes(r) == bytes(summary));
                notes.push(if same {
                    "inert: no sample differs from REF".to_owned()
                } else {
                    "every answer is REF's; only the bytes differ".to_owned()
                });
            }
            for (label, count) in summary.failures.iter().filter(|(_, count)| **count > 0) {
                notes.push(format!("{count} {label}"));
            }
            notes.join(", ")
        }
    }
}

const COLUMNS: [&str; 14] = [
    "cell",
    "n",
    "seeds",
    "acc % [95 % CI]",
    "+-seed",
    "flex %",
    "d REF (p)",
    "latent %",
    "switches",
    "steps",
    "KL",
    "B/step",
    "B/solved",
    "note",
];

/// Bytes in at most five characters: whole below 10,000, then thousands and millions.
fn short(bytes: f64) -> String {
    if bytes < 9_999.5 {
        format!("{bytes:.0}")
    } else if bytes < 9_999_500.0 {
        format!("{:.0}k", bytes / 1e3)
    } else {
        format!("{:.0}M", bytes / 1e6)
    }
}

/// One row of the table; `-` where there is nothing to say. Bytes are shown where `links` matter.
fn line(
    id: &str,
    kind: &CellKind,
    summary: Option<&Summary>,
    reference: Option<&Summary>,
    links: bool,
) -> [String; COLUMNS.len()] {
    let nothing = || "-".to_owned();
    let Some(s) = summary else {
        let mut empty = [(); COLUMNS.len()].map(|()| nothing());
        id.clone_into(&mut empty[0]);
        empty[COLUMNS.len() - 1] = note(kind, None, None);
        return empty;
    };
    let accuracy = &s.accuracy;
    let bytes = |up: Option<f64>, down: Option<f64>| match (up, down) {
        (Some(up), Some(down)) if links && up + down > 0.0 => {
            format!("{}/{}", short(up), short(down))
        }
        _ => nothing(),
    };
    [
        id.to_owned(),
        s.n.to_string(),
        s.seeds.label(),
        format!(
            "{} [{}, {}]",
            percent(accuracy.value),
            percent(accuracy.ci.lo),
            percent(accuracy.ci.hi)
        ),
        accuracy.seed_std.map_or_else(nothing, percent),
        percent(s.accuracy_flexible.value),
        s.versus_ref.as_ref().map_or_else(nothing, |p| {
            format!(
                "{:+.1} ({})",
                100.0 * p.strict.delta,
                p_value(p.strict.p_value)
            )
        }),
        s.latent_coverage.map_or_else(nothing, percent),
        format!("{:.0}/{:.0}", s.switches.p50, s.switches.p90),
        format!("{:.1}", s.total_steps.value),
        s.noise_kl
            .filter(|kl| *kl > 0.0)
            .map_or_else(nothing, |kl| format!("{kl:.3}")),
        bytes(s.uplink.per_step, s.downlink.per_step),
        bytes(s.uplink.per_solved, s.downlink.per_solved),
        note(kind, Some(s), reference),
    ]
}

fn p_value(p: f64) -> String {
    if p < 0.001 {
        "<0.001".into()
    } else {
        format!("{p:.3}")
    }
}

/// Prints the table of a finished run, why coverage is what it is, and what to do next.
pub(crate) fn finished(
    out: &mut dyn Write,
    plan: &Plan,
    summaries: &HashMap<String, Summary>,
    dir: &RunDir,
) -> Result<(), CliError> {
    // With one agent the link is a loopback: of interest in the suite about links, elsewhere two more columns.
    let links = dir.manifest().experts > 1 || plan.cells.iter().any(|c| c.experiment.suite == "A3");
    let lines: Vec<[String; COLUMNS.len()]> = plan
        .cells
        .iter()
        .map(|cell| {
            line(
                &cell.experiment.id,
                &cell.kind,
                summaries.get(&cell.experiment.id),
                summaries.get(dlmom_runs::REF),
                links,
            )
        })
        .collect();
    // A column that says nothing in any row only makes the others harder to read.
    let shown: Vec<usize> = (0..COLUMNS.len())
        .filter(|&c| {
            c == 0
                || lines
                    .iter()
                    .any(|line| !matches!(line[c].as_str(), "-" | ""))
        })
        .collect();
    let header: Vec<&str> = shown.iter().map(|&c| COLUMNS[c]).collect();
    let mut rows = table(&header);
    for line in &lines {
        rows.add_row(shown.iter().map(|&c| line[c].as_str()));
    }
    for (place, &c) in shown.iter().enumerate() {
        if (1..COLUMNS.len() - 1).contains(&c)
            && let Some(column) = rows.column_mut(place)
        {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "acc: strict answers, Wilson interval over items; flex: any answer found; d REF: paired difference in points, exact McNemar p (`aggregate` adds Holm);\nswitches: p50/p90 per sample; KL: of the noise, nats per latent step; B/step, B/solved: uplink/downlink bytes per step and per solved sample"
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
