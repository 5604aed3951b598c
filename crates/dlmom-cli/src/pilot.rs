//! The pilot of a run: the reference pipeline on a few items, to find what some cells need to know before they can run.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

use dlmom_core::{AlphaUnit, ConsensusSpec, Gate, Ranks, Tempered};
use dlmom_eval::{Bench, Item, sha256_hex};
use dlmom_packet::{Encoding, Transcript};
use dlmom_runs::rundir::donors_path;
use dlmom_runs::{Experiment, Manifest, PILOT_QUANTILES, Pilot, Placement, Plan, Seating};
use dlmom_runtime::{
    AgentId, Backend, Donor, Donors, EnsembleInfo, Feed, Hooks, Job, JobKey, LaneId, LaneSpec,
    MemoryStats, Outcome, PromptSource, Readout, Row, RunOptions, Sink, SlotId, StepEvent, Stop,
    Want, check_vocabularies, run_with,
};

use crate::host::Host;
use crate::status::CliError;

/// Temperatures tried on either side of 1, up to a factor of 4; more are interpolated.
const GRID: i32 = 16;

/// What the cells of a plan need of a pilot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Ranks of entropies.
    pub(crate) quantiles: bool,
    /// Temperatures and cross-entropies of the agents.
    pub(crate) fit: bool,
    /// Packets of other items.
    pub(crate) donors: bool,
    /// Items of the pilot.
    pub(crate) items: usize,
}

impl Wanted {
    pub(crate) fn of(plan: &Plan, items: usize) -> Self {
        plan.runs().fold(
            Self {
                items,
                ..Self::default()
            },
            Self::and,
        )
    }

    fn and(self, experiment: &Experiment) -> Self {
        Self {
            quantiles: self.quantiles || experiment.alpha_unit == AlphaUnit::Quantile,
            fit: self.fit || experiment.consensus.needs_pilot(),
            donors: self.donors || experiment.needs_donors(),
            ..self
        }
    }

    pub(crate) fn any(self) -> bool {
        self.quantiles || self.fit || self.donors
    }

    /// What a recorded pilot lacks.
    fn beyond(self, recorded: Option<&Pilot>) -> Self {
        Self {
            quantiles: self.quantiles && recorded.is_none(),
            fit: self.fit && recorded.is_none_or(|p| p.temperatures.is_none()),
            donors: self.donors && recorded.is_none_or(|p| p.donors_sha256.is_none()),
            ..self
        }
    }

    fn words(self) -> &'static str {
        if self.quantiles {
            "the pilot's quantiles"
        } else if self.fit {
            "the pilot's temperatures and weights"
        } else {
            "the pilot's packets"
        }
    }
}

/// Where a pilot takes place.
pub(crate) struct Surroundings<'a> {
    pub(crate) seating: &'a Seating,
    pub(crate) bench: &'a Bench,
    /// Items of the run.
    pub(crate) items: &'a [Item],
    /// The benchmark's other items.
    pub(crate) spare: &'a [Item],
    pub(crate) rows: u32,
    pub(crate) seed: u64,
}

impl<'a> Surroundings<'a> {
    /// `count` items spread evenly over those that are not run where there are enough, else over all.
    pub(crate) fn pilot_items(&self, count: usize) -> Vec<&'a Item> {
        let all: Vec<&Item> = if self.spare.len() >= count {
            self.spare.iter().collect()
        } else {
            self.items.iter().chain(self.spare).collect()
        };
        let count = count.min(all.len());
        (0..count).map(|i| all[i * all.len() / count]).collect()
    }

    /// The items of a recorded pilot.
    fn items_of(&self, pilot: &Pilot) -> Result<Vec<&'a Item>, CliError> {
        pilot
            .items
            .iter()
            .map(|id| {
                let mut all = self.items.iter().chain(self.spare);
                all.find(|i| i.id == *id).ok_or_else(|| {
                    CliError::Usage(format!(
                        "the recorded pilot names item {id}, which the benchmark lacks"
                    ))
                })
            })
            .collect()
    }

    pub(crate) fn job(&self, item: &Item, trace: bool) -> Job {
        Job {
            key: JobKey {
                item_id: item.id.clone(),
                seed: self.seed,
                sample: 0,
            },
            prompts: self.seating.prompts(&self.bench.prompt(item)),
            trace,
            config: 0,
            schedule: None,
            rival: None,
        }
    }
}

