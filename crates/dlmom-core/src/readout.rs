//! From the experts' logits to everything the loop needs of a step.
//!
//! The interface is slices in, one reused readout out, so that a fused kernel can replace the
//! implementation without touching its callers.

use crate::consensus::{Consensus, Views};
use crate::entropy::{Stats, at_least_zero, partition, stats};
use crate::exp::exp_nonpositive;
use crate::sampling::{Draw, draw_with};
use crate::stream::Stream;
use crate::topk::{by_value_then_id, top_k};

/// A token's log-probability under several temperatures, for fitting one.
#[derive(Clone, Copy, Debug)]
pub struct Tempered<'a> {
    /// The token.
    pub target: u32,
    /// Temperatures above 0.
    pub temperatures: &'a [f64],
}

/// What a readout must hold.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// Entries of the merged distribution; more than V means all.
    pub top: usize,
    /// Entries of every expert's own distribution.
    pub per_agent_top: usize,
    /// Token ids whose log-probabilities are wanted.
    pub targets: Option<&'a [u32]>,
    /// A token whose log-probability is wanted of every expert under several temperatures.
    pub tempered: Option<Tempered<'a>>,
    /// Draws an explicit token from the merged distribution.
    pub draw: Option<Draw>,
    /// Tokens that the draw's repetition penalty falls on.
    pub seen: &'a [u32],
    /// Randomness of consensus operators that draw.
    pub stream: Option<Stream>,
    /// Ids whose merged probability is summed, such as the end-of-sequence set. Repeated ids count
    /// once, ids outside the vocabulary have probability 0.
    pub role: &'a [u32],
}

/// One row's readout. After a failed row only `finite` is filled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowReadout {
    /// Per expert, whether all of its logits, also when centred, are finite.
    pub finite: Vec<bool>,
    /// Entropy of every expert's own softmax, in nats.
    pub entropies: Vec<f64>,
    /// Entropy of the merged distribution, in nats.
    pub merged_entropy: f64,
    /// Whether the experts were merged; false for one expert, and where a gate let one decide alone.
    pub merged: bool,
    /// Whether all experts have the same most probable token.
    pub agreed: bool,
    /// Most probable ids of the merged distribution, by `probs` descending, then id ascending.
    pub ids: Vec<u32>,
    /// Probabilities of `ids`, renormalised to sum 1. The far tail may underflow to 0.
    pub probs: Vec<f32>,
    /// Merged probability of `ids` before renormalising, in `(0, 1]`.
    pub mass: f32,
    /// Merged probability of the requested role ids, in `[0, 1]`.
    pub role_mass: f32,
    /// The drawn token, if a draw was requested.
    pub drawn: Option<u32>,
    /// Per expert, its most probable ids with their probability under its own full softmax.
    pub per_agent: Vec<Vec<(u32, f32)>>,
    /// `ln p` of the targets under the merged distribution; `-inf` outside the vocabulary.
    pub target_logprobs: Vec<f64>,
    /// Per expert, `ln p` of the targets under its own softmax.
    pub per_agent_target_logprobs: Vec<Vec<f64>>,
    /// Per expert, `ln p` of the tempered target under its own softmax at each temperature; `-inf`
    /// outside the vocabulary.
    pub tempered: Vec<Vec<f64>>,
}

impl RowReadout {
    /// Empties everything but the nested buffers, which the next row refills.
    pub fn clear(&mut self) {
        self.finite.clear();
        self.entropies.clear();
        self.merged_entropy = 0.0;
        self.merged = false;
        self.agreed = false;
        self.ids.clear();
        self.probs.clear();
        self.mass = 0.0;
        self.role_mass = 0.0;
        self.drawn = None;
        self.target_logprobs.clear();
        self.tempered.clear();
    }

    /// Leaves nothing of a failed row, which was cleared before, but its flags.
    pub fn fail(&mut self) {
        self.merged = false;
        self.per_agent.clear();
        self.per_agent_target_logprobs.clear();
    }
}

