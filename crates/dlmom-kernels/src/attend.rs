//! Attention of one query per row over keys that lie where they were written, each row over its own.
//!
//! A step of a shared batch has rows of different lengths. A library's kernel reads as far as the longest needs, under a
//! mask, and adds in an order that depends on how far that is. Here a row reads its own positions only, in their order, so
//! that neither its bits nor its time depend on its mates.

use std::mem::discriminant;

use crate::block::{exp_or_zero, largest};
use crate::hands::Hands;
use crate::logits::{Floats, Widen, widened_into};
use crate::tier::{Available, tiered};

/// Keys that are weighed and added up at a time.
const KEYS: usize = 64;
/// Elements of a dot product that go side by side, whatever the width of the registers.
const LANES: usize = 16;

/// `[rows, heads, positions, size]` in memory of any strides; the elements of one position are neighbours.
#[derive(Clone, Copy, Debug)]
pub struct Grid<'a> {
    /// From the first element on.
    pub data: Floats<'a>,
    /// Rows, heads, positions, and elements of a position.
    pub shape: [usize; 4],
    /// Elements from one row, head and position to the next.
    pub strides: [usize; 3],
}

impl Grid<'_> {
    fn start(&self, row: usize, head: usize, position: usize) -> usize {
        row * self.strides[0] + head * self.strides[1] + position * self.strides[2]
    }

    /// Whether every element lies within the data.
    fn fits(&self) -> bool {
        let [rows, heads, positions, size] = self.shape;
        if rows * heads * positions * size == 0 {
            return false;
        }
        self.start(rows - 1, heads - 1, positions - 1) + size <= self.data.len()
    }
}

/// What a call attends to.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `[rows, heads, 1, d]`.
    pub queries: Grid<'a>,
    /// `[rows, kv_heads, positions, d]`; a head serves `heads / kv_heads` neighbouring queries.
    pub keys: Grid<'a>,
    /// `[rows, kv_heads, positions, dv]`.
    pub values: Grid<'a>,
    /// Each row's positions, from the first on and up to the second.
    pub visible: &'a [(usize, usize)],
    /// Factor of the scores.
    pub scale: f32,
}

/// Sizes or types that do not belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "queries, keys, values, visible positions and results of attention do not fit each other in size or type"
)]
pub struct Misfit;

/// Work from which on helpers are worth waking: products of a call.
const WORTH: usize = 1 << 17;

/// Softmax attention in float32, `[rows, heads, dv]` into `out`.
///
/// A row with a score that is NaN or `+inf`, or without one above `-inf`, becomes NaN.
pub(crate) fn attend(
    hands: Hands<'_>,
    call: &Attention<'_>,
    out: &mut [f32],
) -> Result<(), Misfit> {
    let [rows, heads, one, d] = call.queries.shape;
    let [key_rows, kv_heads, positions, key_size] = call.keys.shape;
    let [.., dv] = call.values.shape;
    let types = [call.queries, call.keys, call.values].map(|grid| discriminant(&grid.data));
    let fit = one == 1
        && types.iter().all(|kind| *kind == types[0])
        && key_rows == rows
        && key_size == d
        && call.values.shape == [rows, kv_heads, positions, dv]
        && [call.queries, call.keys, call.values]
            .iter()
            .all(Grid::fits)
        && heads % kv_heads == 0
        && out.len() == rows * heads * dv
        && call.visible.len() == rows
        && call
            .visible
            .iter()
            .all(|&(from, to)| from < to && to <= positions);
    if !fit {
        return Err(Misfit);
    }
    let groups = heads / kv_heads;
    let tasks = out
        .chunks_mut(groups * dv)
        .enumerate()
        .map(|(at, out)| Task {
            row: at / kv_heads,
            head: at % kv_heads,
            out,
        });
    let work: usize = call
        .visible
        .iter()
        .map(|(from, to)| (to - from) * heads * d)
        .sum();
    let hands = if work < WORTH {
        Hands::alone(hands.tier)
    } else {
        hands
    };
    let mut scratch = vec![Scratch::default(); hands.count()];
    let available: Available = hands.tier;
    hands.share(&mut scratch, tasks, |scratch, task| {
        attend_head(available, call, scratch, task);
    });
    Ok(())
}

