//! Protocol overhead: packet codec, top-k, consensus readout, controller, one mock round, rows.
//!
//! Synthetic inputs only. Times are per operation; rounds report rows a second.

#![expect(clippy::unwrap_used, reason = "a bench that fails has to stop")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dlmom_benches::{Last, Lcg, cheap_backend, logits, packet};
use dlmom_core::{
    AlphaUnit, Center, ConsensusSpec, ControllerSpec, Elect, Gate, GateController, Method,
    NoiseSpec, Request, RowReadout, Scratch, Start, Stream, Tie, noise, read_row, top_k,
};
use dlmom_eval::{Item, NoJudge, Task};
use dlmom_packet::{Encoding, Meta, decode_exact, encode_into, encoded_len};
use dlmom_runs::row::RowContext;
use dlmom_runs::{Overrides, RawRow, RawWriter, Registry, Setting};
use dlmom_runtime::{Job, JobKey, LoopConfig, MemoryStats, PromptSource, RunOptions, run};

const VOCAB: u32 = 151_665;

fn codec(c: &mut Criterion) {
    let mut group = c.benchmark_group("packet");
    for k in [10, 50, 1000] {
        let packet = packet(k, VOCAB);
        let meta = Meta {
            fingerprint: 1,
            step: 3,
        };
        for encoding in [Encoding::F32, Encoding::Bf16] {
            let mut bytes = Vec::new();
            group.throughput(Throughput::Bytes(encoded_len(k, encoding) as u64));
            group.bench_function(BenchmarkId::new(format!("encode/{encoding}"), k), |b| {
                b.iter(|| {
                    bytes.clear();
                    encode_into(black_box(&packet), meta, encoding, &mut bytes).unwrap()
                });
            });
            group.bench_function(BenchmarkId::new(format!("decode/{encoding}"), k), |b| {
                b.iter(|| decode_exact(black_box(&bytes)).unwrap());
            });
        }
    }
    group.finish();
}

fn selection(c: &mut Criterion) {
    let mut group = c.benchmark_group("top_k");
    for vocab in [512, 32_000, VOCAB as usize] {
        let row = logits(1, vocab, 3).remove(0);
        let mut out = Vec::new();
        group.throughput(Throughput::Elements(vocab as u64));
        group.bench_function(BenchmarkId::new("k=50", vocab), |b| {
            b.iter(|| top_k(black_box(&row), 50, &mut out));
        });
    }
    group.finish();
}

fn consensus(c: &mut Criterion) {
    let mut group = c.benchmark_group("consensus");
    group.sample_size(20);
    for vocab in [512, VOCAB as usize] {
        for experts in [1, 2, 3] {
            let rows = logits(experts, vocab, 5);
            let views: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
            for (name, spec) in [
                ("ties", ConsensusSpec::paper()),
                ("mean", ConsensusSpec::of(Method::Mean)),
                (
                    "ties-union",
                    ConsensusSpec {
                        center: Center::TopkUnion,
                        elect: Elect::Mass,
                        tie: Tie::Mean,
                        ..ConsensusSpec::paper()
                    },
                ),
            ] {
                let mut scratch = Scratch::default();
                let mut out = RowReadout::default();
                let request = Request {
                    top: 50,
                    role: &[0],
                    ..Request::default()
                };
                group.throughput(Throughput::Elements((vocab * experts) as u64));
                group.bench_function(
                    BenchmarkId::new(format!("{name}/K={experts}"), vocab),
                    |b| {
                        b.iter(|| {
                            read_row(black_box(&views), &spec, &request, &mut scratch, &mut out);
                        });
                    },
                );
            }
        }
    }
    group.finish();
}

fn spec(gate: Gate) -> ControllerSpec {
    ControllerSpec {
        gate,
        w: Some(5),
        alpha: 0.5,
        alpha_unit: AlphaUnit::Normalized,
        cap: -1,
        min_dwell_latent: 1,
        min_dwell_explicit: 1,
        convergence_threshold: None,
        slope_eps: None,
        var_eps: None,
        max_latent_steps: u32::MAX,
        start: Start::Gate,
        patience: 1,
    }
}

