//! Consensus operators over the experts' centred logits.
//!
//! `ties` as the paper states it, `mean`, `arith`, `poe`, `best` and `mixture` work on whole rows. Every
//! option of `ties` works on the union of the experts' [`UNION_TOP`] most probable tokens.

mod dense;
mod spectral;
mod union;
mod weights;

pub use dense::log_shares;

use crate::entropy::Stats;
use crate::exp::exp_nonpositive;
use crate::spec::{
    Calibrate, Center, ConsensusSpec, Elect, MergeGate, Method, Tie, Trim, WeightRule, Weights,
};
use crate::stream::{Purpose, Stream};

/// Most probable tokens of every expert on whose union the options of `ties` work.
pub const UNION_TOP: usize = 256;

/// What consensus meets in one row.
#[derive(Clone, Copy, Debug)]
pub struct Views<'a> {
    /// K centred rows, `v_e = z_e - mean(z_e)`, all of length V, in logits. Every value is finite.
    pub centred: &'a [&'a [f32]],
    /// Statistics of the experts' logits before centring, in the same order.
    pub stats: &'a [Stats],
    /// Randomness of this sample at this step, for operators that draw.
    pub stream: Option<Stream>,
}

/// Merges the experts' preferences into one row.
///
/// Implementations are pure: the same rows give the same result, whatever was merged before.
pub trait Consensus: Send + Sync {
    /// Stable name of the operator, as recorded with a run.
    fn name(&self) -> &str;

    /// Merges K centred rows into `out`, of length V, in logits. Returns whether the experts were
    /// merged; false where a gate let one of them decide alone.
    ///
    /// With one expert the result must be that expert's row.
    fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool;

    /// The failure of an earlier [`Consensus::merge`], handed over once. Callers ask after every
    /// call and drop the results of a call that failed; the built-in operators never fail.
    fn take_failure(&self) -> Option<Box<dyn std::error::Error + Send + Sync>> {
        None
    }

    /// The specification that [`Consensus::merge`] follows to the letter, if there is one, so that a
    /// fused kernel may take its place.
    fn spec(&self) -> Option<&ConsensusSpec> {
        None
    }
}

impl ConsensusSpec {
    /// Whether `ties` is the paper's, up to `theta` and `eps`, so that whole rows can be merged at once.
    #[must_use]
    pub fn is_plain_ties(&self) -> bool {
        self.center == Center::Mean
            && self.trim == Trim::Abs
            && self.elect == Elect::Count
            && self.tie == Tie::Zero
            && self.spectral.is_none()
            && self.weights == Weights::Rule(WeightRule::Uniform)
    }

    /// What the experts' centred rows are multiplied by, where `calibrate` asks for it.
    fn scales(&self, views: &Views<'_>) -> Option<Vec<f64>> {
        match self.calibrate {
            Calibrate::None => None,
            Calibrate::Temperature => Some(
                (0..views.centred.len())
                    .map(|e| 1.0 / self.temperatures.get(e).copied().unwrap_or(1.0))
                    .collect(),
            ),
            Calibrate::Zscore => {
                let deviations: Vec<f64> = views
                    .centred
                    .iter()
                    .map(|row| {
                        let square: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum();
                        libm::sqrt(square / row.len().max(1) as f64)
                    })
                    .collect();
                // A constant row has no scale; it is left as it is.
                let logs: Vec<f64> = deviations
                    .iter()
                    .filter(|&&d| d > 0.0)
                    .map(|&d| libm::log(d))
                    .collect();
                let common = libm::exp(logs.iter().sum::<f64>() / logs.len().max(1) as f64);
                Some(
                    deviations
                        .iter()
                        .map(|&d| if d > 0.0 { common / d } else { 1.0 })
                        .collect(),
                )
            }
        }
    }

