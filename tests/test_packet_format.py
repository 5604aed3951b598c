"""The packet format from the outside, with struct and zlib alone.

The codec here was written from crates/dlmom-packet/README.md. It reads and writes the golden
vectors that the Rust tests check, and answers the corpus of attacks as the specification says.
Neither the built extension nor anything else of this project is imported.
"""

import itertools
import json
import struct
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/packet/vectors.json").read_text())
ATTACKS = sorted((ROOT / "crates/dlmom-packet/tests/attacks").glob("*.hex"))
HEADER = struct.Struct("<4sBBBBIQIIf")
MAX_K, MAX_VOCAB, MAX_PACKETS = 1 << 20, 1 << 24, 1 << 20
TAGS = {1: "f32", 2: "f16", 3: "bf16"}
WIDTH = {"f32": 4, "f16": 2, "bf16": 2}


class FormatError(Exception):
    """Its arguments are the error's name in the specification and the offset of the field."""


def f32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def f32_bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


def f32_from_bits(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def total(values):
    """The sum one after another; from Python 3.12 on the built-in one compensates for rounding."""
    result = 0.0
    for value in values:
        result += value
    return result


def to_wire(prob, encoding):
    """The probability as its bits on the wire, rounded to nearest even."""
    if encoding == "f32":
        return f32_bits(prob)
    if encoding == "f16":
        return struct.unpack("<H", struct.pack("<e", prob))[0]
    bits = f32_bits(prob)
    upper, lower = bits >> 16, bits & 0xFFFF
    return upper + (lower > 0x8000 or (lower == 0x8000 and upper % 2 == 1))


def from_wire(bits, encoding):
    if encoding == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return f32_from_bits(bits if encoding == "f32" else bits << 16)


def encode(ids, probs, *, mass, vocab, fingerprint, step, encoding):
    entries = sorted((-to_wire(prob, encoding), i) for i, prob in zip(ids, probs, strict=True))
    k = len(entries)
    tag = {name: tag for tag, name in TAGS.items()}[encoding]
    body = HEADER.pack(b"DLBP", 1, 0, tag, 0, vocab, fingerprint, step, k, mass)
    body += struct.pack(f"<{k}I", *(i for _, i in entries))
    body += struct.pack(f"<{k}{'I' if encoding == 'f32' else 'H'}", *(-bits for bits, _ in entries))
    return body + struct.pack("<I", zlib.crc32(body))


def decode(data, base=0):
    """One packet from the front of `data` as a dict, and its length."""

    def need(ok, name, offset):
        if not ok:
            raise FormatError(name, base + offset)

    need(len(data) < 4 or data[:4] == b"DLBP", "bad_magic", 0)
    need(len(data) < 5 or data[4] == 1, "unsupported_version", 4)
    need(len(data) >= 32, "truncated_header", 0)
    _, _, flags, tag, reserved, vocab, fingerprint, step, k, mass = HEADER.unpack_from(data)
    need(flags == 0, "unknown_flags", 5)
    need(tag in TAGS, "unknown_encoding", 6)
    need(reserved == 0, "reserved_not_zero", 7)
    need(vocab <= MAX_VOCAB, "vocab_over_limit", 8)
    need(k > 0, "k_zero", 24)
    need(k <= MAX_K, "k_over_limit", 24)
    need(k <= vocab, "k_over_vocab", 24)
    encoding = TAGS[tag]
    width = WIDTH[encoding]
    probs_at, end = 32 + 4 * k, 32 + (4 + width) * k
    need(len(data) >= probs_at, "truncated_ids", 32)
    need(len(data) >= end, "truncated_probs", probs_at)
    need(len(data) >= end + 4, "truncated_checksum", end)
    need(struct.unpack_from("<I", data, end)[0] == zlib.crc32(data[:end]), "checksum", end)
    need(0 < mass <= 1, "mass_out_of_range", 28)
    ids = struct.unpack_from(f"<{k}I", data, 32)
    for n, i in enumerate(ids):
        need(i < vocab, "id_out_of_range", 32 + 4 * n)
    for n, i in enumerate(ids):
        need(i not in ids[:n], "duplicate_id", 32 + 4 * n)
    bits = struct.unpack_from(f"<{k}{'I' if width == 4 else 'H'}", data, probs_at)
    probs = [from_wire(b, encoding) for b in bits]
    for n, (b, prob) in enumerate(zip(bits, probs, strict=True)):
        need(abs(prob) < float("inf"), "prob_not_finite", probs_at + width * n)
        need(b >> (8 * width - 1) == 0, "prob_negative", probs_at + width * n)
        need(prob <= 1, "prob_above_one", probs_at + width * n)
    for n in range(1, k):
        need((-probs[n - 1], ids[n - 1]) < (-probs[n], ids[n]), "wrong_order", 32 + 4 * n)
    rounding = {"f32": 0, "f16": 1e-6 + 2**-11 + k * 2**-25, "bf16": 1e-6 + 2**-8 + k * 2**-134}
    off = abs(total(probs) - 1)
    need(off <= 1e-6 + rounding[encoding], "sum_off", probs_at)
    if off > 1e-6:
        probs = [f32(prob / total(probs)) for prob in probs]
    meta = {"vocab": vocab, "fingerprint": fingerprint, "step": step}
    packet = {"encoding": encoding, "mass": mass, "ids": list(ids), "probs": probs}
    return meta | packet, end + 4


def decode_exact(data):
    packet, length = decode(data)
    if length < len(data):
        raise FormatError("trailing_bytes", length)
    return packet


def decode_transcript(data):
    *fixed, vocab, fingerprint, count, crc = struct.unpack_from("<4sBBHIQII", data)
    assert fixed == [b"DLTR", 1, 0, 0]
    assert crc == zlib.crc32(data[:24])
    assert count <= MAX_PACKETS
    offset, packets = 28, []
    for _ in range(count):
        packet, length = decode(data[offset:], offset)
        assert (packet["vocab"], packet["fingerprint"]) == (vocab, fingerprint)
        packets.append(packet)
        offset += length
    assert offset == len(data)
    steps = [packet["step"] for packet in packets]
    assert all(a < b for a, b in itertools.pairwise(steps))
    ids = [packet["ids"] for packet in packets]
    return {"vocab": vocab, "fingerprint": fingerprint, "steps": steps, "ids": ids}


def case_id(case):
    return f"{case['name']}-{case['encoding']}"


@pytest.mark.parametrize("case", GOLDEN["packets"], ids=case_id)
def test_golden_packet_is_read_and_written_alike(case):
    data = bytes.fromhex(case["hex"])
    packet = decode_exact(data)
    assert packet["encoding"] == case["encoding"]
    assert packet["vocab"] == case["vocab"]
    assert packet["fingerprint"] == int(case["fingerprint"], 16)
    assert packet["step"] == case["step"]
    assert f32_bits(packet["mass"]) == int(case["mass"], 16)
    assert packet["ids"] == case["ids"]
    assert [f32_bits(p) for p in packet["probs"]] == [int(bits, 16) for bits in case["probs"]]

    source = [f32_from_bits(int(bits, 16)) for bits in case["source_probs"]]
    rest = {key: packet[key] for key in ("mass", "vocab", "fingerprint", "step", "encoding")}
    assert encode(case["source_ids"], source, **rest) == data


@pytest.mark.parametrize("case", GOLDEN["packets"], ids=case_id)
def test_cut_or_changed_packet_is_an_error(case):
    data = bytes.fromhex(case["hex"])
    for length in range(len(data)):
        with pytest.raises(FormatError, match="truncated"):
            decode(data[:length])
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x10
        with pytest.raises(FormatError):
            decode_exact(bytes(changed))


def test_packets_follow_one_another():
    stream = b"".join(bytes.fromhex(case["hex"]) for case in GOLDEN["packets"])
    offset = 0
    for case in GOLDEN["packets"]:
        packet, length = decode(stream[offset:], offset)
        assert packet["ids"] == case["ids"]
        offset += length
    assert offset == len(stream)


@pytest.mark.parametrize("case", GOLDEN["transcripts"])
def test_golden_transcript(case):
    transcript = decode_transcript(bytes.fromhex(case["hex"]))
    expected = {key: case[key] for key in ("vocab", "steps", "ids")}
    assert transcript == expected | {"fingerprint": int(case["fingerprint"], 16)}


@pytest.mark.parametrize("path", ATTACKS, ids=lambda path: path.stem)
def test_attack_gets_the_expected_answer(path):
    lines = path.read_text().splitlines()
    headers = [line[2:] for line in lines if line.startswith(("# expect: ", "# offset: "))]
    expected = dict(header.split(": ") for header in headers)
    data = bytes.fromhex("".join(line.split("#")[0] for line in lines))
    with pytest.raises(FormatError) as caught:
        decode_exact(data)
    assert caught.value.args == (expected["expect"], int(expected["offset"]))


def test_the_corpora_are_there():
    assert GOLDEN["version"] == 1
    assert len(GOLDEN["packets"]) >= 27
    assert len(ATTACKS) >= 40
