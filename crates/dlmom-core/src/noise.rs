//! Noise on a packet in latent mode (suite A1 of the DL-MoM paper).

use thiserror::Error;

use crate::entropy::at_least_zero;
use crate::spec::NoiseSpec;
use crate::stream::{Purpose, Stream, box_muller, unit};
use crate::validate::SpecError;

/// A packet's probabilities after noise.
#[derive(Clone, Debug, PartialEq)]
pub struct Noised {
    /// Probabilities in the order of the input ids; they sum to 1 unless the noise is `none`.
    pub probs: Vec<f32>,
    /// `KL(p' || p)` in nats, `p` being the input renormalised.
    pub kl: f64,
}

/// Why noise cannot be applied.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum NoiseError {
    /// The noise's own parameter is out of range.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Ids and probabilities do not pair up.
    #[error("{ids} ids with {probs} probabilities")]
    LengthMismatch {
        /// Number of ids.
        ids: usize,
        /// Number of probabilities.
        probs: usize,
    },
    /// A probability is negative, infinite or NaN.
    #[error("the probability of id {id} is {value}")]
    BadProbability {
        /// Token id of the offending entry.
        id: u32,
        /// The rejected value.
        value: f32,
    },
    /// The list is empty or holds zeros only.
    #[error("no entry has a positive probability")]
    NoMass,
}

/// Perturbs the probabilities `probs` of the distinct tokens `ids`.
///
/// - `none`: unchanged, divergence 0.
/// - `gumbel`: `p' = softmax((ln p + g) / tau)` with `g = -ln(-ln u)`, one `u` per token
///   (Gumbel-Softmax; Jang et al., 2017).
/// - `dirichlet`: `p' ~ Dirichlet(lambda p)` as normalised Gamma draws in log space (Marsaglia and
///   Tsang, 2000; shapes below 1 by `G(a) = G(a + 1) u^(1/a)`), so `E p' = p` and
///   `Var p'_i = p_i (1 - p_i) / (lambda + 1)`.
///
/// The input need not sum to 1; it is renormalised first. An entry of probability 0 stays 0. The
/// draw of a token depends on its id and the stream, never on its place in the list. The result is
/// not re-sorted.
pub fn apply(
    spec: &NoiseSpec,
    ids: &[u32],
    probs: &[f32],
    stream: &Stream,
) -> Result<Noised, NoiseError> {
    spec.validate()?;
    if ids.len() != probs.len() {
        return Err(NoiseError::LengthMismatch {
            ids: ids.len(),
            probs: probs.len(),
        });
    }
    if matches!(spec, NoiseSpec::None) {
        return Ok(Noised {
            probs: probs.to_vec(),
            kl: 0.0,
        });
    }
    if let Some((&id, &value)) = ids
        .iter()
        .zip(probs)
        .find(|&(_, &p)| !(p.is_finite() && p >= 0.0))
    {
        return Err(NoiseError::BadProbability { id, value });
    }
    let sum: f64 = probs.iter().map(|&p| f64::from(p)).sum();
    if sum <= 0.0 {
        return Err(NoiseError::NoMass);
    }
    let p: Vec<f64> = probs.iter().map(|&p| f64::from(p) / sum).collect();
    let entries = || ids.iter().map(|&id| u64::from(id)).zip(p.iter().copied());

    let noised = match *spec {
        NoiseSpec::None => p.clone(),
        NoiseSpec::Gumbel { tau } => {
            let scores = entries()
                .map(|(id, p)| {
                    if p > 0.0 {
                        libm::log(p) + gumbel(stream, id)
                    } else {
                        f64::NEG_INFINITY
                    }
                })
                .collect();
            softmax(scores, tau)
        }
        NoiseSpec::Dirichlet { lambda } => {
            let scores: Vec<f64> = entries()
                .map(|(id, p)| {
                    if p > 0.0 {
                        log_gamma_draw(stream, id, lambda * p)
                    } else {
                        f64::NEG_INFINITY
                    }
                })
                .collect();
            if scores.iter().any(|score| score.is_finite()) {
                softmax(scores, 1.0)
            } else {
                race(entries(), stream)
            }
        }
    };
    let kl = noised
        .iter()
        .zip(&p)
        .filter(|&(&q, _)| q > 0.0)
        .map(|(&q, &p)| q * (libm::log(q) - libm::log(p)))
        .sum();
    Ok(Noised {
        probs: noised.iter().map(|&q| q as f32).collect(),
        kl: at_least_zero(kl),
    })
}

fn gumbel(stream: &Stream, id: u64) -> f64 {
    -libm::log(-libm::log(stream.uniform(id, Purpose::Gumbel, 0)))
}

/// `softmax(scores / temperature)`; at least one score is finite, the others may be `-inf`.
fn softmax(mut scores: Vec<f64>, temperature: f64) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    for score in &mut scores {
        *score = libm::exp((*score - max) / temperature);
        sum += *score;
    }
    for score in &mut scores {
        *score /= sum;
    }
    scores
}

/// Rejections in a row before the mode is taken instead; each has a probability below 0.05.
const MAX_ATTEMPTS: u32 = 64;

/// Logarithm of a Gamma(shape, 1) draw.
///
/// Attempt n uses one block of the stream: two words for the normal, one for the acceptance test,
/// one for the boost of shapes below 1, which is independent of acceptance.
fn log_gamma_draw(stream: &Stream, id: u64, shape: f64) -> f64 {
    let boosted = shape < 1.0;
    let d = if boosted { shape + 1.0 } else { shape } - 1.0 / 3.0;
    let c = 1.0 / libm::sqrt(9.0 * d);
    let boost = |word: u64| {
        if boosted {
            libm::log(unit(word)) / shape
        } else {
            0.0
        }
    };
    for attempt in 0..MAX_ATTEMPTS {
        let [radius, angle, accept, extra] = stream.bits(id, Purpose::Dirichlet, attempt);
        let n = box_muller(radius, angle);
        let x = c * n;
        if x <= -1.0 {
            continue;
        }
        // With v = (1 + x)^3 the test is ln u < n^2 / 2 + d (1 - v + ln v); written in x, the
        // cancellation at large d costs nothing.
        let log_v = 3.0 * libm::log1p(x);
        let gain = log_v - x * (3.0 + x * (3.0 + x));
        if libm::log(unit(accept)) < 0.5 * n * n + d * gain {
            return libm::log(d) + log_v + boost(extra);
        }
    }
    libm::log(d) + boost(stream.bits(id, Purpose::Dirichlet, MAX_ATTEMPTS)[3])
}

/// The limit of a Dirichlet whose shapes all underflow: one token takes everything.
///
/// `ln u / p` is an exponential race, won by token i with probability `p_i`.
fn race(entries: impl Iterator<Item = (u64, f64)> + Clone, stream: &Stream) -> Vec<f64> {
    let score = |(id, p): (u64, f64)| {
        if p > 0.0 {
            libm::log(unit(stream.bits(id, Purpose::Dirichlet, 0)[3])) / p
        } else {
            f64::NEG_INFINITY
        }
    };
    let winner = entries
        .clone()
        .enumerate()
        .map(|(at, entry)| (at, score(entry)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(0, |(at, _)| at);
    entries
        .enumerate()
        .map(|(at, _)| f64::from(u8::from(at == winner)))
        .collect()
}