/// One row's queries of one key head.
#[derive(Debug)]
pub(crate) struct Task<'a> {
    row: usize,
    head: usize,
    /// `[groups, dv]`.
    out: &'a mut [f32],
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Scratch {
    /// `[groups, d]`, scaled.
    queries: Vec<f32>,
    /// `[groups, positions]`: scores, then weights.
    scores: Vec<f32>,
    /// Some keys or values in float32.
    widened: Vec<f32>,
}

tiered! {
    fn attend_head(call: &Attention<'_>, scratch: &mut Scratch, task: Task<'_>) = body
}

#[inline(always)]
fn body(call: &Attention<'_>, scratch: &mut Scratch, mut task: Task<'_>) {
    match (call.queries.data, call.keys.data, call.values.data) {
        (Floats::F32(q), Floats::F32(k), Floats::F32(v)) => {
            head(call, (q, k, v), scratch, &mut task);
        }
        (Floats::Bf16(q), Floats::Bf16(k), Floats::Bf16(v)) => {
            head(call, (q, k, v), scratch, &mut task);
        }
        (Floats::F16(q), Floats::F16(k), Floats::F16(v)) => {
            head(call, (q, k, v), scratch, &mut task);
        }
        // Refused before. A panic here would cost the loops a tenth of their instructions.
        _ => task.out.fill(f32::NAN),
    }
}

#[inline(always)]
fn head<T: Widen>(
    call: &Attention<'_>,
    (q, k, v): (&[T], &[T], &[T]),
    scratch: &mut Scratch,
    task: &mut Task<'_>,
) {
    let Scratch {
        queries,
        scores,
        widened,
    } = scratch;
    let (d, dv) = (call.queries.shape[3], call.values.shape[3]);
    let groups = task.out.len() / dv;
    let (from, to) = call.visible[task.row];
    let count = to - from;
    queries.clear();
    for group in 0..groups {
        let start = call.queries.start(task.row, task.head * groups + group, 0);
        queries.extend(q[start..start + d].iter().map(|x| x.widen() * call.scale));
    }
    let scores = first(scores, groups * count);
    for block in (0..count).step_by(KEYS) {
        let keys = KEYS.min(count - block);
        let start = call.keys.start(task.row, task.head, from + block);
        let (rows, stride) = widened_rows(k, (start, call.keys.strides[2]), keys, d, widened);
        for (group, query) in queries.chunks_exact(d).enumerate() {
            let scores = &mut scores[group * count + block..][..keys];
            dots(query, rows, stride, scores);
        }
    }
    task.out.fill(0.0);
    for scores in scores.chunks_exact_mut(count) {
        let share = (1.0 / weigh(scores)) as f32;
        for score in scores {
            *score *= share;
        }
    }
    for block in (0..count).step_by(KEYS) {
        let keys = KEYS.min(count - block);
        let start = call.values.start(task.row, task.head, from + block);
        let (rows, stride) = widened_rows(v, (start, call.values.strides[2]), keys, dv, widened);
        for (group, out) in task.out.chunks_exact_mut(dv).enumerate() {
            add_up(&scores[group * count + block..][..keys], rows, stride, out);
        }
    }
}

/// So many of a buffer's elements, whatever they are.
#[inline(always)]
fn first(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Positions in float32, and how far they are apart: where they are, or in `out`.
#[inline(always)]
fn widened_rows<'a, T: Widen>(
    data: &'a [T],
    (start, stride): (usize, usize),
    count: usize,
    size: usize,
    out: &'a mut Vec<f32>,
) -> (&'a [f32], usize) {
    let all = &data[start..start + (count - 1) * stride + size];
    if let Some(all) = T::as_f32(all) {
        return (all, stride);
    }
    let out = first(out, count * size);
    for (at, row) in out.chunks_exact_mut(size).enumerate() {
        widened_into(&all[at * stride..][..size], row);
    }
    (out, size)
}

/// The products of a vector with up to [`KEYS`] others, `stride` apart.
#[inline(always)]
fn dots(query: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    let (chunks, rest) = query.as_chunks::<LANES>();
    let whole = chunks.len() * LANES;
    for (key, out) in out.iter_mut().enumerate() {
        let row = &rows[key * stride..][..query.len()];
        let mut sums = [0.0_f32; LANES];
        for (a, b) in chunks.iter().zip(row.as_chunks::<LANES>().0) {
            for lane in 0..LANES {
                sums[lane] += a[lane] * b[lane];
            }
        }
        *out = folded(sums) + product_of_rest(rest, &row[whole..]);
    }
}

