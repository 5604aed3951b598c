//! What a finished run prints: the table, the coverage diagnosis, the next command.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use dlmom_core::{AlphaUnit, Gate};
use dlmom_eval::stats::minimum_detectable_difference;
use dlmom_runs::drift::{EVENT_KL, EVENT_STEPS};
use dlmom_runs::rundir::read_config;
use dlmom_runs::{
    CellKind, DriftKind, DriftSummary, Experiment, Plan, PlannedCell, REF, RunDir, Summary,
};
use serde_json::Value;

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
        AlphaUnit::Quantile => "quantile",
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
    let roles: Vec<&str> = selection
        .seating
        .seats
        .iter()
        .filter_map(|seat| seat.role.as_deref())
        .collect();
    if roles.is_empty() {
        writeln!(out, "topology {}", selection.seating.name)?;
    } else {
        writeln!(
            out,
            "topology {}: {}",
            selection.seating.name,
            roles.join(", ")
        )?;
    }
    let wanted = crate::pilot::Wanted::of(&selection.plan, args.pilot_items);
    if wanted.any() {
        writeln!(
            out,
            "a pilot of {} items comes first",
            wanted
                .items
                .min(selection.items.len() + selection.spare.len())
        )?;
    }
    if let Some(difference) = minimum_detectable_difference(n, 0.1) {
        writeln!(
            out,
            "with {n} items a paired difference below about {:.1} points (10 % discordant) cannot be told from chance",
            100.0 * difference
        )?;
    }
    Ok(())
}

/// What a row of the table is about.
struct Shown<'a> {
    cell: &'a PlannedCell,
    summary: Option<&'a Summary>,
    reference: Option<&'a Summary>,
    /// Knobs in which the cell differs from its twin.
    differs: Vec<String>,
    /// Whether bytes are of interest.
    links: bool,
}

impl Shown<'_> {
    fn note(&self) -> String {
        match &self.cell.kind {
            CellKind::Alias { of } => return format!("same as {of}"),
            CellKind::Skip { reason } => return format!("skipped: {reason}"),
            CellKind::Run => {}
        }
        let Some(summary) = self.summary else {
            return "no rows".into();
        };
        let mut notes = Vec::new();
        let knobs = self.differs.join(", ");
        match &summary.twin {
            Some(twin) if twin == REF => {
                notes.push(format!("inert: no sample differs from REF ({knobs})"));
            }
            Some(twin) => notes.push(format!("inert beside {twin}: {knobs}")),
            None if summary.inert => {
                let bytes = |s: &Summary| {
                    let handed = s.handoff.map_or(0, |bytes| bytes.total);
                    (s.uplink.total, s.downlink.total, handed)
                };
                let same = self.reference.is_none_or(|r| bytes(r) == bytes(summary));
                notes.push(if same {
                    "inert: no sample differs from REF".to_owned()
                } else {
                    "every answer is REF's; only the bytes differ".to_owned()
                });
            }
            None => {}
        }
        for (label, count) in summary.failures.iter().filter(|(_, count)| **count > 0) {
            notes.push(format!("{count} {label}"));
        }
        notes.join(", ")
    }
}

/// Names of the knobs in which two cells differ.
fn knobs_apart(a: &Experiment, b: &Experiment) -> Vec<String> {
    match (a.knobs(), b.knobs()) {
        (Ok(Value::Object(a)), Ok(Value::Object(b))) => a
            .iter()
            .filter(|(name, value)| b.get(*name) != Some(*value))
            .map(|(name, _)| name.clone())
            .collect(),
        _ => Vec::new(),
    }
}

/// The knobs in which a cell differs from another of its run.
fn apart(dir: &RunDir, plan: &Plan, cell: &Experiment, other: &str) -> Vec<String> {
    let planned = plan.cells.iter().find(|c| c.experiment.id == other);
    match planned {
        Some(planned) => knobs_apart(cell, &planned.experiment),
        None => read_config(dir.root(), other)
            .ok()
            .flatten()
            .map_or_else(Vec::new, |other| knobs_apart(cell, &other)),
    }
}

