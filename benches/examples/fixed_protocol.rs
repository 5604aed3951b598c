//! A fixed amount of protocol work, for counting instructions: `packet`, `controller` or `round`.

#![expect(clippy::unwrap_used, reason = "a bench that fails has to stop")]

use std::hint::black_box;

use dlmom_benches::{Last, cheap_backend, packet};
use dlmom_core::{ControllerSpec, Gate, GateController};
use dlmom_packet::{Encoding, Meta, decode_exact, encode_into};
use dlmom_runtime::{Job, JobKey, LoopConfig, PromptSource, RunOptions, run};

fn codec() {
    let meta = Meta {
        fingerprint: 1,
        step: 3,
    };
    let mut bytes = Vec::new();
    let packet = packet(50, 151_665);
    for _ in 0..200 {
        for encoding in [Encoding::F32, Encoding::Bf16] {
            bytes.clear();
            encode_into(black_box(&packet), meta, encoding, &mut bytes).unwrap();
            black_box(decode_exact(&bytes).unwrap());
        }
    }
}

fn controller() {
    for gate in [Gate::Threshold, Gate::Trend] {
        let spec = ControllerSpec {
            gate,
            w: Some(5),
            cap: -1,
            max_latent_steps: 10_000,
            ..ControllerSpec::default()
        };
        let mut controller = GateController::new(&spec).unwrap();
        for step in 0..2_000_u32 {
            let entropy = f64::from(step * 37 % 100) / 100.0;
            black_box(controller.observe(entropy, None));
        }
    }
}

/// 64 rows of 3 agents, 16 steps each.
fn round() {
    let config = LoopConfig {
        max_steps: 16,
        answer_reserve: 0,
        ..LoopConfig::default()
    };
    let mut jobs = (0..64).map(|i| Job {
        key: JobKey {
            item_id: i.to_string(),
            seed: 0,
            sample: 0,
        },
        prompts: vec![PromptSource::Tokens { ids: vec![1, 2, 3] }; 3],
        trace: false,
        config: 0,
        schedule: None,
        rival: None,
    });
    let mut backend = cheap_backend(3, 512, 64, 64);
    let mut sink = Last::default();
    run(
        &mut backend,
        &config,
        &RunOptions::default(),
        &mut jobs,
        &mut sink,
    )
    .unwrap();
    black_box(sink.steps);
}

fn main() -> Result<(), String> {
    match std::env::args().nth(1).as_deref() {
        Some("packet") => codec(),
        Some("controller") => controller(),
        Some("round") => round(),
        other => return Err(format!("{other:?}: packet, controller or round")),
    }
    Ok(())
}
