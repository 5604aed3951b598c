//! The Python-free `dlmom-rs`: the same commands, as far as they need no model.

use std::process::ExitCode;

use dlmom_cli::host::NoPython;

fn main() -> ExitCode {
    let argv: Vec<String> = std::env::args().collect();
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr());
    dlmom_cli::run(&argv, &mut NoPython, &mut out, &mut err).into()
}
