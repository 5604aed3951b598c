//! The compact encoding: how short, how close, and that a packet has one form in it.

use dlmom_packet::{
    BeliefPacket, DecodeError, Encoding, HEADER_LEN, MAX_K, MAX_VOCAB, Meta, decode_exact, encode,
    max_encoded_len, packet_len,
};
use proptest::prelude::*;

use crate::properties::{is_canonical, metas, packets, prob};
use crate::support::{META, example, packet, patched, reseal};

/// Squared half of a coarsest step over 2: no distribution whose log probabilities move by at most one step in all is
/// further off (Hoeffding's lemma).
const KL_OF_STEPS: f64 = std::f64::consts::LN_2 * std::f64::consts::LN_2 / 64.0 / 8.0;

fn compact(packet: &BeliefPacket) -> Vec<u8> {
    encode(packet, META, Encoding::Compact).unwrap()
}

/// KL(packet || what became of it) in nats.
fn divergence(packet: &BeliefPacket) -> f64 {
    let decoded = decode_exact(&compact(packet)).unwrap().packet;
    let mut after: Vec<(u32, f32)> = decoded.iter().collect();
    after.sort_unstable_by_key(|entry| entry.0);
    packet
        .iter()
        .filter(|(_, p)| *p > 0.0)
        .map(|(id, p)| {
            let place = after.binary_search_by_key(&id, |entry| entry.0).unwrap();
            let (p, q) = (f64::from(p), f64::from(after[place].1));
            p * (p / q).ln()
        })
        .sum()
}

/// What holds of every packet: see `KL_OF_STEPS`; what lies below the floor is raised to 2^-31.75 of the largest, and
/// the sum of a packet is 1 within 1e-6.
fn divergence_bound(k: usize) -> f64 {
    KL_OF_STEPS + k as f64 * (-31.0_f64).exp2() + 2e-6
}

/// A linear congruential generator; the upper bits are good enough to draw packets.
struct Draw(u64);

