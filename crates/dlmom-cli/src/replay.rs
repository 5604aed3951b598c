//! `replay`: the controller again over recorded entropies, as it was or with other knobs.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use dlmom_core::{AlphaUnit, ControllerSpec, Force, Gate, Mode, Reason, Schedule, Start};
use dlmom_eval::stats::quantile;
use dlmom_eval::suggest::hint;
use dlmom_runs::rundir::{Kind, read_config};
use dlmom_runs::{Experiment, Manifest, Placement, read_manifest};
use dlmom_runtime::replay::{Observations, ReplayError, observed, replay};
use dlmom_runtime::{HandoffRecord, JobKey, LoopConfig};
use serde::Deserialize;
use serde_json::json;

use crate::args::{GateWord, alpha_unit};
use crate::report::{percent, table, unit};
use crate::run::{schedule_of, schedules};
use crate::status::{CliError, ExitStatus};
use crate::visits::switches;

/// Differences from the recording that are named one by one.
const SHOWN: usize = 20;

/// What decides the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StartWord {
    /// It is latent.
    Latent,
    /// The gate, as for every other.
    Gate,
}

/// Arguments of `replay`.
#[derive(Debug, clap::Args)]
pub struct ReplayArgs {
    /// Run folder.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Cells [default: all with traces].
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,
    /// Rule of the controller.
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        value_name = "threshold|trend|reference|latent-then-explicit|always-latent|always-explicit"
    )]
    pub gate: Option<GateWord>,
    /// Entropy threshold.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub alpha: Option<f64>,
    /// Unit of alpha.
    #[arg(long, value_parser = alpha_unit, value_name = "normalized|nats|quantile")]
    pub alpha_unit: Option<AlphaUnit>,
    /// Window of the trend gate in steps.
    #[arg(long, value_name = "N")]
    pub w: Option<u32>,
    /// Most switches per sample; -1 is unlimited.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub cap: Option<i64>,
    /// Most latent steps per sample.
    #[arg(long, value_name = "N")]
    pub max_latent_steps: Option<u32>,
    /// Fewest consecutive latent steps.
    #[arg(long, value_name = "N")]
    pub min_dwell_latent: Option<u32>,
    /// Fewest consecutive explicit steps.
    #[arg(long, value_name = "N")]
    pub min_dwell_explicit: Option<u32>,
    /// Entropies below alpha, one after another, that end the block of latent-then-explicit.
    #[arg(long, value_name = "N")]
    pub patience: Option<u32>,
    /// What decides the first step.
    #[arg(
        long,
        value_enum,
        hide_possible_values = true,
        value_name = "latent|gate"
    )]
    pub start: Option<StartWord>,
    /// One JSON object.
    #[arg(long)]
    pub json: bool,
}

impl ReplayArgs {
    fn overrides(&self) -> bool {
        self.gate.is_some()
            || self.alpha.is_some()
            || self.alpha_unit.is_some()
            || self.w.is_some()
            || self.cap.is_some()
            || self.max_latent_steps.is_some()
            || self.min_dwell_latent.is_some()
            || self.min_dwell_explicit.is_some()
            || self.patience.is_some()
            || self.start.is_some()
    }

    /// The cell's knobs with those of the command line in their place.
    fn knobs(
        &self,
        experiment: &Experiment,
        placement: &Placement,
    ) -> Result<LoopConfig, CliError> {
        let id = &experiment.id;
        let mut config = experiment.loop_config(placement)?;
        let mut spec = config.controller;
        if let Some(gate) = self.gate {
            spec.gate = Gate::from(gate);
            // Whose modes are followed is no gate any more.
            config.controls.same_exits = false;
        }
        let other_unit = self.alpha_unit.is_some_and(|unit| unit != spec.alpha_unit);
        if other_unit && self.alpha.is_none() {
            return Err(CliError::Usage(format!(
                "--alpha-unit: {id} has alpha {} ({}); give --alpha in the other unit too",
                spec.alpha,
                unit(spec.alpha_unit)
            )));
        }
        if let Some(alpha) = self.alpha {
            let derived = ControllerSpec {
                convergence_threshold: None,
                slope_eps: None,
                var_eps: None,
                ..spec.clone()
            };
            // What followed from the recorded alpha follows from the new one; what was set stays, as long as its unit does.
            let again = |is: Option<f64>, was: f64| is.filter(|is| !other_unit && *is != was);
            spec.convergence_threshold =
                again(spec.convergence_threshold, derived.convergence_threshold());
            spec.slope_eps = again(spec.slope_eps, derived.slope_eps());
            spec.var_eps = again(spec.var_eps, derived.var_eps());
            spec.alpha = alpha;
        }
        spec.alpha_unit = self.alpha_unit.unwrap_or(spec.alpha_unit);
        spec.w = self.w.or(spec.w);
        spec.cap = self.cap.unwrap_or(spec.cap);
        spec.max_latent_steps = self.max_latent_steps.unwrap_or(spec.max_latent_steps);
        spec.min_dwell_latent = self.min_dwell_latent.unwrap_or(spec.min_dwell_latent);
        spec.patience = self.patience.unwrap_or(spec.patience);
        spec.min_dwell_explicit = self.min_dwell_explicit.unwrap_or(spec.min_dwell_explicit);
        spec.start = match self.start {
            Some(StartWord::Latent) => Start::Latent,
            Some(StartWord::Gate) => Start::Gate,
            None => spec.start,
        };
        spec.validate()
            .map_err(|e| CliError::Usage(format!("{id}: {e}")))?;
        if spec.alpha_unit == AlphaUnit::Quantile {
            let pilot = placement.pilot.as_ref();
            config.ranks = pilot.map(|p| p.quantiles.clone());
        }
        config.controller = spec;
        Ok(config)
    }
}

