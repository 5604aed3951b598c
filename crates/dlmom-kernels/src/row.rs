//! One row in two passes: every expert on its own, then all of them merged.

use dlmom_core::{Consensus, Request, RowReadout, Stats, draw, exp::exp_nonpositive};

use crate::best::Best;
use crate::block::Part;
use crate::hands::Hands;
use crate::logits::{BLOCK, Logits};
use crate::merge::{Centre, MAX_EXPERTS, Operator, Plan};
use crate::readout::{Own, collect, read_ids, read_own, read_top};
use crate::scan::{Chunk, EXACT, Exact, Merging, scan_exact, scan_expert, scan_merged};

/// Rows of fewer blocks are read before a helper has woken up.
const SPLIT: usize = 16;

/// Buffers reused from row to row.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// Per expert and then of the merged row, every block's part.
    parts: Vec<Part>,
    exact: Vec<(f64, f64)>,
    /// Per expert and then of the merged row, every chunk's largest entries.
    bests: Vec<Best>,
    merged: Vec<f32>,
    reference: dlmom_core::Scratch,
    widened: Vec<Vec<f32>>,
}

/// What is read.
#[derive(Clone, Copy)]
pub(crate) struct Task<'a> {
    pub(crate) experts: &'a [Logits<'a>],
    pub(crate) consensus: &'a dyn Consensus,
    pub(crate) request: &'a Request<'a>,
}

/// How a row is cut: into blocks, whose parts are added in order, and chunks of blocks, which threads take.
#[derive(Clone, Copy, Debug)]
struct Layout {
    vocab: usize,
    blocks: usize,
    /// Blocks of a chunk.
    chunk: usize,
    chunks: usize,
}

impl Layout {
    fn new(vocab: usize, threads: usize) -> Self {
        let blocks = vocab.div_ceil(BLOCK);
        // Threads are seldom equally fast; a chunk more costs a few candidates.
        let chunk = blocks.div_ceil(if threads > 1 { 2 * threads } else { 1 });
        let chunks = blocks.div_ceil(chunk);
        Self {
            vocab,
            blocks,
            chunk,
            chunks,
        }
    }

    fn places(self) -> impl Iterator<Item = usize> {
        (0..self.blocks).step_by(self.chunk)
    }
}

