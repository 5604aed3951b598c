//! `completions`: what a shell wants to know about the clap tree.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::status::{CliError, ExitStatus};

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
    /// The command to complete; the Python package installs both.
    #[arg(long, default_value = "dlmom-rs", value_parser = ["dlmom-rs", "dlmom"], value_name = "NAME")]
    pub name: String,
}

pub(crate) fn command(args: &CompletionsArgs, out: &mut dyn Write) -> Result<ExitStatus, CliError> {
    // The generator panics where it cannot write, so it writes into memory.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), &args.name, &mut script);
    out.write_all(&script)?;
    Ok(ExitStatus::Success)
}
