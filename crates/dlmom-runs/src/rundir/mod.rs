//! The run directory: one writer, crash-safe files, resume.

mod diff;
mod jsonl;
mod manifest;

pub use diff::{FieldDiff, diff};
pub use jsonl::{JsonlError, JsonlWriter, RawWriter, Repair};
pub use manifest::{
    Invocation, Kind, MANIFEST_FORMAT, Manifest, ManifestCell, read_manifest, write_atomic,
};

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use dlmom_runtime::{JobKey, Trace};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::registry::{CellKind, Experiment, Plan};
use crate::summary::Summary;
use crate::yaml::{self, YamlError};

/// One way a run directory can be unusable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunDirError {
    /// The file system refused.
    #[error("{path}: cannot {action}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The folder holds a run and resuming was not asked for.
    #[error("{path}: already holds a run; continue it with --resume, or choose another --out", path = path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// Raw rows without a manifest: not a folder this program made.
    #[error("{path}: holds raw rows but no run.json; choose another --out", path = path.display())]
    NoManifest {
        /// The folder.
        path: PathBuf,
    },
    /// Another process writes there.
    #[error("{path}: another run writes here{holder}", path = path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// ` (process N)`, or empty.
        holder: String,
    },
    /// The folder was made with another configuration.
    #[error("{path}: made with another configuration; choose another --out, or undo these changes:{differences}", path = path.display())]
    OtherConfig {
        /// The folder.
        path: PathBuf,
        /// One line for every field, each after a line end and two spaces.
        differences: String,
    },
    /// `run.json` is not a manifest.
    #[error("{path}: not a manifest: {source}", path = path.display())]
    BadManifest {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A recorded experiment is not one.
    #[error(transparent)]
    BadConfig(#[from] YamlError),
    /// A value has no JSON or YAML form.
    #[error("{what}: cannot encode: {source}")]
    Encode {
        /// Of what.
        what: String,
        /// Why not.
        source: serde_json::Error,
    },
    /// An experiment has no YAML form.
    #[error("{what}: cannot encode: {message}")]
    EncodeYaml {
        /// Of what.
        what: String,
        /// Why not.
        message: String,
    },
    /// A row file is unusable.
    #[error(transparent)]
    Rows(#[from] JsonlError),
}

/// One line of `traces/<ID>.jsonl`. Numbers that are not finite are null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(title = "dlmom-rs trace line")]
pub struct TraceLine {
    /// Id of the cell.
    pub experiment: String,
    /// The sample.
    #[serde(flatten)]
    pub key: JobKey,
    /// The record, arrays of one entry per step.
    #[serde(flatten)]
    pub trace: Trace,
}

/// An open run directory. The lock is held until it is dropped.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    manifest: Manifest,
    resumed: bool,
    _lock: File,
}

impl RunDir {
    /// Opens `out` for writing: creates it, or continues the run it holds where `resume` is set.
    ///
    /// Writes `run.json` and `configs/<ID>.yaml` for every cell of `plan`. Continuing keeps the recorded cells and seeds and
    /// adds new ones.
    ///
    /// # Errors
    /// [`RunDirError`]; nothing was changed then, except that an empty folder may have been made.
    pub fn open(
        out: &Path,
        plan: &Plan,
        manifest: Manifest,
        resume: bool,
    ) -> Result<Self, RunDirError> {
        std::fs::create_dir_all(out).map_err(|source| RunDirError::Io {
            path: out.to_owned(),
            action: "create folder",
            source,
        })?;
        let lock = take_lock(out)?;
        let recorded = read_manifest(out)?;
        let manifest = match &recorded {
            Some(_) if !resume => {
                return Err(RunDirError::Exists {
                    path: out.to_owned(),
                });
            }
            Some(recorded) => {
                check_config(out, recorded, &manifest, plan)?;
                recorded.continued_by(&manifest)
            }
            None if has_rows(out) => {
                return Err(RunDirError::NoManifest {
                    path: out.to_owned(),
                });
            }
            None => manifest,
        };
        for folder in ["configs", "raw", "traces", "drift", "summary"] {
            let path = out.join(folder);
            std::fs::create_dir_all(&path).map_err(|source| RunDirError::Io {
                path,
                action: "create folder",
                source,
            })?;
        }
        let dir = Self {
            root: out.to_owned(),
            manifest,
            resumed: recorded.is_some(),
            _lock: lock,
        };
        for cell in plan
            .cells
            .iter()
            .filter(|c| !matches!(c.kind, CellKind::Skip { .. }))
        {
            let id = &cell.experiment.id;
            let text =
                yaml::to_string(&cell.experiment).map_err(|message| RunDirError::EncodeYaml {
                    what: id.clone(),
                    message,
                })?;
            write_atomic(&config_path(out, id), text.as_bytes())?;
        }
        dir.write_manifest()?;
        Ok(dir)
    }

    /// The folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether the folder held a run before.
    #[must_use]
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// What `run.json` says.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Changes `run.json`.
    ///
    /// # Errors
    /// [`RunDirError::Io`]; the file then says what it said before.
    pub fn update_manifest(
        &mut self,
        change: impl FnOnce(&mut Manifest),
    ) -> Result<(), RunDirError> {
        change(&mut self.manifest);
        self.write_manifest()
    }

    fn write_manifest(&self) -> Result<(), RunDirError> {
        write_json(&self.root.join("run.json"), &self.manifest)
    }

    /// `raw/<ID>.jsonl`.
    #[must_use]
    pub fn raw_path(&self, id: &str) -> PathBuf {
        self.root.join("raw").join(format!("{id}.jsonl"))
    }

    /// The writer of a cell's rows; knows what is done, and repairs a torn last line.
    ///
    /// # Errors
    /// [`JsonlError`].
    pub fn raw_writer(
        &self,
        id: &str,
        config_hash: &str,
    ) -> Result<(RawWriter, Repair), RunDirError> {
        Ok(RawWriter::open(&self.raw_path(id), config_hash)?)
    }

    /// The writer of a cell's [`TraceLine`]s. A sample that was killed between its trace and its row is traced twice; the
    /// last line counts.
    ///
    /// # Errors
    /// [`JsonlError`].
    pub fn trace_writer(&self, id: &str) -> Result<JsonlWriter, RunDirError> {
        let path = self.root.join("traces").join(format!("{id}.jsonl"));
        Ok(JsonlWriter::open(&path, |_, _| Ok(()))?.0)
    }

    /// `drift/<ID>.jsonl`.
    #[must_use]
    pub fn drift_path(&self, id: &str) -> PathBuf {
        self.root.join("drift").join(format!("{id}.jsonl"))
    }

    /// Writes the recorded packets of other items, `pilot/donors.dltr`.
    ///
    /// # Errors
    /// [`RunDirError::Io`].
    pub fn write_donors(&self, bytes: &[u8]) -> Result<(), RunDirError> {
        let path = donors_path(&self.root);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|source| RunDirError::Io {
                path: folder.to_owned(),
                action: "create folder",
                source,
            })?;
        }
        write_atomic(&path, bytes)
    }

    /// The writer of a cell's [`DriftLine`](crate::DriftLine)s; of several lines of one comparison the last counts.
    ///
    /// # Errors
    /// [`JsonlError`].
    pub fn drift_writer(&self, id: &str) -> Result<JsonlWriter, RunDirError> {
        Ok(JsonlWriter::open(&self.drift_path(id), |_, _| Ok(()))?.0)
    }

    /// Writes `summary/<ID>.json`.
    ///
    /// # Errors
    /// [`RunDirError::Io`].
    pub fn write_summary(&self, summary: &Summary) -> Result<(), RunDirError> {
        let name = format!("{}.json", summary.experiment);
        write_json(&self.root.join("summary").join(name), summary)
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), RunDirError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|source| RunDirError::Encode {
        what: path.display().to_string(),
        source,
    })?;
    text.push('\n');
    write_atomic(path, text.as_bytes())
}

