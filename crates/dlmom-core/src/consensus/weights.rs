//! How much each expert counts.

use super::Views;
use crate::exp::exp_nonpositive;
use crate::spec::{ConsensusSpec, WeightRule, Weights};

/// Keeps rules finite where an entropy or a margin is 0.
const FLOOR: f64 = 0.01;

/// Weights in proportion, all 1 where experts count the same. A rule that needs a pilot, or a list of
/// another length than there are experts, weighs all the same: both are refused before a run starts.
pub(super) fn of(spec: &ConsensusSpec, views: &Views<'_>) -> Vec<f64> {
    let experts = views.centred.len();
    match &spec.weights {
        Weights::Fixed(given) if given.len() == experts => given.clone(),
        Weights::Rule(WeightRule::Entropy) => views
            .stats
            .iter()
            .map(|s| 1.0 / (s.entropy + FLOOR))
            .collect(),
        Weights::Rule(WeightRule::Margin) => (0..experts)
            .map(|e| margin(views.centred[e], views.stats[e].best) + FLOOR)
            .collect(),
        _ => vec![1.0; experts],
    }
}

/// The difference of the two largest probabilities of a row whose largest value is at `best`.
fn margin(row: &[f32], best: u32) -> f64 {
    let max = f64::from(row[best as usize]);
    let (mut second, mut sum) = (f32::NEG_INFINITY, 0.0);
    for (id, &v) in row.iter().enumerate() {
        sum += exp_nonpositive(f64::from(v) - max);
        if id != best as usize && v > second {
            second = v;
        }
    }
    (1.0 - exp_nonpositive(f64::from(second) - max)) / sum
}

/// The expert of the largest weight, among equal ones that of the lowest entropy, then the first.
pub(super) fn best(spec: &ConsensusSpec, views: &Views<'_>) -> usize {
    let weights = of(spec, views);
    (1..weights.len()).fold(0, |best, e| {
        let better = weights[e] > weights[best]
            || (weights[e] == weights[best] && views.stats[e].entropy < views.stats[best].entropy);
        if better { e } else { best }
    })
}

/// The expert that a uniform draw picks by its weight.
pub(super) fn drawn(weights: &[f64], draw: f64) -> usize {
    let target = draw * weights.iter().sum::<f64>();
    let mut cumulative = 0.0;
    weights
        .iter()
        .position(|&w| {
            cumulative += w;
            w > 0.0 && target < cumulative
        })
        // Rounding left the draw at the very end.
        .unwrap_or_else(|| weights.iter().rposition(|&w| w > 0.0).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_at_either_end_picks_an_expert_of_weight() {
        let weights = [0.0, 0.1, 0.2, 0.0];
        assert_eq!(drawn(&weights, 1e-300), 1);
        // The boundary belongs to the next, and the very end to the last of any weight.
        assert_eq!(drawn(&[1.0, 1.0], 0.5), 1);
        assert_eq!(drawn(&weights, 1.0 - 2.0_f64.powi(-53)), 2);
        assert_eq!(drawn(&weights, 1.0), 2);
    }

    #[test]
    fn a_margin_is_between_the_two_largest_probabilities() {
        let ln = |p: f64| p.ln() as f32;
        let row = [ln(0.1), ln(0.6), ln(0.3)];
        assert!((margin(&row, 1) - 0.3).abs() < 1e-7);
        // Two largest have none, and of one token the second has no probability.
        assert_eq!(margin(&[2.0, 0.0, 2.0], 0), 0.0);
        assert_eq!(margin(&[5.0], 0), 1.0);
    }
}