impl Draw {
    fn uniform(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A top-k packet of a softmax over logits; tokens of a low id are the frequent ones if `skewed`.
    fn packet(&mut self, vocab: u32, k: usize, temperature: f64, skewed: bool) -> BeliefPacket {
        let mut logits: Vec<(f64, u32)> = (0..vocab)
            .map(|id| {
                let prior = if skewed {
                    -f64::from(id + 10).ln()
                } else {
                    0.0
                };
                ((3.0 * self.normal() + prior) / temperature, id)
            })
            .collect();
        let (kept, _, _) = logits.select_nth_unstable_by(k, |a, b| b.0.total_cmp(&a.0));
        kept.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let top = logits[0].0;
        let weights: Vec<f64> = logits.iter().map(|(x, _)| (x - top).exp()).collect();
        let (all, kept) = (
            weights.iter().sum::<f64>(),
            weights[..k].iter().sum::<f64>(),
        );
        let probs = weights[..k].iter().map(|w| (w / kept) as f32).collect();
        let ids = logits[..k].iter().map(|entry| entry.1).collect();
        BeliefPacket::new(ids, probs, (kept / all) as f32, vocab).unwrap()
    }

    /// A Zipf law with this exponent over uniform ids.
    fn zipf(&mut self, vocab: u32, k: usize, exponent: f64) -> BeliefPacket {
        let mut ids = std::collections::BTreeSet::new();
        while ids.len() < k {
            ids.insert((self.uniform() * f64::from(vocab)) as u32);
        }
        let weights: Vec<f64> = (1..=k).map(|rank| (rank as f64).powf(-exponent)).collect();
        let sum: f64 = weights.iter().sum();
        // The order of the set is of no meaning; the largest goes to a random one.
        let start = (self.uniform() * k as f64) as usize;
        let ids: Vec<u32> = ids.into_iter().collect();
        let ids = ids.iter().copied().cycle();
        let ids = ids.skip(start).step_by(7).take(k).collect();
        let probs = weights.iter().map(|w| (w / sum) as f32).collect();
        BeliefPacket::new(ids, probs, 0.9, vocab).unwrap()
    }
}

fn entropy(packet: &BeliefPacket) -> f64 {
    let terms = packet.iter().filter(|(_, p)| *p > 0.0);
    -terms
        .map(|(_, p)| f64::from(p) * f64::from(p).ln())
        .sum::<f64>()
}

/// `cargo test -p dlmom-packet realistic -- --nocapture` prints the table of the README.
#[test]
fn realistic_packets_are_short_and_close() {
    let (vocab, k) = (151_665, 50);
    let mut draw = Draw(1);
    let mut families: Vec<(String, Vec<BeliefPacket>)> = Vec::new();
    for skewed in [true, false] {
        for temperature in [0.1, 0.3, 0.6, 1.0, 1.6] {
            let ids = if skewed { "low" } else { "uniform" };
            let name = format!("softmax at {temperature}, {ids} ids");
            let list = (0..4)
                .map(|_| draw.packet(vocab, k, temperature, skewed))
                .collect();
            families.push((name, list));
        }
    }
    for exponent in [0.0, 1.0, 2.0, 4.0] {
        let name = format!("Zipf law of {exponent}, uniform ids");
        let list = (0..50).map(|_| draw.zipf(vocab, k, exponent)).collect();
        families.push((name, list));
    }

    println!(
        "| packets | entropy | bytes, mean | max | KL, mean | max |\n|---|---|---|---|---|---|"
    );
    let (mut bytes, mut kls) = (Vec::new(), Vec::new());
    for (name, list) in &families {
        let lens: Vec<f64> = list.iter().map(|p| compact(p).len() as f64).collect();
        let kl: Vec<f64> = list.iter().map(divergence).collect();
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        let max = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
        println!(
            "| {name} | {:.2} | {:.1} | {} | {:.1e} | {:.1e} |",
            mean(&list.iter().map(entropy).collect::<Vec<_>>()),
            mean(&lens),
            max(&lens),
            mean(&kl),
            max(&kl)
        );
        assert!(mean(&lens) <= 190.0 && mean(&kl) <= 1e-3, "{name}");
        // A family weighs as one, however many packets it has.
        bytes.push(mean(&lens));
        kls.push(mean(&kl));
        assert!(max(&lens) <= max_encoded_len(k, vocab, Encoding::Compact) as f64);
        assert!(max(&kl) <= divergence_bound(k), "{name}");
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    println!("| all | | {:.1} | | {:.1e} | |", mean(&bytes), mean(&kls));
    assert!(mean(&bytes) <= 170.0);
    assert!(mean(&kls) <= 5e-4);
    assert_eq!(max_encoded_len(k, vocab, Encoding::Compact), 173);
    assert!(divergence_bound(k) < 1e-3);
}

#[test]
fn a_certain_token_is_exact() {
    for (id, vocab) in [
        (0, 1),
        (3, 4),
        (151_664, 151_665),
        (MAX_VOCAB - 1, MAX_VOCAB),
    ] {
        let packet = BeliefPacket::one_hot(id, vocab).unwrap();
        assert_eq!(decode_exact(&compact(&packet)).unwrap().packet, packet);
    }
    // A single entry is certain, even where a sum in f32 left it a hair below.
    let hair = packet(&[(1, 0.999_999_5)], 0.5, 4);
    let decoded = decode_exact(&compact(&hair)).unwrap().packet;
    assert_eq!(decoded.probs(), [1.0]);
}

#[test]
fn powers_of_two_and_zeros_are_exact() {
    let entries = [
        (9, 0.5),
        (0, 0.25),
        (1, 0.125),
        (7, 0.125),
        (2, 0.0),
        (3, 0.0),
    ];
    let packet = packet(&entries, 1.0, 10);
    assert_eq!(decode_exact(&compact(&packet)).unwrap().packet, packet);
}

#[test]
fn what_is_below_the_floor_stays_above_zero() {
    let packet = packet(&[(1, 1.0), (2, 1e-40), (3, 1e-12), (0, 0.0)], 1.0, 4);
    let decoded = decode_exact(&compact(&packet)).unwrap().packet;
    let floor = (-31.75_f32).exp2();
    assert_eq!(decoded.ids(), [1, 2, 3, 0]);
    for (q, wanted) in decoded.probs().iter().zip([1.0, floor, floor, 0.0]) {
        assert!((q - wanted).abs() <= 1e-6 * wanted, "{q} {wanted}");
    }
}

#[test]
fn long_packets_are_as_close() {
    // The longest there are go through every encoding elsewhere.
    let k = 1 << 17;
    let falling: Vec<f64> = (1..=k).map(|rank| 1.0 / f64::from(rank)).collect();
    let sum: f64 = falling.iter().sum();
    let probs: Vec<f32> = falling.iter().map(|w| (w / sum) as f32).collect();
    let ids = (0..k).map(|i| i * 127).collect();
    let packet = BeliefPacket::new(ids, probs, 1.0, MAX_VOCAB).unwrap();
    let bytes = compact(&packet);
    assert!(bytes.len() <= max_encoded_len(packet.k(), MAX_VOCAB, Encoding::Compact));
    assert!(divergence(&packet) <= divergence_bound(packet.k()));
    let again = decode_exact(&bytes).unwrap().packet;
    assert_eq!(compact(&again), bytes);
}

/// Every field of the body that can be wrong behind a right checksum, and the error that is its own.
#[test]
fn each_corrupted_field_has_its_error() {
    // Ids 2, 5, 7: gaps 2, 2, 1, two bits too few to gain from a remainder; in bits 001 001 01. Codes 128, 128, 0 at
    // scale 4.
    let bytes = compact(&example());
    let body = HEADER_LEN;
    assert_eq!(bytes[body..body + 6], [4, 0, 0b1010_0100, 128, 128, 0]);
    let lone = compact(&BeliefPacket::one_hot(3, 4).unwrap());
    assert_eq!(lone[body..body + 4], [7, 1, 0b0000_0101, 0]);
    let wide = compact(&packet(&[(1, 1.0), (2, 1e-12), (3, 0.0)], 1.0, 4));
    let mut shorter = bytes.clone();
    shorter.remove(body + 5);
    reseal(&mut shorter);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("scale 8", patched(&bytes, body, &[8])),
        ("scale coarser", patched(&bytes, body, &[3])),
        ("scale finer", patched(&bytes, body, &[5])),
        ("codes all small", patched(&bytes, body + 3, &[127, 127, 0])),
        (
            "codes all but one zero",
            patched(&bytes, body + 3, &[255, 255, 0]),
        ),
        ("no top", patched(&bytes, body + 5, &[1])),
        ("no top, all zero", patched(&bytes, body + 3, &[255; 3])),
        ("no top, a zero", patched(&wide, body + 3, &[1])),
        ("Rice 24", patched(&bytes, body + 1, &[24])),
        ("Rice 255", patched(&bytes, body + 1, &[255])),
        ("Rice 23", patched(&bytes, body + 1, &[23])),
        ("Rice 1, id past the end", patched(&bytes, body + 1, &[1])),
        ("quotients without end", patched(&bytes, body + 2, &[0; 4])),
        (
            "one zero too many",
            patched(&lone, body + 1, &[0, 0b0001_0000]),
        ),
        (
            "quotient past the end",
            patched(&lone, body + 2, &[0b0000_1000]),
        ),
        ("id is vocab", patched(&lone, 8, &[3])),
        ("padding", patched(&lone, body + 2, &[0b1000_0101])),
        (
            "padding beside the last",
            patched(&lone, body + 2, &[0b0000_1101]),
        ),
        (
            "Rice too small",
            patched(&lone, body + 1, &[0, 0b0000_1000]),
        ),
        (
            "Rice too large",
            patched(&lone, body + 1, &[2, 0b0000_0111]),
        ),
        ("mass", patched(&bytes, 28, &0.0_f32.to_le_bytes())),
        ("k one less", patched(&bytes, 24, &[2])),
        ("k one more", patched(&bytes, 24, &[4])),
        ("one byte less", shorter),
        ("trailing", [bytes.as_slice(), &[0]].concat()),
        ("cut", bytes[..body].to_vec()),
        ("cut", bytes[..=body].to_vec()),
        ("cut", bytes[..body + 2].to_vec()),
        ("cut", bytes[..body + 3].to_vec()),
        ("cut", bytes[..body + 5].to_vec()),
        ("cut", bytes[..body + 6].to_vec()),
        ("cut", bytes[..body + 9].to_vec()),
    ];
    let report: Vec<String> = cases
        .iter()
        .map(|(what, bytes)| {
            decode_exact(bytes).map_or_else(
                |error| format!("{what} | {} | {error}", error.name()),
                |decoded| format!("{what} | {:?}", decoded.packet),
            )
        })
        .collect();
    insta::assert_snapshot!(report.join("\n"));
}

#[test]
fn a_claim_of_many_entries_is_refused_before_anything_is_read() {
    let mut bytes = compact(&example());
    bytes[8..12].copy_from_slice(&MAX_VOCAB.to_le_bytes());
    bytes[24..28].copy_from_slice(&(MAX_K as u32).to_le_bytes());
    for rice in 0..=23 {
        bytes[HEADER_LEN + 1] = rice;
        let error = decode_exact(&bytes).unwrap_err();
        assert!(matches!(error, DecodeError::Truncated { .. }), "{error}");
    }
}

proptest! {
    #[test]
    fn compact_is_close_and_has_one_form(packet in packets(), meta in metas()) {
        let bytes = encode(&packet, meta, Encoding::Compact).unwrap();
        prop_assert_eq!(bytes.len(), packet_len(&packet, Encoding::Compact));
        prop_assert!(bytes.len() <= max_encoded_len(packet.k(), packet.vocab(), Encoding::Compact));
        let decoded = decode_exact(&bytes).unwrap();
        prop_assert_eq!((decoded.meta, decoded.encoding), (meta, Encoding::Compact));
        let near = decoded.packet;
        prop_assert!(is_canonical(&near));
        prop_assert_eq!((near.k(), near.mass(), near.vocab()), (packet.k(), packet.mass(), packet.vocab()));
        prop_assert_eq!(encode(&near, meta, Encoding::Compact).unwrap(), bytes);

        let kl = divergence(&packet);
        prop_assert!(kl <= divergence_bound(packet.k()), "KL {}", kl);
        let encoding = Encoding::Compact;
        let t = encoding.sum_tolerance(packet.k());
        for (id, q) in near.iter() {
            let (p, q) = (prob(&packet, id), f64::from(q));
            prop_assert_eq!(p == 0.0, q == 0.0);
            let bound = ((encoding.relative_error() + t) * p + encoding.absolute_error()) / (1.0 - t) + 1e-7 * q;
            prop_assert!((q - p).abs() <= bound, "id {}: {} became {}", id, p, q);
        }
    }

    /// Flat packets, down to where a step of f32 matters.
    #[test]
    fn flat_packets_have_one_form(
        spread in -24..0_i32,
        weights in proptest::collection::vec(0.0..1.0_f32, 1..64),
    ) {
        let weights: Vec<f32> = weights.iter().map(|w| 1.0 + w * (spread as f32).exp2()).collect();
        let sum: f32 = weights.iter().sum();
        let ids = (0..weights.len() as u32).collect();
        let probs = weights.iter().map(|w| w / sum).collect();
        let packet = BeliefPacket::new(ids, probs, 1.0, 64).unwrap();
        let bytes = encode(&packet, Meta::default(), Encoding::Compact).unwrap();
        let decoded = decode_exact(&bytes).unwrap().packet;
        prop_assert_eq!(encode(&decoded, Meta::default(), Encoding::Compact).unwrap(), bytes);
        prop_assert!(divergence(&packet) <= divergence_bound(packet.k()));
    }

    /// Bodies of any bytes, behind a right header and checksum: an error, or the one form of what they decode to.
    #[test]
    fn any_body_is_an_error_or_canonical(
        k in 1..6_u32,
        rice in 0..4_u8,
        ids in proptest::collection::vec(any::<u8>(), 0..4),
        codes in proptest::collection::vec(prop_oneof![Just(0_u8), Just(255), any::<u8>()], 1..6),
        scale in 0..9_u8,
    ) {
        let mut bytes = compact(&packet(&[(0, 1.0)], 1.0, 64))[..HEADER_LEN].to_vec();
        bytes[24..28].copy_from_slice(&k.to_le_bytes());
        bytes.extend_from_slice(&[scale, rice]);
        bytes.extend_from_slice(&ids);
        bytes.extend_from_slice(&codes);
        bytes.extend_from_slice(&[0; 4]);
        reseal(&mut bytes);
        if let Ok(decoded) = decode_exact(&bytes) {
            prop_assert!(is_canonical(&decoded.packet));
            prop_assert_eq!(compact(&decoded.packet), bytes);
        }
    }
}
