//! `run`: every cell of the plan, each sample recorded as it finishes.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::Write;
use std::mem::take;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use dlmom_core::Schedule;
use dlmom_eval::{CodeJudge, Item, read};
use dlmom_runs::fold::{CellRows, FoldError, read_cell, read_rows};
use dlmom_runs::row::Drift;
use dlmom_runs::rundir::Kind;
use dlmom_runs::{
    CellKind, Experiment, JsonlWriter, Plan, REF, RawRow, RawWriter, Repair, RowContext, RunDir,
    Summary, TraceLine, read_drift, summarize, summarize_drift, twin,
};
use dlmom_runtime::{
    EnsembleInfo, Hooks, Job, JobKey, MemoryStats, Outcome, Progress, RunOptions, RunStats, Share,
    Sink, run_shared,
};
use serde_json::json;

use crate::args::{DisplayKind, Order, RunArgs};
use crate::display::{CellProgress, CellStart, Display, Log, Plain, Silent};
use crate::drift;
use crate::host::Host;
use crate::prepare::{Prepared, Selection, now, prepare, seeds_of, select};
use crate::report;
use crate::status::{CliError, ExitStatus};

/// Time between two plain progress lines.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// Runs the suites named in `args`.
pub(crate) fn command(
    args: &RunArgs,
    argv: &[String],
    host: &mut dyn Host,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let selection = select(args, host)?;
    if args.dry_run {
        report::dry_run(out, &selection, args)?;
        return Ok(ExitStatus::Success);
    }
    let mut prepared = prepare(args, argv, selection, host, err)?;
    let mut display = display(args, host);
    let mut book = Book::default();
    let ended = cells(args, &mut prepared, &mut book, host, &mut *display);
    display.stop();
    if let Err(error) = ended {
        if matches!(error, CliError::Interrupted) {
            writeln!(err, "interrupted; continue with: {}", resume_command(argv))?;
        } else {
            writeln!(
                err,
                "stopped; what was finished is kept, continue with: {}",
                resume_command(argv)
            )?;
        }
        return Err(error);
    }
    let Prepared { plan, dir, .. } = &mut prepared;
    let summaries = book.summaries(plan, dir)?;
    let finished = now();
    dir.update_manifest(|manifest| {
        if let Some(invocation) = manifest.invocations.last_mut() {
            invocation.finished_at = Some(finished);
        }
    })?;
    report::finished(out, plan, &summaries, dir)?;
    Ok(ExitStatus::Success)
}

fn display(args: &RunArgs, host: &mut dyn Host) -> Box<dyn Display> {
    let plain = || Box::new(Plain::new(std::io::stderr(), PLAIN_EVERY)) as Box<dyn Display>;
    match args.display {
        Some(DisplayKind::None) => Box::new(Silent),
        Some(DisplayKind::Log) => Box::new(Log(std::io::stderr())),
        Some(DisplayKind::Rich) | None if host.terminal() => host.rich().unwrap_or_else(plain),
        Some(DisplayKind::Plain | DisplayKind::Rich) | None => plain(),
    }
}

/// The command that continues the run.
fn resume_command(argv: &[String]) -> String {
    let mut words: Vec<String> = std::iter::once("dlmom-rs".to_owned())
        .chain(argv.iter().skip(1).map(|word| quote(word)))
        .collect();
    if !argv.iter().any(|word| word == "--resume") {
        words.push("--resume".into());
    }
    words.join(" ")
}

fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Runs every cell: those that need nothing of the others share one batch, item by item, so that none ends with half of it
/// empty; then those that follow what the reference pipeline did.
fn cells(
    args: &RunArgs,
    prepared: &mut Prepared,
    book: &mut Book,
    host: &mut dyn Host,
    display: &mut dyn Display,
) -> Result<(), CliError> {
    let running: Vec<Experiment> = prepared.plan.runs().cloned().collect();
    let count = running.len();
    let (later, first): (Vec<_>, Vec<_>) = running
        .into_iter()
        .enumerate()
        .partition(|(_, experiment)| experiment.same_exits);
    for batch in [first, later] {
        if batch.is_empty() {
            continue;
        }
        let ids: Vec<String> = batch.iter().map(|(_, e)| e.id.clone()).collect();
        let stats = together(args, prepared, batch, count, host, display)?;
        for id in &ids {
            book.forget(id);
        }
        for id in &ids {
            if let Some(summary) = book.summary(&prepared.dir, id)? {
                prepared.dir.write_summary(&summary)?;
            }
        }
        if let Some((stats, shares)) = stats {
            note_timings(prepared, &ids, &stats, &shares)?;
        }
    }
    Ok(())
}

