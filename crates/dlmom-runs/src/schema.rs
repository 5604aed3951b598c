//! JSON schemas of what users write and read.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use crate::answer::Answer;
use crate::drift::DriftLine;
use crate::presets::PresetFile;
use crate::registry::{Experiment, SuitesFile};
use crate::row::RawRow;
use crate::rundir::TraceLine;
use crate::topologies::{RolePrompt, TopologyFile};

/// The schemas by file name under `configs/schema/`, as committed: pretty JSON with a final line end.
///
/// # Errors
/// None that a test does not exclude.
pub fn schemas() -> Result<Vec<(&'static str, String)>, serde_json::Error> {
    [
        ("suites.schema.json", root::<SuitesFile>()),
        ("experiment.schema.json", root::<Experiment>()),
        ("raw-row.schema.json", root::<RawRow>()),
        ("trace-line.schema.json", root::<TraceLine>()),
        ("answer.schema.json", root::<Answer>()),
        ("topology.schema.json", root::<TopologyFile>()),
        ("prompt.schema.json", root::<RolePrompt>()),
        ("preset.schema.json", root::<PresetFile>()),
        ("drift-line.schema.json", root::<DriftLine>()),
    ]
    .into_iter()
    .map(|(name, schema)| Ok((name, serde_json::to_string_pretty(&schema)? + "\n")))
    .collect()
}

fn root<T: schemars::JsonSchema>() -> Value {
    SchemaSettings::draft2020_12()
        .into_generator()
        .into_root_schema_for::<T>()
        .into()
}