/// Buffers reused from row to row.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// Whether the last row read had one expert, whose centred row is then its preferences.
    single: bool,
    stats: Vec<Stats>,
    centred: Vec<f32>,
    merged: Vec<f32>,
    penalised: Vec<f32>,
    top: Vec<(u32, f32)>,
}

impl Scratch {
    /// The merged preferences of the last row that was read without failing: V logits.
    #[must_use]
    pub fn preferences(&self) -> &[f32] {
        if self.single {
            &self.centred
        } else {
            &self.merged
        }
    }
}

/// Reads one row: experts' float32 logits, each of length V, to entropies, merged packet, draw and
/// log-probabilities (steps 2 to 6 of the loop).
///
/// Every expert is centred, `v = z - mean(z)`, and `consensus` merges them; with one expert the
/// merged row is the centred one and `consensus` is not called. If any expert has a value that is
/// not finite, its flag is false and nothing else of `out` is filled; if the merged row has one,
/// every flag is false. Logits of unequal length are a programming error (checked in debug builds);
/// otherwise the shortest length counts. `out` is cleared and refilled without reallocating once its
/// buffers have grown. Never panics on any values.
pub fn read_row(
    experts: &[&[f32]],
    consensus: &dyn Consensus,
    request: &Request<'_>,
    scratch: &mut Scratch,
    out: &mut RowReadout,
) {
    let vocab = experts.iter().map(|row| row.len()).min().unwrap_or(0);
    debug_assert!(experts.iter().all(|row| row.len() == vocab));
    out.clear();
    let Scratch {
        single,
        stats: expert_stats,
        centred,
        merged,
        penalised,
        top,
    } = scratch;

    expert_stats.clear();
    expert_stats.extend(experts.iter().map(|row| stats(&row[..vocab])));
    out.finite.extend(expert_stats.iter().map(|s| s.finite));
    if experts.is_empty() || out.finite.contains(&false) {
        return out.fail();
    }

    centred.clear();
    centred.reserve(vocab * experts.len());
    for (index, (row, s)) in experts.iter().zip(&*expert_stats).enumerate() {
        centred.extend(row[..vocab].iter().map(|&z| (f64::from(z) - s.mean) as f32));
        // Only logits near the float32 limit overflow here.
        out.finite[index] = centred[index * vocab..].iter().all(|v| v.is_finite());
    }
    if out.finite.contains(&false) {
        return out.fail();
    }
    *single = experts.len() == 1;
    let merged: &[f32] = if *single {
        centred
    } else {
        merged.clear();
        merged.resize(vocab, 0.0);
        let rows: Vec<&[f32]> = centred.chunks_exact(vocab).collect();
        let views = Views {
            centred: &rows,
            stats: expert_stats,
            stream: request.stream,
        };
        out.merged = consensus.merge(&views, merged);
        merged
    };
    let merged_stats = stats(merged);
    if !merged_stats.finite {
        out.finite.fill(false);
        return out.fail();
    }

    out.entropies.extend(expert_stats.iter().map(|s| s.entropy));
    out.agreed = expert_stats.iter().all(|s| s.best == expert_stats[0].best);
    out.merged_entropy = merged_stats.entropy;
    let probability = |z: f32, s: &Stats| exp_nonpositive(f64::from(z) - s.log_z);

    top_k(merged, request.top, top);
    let mass: f64 = top
        .iter()
        .map(|&(_, v)| probability(v, &merged_stats))
        .sum();
    // A mass that underflows cannot happen: the most probable of V tokens has at least 1 / V.
    for entry in top.iter_mut() {
        entry.1 = (probability(entry.1, &merged_stats) / mass) as f32;
    }
    // Distinct logits may round to one probability; the order is that of the probabilities.
    top.sort_unstable_by(by_value_then_id);
    out.ids.extend(top.iter().map(|&(id, _)| id));
    out.probs.extend(top.iter().map(|&(_, p)| p));
    out.mass = mass.min(1.0) as f32;

    let role_mass: f64 = request
        .role
        .iter()
        .enumerate()
        .filter(|&(at, id)| !request.role[..at].contains(id))
        .filter_map(|(_, &id)| merged.get(id as usize))
        .map(|&v| probability(v, &merged_stats))
        .sum();
    out.role_mass = role_mass.min(1.0) as f32;

    let targets = request.targets.unwrap_or(&[]);
    log_probs(merged, &merged_stats, targets, &mut out.target_logprobs);
    out.per_agent.resize_with(experts.len(), Vec::new);
    out.per_agent_target_logprobs
        .resize_with(experts.len(), Vec::new);
    for (index, (row, s)) in experts.iter().zip(&*expert_stats).enumerate() {
        let own = &mut out.per_agent[index];
        top_k(&row[..vocab], request.per_agent_top, own);
        for entry in own.iter_mut() {
            entry.1 = probability(entry.1, s) as f32;
        }
        own.sort_unstable_by(by_value_then_id);
        log_probs(
            &row[..vocab],
            s,
            targets,
            &mut out.per_agent_target_logprobs[index],
        );
    }

    if let Some(Tempered {
        target,
        temperatures,
    }) = request.tempered
    {
        out.tempered
            .extend(experts.iter().zip(&*expert_stats).map(|(row, s)| {
                let Some(&z) = row[..vocab].get(target as usize) else {
                    return vec![f64::NEG_INFINITY; temperatures.len()];
                };
                let max = f64::from(s.max);
                let log_p = |t: f64| {
                    let (sum, _) = partition(&row[..vocab], max, t);
                    (f64::from(z) - max) / t - libm::log(sum)
                };
                temperatures.iter().map(|&t| log_p(t)).collect()
            }));
    }
    out.drawn = request
        .draw
        .as_ref()
        .map(|draw| draw_with(merged, draw, request.seen, penalised, top));
}

