//! Consensus in float64, one coordinate at a time, written from the documentation: the oracle of the
//! operators and of every option of `ties`.

use std::collections::BTreeSet;

use dlmom_core::{
    Calibrate, Center, ConsensusSpec, Elect, Method, Stats, Tie, Trim, Views, WeightRule, Weights,
    stats,
};

use crate::common::{entropy, jensen_shannon, slices, softmax, wide};

/// What float32 rows and statistics of float32 logits may move a choice by.
const NEAR: f64 = 1e-5;

/// Experts as a run has them and as consensus meets them.
#[derive(Clone, Debug)]
pub(crate) struct Experts {
    pub(crate) centred: Vec<Vec<f32>>,
    pub(crate) stats: Vec<Stats>,
}

impl Experts {
    /// Centres logits; the statistics are those of the logits before.
    pub(crate) fn of(logits: &[Vec<f32>]) -> Self {
        let centre = |row: &Vec<f32>| {
            let mean = wide(row).iter().sum::<f64>() / row.len() as f64;
            row.iter().map(|&z| (f64::from(z) - mean) as f32).collect()
        };
        Self {
            centred: logits.iter().map(centre).collect(),
            stats: logits.iter().map(|row| stats(row)).collect(),
        }
    }

    /// Rows as they are, whatever their mean, without statistics.
    pub(crate) fn bare(rows: &[Vec<f32>]) -> Self {
        Self {
            centred: rows.to_vec(),
            stats: Vec::new(),
        }
    }

    pub(crate) fn with_views<T>(&self, act: impl FnOnce(&Views<'_>) -> T) -> T {
        act(&Views {
            centred: &slices(&self.centred),
            stats: &self.stats,
            stream: None,
        })
    }
}

/// A merged value, and whether every choice behind it stands whatever is rounded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told {
    pub(crate) value: f64,
    pub(crate) clear: bool,
}

/// What consensus must say about some rows.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// One value for every token.
    Values(Vec<Told>),
    /// Whole rows, any of which will do: where several experts are equally good, rounding decides.
    Row(Vec<usize>),
    /// The gate is closed: the row of an expert.
    Closed(usize),
    /// Rounding decides everything: a gate at its bar, or no definite leading directions.
    Unclear,
}

/// The rows after calibration, float32 again.
pub(crate) fn calibrated(spec: &ConsensusSpec, rows: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let deviation = |row: &[f64]| {
        let mean = row.iter().sum::<f64>() / row.len() as f64;
        (row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / row.len() as f64).sqrt()
    };
    let rows: Vec<Vec<f64>> = rows.iter().map(|row| wide(row)).collect();
    let constant = |row: &[f64]| row.iter().all(|&v| v == row[0]);
    let varied: Vec<&Vec<f64>> = rows.iter().filter(|row| !constant(row)).collect();
    let common: f64 = varied
        .iter()
        .map(|row| deviation(row).powf(1.0 / varied.len() as f64))
        .product();
    let single = |v: f64| f64::from(v as f32);
    rows.iter()
        .enumerate()
        .map(|(e, row)| match spec.calibrate {
            Calibrate::None => row.clone(),
            Calibrate::Temperature => row
                .iter()
                .map(|v| single(v / spec.temperatures[e]))
                .collect(),
            Calibrate::Zscore if constant(row) => row.clone(),
            Calibrate::Zscore => {
                let own = deviation(row);
                row.iter().map(|v| single(v / own * common)).collect()
            }
        })
        .collect()
}

/// Weights in proportion.
pub(crate) fn weigh(spec: &ConsensusSpec, p: &[Vec<f64>]) -> Vec<f64> {
    p.iter()
        .enumerate()
        .map(|(e, p)| match &spec.weights {
            Weights::Fixed(given) => given[e],
            Weights::Rule(WeightRule::Entropy) => 1.0 / (entropy(p) + 0.01),
            Weights::Rule(WeightRule::Margin) => {
                let mut sorted = p.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                sorted[0] - sorted.get(1).unwrap_or(&0.0) + 0.01
            }
            Weights::Rule(_) => 1.0,
        })
        .collect()
}