/// The part of a trace that the controller saw and said.
#[derive(Debug, Deserialize)]
struct Recorded {
    #[serde(flatten)]
    key: JobKey,
    entropy: Vec<f64>,
    observed: Vec<f64>,
    expert_entropy: Vec<Vec<f64>>,
    mode: Vec<Mode>,
    reason: Vec<Reason>,
    token: Vec<Option<u32>>,
    /// Empty in records of before it was kept.
    #[serde(default)]
    force: Vec<Option<Force>>,
    #[serde(default)]
    handoffs: Vec<HandoffRecord>,
}

impl Recorded {
    fn check(&self) -> Result<(), String> {
        let steps = self.mode.len();
        for (name, len) in [
            ("entropy", self.entropy.len()),
            ("observed", self.observed.len()),
            ("expert_entropy", self.expert_entropy.len()),
            ("reason", self.reason.len()),
            ("token", self.token.len()),
        ] {
            if len != steps {
                return Err(format!("{name} has {len} entries, mode {steps}"));
            }
        }
        if !self.force.is_empty() && self.force.len() != steps {
            let len = self.force.len();
            return Err(format!("force has {len} entries, mode {steps}"));
        }
        Ok(())
    }

    /// What the loop forced at each step; from the reasons where it was not recorded.
    fn forces(&self, experiment: &Experiment) -> Vec<Option<Force>> {
        if !self.force.is_empty() {
            return self.force.clone();
        }
        let mut taken = 0u32;
        (0..self.mode.len())
            .map(|step| {
                let left = experiment.max_steps.saturating_sub(taken);
                // A step that feeds the answer cue prints nothing and is not counted.
                if self.mode[step] == Mode::Latent || self.token[step].is_some() {
                    taken += 1;
                }
                match self.reason[step] {
                    Reason::EosCertain => Some(Force::EosCertain),
                    Reason::AnswerReserve => Some(Force::AnswerReserve),
                    _ => (left <= experiment.answer_reserve).then_some(Force::AnswerReserve),
                }
            })
            .collect()
    }
}

/// Latent share and switches of some samples.
#[derive(Default)]
struct Tally {
    latent: u64,
    switches: Vec<f64>,
}

impl Tally {
    fn add(&mut self, modes: &[Mode], handoffs: &[HandoffRecord]) {
        self.latent += modes.iter().filter(|m| **m == Mode::Latent).count() as u64;
        self.switches.push(switches(modes, handoffs).count() as f64);
    }

    fn quantile(&self, q: f64) -> Option<f64> {
        let mut sorted = self.switches.clone();
        sorted.sort_by(f64::total_cmp);
        quantile(&sorted, q)
    }

    fn both(&self) -> String {
        let show = |q| {
            self.quantile(q)
                .map_or_else(|| "-".into(), |v| format!("{v:.0}"))
        };
        format!("{}/{}", show(0.5), show(0.9))
    }

