//! Consensus operators over the experts' centred logits.

use crate::spec::ConsensusSpec;

/// Merges the experts' preferences into one row.
///
/// Implementations are pure: the same rows give the same result, whatever was merged before.
pub trait Consensus: Send + Sync {
    /// Stable name of the operator, as recorded with a run.
    fn name(&self) -> &str;

    /// Merges K centred rows, `v_e = z_e - mean(z_e)`, into `out`, all of length V, in logits.
    ///
    /// Every row is finite. With one expert the result must be that expert's row.
    fn merge(&self, centred: &[&[f32]], out: &mut [f32]);

    /// The failure of an earlier [`Consensus::merge`], handed over once. Callers ask after every
    /// call and drop the results of a call that failed; the built-in operators never fail.
    fn take_failure(&self) -> Option<Box<dyn std::error::Error + Send + Sync>> {
        None
    }
}

/// `ties` follows the sketch in the DL-MoM paper's Appendix C, where it differs from the printed
/// equations; `mean` is the logarithmic opinion pool. Sums over experts are f64, so the order of
/// experts matters at most in the last bit of the f32 result. Rows of unequal length are a
/// programming error (checked in debug builds); otherwise the shortest length is merged and the
/// rest of `out` is 0, as is all of it without experts.
impl Consensus for ConsensusSpec {
    fn name(&self) -> &str {
        match self {
            Self::Ties { .. } => "ties",
            Self::Mean => "mean",
        }
    }

    fn merge(&self, centred: &[&[f32]], out: &mut [f32]) {
        debug_assert!(centred.iter().all(|row| row.len() == out.len()));
        let len = centred
            .iter()
            .map(|row| row.len())
            .min()
            .unwrap_or(0)
            .min(out.len());
        let (out, rest) = out.split_at_mut(len);
        rest.fill(0.0);
        if let [only] = centred {
            out.copy_from_slice(&only[..len]);
            return;
        }
        match *self {
            Self::Mean => {
                let count = centred.len() as f64;
                for (j, merged) in out.iter_mut().enumerate() {
                    let sum: f64 = centred.iter().map(|row| f64::from(row[j])).sum();
                    *merged = (sum / count) as f32;
                }
            }
            Self::Ties { theta, eps } => {
                for (index, block) in out.chunks_mut(BLOCK).enumerate() {
                    let (start, len) = (index * BLOCK, block.len());
                    let rows = centred.iter().map(|row| &row[start..start + len]);
                    ties(rows, theta, f64::from(eps), block);
                }
            }
        }
    }
}

/// Coordinates merged at a time, so that the votes stay in registers and the nearest cache.
const BLOCK: usize = 256;

/// Trim, elect, merge on at most [`BLOCK`] coordinates.
///
/// Free of branches on the values, since signs are hard to predict. Without an elected sign only
/// zeros agree, so the sketch's sum is 0 there.
fn ties<'a>(rows: impl Iterator<Item = &'a [f32]>, theta: f32, eps: f64, out: &mut [f32]) {
    /// Counts and sums of the entries above and below 0.
    #[derive(Clone, Copy, Default)]
    struct Votes {
        above: f64,
        below: f64,
        sum_above: f64,
        sum_below: f64,
    }
    let mut votes = [Votes::default(); BLOCK];
    for row in rows {
        for (votes, &v) in votes.iter_mut().zip(row) {
            let kept = if v.abs() < theta { 0.0 } else { f64::from(v) };
            votes.above += f64::from(u8::from(kept > 0.0));
            votes.below += f64::from(u8::from(kept < 0.0));
            votes.sum_above += if kept > 0.0 { kept } else { 0.0 };
            votes.sum_below += if kept < 0.0 { kept } else { 0.0 };
        }
    }
    for (merged, votes) in out.iter_mut().zip(&votes) {
        let Votes {
            above,
            below,
            sum_above,
            sum_below,
        } = *votes;
        let (sum, count) = if above > below {
            (sum_above, above)
        } else {
            (sum_below, below)
        };
        let agreed = sum / (count.max(1.0) + eps);
        *merged = if above == below { 0.0 } else { agreed as f32 };
    }
}
