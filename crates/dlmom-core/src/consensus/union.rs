//! The options of `ties`, on the union of the experts' most probable tokens.

use super::{UNION_TOP, Views, dense, spectral};
use crate::spec::{Center, ConsensusSpec, Elect, Tie, Trim};
use crate::topk::top_k;

/// Trim, elect, merge with options. A vote counts by its expert's weight, scaled to a mean of 1.
///
/// Outside the union, where no expert has one of its [`UNION_TOP`] most probable tokens, the result is
/// the weighted mean under the same centre.
pub(super) fn ties(spec: &ConsensusSpec, weights: &[f64], views: &Views<'_>, out: &mut [f32]) {
    let experts = views.centred.len();
    let ids = union(views);
    let offsets = dense::offsets(views);
    // Log-probabilities of the shared base, where there is one.
    let base = (spec.center == Center::Reference).then_some(spec.reference as usize);
    let log_p =
        |e: usize, j: usize| f64::from(views.centred[e][j]) + offsets[e] - views.stats[e].log_z;
    let centres: Vec<f64> = match spec.center {
        Center::Mean | Center::Reference => vec![0.0; experts],
        Center::TopkUnion => views
            .centred
            .iter()
            .map(|row| {
                let sum: f64 = ids.iter().map(|&id| f64::from(row[id as usize])).sum();
                sum / ids.len() as f64
            })
            .collect(),
    };
    let preference = |e: usize, j: usize| match base {
        Some(base) => log_p(e, j) - log_p(base, j),
        None => f64::from(views.centred[e][j]) - centres[e],
    };
    let voters: Vec<usize> = (0..experts).filter(|&e| Some(e) != base).collect();
    let mut votes: Vec<Vec<f64>> = voters
        .iter()
        .map(|&e| ids.iter().map(|&id| preference(e, id as usize)).collect())
        .collect();
    let strength: Vec<f64> = {
        let sum: f64 = voters.iter().map(|&e| weights[e]).sum();
        voters
            .iter()
            .map(|&e| {
                if sum > 0.0 {
                    weights[e] / sum * voters.len() as f64
                } else {
                    1.0
                }
            })
            .collect()
    };
    if let Some(rank) = spec.spectral {
        spectral::project(&mut votes, rank as usize);
    }
    for row in &mut votes {
        trim(spec, row);
    }
    let from_base = |j: usize| base.map_or(0.0, |base| log_p(base, j));
    for (j, merged) in out.iter_mut().enumerate() {
        let mean: f64 = voters
            .iter()
            .zip(&strength)
            .map(|(&e, s)| s * preference(e, j))
            .sum::<f64>()
            / voters.len() as f64;
        *merged = (mean + from_base(j)) as f32;
    }
    let mut column = vec![0.0; votes.len()];
    for (at, &id) in ids.iter().enumerate() {
        for (vote, row) in column.iter_mut().zip(&votes) {
            *vote = row[at];
        }
        let value = elect_and_merge(spec, &strength, &column);
        out[id as usize] = (value + from_base(id as usize)) as f32;
    }
}

/// Ids in ascending order that are among some expert's most probable.
fn union(views: &Views<'_>) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut top = Vec::new();
    for row in views.centred {
        top_k(row, UNION_TOP, &mut top);
        ids.extend(top.iter().map(|&(id, _)| id));
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Sets votes that are too weak to 0.
fn trim(spec: &ConsensusSpec, votes: &mut [f64]) {
    let theta = f64::from(spec.theta);
    let bar = match spec.trim {
        Trim::Abs => theta,
        Trim::Std => {
            let n = votes.len() as f64;
            let mean = votes.iter().sum::<f64>() / n;
            let square = votes.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
            theta * libm::sqrt(square)
        }
        Trim::Density => {
            // In float32 a share of 0.2 is a little more than a fifth; it must not round up to one more.
            let share = theta * (1.0 - f64::from(f32::EPSILON));
            let keep = ((share * votes.len() as f64).ceil() as usize).clamp(1, votes.len());
            let mut sizes: Vec<f64> = votes.iter().map(|v| v.abs()).collect();
            sizes.sort_by(|a, b| b.total_cmp(a));
            sizes[keep - 1]
        }
    };
    for vote in votes {
        if vote.abs() < bar {
            *vote = 0.0;
        }
    }
}

/// A poll within this share of its ballots is even: weights such as 0.1, 0.2 and 0.3 are sums of one
/// another but for rounding, and no order of the experts may decide between them.
const EVEN: f64 = 1e-12;

fn elect_and_merge(spec: &ConsensusSpec, strength: &[f64], votes: &[f64]) -> f64 {
    let counted = || strength.iter().zip(votes).map(|(&s, &v)| (s, v));
    let (mut poll, mut turnout) = (0.0, 0.0);
    for (s, v) in counted().filter(|&(_, v)| v != 0.0) {
        let ballot = match spec.elect {
            Elect::Mass => s * v,
            Elect::Count => s * v.signum(),
        };
        poll += ballot;
        turnout += ballot.abs();
    }
    let even = poll.abs() <= EVEN * turnout;
    let agrees = |v: f64| {
        if even {
            spec.tie == Tie::Mean && v != 0.0
        } else {
            v * poll > 0.0
        }
    };
    let (mut sum, mut count) = (0.0, 0.0);
    for (s, v) in counted().filter(|&(_, v)| agrees(v)) {
        sum += s * v;
        count += s;
    }
    // As in the sketch the count is at least 1; weights below 1 are counts of their own.
    let least = if spec.weights == crate::Weights::default() {
        1.0
    } else {
        f64::MIN_POSITIVE
    };
    sum / (count.max(least) + f64::from(spec.eps))
}