    fn json(&self, steps: u64) -> serde_json::Value {
        json!({
            "latent_coverage": share(self.latent, steps),
            "switches_p50": self.quantile(0.5),
            "switches_p90": self.quantile(0.9),
        })
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// What replaying one cell found.
struct Found {
    id: String,
    samples: u64,
    steps: u64,
    recorded: Tally,
    replayed: Tally,
    /// Steps of another mode.
    changed: u64,
    /// Steps whose decision differs in any part, the reason too, in words.
    differences: Vec<String>,
}

pub(crate) fn command(args: &ReplayArgs, out: &mut dyn Write) -> Result<ExitStatus, CliError> {
    let run = &args.run;
    if !run.is_dir() {
        return Err(CliError::Usage(format!(
            "{}: no such run folder",
            run.display()
        )));
    }
    let manifest = read_manifest(run)?
        .ok_or_else(|| CliError::Usage(format!("{}: holds no run (no run.json)", run.display())))?;
    let mut cells = Vec::new();
    let placement = manifest.placement(&run.join("run.json"))?;
    for id in chosen(args, &manifest)? {
        cells.push(cell(args, &id, &placement)?);
    }
    if cells.iter().all(|c| c.samples == 0) {
        return Err(CliError::Usage(format!(
            "{}: no sample was traced (run --traces N records N items per cell)",
            run.display()
        )));
    }
    if args.json {
        let value = json!({
            "run": run.display().to_string(),
            "as_recorded": !args.overrides(),
            "cells": cells.iter().map(|c| json!({
                "experiment": c.id,
                "samples": c.samples,
                "steps": c.steps,
                "recorded": c.recorded.json(c.steps),
                "replayed": c.replayed.json(c.steps),
                "changed": c.changed,
                "changed_share": share(c.changed, c.steps),
            })).collect::<Vec<_>>(),
        });
        let text =
            serde_json::to_string_pretty(&value).map_err(|e| CliError::Failed(e.to_string()))?;
        writeln!(out, "{text}")?;
    }
    if args.overrides() {
        if !args.json {
            report(&cells, out)?;
        }
        return Ok(ExitStatus::Success);
    }
    let steps: u64 = cells.iter().map(|c| c.steps).sum();
    let samples: u64 = cells.iter().map(|c| c.samples).sum();
    let wrong: Vec<&String> = cells.iter().flat_map(|c| &c.differences).collect();
    if wrong.is_empty() {
        if !args.json {
            writeln!(
                out,
                "{steps} decisions of {samples} samples in {} cells equal the recording",
                cells.len()
            )?;
        }
        return Ok(ExitStatus::Success);
    }
    if !args.json {
        for line in wrong.iter().take(SHOWN) {
            writeln!(out, "{line}")?;
        }
    }
    Err(CliError::Failed(format!(
        "{} of {steps} decisions differ from the recording; first: {}",
        wrong.len(),
        wrong[0]
    )))
}

/// The cells asked for, in the order of the manifest where all are.
fn chosen(args: &ReplayArgs, manifest: &Manifest) -> Result<Vec<String>, CliError> {
    if args.ids.is_empty() {
        return Ok(manifest
            .cells
            .iter()
            .filter(|cell| cell.kind == Kind::Run && traces(&args.run, &cell.id).is_file())
            .map(|cell| cell.id.clone())
            .collect());
    }
    let mut ids: Vec<String> = Vec::new();
    for id in &args.ids {
        let known = || manifest.cells.iter().map(|cell| cell.id.as_str());
        let Some(cell) = manifest.cells.iter().find(|cell| cell.id == *id) else {
            return Err(CliError::Usage(format!(
                "unknown id `{id}`{}; known: {}",
                hint(id, known()),
                known().collect::<Vec<_>>().join(", ")
            )));
        };
        // An alias has the knobs of the cell whose samples it shares.
        let id = match (&cell.kind, &cell.alias_of) {
            (Kind::Skip, _) => {
                let reason = cell.reason.as_deref().unwrap_or("no reason recorded");
                return Err(CliError::Usage(format!("{id} was skipped: {reason}")));
            }
            (_, Some(of)) => of,
            _ => id,
        };
        if !ids.contains(id) {
            ids.push(id.clone());
        }
    }
    Ok(ids)
}

fn traces(run: &Path, id: &str) -> PathBuf {
    run.join("traces").join(format!("{id}.jsonl"))
}

/// The traced samples of a cell; of several records of a sample the last counts, and a torn last line is none.
fn read(path: &Path) -> Result<Vec<Recorded>, CliError> {
    let text = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(CliError::Usage(format!("{}: {e}", path.display()))),
    };
    let mut samples: BTreeMap<JobKey, Recorded> = BTreeMap::new();
    for (index, piece) in text.split_inclusive(|b| *b == b'\n').enumerate() {
        let wrong = |message: String| {
            let line = index + 1;
            CliError::Usage(format!("{}:{line}: {message}", path.display()))
        };
        let recorded: Recorded = match serde_json::from_slice(piece) {
            Ok(recorded) => recorded,
            Err(_) if piece.last() != Some(&b'\n') => break,
            Err(error) => return Err(wrong(format!("not a trace: {error}"))),
        };
        recorded.check().map_err(wrong)?;
        samples.insert(recorded.key.clone(), recorded);
    }
    Ok(samples.into_values().collect())
}

fn cell(args: &ReplayArgs, id: &str, placement: &Placement) -> Result<Found, CliError> {
    let experiment = read_config(&args.run, id)?
        .ok_or_else(|| CliError::Usage(format!("{}: no configs/{id}.yaml", args.run.display())))?;
    let config = args.knobs(&experiment, placement)?;
    let reference = if config.controls.same_exits {
        schedules(&args.run)?
    } else {
        HashMap::new()
    };
    let mut found = Found {
        id: id.to_owned(),
        samples: 0,
        steps: 0,
        recorded: Tally::default(),
        replayed: Tally::default(),
        changed: 0,
        differences: Vec::new(),
    };
    for sample in read(&traces(&args.run, id))? {
        if args.gate.is_none() && sample.reason.contains(&Reason::Custom) {
            return Err(CliError::Usage(format!(
                "{id}: decided by a rule of the user's own, which is not recorded; give --gate"
            )));
        }
        let schedule = schedule_of(&reference, &sample.key);
        one(&sample, &experiment, &config, schedule.as_ref(), &mut found)?;
    }
    Ok(found)
}

fn one(
    sample: &Recorded,
    experiment: &Experiment,
    config: &LoopConfig,
    schedule: Option<&Schedule>,
    found: &mut Found,
) -> Result<(), CliError> {
    let forces = sample.forces(experiment);
    let seen = Observations {
        entropy: &sample.entropy,
        expert_entropy: &sample.expert_entropy,
        force: &forces,
        handoffs: &sample.handoffs,
        schedule,
    };
    let decisions = replay(config, seen).map_err(|error| {
        let hint = match error {
            ReplayError::NoRanks => " (run.json records no pilot)",
            _ => "",
        };
        CliError::Usage(format!("{}: {error}{hint}", experiment.id))
    })?;
    if config.controller.alpha_unit == experiment.alpha_unit {
        for (step, recorded) in sample.observed.iter().enumerate() {
            let again = observed(
                experiment.alpha_unit,
                sample.entropy[step],
                &sample.expert_entropy[step],
                config.ranks.as_ref(),
            );
            if again.map(f64::to_bits) != Some(recorded.to_bits()) {
                let JobKey { item_id, seed, .. } = &sample.key;
                found.differences.push(format!(
                    "{}: item {item_id}, seed {seed}, step {step}: observed is {recorded}, the entropies give {}",
                    experiment.id,
                    again.map_or_else(|| "none".to_owned(), |x| x.to_string())
                ));
            }
        }
    }
    let modes: Vec<Mode> = decisions.iter().map(|d| d.mode).collect();
    for (step, decision) in decisions.iter().enumerate() {
        let (mode, reason) = (decision.mode, decision.reason);
        let (mode_was, reason_was) = (sample.mode[step], sample.reason[step]);
        if mode != mode_was {
            found.changed += 1;
        }
        if (mode, reason) != (mode_was, reason_was) {
            let JobKey { item_id, seed, .. } = &sample.key;
            found.differences.push(format!(
                "{}: item {item_id}, seed {seed}, step {step}: recorded {mode_was} ({reason_was}), replayed {mode} ({reason})",
                experiment.id
            ));
        }
    }
    found.samples += 1;
    found.steps += modes.len() as u64;
    found.recorded.add(&sample.mode, &sample.handoffs);
    found.replayed.add(&modes, &sample.handoffs);
    Ok(())
}

fn report(cells: &[Found], out: &mut dyn Write) -> Result<(), CliError> {
    let mut rows = table(&[
        "cell",
        "samples",
        "steps",
        "latent %",
        "replayed",
        "switches",
        "replayed",
        "changed %",
    ]);
    let show = |part, whole| share(part, whole).map_or_else(|| "-".into(), percent);
    for c in cells {
        rows.add_row([
            c.id.clone(),
            c.samples.to_string(),
            c.steps.to_string(),
            show(c.recorded.latent, c.steps),
            show(c.replayed.latent, c.steps),
            c.recorded.both(),
            c.replayed.both(),
            show(c.changed, c.steps),
        ]);
    }
    writeln!(out, "{rows}")?;
    writeln!(
        out,
        "latent: share of all steps; switches: p50/p90 per sample; changed: steps of another mode"
    )?;
    writeln!(
        out,
        "the entropies are the recorded ones: had a mode been different, all that follow it would be too"
    )?;
    Ok(())
}
