//! The fused consensus kernel against the reference readout and the paper's Appendix C.
//!
//! Synthetic logits, four sets in turn so that no call finds its own in the nearest cache. Every call of
//! the first three reads K entropies, the merged entropy and the 50 most probable tokens of one row;
//! Appendix C has no merged entropy.

#![expect(clippy::unwrap_used, reason = "a bench that fails has to stop")]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
};
use dlmom_benches::logits;
use dlmom_core::{ConsensusSpec, Method, Request, RowReadout, read_row};
use dlmom_kernels::{Kernel, Logits, Row, Scratch, Tier};
use half::bf16;

const VOCAB: usize = 151_936;
const SETS: u64 = 4;
const TOP: usize = 50;

/// `[sets][experts][vocab]`.
type Sets<T> = Vec<Vec<Vec<T>>>;

fn sets(experts: usize, vocab: usize) -> Sets<f32> {
    (0..SETS)
        .map(|seed| logits(experts, vocab, seed + 1))
        .collect()
}

fn halved(sets: &Sets<f32>) -> Sets<bf16> {
    let halve = |row: &Vec<f32>| row.iter().map(|&z| bf16::from_f32(z)).collect();
    sets.iter()
        .map(|rows| rows.iter().map(halve).collect())
        .collect()
}

fn views<'a, T>(sets: &'a Sets<T>, view: impl Fn(&'a [T]) -> Logits<'a>) -> Vec<Vec<Logits<'a>>> {
    sets.iter()
        .map(|rows| rows.iter().map(|row| view(row)).collect())
        .collect()
}

fn request() -> Request<'static> {
    Request {
        top: TOP,
        ..Request::default()
    }
}

/// One row after the other, the sets in turn.
fn bench_rows(
    group: &mut BenchmarkGroup<'_, WallTime>,
    id: BenchmarkId,
    kernel: &Kernel,
    sets: &[Vec<Logits<'_>>],
    spec: &ConsensusSpec,
) {
    let (mut scratch, mut out) = (Scratch::default(), RowReadout::default());
    let mut turn = sets.iter().cycle();
    group.bench_function(id, |b| {
        b.iter(|| {
            let row = black_box(turn.next().unwrap());
            kernel.read_row(row, spec, &request(), None, &mut scratch, &mut out);
        });
    });
}

fn tiers() -> impl Iterator<Item = Tier> {
    Tier::ALL.into_iter().filter(|tier| tier.is_available())
}

fn single(c: &mut Criterion) {
    let mut group = c.benchmark_group("kernel");
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20);
    for vocab in [512, VOCAB] {
        for experts in [1, 3] {
            let wide = sets(experts, vocab);
            let halves = halved(&wide);
            let inputs = [
                ("f32", views(&wide, Logits::F32)),
                ("bf16", views(&halves, Logits::Bf16)),
            ];
            group.throughput(Throughput::Elements((vocab * experts) as u64));
            for (method, name) in [
                (Method::Ties, "ties"),
                (Method::Mean, "mean"),
                (Method::Arith, "arith"),
            ] {
                if experts == 1 && method != Method::Ties {
                    continue;
                }
                let spec = ConsensusSpec::of(method);
                for (dtype, sets) in &inputs {
                    for tier in tiers() {
                        let kernel = Kernel::with_tier(tier, 1).unwrap();
                        let id =
                            BenchmarkId::new(format!("{name}/K={experts}/{dtype}/{tier}"), vocab);
                        bench_rows(&mut group, id, &kernel, sets, &spec);
                    }
                }
                let (mut scratch, mut out) =
                    (dlmom_core::Scratch::default(), RowReadout::default());
                let mut turn = wide.iter().cycle();
                let id = BenchmarkId::new(format!("{name}/K={experts}/f32/reference"), vocab);
                group.bench_function(id, |b| {
                    b.iter(|| {
                        let rows = black_box(turn.next().unwrap());
                        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
                        read_row(&rows, &spec, &request(), &mut scratch, &mut out);
                    });
                });
            }
            let mut turn = wide.iter().cycle();
            let id = BenchmarkId::new(format!("ties/K={experts}/f32/appendix-c"), vocab);
            group.bench_function(id, |b| {
                b.iter(|| appendix_c(black_box(turn.next().unwrap()), 0.1, 1e-6, TOP));
            });
        }
    }
    group.finish();
}

