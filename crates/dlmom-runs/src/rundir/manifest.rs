//! `run.json`: what a folder holds and what it was made with.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use dlmom_core::AlphaUnit;
use dlmom_runtime::Topology;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::RunDirError;
use super::diff::{FieldDiff, diff};
use crate::pilot::Pilot;
use crate::registry::{CellKind, Experiment, Placement, Plan};

/// Version of the manifest.
pub const MANIFEST_FORMAT: u32 = 1;

/// What `run.json` holds. [`Manifest::conflicts`] says which fields decide whether a folder may be continued; the others inform.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this layout.
    pub format: u32,
    /// Version of the program that made the folder.
    pub version: String,
    /// Name of the benchmark.
    pub bench: String,
    /// SHA-256 of the data file.
    pub data_sha256: String,
    /// Items asked for.
    pub items: u64,
    /// Seeds asked for.
    pub seeds: Vec<u64>,
    /// Samples per item and seed.
    pub samples: u32,
    /// Slots of the running batch; a resume uses it where `auto` was asked for.
    pub batch_size: u32,
    /// The models as loaded.
    pub models: Value,
    /// All agents share one model's weights.
    pub shared_model: bool,
    /// Number of agents.
    pub experts: u64,
    /// `ln V` where all agents have one vocabulary: turns normalised entropy into nats.
    pub ln_vocab: Option<f64>,
    /// Everything besides the cells that changes outputs; enters every configuration digest.
    pub context: Value,
    /// Operating system, Python, torch, devices.
    pub environment: Value,
    /// The cells, reference first.
    pub cells: Vec<ManifestCell>,
    /// Every invocation that wrote here, oldest first.
    pub invocations: Vec<Invocation>,
    /// What a pilot of the reference pipeline found, where a cell needed one; every resume uses it.
    #[serde(default)]
    pub pilot: Option<Pilot>,
    /// What else is worth keeping: self-tests, timings.
    #[serde(default)]
    pub notes: Value,
}

/// One cell of a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestCell {
    /// The name.
    pub id: String,
    /// Its suite.
    pub suite: String,
    /// What becomes of it.
    pub kind: Kind,
    /// The cell whose rows it shares.
    pub alias_of: Option<String>,
    /// Why it was skipped.
    pub reason: Option<String>,
    /// Digest of everything that changes its outputs.
    pub config_hash: String,
    /// Whether seeds cannot differ.
    pub deterministic: bool,
}

/// [`CellKind`] without its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// It runs.
    Run,
    /// It shares another cell's rows.
    Alias,
    /// It cannot exist here.
    Skip,
}

/// One call of the program.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invocation {
    /// The command line.
    pub argv: Vec<String>,
    /// Start, seconds since the Unix epoch.
    pub started_at: f64,
    /// End, seconds since the Unix epoch; null while running or after a kill.
    pub finished_at: Option<f64>,
}

impl ManifestCell {
    /// The cells of a plan under `context`; what a pilot found enters the digests of the cells that read it.
    ///
    /// # Errors
    /// [`RunDirError::Encode`] for a knob without a JSON form, which a validated plan has not.
    pub fn of_plan(
        plan: &Plan,
        context: &Value,
        pilot: Option<&Pilot>,
    ) -> Result<Vec<Self>, RunDirError> {
        plan.cells
            .iter()
            .map(|cell| {
                let (kind, alias_of, reason) = match &cell.kind {
                    CellKind::Run => (Kind::Run, None, None),
                    CellKind::Alias { of } => (Kind::Alias, Some(of.clone()), None),
                    CellKind::Skip { reason } => (Kind::Skip, None, Some(reason.clone())),
                };
                let encode = |source| RunDirError::Encode {
                    what: cell.experiment.id.clone(),
                    source,
                };
                let config_hash = digest(&cell.experiment, context, pilot).map_err(encode)?;
                Ok(Self {
                    id: cell.experiment.id.clone(),
                    suite: cell.experiment.suite.clone(),
                    kind,
                    alias_of,
                    reason,
                    config_hash,
                    deterministic: cell.experiment.is_deterministic(),
                })
            })
            .collect()
    }
}

