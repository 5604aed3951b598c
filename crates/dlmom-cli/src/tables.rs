//! `aggregate` and `plot`: from raw files alone, without any model.

use std::io::Write;
use std::path::Path;

use dlmom_runs::rundir::write_atomic;
use dlmom_runs::{Aggregate, aggregate as fold};

use crate::args::{AggregateArgs, PlotArgs};
use crate::host::{Figures, Host};
use crate::status::{CliError, ExitStatus};

pub(crate) fn aggregate(
    args: &AggregateArgs,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    let folded: Aggregate = fold(&args.runs).map_err(|e| CliError::Usage(e.to_string()))?;
    for warning in &folded.warnings {
        writeln!(err, "warning: {warning}")?;
    }
    let folder = args.out.as_deref().unwrap_or(&args.runs[0]);
    if !folder.is_dir() {
        std::fs::create_dir_all(folder)
            .map_err(|e| CliError::Failed(format!("{}: {e}", folder.display())))?;
    }
    for (name, text) in [
        ("aggregate.csv", folded.tidy_csv()),
        ("aggregate_wide.csv", folded.wide_csv()),
        ("aggregate.tex", folded.latex()),
    ] {
        let path = folder.join(name);
        write_atomic(&path, text.as_bytes())?;
        writeln!(out, "{}", path.display())?;
    }
    Ok(ExitStatus::Success)
}

pub(crate) fn plot(
    args: &PlotArgs,
    host: &mut dyn Host,
    out: &mut dyn Write,
) -> Result<ExitStatus, CliError> {
    if !args.run.is_dir() {
        return Err(CliError::Usage(format!(
            "{}: no such run folder",
            args.run.display()
        )));
    }
    let default = args.run.join("figs");
    let folder: &Path = args.out.as_deref().unwrap_or(&default);
    let request = Figures {
        run: &args.run,
        out: folder,
        formats: &args.format,
        style: &args.style,
        trace: match (&args.trace, &args.item) {
            (Some(cell), Some(item)) => Some((cell, item, args.seed)),
            _ => None,
        },
    };
    for line in host.plot(&request)? {
        writeln!(out, "{line}")?;
    }
    Ok(ExitStatus::Success)
}
