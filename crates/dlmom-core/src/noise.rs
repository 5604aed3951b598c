//! Noise on a packet in latent mode (suite A1 of the DL-MoM paper).

use thiserror::Error;

use crate::entropy::at_least_zero;
use crate::spec::{FilterSpec, NoiseSpec};
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

/// What is mixed in a latent step: a packet after its filter and its noise.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixed {
    /// The tokens kept, in the order of the input unless a filter sorted them.
    pub ids: Vec<u32>,
    /// Their probabilities; they sum to 1 unless nothing was done.
    pub probs: Vec<f32>,
    /// `KL(p' || p)` in nats, `p` being the input renormalised: filter and noise together.
    pub kl: f64,
    /// Jensen-Shannon divergence of `p'` and `p` in nats, at most `ln 2`.
    pub js: f64,
}

/// Filters and perturbs the probabilities `probs` of the distinct tokens `ids`, in the order of Soft
/// Thinking (arXiv 2505.15778) and its stochastic variant (arXiv 2508.03440): temperature, nucleus
/// and min-p; Dirichlet noise; the `keep` most probable, renormalised; Gumbel noise.
///
/// The input need not sum to 1; it is renormalised first. An entry of probability 0 stays 0. With
/// neither filter nor noise the input comes back as it is. See [`apply`] for the noises.
///
/// # Errors
/// [`NoiseError`].
pub fn mix(
    filter: &FilterSpec,
    noise: &NoiseSpec,
    ids: &[u32],
    probs: &[f32],
    stream: &Stream,
) -> Result<Mixed, NoiseError> {
    filter.validate()?;
    noise.validate()?;
    if *filter == FilterSpec::NONE && matches!(noise, NoiseSpec::None) {
        check_lengths(ids, probs)?;
        return Ok(Mixed {
            ids: ids.to_vec(),
            probs: probs.to_vec(),
            kl: 0.0,
            js: 0.0,
        });
    }
    let p = normalised(ids, probs)?;
    let mut kept: Vec<(u32, f64, f64)> = ids.iter().zip(&p).map(|(&id, &p)| (id, p, p)).collect();
    if *filter != FilterSpec::NONE {
        kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        narrow(filter, &mut kept);
    }
    if let NoiseSpec::Dirichlet { lambda } = *noise {
        perturb(&mut kept, |entries| dirichlet(entries, lambda, stream));
    }
    if filter.keep > 0 && kept.len() > filter.keep as usize {
        kept.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
        kept.truncate(filter.keep as usize);
        renormalise(&mut kept);
    }
    if let NoiseSpec::Gumbel { tau } = *noise {
        perturb(&mut kept, |entries| gumbel_softmax(entries, tau, stream));
    }
    let (kl, js) = divergences(&kept, &p);
    Ok(Mixed {
        ids: kept.iter().map(|&(id, ..)| id).collect(),
        probs: kept.iter().map(|&(.., q)| q as f32).collect(),
        kl,
        js,
    })
}

/// Temperature, nucleus and min-p on entries in order; the last field of each is what changes.
fn narrow(filter: &FilterSpec, entries: &mut Vec<(u32, f64, f64)>) {
    if filter.temperature != 1.0 {
        let largest = entries.first().map_or(1.0, |e| e.2);
        for entry in entries.iter_mut() {
            // Relative to the largest, so that no power underflows for all of them.
            entry.2 = if entry.2 > 0.0 {
                libm::exp(libm::log(entry.2 / largest) / filter.temperature)
            } else {
                0.0
            };
        }
        renormalise(entries);
    }
    if filter.top_p < 1.0 {
        let mut mass = 0.0;
        let reached = entries.iter().position(|entry| {
            mass += entry.2;
            mass >= filter.top_p
        });
        if let Some(last) = reached {
            entries.truncate(last + 1);
            renormalise(entries);
        }
    }
    if filter.min_p > 0.0 {
        let bar = filter.min_p * entries.first().map_or(0.0, |e| e.2);
        entries.retain(|entry| entry.2 >= bar);
        renormalise(entries);
    }
}

fn renormalise(entries: &mut [(u32, f64, f64)]) {
    let sum: f64 = entries.iter().map(|e| e.2).sum();
    for entry in entries {
        entry.2 /= sum;
    }
}

fn perturb(entries: &mut [(u32, f64, f64)], draw: impl FnOnce(&[(u64, f64)]) -> Vec<f64>) {
    let pairs: Vec<(u64, f64)> = entries
        .iter()
        .map(|&(id, _, q)| (u64::from(id), q))
        .collect();
    for (entry, q) in entries.iter_mut().zip(draw(&pairs)) {
        entry.2 = q;
    }
}