/// Times of a batch, and of its cells, into the manifest.
fn note_timings(
    prepared: &mut Prepared,
    ids: &[String],
    stats: &RunStats,
    shares: &[Share],
) -> Result<(), CliError> {
    let slots = prepared.rows;
    prepared.dir.update_manifest(|manifest| {
        if !manifest.notes.is_object() {
            manifest.notes = json!({});
        }
        let mut ran = Vec::new();
        for (id, share) in ids.iter().zip(shares) {
            if share.samples > 0 {
                ran.push(id);
                // Of every invocation together.
                let before = manifest.notes["timings"][id].clone();
                let count = |name: &str| before[name].as_u64().unwrap_or(0);
                manifest.notes["timings"][id] = json!({
                    "samples": count("samples") + share.samples,
                    "rows": count("rows") + share.rows,
                    "wall_s": before["wall_s"].as_f64().unwrap_or(0.0) + share.wall_s,
                });
            }
        }
        if !manifest.notes["batches"].is_array() {
            manifest.notes["batches"] = json!([]);
        }
        if let Some(batches) = manifest.notes["batches"].as_array_mut() {
            batches.push(json!({
                "cells": ran,
                "samples": stats.samples,
                "steps": stats.steps,
                "occupancy": occupancy(stats.steps, stats.rows, slots),
                "occupancy_before_drain": occupancy(stats.full.0, stats.full.1, slots),
                "prompt_positions": stats.prompts,
                "copied_positions": stats.copied,
                "backend_s": stats.backend_s,
                "wall_s": stats.wall_s,
            }));
        }
    })?;
    Ok(())
}

fn occupancy(steps: u64, rows: u64, slots: u32) -> f64 {
    let offered = steps * u64::from(slots.max(1));
    if offered == 0 {
        0.0
    } else {
        rows as f64 / offered as f64
    }
}

/// A cell on its way: what is left of it, and where its rows go.
struct Work {
    experiment: Experiment,
    config_hash: String,
    start: CellStart,
    /// Samples that are left, in the order of admission: seed, and place among the items.
    todo: Vec<(u64, usize)>,
    schedules: HashMap<JobKey, Schedule>,
    drifts: HashMap<JobKey, Drift>,
    writer: RawWriter,
    traces: JsonlWriter,
    progress: CellProgress,
    /// Samples done and in slots when progress was last shown.
    shown: (u64, u32),
    /// Latent steps and all steps so far.
    steps: (u64, u64),
    /// When its first sample was admitted.
    started: Option<Instant>,
}

/// Opens a cell's files and finds what is left of it.
fn open(
    args: &RunArgs,
    prepared: &mut Prepared,
    experiment: Experiment,
    place: (usize, usize),
    order: &[usize],
    host: &mut dyn Host,
    display: &mut dyn Display,
) -> Result<Work, CliError> {
    let id = experiment.id.clone();
    let config_hash = prepared
        .dir
        .manifest()
        .cells
        .iter()
        .find(|c| c.id == id)
        .map(|c| c.config_hash.clone())
        .unwrap_or_default();
    let (writer, repair) = prepared.dir.raw_writer(&id, &config_hash)?;
    if let Repair::Torn { bytes, aside } = &repair {
        display.line(&format!(
            "{id}: {bytes} bytes of a torn last line moved to {}",
            aside.display()
        ));
    }
    let first_seed = first_seed(args, prepared);
    let seeds = seeds_of(&experiment, &args.seeds, first_seed);
    let todo: Vec<(u64, usize)> = seeds
        .iter()
        .flat_map(|&seed| order.iter().map(move |&place| (seed, place)))
        .filter(|&(seed, place)| !writer.is_done(&key(&prepared.items[place], seed)))
        .collect();
    let total = (seeds.len() * order.len()) as u64;
    let done = total - todo.len() as u64;
    let schedules = if experiment.same_exits {
        schedules(prepared.dir.root())?
    } else {
        HashMap::new()
    };
    let drifts = if args.drift > 0 {
        display.line(&format!(
            "{id}: drift from {REF}, {} items",
            args.drift.min(prepared.items.len())
        ));
        let schedule = |key: &JobKey| schedule_of(&schedules, key);
        drift::measure(
            prepared,
            &experiment,
            first_seed,
            args.drift,
            &schedule,
            host,
        )?
    } else {
        HashMap::new()
    };
    let traces = prepared.dir.trace_writer(&id)?;
    Ok(Work {
        start: CellStart {
            id: id.clone(),
            index: place.0,
            cells: place.1,
            total,
            done,
        },
        progress: CellProgress {
            id,
            done,
            total,
            session: 0,
            correct: 0,
            failures: 0,
            coverage: 0.0,
            active: 0,
            rate: 0.0,
            eta_s: None,
        },
        experiment,
        config_hash,
        todo,
        schedules,
        drifts,
        writer,
        traces,
        shown: (0, 0),
        steps: (0, 0),
        started: None,
    })
}