const COLUMNS: [&str; 18] = [
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
    "handoffs",
    "mass",
    "KL",
    "JS",
    "B/step",
    "B/solved",
    "drift",
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

/// One row of the table; `-` where there is nothing to say.
fn line(shown: &Shown<'_>) -> [String; COLUMNS.len()] {
    let id = &shown.cell.experiment.id;
    let nothing = || "-".to_owned();
    let Some(s) = shown.summary else {
        let mut empty = [(); COLUMNS.len()].map(|()| nothing());
        id.clone_into(&mut empty[0]);
        empty[COLUMNS.len() - 1] = shown.note();
        return empty;
    };
    let accuracy = &s.accuracy;
    let bytes = |up: Option<f64>, down: Option<f64>| match (up, down) {
        (Some(up), Some(down)) if shown.links && up + down > 0.0 => {
            format!("{}/{}", short(up), short(down))
        }
        _ => nothing(),
    };
    let above_zero = |x: Option<f64>| {
        x.filter(|x| *x > 0.0)
            .map_or_else(nothing, |x| format!("{x:.3}"))
    };
    let free = s.drift.iter().find(|d| d.kind == DriftKind::Free);
    [
        id.clone(),
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
        if s.handoffs_mean > 0.0 {
            format!("{:.2}", s.handoffs_mean)
        } else {
            nothing()
        },
        s.topk_mass
            .map_or_else(nothing, |mass| format!("{mass:.3}")),
        above_zero(s.noise_kl),
        above_zero(s.noise_js),
        bytes(s.uplink.per_step, s.downlink.per_step),
        bytes(s.uplink.per_solved, s.downlink.per_solved),
        free.and_then(|d| d.kl)
            .map_or_else(nothing, |kl| format!("{kl:.3}")),
        shown.note(),
    ]
}

pub(crate) fn p_value(p: f64) -> String {
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
            let summary = summaries.get(&cell.experiment.id);
            let twin = summary.and_then(|s| s.twin.as_deref());
            line(&Shown {
                cell,
                summary,
                reference: summaries.get(REF),
                differs: twin
                    .map_or_else(Vec::new, |twin| apart(dir, plan, &cell.experiment, twin)),
                links,
            })
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
        "acc: strict answers, Wilson interval over items; flex: any answer found; d REF: paired difference in points, exact McNemar p (`aggregate` adds Holm);\nswitches: p50/p90 per sample; mass: top-k mass; KL, JS: of filter, noise and control, nats per latent step; B/step, B/solved: uplink/downlink bytes per step and per solved sample;\ndrift: free-running KL from REF, nats per step (`--drift N`)"
    )?;
    drift(out, plan, summaries)?;
    diagnosis(out, plan, summaries, dir)?;
    let root = dir.root().display();
    writeln!(
        out,
        "rows: {root}/raw  summaries: {root}/summary  traces: {root}/traces"
    )?;
    writeln!(
        out,
        "next: dlmom-rs compare {root} && dlmom-rs aggregate {root} && dlmom-rs plot {root}"
    )?;
    Ok(())
}

/// Every kind of drift that was measured.
fn drift(
    out: &mut dyn Write,
    plan: &Plan,
    summaries: &HashMap<String, Summary>,
) -> Result<(), CliError> {
    let found: Vec<(&str, &DriftSummary)> = plan
        .runs()
        .filter_map(|e| summaries.get(&e.id))
        .flat_map(|s| s.drift.iter().map(|d| (s.experiment.as_str(), d)))
        .collect();
    if found.is_empty() {
        return Ok(());
    }
    let mut rows = table(&[
        "cell",
        "drift",
        "samples",
        "steps",
        "KL",
        "p50",
        "p90",
        "max",
        "cosine",
        "events",
        "changed %",
    ]);
    let show = |x: Option<f64>, digits: usize| {
        x.map_or_else(|| "-".to_owned(), |x| format!("{x:.digits$}"))
    };
    for (cell, d) in found {
        rows.add_row([
            cell.to_owned(),
            d.kind.as_str().to_owned(),
            d.samples.to_string(),
            d.steps.to_string(),
            show(d.kl, 4),
            show(d.kl_steps.map(|k| k[0]), 4),
            show(d.kl_steps.map(|k| k[1]), 4),
            show(d.kl_steps.map(|k| k[2]), 4),
            show(d.cosine, 4),
            show(d.events, 2),
            d.changed.map_or_else(|| "-".to_owned(), percent),
        ]);
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "drift from REF over full logits: free-running, teacher-forced (inputs), after one own message (one_step), or the share of REF's steps that the cell's controller would decide otherwise; events: {EVENT_STEPS} steps in a row above {EVENT_KL} nats, per sample; REF against itself is the noise floor"
    )?;
    Ok(())
}