/// `pilot/donors.dltr` of a folder: transcripts one after another.
#[must_use]
pub fn donors_path(out: &Path) -> PathBuf {
    out.join("pilot").join("donors.dltr")
}

fn config_path(out: &Path, id: &str) -> PathBuf {
    out.join("configs").join(format!("{id}.yaml"))
}

/// Reads `configs/<ID>.yaml` of a folder; `None` if there is none.
///
/// # Errors
/// [`RunDirError::Io`] and [`RunDirError::BadConfig`].
pub fn read_config(out: &Path, id: &str) -> Result<Option<Experiment>, RunDirError> {
    let path = config_path(out, id);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(yaml::from_str(&path.display().to_string(), &text)?)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(RunDirError::Io {
            path,
            action: "read",
            source,
        }),
    }
}

fn has_rows(out: &Path) -> bool {
    std::fs::read_dir(out.join("raw")).is_ok_and(|mut entries| entries.next().is_some())
}

fn check_config(
    out: &Path,
    recorded: &Manifest,
    current: &Manifest,
    plan: &Plan,
) -> Result<(), RunDirError> {
    let mut found: Vec<String> = recorded
        .conflicts(current)
        .iter()
        .map(ToString::to_string)
        .collect();
    for cell in &plan.cells {
        let id = &cell.experiment.id;
        let Some(before) = read_config(out, id)? else {
            continue;
        };
        let encode = |source| RunDirError::Encode {
            what: id.clone(),
            source,
        };
        let (a, b) = (
            before.knobs().map_err(encode)?,
            cell.experiment.knobs().map_err(encode)?,
        );
        found.extend(diff(id, &a, &b).iter().map(ToString::to_string));
    }
    if found.is_empty() {
        // Equal knobs under an equal context: what is left of a digest is what the pilot found.
        let digests = recorded.cells.iter().filter_map(|before| {
            let now = current.cells.iter().find(|c| c.id == before.id)?;
            (before.kind != Kind::Skip && before.config_hash != now.config_hash).then(|| {
                format!(
                    "{}: digest recorded {}, now {}: what the pilot found has changed",
                    before.id, before.config_hash, now.config_hash
                )
            })
        });
        found.extend(digests);
    }
    if found.is_empty() {
        return Ok(());
    }
    let differences = found
        .iter()
        .fold(String::new(), |text, line| text + "\n  " + line);
    Err(RunDirError::OtherConfig {
        path: out.to_owned(),
        differences,
    })
}

/// Locks the folder for this process; the lock file holds its id.
fn take_lock(out: &Path) -> Result<File, RunDirError> {
    let path = out.join(".lock");
    let io = |action| {
        let path = path.clone();
        move |source| RunDirError::Io {
            path,
            action,
            source,
        }
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(io("open"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Another system may forbid reading a locked file; the holder is then unnamed.
            let _ = file.read_to_string(&mut holder);
            let holder = match holder.trim() {
                "" => String::new(),
                pid => format!(" (process {pid})"),
            };
            return Err(RunDirError::Locked {
                path: out.to_owned(),
                holder,
            });
        }
        Err(TryLockError::Error(source)) => return Err(io("lock")(source)),
    }
    file.set_len(0).map_err(io("write"))?;
    file.seek(SeekFrom::Start(0)).map_err(io("write"))?;
    write!(file, "{}", std::process::id()).map_err(io("write"))?;
    Ok(file)
}
