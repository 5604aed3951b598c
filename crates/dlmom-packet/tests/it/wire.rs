//! The wire format field by field.

use dlmom_packet::{
    BeliefPacket, DecodeError, Encoding, MAX_K, MAX_PACKET_BYTES, MAX_VOCAB, MIN_PACKET_BYTES,
    Meta, PacketReader, UnknownEncodingName, decode, decode_exact, encode, encode_into,
    encoded_len, max_encoded_len, packet_len,
};

use crate::support::{META, example, packet, patched, unhex};

fn example_bytes(encoding: Encoding) -> Vec<u8> {
    encode(&example(), META, encoding).unwrap()
}

#[test]
fn readme_example_is_what_the_encoder_writes() {
    let readme = include_str!("../../README.md");
    let block = readme
        .split("```text\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    // The hexadecimal column is 24 characters wide.
    let column: Vec<String> = block
        .lines()
        .map(|line| line.chars().take(24).collect())
        .collect();
    let bytes = unhex(&column.join("\n"));
    assert_eq!(bytes, example_bytes(Encoding::F16));
    let decoded = decode_exact(&bytes).unwrap();
    assert_eq!((decoded.packet, decoded.meta), (example(), META));
    assert_eq!(decoded.encoding, Encoding::F16);
}

#[test]
fn readme_states_the_limits() {
    let readme = include_str!("../../README.md");
    for line in [
        format!("| `MAX_K` | 2^20 = {MAX_K} |"),
        format!("| `MAX_VOCAB` | 2^24 = {MAX_VOCAB} |"),
        format!("= {} |", dlmom_packet::MAX_TRANSCRIPT_PACKETS),
        format!("| `MAX_EMBED` | 2^20 = {} |", dlmom_packet::MAX_EMBED),
        format!("= {MAX_PACKET_BYTES} bytes |"),
        format!("= {} bytes |", dlmom_packet::MAX_DENSE_BYTES),
    ] {
        assert!(readme.contains(&line), "{line}");
    }
}

#[test]
fn lengths_are_those_of_the_bytes() {
    for encoding in Encoding::ALL {
        for k in [1_u32, 2, 3, 64] {
            let entries: Vec<_> = (0..k).map(|id| (id, 1.0 / k as f32)).collect();
            let packet = packet(&entries, 1.0, 64);
            let bytes = encode(&packet, META, encoding).unwrap();
            assert_eq!(bytes.len(), packet_len(&packet, encoding));
            assert_eq!(
                encoding.fixed_len(k as usize).unwrap_or(bytes.len()),
                bytes.len()
            );
            assert!(bytes.len() <= max_encoded_len(k as usize, 64, encoding));
            assert!(bytes.len() <= encoded_len(k as usize, encoding));
        }
    }
    let shortest = encode(
        &BeliefPacket::one_hot(0, 1).unwrap(),
        META,
        Encoding::Compact,
    );
    assert_eq!(shortest.unwrap().len(), MIN_PACKET_BYTES);
    assert_eq!(encoded_len(50, Encoding::F32), 436);
    assert_eq!(max_encoded_len(50, 151_665, Encoding::Compact), 173);
}

#[test]
fn encode_into_appends() {
    let mut out = b"before".to_vec();
    let written = encode_into(&example(), META, Encoding::Bf16, &mut out).unwrap();
    assert_eq!(&out[..6], b"before");
    assert_eq!(written, out.len() - 6);
    assert_eq!(out[6..], example_bytes(Encoding::Bf16));
}

#[test]
fn tags_and_names_lead_back() {
    for encoding in Encoding::ALL {
        assert_eq!(Encoding::from_tag(encoding.tag()), Some(encoding));
        assert_eq!(encoding.to_string().parse(), Ok(encoding));
    }
    assert_eq!(
        (0..=255).filter_map(Encoding::from_tag).count(),
        Encoding::ALL.len()
    );
    assert_eq!(
        "F32".parse::<Encoding>(),
        Err(UnknownEncodingName("F32".to_owned()))
    );
}

#[test]
fn ties_made_by_rounding_are_sorted_by_id() {
    let packet = packet(&[(9, 0.500_000_1), (3, 0.499_999_9)], 1.0, 10);
    assert_eq!(packet.ids(), [9, 3]);
    for encoding in [Encoding::F16, Encoding::Bf16] {
        let bytes = encode(&packet, META, encoding).unwrap();
        let decoded = decode_exact(&bytes).unwrap().packet;
        assert_eq!(
            (decoded.ids(), decoded.probs()),
            ([3, 9].as_slice(), [0.5, 0.5].as_slice())
        );
    }
}

#[test]
fn underflow_keeps_the_entry_with_probability_zero() {
    let tiny = (-25.0_f32).exp2();
    let packet = packet(&[(4, 1.0), (8, 3e-9), (1, tiny)], 1.0, 10);
    let decoded = decode_exact(&encode(&packet, META, Encoding::F16).unwrap())
        .unwrap()
        .packet;
    // 2^-25 lies halfway between zero and the least subnormal, and zero is even.
    assert_eq!(decoded.ids(), [4, 1, 8]);
    assert_eq!(decoded.probs(), [1.0, 0.0, 0.0]);
}

#[test]
fn the_largest_packets_survive_every_encoding() {
    let k = MAX_K as u32;
    let uniform = vec![1.0 / k as f32; MAX_K];
    // 15.49 steps of f16's subnormals, all rounded down, and one entry with the rest: the sum is off by nearly all of
    // what the tolerance allows for this many entries.
    let mut low = vec![15.49 * (-24.0_f32).exp2(); MAX_K];
    low[0] = (1.0 - f64::from(low[1]) * f64::from(k - 1)) as f32;
    for probs in [uniform, low] {
        let packet = BeliefPacket::new((0..k).collect(), probs, 1.0, MAX_VOCAB).unwrap();
        for encoding in Encoding::ALL {
            let bytes = encode(&packet, META, encoding).unwrap();
            assert!(bytes.len() <= MAX_PACKET_BYTES);
            let decoded = decode_exact(&bytes).unwrap().packet;
            assert_eq!(decoded.k(), MAX_K, "{encoding}");
            let sum: f64 = decoded.probs().iter().map(|&p| f64::from(p)).sum();
            assert!((sum - 1.0).abs() < 1e-6, "{encoding}: {sum}");
        }
    }
}

/// Every field that can be wrong behind a right checksum, and the error that is its own.
#[test]
fn each_corrupted_field_has_its_error() {
    let f32s = example_bytes(Encoding::F32);
    let f16s = example_bytes(Encoding::F16);
    let bf16s = example_bytes(Encoding::Bf16);
    let nan = f32::NAN.to_le_bytes();
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("magic", patched(&f32s, 0, b"DLTR")),
        ("version 0", patched(&f32s, 4, &[0])),
        ("version 2", patched(&f32s, 4, &[2])),
        ("flags", patched(&f32s, 5, &[0x80])),
        ("encoding 0", patched(&f32s, 6, &[0])),
        ("encoding compact", patched(&f32s, 6, &[4])),
        ("encoding 8", patched(&f32s, 6, &[8])),
        ("encoding dense", patched(&f32s, 6, &[5])),
        ("reserved", patched(&f32s, 7, &[1])),
        (
            "vocab over limit",
            patched(&f32s, 8, &(MAX_VOCAB + 1).to_le_bytes()),
        ),
        ("vocab below k", patched(&f32s, 8, &2_u32.to_le_bytes())),
        ("k zero", patched(&f32s, 24, &[0; 4])),
        (
            "k over limit",
            patched(&f32s, 24, &(MAX_K as u32 + 1).to_le_bytes()),
        ),
        ("k over vocab", patched(&f32s, 24, &11_u32.to_le_bytes())),
        ("k one more", patched(&f32s, 24, &4_u32.to_le_bytes())),
        (
            "k all of the vocabulary",
            patched(&f32s, 24, &10_u32.to_le_bytes()),
        ),
        ("k one less", patched(&f32s, 24, &2_u32.to_le_bytes())),
        ("mass zero", patched(&f32s, 28, &0.0_f32.to_le_bytes())),
        (
            "mass negative",
            patched(&f32s, 28, &(-0.5_f32).to_le_bytes()),
        ),
        (
            "mass above 1",
            patched(&f32s, 28, &1.000_000_1_f32.to_le_bytes()),
        ),
        ("mass NaN", patched(&f32s, 28, &nan)),
        ("id out of range", patched(&f32s, 36, &10_u32.to_le_bytes())),
        ("duplicate id", patched(&f32s, 40, &7_u32.to_le_bytes())),
        ("order by id", patched(&f32s, 36, &6_u32.to_le_bytes())),
        (
            "order by probability",
            patched(&f32s, 48, &0.75_f32.to_le_bytes()),
        ),
        ("probability NaN", patched(&f32s, 44, &nan)),
        (
            "probability infinite",
            patched(&f32s, 48, &f32::INFINITY.to_le_bytes()),
        ),
        (
            "probability negative",
            patched(&f32s, 52, &(-0.25_f32).to_le_bytes()),
        ),
        (
            "probability negative zero",
            patched(&f32s, 52, &(-0.0_f32).to_le_bytes()),
        ),
        (
            "probability above 1",
            patched(&f32s, 44, &1.5_f32.to_le_bytes()),
        ),
        ("f16 NaN", patched(&f16s, 44, &0x7e00_u16.to_le_bytes())),
        (
            "f16 infinite",
            patched(&f16s, 44, &0x7c00_u16.to_le_bytes()),
        ),
        (
            "f16 negative zero",
            patched(&f16s, 48, &0x8000_u16.to_le_bytes()),
        ),
        ("bf16 NaN", patched(&bf16s, 46, &0x7fc0_u16.to_le_bytes())),
        ("sum low", patched(&f32s, 52, &0.0_f32.to_le_bytes())),
        (
            "sum off in f32",
            patched(&f32s, 44, &0.500_002_f32.to_le_bytes()),
        ),
        (
            "sum off in f16",
            patched(&f16s, 44, &0x3802_u16.to_le_bytes()),
        ),
        (
            "sum off in bf16",
            patched(&bf16s, 44, &0x3f02_u16.to_le_bytes()),
        ),
        ("trailing", [f32s.as_slice(), &[0]].concat()),
        ("two packets", [f32s.as_slice(), &f16s].concat()),
        ("nothing", Vec::new()),
    ];
    for cut in [3, 31, 32, 43, 44, 55, 56, 59] {
        cases.push(("cut", f32s[..cut].to_vec()));
    }
    let mut flipped = f32s.clone();
    flipped[59] ^= 1;
    cases.push(("checksum", flipped));

    let report: Vec<String> = cases
        .iter()
        .map(|(what, bytes)| {
            let error = decode_exact(bytes).unwrap_err();
            format!("{what} | {} | {error}", error.name())
        })
        .collect();
    insta::assert_snapshot!(report.join("\n"));
}

