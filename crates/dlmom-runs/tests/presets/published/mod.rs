//! Published rules in float64, written from the papers' codes. Nothing of the product decides anything here; its mode
//! names are the vocabulary.

use std::collections::VecDeque;

use dlmom_core::Mode;

pub(crate) type Logits = Vec<f32>;

/// `softmax(l / T)`.
pub(crate) fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut p: Vec<f64> = logits
        .iter()
        .map(|&l| ((f64::from(l) - f64::from(largest)) / temperature).exp())
        .collect();
    renormalise(&mut p);
    p
}

/// `-sum p ln p`, the logarithm clamped as SwiReasoning's.
pub(crate) fn nats(p: &[f64]) -> f64 {
    -p.iter().map(|p| p * p.max(1e-12).ln()).sum::<f64>()
}

/// The most probable id, the first of equal ones.
pub(crate) fn heaviest(p: &[f64]) -> usize {
    ranking(p)[0]
}

/// Ids by probability descending, then id ascending.
fn ranking(p: &[f64]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..p.len()).collect();
    ids.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    ids
}

fn renormalise(p: &mut [f64]) {
    let sum: f64 = p.iter().sum();
    for p in p {
        *p /= sum;
    }
}

/// Everything less probable than the k-th goes; ids that tie with it stay, as in SwiReasoning and Soft Thinking.
pub(crate) fn top_k(mut p: Vec<f64>, k: usize) -> Vec<f64> {
    let ids = ranking(&p);
    if let Some(&last) = ids.get(k.wrapping_sub(1)) {
        let threshold = p[last];
        p.iter_mut()
            .filter(|p| **p < threshold)
            .for_each(|p| *p = 0.0);
        renormalise(&mut p);
    }
    p
}

/// An id stays where the mass strictly before it is at most `limit`.
pub(crate) fn top_p(mut p: Vec<f64>, limit: f64) -> Vec<f64> {
    let mut before = 0.0;
    for id in ranking(&p) {
        let own = p[id];
        if before > limit {
            p[id] = 0.0;
        }
        before += own;
    }
    renormalise(&mut p);
    p
}

/// Soft Thinking's: relative to the most probable id.
pub(crate) fn min_p(mut p: Vec<f64>, share: f64) -> Vec<f64> {
    let threshold = share * p[heaviest(&p)];
    p.iter_mut()
        .filter(|p| **p < threshold)
        .for_each(|p| *p = 0.0);
    renormalise(&mut p);
    p
}

/// The `n` most probable, exactly as many.
pub(crate) fn keep(mut p: Vec<f64>, n: usize) -> Vec<f64> {
    for id in ranking(&p).into_iter().skip(n) {
        p[id] = 0.0;
    }
    renormalise(&mut p);
    p
}

/// `softmax((ln p + g) / tau)`; what has no mass gets none.
pub(crate) fn gumbel(p: &[f64], tau: f64, g: impl Fn(usize) -> f64) -> Vec<f64> {
    let scores: Vec<f64> = (0..p.len()).map(|id| (p[id].ln() + g(id)) / tau).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut q: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
    renormalise(&mut q);
    q
}

/// Appendix C of the DL-MoM paper: centre, trim, elect, merge.
pub(crate) fn ties(experts: &[Logits], theta: f64, eps: f64) -> Vec<f64> {
    let trimmed: Vec<Vec<f64>> = experts
        .iter()
        .map(|z| {
            let mean = z.iter().map(|&z| f64::from(z)).sum::<f64>() / z.len() as f64;
            let centred = z.iter().map(|&z| f64::from(z) - mean);
            centred
                .map(|v| if v.abs() < theta { 0.0 } else { v })
                .collect()
        })
        .collect();
    let sign = |x: f64| if x == 0.0 { 0.0 } else { x.signum() };
    (0..experts[0].len())
        .map(|id| {
            let votes: Vec<f64> = trimmed.iter().map(|v| v[id]).collect();
            let elected = sign(votes.iter().map(|&v| sign(v)).sum());
            let agreeing: Vec<f64> = votes.into_iter().filter(|&v| sign(v) == elected).collect();
            agreeing.iter().sum::<f64>() / (agreeing.len().max(1) as f64 + eps)
        })
        .collect()
}