/// Runs a specification; `uniform` is the draw of the mixture.
pub(crate) fn transcribe(spec: &ConsensusSpec, rows: &[Vec<f32>], uniform: f64) -> Verdict {
    let rows = calibrated(spec, rows);
    let p: Vec<Vec<f64>> = rows.iter().map(|row| softmax(row)).collect();
    if let Some(gate) = spec.gate {
        let mut open = false;
        let mut close_call = false;
        if let Some(bar) = gate.max_p {
            for p in &p {
                let most = p.iter().copied().fold(0.0, f64::max);
                open |= most < bar;
                close_call |= (most - bar).abs() < NEAR;
            }
        }
        if let Some(bar) = gate.js {
            let divergence = jensen_shannon(&p);
            open |= divergence > bar;
            close_call |= (divergence - bar).abs() < NEAR;
        }
        if close_call {
            return Verdict::Unclear;
        }
        if !open {
            return Verdict::Closed(gate.pivot as usize);
        }
    }
    let weights = weigh(spec, &p);
    let sum: f64 = weights.iter().sum();
    let experts = rows.len();
    let each = |value: &dyn Fn(usize) -> f64| {
        let told = |j| Told {
            value: value(j),
            clear: true,
        };
        Verdict::Values((0..rows[0].len()).map(told).collect())
    };
    match spec.method {
        Method::Mean => each(&|j| (0..experts).map(|e| weights[e] / sum * rows[e][j]).sum()),
        Method::Poe => each(&|j| {
            let mean_weight = sum / experts as f64;
            (0..experts)
                .map(|e| weights[e] / mean_weight * rows[e][j])
                .sum()
        }),
        Method::Arith => each(&|j| {
            let pooled: f64 = (0..experts).map(|e| weights[e] * p[e][j]).sum();
            (pooled / sum).ln()
        }),
        Method::Best => {
            let close = |a: f64, b: f64| (a - b).abs() <= NEAR * a.abs().max(b.abs());
            let heaviest = weights.iter().copied().fold(0.0, f64::max);
            let front: Vec<usize> = (0..experts)
                .filter(|&e| close(weights[e], heaviest))
                .collect();
            let least = front
                .iter()
                .map(|&e| entropy(&p[e]))
                .fold(f64::INFINITY, f64::min);
            let exact = front.iter().all(|&e| weights[e] == heaviest);
            Verdict::Row(
                front
                    .into_iter()
                    .filter(|&e| !exact || entropy(&p[e]) <= least + NEAR)
                    .collect(),
            )
        }
        Method::Mixture => {
            let mut before = 0.0;
            let mut fits = Vec::new();
            for (e, weight) in weights.iter().enumerate() {
                let after = before + weight / sum;
                if *weight > 0.0 && before - NEAR <= uniform && uniform < after + NEAR {
                    fits.push(e);
                }
                before = after;
            }
            Verdict::Row(fits)
        }
        Method::Ties => ties(spec, &rows, &weights),
    }
}

/// Ids among the 256 most probable of some expert.
pub(crate) fn union(rows: &[Vec<f64>]) -> BTreeSet<usize> {
    let mut ids = BTreeSet::new();
    for row in rows {
        let mut order: Vec<usize> = (0..row.len()).collect();
        // Stable, so that equal values stay in the order of their ids.
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        ids.extend(order.into_iter().take(256));
    }
    ids
}

/// Whether `ties` is the paper's, which knows no union.
pub(crate) fn is_the_papers(spec: &ConsensusSpec) -> bool {
    let ConsensusSpec {
        theta, eps, gate, ..
    } = *spec;
    let mut paper = ConsensusSpec {
        theta,
        eps,
        gate,
        ..ConsensusSpec::paper()
    };
    paper.calibrate = spec.calibrate;
    paper.temperatures.clone_from(&spec.temperatures);
    paper == *spec
}

/// The preferences that `ties` meets, token by token.
pub(crate) struct Votes {
    /// Experts that vote.
    pub(crate) voters: Vec<usize>,
    /// Their weights, of mean 1.
    pub(crate) share: Vec<f64>,
    /// Their preferences for every token, as centred.
    pub(crate) preferences: Vec<Vec<f64>>,
    /// Their votes on the tokens of the union, after projection.
    pub(crate) polled: Vec<Vec<f64>>,
    /// For each of them what [`bar`] says.
    bars: Vec<(f64, Vec<f64>)>,
    /// The union, in order.
    pub(crate) ids: Vec<usize>,
    /// What is added to every merged value.
    pub(crate) base: Vec<f64>,
}