/// KL and JS of the last fields against the whole of `p`, which holds the middle fields.
fn divergences(kept: &[(u32, f64, f64)], p: &[f64]) -> (f64, f64) {
    let term = |a: f64, b: f64| {
        if a > 0.0 {
            a * (libm::log(a) - libm::log(b))
        } else {
            0.0
        }
    };
    let (mut kl, mut half_q, mut half_p, mut named) = (0.0, 0.0, 0.0, 0.0);
    for &(_, p, q) in kept {
        let m = 0.5 * (p + q);
        kl += term(q, p);
        half_q += term(q, m);
        half_p += term(p, m);
        named += p;
    }
    // What was left out meets half of itself in the mean.
    let rest = (p.iter().sum::<f64>() - named).max(0.0);
    half_p += rest * std::f64::consts::LN_2;
    (at_least_zero(kl), at_least_zero(0.5 * (half_q + half_p)))
}

fn check_lengths(ids: &[u32], probs: &[f32]) -> Result<(), NoiseError> {
    if ids.len() != probs.len() {
        return Err(NoiseError::LengthMismatch {
            ids: ids.len(),
            probs: probs.len(),
        });
    }
    Ok(())
}

/// The probabilities in f64, summing to 1.
fn normalised(ids: &[u32], probs: &[f32]) -> Result<Vec<f64>, NoiseError> {
    check_lengths(ids, probs)?;
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
    Ok(probs.iter().map(|&p| f64::from(p) / sum).collect())
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
///
/// # Errors
/// [`NoiseError`].
pub fn apply(
    spec: &NoiseSpec,
    ids: &[u32],
    probs: &[f32],
    stream: &Stream,
) -> Result<Noised, NoiseError> {
    let Mixed { probs, kl, .. } = mix(&FilterSpec::NONE, spec, ids, probs, stream)?;
    Ok(Noised { probs, kl })
}

fn gumbel_softmax(entries: &[(u64, f64)], tau: f64, stream: &Stream) -> Vec<f64> {
    let scores = entries
        .iter()
        .map(|&(id, p)| {
            if p > 0.0 {
                libm::log(p) + gumbel(stream, id)
            } else {
                f64::NEG_INFINITY
            }
        })
        .collect();
    softmax(scores, tau)
}

fn dirichlet(entries: &[(u64, f64)], lambda: f64, stream: &Stream) -> Vec<f64> {
    let scores: Vec<f64> = entries
        .iter()
        .map(|&(id, p)| {
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
        race(entries.iter().copied(), stream)
    }
}

/// Moves the probabilities in a random direction until `KL(p' || p)` is what the packet's own most
/// probable token alone would have, `-ln p_1`: a control that is as far from the packet as its top
/// token, without its content.
///
/// `p'_i` is proportional to `p_i exp(s g_i)`, `g_i` standard normal by token id; the divergence rises
/// with s, and s is found by bisection to a relative error of 1e-9 in the divergence, as far as f64 has
/// it. Where the draw picks the top token itself the limit is that token alone.
///
/// # Errors
/// [`NoiseError`].
pub fn tilt(ids: &[u32], probs: &[f32], stream: &Stream) -> Result<Mixed, NoiseError> {
    let p = normalised(ids, probs)?;
    let directions: Vec<f64> = ids
        .iter()
        .map(|&id| stream.normal(u64::from(id), Purpose::Tilt, 0))
        .collect();
    let largest = p.iter().copied().fold(0.0, f64::max);
    let target = -libm::log(largest);
    let moved = |s: f64| -> Vec<(u32, f64, f64)> {
        let scores = p
            .iter()
            .zip(&directions)
            .map(|(&p, &g)| libm::log(p) + s * g)
            .collect();
        let q = softmax(scores, 1.0);
        ids.iter()
            .zip(p.iter().zip(q))
            .map(|(&id, (&p, q))| (id, p, q))
            .collect()
    };
    let divergence = |s: f64| divergences(&moved(s), &p).0;
    // A certain packet has nowhere to go, and bisection towards 0 would take a thousand rounds.
    let mut high = if target > 0.0 { 1.0 } else { 0.0 };
    while divergence(high) < target && high < 1e9 {
        high *= 2.0;
    }
    let mut low = 0.0;
    while high - low > 1e-12 * high {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if divergence(middle) < target {
            low = middle;
        } else {
            high = middle;
        }
    }
    let found = moved(high);
    let (kl, js) = divergences(&found, &p);
    Ok(Mixed {
        ids: ids.to_vec(),
        probs: found.iter().map(|&(.., q)| q as f32).collect(),
        kl,
        js,
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
