//! `schema`: JSON schemas of what this program reads and writes.

use std::io::Write;

use dlmom_eval::suggest::hint;

use crate::status::{CliError, ExitStatus};

/// Arguments of `schema`.
#[derive(Debug, clap::Args)]
pub struct SchemaArgs {
    /// Which; without one, their names.
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
}

/// Files under `configs/schema/` that are named after the command that writes or reads what they describe.
const SHORT: [(&str, &str); 4] = [
    ("raw-row", "row"),
    ("trace-line", "trace"),
    ("answer", "generate"),
    ("drift-line", "drift"),
];

/// The schemas by their short names.
fn schemas() -> Result<Vec<(&'static str, String)>, CliError> {
    let all = dlmom_runs::schema::schemas().map_err(|e| CliError::Failed(e.to_string()))?;
    Ok(all
        .into_iter()
        .map(|(file, text)| {
            let name = file.strip_suffix(".schema.json").unwrap_or(file);
            let short = SHORT.iter().find(|(long, _)| *long == name);
            (short.map_or(name, |(_, short)| short), text)
        })
        .collect())
}

pub(crate) fn command(args: &SchemaArgs, out: &mut dyn Write) -> Result<ExitStatus, CliError> {
    let all = schemas()?;
    let Some(name) = &args.name else {
        for (name, _) in &all {
            writeln!(out, "{name}")?;
        }
        return Ok(ExitStatus::Success);
    };
    let names = || all.iter().map(|(name, _)| *name);
    let Some((_, text)) = all.iter().find(|(known, _)| known == name) else {
        return Err(CliError::Usage(format!(
            "unknown schema `{name}`{}; known: {}",
            hint(name, names()),
            names().collect::<Vec<_>>().join(", ")
        )));
    };
    out.write_all(text.as_bytes())?;
    Ok(ExitStatus::Success)
}