impl Votes {
    /// None where the leading directions are not definite.
    pub(crate) fn of(spec: &ConsensusSpec, rows: &[Vec<f64>], weights: &[f64]) -> Option<Self> {
        let vocab = rows[0].len();
        let ids: Vec<usize> = if is_the_papers(spec) {
            (0..vocab).collect()
        } else {
            union(rows).into_iter().collect()
        };
        let log_p = |e: usize, j: usize| softmax_log(&rows[e], j);
        let shared = spec.reference as usize;
        let voters: Vec<usize> = (0..rows.len())
            .filter(|&e| spec.center != Center::Reference || e != shared)
            .collect();
        let mean_weight = voters.iter().map(|&e| weights[e]).sum::<f64>() / voters.len() as f64;
        let share = voters
            .iter()
            .map(|&e| {
                if mean_weight > 0.0 {
                    weights[e] / mean_weight
                } else {
                    1.0
                }
            })
            .collect();
        let preferences: Vec<Vec<f64>> = voters
            .iter()
            .map(|&e| {
                let centre = match spec.center {
                    Center::TopkUnion => {
                        ids.iter().map(|&id| rows[e][id]).sum::<f64>() / ids.len() as f64
                    }
                    Center::Mean | Center::Reference => 0.0,
                };
                (0..vocab)
                    .map(|j| match spec.center {
                        Center::Reference => log_p(e, j) - log_p(shared, j),
                        Center::Mean | Center::TopkUnion => rows[e][j] - centre,
                    })
                    .collect()
            })
            .collect();
        let mut votes: Vec<Vec<f64>> = preferences
            .iter()
            .map(|row| ids.iter().map(|&id| row[id]).collect())
            .collect();
        if let Some(rank) = spec.spectral {
            votes = projected(&votes, rank as usize)?;
        }
        let base = (0..vocab)
            .map(|j| {
                if spec.center == Center::Reference {
                    log_p(shared, j)
                } else {
                    0.0
                }
            })
            .collect();
        Some(Self {
            bars: votes.iter().map(|row| bar(spec, row)).collect(),
            voters,
            share,
            preferences,
            polled: votes,
            ids,
            base,
        })
    }

    /// The weighted mean of some rows' entries.
    pub(crate) fn mean(&self, entries: impl Iterator<Item = f64>) -> f64 {
        let sum: f64 = entries.zip(&self.share).map(|(v, s)| s * v).sum();
        sum / self.voters.len() as f64
    }
}

fn softmax_log(row: &[f64], j: usize) -> f64 {
    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row[j] - most - row.iter().map(|v| (v - most).exp()).sum::<f64>().ln()
}

/// The size below which an expert's votes are trimmed, and the votes so near it that rounding may
/// decide.
fn bar(spec: &ConsensusSpec, votes: &[f64]) -> (f64, Vec<f64>) {
    let theta = f64::from(spec.theta);
    let n = votes.len();
    let bar = match spec.trim {
        Trim::Abs => theta,
        Trim::Std => {
            let mean = votes.iter().sum::<f64>() / n as f64;
            theta * (votes.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64).sqrt()
        }
        Trim::Density => {
            let mut sizes: Vec<f64> = votes.iter().map(|v| v.abs()).collect();
            sizes.sort_by(f64::total_cmp);
            // Multiplied in float32, where 0.2 of 5 is 1.
            let room = (spec.theta * n as f32).ceil().max(1.0);
            sizes[n - room as usize]
        }
    };
    let near = |v: &&f64| (v.abs() - bar).abs() <= NEAR;
    (bar, votes.iter().filter(near).copied().collect())
}

/// Untrimmed votes for one token on either side of 0.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Side {
    /// What elects.
    pub(crate) ballots: f64,
    /// Weighted sum of the votes.
    pub(crate) sum: f64,
    /// Their weight.
    pub(crate) count: f64,
}

/// A poll on one token.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Poll {
    pub(crate) above: Side,
    pub(crate) below: Side,
    /// Whether no vote of weight was trimmed or is 0.
    pub(crate) complete: bool,
    /// Whether rounding decides nothing.
    pub(crate) clear: bool,
}

impl Poll {
    pub(crate) fn of(spec: &ConsensusSpec, told: &Votes, at: usize) -> Self {
        let exact = spec.center == Center::Mean && spec.spectral.is_none();
        let mut poll = Self {
            complete: true,
            clear: true,
            ..Self::default()
        };
        for ((votes, (bar, rivals)), &share) in told.polled.iter().zip(&told.bars).zip(&told.share)
        {
            let vote = votes[at];
            let stays = vote.abs() >= *bar;
            // Equal logits of one expert are equal votes, unless others' logits are part of them.
            let alike = spec.center == Center::TopkUnion
                && spec.spectral.is_none()
                && rivals.iter().all(|&v| v == vote);
            let sure = match spec.trim {
                Trim::Abs => exact || *bar == 0.0,
                Trim::Std => *bar == 0.0,
                Trim::Density => exact || rivals.len() == 1 || alike,
            };
            poll.clear &= sure || (vote.abs() - bar).abs() > NEAR;
            poll.clear &= vote.abs() > NEAR || !stays || (vote == 0.0 && exact);
            if !stays || vote == 0.0 {
                poll.complete &= share == 0.0;
                continue;
            }
            let side = if vote > 0.0 {
                &mut poll.above
            } else {
                &mut poll.below
            };
            side.ballots += match spec.elect {
                Elect::Count => share,
                Elect::Mass => share * vote.abs(),
            };
            side.sum += share * vote;
            side.count += share;
        }
        let exact_ballots = matches!(
            spec.weights,
            Weights::Fixed(_) | Weights::Rule(WeightRule::Uniform | WeightRule::Pilot)
        ) && (exact || spec.elect == Elect::Count);
        let lead = poll.lead();
        poll.clear &= lead > NEAR || poll.turnout() == 0.0 || (poll.even() && exact_ballots);
        poll
    }

