//! `run --backend mock`: the whole pipeline without a model, for trying a suites file or a folder's tools.

use dlmom_runtime::{Backend, MockBackend, ModelId, ModelInfo};
use serde_json::{Value, json};

use crate::args::{BackendKind, RunArgs};
use crate::host::{EngineSpec, Host, HostError};
use crate::status::CliError;

/// Tokens of the mock's vocabulary.
const VOCAB: u32 = 64;
/// Positions of a lane until the run reserves what it needs.
const MAX_LEN: u32 = 64;

/// Loads what `--backend` names.
pub(crate) fn load(
    args: &RunArgs,
    spec: &EngineSpec,
    host: &mut dyn Host,
) -> Result<Box<dyn Backend>, CliError> {
    match args.backend {
        BackendKind::Mock => Ok(Box::new(backend(spec))),
        BackendKind::Python => host.load(spec).map_err(|error| match error {
            HostError::NeedsPython(_) => CliError::Usage(format!("{error}, or --backend mock")),
            other => other.into(),
        }),
    }
}

/// What the manifest says about the surroundings of a run.
pub(crate) fn environment(args: &RunArgs, host: &mut dyn Host) -> Value {
    match args.backend {
        BackendKind::Mock => json!({ "backend": "mock" }),
        BackendKind::Python => host.environment(),
    }
}

/// Agents whose logits are a fixed function of what they were fed. Agents of one word share a model, as real ones would.
fn backend(spec: &EngineSpec) -> MockBackend {
    let mut mock = MockBackend::hashed(spec.agents.len(), VOCAB, spec.slots, MAX_LEN);
    let info = mock.info_mut();
    let like = info.models.first().cloned().unwrap_or_default();
    info.models = spec
        .experts
        .iter()
        .map(|word| ModelInfo {
            name: format!("mock-{}", word.rsplit(['/', ':']).next().unwrap_or(word)),
            source: format!("mock:{word}"),
            ..like.clone()
        })
        .collect();
    info.agents = spec.agents.iter().copied().map(ModelId).collect();
    mock
}