/// Special ids of the vocabulary of 12 on which SwiReasoning was traced.
pub(crate) const BREAK: usize = 7;
pub(crate) const THINK: usize = 8;
pub(crate) const THINK_END: usize = 9;
pub(crate) const EOS: usize = 11;

/// `x@id` of those traces: x at one id, 0 elsewhere.
pub(crate) fn at(x: f32, id: usize) -> Logits {
    let mut logits = vec![0.0; 12];
    logits[id] = x;
    logits
}

/// Knobs of `generate_swir`.
#[derive(Clone, Copy)]
pub(crate) struct Swir<'a> {
    pub(crate) window: usize,
    pub(crate) alpha_0: f64,
    pub(crate) beta_0: f64,
    pub(crate) count: Option<SwitchCount<'a>>,
}

/// Its switch-count control: C, the two texts as ids, and the budget behind the second.
#[derive(Clone, Copy)]
pub(crate) struct SwitchCount<'a> {
    pub(crate) c: usize,
    pub(crate) converge: &'a [usize],
    pub(crate) terminate: &'a [usize],
    pub(crate) budget: i64,
}

/// One of its steps: the mode after it, the id printed, and the weights of what is fed.
pub(crate) struct SwirStep {
    pub(crate) mode: Mode,
    pub(crate) printed: usize,
    pub(crate) fed: Vec<f64>,
}

/// SwiReasoning's loop with greedy draws over scripted logits, whose number is the token budget; no mathematical symbols.
pub(crate) fn swir(knobs: &Swir<'_>, script: &[Logits]) -> Vec<SwirStep> {
    let budget = script.len() as f64;
    let (mut mode, mut stay, mut locked, mut reference) = (Mode::Latent, 0, false, f64::NAN);
    let (mut count, mut left) = (0, -1_i64);
    let mut queue: VecDeque<usize> = VecDeque::new();
    let mut steps = Vec::new();
    for (t, logits) in script.iter().enumerate() {
        let p = softmax(logits, 1.0);
        let drawn = heaviest(&p);
        locked |= drawn == THINK_END;
        let printed = queue.pop_front().unwrap_or(drawn);
        let h = nats(&p);
        let (mut exits, mut enters) = (false, false);
        if t == 0 {
            reference = h;
        } else {
            stay += 1;
            exits = mode == Mode::Latent && h < reference;
            enters = mode == Mode::Explicit && h > reference && stay >= knobs.window && !locked;
        }
        if exits || enters {
            mode = if exits { Mode::Explicit } else { Mode::Latent };
            stay = 0;
            reference = h;
        }
        count += usize::from(exits);
        let used = t as f64 / budget;
        let alpha = knobs.alpha_0 + (1.0 - knobs.alpha_0) * used;
        let beta = knobs.beta_0 + (1.0 - knobs.beta_0) * used;
        let fed = if exits {
            blend(&p, beta, THINK_END)
        } else if mode == Mode::Explicit || locked {
            blend(&p, 0.0, printed)
        } else if t == 0 {
            blend(&p, 0.9, BREAK)
        } else if enters {
            blend(&p, alpha, THINK)
        } else {
            p
        };
        if let Some(rule) = knobs.count
            && exits
            && count >= rule.c
        {
            let terminates = count > 2 * rule.c;
            queue = if terminates {
                rule.terminate
            } else {
                rule.converge
            }
            .iter()
            .copied()
            .collect();
            if terminates {
                left = rule.budget;
            }
        }
        if left >= 0 {
            left -= 1;
        }
        steps.push(SwirStep { mode, printed, fed });
        if printed == EOS || left == 0 {
            break;
        }
    }
    steps
}

/// `share` of a distribution, and the rest on one id.
pub(crate) fn blend(p: &[f64], share: f64, id: usize) -> Vec<f64> {
    let mut blended: Vec<f64> = p.iter().map(|p| share * p).collect();
    blended[id] += 1.0 - share;
    blended
}
