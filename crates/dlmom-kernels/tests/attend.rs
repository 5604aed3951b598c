//! Attention over ragged rows against a float64 softmax, and what its bits depend on.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use dlmom_kernels::{Attention, Floats, Grid, Kernel, Misfit, Tier};
use half::{bf16, f16};
use proptest::prelude::*;

/// Numbers of a fixed function.
fn numbers(count: usize, salt: u64) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

#[derive(Clone, Debug)]
struct Case {
    rows: usize,
    kv_heads: usize,
    groups: usize,
    capacity: usize,
    d: usize,
    dv: usize,
    visible: Vec<(usize, usize)>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    fn new(shape: [usize; 6], visible: Vec<(usize, usize)>, salt: u64) -> Self {
        let [rows, kv_heads, groups, capacity, d, dv] = shape;
        Self {
            rows,
            kv_heads,
            groups,
            capacity,
            d,
            dv,
            visible,
            q: numbers(rows * kv_heads * groups * d, salt),
            k: numbers(rows * kv_heads * capacity * d, salt + 1),
            v: numbers(rows * kv_heads * capacity * dv, salt + 2),
        }
    }

    fn call<'a>(&'a self, positions: usize, data: [Floats<'a>; 3]) -> Attention<'a> {
        let Self {
            rows,
            kv_heads,
            groups,
            capacity,
            d,
            dv,
            ..
        } = *self;
        let heads = kv_heads * groups;
        let grid = |data, shape: [usize; 4], rows_apart: usize, heads_apart: usize| Grid {
            data,
            shape,
            strides: [rows_apart, heads_apart, shape[3]],
        };
        let store = |data, size| {
            grid(
                data,
                [rows, kv_heads, positions, size],
                kv_heads * capacity * size,
                capacity * size,
            )
        };
        Attention {
            queries: grid(data[0], [rows, heads, 1, d], heads * d, d),
            keys: store(data[1], d),
            values: store(data[2], dv),
            visible: &self.visible,
            scale: 0.3,
        }
    }

    fn run(&self, kernel: &Kernel) -> Vec<f32> {
        let data = [
            Floats::F32(&self.q),
            Floats::F32(&self.k),
            Floats::F32(&self.v),
        ];
        self.run_on(kernel, self.capacity, data)
    }

    fn run_on(&self, kernel: &Kernel, positions: usize, data: [Floats<'_>; 3]) -> Vec<f32> {
        let mut out = vec![7.0; self.rows * self.kv_heads * self.groups * self.dv];
        kernel
            .attend(&self.call(positions, data), &mut out)
            .unwrap();
        out
    }

    /// The softmax in float64.
    fn expected(&self) -> Vec<f64> {
        let Self {
            rows,
            kv_heads,
            groups,
            capacity,
            d,
            dv,
            ..
        } = *self;
        let mut out = Vec::new();
        for row in 0..rows {
            for head in 0..kv_heads * groups {
                let store = (row * kv_heads + head / groups) * capacity;
                let q = &self.q[(row * kv_heads * groups + head) * d..][..d];
                let (from, to) = self.visible[row];
                let score = |at: usize| -> f64 {
                    let k = &self.k[(store + at) * d..][..d];
                    q.iter()
                        .zip(k)
                        .map(|(a, b)| f64::from(*a) * f64::from(*b))
                        .sum::<f64>()
                        * f64::from(0.3_f32)
                };
                let scores: Vec<f64> = (from..to).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for i in 0..dv {
                    out.push(
                        (from..to)
                            .zip(&scores)
                            .map(|(at, s)| {
                                (s - max).exp() / total * f64::from(self.v[(store + at) * dv + i])
                            })
                            .sum(),
                    );
                }
            }
        }
        out
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn kernels() -> Vec<Kernel> {
    Tier::ALL
        .into_iter()
        .filter(|tier| tier.is_available())
        .flat_map(|tier| [1, 3].map(|threads| Kernel::with_tier(tier, threads).unwrap()))
        .collect()
}

fn cases() -> impl Strategy<Value = Case> {
    let shape = (
        1..5_usize,
        1..4_usize,
        1..4_usize,
        1..200_usize,
        1..40_usize,
        1..40_usize,
    );
    (shape, any::<u64>()).prop_flat_map(|((rows, kv_heads, groups, capacity, d, dv), salt)| {
        let range = (0..capacity).prop_flat_map(move |from| (Just(from), from + 1..=capacity));
        proptest::collection::vec(range, rows).prop_map(move |visible| {
            Case::new(
                [rows, kv_heads, groups, capacity, d, dv],
                visible,
                salt >> 1,
            )
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn it_is_softmax_attention_with_the_same_bits_everywhere(case in cases()) {
        let first = case.run(&Kernel::default());
        for (got, want) in first.iter().zip(case.expected()) {
            prop_assert!((f64::from(*got) - want).abs() < 2e-6, "{got} {want}");
        }
        for kernel in kernels() {
            prop_assert_eq!(bits(&case.run(&kernel)), bits(&first));
        }
    }

    #[test]
    fn a_row_depends_on_what_it_sees_and_on_nothing_else(case in cases()) {
        let kernel = Kernel::default();
        let first = case.run(&kernel);
        let per_row = first.len() / case.rows;
        // Whatever lies beyond a row's own positions, NaN too, and however far the call could see.
        let mut other = case.clone();
        for row in 0..case.rows {
            let (from, to) = case.visible[row];
            for head in 0..case.kv_heads {
                for at in (0..case.capacity).filter(|at| !(from..to).contains(at)) {
                    let place = (row * case.kv_heads + head) * case.capacity + at;
                    other.k[place * case.d..][..case.d].fill(f32::NAN);
                    other.v[place * case.dv..][..case.dv].fill(f32::NAN);
                }
            }
        }
        prop_assert_eq!(bits(&other.run(&kernel)), bits(&first));
        let furthest = case.visible.iter().map(|(_, to)| *to).max().unwrap_or(1);
        let data = [Floats::F32(&case.q), Floats::F32(&case.k), Floats::F32(&case.v)];
        prop_assert_eq!(bits(&case.run_on(&kernel, furthest, data)), bits(&first));
        // Another row's NaN is its own.
        let mut broken = case.clone();
        let (from, _) = broken.visible[0];
        broken.k[from * case.d] = f32::NAN;
        let got = broken.run(&kernel);
        let group = case.groups * case.dv;
        prop_assert!(got[..group].iter().all(|x| x.is_nan()));
        prop_assert_eq!(bits(&got[per_row..]), bits(&first[per_row..]));
    }

    #[test]
    fn halves_are_read_as_the_floats_they_are(case in cases()) {
        let kernel = Kernel::default();
        macro_rules! check {
            ($kind:ident, $store:ident) => {
                let narrow = |x: &Vec<f32>| x.iter().map(|&x| $kind::from_f32(x)).collect::<Vec<_>>();
                let (q, k, v) = (narrow(&case.q), narrow(&case.k), narrow(&case.v));
                let wide = |x: &Vec<$kind>| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
                let same = Case { q: wide(&q), k: wide(&k), v: wide(&v), ..case.clone() };
                let data = [Floats::$store(&q), Floats::$store(&k), Floats::$store(&v)];
                let got = case.run_on(&kernel, case.capacity, data);
                prop_assert_eq!(bits(&got), bits(&same.run(&kernel)));
            };
        }
        check!(bf16, Bf16);
        check!(f16, F16);
    }
}

#[test]
fn a_softmax_that_there_is_not_is_nan() {
    let kernel = Kernel::default();
    for (key, nan) in [(f32::INFINITY, true), (f32::NAN, true), (f32::MAX, false)] {
        let mut case = Case::new([1, 1, 1, 70, 4, 3], vec![(0, 70)], 5);
        case.q.fill(1.0);
        case.k.fill(0.0);
        case.k[65 * 4] = key;
        let out = case.run(&kernel);
        assert_eq!(out.iter().all(|x| x.is_nan()), nan, "{key}: {out:?}");
    }
    // What weighs nothing is left out; where nothing weighs anything there is no answer.
    let mut case = Case::new([1, 1, 1, 3, 1, 1], vec![(0, 3)], 5);
    case.q.fill(1.0);
    case.k = vec![f32::NEG_INFINITY, 0.0, 0.0];
    case.v = vec![100.0, 1.0, 3.0];
    assert_eq!(case.run(&kernel), [2.0]);
    case.k.fill(f32::NEG_INFINITY);
    assert!(case.run(&kernel)[0].is_nan());
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let kernel = Kernel::default();
    let case = Case::new([2, 2, 2, 5, 4, 3], vec![(0, 5), (1, 3)], 1);
    let data = [
        Floats::F32(&case.q),
        Floats::F32(&case.k),
        Floats::F32(&case.v),
    ];
    let good = case.call(5, data);
    let mut out = vec![0.0; 24];
    assert_eq!(kernel.attend(&good, &mut out), Ok(()));
    assert_eq!(kernel.attend(&good, &mut out[..23]), Err(Misfit));
    let halves = vec![bf16::ONE; case.q.len()];
    let mut bad = vec![good; 7];
    bad[0].visible = &[(0, 5)];
    bad[1].visible = &[(0, 5), (2, 2)];
    bad[2].visible = &[(0, 6), (1, 3)];
    bad[3].queries.shape[1] = 3;
    bad[4].keys.shape[3] = 5;
    bad[5].values.data = Floats::F32(&case.v[..40]);
    bad[6].queries.data = Floats::Bf16(&halves);
    for call in bad {
        assert_eq!(kernel.attend(&call, &mut out), Err(Misfit), "{call:?}");
    }
}
