//! `validate`: whether files hold what they should, every problem found and named.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use dlmom_core::{Mode, Reason};
use dlmom_eval::sha256_hex;
use dlmom_runs::fold::{CellRows, read_cell};
use dlmom_runs::row::ROW_SCHEMA_VERSION;
use dlmom_runs::rundir::{Kind as CellKind, MANIFEST_FORMAT, diff, donors_path, read_config};
use dlmom_runs::{
    DriftKind, DriftLine, Experiment, Manifest, ManifestCell, Overrides, PRESETS, Pilot, Plan,
    Preset, REF, RawRow, Registry, RunDirError, Summary, read_drift, read_manifest, summarize,
    summarize_drift, topologies, twin, yaml,
};
use dlmom_runtime::{HandoffRecord, JobKey, Stop, Topology};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;

use crate::list::Agents;
use crate::packet::census;
use crate::status::{CliError, ExitStatus};
use crate::visits::switches;

/// Problems of one path that are printed.
const SHOWN: usize = 50;

/// What a path holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// A run folder.
    Run,
    /// A suites file.
    Suites,
    /// A topology file.
    Topology,
    /// A preset file.
    Preset,
    /// Packets, dense beliefs, embeddings or transcripts.
    Packet,
    /// Raw rows, traces or drift.
    Rows,
}

/// Arguments of `validate`.
#[derive(Debug, clap::Args)]
pub struct ValidateArgs {
    /// Run folders; suites, topology and preset files (.yaml); row, trace and drift files (.jsonl); files of packets.
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// What the paths hold [default: as they look].
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        value_name = "run|suites|topology|preset|packet|rows"
    )]
    pub kind: Option<What>,
}

/// What was found, in order: good news and problems.
#[derive(Default)]
struct Findings {
    good: Vec<String>,
    problems: Vec<String>,
}

impl Findings {
    fn ok(&mut self, place: &Path, text: &str) {
        self.good.push(format!("ok: {}: {text}", place.display()));
    }

    fn at(&mut self, place: &Path, text: &str) {
        self.problems.push(format!("{}: {text}", place.display()));
    }

    fn line(&mut self, file: &Path, line: usize, text: &str) {
        self.problems
            .push(format!("{}:{line}: {text}", file.display()));
    }
}

pub(crate) fn command(
    args: &ValidateArgs,
    out: &mut dyn Write,
    _: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let mut problems = 0;
    for path in &args.paths {
        let mut found = Findings::default();
        examine(args.kind, path, &mut found);
        for line in &found.good {
            writeln!(out, "{line}")?;
        }
        for line in found.problems.iter().take(SHOWN) {
            writeln!(out, "{line}")?;
        }
        if let Some(more) = found.problems.len().checked_sub(SHOWN).filter(|n| *n > 0) {
            writeln!(out, "{}: {more} more problems", path.display())?;
        }
        problems += found.problems.len();
    }
    match problems {
        0 => Ok(ExitStatus::Success),
        1 => Err(CliError::Usage("1 problem".into())),
        n => Err(CliError::Usage(format!("{n} problems"))),
    }
}

fn examine(kind: Option<What>, path: &Path, found: &mut Findings) {
    if !path.exists() {
        return found.at(path, "no such file or folder");
    }
    let extension = path.extension().and_then(|e| e.to_str());
    let kind = kind.or_else(|| match extension {
        _ if path.is_dir() => {
            (path.join("run.json").exists() || path.join("raw").is_dir()).then_some(What::Run)
        }
        Some("yaml" | "yml") => Some(yaml_kind(path)),
        Some("jsonl") => Some(What::Rows),
        _ => Some(What::Packet),
    });
    match kind {
        Some(What::Run) => run(path, found),
        Some(What::Suites) => suites(path, found),
        Some(What::Topology) => topology(path, found),
        Some(What::Preset) => preset(path, found),
        Some(What::Packet) => packets(path, found),
        Some(What::Rows) => rows(path, found),
        None => found.at(path, "no run folder: neither run.json nor raw/"),
    }
}