/// What is known once the pilot has run, or was found in the folder.
pub(crate) struct Found {
    pub(crate) pilot: Option<Pilot>,
    pub(crate) donors: Donors,
    /// The bytes of a file of donors that is not in the folder yet.
    pub(crate) new_donors: Option<Vec<u8>>,
}

/// Runs what of the pilot is wanted and not recorded yet.
///
/// # Errors
/// One line for a folder whose recorded cells ran with a pilot that it does not hold, and for items that cannot give what is
/// wanted.
#[expect(
    clippy::too_many_arguments,
    reason = "the parts of one command, each used once"
)]
pub(crate) fn find(
    wanted: &Wanted,
    recorded: Option<&Manifest>,
    out: &Path,
    around: &Surroundings<'_>,
    plan: &Plan,
    backend: &mut dyn Backend,
    host: &mut dyn Host,
    err: &mut dyn Write,
) -> Result<Found, CliError> {
    let before = recorded.and_then(|m| m.pilot.clone());
    if !wanted.any() {
        return Ok(Found {
            pilot: before,
            donors: Donors::default(),
            new_donors: None,
        });
    }
    if wanted.donors {
        // A packet of one vocabulary cannot stand in for one of another.
        check_vocabularies(backend.info())?;
    }
    let missing = wanted.beyond(before.as_ref());
    if let Some(recorded) = recorded {
        same_pilot(recorded, plan, missing, out)?;
    }
    let reference = &plan
        .cells
        .first()
        .ok_or_else(|| CliError::Failed("the reference pipeline is missing".into()))?
        .experiment;
    let items = match &before {
        Some(pilot) => around.items_of(pilot)?,
        None => around.pilot_items(wanted.items),
    };
    let mut piloting = Piloting {
        around,
        reference,
        backend,
        host,
        err,
    };
    let mut pilot = before.unwrap_or_else(|| Pilot {
        items: items.iter().map(|i| i.id.clone()).collect(),
        steps: 0,
        quantiles: Ranks::identity(),
        temperatures: None,
        cross_entropies: None,
        donors_sha256: None,
        donor_items: Vec::new(),
    });
    if missing.fit {
        piloting.fit(&items, &mut pilot)?;
    }
    if pilot.steps == 0 {
        piloting.entropies(&items, &mut pilot)?;
    }
    if !wanted.donors {
        return Ok(Found {
            pilot: Some(pilot),
            donors: Donors::default(),
            new_donors: None,
        });
    }
    let file = donors_path(out);
    let held = if missing.donors {
        None
    } else {
        std::fs::read(&file)
            .ok()
            .filter(|bytes| pilot.donors_sha256.as_deref() == Some(&*sha256_hex(bytes)))
    };
    if let Some(bytes) = held {
        let donors = decode(&bytes, &pilot.donor_items)
            .map_err(|e| CliError::Usage(format!("{}: {e}", file.display())))?;
        return Ok(Found {
            pilot: Some(pilot),
            donors,
            new_donors: None,
        });
    }
    let (bytes, donor_items) = piloting.donors(&items, &pilot)?;
    let digest = sha256_hex(&bytes);
    if let Some(before) = &pilot.donors_sha256
        && *before != digest
    {
        return Err(CliError::Usage(format!(
            "{}: the recorded packets are missing or damaged, and the pilot gives others now; choose another --out",
            file.display()
        )));
    }
    let donors = decode(&bytes, &donor_items).map_err(CliError::Failed)?;
    pilot.donors_sha256 = Some(digest);
    pilot.donor_items = donor_items;
    Ok(Found {
        pilot: Some(pilot),
        donors,
        new_donors: Some(bytes),
    })
}

/// A cell that has run with a pilot can only go on with the same one.
fn same_pilot(
    recorded: &Manifest,
    plan: &Plan,
    missing: Wanted,
    out: &Path,
) -> Result<(), CliError> {
    for experiment in plan.runs() {
        if !recorded.cells.iter().any(|c| c.id == experiment.id) {
            continue;
        }
        let needs = Wanted::default().and(experiment);
        let lost = Wanted {
            quantiles: needs.quantiles && missing.quantiles,
            fit: needs.fit && missing.fit,
            donors: needs.donors && missing.donors,
            items: 0,
        };
        if lost.any() {
            return Err(CliError::Usage(format!(
                "{}: {} ran with {}, and run.json does not hold them; choose another --out",
                out.display(),
                experiment.id,
                lost.words()
            )));
        }
    }
    Ok(())
}

