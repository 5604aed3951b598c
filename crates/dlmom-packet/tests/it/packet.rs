//! Construction: what is accepted, what becomes of it, and one error per broken rule.

use dlmom_packet::{BeliefPacket, MAX_K, MAX_VOCAB, PacketError};

use crate::support::{example, packet};

fn new(ids: &[u32], probs: &[f32], mass: f32, vocab: u32) -> Result<BeliefPacket, PacketError> {
    BeliefPacket::new(ids.to_vec(), probs.to_vec(), mass, vocab)
}

#[test]
fn sorts_by_probability_then_id() {
    let packet = packet(&[(5, 0.25), (9, 0.0), (7, 0.5), (2, 0.25)], 0.5, 10);
    assert_eq!(packet.ids(), [7, 2, 5, 9]);
    assert_eq!(packet.probs(), [0.5, 0.25, 0.25, 0.0]);
    assert_eq!(packet.top(), (7, 0.5));
    assert_eq!((packet.k(), packet.mass(), packet.vocab()), (4, 0.5, 10));
    assert!(packet.iter().eq([(7, 0.5), (2, 0.25), (5, 0.25), (9, 0.0)]));
    assert_eq!(
        packet.into_parts(),
        (vec![7, 2, 5, 9], vec![0.5, 0.25, 0.25, 0.0])
    );
}

#[test]
fn renormalises_beyond_the_slack_only() {
    let packet = new(&[0, 1], &[0.6005, 0.4], 1.0, 2).unwrap();
    let sum: f64 = packet.probs().iter().map(|&p| f64::from(p)).sum();
    assert!((sum - 1.0).abs() < 1e-7, "{sum}");

    let kept = [0.5 + 6e-7, 0.5 - 1.2e-7];
    assert_eq!(new(&[0, 1], &kept, 1.0, 2).unwrap().probs(), kept);
}

#[test]
fn ties_made_by_renormalising_go_by_id() {
    // Adjacent floats that division by their sum with the rest makes equal.
    let near = f32::from_bits(0.1_f32.to_bits() + 1);
    for rest in (0..4000).map(|i| 0.7995 + i as f32 * 2.5e-7) {
        let packet = new(&[3, 1, 2], &[near, 0.1, rest], 1.0, 4).unwrap();
        let (ids, probs) = (packet.ids(), packet.probs());
        assert_eq!(ids[0], 2);
        assert!(
            probs[1] > probs[2] || (probs[1] == probs[2] && ids[1] < ids[2]),
            "{packet:?}"
        );
    }
}

#[test]
fn negative_zero_and_a_hair_above_one_become_canonical() {
    let packet = new(&[1, 0], &[-0.0, 1.000_000_5], 1.000_5, 2).unwrap();
    assert_eq!(packet.probs()[0].to_bits(), 1.0_f32.to_bits());
    assert_eq!(packet.probs()[1].to_bits(), 0);
    assert_eq!(packet.mass(), 1.0);
}

#[test]
fn one_hot_is_one_certain_token() {
    let packet = BeliefPacket::one_hot(3, 4).unwrap();
    assert_eq!(
        (packet.top(), packet.k(), packet.mass()),
        ((3, 1.0), 1, 1.0)
    );
    assert_eq!(
        BeliefPacket::one_hot(4, 4),
        Err(PacketError::IdOutOfRange {
            index: 0,
            id: 4,
            vocab: 4
        })
    );
    assert_eq!(
        BeliefPacket::one_hot(0, 0),
        Err(PacketError::KOverVocab { k: 1, vocab: 0 })
    );
}

#[test]
fn with_probs_keeps_ids_and_mass() {
    let noisy = example().with_probs(vec![0.1, 0.2, 0.7]).unwrap();
    assert_eq!((noisy.ids(), noisy.mass()), ([5, 2, 7].as_slice(), 0.875));
    assert_eq!(
        example().with_probs(vec![1.0]),
        Err(PacketError::LengthMismatch { ids: 3, probs: 1 })
    );
}

#[test]
fn the_largest_packet_is_a_packet() {
    let probs = vec![1.0 / MAX_K as f32; MAX_K];
    let packet = BeliefPacket::new((0..MAX_K as u32).rev().collect(), probs, 1.0, MAX_VOCAB);
    assert_eq!(packet.unwrap().top(), (0, 1.0 / MAX_K as f32));
}

#[test]
fn each_broken_rule_has_its_error() {
    let half = [0.5, 0.5];
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let over = MAX_K + 1;
    let cases = [
        (new(&[1, 2], &[1.0], 1.0, 4), "2 ids but 1 probabilities"),
        (new(&[], &[], 1.0, 4), "a packet needs at least one entry"),
        (
            BeliefPacket::new(vec![0; over], vec![0.0; over], 1.0, MAX_VOCAB),
            "1048577 entries, the limit is 1048576",
        ),
        (
            new(&[1, 2], &half, 1.0, MAX_VOCAB + 1),
            "vocabulary of 16777217, the limit is 16777216",
        ),
        (
            new(&[0, 1], &half, 1.0, 1),
            "2 entries from a vocabulary of 1",
        ),
        (
            new(&[1, 4], &half, 1.0, 4),
            "entry 1: id 4 is outside the vocabulary of 4",
        ),
        (
            new(&[3, 3], &half, 1.0, 4),
            "entries 0 and 1 have the same id 3",
        ),
        (
            new(&[1, 2], &[1.0, nan], 1.0, 4),
            "entry 1 (id 2): probability NaN is not finite",
        ),
        (
            new(&[1, 2], &[inf, 0.0], 1.0, 4),
            "entry 0 (id 1): probability inf is not finite",
        ),
        (
            new(&[1, 2], &[1.5, -0.5], 1.0, 4),
            "entry 1 (id 2): probability -0.5 is negative",
        ),
        (
            new(&[1, 2], &[0.5, 0.25], 1.0, 4),
            "probabilities sum to 0.75, which is not 1 within 0.001",
        ),
        (new(&[1, 2], &half, 0.0, 4), "mass 0 is not in (0, 1]"),
        (new(&[1, 2], &half, 1.5, 4), "mass 1.5 is not in (0, 1]"),
        (new(&[1, 2], &half, nan, 4), "mass NaN is not in (0, 1]"),
        (new(&[1, 2], &half, inf, 4), "mass inf is not in (0, 1]"),
    ];
    for (result, message) in cases {
        assert_eq!(result.unwrap_err().to_string(), message);
    }
}
