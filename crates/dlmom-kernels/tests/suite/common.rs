//! Seeded rows of many kinds, and the comparison of two readouts.

use dlmom_core::{Consensus, Request, RowReadout};
use dlmom_kernels::{Kernel, Logits, Scratch};
use half::{bf16, f16};
use proptest::prelude::*;

/// What a row's values are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A shared component, noise of each expert's own, and a few peaks.
    Model,
    /// Multiples of a half: nearly everything ties.
    Coarse,
    /// One value, another per expert.
    Constant,
    /// Zeros of both signs and values about `theta`.
    Small,
    /// Subnormal numbers.
    Subnormal,
    /// Up to the largest float32, so that centring may overflow.
    Huge,
    /// Experts with peaks far apart, each at places of its own.
    Opposed,
    /// One peak over a floor that holds half of the probability.
    Plateau,
    /// A peak in every block over one floor, so that all errors have one sign.
    Comb,
}

pub(crate) const KINDS: [Kind; 9] = [
    Kind::Model,
    Kind::Coarse,
    Kind::Constant,
    Kind::Small,
    Kind::Subnormal,
    Kind::Huge,
    Kind::Opposed,
    Kind::Plateau,
    Kind::Comb,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scalar {
    F32,
    Bf16,
    F16,
}

/// A row to be made.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    pub(crate) experts: usize,
    pub(crate) vocab: usize,
    pub(crate) kind: Kind,
    pub(crate) scalar: Scalar,
    pub(crate) seed: u64,
    /// A value of the last expert, at a share of the row, that is put in its place.
    pub(crate) poison: Option<(f64, f32)>,
}

/// One expert's logits, owned.
#[derive(Clone, Debug)]
pub(crate) enum Owned {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Owned {
    pub(crate) fn view(&self) -> Logits<'_> {
        match self {
            Self::F32(row) => Logits::F32(row),
            Self::Bf16(row) => Logits::Bf16(row),
            Self::F16(row) => Logits::F16(row),
        }
    }

    pub(crate) fn wide(&self) -> Vec<f32> {
        match self {
            Self::F32(row) => row.clone(),
            Self::Bf16(row) => row.iter().map(|z| z.to_f32()).collect(),
            Self::F16(row) => row.iter().map(|z| z.to_f32()).collect(),
        }
    }
}

struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn bell(&mut self) -> f64 {
        (0..4).map(|_| self.unit() - 0.5).sum::<f64>() * 1.7
    }
}