struct Piloting<'a> {
    around: &'a Surroundings<'a>,
    reference: &'a Experiment,
    backend: &'a mut dyn Backend,
    host: &'a mut dyn Host,
    err: &'a mut dyn Write,
}

impl Piloting<'_> {
    fn placement(&self, pilot: &Pilot) -> Placement {
        Placement {
            topology: self.around.seating.topology.clone(),
            pilot: Some(pilot.clone()),
        }
    }

    /// Entropies of the reference pipeline with every step explicit.
    fn entropies(&mut self, items: &[&Item], pilot: &mut Pilot) -> Result<(), CliError> {
        let explicit = Experiment {
            gate: Gate::AlwaysExplicit,
            alpha_unit: AlphaUnit::Normalized,
            ..self.reference.clone()
        };
        let config = explicit.loop_config(&self.placement(pilot))?;
        writeln!(
            self.err,
            "pilot: entropies of {} without latent steps, {} items",
            self.reference.id,
            items.len()
        )?;
        let jobs = items.iter().map(|item| self.around.job(item, false));
        let mut sink = Gathered::new(self.host);
        run_with(
            self.backend,
            &config,
            &rows(self.around.rows),
            Hooks::default(),
            &mut jobs.collect::<Vec<_>>().into_iter(),
            &mut sink,
        )?;
        sink.check()?;
        let entropies = sink.entropies;
        pilot.steps = entropies.len() as u64;
        pilot.quantiles = Ranks::of(&entropies, PILOT_QUANTILES)
            .map_err(|e| CliError::Failed(format!("pilot of {} steps: {e}", entropies.len())))?;
        Ok(())
    }

    /// The packets that the reference pipeline fed, item by item.
    fn donors(
        &mut self,
        items: &[&Item],
        pilot: &Pilot,
    ) -> Result<(Vec<u8>, Vec<String>), CliError> {
        let config = self.reference.loop_config(&self.placement(pilot))?;
        writeln!(
            self.err,
            "pilot: packets of {}, {} items",
            self.reference.id,
            items.len()
        )?;
        let jobs: Vec<Job> = items.iter().map(|i| self.around.job(i, true)).collect();
        let fingerprint = self
            .backend
            .info()
            .model_of(AgentId(0))
            .map_or(0, |m| m.fingerprint);
        let mut sink = Gathered::new(self.host);
        run_with(
            self.backend,
            &config,
            &rows(self.around.rows),
            Hooks::default(),
            &mut jobs.into_iter(),
            &mut sink,
        )?;
        sink.check()?;
        let mut bytes = Vec::new();
        let mut donors = Vec::new();
        for item in items {
            let Some(outcome) = sink.outcomes.iter().find(|o| o.key.item_id == item.id) else {
                continue;
            };
            let Some((_, first)) = outcome.packets.first() else {
                continue;
            };
            let failed = |e: &dyn std::fmt::Display| {
                CliError::Failed(format!("pilot, item {}: {e}", item.id))
            };
            let mut transcript =
                Transcript::new(first.vocab(), fingerprint).map_err(|e| failed(&e))?;
            for (step, packet) in &outcome.packets {
                transcript
                    .push(*step, packet.clone())
                    .map_err(|e| failed(&e))?;
            }
            transcript
                .encode_into(Encoding::F32, &mut bytes)
                .map_err(|e| failed(&e))?;
            donors.push(item.id.clone());
        }
        if donors.len() < 2 {
            return Err(CliError::Usage(format!(
                "packets of other items: {} took latent steps on {} of {} pilot items, and 2 are needed; lower --alpha, or give --alpha-unit quantile",
                self.reference.id,
                donors.len(),
                items.len()
            )));
        }
        Ok((bytes, donors))
    }

    /// Temperature and cross-entropy of every agent on the items' own solutions, each token given those before it.
    fn fit(&mut self, items: &[&Item], pilot: &mut Pilot) -> Result<(), CliError> {
        let solved: Vec<(&Item, &str)> = items
            .iter()
            .filter_map(|item| Some((*item, item.solution.as_deref()?)))
            .collect();
        if solved.is_empty() {
            return Err(CliError::Usage(format!(
                "temperatures and pilot weights are fitted on solutions, and {} has none",
                self.around.bench.name()
            )));
        }
        check_vocabularies(self.backend.info())?;
        writeln!(
            self.err,
            "pilot: temperatures on the solutions of {} items",
            solved.len()
        )?;
        let grid: Vec<f64> = (-GRID..=GRID)
            .map(|i| 4f64.powf(f64::from(i) / f64::from(GRID)))
            .collect();
        let agents = self.backend.info().agents.len();
        let mut tokens = 0_u64;
        let mut sums = vec![vec![0.0; grid.len()]; agents];
        for chunk in solved.chunks(self.around.rows.max(1) as usize) {
            // Item by item, so that no sum depends on how many rows there are.
            let mut of_items = vec![vec![vec![0.0; grid.len()]; agents]; chunk.len()];
            tokens += self.force(chunk, &grid, &mut of_items)?;
            for of_item in &of_items {
                for (sum, found) in sums.iter_mut().zip(of_item) {
                    add(sum, found);
                }
            }
        }
        if tokens == 0 {
            return Err(CliError::Usage(format!(
                "temperatures and pilot weights are fitted on solutions, and those of {} are empty",
                self.around.bench.name()
            )));
        }
        let mean = |sum: f64| -sum / tokens as f64;
        let losses: Vec<Vec<f64>> = sums
            .iter()
            .map(|row| row.iter().map(|s| mean(*s)).collect())
            .collect();
        let unfit = losses
            .iter()
            .position(|row| row.iter().any(|x| !x.is_finite()));
        if let Some(agent) = unfit {
            return Err(CliError::Failed(format!(
                "pilot: agent {agent} gives a token of a solution no probability"
            )));
        }
        pilot.temperatures = Some(losses.iter().map(|row| lowest(&grid, row)).collect());
        pilot.cross_entropies = Some(losses.iter().map(|row| row[GRID as usize]).collect());
        Ok(())
    }

    /// Feeds the solutions of up to as many items as there are rows, and adds the log-probabilities of their tokens, by item
    /// and agent.
    fn force(
        &mut self,
        items: &[(&Item, &str)],
        grid: &[f64],
        sums: &mut [Vec<Vec<f64>>],
    ) -> Result<u64, CliError> {
        let info = self.backend.info().clone();
        let agents: Vec<AgentId> = (0..info.agents.len() as u32).map(AgentId).collect();
        let consensus = ConsensusSpec::paper();
        let mut prompts = Vec::new();
        let mut solutions = Vec::new();
        let mut lanes = Vec::new();
        for (at, (item, solution)) in items.iter().enumerate() {
            let sources = self.around.seating.prompts(&self.around.bench.prompt(item));
            let mut longest = 0;
            let mut ids = Vec::new();
            for (&model, source) in info.agents.iter().zip(&sources) {
                let prompt = self.backend.encode(model, source)?;
                longest = longest.max(prompt.len());
                ids.push(prompt);
            }
            let text = PromptSource::Text {
                text: (*solution).to_owned(),
            };
            let mut solution = self.backend.encode(info.agents[0], &text)?;
            solution.truncate((info.max_len as usize).saturating_sub(longest));
            lanes.extend(agents.iter().map(|&agent| LaneSpec {
                lane: LaneId {
                    slot: SlotId(at as u32),
                    agent,
                },
                max_len: info.max_len,
            }));
            prompts.push(ids);
            solutions.push(solution);
        }
        self.backend.open(&lanes)?;
        let most = solutions.iter().map(Vec::len).max().unwrap_or(0);
        let mut out = Readout::default();
        let mut tokens = 0;
        for step in 0..most {
            if self.host.poll().is_break() {
                return Err(CliError::Interrupted);
            }
            let open: Vec<usize> = (0..items.len())
                .filter(|&at| step < solutions[at].len())
                .collect();
            let feeds: Vec<Vec<(AgentId, Feed<'_>)>> = open
                .iter()
                .map(|&at| {
                    agents
                        .iter()
                        .zip(&prompts[at])
                        .map(|(&agent, prompt)| match step {
                            0 => (agent, Feed::Tokens(prompt)),
                            _ => (agent, Feed::Tokens(&solutions[at][step - 1..step])),
                        })
                        .collect()
                })
                .collect();
            let rows: Vec<Row<'_>> = open
                .iter()
                .zip(&feeds)
                .map(|(&at, feeds)| Row {
                    slot: SlotId(at as u32),
                    feeds,
                    merge: &agents,
                    consensus: &consensus,
                    want: Want {
                        top: 1,
                        tempered: Some(Tempered {
                            target: solutions[at][step],
                            temperatures: grid,
                        }),
                        ..Want::default()
                    },
                })
                .collect();
            self.backend.advance(&rows, &mut out)?;
            tokens += out.rows.len() as u64;
            for (row, &at) in out.rows.iter().zip(&open) {
                // Such a row holds no log-probabilities, which would count as certainty.
                if let Some(agent) = row.read.finite.iter().position(|finite| !finite) {
                    return Err(CliError::Failed(format!(
                        "pilot, item {}: NaN or Inf in the logits of agent {agent}",
                        items[at].0.id
                    )));
                }
                for (sum, found) in sums[at].iter_mut().zip(&row.read.tempered) {
                    add(sum, found);
                }
            }
        }
        let slots: Vec<SlotId> = (0..items.len() as u32).map(SlotId).collect();
        self.backend.close(&slots);
        Ok(tokens)
    }
}

