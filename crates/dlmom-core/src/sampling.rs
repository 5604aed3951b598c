//! Drawing an explicit token from the full merged distribution.

use crate::entropy::{partition, stats};
use crate::exp::exp_nonpositive;
use crate::spec::SamplingSpec;
use crate::stream::{Purpose, Stream};
use crate::topk::top_k;

/// How to draw and with which randomness.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Validated sampling knobs.
    pub sampling: SamplingSpec,
    /// Stream of this sample at this step.
    pub stream: Stream,
}

/// Draws one token id from a row of finite logits.
///
/// Greedy takes the largest logit, the smallest id among equals. Otherwise, in this order:
/// logits are divided by the temperature; the `top_k` most probable survive; of these, the
/// shortest prefix whose share of their mass reaches `top_p`; of these, the ones with at least
/// `min_p` times the largest probability. One uniform draw is then looked up in the cumulative
/// distribution of the survivors, ordered by probability descending and id ascending. All f64.
/// An empty row gives 0; a row with infinities is drawn greedily.
///
/// With a repetition penalty r, the log-probabilities of the tokens in `seen` are first multiplied by
/// r: `p` becomes `p^r`, before renormalising. As logits they are `ln Z + r (z - ln Z)`, so that every
/// other token keeps its logit to the bit. Ids beyond the row are ignored, and an id named twice counts
/// once.
#[must_use]
pub fn draw(logits: &[f32], draw: &Draw, seen: &[u32]) -> u32 {
    draw_with(logits, draw, seen, &mut Vec::new(), &mut Vec::new())
}

/// [`draw`] with its buffers: a row and a list of the most probable tokens.
pub(crate) fn draw_with(
    logits: &[f32],
    draw: &Draw,
    seen: &[u32],
    row: &mut Vec<f32>,
    top: &mut Vec<(u32, f32)>,
) -> u32 {
    let penalty = draw.sampling.repetition_penalty;
    if penalty == 1.0 || seen.is_empty() {
        return draw_from(logits, draw, top);
    }
    let found = stats(logits);
    if !found.finite {
        return draw_from(logits, draw, top);
    }
    row.clear();
    row.extend_from_slice(logits);
    for &id in seen {
        if let (Some(slot), Some(&z)) = (row.get_mut(id as usize), logits.get(id as usize)) {
            *slot = (found.log_z + penalty * (f64::from(z) - found.log_z)) as f32;
        }
    }
    draw_from(row, draw, top)
}

/// Ordered tokens looked at first when no `top_k` bounds them; the prefix then grows by [`GROWTH`].
const PREFIX: usize = 256;
const GROWTH: usize = 8;

fn draw_from(logits: &[f32], draw: &Draw, top: &mut Vec<(u32, f32)>) -> u32 {
    top_k(logits, 1, top);
    let Some(&(best, max)) = top.first() else {
        return 0;
    };
    let SamplingSpec {
        temperature,
        top_k: keep,
        top_p,
        min_p,
        ..
    } = draw.sampling;
    if draw.sampling.is_greedy() || !max.is_finite() {
        return best;
    }
    let max = f64::from(max);
    // Dividing after the shift keeps the best token at weight 1 for any temperature.
    let weight = |z: f32| exp_nonpositive((f64::from(z) - max) / temperature);
    let vocab = logits.len();
    let limit = if keep == 0 {
        vocab
    } else {
        vocab.min(keep as usize)
    };
    let unfiltered = limit == vocab && top_p >= 1.0 && min_p <= 0.0;
    let whole = (limit == vocab && (unfiltered || top_p < 1.0))
        .then(|| partition(logits, max, temperature).0);
    let uniform = draw.stream.uniform(0, Purpose::Token, 0);

    let mut length = if limit < vocab {
        limit
    } else {
        limit.min(PREFIX)
    };
    loop {
        top_k(logits, length, top);
        let complete = length == limit;
        let kept = if unfiltered {
            Some((length, whole.unwrap_or(1.0)))
        } else {
            let total = match whole {
                Some(total) => total,
                None if limit < vocab => top.iter().map(|&(_, z)| weight(z)).sum(),
                None => 1.0,
            };
            filtered(
                top,
                weight,
                (top_p < 1.0).then_some(top_p * total),
                min_p,
                complete,
            )
        };
        if let Some((count, mass)) = kept {
            let target = uniform * mass;
            let mut cumulative = 0.0_f64;
            let mut last = best;
            for &(id, z) in &top[..count] {
                let w = weight(z);
                cumulative += w;
                if w > 0.0 {
                    last = id;
                }
                if cumulative > target {
                    return id;
                }
            }
            if complete || !unfiltered {
                // Rounding left the target at the very end of the survivors.
                return last;
            }
        }
        length = length.saturating_mul(GROWTH).min(limit);
    }
}

/// Number and mass of the survivors of nucleus and min-p among the ordered `top`, or `None` when
/// the end of the survivors is not in it yet.
fn filtered(
    top: &[(u32, f32)],
    weight: impl Fn(f32) -> f64,
    nucleus: Option<f64>,
    min_p: f64,
    complete: bool,
) -> Option<(usize, f64)> {
    let mut mass = 0.0_f64;
    for (index, &(_, z)) in top.iter().enumerate() {
        let w = weight(z);
        if w < min_p {
            return Some((index, mass));
        }
        mass += w;
        if nucleus.is_some_and(|nucleus| mass >= nucleus) {
            return Some((index + 1, mass));
        }
    }
    complete.then_some((top.len(), mass))
}
