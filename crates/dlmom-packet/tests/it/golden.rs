//! The golden vectors in `tests/golden/packet` of the repository, which an independent decoder in Python reads too.
//!
//! `UPDATE_GOLDEN=1 cargo test -p dlmom-packet golden` writes them anew. A change of these bytes is a change of the
//! format.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use dlmom_packet::{
    BeliefPacket, Encoding, MAX_VOCAB, Meta, Scalar, Transcript, decode_dense_exact,
    decode_embed_exact, decode_exact, encode, encode_dense_into, encode_embed_into,
};

use crate::support::{META, example, hex, packet};

fn cases() -> Vec<(&'static str, BeliefPacket, Meta)> {
    let power = |exponent: f32| exponent.exp2();
    let geometric: Vec<(u32, f32)> = (0..16)
        .map(|i| {
            (
                15 - i,
                if i == 15 {
                    power(-15.0)
                } else {
                    power(-1.0 - i as f32)
                },
            )
        })
        .collect();
    let thirds: Vec<(u32, f32)> = [151_664, 0, 77].map(|id| (id, 1.0 / 3.0)).to_vec();
    let halfway = [
        // Halfway between neighbours of bf16: one goes down to the even one, one up.
        (6, 0.5 + power(-9.0)),
        (4, 0.25 + 3.0 * power(-10.0)),
        (2, 0.25 - 3.0 * power(-10.0) - power(-9.0)),
    ];
    let f16_halfway = [
        (6, 0.5 + power(-12.0)),
        (4, 0.25 + 3.0 * power(-13.0)),
        (2, 0.25 - 3.0 * power(-13.0) - power(-12.0)),
    ];
    // Falling weights over ids that crowd at the low end.
    let zipf: Vec<(u32, f32)> = (1..=50_u32)
        .map(|rank| (rank * rank * rank * 977 % 151_665, 1.0 / rank as f32))
        .collect();
    let zipf = normalised(&zipf);
    // Nearly uniform, for the finest scale; and over forty orders, for the floor of the coarsest.
    let flat: Vec<(u32, f32)> = (0..32_u32)
        .map(|i| (i * 4_001, 1.0 + i as f32 / 1024.0))
        .collect();
    let flat = normalised(&flat);
    let wide: Vec<(u32, f32)> = (0..40_u32)
        .map(|i| (39 - i, power(-3.3 * i as f32)))
        .collect();
    let wide = normalised(&wide);
    let extremes = Meta {
        fingerprint: u64::MAX,
        step: u32::MAX,
    };
    vec![
        ("readme_example", example(), META),
        ("one_hot", packet(&[(3, 1.0)], 1.0, 4), Meta::default()),
        (
            "largest_id",
            packet(&[(MAX_VOCAB - 1, 0.75), (0, 0.25)], 0.5, MAX_VOCAB),
            extremes,
        ),
        ("whole_vocabulary", packet(&geometric, 1.0, 16), META),
        ("thirds", packet(&thirds, 0.3, 151_665), META),
        (
            "tie_by_rounding",
            packet(&[(9, 0.500_000_1), (3, 0.499_999_9)], 1.0, 10),
            META,
        ),
        (
            "tiny",
            packet(
                &[(4, 1.0), (8, 3e-9), (1, power(-25.0)), (5, 0.0), (6, 1e-42)],
                f32::MIN_POSITIVE,
                10,
            ),
            META,
        ),
        ("bf16_halfway", packet(&halfway, 0.9, 10), META),
        ("f16_halfway", packet(&f16_halfway, 0.9, 10), META),
        ("zipf", packet(&zipf, 0.8, 151_665), META),
        ("flat", packet(&flat, 0.1, 151_665), META),
        ("wide", packet(&wide, 0.9, 40), META),
    ]
}

fn normalised(weights: &[(u32, f32)]) -> Vec<(u32, f32)> {
    let sum: f32 = weights.iter().map(|entry| entry.1).sum();
    weights.iter().map(|&(id, w)| (id, w / sum)).collect()
}