fn batch(c: &mut Criterion) {
    const ROWS: usize = 8;
    let mut group = c.benchmark_group("kernel_batch");
    group
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20);
    let wide: Sets<f32> = (0..ROWS as u64)
        .map(|seed| logits(3, VOCAB, seed + 1))
        .collect();
    let experts = views(&wide, Logits::F32);
    let spec = ConsensusSpec::paper();
    for (count, of) in [(ROWS, "B=8"), (1, "B=1")] {
        group.throughput(Throughput::Elements((count * 3 * VOCAB) as u64));
        for threads in [1, 2] {
            let kernel = Kernel::new(threads).unwrap();
            let (mut scratch, mut out) = (Vec::new(), Vec::new());
            let mut at = 0;
            group.bench_function(BenchmarkId::new(of, format!("{threads} threads")), |b| {
                b.iter(|| {
                    at = (at + 1) % ROWS;
                    let mut rows: Vec<Row<'_>> = experts
                        .iter()
                        .cycle()
                        .skip(at)
                        .take(count)
                        .map(|experts| Row {
                            experts,
                            consensus: &spec,
                            request: request(),
                            preferences: None,
                        })
                        .collect();
                    kernel.read_rows(&mut rows, &mut scratch, &mut out);
                });
            });
        }
    }
    group.finish();
}

fn softmax(row: &[f32]) -> Vec<f32> {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = row.iter().map(|z| (z - max).exp()).collect();
    let sum: f32 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// The sketch of the paper's Appendix C, operation after operation over whole rows in float32: the
/// experts' normalised entropies and the `k` most probable tokens, renormalised.
fn appendix_c(experts: &[Vec<f32>], theta: f32, eps: f32, k: usize) -> (Vec<f32>, Vec<(u32, f32)>) {
    let vocab = experts[0].len();
    let entropies = experts
        .iter()
        .map(|row| {
            let p = softmax(row);
            let logs: Vec<f32> = p.iter().map(|p| (p + 1e-9).ln()).collect();
            let terms: Vec<f32> = p.iter().zip(&logs).map(|(p, log)| p * log).collect();
            -terms.iter().sum::<f32>() / (vocab as f32).ln()
        })
        .collect();
    let trimmed: Vec<Vec<f32>> = experts
        .iter()
        .map(|row| {
            let mean = row.iter().sum::<f32>() / vocab as f32;
            let centred: Vec<f32> = row.iter().map(|z| z - mean).collect();
            let keep: Vec<bool> = centred.iter().map(|v| v.abs() >= theta).collect();
            let kept = centred.iter().zip(keep);
            kept.map(|(&v, keep)| if keep { v } else { 0.0 }).collect()
        })
        .collect();
    let sign = |v: f32| f32::from(i8::from(v > 0.0) - i8::from(v < 0.0));
    let signs: Vec<Vec<f32>> = trimmed
        .iter()
        .map(|row| row.iter().map(|&v| sign(v)).collect())
        .collect();
    let elected: Vec<f32> = (0..vocab)
        .map(|j| sign(signs.iter().map(|row| row[j]).sum()))
        .collect();
    let masks: Vec<Vec<f32>> = signs
        .iter()
        .map(|row| {
            let agrees = row.iter().zip(&elected);
            agrees.map(|(s, e)| f32::from(u8::from(s == e))).collect()
        })
        .collect();
    let sums: Vec<f32> = (0..vocab)
        .map(|j| trimmed.iter().zip(&masks).map(|(v, m)| v[j] * m[j]).sum())
        .collect();
    let counts: Vec<f32> = (0..vocab)
        .map(|j| masks.iter().map(|m| m[j]).sum::<f32>().max(1.0))
        .collect();
    let merged: Vec<f32> = sums
        .iter()
        .zip(&counts)
        .map(|(sum, count)| sum / (count + eps))
        .collect();
    let p = softmax(&merged);
    let mut top = Vec::new();
    dlmom_core::top_k(&p, k, &mut top);
    let mass: f32 = top.iter().map(|entry| entry.1).sum();
    for entry in &mut top {
        entry.1 /= mass;
    }
    (entropies, top)
}

criterion_group!(benches, single, batch);
criterion_main!(benches);