    fn turnout(&self) -> f64 {
        self.above.ballots + self.below.ballots
    }

    fn lead(&self) -> f64 {
        (self.above.ballots - self.below.ballots).abs() / self.turnout().max(f64::MIN_POSITIVE)
    }

    pub(crate) fn even(&self) -> bool {
        self.lead() < 1e-13
    }

    /// Weighted sum and weight of the votes that are merged.
    pub(crate) fn elected(&self, tie: Tie) -> (f64, f64) {
        let (above, below) = (self.above, self.below);
        if self.even() {
            match tie {
                Tie::Zero => (0.0, 0.0),
                Tie::Mean => (above.sum + below.sum, above.count + below.count),
            }
        } else if above.ballots > below.ballots {
            (above.sum, above.count)
        } else {
            (below.sum, below.count)
        }
    }
}

/// Trim, elect, merge, token by token.
fn ties(spec: &ConsensusSpec, rows: &[Vec<f64>], weights: &[f64]) -> Verdict {
    let Some(told) = Votes::of(spec, rows, weights) else {
        return Verdict::Unclear;
    };
    let mut values: Vec<Told> = (0..rows[0].len())
        .map(|j| Told {
            value: told.mean(told.preferences.iter().map(|row| row[j])) + told.base[j],
            clear: true,
        })
        .collect();
    let unweighted = spec.weights == Weights::Rule(WeightRule::Uniform);
    for (at, &id) in told.ids.iter().enumerate() {
        let poll = Poll::of(spec, &told, at);
        let (sum, count) = poll.elected(spec.tie);
        let count = if unweighted { count.max(1.0) } else { count };
        let divisor = count + f64::from(spec.eps);
        let merged = if divisor > 0.0 { sum / divisor } else { 0.0 };
        values[id] = Told {
            value: merged + told.base[id],
            clear: poll.clear,
        };
    }
    Verdict::Values(values)
}

type Matrix = Vec<Vec<f64>>;

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let columns = b.first().map_or(0, Vec::len);
    a.iter()
        .map(|row| {
            (0..columns)
                .map(|j| row.iter().zip(b).map(|(x, b)| x * b[j]).sum())
                .collect()
        })
        .collect()
}

fn trace(m: &Matrix) -> f64 {
    (0..m.len()).map(|i| m[i][i]).sum()
}

/// The largest eigenvalue of a positive semidefinite matrix and the projector onto its eigenvector:
/// squared again and again, a matrix forgets all but its largest eigenvalue. None where two are close.
fn dominant(m: &Matrix) -> Option<(f64, Matrix)> {
    let normalised = |mut m: Matrix| {
        let scale = trace(&m);
        m.iter_mut().flatten().for_each(|x| *x /= scale);
        m
    };
    let power = (0..16).fold(normalised(m.clone()), |power, _| {
        normalised(product(&power, &power))
    });
    // A projector onto one direction is its own square.
    let definite = (trace(&product(&power, &power)) - 1.0).abs() < 1e-12;
    definite.then(|| (trace(&product(m, &power)), power))
}

/// The closest matrix of some rank: K rows projected onto their leading left singular vectors. None
/// where those are not definite.
pub(crate) fn projected(rows: &Matrix, rank: usize) -> Option<Matrix> {
    let k = rows.len();
    if rank >= k {
        return Some(rows.clone());
    }
    let columns: Matrix = (0..rows[0].len())
        .map(|j| rows.iter().map(|row| row[j]).collect())
        .collect();
    let mut gram = product(rows, &columns);
    let whole = trace(&gram);
    let mut projector = vec![vec![0.0; k]; k];
    for _ in 0..rank {
        if trace(&gram) <= 1e-9 * whole {
            // The rows have no higher rank as they are.
            return Some(rows.clone());
        }
        let (value, direction) = dominant(&gram)?;
        for i in 0..k {
            for j in 0..k {
                gram[i][j] -= value * direction[i][j];
                projector[i][j] += direction[i][j];
            }
        }
    }
    Some(product(&projector, rows))
}