pub(crate) fn read_row(
    hands: Hands<'_>,
    task: Task<'_>,
    preferences: Option<&mut Vec<f32>>,
    scratch: &mut Scratch,
    out: &mut RowReadout,
) {
    let Task {
        experts,
        consensus,
        request,
    } = task;
    let vocab = experts.iter().map(Logits::len).min().unwrap_or(0);
    debug_assert!(experts.iter().all(|row| row.len() == vocab));
    let plan = Plan::new(consensus, experts.len());
    let (Some(mut plan), true, None) = (plan, vocab > 0, request.tempered) else {
        return by_reference(task, vocab, preferences, scratch, out);
    };
    out.clear();
    let count = experts.len();
    let hands = if vocab < SPLIT * BLOCK {
        Hands::alone(hands.tier)
    } else {
        hands
    };
    let layout = Layout::new(vocab, hands.count());
    scratch
        .parts
        .resize(layout.blocks * (count + 1), Part::default());
    scratch
        .bests
        .resize_with(layout.chunks * (count + 1), Best::default);
    let (own_parts, merged_parts) = scratch.parts.split_at_mut(layout.blocks * count);
    let (own_bests, merged_bests) = scratch.bests.split_at_mut(layout.chunks * count);

    let weighed = !matches!(plan.operator, Operator::Arith(_));
    scan_experts(hands, layout, task, weighed, own_parts, own_bests);
    let mut owns = [Own::default(); MAX_EXPERTS];
    let owns = &mut owns[..count];
    for ((own, parts), &logits) in owns
        .iter_mut()
        .zip(own_parts.chunks(layout.blocks))
        .zip(experts)
    {
        *own = reduce_expert(parts, logits, vocab);
        out.finite.push(own.stats.finite);
    }
    if out.finite.contains(&false) {
        return out.fail();
    }
    let mut centres = [Centre::default(); MAX_EXPERTS];
    let mut magnitudes = [0.0_f32; MAX_EXPERTS];
    for (index, own) in owns.iter().enumerate() {
        let centre = Centre {
            mean: own.stats.mean,
            scale: plan.scales[index],
        };
        // Rounding keeps the order, so that all centred logits are finite if these two are.
        let ends = [own.min, own.stats.max];
        let is_finite = |z: f32| centre.apply::<false>(z).is_finite();
        out.finite[index] = ends.into_iter().all(is_finite);
        let magnitude = |z: f32| centre.apply::<true>(z).abs();
        magnitudes[index] = magnitude(ends[0]).max(magnitude(ends[1]));
        centres[index] = centre;
    }
    if out.finite.contains(&false) {
        return out.fail();
    }
    if let Operator::Arith(arith) = &mut plan.operator {
        scan_exactly(hands, layout, experts, owns, &mut scratch.exact);
        for (index, own) in owns.iter().enumerate() {
            arith.learn(index, &own.stats, centres[index]);
        }
    }
    if !plan.is_bounded(&magnitudes[..count]) {
        return by_reference(task, vocab, preferences, scratch, out);
    }

    let sampled = request.draw.filter(|d| !d.sampling.is_argmax());
    let mut row = match preferences {
        Some(row) => Some(row),
        None => sampled.is_some().then_some(&mut scratch.merged),
    };
    if let Some(row) = &mut row {
        row.resize(vocab, 0.0);
    }
    // A greedy draw is the first of the largest.
    let top = request.top.max(usize::from(request.draw.is_some()));
    for best in &mut *merged_bests {
        best.reset(top, vocab);
    }
    let merging = Merging {
        experts,
        centres,
        operator: plan.operator,
        scaled: plan.scaled,
        vocab,
    };
    let whole = row.as_deref_mut().map(Vec::as_mut_slice);
    scan_preferences(hands, layout, &merging, whole, merged_parts, merged_bests);
    let (merged, _) = reduce(merged_parts);

    out.merged = count > 1;
    out.merged_entropy = merged.entropy;
    let top = collect(merged_bests);
    out.drawn = match (sampled, row) {
        (Some(sampled), Some(row)) => Some(draw(row, &sampled, request.seen)),
        _ => request.draw.and(top.first()).map(|entry| entry.0),
    };
    top.truncate(request.top);
    read_top(top, &merged, out);
    read_own(owns, own_bests.chunks_mut(layout.chunks), out);
    read_ids(&merging, &merged, owns, request, out);
}

/// The first pass.
fn scan_experts(
    hands: Hands<'_>,
    layout: Layout,
    task: Task<'_>,
    weighed: bool,
    parts: &mut [Part],
    bests: &mut [Best],
) {
    for best in &mut *bests {
        best.reset(task.request.per_agent_top, layout.vocab);
    }
    let parts = parts.chunks_mut(layout.blocks);
    let bests = bests.chunks_mut(layout.chunks);
    let experts = task.experts.iter().zip(parts).zip(bests);
    let tasks = experts.flat_map(|((&logits, parts), bests)| {
        let cut = parts.chunks_mut(layout.chunk).zip(bests);
        layout.places().zip(cut).map(move |(first, (parts, best))| {
            let row = None;
            let chunk = Chunk {
                first,
                parts,
                best,
                row,
            };
            (logits, chunk)
        })
    });
    hands.each(tasks, |(logits, chunk)| {
        scan_expert(hands.tier, logits, layout.vocab, weighed, chunk);
    });
}