/// The sum of lanes, halving.
#[inline(always)]
fn folded(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

#[inline(always)]
fn product_of_rest(a: &[f32], b: &[f32]) -> f32 {
    let mut rest = 0.0;
    for (a, b) in a.iter().zip(b) {
        rest += a * b;
    }
    rest
}

/// Scores become exponentials relative to their maximum; their sum, NaN where a softmax has none.
#[inline(always)]
fn weigh(scores: &mut [f32]) -> f64 {
    let whole = scores.len() / LANES * LANES;
    let mut max = largest(&scores[..whole]);
    for &score in &scores[whole..] {
        max = if score > max { score } else { max };
    }
    let mut sound = true;
    for &score in &*scores {
        sound &= score < f32::INFINITY;
    }
    if !sound || max == f32::NEG_INFINITY {
        return f64::NAN;
    }
    let mut sums = [0.0_f64; LANES];
    let (groups, rest) = scores.as_chunks_mut::<LANES>();
    for group in &mut *groups {
        for score in group {
            *score = exp_or_zero(*score - max);
        }
    }
    // On their own: with the exponentials they would have the width of f64.
    for group in groups {
        for lane in 0..LANES {
            sums[lane] += f64::from(group[lane]);
        }
    }
    // Lane by lane, as if the rest were a group padded with nothing.
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = exp_or_zero(*score - max);
        *sum += f64::from(*score);
    }
    sums.iter().sum()
}

/// Adds weighted values of some positions, `[keys, dv]`, to `out`.
#[inline(always)]
fn add_up(weights: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    // Every element has its sum in the order of the positions. Several chunks at a time: an addition does not wait for the
    // one before.
    let mut at = 0;
    while out.len() - at >= 4 * LANES {
        let sums = sums_of_four(weights, &rows[at..], stride);
        add(&mut out[at..], &sums);
        at += 4 * LANES;
    }
    while out.len() - at >= 2 * LANES {
        let sums = sums_of_two(weights, &rows[at..], stride);
        add(&mut out[at..], &sums);
        at += 2 * LANES;
    }
    if out.len() - at >= LANES {
        let mut sums = [0.0; LANES];
        for (key, &weight) in weights.iter().enumerate() {
            let (row, _) = rows[at + key * stride..][..LANES].as_chunks::<LANES>();
            add_weighted(&mut sums, weight, &row[0]);
        }
        add(&mut out[at..], &[sums]);
        at += LANES;
    }
    for (at, out) in out.iter_mut().enumerate().skip(at) {
        let mut sum = 0.0;
        for (key, &weight) in weights.iter().enumerate() {
            sum += weight * rows[key * stride + at];
        }
        *out += sum;
    }
}

// An array of arrays instead of names would be kept in memory.
#[inline(always)]
fn sums_of_four(weights: &[f32], rows: &[f32], stride: usize) -> [[f32; LANES]; 4] {
    let (mut a, mut b) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    let (mut c, mut d) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for (key, &weight) in weights.iter().enumerate() {
        let (row, _) = rows[key * stride..][..4 * LANES].as_chunks::<LANES>();
        add_weighted(&mut a, weight, &row[0]);
        add_weighted(&mut b, weight, &row[1]);
        add_weighted(&mut c, weight, &row[2]);
        add_weighted(&mut d, weight, &row[3]);
    }
    [a, b, c, d]
}

#[inline(always)]
fn sums_of_two(weights: &[f32], rows: &[f32], stride: usize) -> [[f32; LANES]; 2] {
    let (mut a, mut b) = ([0.0_f32; LANES], [0.0_f32; LANES]);
    for (key, &weight) in weights.iter().enumerate() {
        let (row, _) = rows[key * stride..][..2 * LANES].as_chunks::<LANES>();
        add_weighted(&mut a, weight, &row[0]);
        add_weighted(&mut b, weight, &row[1]);
    }
    [a, b]
}

#[inline(always)]
fn add_weighted(sums: &mut [f32; LANES], weight: f32, row: &[f32; LANES]) {
    for lane in 0..LANES {
        sums[lane] += weight * row[lane];
    }
}

#[inline(always)]
fn add(out: &mut [f32], sums: &[[f32; LANES]]) {
    for (out, sums) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
        for lane in 0..LANES {
            out[lane] += sums[lane];
        }
    }
}
