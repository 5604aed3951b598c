//! What holds for every packet and for any bytes.

use dlmom_packet::{
    BeliefPacket, DecodeError, Encoding, HEADER_LEN, MAX_VOCAB, Meta, PacketReader, Transcript,
    decode, decode_exact, encode, encode_into, encoded_len,
};
use half::{bf16, f16};
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use crate::support::reseal;

pub(crate) fn packets() -> impl Strategy<Value = BeliefPacket> {
    let vocab = prop_oneof![1..=40_u32, 1..=200_000_u32, Just(MAX_VOCAB)];
    // Probabilities over forty decimal orders, with zeros and ties.
    let weight = prop_oneof![
        6 => (-16.0..0.0_f32).prop_map(f32::exp),
        2 => (-92.0..0.0_f32).prop_map(f32::exp),
        1 => Just(0.0_f32),
        2 => (1..=4_u8).prop_map(|i| f32::from(i) / 4.0),
    ];
    vocab
        .prop_flat_map(move |vocab| {
            let ids = btree_set(0..vocab, 1..=48.min(vocab as usize));
            (
                ids,
                vec(weight.clone(), 48),
                1e-6..=1.0_f32,
                Just(vocab),
                0..48_usize,
            )
        })
        .prop_map(|(ids, mut weights, mass, vocab, certain)| {
            weights.truncate(ids.len());
            // At least one weight is not zero.
            weights[certain % ids.len()] += 0.5;
            let sum: f32 = weights.iter().sum();
            let probs = weights.iter().map(|weight| weight / sum).collect();
            BeliefPacket::new(ids.into_iter().collect(), probs, mass, vocab).unwrap()
        })
}

pub(crate) fn metas() -> impl Strategy<Value = Meta> {
    (any::<u64>(), any::<u32>()).prop_map(|(fingerprint, step)| Meta { fingerprint, step })
}

fn encodings() -> impl Strategy<Value = Encoding> {
    proptest::sample::select(Encoding::ALL.to_vec())
}

/// Probability that `packet` gives to `id`.
pub(crate) fn prob(packet: &BeliefPacket, id: u32) -> f64 {
    packet
        .iter()
        .find(|entry| entry.0 == id)
        .map_or(0.0, |entry| f64::from(entry.1))
}

pub(crate) fn is_canonical(packet: &BeliefPacket) -> bool {
    let again = BeliefPacket::new(
        packet.ids().to_vec(),
        packet.probs().to_vec(),
        packet.mass(),
        packet.vocab(),
    );
    let bits = |packet: &BeliefPacket| {
        packet
            .probs()
            .iter()
            .map(|p| p.to_bits())
            .collect::<Vec<_>>()
    };
    again.as_ref() == Ok(packet) && again.is_ok_and(|again| bits(&again) == bits(packet))
}