/// A resumed run keeps its first seed, so that a deterministic cell is not run again under another name.
fn first_seed(args: &RunArgs, prepared: &Prepared) -> u64 {
    let recorded = prepared.dir.manifest().seeds.first().copied();
    recorded.unwrap_or(args.seeds[0])
}

/// The places of the items in the order in which they are admitted.
fn ordered(order: Order, lengths: &[u32]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..lengths.len()).collect();
    match order {
        Order::Given => {}
        Order::Reversed => places.reverse(),
        Order::Longest => places.sort_by_key(|&place| std::cmp::Reverse(lengths[place])),
    }
    places
}

fn key(item: &Item, seed: u64) -> JobKey {
    JobKey {
        item_id: item.id.clone(),
        seed,
        sample: 0,
    }
}

/// Runs what is left of several cells in one batch; `None` if nothing was.
fn together(
    args: &RunArgs,
    prepared: &mut Prepared,
    batch: Vec<(usize, Experiment)>,
    count: usize,
    host: &mut dyn Host,
    display: &mut dyn Display,
) -> Result<Option<(RunStats, Vec<Share>)>, CliError> {
    let order = ordered(args.order, &prepared.prompt_lengths);
    let mut works = Vec::with_capacity(batch.len());
    let mut configs = Vec::with_capacity(batch.len());
    for (at, experiment) in batch {
        configs.push(experiment.loop_config(&prepared.placement)?);
        let place = (at + 1, count);
        works.push(open(
            args, prepared, experiment, place, &order, host, display,
        )?);
    }
    let items: HashMap<&str, &Item> = prepared.items.iter().map(|i| (i.id.as_str(), i)).collect();
    let first_seed = first_seed(args, prepared);
    let bench = prepared.bench.clone();
    let seating = &prepared.seating;
    let left: Vec<Vec<(u64, usize)>> = works.iter_mut().map(|w| take(&mut w.todo)).collect();
    let empty = left.iter().all(Vec::is_empty);
    let schedules: Vec<Option<HashMap<JobKey, Schedule>>> = works
        .iter_mut()
        .map(|work| {
            work.experiment
                .same_exits
                .then(|| take(&mut work.schedules))
        })
        .collect();
    let admitted: Vec<Cell<u64>> = works.iter().map(|_| Cell::new(0)).collect();
    let samples = by_item(left, &order);
    let mut jobs = samples.into_iter().map(|(config, seed, place)| {
        let item = &prepared.items[place];
        let key = key(item, seed);
        admitted[config].set(admitted[config].get() + 1);
        Job {
            prompts: seating.prompts(&bench.prompt(item)),
            trace: seed == first_seed && place < args.traces,
            config: config as u32,
            schedule: schedules[config]
                .as_ref()
                .and_then(|schedules| schedule_of(schedules, &key)),
            rival: None,
            key,
        }
    });
    let mut sink = Recorder {
        bench: prepared.bench.name(),
        items: &items,
        admitted: &admitted,
        judge: &mut *prepared.judge,
        rows: prepared.rows,
        host,
        display,
        works,
    };
    sink.begin();
    let result = if empty {
        None
    } else {
        let options = RunOptions {
            rows: Some(prepared.rows),
            ..RunOptions::default()
        };
        let hooks = Hooks {
            donors: prepared.donors.clone(),
            ..Hooks::default()
        };
        Some(run_shared(
            &mut *prepared.backend,
            &configs,
            &options,
            hooks,
            &mut jobs,
            &mut sink,
        )?)
    };
    for work in &mut sink.works {
        work.writer.sync()?;
    }
    Ok(result)
}