/// The digest of a cell under `context`, with what of a pilot the cell reads.
fn digest(
    experiment: &Experiment,
    context: &Value,
    pilot: Option<&Pilot>,
) -> Result<String, serde_json::Error> {
    let mut context = context.clone();
    if let Some(pilot) = pilot {
        if experiment.alpha_unit == AlphaUnit::Quantile {
            context["quantiles"] = serde_json::to_value(&pilot.quantiles)?;
        }
        if experiment.consensus.needs_pilot() {
            context["fitted"] =
                serde_json::to_value((&pilot.temperatures, &pilot.cross_entropies))?;
        }
        if experiment.needs_donors() {
            context["donors"] = Value::from(pilot.donors_sha256.clone());
        }
    }
    experiment.config_hash(&context)
}

impl Manifest {
    /// The digest of a cell in this folder.
    ///
    /// # Errors
    /// As [`Experiment::config_hash`].
    pub fn digest(&self, experiment: &Experiment) -> Result<String, serde_json::Error> {
        digest(experiment, &self.context, self.pilot.as_ref())
    }

    /// How the folder's agents meet, and what its pilot found.
    ///
    /// # Errors
    /// [`RunDirError::BadManifest`] with a topology that is none.
    pub fn placement(&self, path: &Path) -> Result<Placement, RunDirError> {
        let topology = match self.context.get("topology").and_then(|t| t.get("topology")) {
            None => Topology::Lockstep,
            Some(value) => serde_json::from_value(value.clone()).map_err(|source| {
                let path = path.to_owned();
                RunDirError::BadManifest { path, source }
            })?,
        };
        Ok(Placement {
            topology,
            pilot: self.pilot.clone(),
        })
    }

    /// What keeps a folder with this manifest from being continued by `current`; empty if nothing does.
    #[must_use]
    pub fn conflicts(&self, current: &Self) -> Vec<FieldDiff> {
        let facts = |m: &Self| {
            serde_json::json!({
                "format": m.format,
                "bench": m.bench,
                "data_sha256": m.data_sha256,
                "shared_model": m.shared_model,
                "experts": m.experts,
                "context": m.context,
            })
        };
        diff("", &facts(self), &facts(current))
    }

    /// The manifest of a folder that `current` continues: its cells and seeds are added, what was recorded stays first.
    pub(super) fn continued_by(&self, current: &Self) -> Self {
        let mut merged = Self {
            items: self.items.max(current.items),
            samples: self.samples.max(current.samples),
            invocations: self.invocations.clone(),
            cells: self.cells.clone(),
            seeds: self.seeds.clone(),
            pilot: current.pilot.clone().or_else(|| self.pilot.clone()),
            ..current.clone()
        };
        merged
            .invocations
            .extend(current.invocations.iter().cloned());
        // What earlier invocations measured stays.
        if let (Some(before), Some(notes)) = (self.notes.as_object(), merged.notes.as_object_mut())
        {
            for (name, value) in before {
                let now = notes.entry(name).or_insert(Value::Null);
                if now.is_null() {
                    *now = value.clone();
                }
            }
        }
        for seed in &current.seeds {
            if !merged.seeds.contains(seed) {
                merged.seeds.push(*seed);
            }
        }
        for cell in &current.cells {
            match merged.cells.iter_mut().find(|c| c.id == cell.id) {
                Some(known) => *known = cell.clone(),
                None => merged.cells.push(cell.clone()),
            }
        }
        merged
    }
}

/// Reads `run.json` of a folder; `None` if there is none.
///
/// # Errors
/// [`RunDirError::Io`] and [`RunDirError::BadManifest`].
pub fn read_manifest(folder: &Path) -> Result<Option<Manifest>, RunDirError> {
    let path = folder.join("run.json");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(RunDirError::Io {
                path,
                action: "read",
                source,
            });
        }
    };
    match serde_json::from_str(&text) {
        Ok(manifest) => Ok(Some(manifest)),
        Err(source) => Err(RunDirError::BadManifest { path, source }),
    }
}

/// Replaces a file whole: a reader sees the old content or the new, never a part.
///
/// # Errors
/// [`RunDirError::Io`]; the old content is then untouched.
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<(), RunDirError> {
    let io = |action| {
        move |source| RunDirError::Io {
            path: path.to_owned(),
            action,
            source,
        }
    };
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    let temporary = std::path::PathBuf::from(name);
    let mut file = File::create(&temporary).map_err(io("create"))?;
    file.write_all(content).map_err(io("write"))?;
    file.sync_all().map_err(io("flush"))?;
    drop(file);
    std::fs::rename(&temporary, path).map_err(io("replace"))?;
    // The rename itself is durable once the folder is; not every system lets a folder be opened.
    if let Some(Ok(folder)) = path.parent().map(File::open) {
        let _ = folder.sync_all();
    }
    Ok(())
}
