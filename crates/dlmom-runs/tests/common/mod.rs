//! Rows and plans for the tests.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::allow_attributes,
    reason = "shared by several test binaries"
)]

use std::path::Path;

use dlmom_core::Schedule;
use dlmom_eval::{Item, NoJudge, Task};
use dlmom_runs::{Experiment, Overrides, Plan, RawRow, Registry, RowContext, Setting};
use dlmom_runtime::outcome::ENTROPY_BINS;
use dlmom_runtime::{JobKey, MemoryStats, Outcome, Spread, Stop, Topology, entropy_bin};
use serde_json::{Value, json};

pub(crate) const ENSEMBLE: Setting = Setting {
    shared_model: false,
    experts: 2,
    topology: Topology::Lockstep,
};
pub(crate) const SHARED: Setting = Setting {
    shared_model: true,
    experts: 2,
    topology: Topology::Lockstep,
};

pub(crate) fn plan(suites: &[&str], only: &[&str], setting: &Setting) -> Plan {
    let strings = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
    Registry::builtin()
        .unwrap()
        .expand(
            &strings(suites),
            &strings(only),
            setting,
            &Overrides::default(),
        )
        .unwrap()
}

pub(crate) fn experiment(id: &str) -> Experiment {
    plan(&[], &[], &ENSEMBLE)
        .cells
        .into_iter()
        .find(|c| c.experiment.id == id)
        .unwrap()
        .experiment
}

pub(crate) fn context() -> Value {
    json!({"bench": "tinygsm", "data_sha256": "00", "dtype": "fp32", "threads": 2})
}

pub(crate) fn item(index: u64) -> Item {
    Item {
        id: format!("item-{index}"),
        question: "q".into(),
        gold: index.to_string(),
        solution: None,
        task: Task::Number,
    }
}

/// A sample of `item` that answers `answer` after `latent` latent and 5 explicit steps.
pub(crate) fn outcome(item: &Item, seed: u64, answer: Option<u64>, latent: u32) -> Outcome {
    let text = answer.map_or_else(|| "I cannot tell.".to_owned(), |a| format!("so\n#### {a}"));
    let mut hist = vec![0u32; ENTROPY_BINS];
    let entropies = [0.002, 0.03, 0.4];
    for step in 0..(5 + latent) as usize {
        hist[entropy_bin(entropies[step % 3])] += 1;
    }
    Outcome {
        config: 0,
        key: JobKey {
            item_id: item.id.clone(),
            seed,
            sample: 0,
        },
        stop: Stop::Eos,
        error: None,
        tokens: vec![1, 2, 3, 4, 5],
        text,
        explicit_tokens: 5,
        latent_steps: latent,
        latent_segments: if latent > 0 { vec![latent] } else { Vec::new() },
        switches: u32::from(latent > 0),
        schedule: Schedule::from(if latent > 0 {
            vec![0, latent, 5]
        } else {
            vec![5]
        }),
        injected_tokens: 0,
        handoffs: 0,
        handoff_log: Vec::new(),
        handoff_bytes: 0,
        prompt_tokens: vec![11, 12],
        forward_tokens: vec![16 + latent, 17 + latent],
        uplink_bytes: 400,
        downlink_bytes: 40,
        entropy: Spread {
            mean: 0.1,
            min: 0.002,
            max: 0.4,
        },
        entropy_hist: hist,
        topk_mass: (latent > 0).then_some(0.9),
        noise_kl: (latent > 0).then_some(0.05),
        noise_js: (latent > 0).then_some(0.01),
        agreement: Some(0.75),
        merge_rate: Some(1.0),
        divergences: None,
        latency_s: 0.5,
        started_at: 1000.0 + seed as f64,
        trace: None,
        packets: Vec::new(),
    }
}

pub(crate) fn row(
    experiment: &Experiment,
    index: u64,
    seed: u64,
    answer: Option<u64>,
    latent: u32,
) -> RawRow {
    let item = item(index);
    let hash = experiment.config_hash(&context()).unwrap();
    let context = RowContext {
        experiment,
        config_hash: &hash,
        bench: "tinygsm",
        batch_size: 8,
        memory: MemoryStats {
            kv_bytes: 0,
            copied_positions: 0,
            peak_device_bytes: None,
            peak_rss_bytes: Some(1 << 20),
        },
        drift: None,
    };
    RawRow::new(
        &context,
        &outcome(&item, seed, answer, latent),
        &item,
        &mut NoJudge,
    )
    .unwrap()
}

pub(crate) fn write_rows(path: &Path, rows: &[RawRow]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let text: String = rows
        .iter()
        .map(|r| serde_json::to_string(r).unwrap() + "\n")
        .collect();
    std::fs::write(path, text).unwrap();
}
