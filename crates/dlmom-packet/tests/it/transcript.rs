//! Transcripts: order, byte accounting, and one error per way their bytes can be wrong.

use dlmom_packet::{
    BeliefPacket, Encoding, MAX_TRANSCRIPT_PACKETS, MAX_VOCAB, TRANSCRIPT_HEADER_LEN, Transcript,
    encoded_len,
};

use crate::support::{META, example};

fn span() -> Transcript {
    let mut span = Transcript::new(10, META.fingerprint).unwrap();
    span.push(4, example()).unwrap();
    span.push(5, BeliefPacket::one_hot(9, 10).unwrap()).unwrap();
    span.push(7, example().with_probs(vec![0.0, 0.5, 0.5]).unwrap())
        .unwrap();
    span
}

/// Bytes of a transcript with its header patched and the header's checksum made right.
fn patched(at: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = span().encode(Encoding::F32).unwrap();
    bytes[at..at + patch.len()].copy_from_slice(patch);
    let checksum = crc32fast::hash(&bytes[..24]);
    bytes[24..28].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

#[test]
fn keeps_packets_in_order() {
    let span = span();
    assert_eq!((span.len(), span.is_empty(), span.vocab()), (3, false, 10));
    assert_eq!(span.fingerprint(), META.fingerprint);
    assert_eq!(span.steps(), [4, 5, 7]);
    assert!(
        span.iter()
            .map(|(step, packet)| (step, packet.k()))
            .eq([(4, 3), (5, 1), (7, 3)])
    );
    assert_eq!(span.packets()[1].top(), (9, 1.0));
    assert_eq!(span.clone().into_packets(), span.packets());
}

#[test]
fn round_trips_and_accounts_for_its_bytes() {
    for encoding in Encoding::ALL {
        for transcript in [span(), Transcript::new(0, 0).unwrap()] {
            let bytes = transcript.encode(encoding).unwrap();
            assert_eq!(bytes.len(), transcript.encoded_len(encoding));
            // Values of these packets are exact in every encoding.
            assert_eq!(Transcript::decode_exact(&bytes), Ok(transcript));
        }
        if let (Some(three), Some(one)) = (encoding.fixed_len(3), encoding.fixed_len(1)) {
            assert_eq!(
                span().encoded_len(encoding),
                TRANSCRIPT_HEADER_LEN + 2 * three + one
            );
        }
    }
}

#[test]
fn encode_appends_and_decode_says_how_much_it_took() {
    let mut bytes = Vec::new();
    let first = span().encode_into(Encoding::F16, &mut bytes).unwrap();
    span().encode_into(Encoding::F32, &mut bytes).unwrap();
    assert_eq!(Transcript::decode(&bytes), Ok((span(), first)));
    assert_eq!(Transcript::decode_exact(&bytes[first..]), Ok(span()));
}

#[test]
fn truncation_at_every_length_is_an_error() {
    let bytes = span().encode(Encoding::F32).unwrap();
    for len in 0..bytes.len() {
        assert!(Transcript::decode(&bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn every_bit_matters() {
    let bytes = span().encode(Encoding::F16).unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Transcript::decode_exact(&flipped).is_err(), "{bit}");
    }
}

#[test]
fn each_way_to_be_wrong_has_its_error() {
    let mut grown = span();
    let pushes = [
        grown.push(7, example()).unwrap_err(),
        grown
            .push(8, BeliefPacket::one_hot(9, 11).unwrap())
            .unwrap_err(),
        Transcript::new(MAX_VOCAB + 1, 0).unwrap_err(),
    ];
    assert_eq!(grown, span());

    let sealed = span().encode(Encoding::F32).unwrap();
    let first_packet = TRANSCRIPT_HEADER_LEN;
    let second_packet = first_packet + encoded_len(3, Encoding::F32);
    let mut unsealed = sealed.clone();
    unsealed[20] = 2;
    let mut broken = sealed.clone();
    broken[second_packet + 6] = 0;
    let swapped = [
        &sealed[..first_packet],
        &sealed[second_packet..second_packet + encoded_len(1, Encoding::F32)],
        &sealed[first_packet..second_packet],
        &sealed[second_packet + encoded_len(1, Encoding::F32)..],
    ]
    .concat();
    let over = MAX_TRANSCRIPT_PACKETS as u32;
    let decodes = [
        b"".to_vec(),
        sealed[..27].to_vec(),
        sealed[first_packet..].to_vec(),
        patched(4, &[2]),
        patched(5, &[1]),
        patched(7, &[1]),
        patched(8, &11_u32.to_le_bytes()),
        patched(8, &u32::MAX.to_le_bytes()),
        patched(12, &[0]),
        // A huge count, allowed and not: neither may allocate for it.
        patched(20, &over.to_le_bytes()),
        patched(20, &(over + 1).to_le_bytes()),
        patched(20, &2_u32.to_le_bytes()),
        unsealed,
        broken,
        swapped,
        [sealed.as_slice(), b"!"].concat(),
    ]
    .map(|bytes| Transcript::decode_exact(&bytes).unwrap_err());
    let report: Vec<String> = pushes
        .iter()
        .chain(&decodes)
        .map(std::string::ToString::to_string)
        .collect();
    insta::assert_snapshot!(report.join("\n"));
}
