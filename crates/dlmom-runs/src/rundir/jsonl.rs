//! Append-only JSON Lines that survive a kill at any byte.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use dlmom_runtime::JobKey;
use serde::{Deserialize, Serialize};

use crate::row::RawRow;

/// One way a JSON Lines file can fail its writer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JsonlError {
    /// The file system refused: no space, no permission, a vanished disk.
    #[error("{file}: cannot {action}: {source}", file = file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A whole line is not a row.
    #[error("{file}:{line}:{column}: not a row: {message}", file = file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// The parser's words.
        message: String,
    },
    /// A row was made under another configuration.
    #[error("{file}:{line}: row of configuration {found}, this run's is {expected}", file = file.display())]
    OtherConfig {
        /// The file.
        file: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The row's digest.
        found: String,
        /// This run's.
        expected: String,
    },
    /// A value has no JSON form.
    #[error("{file}: cannot encode a row: {source}", file = file.display())]
    Encode {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// An earlier write failed half way and could not be undone.
    #[error("{file}: an earlier write failed and its remains could not be cut off; resume repairs the file", file = file.display())]
    Poisoned {
        /// The file.
        file: PathBuf,
    },
}

/// What opening a file found after its last line end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// A whole row without its line end, which was added.
    Completed,
    /// Part of a row, moved aside.
    Torn {
        /// Bytes moved.
        bytes: u64,
        /// Where they are now.
        aside: PathBuf,
    },
}

/// Appends whole lines, each in one write.
#[derive(Debug)]
pub struct JsonlWriter {
    file: File,
    path: PathBuf,
    len: u64,
    poisoned: bool,
}

impl JsonlWriter {
    /// Opens or creates `path` and repairs a torn last line; every whole line is kept. `visit` sees each whole line, without
    /// its line end, with its number from 1.
    ///
    /// # Errors
    /// [`JsonlError::Io`], and what `visit` answers.
    pub fn open(
        path: &Path,
        mut visit: impl FnMut(usize, &[u8]) -> Result<(), JsonlError>,
    ) -> Result<(Self, Repair), JsonlError> {
        let io = |action| {
            move |source| JsonlError::Io {
                file: path.to_owned(),
                action,
                source,
            }
        };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(io("open"))?;
        if !file.metadata().map_err(io("open"))?.is_file() {
            let source = std::io::Error::other("not a regular file");
            return Err(JsonlError::Io {
                file: path.to_owned(),
                action: "append to",
                source,
            });
        }
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        let mut number = 0;
        let mut whole = 0u64;
        let mut repair = Repair::None;
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io("read"))?;
            if read == 0 {
                break;
            }
            number += 1;
            if line.last() == Some(&b'\n') {
                visit(number, &line[..read - 1])?;
                whole += read as u64;
            } else if is_object(&line) {
                // Only the line end is missing: an object ends with its brace, so no part of one can look whole.
                visit(number, &line)?;
                whole += read as u64;
                repair = Repair::Completed;
            } else {
                let aside = aside_of(path);
                set_aside(&aside, &line).map_err(|source| JsonlError::Io {
                    file: aside.clone(),
                    action: "write",
                    source,
                })?;
                repair = Repair::Torn {
                    bytes: read as u64,
                    aside,
                };
            }
        }
        match repair {
            Repair::None => {}
            Repair::Completed => {
                file.write_all(b"\n").map_err(io("write"))?;
                whole += 1;
            }
            Repair::Torn { .. } => {
                file.set_len(whole).map_err(io("truncate"))?;
                file.seek(SeekFrom::End(0)).map_err(io("seek"))?;
            }
        }
        Ok((
            Self {
                file,
                path: path.to_owned(),
                len: whole,
                poisoned: false,
            },
            repair,
        ))
    }

    /// Appends `value` as one line. A write that fails half way is undone, so that the file still holds whole lines only.
    ///
    /// # Errors
    /// [`JsonlError`]; the line is then not in the file.
    pub fn append<T: Serialize>(&mut self, value: &T) -> Result<(), JsonlError> {
        if self.poisoned {
            return Err(JsonlError::Poisoned {
                file: self.path.clone(),
            });
        }
        let mut line = serde_json::to_vec(value).map_err(|source| JsonlError::Encode {
            file: self.path.clone(),
            source,
        })?;
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.flush());
        match written {
            Ok(()) => {
                self.len += line.len() as u64;
                Ok(())
            }
            Err(source) => {
                self.poisoned = self.file.set_len(self.len).is_err();
                Err(JsonlError::Io {
                    file: self.path.clone(),
                    action: "write",
                    source,
                })
            }
        }
    }

    /// Waits until the disk holds every line.
    ///
    /// # Errors
    /// [`JsonlError::Io`].
    pub fn sync(&self) -> Result<(), JsonlError> {
        self.file.sync_data().map_err(|source| JsonlError::Io {
            file: self.path.clone(),
            action: "flush",
            source,
        })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn is_object(line: &[u8]) -> bool {
    line.first() == Some(&b'{') && serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok()
}

fn aside_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".torn");
    name.into()
}