/// Why the reference pipeline was latent as often as it was.
fn diagnosis(
    out: &mut dyn Write,
    plan: &Plan,
    summaries: &HashMap<String, Summary>,
    dir: &RunDir,
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
    let manifest = dir.manifest();
    let ranks = manifest.pilot.as_ref().map(|p| &p.quantiles);
    let unit_of = |normalized: f64, unit: AlphaUnit| match unit {
        AlphaUnit::Normalized => Some(normalized),
        AlphaUnit::Nats => manifest.ln_vocab.map(|ln_v| normalized * ln_v),
        AlphaUnit::Quantile => ranks.map(|ranks| ranks.rank(normalized)),
    };
    let own = |x: f64| -> String {
        unit_of(x, reference.alpha_unit).map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"))
    };
    let word = unit(reference.alpha_unit);
    writeln!(
        out,
        "coverage: {} is latent in {:.1} % of its steps at alpha {} ({word}); entropies seen: {} to {}, median {} ({word})",
        reference.id,
        100.0 * coverage,
        reference.alpha,
        own(entropy.min),
        own(entropy.max),
        entropy.quantiles[1].map_or_else(|| "-".to_owned(), own),
    )?;
    if let Some(lengths) = lengths(&summary.latent_segments) {
        writeln!(out, "  latent segments by length: {lengths}")?;
    }
    if coverage == 0.0 && reference.gate == Gate::Threshold {
        if unit_of(entropy.max, reference.alpha_unit).is_some_and(|max| max <= reference.alpha) {
            writeln!(
                out,
                "  no step's entropy exceeded alpha, so every step was explicit and soft-token knobs reached nothing"
            )?;
        } else {
            writeln!(out, "  the cap or the budget left no room for latent steps")?;
        }
    }
    if reference.cap > 0 && summary.switches.p50 + 1.0 >= reference.cap as f64 {
        writeln!(
            out,
            "  half of the samples or more used up the cap of {} switches (--max-switches -1 lifts it)",
            reference.cap
        )?;
    }
    for wanted in &summary.alpha_for_coverage {
        let Some(normalized) = wanted.normalized else {
            continue;
        };
        let alphas: Vec<String> = [AlphaUnit::Normalized, AlphaUnit::Nats, AlphaUnit::Quantile]
            .into_iter()
            .filter_map(|u| Some(format!("{:.4} ({})", unit_of(normalized, u)?, unit(u))))
            .collect();
        writeln!(
            out,
            "  for about {:.0} % by these entropies, alpha {}; approximate: latent steps change what follows",
            100.0 * wanted.coverage,
            alphas.join(" or "),
        )?;
    }
    let inert: Vec<String> = plan
        .runs()
        .filter_map(|e| {
            let twin = summaries.get(&e.id)?.twin.as_deref()?;
            let knobs = apart(dir, plan, e, twin).join(", ");
            Some(format!("{} = {twin} ({knobs})", e.id))
        })
        .collect();
    if !inert.is_empty() {
        writeln!(
            out,
            "inert here, sample for sample, whatever the knobs say: {}",
            inert.join("; ")
        )?;
    }
    Ok(())
}

/// Counts of segments by length in powers of two, such as `1: 40  2: 12  3-4: 5`.
fn lengths(segments: &BTreeMap<u32, u64>) -> Option<String> {
    let mut bins: BTreeMap<u32, u64> = BTreeMap::new();
    for (length, count) in segments {
        *bins.entry(length.max(&1).next_power_of_two()).or_default() += count;
    }
    let words: Vec<String> = bins
        .iter()
        .map(|(&top, count)| {
            let bottom = top / 2 + 1;
            if bottom >= top {
                format!("{top}: {count}")
            } else {
                format!("{bottom}-{top}: {count}")
            }
        })
        .collect();
    (!words.is_empty()).then(|| words.join("  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_counted_in_powers_of_two() {
        let segments = BTreeMap::from([(1, 7), (2, 4), (3, 2), (4, 1), (40, 5)]);
        assert_eq!(lengths(&segments).unwrap(), "1: 7  2: 4  3-4: 3  33-64: 5");
        assert_eq!(lengths(&BTreeMap::new()), None);
    }
}
