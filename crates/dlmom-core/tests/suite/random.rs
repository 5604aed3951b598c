//! The generator and its named streams.

use std::collections::HashSet;

use dlmom_core::philox::philox4x64;
use dlmom_core::{Purpose, Stream, sample_key};

use crate::common::{assert_near, golden, hex, ks_uniform};

const ALL: [(&str, Purpose); 8] = [
    ("gumbel", Purpose::Gumbel),
    ("dirichlet", Purpose::Dirichlet),
    ("token", Purpose::Token),
    ("shuffle", Purpose::Shuffle),
    ("expert", Purpose::Expert),
    ("tilt", Purpose::Tilt),
    ("donor", Purpose::Donor),
    ("resample", Purpose::Resample),
];

/// The vectors of Random123's `kat_vectors` for philox4x64 with 10 rounds.
#[test]
fn known_answers_of_random123() {
    let ones = u64::MAX;
    assert_eq!(
        philox4x64([0; 4], [0; 2]),
        [
            0x1655_4d9e_ca36_314c,
            0xdb20_fe9d_672d_0fdc,
            0xd7e7_72ce_e186_176b,
            0x7e68_b68a_ec7b_a23b
        ]
    );
    assert_eq!(
        philox4x64([ones; 4], [ones; 2]),
        [
            0x87b0_92c3_013f_e90b,
            0x438c_3c67_be8d_0224,
            0x9cc7_d7c6_9cd7_77b6,
            0xa09c_aebf_594f_0ba0
        ]
    );
    assert_eq!(
        philox4x64(
            [
                0x243f_6a88_85a3_08d3,
                0x1319_8a2e_0370_7344,
                0xa409_3822_299f_31d0,
                0x082e_fa98_ec4e_6c89,
            ],
            [0x4528_21e6_38d0_1377, 0xbe54_66cf_34e9_0c6c],
        ),
        [
            0xa528_f454_03e6_1d95,
            0x38c7_2dbd_566e_9788,
            0xa5a1_610e_72fd_18b5,
            0x57bd_43b5_e52b_7fe6
        ]
    );
}

#[test]
fn the_generator_is_numpys() {
    let cases = golden("philox.json");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 40);
    for case in cases {
        let words = |key: &str| {
            case[key]
                .as_array()
                .unwrap()
                .iter()
                .map(hex)
                .collect::<Vec<_>>()
        };
        let counter: [u64; 4] = words("counter").try_into().unwrap();
        let key: [u64; 2] = words("key").try_into().unwrap();
        assert_eq!(philox4x64(counter, key).as_slice(), words("out"));
    }
}

#[test]
fn streams_are_what_the_documentation_says() {
    let golden = golden("stream.json");
    for case in golden["keys"].as_array().unwrap() {
        let key = sample_key(
            case["item"].as_str().unwrap(),
            case["sample"].as_u64().unwrap() as u32,
            case["agent"].as_u64().unwrap() as u32,
        );
        assert_eq!(key, hex(&case["key"]));
    }
    for case in golden["draws"].as_array().unwrap() {
        let stream = Stream {
            seed: hex(&case["seed"]),
            sample: hex(&case["sample"]),
            step: case["step"].as_u64().unwrap(),
        };
        let name = case["purpose"].as_str().unwrap();
        let (_, purpose) = *ALL.iter().find(|(n, _)| *n == name).unwrap();
        let token = case["token"].as_u64().unwrap();
        let attempt = case["attempt"].as_u64().unwrap() as u32;
        assert_eq!(
            stream.uniform(token, purpose, attempt),
            case["uniform"].as_f64().unwrap()
        );
        assert_near(
            stream.normal(token, purpose, attempt),
            case["normal"].as_f64().unwrap(),
            1e-12,
        );
    }
}

#[test]
fn sample_keys_are_pinned_and_distinct() {
    assert_eq!(
        sample_key("gsm8k/17", 0, 0),
        hex(&golden("stream.json")["keys"][1]["key"])
    );
    let mut seen = HashSet::new();
    for item in 0..50 {
        for sample in 0..10 {
            for agent in 0..4 {
                assert!(seen.insert(sample_key(&format!("item/{item}"), sample, agent)));
            }
        }
    }
    // The separator keeps the end of an item apart from a sample index.
    assert_ne!(sample_key("a\u{1}", 0, 0), sample_key("a", 1, 0));
}

fn stream(step: u64) -> Stream {
    Stream {
        seed: 1234,
        sample: sample_key("ks", 0, 0),
        step,
    }
}

#[test]
fn uniforms_are_uniform_along_every_axis_of_the_counter() {
    // 1.95 is the 0.1 % point of the Kolmogorov distribution.
    let n = 20_000_u32;
    let axes: [Vec<f64>; 4] = [
        (0..n)
            .map(|i| stream(0).uniform(u64::from(i), Purpose::Gumbel, 0))
            .collect(),
        (0..n)
            .map(|i| stream(u64::from(i)).uniform(0, Purpose::Token, 0))
            .collect(),
        (0..n)
            .map(|i| stream(0).uniform(0, Purpose::Dirichlet, i))
            .collect(),
        (0..n)
            .map(|i| {
                Stream {
                    seed: u64::from(i),
                    ..stream(0)
                }
                .uniform(0, Purpose::Token, 0)
            })
            .collect(),
    ];
    for axis in axes {
        assert!(axis.iter().all(|&u| u > 0.0 && u < 1.0));
        assert!(ks_uniform(axis) < 1.95);
    }
}

#[test]
fn normals_are_normal() {
    let n = 40_000_u32;
    let sample: Vec<f64> = (0..n)
        .map(|i| stream(0).normal(u64::from(i), Purpose::Dirichlet, 0))
        .collect();
    let moment = |k: i32| sample.iter().map(|x| x.powi(k)).sum::<f64>() / f64::from(n);
    // Five standard errors of the first four moments, sqrt(1), sqrt(2), sqrt(15), sqrt(96) over sqrt(n).
    assert_near(moment(1), 0.0, 0.025);
    assert_near(moment(2), 1.0, 0.036);
    assert_near(moment(3), 0.0, 0.097);
    assert_near(moment(4), 3.0, 0.245);
}

#[test]
fn every_part_of_the_name_matters() {
    let base = stream(3);
    let mut seen = HashSet::new();
    assert!(seen.insert(base.bits(5, Purpose::Gumbel, 0)));
    assert!(seen.insert(base.bits(6, Purpose::Gumbel, 0)));
    assert!(seen.insert(base.bits(5, Purpose::Token, 0)));
    assert!(seen.insert(base.bits(5, Purpose::Gumbel, 1)));
    assert!(seen.insert(stream(4).bits(5, Purpose::Gumbel, 0)));
    assert!(seen.insert(Stream { seed: 1, ..base }.bits(5, Purpose::Gumbel, 0)));
    assert!(seen.insert(Stream { sample: 1, ..base }.bits(5, Purpose::Gumbel, 0)));
    assert!(!seen.insert(stream(3).bits(5, Purpose::Gumbel, 0)));
}