fn controller(c: &mut Criterion) {
    let mut group = c.benchmark_group("controller");
    let mut rng = Lcg::new(11);
    let entropies: Vec<f64> = (0..1024).map(|_| f64::from(rng.unit())).collect();
    group.throughput(Throughput::Elements(entropies.len() as u64));
    for (name, gate) in [("threshold", Gate::Threshold), ("trend", Gate::Trend)] {
        let prototype = GateController::new(&spec(gate)).unwrap();
        group.bench_function(BenchmarkId::new("1024 steps", name), |b| {
            b.iter(|| {
                let mut controller = prototype.clone();
                for &h in &entropies {
                    black_box(controller.observe(h, None));
                }
                controller.switches()
            });
        });
    }
    group.finish();
}

fn perturbation(c: &mut Criterion) {
    let mut group = c.benchmark_group("noise");
    let packet = packet(50, VOCAB);
    let stream = Stream {
        seed: 1,
        sample: 2,
        step: 3,
    };
    for (name, spec) in [
        ("gumbel", NoiseSpec::Gumbel { tau: 1.0 }),
        ("dirichlet", NoiseSpec::Dirichlet { lambda: 50.0 }),
    ] {
        group.bench_function(BenchmarkId::new("k=50", name), |b| {
            b.iter(|| noise::apply(&spec, packet.ids(), packet.probs(), &stream).unwrap());
        });
    }
    group.finish();
}

fn round(c: &mut Criterion) {
    let mut group = c.benchmark_group("mock_round");
    group.sample_size(20);
    let config = LoopConfig {
        controller: spec(Gate::Threshold),
        max_steps: 16,
        answer_reserve: 0,
        ..LoopConfig::default()
    };
    for agents in [1, 3] {
        for slots in [1, 8, 64] {
            let jobs = |n: u32| {
                (0..n).map(move |i| Job {
                    key: JobKey {
                        item_id: i.to_string(),
                        seed: 0,
                        sample: 0,
                    },
                    prompts: vec![PromptSource::Tokens { ids: vec![1, 2, 3] }; agents],
                    trace: false,
                    config: 0,
                    schedule: None,
                    rival: None,
                })
            };
            let mut backend = cheap_backend(agents, 512, slots, 64);
            group.throughput(Throughput::Elements(u64::from(slots) * 16));
            group.bench_function(BenchmarkId::new(format!("K={agents}"), slots), |b| {
                b.iter(|| {
                    let mut sink = Last::default();
                    let options = RunOptions::default();
                    run(&mut backend, &config, &options, &mut jobs(slots), &mut sink).unwrap();
                    sink.steps
                });
            });
        }
    }
    group.finish();
}

/// A row as `run` appends it, and its line.
fn rows(c: &mut Criterion) {
    let config = LoopConfig {
        max_steps: 64,
        answer_reserve: 0,
        ..LoopConfig::default()
    };
    let mut backend = cheap_backend(2, 512, 1, 128);
    let mut sink = Last::default();
    let job = Job {
        key: JobKey {
            item_id: "q0".into(),
            seed: 0,
            sample: 0,
        },
        prompts: vec![PromptSource::Tokens { ids: vec![1, 2, 3] }; 2],
        trace: false,
        config: 0,
        schedule: None,
        rival: None,
    };
    let options = RunOptions::default();
    let mut jobs = std::iter::once(job);
    run(&mut backend, &config, &options, &mut jobs, &mut sink).unwrap();
    let outcome = sink.outcome.unwrap();
    let item = Item {
        id: "q0".into(),
        question: "1 + 1?".into(),
        gold: "2".into(),
        solution: None,
        task: Task::Number,
    };
    let plan = Registry::builtin()
        .unwrap()
        .expand(
            &["A1".to_owned()],
            &[],
            &Setting::lockstep(2, false),
            &Overrides::default(),
        )
        .unwrap();
    let context = RowContext {
        experiment: &plan.cells[0].experiment,
        config_hash: "0123456789abcdef",
        bench: "tinygsm",
        batch_size: 32,
        memory: MemoryStats::default(),
        drift: None,
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let mut group = c.benchmark_group("row");
    group.throughput(Throughput::Elements(1));
    group.bench_function("make", |b| {
        b.iter(|| RawRow::new(&context, black_box(&outcome), &item, &mut NoJudge).unwrap());
    });
    let row = RawRow::new(&context, &outcome, &item, &mut NoJudge).unwrap();
    let (mut writer, _) = RawWriter::open(&path, "0123456789abcdef").unwrap();
    group.bench_function("append and flush", |b| {
        b.iter(|| writer.append(black_box(&row)).unwrap());
    });
    group.finish();
}

criterion_group!(
    benches,
    codec,
    selection,
    consensus,
    controller,
    perturbation,
    round,
    rows
);
criterion_main!(benches);
