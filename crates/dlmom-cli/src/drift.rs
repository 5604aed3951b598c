//! `run --drift N`: how far a cell's preferences are from the reference pipeline's, on a second row of the batch.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use dlmom_core::Schedule;
use dlmom_eval::{Item, read};
use dlmom_runs::row::Drift;
use dlmom_runs::{DriftKind, DriftLine, Experiment, JsonlWriter, Placement, read_drift};
use dlmom_runtime::replay::{Observations, replay};
use dlmom_runtime::{
    EnsembleInfo, Hooks, Job, JobKey, LinkSpec, LoopConfig, MemoryStats, Outcome, Rival,
    RunOptions, Sink, Support, Topology, run_all,
};

use crate::host::Host;
use crate::prepare::Prepared;
use crate::status::CliError;

/// What there is to compare between a cell and the reference pipeline.
pub(crate) fn kinds(
    cell: &Experiment,
    reference: &Experiment,
    placement: &Placement,
    agents: usize,
) -> Result<Vec<DriftKind>, CliError> {
    let mut kinds = vec![DriftKind::Free];
    if cell.same_outputs(reference) {
        return Ok(kinds);
    }
    let together = agents > 1 && !matches!(placement.topology, Topology::Sequential(_));
    let merged_otherwise =
        (&cell.consensus, cell.support) != (&reference.consensus, reference.support);
    if together && merged_otherwise {
        kinds.push(DriftKind::Inputs);
    }
    let (ours, theirs) = (
        cell.loop_config(placement)?,
        reference.loop_config(placement)?,
    );
    // What consensus sees of the agents is no part of the message that it sends them.
    let message = |c: &LoopConfig| {
        let link = LinkSpec {
            support: Support::Full,
            ..c.link
        };
        (c.k, link, c.noise, c.filter, c.controls.packet)
    };
    if message(&ours) != message(&theirs) {
        kinds.push(DriftKind::OneStep);
    }
    if ours.controller != theirs.controller && !ours.controls.same_exits {
        kinds.push(DriftKind::Decisions);
    }
    Ok(kinds)
}

/// Measures what is not recorded yet of a cell's drift, on so many of the run's first items, and returns what its rows say.
///
/// # Errors
/// [`CliError`]; what was measured before is in the folder.
pub(crate) fn measure(
    prepared: &mut Prepared,
    experiment: &Experiment,
    seed: u64,
    count: usize,
    schedules: &dyn Fn(&JobKey) -> Option<Schedule>,
    host: &mut dyn Host,
) -> Result<HashMap<JobKey, Drift>, CliError> {
    let reference = prepared
        .plan
        .cells
        .first()
        .map(|c| c.experiment.clone())
        .ok_or_else(|| CliError::Failed("the reference pipeline is missing".into()))?;
    let agents = prepared.backend.info().agents.len();
    let kinds = kinds(experiment, &reference, &prepared.placement, agents)?;
    let wrong = |e: dlmom_runs::fold::FoldError| CliError::Usage(e.to_string());
    let mut lines = read_drift(&prepared.dir.drift_path(&experiment.id)).map_err(wrong)?;
    let known: HashSet<(DriftKind, JobKey)> =
        lines.iter().map(|l| (l.kind, l.key.clone())).collect();
    let configs = [
        reference.loop_config(&prepared.placement)?,
        experiment.loop_config(&prepared.placement)?,
    ];
    let items: Vec<&Item> = prepared.items.iter().take(count).collect();
    let mut writer = prepared.dir.drift_writer(&experiment.id)?;
    for kind in kinds {
        let jobs: Vec<Job> = items
            .iter()
            .filter_map(|item| {
                let key = JobKey {
                    item_id: item.id.clone(),
                    seed,
                    sample: 0,
                };
                if known.contains(&(kind, key.clone())) {
                    return None;
                }
                let schedule = configs[1]
                    .controls
                    .same_exits
                    .then(|| schedules(&key).unwrap_or_default());
                Some(Job {
                    key,
                    prompts: prepared.seating.prompts(&prepared.bench.prompt(item)),
                    trace: kind == DriftKind::Decisions,
                    config: 0,
                    schedule,
                    rival: kind.follow().map(|follow| Rival { config: 1, follow }),
                })
            })
            .collect();
        if jobs.is_empty() {
            continue;
        }
        let mut sink = Measuring {
            experiment,
            kind,
            config: &configs[1],
            items: &items,
            writer: &mut writer,
            lines: &mut lines,
            host: &mut *host,
        };
        run_all(
            &mut *prepared.backend,
            &configs,
            &RunOptions {
                rows: Some(prepared.rows),
                ..RunOptions::default()
            },
            Hooks {
                donors: prepared.donors.clone(),
                ..Hooks::default()
            },
            &mut jobs.into_iter(),
            &mut sink,
        )?;
    }
    writer.sync()?;
    Ok(lines
        .iter()
        .filter(|line| line.kind == DriftKind::Free)
        .filter_map(|line| Some((line.key.clone(), line.row()?)))
        .collect())
}

struct Measuring<'a> {
    experiment: &'a Experiment,
    kind: DriftKind,
    config: &'a LoopConfig,
    items: &'a [&'a Item],
    writer: &'a mut JsonlWriter,
    lines: &'a mut Vec<DriftLine>,
    host: &'a mut dyn Host,
}

impl Measuring<'_> {
    /// Steps of another mode, and all steps, by the cell's controller over the sample's entropies.
    fn decisions(&self, outcome: &Outcome) -> Result<(u32, u32), String> {
        let trace = outcome.trace.as_ref().ok_or("the sample was not traced")?;
        let seen = Observations {
            entropy: &trace.entropy,
            expert_entropy: &trace.expert_entropy,
            force: &trace.force,
            handoffs: &trace.handoffs,
            schedule: None,
        };
        let decided = replay(self.config, seen).map_err(|e| e.to_string())?;
        let changed = decided
            .iter()
            .zip(&trace.mode)
            .filter(|(decision, mode)| decision.mode != **mode)
            .count();
        Ok((changed as u32, trace.mode.len() as u32))
    }
}

impl Sink for Measuring<'_> {
    fn finished(
        &mut self,
        mut outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let (steps, changed, divergences) = if self.kind == DriftKind::Decisions {
            let (changed, steps) = self.decisions(&outcome)?;
            (steps, Some(changed), None)
        } else {
            let found = outcome.divergences.take().unwrap_or_default();
            (found.step.len() as u32, None, Some(found))
        };
        let line = DriftLine {
            experiment: self.experiment.id.clone(),
            key: outcome.key,
            kind: self.kind,
            steps,
            changed,
            divergences,
        };
        self.writer.append(&line)?;
        self.lines.push(line);
        Ok(())
    }

    fn answered(&mut self, key: &JobKey, text: &str) -> bool {
        self.items
            .iter()
            .any(|item| item.id == key.item_id && read(item, text).answer.is_some())
    }

    fn poll(&mut self) -> ControlFlow<()> {
        self.host.poll()
    }
}