fn add(sums: &mut [f64], terms: &[f64]) {
    for (sum, term) in sums.iter_mut().zip(terms) {
        *sum += term;
    }
}

/// The temperature of the lowest loss: the vertex of the parabola in `ln T` through the lowest grid point and its neighbours.
fn lowest(grid: &[f64], losses: &[f64]) -> f64 {
    let best = (0..losses.len())
        .min_by(|&a, &b| losses[a].total_cmp(&losses[b]))
        .unwrap_or(0);
    if best == 0 || best + 1 == losses.len() {
        return grid[best];
    }
    let (a, b, c) = (losses[best - 1], losses[best], losses[best + 1]);
    let bend = a - 2.0 * b + c;
    if bend <= 0.0 {
        return grid[best];
    }
    let step = (grid[best + 1] / grid[best]).ln();
    grid[best] * (0.5 * (a - c) / bend * step).exp()
}

/// The donors in a file of transcripts, one for each item.
fn decode(mut bytes: &[u8], items: &[String]) -> Result<Donors, String> {
    let mut donors = Vec::with_capacity(items.len());
    for item_id in items {
        let (transcript, taken) =
            Transcript::decode(bytes).map_err(|e| format!("packets of item {item_id}: {e}"))?;
        bytes = &bytes[taken..];
        donors.push(Donor {
            item_id: item_id.clone(),
            packets: transcript.into_packets(),
        });
    }
    if !bytes.is_empty() {
        return Err(format!("{} bytes behind the last item", bytes.len()));
    }
    Ok(Donors::new(donors))
}