fn render_payloads(text: &mut String) {
    let uneven: Vec<f32> = (0..60_u32).map(|i| (i * 7 % 60 + 1) as f32).collect();
    let sum: f32 = uneven.iter().sum();
    let uneven: Vec<f32> = uneven.iter().map(|w| w / sum).collect();
    let dense: [(&str, &[f32]); 4] = [
        ("certain", &[1.0]),
        ("example", &[0.0, 0.25, 0.5, 0.25]),
        ("thirds", &[1.0 / 3.0; 3]),
        ("uneven", &uneven),
    ];
    let embed: [(&str, &[f32]); 2] = [
        ("one", &[-0.0]),
        ("mixed", &[0.1, -1.5, 65_504.0, 1e-7, 3.0e-39, -2.0 / 3.0]),
    ];
    let case = |name: &str, scalar: Scalar, bytes: &[u8], source: &[f32], values: &[f32]| {
        format!(
            "    {{\n      \"name\": \"{name}\",\n      \"encoding\": \"{scalar}\",\n      \"hex\": \"{}\",\n      \
             \"fingerprint\": \"{:016x}\",\n      \"step\": {},\n      \"source\": {},\n      \"values\": {}\n    }}",
            hex(bytes),
            META.fingerprint,
            META.step,
            bits(source),
            bits(values)
        )
    };
    let (mut denses, mut embeds) = (Vec::new(), Vec::new());
    for scalar in Scalar::ALL {
        for (name, probs) in dense {
            let mut bytes = Vec::new();
            encode_dense_into(probs, META, scalar, &mut bytes).unwrap();
            let decoded = decode_dense_exact(&bytes).unwrap();
            denses.push(case(name, scalar, &bytes, probs, &decoded.probs));
        }
        for (name, values) in embed {
            let mut bytes = Vec::new();
            encode_embed_into(values, scalar, META, &mut bytes).unwrap();
            let decoded = decode_embed_exact(&bytes).unwrap();
            embeds.push(case(name, scalar, &bytes, values, &decoded.values));
        }
    }
    let _ = write!(
        text,
        ",\n  \"dense\": [\n{}\n  ],\n  \"embeds\": [\n{}\n  ]",
        denses.join(",\n"),
        embeds.join(",\n")
    );
}

fn bits(values: &[f32]) -> String {
    let list: Vec<String> = values
        .iter()
        .map(|v| format!("\"{:08x}\"", v.to_bits()))
        .collect();
    format!("[{}]", list.join(", "))
}

fn render() -> String {
    let mut vectors = Vec::new();
    for (name, packet, meta) in cases() {
        for encoding in Encoding::ALL {
            let bytes = encode(&packet, meta, encoding).unwrap();
            let decoded = decode_exact(&bytes).unwrap();
            assert_eq!((decoded.meta, decoded.encoding), (meta, encoding));
            if encoding == Encoding::F32 {
                assert_eq!(decoded.packet, packet, "{name}");
            }
            let mut text = String::new();
            let _ = write!(
                text,
                "    {{\n      \"name\": \"{name}\",\n      \"encoding\": \"{encoding}\",\n      \"hex\": \"{}\",\n      \
                 \"vocab\": {},\n      \"fingerprint\": \"{:016x}\",\n      \"step\": {},\n      \"mass\": \"{:08x}\",\n      \
                 \"source_ids\": {:?},\n      \"source_probs\": {},\n      \"ids\": {:?},\n      \"probs\": {}\n    }}",
                hex(&bytes),
                packet.vocab(),
                meta.fingerprint,
                meta.step,
                packet.mass().to_bits(),
                packet.ids(),
                bits(packet.probs()),
                decoded.packet.ids(),
                bits(decoded.packet.probs()),
            );
            vectors.push(text);
        }
    }
    let mut full = Transcript::new(10, META.fingerprint).unwrap();
    full.push(4, example()).unwrap();
    full.push(7, BeliefPacket::one_hot(9, 10).unwrap()).unwrap();
    let transcripts: Vec<String> = [full, Transcript::new(10, 0).unwrap()]
        .iter()
        .map(|transcript| {
            let bytes = transcript.encode(Encoding::F16).unwrap();
            assert_eq!(Transcript::decode_exact(&bytes).as_ref(), Ok(transcript));
            let ids: Vec<&[u32]> = transcript.packets().iter().map(BeliefPacket::ids).collect();
            format!(
                "    {{\n      \"hex\": \"{}\",\n      \"vocab\": {},\n      \"fingerprint\": \"{:016x}\",\n      \
                 \"steps\": {:?},\n      \"ids\": {ids:?}\n    }}",
                hex(&bytes),
                transcript.vocab(),
                transcript.fingerprint(),
                transcript.steps(),
            )
        })
        .collect();
    let mut text = format!(
        "{{\n  \"version\": 1,\n  \"packets\": [\n{}\n  ],\n  \"transcripts\": [\n{}\n  ]",
        vectors.join(",\n"),
        transcripts.join(",\n")
    );
    render_payloads(&mut text);
    text.push_str("\n}\n");
    text
}

#[test]
fn golden_vectors_are_what_this_crate_writes_and_reads() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/packet");
    let path = folder.join("vectors.json");
    let rendered = render();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::create_dir_all(&folder).unwrap();
        fs::write(&path, &rendered).unwrap();
    }
    let stored = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(stored, rendered, "{} differs", path.display());
}
