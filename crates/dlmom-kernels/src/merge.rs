//! Consensus of centred logits, element by element.

use dlmom_core::consensus::log_shares as log_shares_of;
use dlmom_core::exp::log_sum_exp;
use dlmom_core::{Calibrate, Consensus, ConsensusSpec, Method, Stats, WeightRule, Weights};

/// Most experts that are merged in registers; more go to the reference.
pub(crate) const MAX_EXPERTS: usize = 8;

/// One expert's way from logits to preferences.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Centre {
    pub(crate) mean: f64,
    /// What centred logits are multiplied by, as `calibrate: temperature` asks for.
    pub(crate) scale: f64,
}

impl Centre {
    /// Rounded where the reference rounds: once centred, and once scaled.
    #[inline(always)]
    pub(crate) fn apply<const SCALED: bool>(self, z: f32) -> f32 {
        let centred = (f64::from(z) - self.mean) as f32;
        if SCALED {
            (f64::from(centred) * self.scale) as f32
        } else {
            centred
        }
    }
}

/// How K preferences become one.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operator {
    /// The only expert's.
    Only,
    /// The paper's TIES.
    Ties(Ties),
    /// `mean` and `poe`.
    Sum(Sum),
    /// `arith`, once [`Arith::learn`] knows the experts.
    Arith(Arith),
}