/// What a YAML file looks like: a suites file unless it has the keys of another.
fn yaml_kind(path: &Path) -> What {
    #[derive(Deserialize)]
    struct Looks {
        kind: Option<IgnoredAny>,
        knobs: Option<IgnoredAny>,
    }
    let looks = std::fs::read_to_string(path)
        .ok()
        .and_then(|text| yaml::from_str::<Looks>("", &text).ok());
    match looks {
        Some(Looks { kind: Some(_), .. }) => What::Topology,
        Some(Looks { knobs: Some(_), .. }) => What::Preset,
        _ => What::Suites,
    }
}

fn text_of(path: &Path, found: &mut Findings) -> Option<String> {
    std::fs::read_to_string(path)
        .map_err(|error| found.at(path, &format!("cannot read: {error}")))
        .ok()
}

fn topology(path: &Path, found: &mut Findings) {
    let Some(text) = text_of(path, found) else {
        return;
    };
    match topologies::check(&path.display().to_string(), &text) {
        Ok(seating) => {
            let kind = match seating.topology {
                Topology::Lockstep => "lockstep",
                Topology::Hierarchical(_) => "hierarchical",
                Topology::Sequential(_) => "sequential",
            };
            found.ok(path, &format!("{kind}, {} agents", seating.seats.len()));
        }
        Err(error) => found.problems.push(error.to_string()),
    }
}

fn preset(path: &Path, found: &mut Findings) {
    let Some(text) = text_of(path, found) else {
        return;
    };
    let name = path.display().to_string();
    let checked = Preset::parse(&name, &text)
        .map_err(|e| e.to_string())
        .and_then(|preset| {
            let mut registry = Registry::builtin().map_err(|e| e.to_string())?;
            registry.add(PRESETS, vec![preset.cell()]);
            let suites = [PRESETS.to_owned()];
            registry
                .expand(
                    &suites,
                    &[],
                    &Agents::OneModel.setting(),
                    &Overrides::default(),
                )
                .map_err(|e| e.to_string())?;
            Ok(preset)
        });
    match checked {
        Ok(preset) => found.ok(path, &format!("preset {}", preset.name)),
        Err(error) => found.problems.push(error),
    }
}

// --- suites ---

fn suites(path: &Path, found: &mut Findings) {
    let registry = match Registry::load(path) {
        Ok(registry) => registry,
        Err(error) => return found.problems.push(error.to_string()),
    };
    let cells: usize = registry.suites.iter().map(|s| s.cells.len()).sum();
    found.ok(
        path,
        &format!("{} suites, {cells} cells", registry.suites.len()),
    );
    for (agents, name) in Agents::ALL {
        match registry.expand(&[], &[], &agents.setting(), &Overrides::default()) {
            Ok(plan) => found.ok(path, &format!("agents of {name}: {}", outline(&plan))),
            Err(error) => {
                let text = error.to_string();
                // What is wrong whatever the agents are is said once.
                if !found.problems.contains(&text) {
                    found.problems.push(text);
                }
            }
        }
    }
}

/// What becomes of the cells of a plan, REF not counted.
fn outline(plan: &Plan) -> String {
    use dlmom_runs::CellKind as Fate;
    let cells = || plan.cells.iter().skip(1);
    let count = |of: fn(&Fate) -> bool| cells().filter(|c| of(&c.kind)).count();
    let missing: Vec<&str> = plan
        .runs()
        .filter(|e| e.supported().is_err())
        .map(|e| e.id.as_str())
        .collect();
    let missing = match missing.as_slice() {
        [] => String::new(),
        ids => format!("; not built yet: {}", ids.join(" ")),
    };
    format!(
        "{} run, {} same as another, {} skipped{missing}",
        count(|kind| *kind == Fate::Run),
        count(|kind| matches!(kind, Fate::Alias { .. })),
        count(|kind| matches!(kind, Fate::Skip { .. })),
    )
}

// --- packets ---

fn packets(path: &Path, found: &mut Findings) {
    match census(path) {
        Ok(counts) => {
            let words: Vec<String> = counts
                .iter()
                .map(|(kind, count)| format!("{count} {kind}"))
                .collect();
            found.ok(path, &words.join(", "));
        }
        Err(error) => found.problems.push(error.to_string()),
    }
}

