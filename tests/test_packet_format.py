"""The packet format from the outside, with struct and zlib alone.

The codec here was written from crates/dlmom-packet/README.md. It reads and writes the golden
vectors that the Rust tests check, and answers the corpus of attacks as the specification says.
Neither the built extension nor anything else of this project is imported.
"""

import itertools
import json
import math
import struct
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/packet/vectors.json").read_text())
ATTACKS = sorted((ROOT / "crates/dlmom-packet/tests/attacks").glob("*.hex"))
HEADER = struct.Struct("<4sBBBBIQIIf")
EMBED_HEADER = struct.Struct("<4sBBBBIQI")
MAX_K, MAX_VOCAB, MAX_PACKETS, MAX_EMBED = 1 << 20, 1 << 24, 1 << 20, 1 << 20
TAGS = {1: "f32", 2: "f16", 3: "bf16", 4: "compact"}
DENSE_TAGS = {5: "f32", 6: "f16", 7: "bf16"}
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


def seal(body):
    return body + struct.pack("<I", zlib.crc32(body))


def pack(values, encoding):
    kind = "I" if encoding == "f32" else "H"
    return struct.pack(f"<{len(values)}{kind}", *(to_wire(value, encoding) for value in values))


def encode(ids, probs, *, mass, vocab, fingerprint, step, encoding):
    tag = {name: tag for tag, name in TAGS.items()}[encoding]
    head = HEADER.pack(b"DLBP", 1, 0, tag, 0, vocab, fingerprint, step, len(ids), mass)
    if encoding == "compact":
        return seal(head + compact_body(dict(zip(ids, probs, strict=True))))
    entries = sorted((-to_wire(prob, encoding), i) for i, prob in zip(ids, probs, strict=True))
    k = len(entries)
    body = struct.pack(f"<{k}I", *(i for _, i in entries))
    body += struct.pack(f"<{k}{'I' if encoding == 'f32' else 'H'}", *(-bits for bits, _ in entries))
    return seal(head + body)


def root_of_half(times):
    value = 0.5
    for _ in range(times):
        value = math.sqrt(value)
    return value


def level(code, scale):
    value = 1.0
    for j in range(8):
        if code >> j & 1:
            depth = 3 + scale - j
            value *= root_of_half(depth) if depth > 0 else 0.5 ** (1 << -depth)
    return value


def saving(gaps, rice):
    return sum(math.ceil((gap >> rice) / 2) for gap in gaps)


