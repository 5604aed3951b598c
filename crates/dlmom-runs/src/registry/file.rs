//! The suites file.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;

use super::RegistryError;
use super::experiment::REF;
use super::knobs::{CellFile, DefaultsFile, Knobs};
use crate::yaml::{self, OrderedMap};

/// Files of the built-in suites; the first is the paper's.
const BUILTIN: [(&str, &str); 4] = [
    (
        "suites.yaml",
        include_str!("../../../../configs/suites.yaml"),
    ),
    (
        "controls.yaml",
        include_str!("../../../../configs/controls.yaml"),
    ),
    (
        "extended.yaml",
        include_str!("../../../../configs/extended.yaml"),
    ),
    (
        "consensus.yaml",
        include_str!("../../../../configs/consensus.yaml"),
    ),
];

/// The suites file as YAML states it; its JSON schema is committed beside the file.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "dlmom-rs suites")]
pub struct SuitesFile {
    /// The layer below every cell.
    #[serde(default)]
    defaults: DefaultsFile,
    /// Suites by name, in order; each a list of cells.
    #[schemars(with = "BTreeMap<String, Vec<CellFile>>")]
    suites: OrderedMap<Vec<CellFile>>,
}

/// One cell of a suite: a name and the knobs it sets.
#[derive(Clone, Debug, PartialEq)]
pub struct Cell {
    /// The name.
    pub id: String,
    /// What the cell itself says.
    pub knobs: Knobs,
}

/// A named list of cells.
#[derive(Clone, Debug, PartialEq)]
pub struct Suite {
    /// The name.
    pub name: String,
    /// The cells in file order.
    pub cells: Vec<Cell>,
}

/// A checked suites file: names are unique and fit for files, nulls stand only where they mean something.
#[derive(Clone, Debug, PartialEq)]
pub struct Registry {
    pub(super) file: String,
    pub(super) defaults: Knobs,
    /// The suites in file order.
    pub suites: Vec<Suite>,
}

impl Registry {
    /// The paper's suites and those beyond it, built into the program. The defaults are the paper's file's.
    ///
    /// # Errors
    /// None that a test does not exclude.
    pub fn builtin() -> Result<Self, RegistryError> {
        let [(file, text), beyond @ ..] = BUILTIN;
        let mut registry = Self::parse(file, text)?;
        for (file, text) in beyond {
            registry.suites.extend(Self::parse(file, text)?.suites);
        }
        Ok(registry)
    }

    /// One more suite behind the others; cells of a name that is taken are left out.
    pub fn add(&mut self, name: &str, cells: Vec<Cell>) {
        let taken = |id: &str| {
            self.suites
                .iter()
                .flat_map(|s| &s.cells)
                .any(|c| c.id.eq_ignore_ascii_case(id))
        };
        let cells = cells.into_iter().filter(|c| !taken(&c.id)).collect();
        self.suites.push(Suite {
            name: name.to_owned(),
            cells,
        });
    }

    /// Another file of the same schema.
    ///
    /// # Errors
    /// [`RegistryError`], naming the file and the place in it.
    pub fn load(path: &Path) -> Result<Self, RegistryError> {
        let text = std::fs::read_to_string(path).map_err(|source| RegistryError::Read {
            file: path.to_owned(),
            source,
        })?;
        Self::parse(&path.display().to_string(), &text)
    }

    /// A suites file from its text; `file` is only named in errors.
    ///
    /// # Errors
    /// [`RegistryError`], naming the file and the place in it.
    pub fn parse(file: &str, text: &str) -> Result<Self, RegistryError> {
        let parsed: SuitesFile = yaml::from_str(file, text)?;
        let mut first_line: HashMap<String, u64> = HashMap::new();
        let mut suites = Vec::new();
        for (name, cells) in parsed.suites.0 {
            let mut checked = Vec::new();
            for cell in cells {
                let (spanned, knobs) = cell.into_parts();
                let line = spanned.referenced.line();
                let id = spanned.value;
                if let Some(reason) = wrong_id(&id) {
                    return Err(RegistryError::BadId {
                        file: file.to_owned(),
                        line,
                        id,
                        reason,
                    });
                }
                // Files named by ids must stay apart on case-insensitive disks too.
                if let Some(&first) = first_line.get(&id.to_lowercase()) {
                    return Err(RegistryError::DuplicateId {
                        file: file.to_owned(),
                        line,
                        first,
                        id,
                    });
                }
                first_line.insert(id.to_lowercase(), line);
                if let Some(field) = knobs.wrong_null() {
                    return Err(RegistryError::Null {
                        file: file.to_owned(),
                        cell: id,
                        field,
                    });
                }
                checked.push(Cell { id, knobs });
            }
            suites.push(Suite {
                name,
                cells: checked,
            });
        }
        if suites.iter().all(|s| s.cells.is_empty()) {
            return Err(RegistryError::Empty {
                file: file.to_owned(),
            });
        }
        let defaults = Knobs::from(parsed.defaults);
        if let Some(field) = defaults.wrong_null() {
            let cell = "defaults".to_owned();
            return Err(RegistryError::Null {
                file: file.to_owned(),
                cell,
                field,
            });
        }
        Ok(Self {
            file: file.to_owned(),
            defaults,
            suites,
        })
    }
}

fn wrong_id(id: &str) -> Option<&'static str> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '+' | '-');
    if !id.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        Some("must start with a letter or a digit")
    } else if !id.chars().all(allowed) {
        Some("may hold only letters, digits and . _ + -")
    } else if id.len() > 64 {
        Some("is longer than 64 characters")
    } else if id.eq_ignore_ascii_case(REF) {
        Some("is the reference pipeline's")
    } else {
        None
    }
}
