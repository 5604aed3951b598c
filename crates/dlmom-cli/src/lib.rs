#![doc = include_str!("../README.md")]

pub mod args;
mod build;
mod calibrate;
mod compare;
mod completions;
pub mod display;
mod doctor;
mod drift;
mod generate;
pub mod host;
mod list;
mod mock;
mod packet;
mod pilot;
mod prepare;
mod probe;
mod replay;
mod report;
mod run;
mod schema;
mod show;
mod status;
mod tables;
pub mod timeline;
mod validate;
mod visits;

use std::io::Write;

use clap::Parser;
use clap::error::ErrorKind;

pub use args::{Cli, Command};
pub use status::{CliError, ExitStatus};

/// Runs the command line `argv` (the program's name first) and returns how it ended.
///
/// Results go to `out`, notes and errors to `err`; an error is one line, `error: ...`.
pub fn run(
    argv: &[String],
    host: &mut dyn host::Host,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> ExitStatus {
    let cli = match Cli::try_parse_from(argv) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, out, err),
    };
    let result = match &cli.command {
        Command::Run(args) => run::command(args, argv, host, out, err),
        Command::Aggregate(args) => tables::aggregate(args, out, err),
        Command::Plot(args) => tables::plot(args, host, out),
        Command::Compare(args) => compare::command(args, out, err),
        Command::Calibrate(args) => calibrate::command(args, host, out, err),
        Command::Generate(args) => generate::command(args, host, out, err),
        Command::Show(args) => show::command(args, host, out),
        Command::Replay(args) => replay::command(args, out),
        Command::Packet(args) => packet::command(args, out, err),
        Command::Validate(args) => validate::command(args, out, err),
        Command::List(args) => list::command(args, host, out),
        Command::Doctor(args) => doctor::command(args, host, out),
        Command::Schema(args) => schema::command(args, out),
        Command::Completions(args) => completions::command(args, out),
    };
    let status = match result {
        Ok(status) => status,
        Err(CliError::Interrupted) => ExitStatus::Interrupted,
        Err(CliError::BrokenPipe) => ExitStatus::Success,
        Err(error) => {
            // There is nowhere left to report a failure to report.
            let _ = writeln!(err, "error: {error}");
            error.status()
        }
    };
    let _ = out.flush();
    let _ = err.flush();
    status
}

fn usage(error: &clap::Error, out: &mut dyn Write, err: &mut dyn Write) -> ExitStatus {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = write!(out, "{error}");
            let _ = out.flush();
            ExitStatus::Success
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = write!(err, "{error}");
            ExitStatus::Usage
        }
        _ => {
            // Clap explains over several lines; the first paragraph says what is wrong.
            let text = error.to_string();
            let first: Vec<&str> = text
                .lines()
                .take_while(|line| !line.trim().is_empty())
                .map(str::trim)
                .collect();
            let _ = writeln!(err, "{}", first.join(" "));
            ExitStatus::Usage
        }
    }
}