// --- rows and traces ---

/// The facts of a row that its trace must agree with.
struct Facts {
    line: usize,
    latent_steps: u32,
    explicit_tokens: u32,
    switches: u32,
    handoffs: u32,
    stop: Stop,
}

/// Calls `visit` on every whole line with its number from 1. A torn last line is a problem.
fn each_line(
    path: &Path,
    found: &mut Findings,
    mut visit: impl FnMut(&mut Findings, usize, &[u8]),
) {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) => return found.at(path, &format!("cannot read: {error}")),
    };
    for (index, piece) in bytes.split_inclusive(|b| *b == b'\n').enumerate() {
        let whole = piece.last() == Some(&b'\n');
        let line = piece.strip_suffix(b"\n").unwrap_or(piece);
        if !whole && serde_json::from_slice::<serde::de::IgnoredAny>(line).is_err() {
            let text = format!("torn last line ({} bytes); --resume repairs it", line.len());
            found.line(path, index + 1, &text);
        } else {
            visit(found, index + 1, line);
        }
    }
}

/// The parser's words without the line, which is always 1 within a line. What is missing is in no column.
fn words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) if text.starts_with("missing field") => text[..at].to_owned(),
        Some(at) => format!("column {}: {}", error.column(), &text[..at]),
        None => text,
    }
}

fn expected<T: PartialEq + std::fmt::Display>(name: &str, is: &T, should: &T) -> Option<String> {
    (is != should).then(|| format!("{name} is {is}, expected {should}"))
}