/// Replaces what depends on exponentials by the reference's own, to the bit.
fn scan_exactly(
    hands: Hands<'_>,
    layout: Layout,
    experts: &[Logits<'_>],
    owns: &mut [Own],
    exact: &mut Vec<(f64, f64)>,
) {
    let len = layout.blocks * EXACT;
    exact.clear();
    // What no block reaches stays 0 and adds nothing.
    exact.resize(len * experts.len(), (0.0, 0.0));
    let rows = experts.iter().zip(&*owns).zip(exact.chunks_mut(len));
    let tasks = rows.flat_map(|((&logits, own), sums)| {
        let cut = sums.chunks_mut(layout.chunk * EXACT);
        let max = own.stats.max;
        let chunks = layout.places().zip(cut);
        chunks.map(move |(first, sums)| (logits, max, Exact { first, sums }))
    });
    hands.each(tasks, |(logits, max, exact)| {
        scan_exact(hands.tier, logits, layout.vocab, max, exact);
    });
    for (own, sums) in owns.iter_mut().zip(exact.chunks(len)) {
        let (mut sum, mut weighted) = (0.0, 0.0);
        for part in sums {
            sum += part.0;
            weighted += part.1;
        }
        own.stats.set_partition(sum, weighted);
    }
}

/// The second pass.
fn scan_preferences(
    hands: Hands<'_>,
    layout: Layout,
    merging: &Merging<'_>,
    mut rest: Option<&mut [f32]>,
    parts: &mut [Part],
    bests: &mut [Best],
) {
    let cut = parts.chunks_mut(layout.chunk).zip(bests);
    let tasks = layout.places().zip(cut).map(|(first, (parts, best))| {
        let row = rest.take().map(|all| {
            let (own, others) = all.split_at_mut(all.len().min(layout.chunk * BLOCK));
            rest = Some(others);
            own
        });
        Chunk {
            first,
            parts,
            best,
            row,
        }
    });
    hands.each(tasks, |chunk| scan_merged(hands.tier, merging, chunk));
}

fn reduce_expert(parts: &[Part], logits: Logits<'_>, vocab: usize) -> Own {
    let total: f64 = parts.iter().map(|part| part.total).sum();
    // A sum of finite float32 is finite in f64; one value that is not makes it so.
    if !total.is_finite() {
        return Own::default();
    }
    let (mut stats, block) = reduce(parts);
    stats.mean = total / vocab as f64;
    let start = block * BLOCK;
    let len = BLOCK.min(vocab - start);
    let mut buffer = [0.0; BLOCK];
    let values = &logits.block(start, len, 0.0, &mut buffer)[..len];
    let place = values.iter().position(|&z| z >= stats.max);
    stats.best = (start + place.unwrap_or(0)) as u32;
    let min = parts
        .iter()
        .fold(f32::INFINITY, |min, part| min.min(part.min));
    Own { stats, min }
}

/// All but mean and best of finite values, and the first block that holds the maximum.
fn reduce(parts: &[Part]) -> (Stats, usize) {
    let (mut max, mut block) = (f32::NEG_INFINITY, 0);
    for (index, part) in parts.iter().enumerate() {
        if part.max > max {
            (max, block) = (part.max, index);
        }
    }
    let (mut sum, mut weighted) = (0.0_f64, 0.0_f64);
    for part in parts {
        let d = f64::from(part.max) - f64::from(max);
        let scale = exp_nonpositive(d);
        sum += part.sum * scale;
        weighted += (part.weighted + d * part.sum) * scale;
    }
    let mut stats = Stats {
        max,
        finite: true,
        ..Stats::default()
    };
    stats.set_partition(sum, weighted);
    (stats, block)
}

fn by_reference(
    task: Task<'_>,
    vocab: usize,
    preferences: Option<&mut Vec<f32>>,
    scratch: &mut Scratch,
    out: &mut RowReadout,
) {
    let Task {
        experts,
        consensus,
        request,
    } = task;
    let buffers = experts.len().max(scratch.widened.len());
    scratch.widened.resize_with(buffers, Vec::new);
    let rows: Vec<&[f32]> = experts
        .iter()
        .zip(&mut scratch.widened)
        .map(|(row, buffer)| row.widened(vocab, buffer))
        .collect();
    dlmom_core::read_row(&rows, consensus, request, &mut scratch.reference, out);
    if let Some(preferences) = preferences {
        preferences.clear();
        if !rows.is_empty() && !out.finite.contains(&false) {
            preferences.extend_from_slice(scratch.reference.preferences());
        }
    }
}