/// An operator that keeps to one formula.
pub(crate) trait Formula: Copy {
    fn merge<const K: usize>(self, votes: [f32; K]) -> f32;
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Only;

impl Formula for Only {
    #[inline(always)]
    fn merge<const K: usize>(self, votes: [f32; K]) -> f32 {
        votes[0]
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Ties {
    /// Smallest magnitude that counts, above 0.
    least: f32,
    eps: f64,
}

impl Formula for Ties {
    /// Without a branch, as in the reference; only the elected side is summed.
    #[inline(always)]
    fn merge<const K: usize>(self, votes: [f32; K]) -> f32 {
        let (mut above, mut below) = (0.0_f32, 0.0_f32);
        for v in votes {
            above = if v >= self.least { above + 1.0 } else { above };
            below = if -v >= self.least { below + 1.0 } else { below };
        }
        let up = above > below;
        let mut sum = 0.0_f64;
        for v in votes {
            let towards = if up { v } else { -v };
            sum += f64::from(if towards >= self.least { v } else { 0.0 });
        }
        // Where nobody voted the divisor may be 0, and the sides are equal.
        let count = if up { above } else { below };
        let agreed = (sum / (f64::from(count) + self.eps)) as f32;
        if above == below { 0.0 } else { agreed }
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Sum {
    weights: [f64; MAX_EXPERTS],
    divisor: f64,
}

impl Formula for Sum {
    #[inline(always)]
    fn merge<const K: usize>(self, votes: [f32; K]) -> f32 {
        // An empty sum is -0 in the reference, which a sum of -0 keeps.
        let mut sum = -0.0_f64;
        for (v, w) in votes.into_iter().zip(self.weights) {
            sum += w * f64::from(v);
        }
        (sum / self.divisor) as f32
    }
}

/// The logarithm of the mean of the probabilities, in f64 as the reference has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arith {
    log_shares: [f64; MAX_EXPERTS],
    offsets: [f64; MAX_EXPERTS],
    log_z: [f64; MAX_EXPERTS],
}

impl Arith {
    fn new(weights: &[f64]) -> Self {
        let mut log_shares = [f64::NEG_INFINITY; MAX_EXPERTS];
        for (to, from) in log_shares.iter_mut().zip(log_shares_of(weights)) {
            *to = from;
        }
        Self {
            log_shares,
            offsets: [0.0; MAX_EXPERTS],
            log_z: [0.0; MAX_EXPERTS],
        }
    }

    /// Takes in what one expert's logits amount to.
    pub(crate) fn learn(&mut self, expert: usize, stats: &Stats, centre: Centre) {
        let best = centre.apply::<false>(stats.max);
        self.offsets[expert] = f64::from(stats.max) - f64::from(best);
        self.log_z[expert] = stats.log_z;
    }

    #[inline(always)]
    fn term(&self, expert: usize, v: f32) -> f64 {
        self.log_shares[expert] + (f64::from(v) + self.offsets[expert] - self.log_z[expert])
    }
}

impl Formula for Arith {
    #[inline(always)]
    fn merge<const K: usize>(self, votes: [f32; K]) -> f32 {
        let mut terms = [0.0_f64; K];
        for (e, term) in terms.iter_mut().enumerate() {
            *term = self.term(e, votes[e]);
        }
        log_sum_exp(&terms) as f32
    }
}

/// How a row is merged by whole blocks.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) operator: Operator,
    /// Per expert; all 1 unless `scaled`.
    pub(crate) scales: [f64; MAX_EXPERTS],
    pub(crate) scaled: bool,
}

impl Plan {
    /// The plan of an operator, if there is one.
    pub(crate) fn new(consensus: &dyn Consensus, experts: usize) -> Option<Self> {
        let mut plan = Self {
            operator: Operator::Only,
            scales: [1.0; MAX_EXPERTS],
            scaled: false,
        };
        if experts == 1 {
            return Some(plan);
        }
        let spec = consensus.spec()?;
        if !(2..=MAX_EXPERTS).contains(&experts) || spec.gate.is_some() {
            return None;
        }
        match spec.calibrate {
            Calibrate::None => {}
            Calibrate::Temperature => {
                plan.scaled = true;
                for (scale, t) in plan.scales.iter_mut().zip(&spec.temperatures) {
                    *scale = 1.0 / t;
                }
            }
            Calibrate::Zscore => return None,
        }
        plan.operator = operator(spec, experts)?;
        Some(plan)
    }

    /// Whether no merged value can be beyond float32, given every expert's largest magnitude.
    pub(crate) fn is_bounded(&self, magnitudes: &[f32]) -> bool {
        match self.operator {
            // A merged value is not below all of its terms.
            Operator::Arith(arith) => magnitudes.iter().enumerate().any(|(e, &m)| {
                let least = arith.term(e, -m);
                least >= f64::from(f32::MIN)
            }),
            // The mean of some of the votes, and a divisor that only makes it smaller.
            Operator::Only | Operator::Ties(_) => magnitudes.iter().all(|m| m.is_finite()),
            Operator::Sum(Sum { weights, divisor }) => {
                let sum: f64 = magnitudes
                    .iter()
                    .zip(weights)
                    .map(|(&m, w)| f64::from(m) * w.abs())
                    .sum();
                sum / divisor.abs() <= f64::from(f32::MAX)
            }
        }
    }
}

fn operator(spec: &ConsensusSpec, experts: usize) -> Option<Operator> {
    if spec.method == Method::Ties {
        let plain = spec.is_plain_ties() && spec.theta >= 0.0 && spec.eps >= 0.0;
        return plain.then_some(Operator::Ties(Ties {
            least: spec.theta.max(f32::from_bits(1)),
            eps: f64::from(spec.eps),
        }));
    }
    let mut weights = [0.0; MAX_EXPERTS];
    let weights_of = &mut weights[..experts];
    match &spec.weights {
        // A list of another length weighs all the same, as in the reference.
        Weights::Fixed(given) if given.len() == experts => weights_of.copy_from_slice(given),
        Weights::Fixed(_) | Weights::Rule(WeightRule::Uniform) => weights_of.fill(1.0),
        Weights::Rule(_) => return None,
    }
    let total: f64 = weights_of.iter().sum();
    let divisor = match spec.method {
        Method::Arith if spec.calibrate == Calibrate::None => {
            return Some(Operator::Arith(Arith::new(&weights[..experts])));
        }
        Method::Mean => total,
        Method::Poe => total / experts as f64,
        _ => return None,
    };
    Some(Operator::Sum(Sum { weights, divisor }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dlmom_core::{Elect, MergeGate};

    fn is_fused(spec: &ConsensusSpec, experts: usize) -> bool {
        Plan::new(spec, experts).is_some()
    }

    /// The readouts are the reference's either way; only their time is not.
    #[test]
    fn the_fast_operators_are_fused() {
        for method in [Method::Ties, Method::Mean, Method::Poe, Method::Arith] {
            let spec = ConsensusSpec::of(method);
            for experts in 1..=MAX_EXPERTS {
                assert!(is_fused(&spec, experts), "{method:?} {experts}");
            }
            assert!(!is_fused(&spec, MAX_EXPERTS + 1));
        }
        let weighed = ConsensusSpec {
            weights: Weights::Fixed(vec![1.0, 2.0]),
            calibrate: Calibrate::Temperature,
            temperatures: vec![0.9, 1.1],
            ..ConsensusSpec::of(Method::Mean)
        };
        assert!(is_fused(&weighed, 2));
    }

    #[test]
    fn everything_else_is_not() {
        let paper = ConsensusSpec::paper();
        let gate = Some(MergeGate {
            max_p: Some(0.5),
            js: None,
            pivot: 0,
        });
        let others = [
            ConsensusSpec::of(Method::Best),
            ConsensusSpec::of(Method::Mixture),
            ConsensusSpec {
                elect: Elect::Mass,
                ..paper.clone()
            },
            ConsensusSpec {
                calibrate: Calibrate::Zscore,
                ..paper.clone()
            },
            ConsensusSpec {
                weights: Weights::Rule(WeightRule::Entropy),
                ..ConsensusSpec::of(Method::Mean)
            },
            ConsensusSpec { gate, ..paper },
        ];
        for spec in others {
            assert!(!is_fused(&spec, 3), "{spec:?}");
            assert!(is_fused(&spec, 1), "{spec:?}");
        }
    }
}