fn set_aside(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    file.write_all(bytes)?;
    file.write_all(b"\n")?;
    file.sync_data()
}

#[derive(Deserialize)]
struct DoneKey {
    item_id: String,
    seed: u64,
    sample: u32,
    config_hash: String,
}

/// Writer of one experiment's rows, which knows the samples already done.
#[derive(Debug)]
pub struct RawWriter {
    writer: JsonlWriter,
    done: HashSet<JobKey>,
}

impl RawWriter {
    /// Opens `path`, repairs a torn last line and reads which samples are done.
    ///
    /// # Errors
    /// [`JsonlError::Malformed`] for a whole line that is no row, [`JsonlError::OtherConfig`] for a row of another
    /// configuration, [`JsonlError::Io`].
    pub fn open(path: &Path, config_hash: &str) -> Result<(Self, Repair), JsonlError> {
        let mut done = HashSet::new();
        let (writer, repair) = JsonlWriter::open(path, |line, bytes| {
            let row: DoneKey =
                serde_json::from_slice(bytes).map_err(|e| JsonlError::Malformed {
                    file: path.to_owned(),
                    line,
                    column: e.column(),
                    message: crate::fold::bare_message(&e),
                })?;
            if row.config_hash != config_hash {
                return Err(JsonlError::OtherConfig {
                    file: path.to_owned(),
                    line,
                    found: row.config_hash,
                    expected: config_hash.to_owned(),
                });
            }
            done.insert(JobKey {
                item_id: row.item_id,
                seed: row.seed,
                sample: row.sample,
            });
            Ok(())
        })?;
        Ok((Self { writer, done }, repair))
    }

    /// Whether a sample has its row.
    #[must_use]
    pub fn is_done(&self, key: &JobKey) -> bool {
        self.done.contains(key)
    }

    /// The samples that have their row.
    #[must_use]
    pub fn done(&self) -> &HashSet<JobKey> {
        &self.done
    }

    /// Appends a row.
    ///
    /// # Errors
    /// [`JsonlError`]; the row is then not in the file.
    pub fn append(&mut self, row: &RawRow) -> Result<(), JsonlError> {
        self.writer.append(row)?;
        self.done.insert(row.key());
        Ok(())
    }

    /// Waits until the disk holds every row.
    ///
    /// # Errors
    /// [`JsonlError::Io`].
    pub fn sync(&self) -> Result<(), JsonlError> {
        self.writer.sync()
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let path = PathBuf::from("/dev/full");
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        let mut writer = JsonlWriter {
            file,
            path: path.clone(),
            len: 0,
            poisoned: false,
        };
        let error = writer.append(&1).unwrap_err().to_string();
        assert!(
            error.starts_with("/dev/full: cannot write: No space left"),
            "{error}"
        );
        // A device cannot be cut back, so nothing may follow what was half written.
        assert!(matches!(
            writer.append(&1),
            Err(JsonlError::Poisoned { .. })
        ));
        let refused = JsonlWriter::open(&path, |_, _| Ok(()))
            .unwrap_err()
            .to_string();
        assert_eq!(refused, "/dev/full: cannot append to: not a regular file");
    }
}
