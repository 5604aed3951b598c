//! What several test modules share.

use dlmom_packet::{BeliefPacket, Meta, encoded_len};

pub(crate) const META: Meta = Meta {
    fingerprint: 0x0123_4567_89ab_cdef,
    step: 4,
};

/// The packet of the worked example in the README.
pub(crate) fn example() -> BeliefPacket {
    packet(&[(7, 0.5), (2, 0.25), (5, 0.25)], 0.875, 10)
}

pub(crate) fn packet(entries: &[(u32, f32)], mass: f32, vocab: u32) -> BeliefPacket {
    let (ids, probs) = entries.iter().copied().unzip();
    BeliefPacket::new(ids, probs, mass, vocab).expect("a packet")
}

/// Replaces the last four bytes by the CRC-32 of the rest, so that an error behind the checksum shows.
pub(crate) fn reseal(bytes: &mut [u8]) {
    let end = bytes.len() - 4;
    let checksum = crc32fast::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(&checksum.to_le_bytes());
}

/// `bytes` with `patch` written at `at` and the checksum made right again.
pub(crate) fn patched(bytes: &[u8], at: usize, patch: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + patch.len()].copy_from_slice(patch);
    reseal(&mut bytes);
    bytes
}

/// Hexadecimal digits of a text in which `#` starts a comment.
pub(crate) fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(str::chars)
        .filter(|c| !c.is_whitespace())
        .map(|c| c.to_digit(16).expect("a hexadecimal digit") as u8)
        .collect();
    assert_eq!(digits.len() % 2, 0, "an even number of digits");
    digits
        .chunks(2)
        .map(|pair| pair[0] << 4 | pair[1])
        .collect()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Guards tests that address fields by number.
#[test]
fn example_has_the_length_the_readme_states() {
    assert_eq!(encoded_len(example().k(), dlmom_packet::Encoding::F16), 54);
}
