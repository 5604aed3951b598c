//! `run --backend mock`: the whole pipeline without a model, for trying a suites file or a folder's tools.

use std::io::Write;

use dlmom_runtime::mock::Position;
use dlmom_runtime::{Backend, LaneId, MockBackend, ModelId, ModelInfo};
use serde_json::{Value, json};

use crate::args::{BackendKind, RunArgs};
use crate::host::{EngineSpec, Host, HostError};
use crate::status::CliError;

/// Tokens of the mock's vocabulary: more than the largest packet of the built-in suites.
const VOCAB: u32 = 128;
/// Positions of a lane until the run reserves what it needs.
const MAX_LEN: u32 = 64;

/// Loads what `--backend` names.
pub(crate) fn load(
    kind: BackendKind,
    spec: &EngineSpec,
    host: &mut dyn Host,
    err: &mut dyn Write,
) -> Result<Box<dyn Backend>, CliError> {
    match kind {
        BackendKind::Mock => {
            writeln!(
                err,
                "note: --backend mock runs no model; its answers mean nothing"
            )?;
            Ok(Box::new(backend(spec)))
        }
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
    let models = spec.agents.clone();
    let script = move |lane: LaneId, positions: &[Position], out: &mut [f32]| {
        let model = models.get(lane.agent.index()).copied().unwrap_or(0);
        logits(model, positions, out);
    };
    let mut mock = MockBackend::scripted(
        spec.agents.len(),
        VOCAB,
        spec.slots,
        MAX_LEN,
        Box::new(script),
    );
    let info = mock.info_mut();
    let like = info.models.first().cloned().unwrap_or_default();
    // Mostly digits, so that some answers can be read.
    let print = |id: u32| b"0123456789 .+-=x"[id as usize % 16];
    info.models = spec
        .experts
        .iter()
        .map(|word| ModelInfo {
            name: format!("mock-{}", word.rsplit(['/', ':']).next().unwrap_or(word)),
            source: format!("mock:{word}"),
            token_bytes: (0..VOCAB).map(|id| vec![print(id)]).collect(),
            ..like.clone()
        })
        .collect();
    info.agents = spec.agents.iter().copied().map(ModelId).collect();
    mock
}

/// Logits that depend on every printed token so far, smoothly on the last packets, and are now flat, now sharp.
fn logits(model: u32, positions: &[Position], out: &mut [f32]) {
    let tokens = positions.iter().fold(u64::from(model), |digest, position| {
        let token = match position.as_slice() {
            [(id, _)] => u64::from(*id),
            _ => u64::from(VOCAB),
        };
        mix(digest ^ token)
    });
    let sharpness = 1.0 + 11.0 * unit(tokens);
    for (v, z) in out.iter_mut().enumerate() {
        let mut sum = unit(mix(tokens ^ v as u64)) - 0.5;
        for (position, weight) in positions.iter().rev().zip([1.0, 0.5, 0.25]) {
            for &(id, p) in position {
                let seed = u64::from(model) << 48 | u64::from(id) << 16 | v as u64;
                sum += weight * f64::from(p) * (unit(mix(seed)) - 0.5);
            }
        }
        *z = (sharpness * sum) as f32;
    }
}

fn mix(x: u64) -> u64 {
    // The finaliser of SplitMix64.
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A number from 0 to 1.
fn unit(x: u64) -> f64 {
    x as f64 / u64::MAX as f64
}