/// What is left of the cells, `(cell, seed, place of the item)`, in the order of admission: an item in every cell and under
/// every seed before the next one, because their prompts are the same and need to be forwarded once only, and because what an
/// interrupted run leaves can be compared by item then.
fn by_item(left: Vec<Vec<(u64, usize)>>, order: &[usize]) -> Vec<(usize, u64, usize)> {
    let mut turn = vec![0; order.len()];
    for (at, &place) in order.iter().enumerate() {
        turn[place] = at;
    }
    let mut samples: Vec<(usize, u64, usize)> = left
        .into_iter()
        .enumerate()
        .flat_map(|(cell, left)| {
            left.into_iter()
                .map(move |(seed, place)| (cell, seed, place))
        })
        .collect();
    samples.sort_by_key(|&(_, _, place)| turn[place]);
    samples
}

/// Turns outcomes into rows of their cells.
struct Recorder<'a> {
    bench: &'a str,
    items: &'a HashMap<&'a str, &'a Item>,
    /// Samples admitted so far, by cell.
    admitted: &'a [Cell<u64>],
    judge: &'a mut dyn CodeJudge,
    rows: u32,
    host: &'a mut dyn Host,
    display: &'a mut dyn Display,
    works: Vec<Work>,
}

impl Recorder<'_> {
    /// Shows cells that have come to their turn: those with nothing left, once all before them have begun, and those with a
    /// sample in a slot.
    fn begin(&mut self) {
        for (work, admitted) in self.works.iter_mut().zip(self.admitted) {
            if work.started.is_some() {
                continue;
            }
            let finished = work.start.done == work.start.total;
            if !finished && admitted.get() == 0 {
                break;
            }
            work.started = Some(Instant::now());
            self.display.start(&work.start);
            if finished {
                self.display.finish(&work.progress);
            }
        }
    }
}

impl Sink for Recorder<'_> {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        memory: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.begin();
        let work = &mut self.works[outcome.config as usize];
        let item = self
            .items
            .get(outcome.key.item_id.as_str())
            .ok_or_else(|| format!("no item {}", outcome.key.item_id))?;
        let context = RowContext {
            experiment: &work.experiment,
            config_hash: &work.config_hash,
            bench: self.bench,
            batch_size: self.rows,
            memory,
            drift: work.drifts.get(&outcome.key).copied(),
        };
        // A program is judged here and now: the batch waits for it.
        let row = RawRow::new(&context, &outcome, item, self.judge)?;
        // The trace goes first: a sample counts as done once its row is there.
        if let Some(trace) = outcome.trace {
            work.traces.append(&TraceLine {
                experiment: work.experiment.id.clone(),
                key: outcome.key,
                trace,
            })?;
        }
        work.writer.append(&row)?;
        work.steps.0 += u64::from(row.latent_steps);
        work.steps.1 += u64::from(row.total_steps);
        let progress = &mut work.progress;
        progress.done += 1;
        progress.session += 1;
        progress.correct += u64::from(row.correct);
        progress.failures += u64::from(row.failure.is_some());
        progress.coverage = if work.steps.1 == 0 {
            0.0
        } else {
            work.steps.0 as f64 / work.steps.1 as f64
        };
        let elapsed = work.started.map_or(0.0, |at| at.elapsed().as_secs_f64());
        progress.rate = progress.session as f64 / elapsed.max(1e-9);
        progress.eta_s = Some((progress.total - progress.done) as f64 / progress.rate);
        if progress.done == progress.total {
            progress.active = 0;
            self.display.finish(progress);
        }
        Ok(())
    }

    fn answered(&mut self, key: &JobKey, text: &str) -> bool {
        self.items
            .get(key.item_id.as_str())
            .is_some_and(|item| read(item, text).answer.is_some())
    }

    fn progress(&mut self, _: &Progress) {
        self.begin();
        for (work, admitted) in self.works.iter_mut().zip(self.admitted) {
            let active = (admitted.get() - work.progress.session) as u32;
            let now = (work.progress.done, active);
            if active > 0 && work.shown != now {
                work.shown = now;
                work.progress.active = active;
                self.display.update(&work.progress);
            }
        }
    }

    fn poll(&mut self) -> ControlFlow<()> {
        self.host.poll()
    }
}