fn log_probs(row: &[f32], s: &Stats, targets: &[u32], out: &mut Vec<f64>) {
    out.clear();
    out.extend(targets.iter().map(|&id| {
        row.get(id as usize)
            .map_or(f64::NEG_INFINITY, |&z| f64::from(z) - s.log_z)
    }));
}

/// How far one next-token distribution is from another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Divergence {
    /// `KL(softmax(a) || softmax(b))` in nats; at least 0.
    pub kl: f64,
    /// Cosine of the centred logits; 1 if both rows are constant, 0 if one is.
    pub cosine: f64,
}

/// Drift of row `b` against row `a`, from full logits of one length V.
///
/// Both fields are NaN if either row is empty or holds a value that is not finite. Rows of unequal
/// length are a programming error (checked in debug builds); otherwise the shorter length counts.
#[must_use]
pub fn compare_rows(a: &[f32], b: &[f32]) -> Divergence {
    debug_assert_eq!(a.len(), b.len());
    let vocab = a.len().min(b.len());
    let (a, b) = (&a[..vocab], &b[..vocab]);
    let (sa, sb) = (stats(a), stats(b));
    if !(sa.finite && sb.finite) {
        return Divergence {
            kl: f64::NAN,
            cosine: f64::NAN,
        };
    }
    let (mut kl, mut dot, mut norm_a, mut norm_b) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0_f64);
    for (&x, &y) in a.iter().zip(b) {
        let (x, y) = (f64::from(x), f64::from(y));
        let log_p = x - sa.log_z;
        kl += exp_nonpositive(log_p) * (log_p - (y - sb.log_z));
        let (u, v) = (x - sa.mean, y - sb.mean);
        dot += u * v;
        norm_a += u * u;
        norm_b += v * v;
    }
    let cosine = match (norm_a > 0.0, norm_b > 0.0) {
        (true, true) => (dot / (norm_a.sqrt() * norm_b.sqrt())).clamp(-1.0, 1.0),
        (false, false) => 1.0,
        _ => 0.0,
    };
    Divergence {
        kl: at_least_zero(kl),
        cosine,
    }
}
