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
                for (j, merged) in out.iter_mut().enumerate() {
                    *merged = ties(centred.iter().map(|row| row[j]), theta, eps);
                }
            }
        }
    }
}

/// Trim, elect, merge on one coordinate.
///
/// The count of agreeing experts is at least 1 wherever a sign is elected, and without an elected
/// sign only zeros agree, so the sketch's clamp needs no branch of its own.
fn ties(values: impl Iterator<Item = f32>, theta: f32, eps: f32) -> f32 {
    let (mut above, mut below) = (0_u32, 0_u32);
    let (mut sum_above, mut sum_below) = (0.0_f64, 0.0_f64);
    for v in values {
        if v.abs() < theta {
            continue;
        }
        if v > 0.0 {
            above += 1;
            sum_above += f64::from(v);
        } else if v < 0.0 {
            below += 1;
            sum_below += f64::from(v);
        }
    }
    let eps = f64::from(eps);
    match above.cmp(&below) {
        std::cmp::Ordering::Greater => (sum_above / (f64::from(above) + eps)) as f32,
        std::cmp::Ordering::Less => (sum_below / (f64::from(below) + eps)) as f32,
        std::cmp::Ordering::Equal => 0.0,
    }
}