/// The modes of the reference pipeline's samples.
pub(crate) fn schedules(run: &Path) -> Result<HashMap<JobKey, Schedule>, CliError> {
    let wrong = |e: FoldError| CliError::Usage(e.to_string());
    let (rows, _) = read_rows::<RawRow>(&run.join("raw").join(format!("{REF}.jsonl")), |row| row)
        .map_err(wrong)?;
    Ok(rows
        .into_iter()
        .map(|row| (row.key(), Schedule::from(row.mode_runs)))
        .collect())
}

/// The modes of a sample; of another seed's where the reference pipeline draws nothing and ran with that alone.
pub(crate) fn schedule_of(schedules: &HashMap<JobKey, Schedule>, key: &JobKey) -> Option<Schedule> {
    let same_item = || {
        schedules
            .iter()
            .filter(|(other, _)| other.item_id == key.item_id)
            .min_by_key(|(other, _)| (other.seed, other.sample))
            .map(|(_, schedule)| schedule)
    };
    schedules.get(key).or_else(same_item).cloned()
}

/// The rows of a raw file; none where a run was killed before its first.
pub(crate) fn rows_of(path: &Path) -> Result<Option<CellRows>, CliError> {
    match read_cell(path) {
        Ok(rows) => Ok(Some(rows)),
        Err(FoldError::Empty { .. }) => Ok(None),
        Err(error) => Err(CliError::Usage(error.to_string())),
    }
}

/// Rows of a folder's cells, read once.
#[derive(Default)]
struct Book {
    rows: HashMap<String, Option<CellRows>>,
}

impl Book {
    /// Forgets the rows of a cell that has got more of them.
    fn forget(&mut self, id: &str) {
        self.rows.remove(id);
    }

    fn load(&mut self, dir: &RunDir, id: &str) -> Result<(), CliError> {
        if self.rows.contains_key(id) {
            return Ok(());
        }
        let path = dir.raw_path(id);
        let rows = if path.exists() { rows_of(&path)? } else { None };
        self.rows.insert(id.to_owned(), rows);
        Ok(())
    }

    fn get(&self, id: &str) -> Option<&CellRows> {
        self.rows.get(id).and_then(Option::as_ref)
    }

    /// The summary of a cell with rows of its own, compared with the reference and with the cells before it.
    fn summary(&mut self, dir: &RunDir, id: &str) -> Result<Option<Summary>, CliError> {
        let cells = &dir.manifest().cells;
        let earlier: Vec<&str> = cells
            .iter()
            .take_while(|c| c.id != id)
            .filter(|c| c.kind == Kind::Run)
            .map(|c| c.id.as_str())
            .collect();
        for id in earlier.iter().copied().chain([REF, id]) {
            self.load(dir, id)?;
        }
        let Some(rows) = self.get(id) else {
            return Ok(None);
        };
        let reference = self.get(REF).filter(|_| id != REF);
        let Some(mut summary) = summarize(rows, reference, dir.manifest().ln_vocab) else {
            return Ok(None);
        };
        let lines = read_drift(&dir.drift_path(id)).map_err(|e| CliError::Usage(e.to_string()))?;
        summary.drift = summarize_drift(&lines);
        summary.twin = twin(rows, earlier.into_iter().filter_map(|id| self.get(id)));
        Ok(Some(summary))
    }

    /// The summaries of every cell of a plan that has rows, aliases under their own name, written and returned by id.
    fn summaries(
        &mut self,
        plan: &Plan,
        dir: &RunDir,
    ) -> Result<HashMap<String, Summary>, CliError> {
        let mut summaries: HashMap<String, Summary> = HashMap::new();
        for cell in &plan.cells {
            let id = &cell.experiment.id;
            let summary = match &cell.kind {
                CellKind::Run => self.summary(dir, id)?,
                CellKind::Alias { of } => summaries.get(of).cloned().map(|summary| Summary {
                    experiment: id.clone(),
                    suite: cell.experiment.suite.clone(),
                    ..summary
                }),
                CellKind::Skip { .. } => None,
            };
            if let Some(summary) = summary {
                dir.write_summary(&summary)?;
                summaries.insert(id.clone(), summary);
            }
        }
        Ok(summaries)
    }
}

impl Selection {
    /// Samples that would run.
    pub(crate) fn samples(&self, seeds: &[u64]) -> u64 {
        self.plan
            .runs()
            .map(|experiment| (seeds_of(experiment, seeds, 0).len() * self.items.len()) as u64)
            .sum()
    }
}