    fn merge_calibrated(&self, views: &Views<'_>, out: &mut [f32]) {
        let weights = weights::of(self, views);
        let total: f64 = weights.iter().sum();
        match self.method {
            Method::Ties if self.is_plain_ties() => {
                dense::ties(views.centred, self.theta, f64::from(self.eps), out);
            }
            Method::Ties => union::ties(self, &weights, views, out),
            Method::Mean => dense::weighted_sum(views.centred, &weights, total, out),
            Method::Poe => {
                let divisor = total / weights.len() as f64;
                dense::weighted_sum(views.centred, &weights, divisor, out);
            }
            Method::Arith => dense::arith(views, &weights, out),
            Method::Best => out.copy_from_slice(views.centred[weights::best(self, views)]),
            Method::Mixture => {
                let draw = views
                    .stream
                    .map_or(0.5, |stream| stream.uniform(0, Purpose::Expert, 0));
                out.copy_from_slice(views.centred[weights::drawn(&weights, draw)]);
            }
        }
    }
}

/// Whether a gate lets the experts be merged here.
fn open(gate: &MergeGate, views: &Views<'_>) -> bool {
    // The largest probability is exp(max - ln Z).
    let unsure = gate.max_p.is_some_and(|bar| {
        views
            .stats
            .iter()
            .any(|s| exp_nonpositive(f64::from(s.max) - s.log_z) < bar)
    });
    unsure
        || gate
            .js
            .is_some_and(|bar| dense::jensen_shannon(views) > bar)
}

/// `ties` follows the sketch in the DL-MoM paper's Appendix C, where it differs from the printed
/// equations. Sums over experts are f64, so the order of experts matters at most in the last bit of
/// the f32 result. Rows of unequal length are a programming error (checked in debug builds);
/// otherwise the shortest length is merged and the rest of `out` is 0, as is all of it without
/// experts. Statistics are needed by `arith`, `best`, gates, weights by rule and the options of `ties`;
/// where they are not one for every row, or rows were scaled or cut, they are computed from the rows.
impl Consensus for ConsensusSpec {
    fn name(&self) -> &str {
        match self.method {
            Method::Ties => "ties",
            Method::Mean => "mean",
            Method::Arith => "arith",
            Method::Poe => "poe",
            Method::Best => "best",
            Method::Mixture => "mixture",
        }
    }

    fn spec(&self) -> Option<&ConsensusSpec> {
        Some(self)
    }

    fn merge(&self, views: &Views<'_>, out: &mut [f32]) -> bool {
        debug_assert!(views.centred.iter().all(|row| row.len() == out.len()));
        let len = views
            .centred
            .iter()
            .map(|row| row.len())
            .min()
            .unwrap_or(0)
            .min(out.len());
        let (out, rest) = out.split_at_mut(len);
        rest.fill(0.0);
        if views.centred.is_empty() || len == 0 {
            out.fill(0.0);
            return false;
        }
        if let [only] = views.centred {
            out.copy_from_slice(&only[..len]);
            return false;
        }
        let rows: Vec<&[f32]> = views.centred.iter().map(|row| &row[..len]).collect();
        let scaled: Vec<Vec<f32>> = match self.scales(views) {
            None => Vec::new(),
            Some(scales) => rows
                .iter()
                .zip(scales)
                .map(|(row, scale)| row.iter().map(|&v| (f64::from(v) * scale) as f32).collect())
                .collect(),
        };
        let rows: Vec<&[f32]> = if scaled.is_empty() {
            rows
        } else {
            scaled.iter().map(Vec::as_slice).collect()
        };
        // Scaled logits have other statistics, and so has a part of a row.
        let whole = views.centred.iter().all(|row| row.len() == len);
        let own: Vec<Stats>;
        let stats = if whole && scaled.is_empty() && views.stats.len() == rows.len() {
            views.stats
        } else {
            own = rows.iter().map(|row| crate::entropy::stats(row)).collect();
            &own
        };
        let views = Views {
            centred: &rows,
            stats,
            stream: views.stream,
        };
        if let Some(gate) = &self.gate
            && !open(gate, &views)
        {
            let pivot = (gate.pivot as usize).min(rows.len() - 1);
            out.copy_from_slice(rows[pivot]);
            return false;
        }
        self.merge_calibrated(&views, out);
        true
    }
}
