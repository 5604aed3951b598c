//! The two passes over a row's blocks, compiled for every tier.

use dlmom_core::entropy::{PARTITION_BLOCK, block_partition, block_sum};

use crate::best::Best;
use crate::block::{Part, extremes, largest, weigh};
use crate::logits::{BLOCK, Block, Logits, UNIT};
use crate::merge::{Centre, Formula, MAX_EXPERTS, Only, Operator};
use crate::tier::tiered;

/// Some of a row's blocks.
#[derive(Debug)]
pub(crate) struct Chunk<'a> {
    /// Place of the first.
    pub(crate) first: usize,
    /// What each of them adds to the row.
    pub(crate) parts: &'a mut [Part],
    /// Their largest entries.
    pub(crate) best: &'a mut Best,
    /// Where merged preferences are wanted: those of these blocks.
    pub(crate) row: Option<&'a mut [f32]>,
}

/// Blocks of f64 sums for every block of a row.
pub(crate) const EXACT: usize = BLOCK / PARTITION_BLOCK;

/// Some of an expert's f64 sums.
#[derive(Debug)]
pub(crate) struct Exact<'a> {
    /// Place of the first block of the row.
    pub(crate) first: usize,
    /// What every [`PARTITION_BLOCK`] values add to `sum e_i` and `sum d_i e_i`.
    pub(crate) sums: &'a mut [(f64, f64)],
}

/// All that the second pass needs of the first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Merging<'a> {
    pub(crate) experts: &'a [Logits<'a>],
    pub(crate) centres: [Centre; MAX_EXPERTS],
    pub(crate) operator: Operator,
    pub(crate) scaled: bool,
    pub(crate) vocab: usize,
}

tiered! {
    /// Sums, extremes and largest entries of one expert's blocks; weights too, where they are not made
    /// by [`scan_exact`].
    fn scan_expert(logits: Logits<'_>, vocab: usize, weighed: bool, chunk: Chunk<'_>) = expert_body
}

tiered! {
    /// The parts of one expert's blocks in the reference's own sums of exponentials: all of f64.
    fn scan_exact(logits: Logits<'_>, vocab: usize, max: f32, exact: Exact<'_>) = exact_body
}

tiered! {
    /// Merges the experts' blocks; weights and largest entries of what comes out.
    fn scan_merged(merging: &Merging<'_>, chunk: Chunk<'_>) = merged_body
}

#[inline(always)]
fn expert_body(logits: Logits<'_>, vocab: usize, weighed: bool, chunk: Chunk<'_>) {
    let mut buffer: Block = [0.0; BLOCK];
    for (place, part) in (chunk.first..).zip(chunk.parts) {
        let start = place * BLOCK;
        let len = BLOCK.min(vocab - start);
        let block = logits.block(start, len, f32::NEG_INFINITY, &mut buffer);
        let values = &block[..len];
        part.total = block_sum(values);
        (part.min, part.max) = extremes(values);
        if weighed {
            (part.sum, part.weighted) = weigh(block, len, part.max);
        }
        chunk.best.offer(start, values, part.max);
    }
}

#[inline(always)]
fn exact_body(logits: Logits<'_>, vocab: usize, max: f32, exact: Exact<'_>) {
    let mut buffer: Block = [0.0; BLOCK];
    let mut buffers = [[0.0; PARTITION_BLOCK]; 2];
    let Exact { first, sums } = exact;
    for (place, sums) in (first..).zip(sums.chunks_mut(EXACT)) {
        let start = place * BLOCK;
        let len = BLOCK.min(vocab - start);
        let block = logits.block(start, len, 0.0, &mut buffer);
        for (sums, values) in sums.iter_mut().zip(block[..len].chunks(PARTITION_BLOCK)) {
            *sums = block_partition(values, f64::from(max), 1.0, &mut buffers);
        }
    }
}

#[inline(always)]
fn merged_body(merging: &Merging<'_>, chunk: Chunk<'_>) {
    match merging.operator {
        Operator::Only => merge_scaled::<_, 1>(Only, merging, chunk),
        Operator::Ties(ties) => merge_experts(ties, merging, chunk),
        Operator::Sum(sum) => merge_experts(sum, merging, chunk),
        Operator::Arith(arith) => merge_experts(arith, merging, chunk),
    }
}

#[inline(always)]
fn merge_experts(formula: impl Formula, merging: &Merging<'_>, chunk: Chunk<'_>) {
    match merging.experts.len() {
        2 => merge_scaled::<_, 2>(formula, merging, chunk),
        3 => merge_scaled::<_, 3>(formula, merging, chunk),
        4 => merge_scaled::<_, 4>(formula, merging, chunk),
        5 => merge_scaled::<_, 5>(formula, merging, chunk),
        6 => merge_scaled::<_, 6>(formula, merging, chunk),
        7 => merge_scaled::<_, 7>(formula, merging, chunk),
        _ => merge_scaled::<_, MAX_EXPERTS>(formula, merging, chunk),
    }
}

#[inline(always)]
fn merge_scaled<F: Formula, const K: usize>(formula: F, merging: &Merging<'_>, chunk: Chunk<'_>) {
    if merging.scaled {
        merge_blocks::<F, K, true>(formula, merging, chunk);
    } else {
        merge_blocks::<F, K, false>(formula, merging, chunk);
    }
}

#[inline(always)]
fn merge_blocks<F: Formula, const K: usize, const SCALED: bool>(
    formula: F,
    merging: &Merging<'_>,
    chunk: Chunk<'_>,
) {
    let centres = merging.centres;
    let mut buffer: Block = [0.0; BLOCK];
    let mut votes: [Block; K] = [[0.0; BLOCK]; K];
    let mut merged: Block = [0.0; BLOCK];
    let Chunk {
        first,
        parts,
        best,
        mut row,
    } = chunk;
    for (index, part) in parts.iter_mut().enumerate() {
        let start = (first + index) * BLOCK;
        let len = BLOCK.min(merging.vocab - start);
        let padded = len.next_multiple_of(UNIT).min(BLOCK);
        // Centring first, on its own: both loops then fit the registers.
        for ((votes, logits), centre) in votes.iter_mut().zip(merging.experts).zip(centres) {
            let block = logits.block(start, len, 0.0, &mut buffer);
            for (v, &z) in votes[..padded].iter_mut().zip(&block[..padded]) {
                *v = centre.apply::<SCALED>(z);
            }
        }
        for (j, merged) in merged[..padded].iter_mut().enumerate() {
            let mut own = [0.0_f32; K];
            for (own, votes) in own.iter_mut().zip(&votes) {
                *own = votes[j];
            }
            *merged = formula.merge(own);
        }
        merged[len..padded].fill(f32::NEG_INFINITY);
        part.max = largest(&merged[..padded]);
        (part.sum, part.weighted) = weigh(&merged, len, part.max);
        best.offer(start, &merged[..len], part.max);
        if let Some(row) = &mut row {
            row[index * BLOCK..][..len].copy_from_slice(&merged[..len]);
        }
    }
}