/// What is wrong within one row.
fn within(row: &RawRow) -> Vec<String> {
    let steps = row.explicit_tokens.saturating_add(row.latent_steps);
    let segments: u64 = row.latent_segments.iter().map(|n| u64::from(*n)).sum();
    let forward: u64 = row
        .forward_tokens_per_agent
        .iter()
        .map(|n| u64::from(*n))
        .sum();
    [
        expected("schema_version", &row.schema_version, &ROW_SCHEMA_VERSION),
        expected("total_steps", &row.total_steps, &steps),
        expected(
            "the sum of latent_segments",
            &segments,
            &u64::from(row.latent_steps),
        ),
        expected(
            "the sum of forward_tokens_per_agent",
            &forward,
            &row.forward_tokens,
        ),
        (row.failure.is_some() && (row.correct || row.correct_flexible))
            .then(|| "a failed sample counts as correct".to_owned()),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Reads raw rows; those of a run are checked against its cell.
fn raw(
    path: &Path,
    cell: Option<(&ManifestCell, Option<&Experiment>)>,
    found: &mut Findings,
) -> HashMap<JobKey, Facts> {
    let mut seen: HashMap<JobKey, Facts> = HashMap::new();
    let mut first: Option<(String, String)> = None;
    each_line(path, found, |found, line, bytes| {
        let row: RawRow = match serde_json::from_slice(bytes) {
            Ok(row) => row,
            Err(error) => {
                return found.line(path, line, &format!("not a row: {}", words(&error)));
            }
        };
        for problem in within(&row) {
            found.line(path, line, &problem);
        }
        let (id, hash) = if let Some((cell, _)) = cell {
            (&cell.id, &cell.config_hash)
        } else {
            let (id, hash) =
                first.get_or_insert_with(|| (row.experiment.clone(), row.config_hash.clone()));
            (&*id, &*hash)
        };
        let facts = [
            expected("experiment", &row.experiment, id),
            expected("config_hash", &row.config_hash, hash),
        ];
        for problem in facts.into_iter().flatten() {
            found.line(path, line, &problem);
        }
        if let Some((_, Some(experiment))) = cell
            && experiment.cap >= 0
            && i64::from(row.switches) > experiment.cap
        {
            let text = format!("{} switches, the cap is {}", row.switches, experiment.cap);
            found.line(path, line, &text);
        }
        let facts = Facts {
            line,
            latent_steps: row.latent_steps,
            explicit_tokens: row.explicit_tokens,
            switches: row.switches,
            handoffs: row.handoffs,
            stop: row.stop,
        };
        let key = row.key();
        if let Some(earlier) = seen.get(&key) {
            let text = format!("{} is already on line {}", sample(&key), earlier.line);
            found.line(path, line, &text);
        }
        seen.insert(key, facts);
    });
    seen
}

fn sample(key: &JobKey) -> String {
    format!(
        "item {}, seed {}, sample {}",
        key.item_id, key.seed, key.sample
    )
}

/// A trace as the file has it: what is not finite is null there.
#[derive(Deserialize)]
struct Record {
    experiment: String,
    #[serde(flatten)]
    key: JobKey,
    entropy: Vec<Option<f64>>,
    observed: Vec<Option<f64>>,
    expert_entropy: Vec<Vec<Option<f64>>>,
    merged_entropy: Vec<Option<f64>>,
    mode: Vec<Mode>,
    reason: Vec<Reason>,
    top_ids: Vec<Vec<u32>>,
    top_probs: Vec<Vec<Option<f64>>>,
    top_tokens: Vec<Vec<String>>,
    mass: Vec<Option<f64>>,
    noise_kl: Vec<Option<f64>>,
    token: Vec<Option<u32>>,
    #[serde(default)]
    handoffs: Vec<HandoffRecord>,
}

impl Record {
    fn within(&self) -> Vec<String> {
        let steps = self.mode.len();
        let columns = [
            ("entropy", self.entropy.len()),
            ("observed", self.observed.len()),
            ("expert_entropy", self.expert_entropy.len()),
            ("merged_entropy", self.merged_entropy.len()),
            ("reason", self.reason.len()),
            ("top_ids", self.top_ids.len()),
            ("top_probs", self.top_probs.len()),
            ("top_tokens", self.top_tokens.len()),
            ("mass", self.mass.len()),
            ("noise_kl", self.noise_kl.len()),
            ("token", self.token.len()),
        ];
        let mut problems: Vec<String> = columns
            .iter()
            .filter(|(_, len)| *len != steps)
            .map(|(name, len)| format!("{name} has {len} entries, mode {steps}"))
            .collect();
        let uneven = self
            .top_ids
            .iter()
            .zip(&self.top_probs)
            .zip(&self.top_tokens)
            .position(|((ids, probs), tokens)| {
                ids.len() != probs.len() || ids.len() != tokens.len()
            });
        if let Some(step) = uneven {
            problems.push(format!(
                "step {step}: top_ids, top_probs and top_tokens differ in length"
            ));
        }
        problems
    }

    /// Where the trace and its row say different things.
    fn against(&self, row: &Facts) -> Vec<String> {
        // A sample that the backend failed on may have counted a step that it could not record.
        if row.stop == Stop::Backend {
            return Vec::new();
        }
        let latent = self.mode.iter().filter(|m| **m == Mode::Latent).count();
        let switches = switches(&self.mode, &self.handoffs).count();
        let printed = self.token.iter().flatten().count();
        [
            ("latent steps", latent, row.latent_steps),
            ("switches", switches, row.switches),
            ("printed tokens", printed, row.explicit_tokens),
            ("handoffs", self.handoffs.len(), row.handoffs),
        ]
        .into_iter()
        .filter(|(_, is, should)| *is != *should as usize)
        .map(|(name, is, should)| format!("{is} {name}, its row has {should}"))
        .collect()
    }
}

/// Reads traces, those of a run checked against its rows; how many samples they are of.
fn traces(
    path: &Path,
    run: Option<(&str, &HashMap<JobKey, Facts>, bool)>,
    found: &mut Findings,
) -> usize {
    let mut last: HashMap<JobKey, (usize, Vec<String>)> = HashMap::new();
    each_line(path, found, |found, line, bytes| {
        let record: Record = match serde_json::from_slice(bytes) {
            Ok(record) => record,
            Err(error) => {
                return found.line(path, line, &format!("not a trace: {}", words(&error)));
            }
        };
        for problem in record.within() {
            found.line(path, line, &problem);
        }
        let mut problems = Vec::new();
        if let Some((id, rows, finished)) = run {
            problems.extend(expected("experiment", &record.experiment.as_str(), &id));
            match rows.get(&record.key) {
                Some(row) => problems.extend(record.against(row)),
                // A run that was killed may have traced a sample whose row it did not write.
                None if finished => problems.push(format!("{} has no row", sample(&record.key))),
                None => {}
            }
        }
        // Of a sample that was traced twice the last record counts.
        last.insert(record.key, (line, problems));
    });
    let count = last.len();
    let mut rest: Vec<(usize, Vec<String>)> = last.into_values().collect();
    rest.sort_by_key(|(line, _)| *line);
    for (line, problems) in rest {
        for problem in problems {
            found.line(path, line, &problem);
        }
    }
    count
}

/// Reads the lines of a drift file, those of a run checked against its cell; how many there are.
fn drift(path: &Path, id: Option<&str>, found: &mut Findings) -> usize {
    let mut count = 0;
    each_line(path, found, |found, line, bytes| {
        let read: DriftLine = match serde_json::from_slice(bytes) {
            Ok(read) => read,
            Err(error) => {
                return found.line(path, line, &format!("not a drift line: {}", words(&error)));
            }
        };
        count += 1;
        if let Some(id) = id
            && let Some(problem) = expected("experiment", &read.experiment.as_str(), &id)
        {
            found.line(path, line, &problem);
        }
        let steps = read.steps as usize;
        let lengths = read.divergences.iter().flat_map(|d| {
            [
                ("step", d.step.len()),
                ("kl", d.kl.len()),
                ("cosine", d.cosine.len()),
            ]
        });
        for (name, len) in lengths {
            if let Some(problem) = expected(&format!("the length of {name}"), &len, &steps) {
                found.line(path, line, &problem);
            }
        }
        let decisions = read.kind == DriftKind::Decisions;
        if decisions != read.changed.is_some() || decisions == read.divergences.is_some() {
            let text = "decisions have a count of changed steps, other kinds have divergences";
            found.line(path, line, text);
        }
    });
    count
}

fn rows(path: &Path, found: &mut Findings) {
    #[derive(Deserialize)]
    struct Looks {
        observed: Option<IgnoredAny>,
        divergences: Option<IgnoredAny>,
        changed: Option<IgnoredAny>,
    }
    let mut first = Vec::new();
    let read = File::open(path).and_then(|file| BufReader::new(file).read_until(b'\n', &mut first));
    match read {
        Ok(0) => return found.at(path, "holds no rows"),
        Ok(_) => {}
        Err(error) => return found.at(path, &format!("cannot read: {error}")),
    }
    let before = found.problems.len();
    let looks = serde_json::from_slice::<Looks>(&first).ok();
    let is_trace = looks.as_ref().is_some_and(|l| l.observed.is_some());
    let is_drift = looks.is_some_and(|l| l.divergences.is_some() || l.changed.is_some());
    let (count, what) = if is_drift {
        (drift(path, None, found), "comparisons")
    } else if is_trace {
        (traces(path, None, found), "traces")
    } else {
        (raw(path, None, found).len(), "rows")
    };
    if found.problems.len() == before {
        found.ok(path, &format!("{count} {what}"));
    }
}

// --- runs ---

fn run(root: &Path, found: &mut Findings) {
    let path = root.join("run.json");
    let manifest = match read_manifest(root) {
        Ok(Some(manifest)) => manifest,
        Ok(None) => return found.at(&path, "not there"),
        Err(RunDirError::BadManifest { source, .. }) => {
            let text = format!("not a manifest: {}", words(&source));
            return found.line(&path, source.line(), &text);
        }
        Err(error) => return found.problems.push(error.to_string()),
    };
    if let Some(problem) = expected("format", &manifest.format, &MANIFEST_FORMAT) {
        found.at(&path, &problem);
    }
    let finished = manifest
        .invocations
        .last()
        .is_some_and(|i| i.finished_at.is_some());
    let state = if finished { "finished" } else { "not finished" };
    let text = format!(
        "{} cells on {}, {state}",
        manifest.cells.len(),
        manifest.bench
    );
    found.ok(&path, &text);
    let mut cells: HashMap<&str, CellRows> = HashMap::new();
    let mut faulty: HashSet<&str> = HashSet::new();
    let mut tally = Tally::default();
    for planned in &manifest.cells {
        let id = planned.id.as_str();
        if planned.kind == CellKind::Skip {
            continue;
        }
        let experiment = config(root, &manifest, planned, found);
        tally.configs += 1;
        if planned.kind == CellKind::Alias {
            continue;
        }
        let file = root.join("raw").join(format!("{id}.jsonl"));
        let keys = if file.exists() {
            let before = found.problems.len();
            let keys = raw(&file, Some((planned, experiment.as_ref())), found);
            if found.problems.len() > before {
                faulty.insert(id);
            } else if let Ok(rows) = read_cell(&file) {
                cells.insert(id, rows);
            }
            keys
        } else {
            if finished {
                found.at(&file, "not there");
            }
            HashMap::new()
        };
        tally.rows += keys.len();
        let file = root.join("traces").join(format!("{id}.jsonl"));
        if file.exists() {
            tally.traces += traces(&file, Some((id, &keys, finished)), found);
        }
        let file = root.join("drift").join(format!("{id}.jsonl"));
        if file.exists() {
            tally.drift += drift(&file, Some(id), found);
        }
    }
    for planned in &manifest.cells {
        let of = planned.alias_of.as_deref().unwrap_or(&planned.id);
        if planned.kind != CellKind::Skip
            && let Some(rows) = cells.get(of)
        {
            // Without the reference's rows nothing can be compared with it.
            let reference = cells.get(REF);
            if reference.is_none() {
                continue;
            }
            let reference = reference.filter(|_| of != REF);
            let earlier = || {
                let ids = manifest.cells.iter().map(|c| c.id.as_str());
                ids.take_while(|id| *id != of)
            };
            let known = !earlier().any(|id| faulty.contains(id));
            let twin = if known {
                Twin::Is(twin(rows, earlier().filter_map(|id| cells.get(id))))
            } else {
                Twin::Unknown
            };
            let rows = Sources {
                rows,
                reference,
                twin,
            };
            summary(root, &manifest, planned, rows, finished, found);
            tally.summaries += 1;
        }
    }
    if let Some(pilot) = &manifest.pilot {
        donors(root, pilot, finished, found);
    }
    strays(root, &manifest, found);
    for (folder, count, text) in [
        (
            "configs",
            tally.configs,
            "experiments with the recorded digests",
        ),
        (
            "raw",
            tally.rows,
            "rows, each once and of its cell's digest",
        ),
        (
            "traces",
            tally.traces,
            "samples whose traces agree with their rows",
        ),
        ("drift", tally.drift, "comparisons with the reference"),
        ("summary", tally.summaries, "that follow from the rows"),
    ] {
        let folder = root.join(folder);
        let inside = format!("{}{}", folder.display(), std::path::MAIN_SEPARATOR);
        if count > 0 && !found.problems.iter().any(|p| p.starts_with(&inside)) {
            found.ok(&folder, &format!("{count} {text}"));
        }
    }
}

/// What a run folder holds.
#[derive(Default)]
struct Tally {
    configs: usize,
    rows: usize,
    traces: usize,
    drift: usize,
    summaries: usize,
}

/// `configs/<ID>.yaml`: readable, of that name, and what the digest was made from.
fn config(
    root: &Path,
    manifest: &Manifest,
    planned: &ManifestCell,
    found: &mut Findings,
) -> Option<Experiment> {
    let path = root.join("configs").join(format!("{}.yaml", planned.id));
    let experiment = match read_config(root, &planned.id) {
        Ok(Some(experiment)) => experiment,
        Ok(None) => {
            found.at(&path, "not there");
            return None;
        }
        Err(error) => {
            found.problems.push(error.to_string());
            return None;
        }
    };
    if let Some(problem) = expected("id", &experiment.id, &planned.id) {
        found.at(&path, &problem);
    }
    match manifest.digest(&experiment) {
        Ok(hash) if hash == planned.config_hash => {}
        Ok(hash) => {
            let text = format!("its digest is {hash}, run.json has {}", planned.config_hash);
            found.at(&path, &text);
        }
        Err(error) => found.at(&path, &error.to_string()),
    }
    Some(experiment)
}

/// The earlier cell that decides as this one does.
enum Twin {
    Is(Option<String>),
    /// The rows of an earlier cell are faulty.
    Unknown,
}

/// What a summary is made from.
struct Sources<'a> {
    rows: &'a CellRows,
    reference: Option<&'a CellRows>,
    twin: Twin,
}

/// `summary/<ID>.json`: what its rows give.
fn summary(
    root: &Path,
    manifest: &Manifest,
    planned: &ManifestCell,
    sources: Sources<'_>,
    finished: bool,
    found: &mut Findings,
) {
    let path = root.join("summary").join(format!("{}.json", planned.id));
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // It is written when its cell ends.
            if finished {
                found.at(&path, "not there");
            }
            return;
        }
        Err(error) => return found.at(&path, &format!("cannot read: {error}")),
    };
    let recorded: Value = match serde_json::from_str(&text) {
        Ok(value) => value,
        Err(error) => {
            return found.line(&path, error.line(), &format!("not JSON: {}", words(&error)));
        }
    };
    let Some(summary) = summarize(sources.rows, sources.reference, manifest.ln_vocab) else {
        return;
    };
    let of = planned.alias_of.as_deref().unwrap_or(&planned.id);
    let lines = match read_drift(&root.join("drift").join(format!("{of}.jsonl"))) {
        Ok(lines) => lines,
        Err(error) => return found.problems.push(error.to_string()),
    };
    let summary = Summary {
        experiment: planned.id.clone(),
        suite: planned.suite.clone(),
        drift: summarize_drift(&lines),
        twin: match sources.twin {
            Twin::Is(twin) => twin,
            Twin::Unknown => recorded
                .get("twin")
                .and_then(Value::as_str)
                .map(str::to_owned),
        },
        ..summary
    };
    let again = serde_json::to_string(&summary).and_then(|text| serde_json::from_str(&text));
    match again {
        Ok(again) => {
            let differences = diff("", &recorded, &again);
            match differences.as_slice() {
                [] => {}
                [first, rest @ ..] => {
                    let more = match rest.len() {
                        0 => String::new(),
                        n => format!(", and {n} more fields"),
                    };
                    let name = &first.path;
                    let show = |v: &Option<Value>| match v.as_ref().map(Value::to_string) {
                        None => "absent".to_owned(),
                        Some(text) if text.len() <= 40 => text,
                        Some(_) => "another value".to_owned(),
                    };
                    let (is, should) = (show(&first.recorded), show(&first.current));
                    found.at(
                        &path,
                        &format!("{name} is {is}, the rows give {should}{more}"),
                    );
                }
            }
        }
        Err(error) => found.at(&path, &error.to_string()),
    }
}