pub(crate) fn rows(rows: u32) -> RunOptions {
    RunOptions {
        rows: Some(rows),
        ..RunOptions::default()
    }
}

/// Keeps what a small run finds.
pub(crate) struct Gathered<'a> {
    host: &'a mut dyn Host,
    /// Normalised entropies of all steps.
    pub(crate) entropies: Vec<f64>,
    pub(crate) outcomes: Vec<Outcome>,
}

impl<'a> Gathered<'a> {
    pub(crate) fn new(host: &'a mut dyn Host) -> Self {
        Self {
            host,
            entropies: Vec::new(),
            outcomes: Vec::new(),
        }
    }

    /// A sample that fails here would fail in every cell, or give figures of nothing.
    pub(crate) fn check(&self) -> Result<(), CliError> {
        let broken = self
            .outcomes
            .iter()
            .find(|o| matches!(o.stop, Stop::NanInf | Stop::Prompt | Stop::Backend));
        match broken {
            None => Ok(()),
            Some(outcome) => Err(CliError::Failed(format!(
                "pilot, item {}: {}",
                outcome.key.item_id,
                outcome.error.as_deref().unwrap_or("the sample failed")
            ))),
        }
    }
}

impl Sink for Gathered<'_> {
    fn finished(
        &mut self,
        outcome: Outcome,
        _: &EnsembleInfo,
        _: MemoryStats,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.outcomes.push(outcome);
        Ok(())
    }

    fn step(&mut self, event: &StepEvent<'_>) {
        self.entropies.push(event.entropy);
    }

    fn poll(&mut self) -> ControlFlow<()> {
        self.host.poll()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use dlmom_eval::{BenchSpec, Task};
    use dlmom_runs::{Overrides, REF, Registry, Setting, topologies};
    use dlmom_runtime::MockBackend;
    use dlmom_runtime::mock::Position;

    use super::*;
    use crate::host::NoPython;

    #[test]
    fn the_lowest_point_of_a_parabola_in_ln_t_is_found_between_the_grid() {
        let grid: Vec<f64> = (-GRID..=GRID)
            .map(|i| 4f64.powf(f64::from(i) / f64::from(GRID)))
            .collect();
        assert_eq!(grid[GRID as usize], 1.0);
        for truth in [0.4, 1.0, 1.37, 3.1] {
            let losses: Vec<f64> = grid
                .iter()
                .map(|t: &f64| 2.0 + (t.ln() - f64::ln(truth)).powi(2))
                .collect();
            assert!((lowest(&grid, &losses) - truth).abs() < 1e-9);
        }
        let falling: Vec<f64> = grid.iter().map(|t| -t).collect();
        assert_eq!(lowest(&grid, &falling), 4.0);
    }

    const VOCAB: u32 = 40;

    /// Logits after a token: those of tokens that often follow in the solutions are higher.
    fn logits(last: u32) -> Vec<f32> {
        (0..VOCAB)
            .map(|v| {
                let rough = (last * 31 + v * 17) % 23;
                let likely = if (last + 1) % VOCAB == v { 2.5 } else { 0.0 };
                rough as f32 / 16.0 + likely
            })
            .collect()
    }

    /// Agents of the same logits, each at a scale of its own.
    fn agents(scales: &'static [f32], rows: u32, max_len: u32) -> MockBackend {
        let script = move |lane: LaneId, positions: &[Position], out: &mut [f32]| {
            let last = positions.last().and_then(|p| p.first()).map_or(0, |p| p.0);
            for (z, x) in out.iter_mut().zip(logits(last)) {
                *z = scales[lane.agent.index()] * x;
            }
        };
        MockBackend::scripted(scales.len(), VOCAB, rows, max_len, Box::new(script))
    }

    fn items() -> Vec<Item> {
        // Bytes that follow one another are tokens that do; the rest keeps the best temperature finite.
        let solutions = ["abcdefgabcxyz", "ghijkcab", "bcdecdefxmnopq", "zyxabcc"];
        solutions
            .iter()
            .enumerate()
            .map(|(i, solution)| Item {
                id: format!("q{i}"),
                question: "a".into(),
                gold: "1".into(),
                solution: Some((*solution).to_owned()),
                task: Task::Number,
            })
            .collect()
    }

    fn fitted(backend: &mut MockBackend, items: &[Item]) -> Result<Pilot, CliError> {
        let agents = backend.info().agents.len();
        let rows = backend.info().slots;
        let seating = topologies::lockstep(agents);
        let plan = Registry::builtin()?.expand(
            &["A1".to_owned()],
            &[REF.to_owned()],
            &Setting::lockstep(agents, false),
            &Overrides::default(),
        )?;
        let bench = BenchSpec::parse("gsm8k:none.jsonl")?.bench();
        let around = Surroundings {
            seating: &seating,
            bench: &bench,
            items,
            spare: &[],
            rows,
            seed: 0,
        };
        let mut pilot = Pilot::assumed(agents);
        let asked = around.pilot_items(items.len());
        Piloting {
            around: &around,
            reference: &plan.cells[0].experiment,
            backend,
            host: &mut NoPython,
            err: &mut Vec::new(),
        }
        .fit(&asked, &mut pilot)?;
        Ok(pilot)
    }

    /// Mean `-ln p` of the solutions' tokens at a temperature, each after the one before it; the first `most` of each.
    fn loss(items: &[Item], scale: f32, temperature: f64, most: usize) -> f64 {
        let prompt = BenchSpec::parse("gsm8k:none.jsonl").unwrap().bench();
        let mut mock = agents(&[1.0], 1, 4096);
        let mut terms = Vec::new();
        for item in items {
            let mut encode = |source: &PromptSource| {
                let model = mock.info().agents[0];
                mock.encode(model, source).unwrap()
            };
            let mut last = *encode(&prompt.prompt(item)).last().unwrap();
            let text = item.solution.clone().unwrap();
            for token in encode(&PromptSource::Text { text }).into_iter().take(most) {
                let z: Vec<f64> = logits(last)
                    .iter()
                    .map(|x| f64::from(scale * x) / temperature)
                    .collect();
                let sum: f64 = z.iter().map(|x| x.exp()).sum();
                terms.push(sum.ln() - z[token as usize]);
                last = token;
            }
        }
        terms.iter().sum::<f64>() / terms.len() as f64
    }

    /// The temperature of the least loss, by golden sections of its logarithm.
    fn best(items: &[Item], scale: f32) -> f64 {
        let golden = 0.5 * (5f64.sqrt() - 1.0);
        let of = |x: f64| loss(items, scale, x.exp(), usize::MAX);
        let (mut low, mut high) = (0.25f64.ln(), 4f64.ln());
        while high - low > 1e-9 {
            let (a, b) = (high - golden * (high - low), low + golden * (high - low));
            if of(a) < of(b) {
                high = b;
            } else {
                low = a;
            }
        }
        (0.5 * (low + high)).exp()
    }

    #[test]
    fn temperatures_minimise_the_cross_entropy_of_the_solutions() {
        static SCALES: [f32; 3] = [1.0, 1.5, 0.6];
        let items = items();
        let found = fitted(&mut agents(&SCALES, 2, 4096), &items).unwrap();
        let temperatures = found.temperatures.as_ref().unwrap();
        let losses = found.cross_entropies.as_ref().unwrap();
        let truths: BTreeSet<i64> = SCALES
            .iter()
            .zip(temperatures.iter().zip(losses))
            .map(|(&scale, (t, at_one))| {
                let truth = best(&items, scale);
                assert!((t / truth - 1.0).abs() < 2e-3, "{t}, not {truth}");
                assert!((at_one - loss(&items, scale, 1.0, usize::MAX)).abs() < 1e-9);
                (truth * 1000.0) as i64
            })
            .collect();
        // Within the grid, and far from one another.
        assert!(truths.iter().all(|t| (300..3500).contains(t)), "{truths:?}");
        assert_eq!(truths.len(), 3);
        let least = losses.iter().copied().fold(f64::INFINITY, f64::min);
        let weights: Vec<f64> = losses.iter().map(|loss| (least - loss).exp()).collect();
        assert_eq!(found.weights().unwrap(), weights);
    }

    #[test]
    fn logits_at_another_scale_have_their_temperature_at_that_scale() {
        // 2 is a whole number of steps of the grid, so that the interpolation errs alike.
        let found = fitted(&mut agents(&[0.75, 1.5], 3, 4096), &items()).unwrap();
        let [a, b] = found.temperatures.unwrap()[..] else {
            panic!("two agents");
        };
        assert!((b / a - 2.0).abs() < 1e-9, "{a}, {b}");
        // Beyond the factors that are tried, the nearest.
        let found = fitted(&mut agents(&[16.0, 0.05], 3, 4096), &items()).unwrap();
        assert_eq!(found.temperatures.unwrap(), [4.0, 0.25]);
    }

    #[test]
    fn what_is_fitted_is_the_same_bits_for_any_number_of_rows() {
        let of = |rows| fitted(&mut agents(&[1.0, 1.5], rows, 4096), &items()).unwrap();
        assert_eq!(of(1), of(3));
        assert_eq!(of(1), of(9));
    }

    #[test]
    fn a_solution_is_read_as_far_as_there_is_room() {
        let items = items();
        let prompt = {
            let bench = BenchSpec::parse("gsm8k:none.jsonl").unwrap().bench();
            let mut mock = agents(&[1.0], 1, 4096);
            let model = mock.info().agents[0];
            mock.encode(model, &bench.prompt(&items[0])).unwrap().len() as u32
        };
        let found = fitted(&mut agents(&[1.0], 2, prompt + 5), &items).unwrap();
        let found = found.cross_entropies.unwrap()[0];
        assert!((found - loss(&items, 1.0, 1.0, 5)).abs() < 1e-9);
    }

    #[test]
    fn logits_that_are_no_numbers_are_no_certainty() {
        let script = |lane: LaneId, positions: &[Position], out: &mut [f32]| {
            let last = positions.last().and_then(|p| p.first()).map_or(0, |p| p.0);
            out.copy_from_slice(&logits(last));
            // One step of the second solution.
            if lane.agent == AgentId(1) && last == 1 + u32::from(b'k') % (VOCAB - 1) {
                out[3] = f32::NAN;
            }
        };
        let mut backend = MockBackend::scripted(2, VOCAB, 2, 4096, Box::new(script));
        let error = fitted(&mut backend, &items()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "pilot, item q1: NaN or Inf in the logits of agent 1"
        );
    }
}