#[test]
fn rounding_within_the_tolerance_is_accepted_and_renormalised() {
    let bf16s = example_bytes(Encoding::Bf16);
    // 0.50390625, one step of bf16 above 0.5: the sum is 1.00390625, within 2^-8 + 2e-6.
    let bytes = patched(&bf16s, 44, &0x3f01_u16.to_le_bytes());
    let packet = decode_exact(&bytes).unwrap().packet;
    let sum: f64 = packet.probs().iter().map(|&p| f64::from(p)).sum();
    assert!((sum - 1.0).abs() < 1e-7);
    assert_eq!(packet.probs()[0], (0.503_906_25_f64 / 1.003_906_25) as f32);
}

#[test]
fn decode_says_how_much_it_took() {
    let mut bytes = example_bytes(Encoding::F16);
    bytes.extend_from_slice(b"rest");
    let (decoded, consumed) = decode(&bytes).unwrap();
    assert_eq!((decoded.packet, consumed), (example(), 54));
    assert_eq!(
        decode_exact(&bytes),
        Err(DecodeError::TrailingBytes {
            offset: 54,
            count: 4
        })
    );
}

#[test]
fn reader_walks_ends_and_stays_ended() {
    let mut stream = Vec::new();
    for (step, encoding) in Encoding::ALL.into_iter().enumerate() {
        let meta = Meta {
            step: step as u32,
            ..META
        };
        encode_into(&example(), meta, encoding, &mut stream).unwrap();
    }
    let mut reader = PacketReader::new(&stream);
    for (step, encoding) in Encoding::ALL.into_iter().enumerate() {
        let decoded = reader.next().unwrap().unwrap();
        assert_eq!(
            (decoded.meta.step, decoded.encoding),
            (step as u32, encoding)
        );
    }
    assert_eq!(reader.offset(), stream.len());
    assert!(reader.next().is_none());
    assert!(PacketReader::new(&[]).next().is_none());
}

#[test]
fn reader_stops_at_the_first_error_with_its_place_in_the_stream() {
    let first = example_bytes(Encoding::F32);
    let mut stream = [first.as_slice(), &first, &first].concat();
    stream[first.len() + 5] = 1;
    let mut reader = PacketReader::new(&stream);
    assert!(reader.next().unwrap().is_ok());
    let error = reader.next().unwrap().unwrap_err();
    assert_eq!(
        error,
        DecodeError::UnknownFlags {
            offset: first.len() + 5,
            flags: 1
        }
    );
    assert_eq!(reader.offset(), first.len());
    assert!(reader.next().is_none());
    assert!(reader.next().is_none());
}