proptest! {
    #[test]
    fn a_packet_made_of_its_own_parts_is_itself(packet in packets(), seed in any::<u64>()) {
        prop_assert!(is_canonical(&packet));
        // And in whatever order the parts come.
        let mut entries: Vec<(u32, f32)> = packet.iter().collect();
        entries.sort_by_key(|entry| u64::from(entry.0).wrapping_mul(seed | 1));
        let (ids, probs) = entries.into_iter().unzip();
        prop_assert_eq!(BeliefPacket::new(ids, probs, packet.mass(), packet.vocab()), Ok(packet));
    }

    #[test]
    fn f32_is_lossless(packet in packets(), meta in metas()) {
        let bytes = encode(&packet, meta, Encoding::F32).unwrap();
        let decoded = decode_exact(&bytes).unwrap();
        prop_assert_eq!(&decoded.packet, &packet);
        prop_assert_eq!(decoded.meta, meta);
        // The bytes are a function of the packet, and the packet of the bytes.
        prop_assert_eq!(encode(&decoded.packet, meta, Encoding::F32).unwrap(), bytes);
    }

    #[test]
    fn rounded_encodings_stay_within_their_bounds(
        packet in packets(),
        meta in metas(),
        encoding in proptest::sample::select(vec![Encoding::F16, Encoding::Bf16]),
    ) {
        let bytes = encode(&packet, meta, encoding).unwrap();
        prop_assert_eq!(bytes.len(), encoded_len(packet.k(), encoding));
        let decoded = decode_exact(&bytes).unwrap();
        prop_assert_eq!(decoded.meta, meta);
        let rounded = decoded.packet;
        prop_assert!(is_canonical(&rounded));
        prop_assert_eq!((rounded.k(), rounded.mass(), rounded.vocab()), (packet.k(), packet.mass(), packet.vocab()));

        let (u, a) = (encoding.relative_error(), encoding.absolute_error());
        let k = packet.k();
        let t = encoding.sum_tolerance(k);
        let (rel, abs) = ((u + t) / (1.0 - t) + 1e-7, a / (1.0 - t));
        let (mut kl, mut lost) = (0.0, 0.0);
        for (id, q) in rounded.iter() {
            let (p, q) = (prob(&packet, id), f64::from(q));
            prop_assert!((q - p).abs() <= rel * p + abs, "id {}: {} became {}", id, p, q);
            if q > 0.0 {
                kl += q * (q / p).ln();
            } else {
                lost += p;
            }
        }
        // KL is at most chi-squared: the sum of (q - p)^2 / p, where p >= a wherever q > 0. Both sums are 1 within 1e-6.
        let bound = rel * rel + 2.0 * rel * abs * k as f64 + k as f64 * abs * abs / a + lost + 2.1e-6;
        prop_assert!(kl <= bound, "KL {} above {}", kl, bound);
        prop_assert!(lost <= k as f64 * a);
    }

    #[test]
    fn rounding_is_to_nearest_even(packet in packets(), encoding in proptest::sample::select(vec![Encoding::F16, Encoding::Bf16])) {
        let bytes = encode(&packet, Meta::default(), encoding).unwrap();
        let value = |bits: u16| match encoding {
            Encoding::F16 => f16::from_bits(bits).to_f64(),
            _ => bf16::from_bits(bits).to_f64(),
        };
        let ids = &bytes[HEADER_LEN..HEADER_LEN + 4 * packet.k()];
        let probs = &bytes[HEADER_LEN + 4 * packet.k()..];
        for (id, bits) in ids.as_chunks::<4>().0.iter().zip(probs.as_chunks::<2>().0) {
            let p = prob(&packet, u32::from_le_bytes(*id));
            let bits = u16::from_le_bytes(*bits);
            let error = (value(bits) - p).abs();
            for neighbour in [bits.saturating_sub(1), bits + 1] {
                let other = (value(neighbour) - p).abs();
                prop_assert!(
                    neighbour == bits || error < other || (error == other && bits.is_multiple_of(2)),
                    "{} became {:#06x}", p, bits
                );
            }
        }
    }

    #[test]
    fn truncation_is_always_an_error(packet in packets(), meta in metas(), encoding in encodings()) {
        let bytes = encode(&packet, meta, encoding).unwrap();
        for len in 0..bytes.len() {
            match decode(&bytes[..len]) {
                Err(DecodeError::Truncated { offset, needed, available, .. }) => {
                    prop_assert_eq!(offset + available, len);
                    prop_assert!(needed > available);
                }
                other => prop_assert!(false, "{}: {:?}", len, other),
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_caught(packet in packets(), meta in metas(), encoding in encodings()) {
        let mut bytes = encode(&packet, meta, encoding).unwrap();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(decode_exact(&bytes).is_err(), "bit {}", bit);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn streams_fall_apart_into_their_packets(list in vec((packets(), metas(), encodings()), 0..6)) {
        let mut stream = Vec::new();
        let mut alone = Vec::new();
        for (packet, meta, encoding) in &list {
            let written = encode_into(packet, *meta, *encoding, &mut stream).unwrap();
            let start = stream.len() - written;
            alone.push(decode_exact(&stream[start..]).unwrap());
        }
        let read: Result<Vec<_>, _> = PacketReader::new(&stream).collect();
        prop_assert_eq!(read.unwrap(), alone);
    }

    #[test]
    fn random_bytes_are_an_error_and_never_a_panic(bytes in vec(any::<u8>(), 0..200)) {
        prop_assert!(decode(&bytes).is_err());
        prop_assert!(Transcript::decode(&bytes).is_err());
        prop_assert!(PacketReader::new(&bytes).count() <= 1);
    }

    /// Past the magic and the checksum, where random bytes alone hardly ever get.
    #[test]
    fn resealed_corruption_is_an_error_or_another_valid_packet(
        packet in packets(),
        meta in metas(),
        encoding in encodings(),
        patches in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = encode(&packet, meta, encoding).unwrap();
        for (at, value) in patches {
            let at = 5 + at.index(bytes.len() - 5);
            bytes[at] = value;
        }
        reseal(&mut bytes);
        if let Ok(decoded) = decode_exact(&bytes) {
            prop_assert!(is_canonical(&decoded.packet));
            if let Some(len) = decoded.encoding.fixed_len(decoded.packet.k()) {
                prop_assert_eq!(len, bytes.len());
            }
            // A packet has one form in these: what decodes is what the encoder writes.
            if matches!(decoded.encoding, Encoding::F32 | Encoding::Compact) {
                prop_assert_eq!(encode(&decoded.packet, decoded.meta, decoded.encoding).unwrap(), bytes);
            }
        }
    }

    #[test]
    fn transcripts_round_trip(list in vec((packets(), 1..5_u32), 0..6), fingerprint in any::<u64>()) {
        let vocab = MAX_VOCAB;
        let mut transcript = Transcript::new(vocab, fingerprint).unwrap();
        let mut step = 0;
        for (packet, ahead) in list {
            step += ahead;
            let (mass, (ids, probs)) = (packet.mass(), packet.into_parts());
            transcript.push(step, BeliefPacket::new(ids, probs, mass, vocab).unwrap()).unwrap();
        }
        for encoding in Encoding::ALL {
            let bytes = transcript.encode(encoding).unwrap();
            prop_assert_eq!(bytes.len(), transcript.encoded_len(encoding));
            let decoded = Transcript::decode_exact(&bytes).unwrap();
            prop_assert_eq!(decoded.steps(), transcript.steps());
            prop_assert!(encoding != Encoding::F32 || decoded == transcript);
        }
    }
}