impl Recipe {
    pub(crate) fn rows(&self) -> Vec<Owned> {
        let mut random = Random(self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let peak = (random.unit() * self.vocab as f64) as usize;
        let shared: Vec<f64> = (0..self.vocab)
            .map(|id| 3.0 * random.bell() + if id % 97 == 13 { 8.0 } else { 0.0 })
            .collect();
        let mut rows: Vec<Vec<f32>> = (0..self.experts)
            .map(|_| {
                let level = random.unit() * 20.0 - 10.0;
                let height = 12.0 * random.unit();
                let own = (random.unit() * self.vocab as f64) as usize;
                (0..self.vocab)
                    .map(|id| {
                        let z = match self.kind {
                            Kind::Model => shared[id] + random.bell() + level,
                            Kind::Coarse => (random.bell() * 8.0).round() * 0.5,
                            Kind::Constant => level,
                            Kind::Small => {
                                [0.0, -0.0, 0.1, -0.1, 0.05, 0.2][(random.unit() * 6.0) as usize]
                            }
                            Kind::Subnormal => (random.unit() - 0.5) * 1e-38,
                            Kind::Huge => (random.unit() - 0.5) * 6.7e38,
                            Kind::Opposed => random.bell() + if id == own { 60.0 } else { 0.0 },
                            Kind::Comb => level + if id % 1000 == 7 { height } else { 0.0 },
                            Kind::Plateau => {
                                let floor = (self.vocab as f64).ln();
                                level + if id == peak { floor } else { 0.0 }
                            }
                        };
                        z as f32
                    })
                    .collect()
            })
            .collect();
        if let (Some((share, value)), Some(row)) = (self.poison, rows.last_mut()) {
            let at = (share * self.vocab as f64) as usize;
            if let Some(slot) = row.get_mut(at) {
                *slot = value;
            }
        }
        let convert = |row: Vec<f32>| match self.scalar {
            Scalar::F32 => Owned::F32(row),
            Scalar::Bf16 => Owned::Bf16(row.into_iter().map(bf16::from_f32).collect()),
            Scalar::F16 => Owned::F16(row.into_iter().map(f16::from_f32).collect()),
        };
        rows.into_iter().map(convert).collect()
    }
}

pub(crate) fn recipe(vocab: std::ops::Range<usize>) -> impl Strategy<Value = Recipe> {
    let scalar = prop_oneof![
        2 => Just(Scalar::F32),
        1 => Just(Scalar::Bf16),
        1 => Just(Scalar::F16),
    ];
    let value = prop::sample::select(vec![
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN,
        -1e4,
        1e4,
        -0.0,
    ]);
    let poison = prop::option::weighted(0.2, (0.0..1.0, value));
    let kind = prop::sample::select(KINDS.to_vec());
    (1_usize..10, vocab, kind, scalar, any::<u64>(), poison).prop_map(
        |(experts, vocab, kind, scalar, seed, poison)| Recipe {
            experts,
            vocab,
            kind,
            scalar,
            seed,
            poison,
        },
    )
}

/// Reads with the kernel; also the merged preferences.
pub(crate) fn fused(
    kernel: &Kernel,
    rows: &[Owned],
    consensus: &dyn Consensus,
    request: &Request<'_>,
) -> (RowReadout, Vec<f32>) {
    let views: Vec<Logits<'_>> = rows.iter().map(Owned::view).collect();
    let (mut out, mut preferences) = (RowReadout::default(), Vec::new());
    let scratch = &mut Scratch::default();
    kernel.read_row(
        &views,
        consensus,
        request,
        Some(&mut preferences),
        scratch,
        &mut out,
    );
    (out, preferences)
}

/// Reads with the reference, on the float32 that equal the logits.
pub(crate) fn golden(
    rows: &[Owned],
    consensus: &dyn Consensus,
    request: &Request<'_>,
) -> (RowReadout, Vec<f32>) {
    let wide: Vec<Vec<f32>> = rows.iter().map(Owned::wide).collect();
    let views: Vec<&[f32]> = wide.iter().map(Vec::as_slice).collect();
    let (mut out, mut scratch) = (RowReadout::default(), dlmom_core::Scratch::default());
    dlmom_core::read_row(&views, consensus, request, &mut scratch, &mut out);
    (out, scratch.preferences().to_vec())
}

pub(crate) fn bits(row: &[f32]) -> Vec<u32> {
    row.iter().map(|v| v.to_bits()).collect()
}

fn near(a: f64, b: f64, tolerance: f64) -> bool {
    a == b || (a - b).abs() <= tolerance
}

fn near_share(a: f32, b: f32) -> bool {
    near(
        f64::from(a),
        f64::from(b),
        1e-6 * f64::from(b).abs() + 1e-40,
    )
}

/// What the kernel owes the reference.
pub(crate) fn agree(got: &RowReadout, want: &RowReadout) -> Result<(), String> {
    let exact = [
        ("finite", got.finite == want.finite),
        ("merged", got.merged == want.merged),
        ("agreed", got.agreed == want.agreed),
        ("ids", got.ids == want.ids),
        ("drawn", got.drawn == want.drawn),
        ("tempered", got.tempered == want.tempered),
    ];
    for (field, holds) in exact {
        if !holds {
            return Err(field.to_owned());
        }
    }
    let all = |a: &[f64], b: &[f64]| {
        a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| near(a, b, 1e-6))
    };
    let lists = |a: &[Vec<f64>], b: &[Vec<f64>]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| all(a, b))
    };
    let shares = |a: &[f32], b: &[f32]| {
        a.len() == b.len() && a.iter().zip(b).all(|(&a, &b)| near_share(a, b))
    };
    let close = [
        ("entropies", all(&got.entropies, &want.entropies)),
        (
            "merged_entropy",
            near(got.merged_entropy, want.merged_entropy, 1e-6),
        ),
        ("probs", shares(&got.probs, &want.probs)),
        ("mass", near_share(got.mass, want.mass)),
        ("role_mass", near_share(got.role_mass, want.role_mass)),
        (
            "target_logprobs",
            all(&got.target_logprobs, &want.target_logprobs),
        ),
        (
            "per_agent_target_logprobs",
            lists(
                &got.per_agent_target_logprobs,
                &want.per_agent_target_logprobs,
            ),
        ),
        ("per_agent", same_entries(&got.per_agent, &want.per_agent)),
    ];
    match close.iter().find(|(_, holds)| !holds) {
        Some((field, _)) => Err((*field).to_owned()),
        None => Ok(()),
    }
}

/// A list of ids with their probabilities.
type Entries = Vec<(u32, f32)>;

/// The same entries in the same order, but where two probabilities are neighbours in float32.
fn same_entries(got: &[Entries], want: &[Entries]) -> bool {
    let by_id = |list: &Entries| {
        let mut list = list.clone();
        list.sort_unstable_by_key(|entry| entry.0);
        list
    };
    let same = |(a, b): (&Entries, &Entries)| {
        let ordered = a.iter().zip(b).all(|(a, b)| near_share(a.1, b.1));
        let (left, right) = (by_id(a), by_id(b));
        let mut entries = left.iter().zip(&right);
        ordered
            && left.len() == right.len()
            && entries.all(|(a, b)| a.0 == b.0 && near_share(a.1, b.1))
    };
    got.len() == want.len() && got.iter().zip(want).all(same)
}
