//! Dense beliefs, embeddings, and telling the payloads apart.

use dlmom_packet::{
    BeliefPacket, DecodeError, Encoding, HEADER_LEN, Kind, MAX_DENSE_BYTES, MAX_EMBED, MAX_VOCAB,
    Scalar, Transcript, decode_dense, decode_dense_exact, decode_embed, decode_embed_exact,
    decode_exact, dense_len, embed_len, encode, encode_dense_into, encode_embed_into, kind_of,
};
use half::{bf16, f16};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::properties::metas;
use crate::support::{META, example, patched, reseal};

fn dense(probs: &[f32], scalar: Scalar) -> Vec<u8> {
    let mut out = Vec::new();
    let written = encode_dense_into(probs, META, scalar, &mut out).unwrap();
    assert_eq!(written, out.len());
    assert_eq!(written, dense_len(probs.len(), scalar));
    out
}

fn embed(values: &[f32], scalar: Scalar) -> Vec<u8> {
    let mut out = Vec::new();
    let written = encode_embed_into(values, scalar, META, &mut out).unwrap();
    assert_eq!(written, out.len());
    assert_eq!(written, embed_len(values.len(), scalar));
    out
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn sum(probs: &[f32]) -> f64 {
    probs.iter().map(|p| f64::from(*p)).sum()
}

#[test]
fn exact_values_come_back_from_every_type() {
    let probs = [0.0, 0.25, 0.5, 0.25];
    let values = [0.5, -1.25, -0.0, 3.0];
    for scalar in Scalar::ALL {
        let decoded = decode_dense_exact(&dense(&probs, scalar)).unwrap();
        assert_eq!(bits(&decoded.probs), bits(&probs));
        assert_eq!((decoded.meta, decoded.scalar), (META, scalar));
        let decoded = decode_embed_exact(&embed(&values, scalar)).unwrap();
        assert_eq!(bits(&decoded.values), bits(&values));
        assert_eq!((decoded.meta, decoded.scalar), (META, scalar));
    }
}

#[test]
fn a_dense_belief_is_made_canonical_as_a_packet_is() {
    let decode = |probs: &[f32]| {
        decode_dense_exact(&dense(probs, Scalar::F32))
            .unwrap()
            .probs
    };
    assert_eq!(bits(&decode(&[-0.0, 1.000_000_5])), bits(&[0.0, 1.0]));
    let probs = decode(&[0.6005, 0.4]);
    assert!((sum(&probs) - 1.0).abs() < 1e-7);
    let packet = BeliefPacket::new(vec![0, 1], vec![0.6005, 0.4], 1.0, 2).unwrap();
    assert_eq!(probs, packet.probs());
}

#[test]
fn large_payloads_survive_every_type() {
    // Nearly all rounded down to zero: the worst that f16 can do.
    let low = |vocab: usize| {
        let mut low = vec![0.99 * (-25.0_f32).exp2(); vocab];
        low[vocab - 1] = (1.0 - sum(&low[1..])) as f32;
        low
    };
    let few = 1 << 16;
    for (probs, scalar) in [
        (low(1 << 21), Scalar::F16),
        (low(few), Scalar::F32),
        (low(few), Scalar::Bf16),
        (vec![1.0 / few as f32; few], Scalar::F16),
    ] {
        let bytes = dense(&probs, scalar);
        assert!(bytes.len() <= MAX_DENSE_BYTES);
        let decoded = decode_dense_exact(&bytes).unwrap().probs;
        assert!((sum(&decoded) - 1.0).abs() < 1e-6, "{scalar}");
    }
    let wide = vec![1.5; MAX_EMBED];
    let decoded = decode_embed_exact(&embed(&wide, Scalar::Bf16)).unwrap();
    assert_eq!(decoded.values, wide);
}

#[test]
fn each_broken_rule_has_its_error() {
    let mut out = b"before".to_vec();
    let mut dense = |probs: &[f32]| {
        encode_dense_into(probs, META, Scalar::F32, &mut out)
            .unwrap_err()
            .to_string()
    };
    let mut report = vec![
        dense(&[]),
        dense(&[0.5, f32::NAN]),
        dense(&[0.5, f32::INFINITY]),
        dense(&[1.5, -0.5]),
        dense(&[0.5, 0.25]),
        dense(&vec![0.0; MAX_VOCAB as usize + 1]),
    ];
    let mut embed = |values: &[f32], scalar| {
        encode_embed_into(values, scalar, META, &mut out)
            .unwrap_err()
            .to_string()
    };
    report.extend([
        embed(&[], Scalar::F32),
        embed(&vec![0.0; MAX_EMBED + 1], Scalar::F32),
        embed(&[0.0, f32::NAN], Scalar::F32),
        embed(&[f32::NEG_INFINITY], Scalar::Bf16),
        embed(&[65_519.0, 65_520.0], Scalar::F16),
        embed(&[f32::MAX], Scalar::Bf16),
    ]);
    assert_eq!(out, b"before");
    insta::assert_snapshot!(report.join("\n"));
}

/// Every field that can be wrong behind a right checksum, and the error that is its own.
#[test]
fn each_corrupted_field_has_its_error() {
    let f32s = dense(&[0.0, 0.25, 0.5, 0.25], Scalar::F32);
    let f16s = dense(&[0.0, 0.25, 0.5, 0.25], Scalar::F16);
    let packet = encode(&example(), META, Encoding::F32).unwrap();
    let vocab = (MAX_VOCAB + 1).to_le_bytes();
    let denses: Vec<(&str, Vec<u8>)> = vec![
        ("magic", patched(&f32s, 0, b"DLEM")),
        ("version", patched(&f32s, 4, &[2])),
        ("flags", patched(&f32s, 5, &[1])),
        ("packet", packet),
        ("encoding 4", patched(&f32s, 6, &[4])),
        ("encoding 8", patched(&f32s, 6, &[8])),
        ("encoding 6", patched(&f32s, 6, &[6])),
        ("reserved", patched(&f32s, 7, &[1])),
        ("vocab over limit", patched(&f32s, 8, &vocab)),
        ("k zero", patched(&f32s, 24, &[0])),
        ("k not vocab", patched(&f32s, 24, &[3])),
        ("vocab not k", patched(&f32s, 8, &[5])),
        ("mass", patched(&f32s, 28, &0.5_f32.to_le_bytes())),
        ("NaN", patched(&f32s, 40, &f32::NAN.to_le_bytes())),
        (
            "negative zero",
            patched(&f16s, 32, &0x8000_u16.to_le_bytes()),
        ),
        ("above 1", patched(&f32s, 36, &1.5_f32.to_le_bytes())),
        ("sum", patched(&f32s, 36, &0.251_f32.to_le_bytes())),
        ("trailing", [f32s.as_slice(), &[0]].concat()),
        ("cut", f32s[..31].to_vec()),
        ("cut", f32s[..47].to_vec()),
        ("cut", f32s[..51].to_vec()),
    ];
    let embeds = embed(&[0.5, -1.25], Scalar::F16);
    let width = (MAX_EMBED as u32 + 1).to_le_bytes();
    let embeds: Vec<(&str, Vec<u8>)> = vec![
        ("dense", f32s.clone()),
        ("version", patched(&embeds, 4, &[0])),
        ("flags", patched(&embeds, 5, &[1])),
        ("encoding", patched(&embeds, 6, &[4])),
        ("reserved", patched(&embeds, 7, &[1])),
        ("width zero", patched(&embeds, 8, &[0])),
        ("width over limit", patched(&embeds, 8, &width)),
        ("width one more", patched(&embeds, 8, &[3])),
        ("NaN", patched(&embeds, 26, &0x7e00_u16.to_le_bytes())),
        ("infinite", patched(&embeds, 24, &0xfc00_u16.to_le_bytes())),
        ("trailing", [embeds.as_slice(), &[0]].concat()),
        ("cut", embeds[..23].to_vec()),
        ("cut", embeds[..27].to_vec()),
        ("cut", embeds[..31].to_vec()),
    ];
    let mut report = Vec::new();
    for (what, bytes) in denses {
        let error = decode_dense_exact(&bytes).unwrap_err();
        report.push(format!("dense {what} | {} | {error}", error.name()));
    }
    for (what, bytes) in embeds {
        let error = decode_embed_exact(&bytes).unwrap_err();
        report.push(format!("embed {what} | {} | {error}", error.name()));
    }
    insta::assert_snapshot!(report.join("\n"));
}

#[test]
fn payloads_are_told_apart() {
    let dense = dense(&[1.0], Scalar::Bf16);
    let embed = embed(&[1.0], Scalar::F32);
    let transcript = Transcript::new(10, 0)
        .unwrap()
        .encode(Encoding::F32)
        .unwrap();
    assert_eq!(kind_of(&dense), Some(Kind::Dense));
    assert_eq!(kind_of(&embed), Some(Kind::Embed));
    assert_eq!(kind_of(&transcript), Some(Kind::Transcript));
    for encoding in Encoding::ALL {
        let packet = encode(&example(), META, encoding).unwrap();
        assert_eq!(kind_of(&packet), Some(Kind::Packet));
        let error = decode_dense(&packet).unwrap_err();
        assert_eq!(error.name(), "wrong_kind");
    }
    assert_eq!(decode_exact(&dense).unwrap_err().name(), "wrong_kind");
    assert_eq!(kind_of(b"DLB"), None);
    assert_eq!(kind_of(b"DLXX"), None);
    assert_eq!(
        Kind::ALL.map(Kind::as_str),
        ["packet", "dense", "embed", "transcript"]
    );
}

#[test]
fn errors_move_with_their_payload() {
    let bytes = dense(&[1.0], Scalar::F32);
    let error = decode_dense(&bytes[..HEADER_LEN]).unwrap_err().shifted(100);
    assert_eq!(error.offset(), 132);
    assert_eq!(
        error.to_string(),
        "offset 132: probabilities cut short, needs 4 bytes, 0 left"
    );
}

proptest! {
    #[test]
    fn dense_round_trips(weights in vec(prop_oneof![4 => 0.0..1.0_f32, 1 => Just(0.0)], 1..300), meta in metas()) {
        let mut weights = weights;
        weights[0] += 0.5;
        let sum: f32 = weights.iter().sum();
        let probs: Vec<f32> = weights.iter().map(|w| w / sum).collect();
        let mut exact = Vec::new();
        encode_dense_into(&probs, meta, Scalar::F32, &mut exact).unwrap();
        let exact = decode_dense_exact(&exact).unwrap();
        prop_assert_eq!(exact.meta, meta);
        // Normalised, so bit for bit from here on.
        let again = decode_dense_exact(&dense(&exact.probs, Scalar::F32)).unwrap();
        prop_assert_eq!(bits(&again.probs), bits(&exact.probs));
        if (probs.iter().map(|p| f64::from(*p)).sum::<f64>() - 1.0).abs() <= 1e-6 {
            prop_assert_eq!(bits(&exact.probs), bits(&probs));
        }
        for scalar in [Scalar::F16, Scalar::Bf16] {
            let decoded = decode_dense_exact(&dense(&probs, scalar)).unwrap().probs;
            let (u, a) = (scalar.relative_error(), scalar.absolute_error());
            let t = 2e-6 + u + probs.len() as f64 * a;
            for (p, q) in exact.probs.iter().zip(decoded) {
                let (p, q) = (f64::from(*p), f64::from(q));
                prop_assert!((q - p).abs() <= ((u + t) * p + a) / (1.0 - t) + 1e-7 * q);
            }
        }
    }

    #[test]
    fn embeds_round_trip(values in vec(-6e4..6e4_f32, 1..100), meta in metas()) {
        for scalar in Scalar::ALL {
            let mut out = Vec::new();
            encode_embed_into(&values, scalar, meta, &mut out).unwrap();
            let decoded = decode_embed_exact(&out).unwrap();
            prop_assert_eq!(decoded.meta, meta);
            let wanted: Vec<f32> = values.iter().map(|&v| match scalar {
                Scalar::F32 => v,
                Scalar::F16 => f16::from_f32(v).to_f32(),
                Scalar::Bf16 => bf16::from_f32(v).to_f32(),
            }).collect();
            prop_assert_eq!(bits(&decoded.values), bits(&wanted));
            let mut again = Vec::new();
            encode_embed_into(&decoded.values, scalar, meta, &mut again).unwrap();
            prop_assert_eq!(again, out);
        }
    }

    #[test]
    fn cut_and_flipped_payloads_are_errors(
        values in vec(0.0..1.0_f32, 1..12),
        scalar in proptest::sample::select(Scalar::ALL.to_vec()),
    ) {
        let mut probs = values.clone();
        probs[0] += 1.0;
        let sum: f32 = probs.iter().sum();
        let probs: Vec<f32> = probs.iter().map(|p| p / sum).collect();
        for mut bytes in [dense(&probs, scalar), embed(&values, scalar)] {
            let decode = |bytes: &[u8]| match kind_of(bytes) {
                Some(Kind::Embed) => decode_embed(bytes).map(|(_, used)| used),
                _ => decode_dense(bytes).map(|(_, used)| used),
            };
            let is_embed = kind_of(&bytes) == Some(Kind::Embed);
            for len in 0..bytes.len() {
                let error = if is_embed {
                    decode_embed(&bytes[..len]).unwrap_err()
                } else {
                    decode_dense(&bytes[..len]).unwrap_err()
                };
                let DecodeError::Truncated { offset, needed, available, .. } = error else {
                    return Err(TestCaseError::fail(format!("{len}: {error}")));
                };
                prop_assert_eq!(offset + available, len);
                prop_assert!(needed > available);
            }
            for bit in 0..bytes.len() * 8 {
                bytes[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(decode(&bytes).is_err(), "bit {}", bit);
                bytes[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn random_payloads_never_panic(
        mut bytes in vec(any::<u8>(), 40..120),
        tag in 0..9_u8,
        count in 0..30_u8,
        is_embed in any::<bool>(),
    ) {
        bytes[..8].copy_from_slice(&[b'D', b'L', b'B', b'P', 1, 0, tag, 0]);
        bytes[8..12].copy_from_slice(&[count, 0, 0, 0]);
        bytes[24..28].copy_from_slice(&[count, 0, 0, 0]);
        if is_embed {
            bytes[2..4].copy_from_slice(b"EM");
        }
        reseal(&mut bytes);
        if let Ok(decoded) = decode_dense_exact(&bytes) {
            prop_assert!((sum(&decoded.probs) - 1.0).abs() <= 1e-6);
        }
        if let Ok(decoded) = decode_embed_exact(&bytes) {
            prop_assert_eq!(embed(&decoded.values, decoded.scalar).len(), bytes.len());
        }
        let _ = decode_exact(&bytes);
    }
}