def compact_body(probs):
    ids = sorted(probs)
    gaps = [b - a - 1 for a, b in itertools.pairwise([-1, *ids])]
    rice = next(b for b in range(24) if saving(gaps, b) <= len(ids))
    bits = "".join(f"{gap % 2**rice:0{rice}b}"[::-1] if rice else "" for gap in gaps)
    bits += "".join("0" * (gap >> rice) + "1" for gap in gaps)
    packed = int(bits[::-1], 2).to_bytes((len(bits) + 7) // 8, "little")
    largest, smallest = max(probs.values()), min(p for p in probs.values() if p > 0)

    def code(prob, scale):
        if prob == 0:
            return 255
        half = root_of_half(4 + scale)
        fits = (c for c in range(254) if prob >= largest * (level(c, scale) * half))
        return next(fits, 254)

    scale = next((s for s in range(7) if code(smallest, s) > 127), 7)
    return bytes([scale, rice]) + packed + bytes(code(probs[i], scale) for i in ids)


def decode_compact(data, vocab, k, mass, need):
    """Ids and probabilities in packet order, and the length of the packet."""
    need(len(data) >= 34, "truncated_params", 32)
    scale, rice = data[32], data[33]
    need(rice <= 23, "rice_over_limit", 33)
    stream = int.from_bytes(data[34:], "little")
    there = 8 * (len(data) - 34)
    at, zeros, quotients = k * rice, 0, [0]
    while len(quotients) <= k:
        need(zeros <= (vocab - 1) >> rice, "ids_overrun", 34)
        need(at < there, "truncated_ids", 34)
        if stream >> at & 1:
            quotients.append(0)
        else:
            quotients[-1] += 1
            zeros += 1
        at += 1
    codes_at = 34 + (at + 7) // 8
    end = codes_at + k
    need(len(data) >= end, "truncated_probs", codes_at)
    check_seal(data, end, need)
    need(0 < mass <= 1, "mass_out_of_range", 28)
    mask = (1 << rice) - 1
    gaps = [q << rice | stream >> n * rice & mask for n, q in enumerate(quotients[:k])]
    ids = [before + n for n, before in enumerate(itertools.accumulate(gaps))]
    need(ids[-1] < vocab, "id_out_of_range", 34)
    need(at % 8 == 0 or data[codes_at - 1] >> at % 8 == 0, "padding_not_zero", codes_at - 1)
    least = next(b for b in range(24) if saving(gaps, b) <= k)
    need(rice == least, "rice_not_canonical", 33)
    need(scale <= 7, "scale_over_limit", 32)
    codes = data[codes_at:end]
    need(0 in codes, "top_missing", codes_at)
    fine = scale == 7 or any(128 <= code <= 254 for code in codes)
    need(fine, "scale_not_canonical", 32)
    entries = sorted(zip(codes, ids, strict=True))
    levels = [0.0 if code == 255 else level(code, scale) for code, _ in entries]
    divisor = total(levels)
    return [i for _, i in entries], [f32(value / divisor) for value in levels], end + 4


def check_seal(data, end, need):
    need(len(data) >= end + 4, "truncated_checksum", end)
    need(struct.unpack_from("<I", data, end)[0] == zlib.crc32(data[:end]), "checksum", end)


def read_probs(data, at, count, encoding, need):
    width = WIDTH[encoding]
    bits = struct.unpack_from(f"<{count}{'I' if width == 4 else 'H'}", data, at)
    probs = [from_wire(b, encoding) for b in bits]
    for n, (b, prob) in enumerate(zip(bits, probs, strict=True)):
        need(abs(prob) < float("inf"), "prob_not_finite", at + width * n)
        need(b >> (8 * width - 1) == 0, "prob_negative", at + width * n)
        need(prob <= 1, "prob_above_one", at + width * n)
    return probs


def normalise(probs, at, encoding, need):
    k = len(probs)
    rounding = {"f32": 0, "f16": 1e-6 + 2**-11 + k * 2**-25, "bf16": 1e-6 + 2**-8 + k * 2**-134}
    off = abs(total(probs) - 1)
    need(off <= 1e-6 + rounding[encoding], "sum_off", at)
    divisor = total(probs) if off > 1e-6 else 1.0
    return [f32(prob / divisor) for prob in probs]


def checker(base):
    def need(ok, name, offset):
        if not ok:
            raise FormatError(name, base + offset)

    return need


def read_header(data, tags, need):
    need(len(data) < 4 or data[:4] == b"DLBP", "bad_magic", 0)
    need(len(data) < 5 or data[4] == 1, "unsupported_version", 4)
    need(len(data) >= 32, "truncated_header", 0)
    _, _, flags, tag, reserved, vocab, fingerprint, step, k, mass = HEADER.unpack_from(data)
    need(flags == 0, "unknown_flags", 5)
    need(tag in tags or tag not in TAGS | DENSE_TAGS, "wrong_kind", 6)
    need(tag in tags, "unknown_encoding", 6)
    need(reserved == 0, "reserved_not_zero", 7)
    need(vocab <= MAX_VOCAB, "vocab_over_limit", 8)
    need(k > 0, "k_zero", 24)
    meta = {"vocab": vocab, "fingerprint": fingerprint, "step": step, "encoding": tags[tag]}
    return meta, k, mass


def decode(data, base=0):
    """One packet from the front of `data` as a dict, and its length."""
    need = checker(base)
    meta, k, mass = read_header(data, TAGS, need)
    vocab, encoding = meta["vocab"], meta["encoding"]
    need(k <= MAX_K, "k_over_limit", 24)
    need(k <= vocab, "k_over_vocab", 24)
    if encoding == "compact":
        ids, probs, length = decode_compact(data, vocab, k, mass, need)
        return meta | {"mass": mass, "ids": ids, "probs": probs}, length
    probs_at, end = 32 + 4 * k, 32 + (4 + WIDTH[encoding]) * k
    need(len(data) >= probs_at, "truncated_ids", 32)
    need(len(data) >= end, "truncated_probs", probs_at)
    check_seal(data, end, need)
    need(0 < mass <= 1, "mass_out_of_range", 28)
    ids = struct.unpack_from(f"<{k}I", data, 32)
    for n, i in enumerate(ids):
        need(i < vocab, "id_out_of_range", 32 + 4 * n)
    for n, i in enumerate(ids):
        need(i not in ids[:n], "duplicate_id", 32 + 4 * n)
    probs = read_probs(data, probs_at, k, encoding, need)
    for n in range(1, k):
        need((-probs[n - 1], ids[n - 1]) < (-probs[n], ids[n]), "wrong_order", 32 + 4 * n)
    probs = normalise(probs, probs_at, encoding, need)
    return meta | {"mass": mass, "ids": list(ids), "probs": probs}, end + 4


def encode_dense(probs, *, fingerprint, step, encoding):
    tag = {name: tag for tag, name in DENSE_TAGS.items()}[encoding]
    n = len(probs)
    head = HEADER.pack(b"DLBP", 1, 0, tag, 0, n, fingerprint, step, n, 1.0)
    return seal(head + pack(probs, encoding))


def decode_dense(data):
    need = checker(0)
    meta, k, mass = read_header(data, DENSE_TAGS, need)
    encoding = meta["encoding"]
    need(k == meta["vocab"], "k_not_vocab", 24)
    end = 32 + WIDTH[encoding] * k
    need(len(data) >= end, "truncated_probs", 32)
    check_seal(data, end, need)
    need(mass == 1, "mass_not_one", 28)
    probs = normalise(read_probs(data, 32, k, encoding, need), 32, encoding, need)
    need(len(data) == end + 4, "trailing_bytes", end + 4)
    return meta | {"values": probs}


def encode_embed(values, *, fingerprint, step, encoding):
    tag = {name: tag for tag, name in TAGS.items()}[encoding]
    head = EMBED_HEADER.pack(b"DLEM", 1, 0, tag, 0, len(values), fingerprint, step)
    return seal(head + pack(values, encoding))


def decode_embed(data):
    need = checker(0)
    need(len(data) < 4 or data[:4] == b"DLEM", "bad_magic", 0)
    need(len(data) < 5 or data[4] == 1, "unsupported_version", 4)
    need(len(data) >= 24, "truncated_header", 0)
    _, _, flags, tag, reserved, width, fingerprint, step = EMBED_HEADER.unpack_from(data)
    need(flags == 0, "unknown_flags", 5)
    need(tag in (1, 2, 3), "unknown_encoding", 6)
    need(reserved == 0, "reserved_not_zero", 7)
    need(width > 0, "width_zero", 8)
    need(width <= MAX_EMBED, "width_over_limit", 8)
    encoding = TAGS[tag]
    size = WIDTH[encoding]
    end = 24 + size * width
    need(len(data) >= end, "truncated_values", 24)
    check_seal(data, end, need)
    bits = struct.unpack_from(f"<{width}{'I' if size == 4 else 'H'}", data, 24)
    values = [from_wire(b, encoding) for b in bits]
    for n, value in enumerate(values):
        need(abs(value) < float("inf"), "value_not_finite", 24 + size * n)
    need(len(data) == end + 4, "trailing_bytes", end + 4)
    return {"fingerprint": fingerprint, "step": step, "encoding": encoding, "values": values}


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


@pytest.mark.parametrize("case", GOLDEN["dense"] + GOLDEN["embeds"], ids=case_id)
def test_golden_payload_is_read_and_written_alike(case):
    data = bytes.fromhex(case["hex"])
    is_embed = data[:4] == b"DLEM"
    payload = decode_embed(data) if is_embed else decode_dense(data)
    assert payload["fingerprint"] == int(case["fingerprint"], 16)
    assert payload["step"] == case["step"]
    assert payload["encoding"] == case["encoding"]
    assert [f32_bits(p) for p in payload["values"]] == [int(bits, 16) for bits in case["values"]]

    source = [f32_from_bits(int(bits, 16)) for bits in case["source"]]
    rest = {key: payload[key] for key in ("fingerprint", "step", "encoding")}
    assert (encode_embed if is_embed else encode_dense)(source, **rest) == data
    for length in range(len(data)):
        with pytest.raises(FormatError, match="truncated"):
            (decode_embed if is_embed else decode_dense)(data[:length])


def test_compact_packets_encode_to_the_bytes_they_came_from():
    cases = [case for case in GOLDEN["packets"] if case["encoding"] == "compact"]
    assert len(cases) >= 12
    for case in cases:
        data = bytes.fromhex(case["hex"])
        packet = decode_exact(data)
        assert encode(packet.pop("ids"), packet.pop("probs"), **packet) == data


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
    decoders = {"# kind: dense": decode_dense, "# kind: embed": decode_embed}
    reader = next((decoders[line] for line in lines if line in decoders), decode_exact)
    with pytest.raises(FormatError) as caught:
        reader(data)
    assert caught.value.args == (expected["expect"], int(expected["offset"]))


def test_the_corpora_are_there():
    assert GOLDEN["version"] == 1
    assert len(GOLDEN["packets"]) >= 48
    assert len(GOLDEN["dense"]) >= 12
    assert len(GOLDEN["embeds"]) >= 6
    assert len(ATTACKS) >= 80
