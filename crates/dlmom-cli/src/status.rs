//! How a command ended.

use std::process::ExitCode;

use dlmom_eval::{BenchSpecError, ItemsError};
use dlmom_runs::{
    JsonlError, PresetError, RegistryError, RowError, RunDirError, SeatingError, Unsupported,
};
use dlmom_runtime::{BackendError, ConfigError, RunError};

use crate::host::HostError;

/// Exit status of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// Everything asked for was done.
    Success,
    /// It failed while running; what was finished is on disk.
    Failure,
    /// Bad usage or input; nothing was done.
    Usage,
    /// The user stopped it; what was finished is on disk.
    Interrupted,
}

impl ExitStatus {
    /// The number a shell sees: 0, 1, 2 or 130.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failure => 1,
            Self::Usage => 2,
            Self::Interrupted => 130,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.code())
    }
}

/// A command's failure: the status it ends with and one clear line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// Bad usage or input.
    #[error("{0}")]
    Usage(String),
    /// A failure while running.
    #[error("{0}")]
    Failed(String),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Nobody reads the output any more.
    #[error("broken pipe")]
    BrokenPipe,
}

impl CliError {
    /// The exit status.
    #[must_use]
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Usage(_) => ExitStatus::Usage,
            Self::Failed(_) => ExitStatus::Failure,
            Self::Interrupted => ExitStatus::Interrupted,
            Self::BrokenPipe => ExitStatus::Success,
        }
    }
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Self::BrokenPipe
        } else {
            Self::Failed(error.to_string())
        }
    }
}

macro_rules! usage {
    ($($kind:ty),*) => {$(
        impl From<$kind> for CliError {
            fn from(error: $kind) -> Self {
                Self::Usage(error.to_string())
            }
        }
    )*};
}

usage!(
    RegistryError,
    BenchSpecError,
    ItemsError,
    Unsupported,
    ConfigError,
    SeatingError,
    PresetError
);

impl From<RowError> for CliError {
    fn from(error: RowError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<JsonlError> for CliError {
    fn from(error: JsonlError) -> Self {
        match error {
            JsonlError::Malformed { .. } | JsonlError::OtherConfig { .. } => {
                Self::Usage(error.to_string())
            }
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl From<RunDirError> for CliError {
    fn from(error: RunDirError) -> Self {
        match error {
            RunDirError::Rows(inner) => inner.into(),
            RunDirError::Io { .. }
            | RunDirError::Encode { .. }
            | RunDirError::EncodeYaml { .. } => Self::Failed(error.to_string()),
            _ => Self::Usage(error.to_string()),
        }
    }
}

impl From<HostError> for CliError {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Usage(_) | HostError::NeedsPython(_) => Self::Usage(error.to_string()),
            HostError::Interrupted => Self::Interrupted,
            HostError::Failed { message, .. } => Self::Failed(message),
        }
    }
}

impl From<BackendError> for CliError {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::Cancelled(_) => Self::Interrupted,
            BackendError::Invalid(_) | BackendError::Unsupported(_) => {
                Self::Usage(error.to_string())
            }
            _ => Self::Failed(error.to_string()),
        }
    }
}

impl From<RunError> for CliError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Interrupted(_) => Self::Interrupted,
            RunError::Config(_)
            | RunError::Vocabulary { .. }
            | RunError::VectorLink { .. }
            | RunError::NoDonors
            | RunError::NoSchedule { .. }
            | RunError::NotOneToken { .. }
            | RunError::OneRow { .. }
            | RunError::NoAgents => Self::Usage(error.to_string()),
            // Exceptions of device libraries span lines; an error here is one.
            RunError::Backend { ref source, .. } => {
                Self::Failed(one_line(&format!("{error}: {source}")))
            }
            RunError::Sink(source) => Self::Failed(source.to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
