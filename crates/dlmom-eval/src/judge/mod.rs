//! Judging a program by running it against its test. **No sandbox**: see the crate documentation.

#[cfg(unix)]
mod process;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A program and what it is tested with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program<'a> {
    /// The whole source.
    pub source: &'a str,
    /// Source that defines `check(candidate)`; runs after the program, in its name space.
    pub test: &'a str,
    /// The function that is checked.
    pub entry_point: &'a str,
}

/// What became of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its test ran to the end.
    Passed,
    /// It did not pass, for a reason of one line.
    Failed(String),
    /// It was stopped.
    TimedOut,
    /// It does not compile.
    NoProgram,
}

/// A program could not be judged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// No interpreter.
    #[error("scoring code needs Python: cannot run {}: {message}", python.display())]
    Python {
        /// The command.
        python: PathBuf,
        /// Why, one line.
        message: String,
    },
    /// The system did not give what a run needs: a process, a file.
    #[error("cannot judge code: {0}")]
    System(String),
    /// The interpreter ended before it came to the program.
    #[error("cannot judge code: the runner failed: {0}")]
    Runner(String),
    /// The test does not compile or defines no `check`.
    #[error("cannot judge code: the test of the item is broken: {0}")]
    Test(String),
    /// The run was set up without a judge, or the platform has none.
    #[error("cannot judge code: not available here")]
    Unavailable,
}

/// Runs programs.
pub trait CodeJudge {
    /// Judges one program.
    ///
    /// # Errors
    /// [`JudgeError`], which says nothing about the program.
    fn judge(&mut self, program: &Program<'_>) -> Result<Verdict, JudgeError>;
}

/// The judge of benchmarks without code.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoJudge;

impl CodeJudge for NoJudge {
    fn judge(&mut self, _: &Program<'_>) -> Result<Verdict, JudgeError> {
        Err(JudgeError::Unavailable)
    }
}

/// What a program may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time from start to verdict.
    pub wall: Duration,
    /// Bytes of address space of each process.
    pub memory: u64,
    /// Bytes of the largest file.
    pub file: u64,
}

impl Default for Limits {
    /// 10 s, 1 GiB, 16 MiB.
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(10),
            memory: 1 << 30,
            file: 16 << 20,
        }
    }
}

/// Prints version and path of the interpreter.
const ASK: &str = "import sys; print(*sys.version_info[:3], sep='.'); print(sys.executable or '')";

/// Runs every program in a Python process of its own, under [`Limits`]. Unix only.
#[derive(Clone, Debug)]
pub struct CodeRunner {
    python: PathBuf,
    version: String,
    limits: Limits,
}

impl CodeRunner {
    /// A runner of `python`, else of the `python3` on `PATH`, which has proved that it can run a program.
    ///
    /// # Errors
    /// [`JudgeError`].
    pub fn find(python: Option<&Path>, limits: Limits) -> Result<Self, JudgeError> {
        let python = python.unwrap_or(Path::new("python3"));
        let failed = |message: String| JudgeError::Python {
            python: python.to_owned(),
            message: message.split_whitespace().collect::<Vec<_>>().join(" "),
        };
        // What is on PATH may be a launcher that cannot do without the environment; ask it for the interpreter.
        let asked = Command::new(python)
            .args(["-s", "-S", "-c", ASK])
            .output()
            .map_err(|e| failed(e.to_string()))?;
        if !asked.status.success() {
            let said = String::from_utf8_lossy(&asked.stderr);
            return Err(failed(format!("{}: {said}", asked.status)));
        }
        let said = String::from_utf8_lossy(&asked.stdout);
        let (version, path) = said.split_once('\n').unwrap_or_default();
        let path = path.trim_end_matches(['\r', '\n']);
        if version.is_empty() {
            return Err(failed("it does not answer as Python does".into()));
        }
        let mut runner = Self {
            python: if path.is_empty() {
                python
            } else {
                Path::new(path)
            }
            .to_owned(),
            version: version.trim().to_owned(),
            limits,
        };
        let right = Program {
            source: "def one():\n    return 1\n",
            test: "def check(candidate):\n    assert candidate() == 1\n",
            entry_point: "one",
        };
        match runner.judge(&right)? {
            Verdict::Passed => Ok(runner),
            other => Err(failed(format!("a program that is right got {other:?}"))),
        }
    }

    /// The interpreter.
    #[must_use]
    pub fn python(&self) -> &Path {
        &self.python
    }

    /// Its version, `3.12.4`: what a program does may depend on it.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }
}

impl CodeJudge for CodeRunner {
    #[cfg(unix)]
    fn judge(&mut self, program: &Program<'_>) -> Result<Verdict, JudgeError> {
        process::judge(&self.python, &self.limits, program)
    }

    #[cfg(not(unix))]
    fn judge(&mut self, _: &Program<'_>) -> Result<Verdict, JudgeError> {
        Err(JudgeError::Unavailable)
    }
}
