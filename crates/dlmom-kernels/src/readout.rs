//! The readout from what the passes leave.

use dlmom_core::{Request, RowReadout, Stats, exp::exp_nonpositive};

use crate::best::{Best, by_value_then_id};
use crate::merge::{Formula, MAX_EXPERTS, Only, Operator};
use crate::scan::Merging;

/// An expert after the first pass.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Own {
    pub(crate) stats: Stats,
    /// Smallest logit.
    pub(crate) min: f32,
}

fn probability(z: f32, stats: &Stats) -> f64 {
    exp_nonpositive(f64::from(z) - stats.log_z)
}

/// The largest entries of a row from those of its chunks, of which there is one at least.
pub(crate) fn collect(bests: &mut [Best]) -> &mut Vec<(u32, f32)> {
    let (first, others) = bests.split_at_mut(1);
    for other in others {
        first[0].absorb(other);
    }
    first[0].finish()
}

/// The packet from the largest merged preferences.
pub(crate) fn read_top(top: &mut [(u32, f32)], merged: &Stats, out: &mut RowReadout) {
    let mass: f64 = top.iter().map(|&(_, v)| probability(v, merged)).sum();
    for entry in top.iter_mut() {
        entry.1 = (probability(entry.1, merged) / mass) as f32;
    }
    // Distinct logits may round to one probability; the order is that of the probabilities.
    top.sort_unstable_by(by_value_then_id);
    out.ids.extend(top.iter().map(|&(id, _)| id));
    out.probs.extend(top.iter().map(|&(_, p)| p));
    out.mass = mass.min(1.0) as f32;
}

/// What every expert has to say for itself.
pub(crate) fn read_own<'a>(
    owns: &[Own],
    bests: impl Iterator<Item = &'a mut [Best]>,
    out: &mut RowReadout,
) {
    out.entropies
        .extend(owns.iter().map(|own| own.stats.entropy));
    let first = owns.first().map(|own| own.stats.best);
    out.agreed = owns.iter().all(|own| Some(own.stats.best) == first);
    out.per_agent.resize_with(owns.len(), Vec::new);
    for ((list, own), bests) in out.per_agent.iter_mut().zip(owns).zip(bests) {
        list.clear();
        let top = collect(bests);
        list.extend(
            top.iter()
                .map(|&(id, z)| (id, probability(z, &own.stats) as f32)),
        );
        list.sort_unstable_by(by_value_then_id);
    }
}

/// What is asked of single ids: their merged values are made again.
pub(crate) fn read_ids(
    merging: &Merging<'_>,
    merged: &Stats,
    owns: &[Own],
    request: &Request<'_>,
    out: &mut RowReadout,
) {
    let role_mass: f64 = request
        .role
        .iter()
        .enumerate()
        .filter(|&(at, id)| !request.role[..at].contains(id))
        .filter_map(|(_, &id)| merged_at(merging, id))
        .map(|v| probability(v, merged))
        .sum();
    out.role_mass = role_mass.min(1.0) as f32;

    let targets = request.targets.unwrap_or(&[]);
    let log_p = |value: Option<f32>, stats: &Stats| {
        value.map_or(f64::NEG_INFINITY, |z| f64::from(z) - stats.log_z)
    };
    out.target_logprobs.extend(
        targets
            .iter()
            .map(|&id| log_p(merged_at(merging, id), merged)),
    );
    out.per_agent_target_logprobs
        .resize_with(owns.len(), Vec::new);
    let lists = out.per_agent_target_logprobs.iter_mut();
    for ((list, own), logits) in lists.zip(owns).zip(merging.experts) {
        list.clear();
        list.extend(targets.iter().map(|&id| {
            let id = id as usize;
            let inside = id < merging.vocab;
            log_p(logits.get(id).filter(|_| inside), &own.stats)
        }));
    }
}

/// The merged preference of one id, if there is such a token.
fn merged_at(merging: &Merging<'_>, id: u32) -> Option<f32> {
    let id = id as usize;
    if id >= merging.vocab {
        return None;
    }
    // Experts that are not there vote 0 with no weight.
    let mut votes = [0.0_f32; MAX_EXPERTS];
    let experts = merging.experts.iter().zip(merging.centres);
    for (vote, (logits, centre)) in votes.iter_mut().zip(experts) {
        let z = logits.get(id)?;
        *vote = if merging.scaled {
            centre.apply::<true>(z)
        } else {
            centre.apply::<false>(z)
        };
    }
    Some(match merging.operator {
        Operator::Only => Only.merge(votes),
        Operator::Ties(ties) => ties.merge(votes),
        Operator::Sum(sum) => sum.merge(votes),
        Operator::Arith(arith) => arith.merge(votes),
    })
}