/// `pilot/donors.dltr`: the packets that the digests of cells were made with.
fn donors(root: &Path, pilot: &Pilot, finished: bool, found: &mut Findings) {
    let Some(recorded) = &pilot.donors_sha256 else {
        return;
    };
    let path = donors_path(root);
    match std::fs::read(&path) {
        Ok(bytes) if sha256_hex(&bytes) == *recorded => {
            let items = pilot.donor_items.len();
            found.ok(&path, &format!("packets of {items} items"));
        }
        Ok(_) => found.at(&path, "its digest is not the one in run.json"),
        // It is written after run.json.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            if finished {
                found.at(&path, "not there");
            }
        }
        Err(error) => found.at(&path, &format!("cannot read: {error}")),
    }
}

/// Files of rows that no cell of the manifest has.
fn strays(root: &Path, manifest: &Manifest, found: &mut Findings) {
    for folder in ["raw", "traces", "drift"] {
        let Ok(entries) = std::fs::read_dir(root.join(folder)) else {
            continue;
        };
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            let name = file
                .file_name()
                .and_then(|n| n.to_str())
                .unwrap_or_default();
            if let Some(id) = name.strip_suffix(".jsonl")
                && !manifest.cells.iter().any(|cell| cell.id == id)
            {
                found.at(&file, "run.json has no such cell");
            }
        }
    }
}
