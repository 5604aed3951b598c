"""Belief packets on the wire: what each encoding costs in bytes and in nats. Needs no model.

python examples/packets.py
"""

from __future__ import annotations

import numpy as np

from dlmom_rs import BeliefPacket, PacketError, Transcript

VOCAB, K, STEPS = 151_665, 50, 12


def belief(rng: np.random.Generator) -> BeliefPacket:
    """The K most probable tokens of a distribution with a heavy tail."""
    logits = 2.5 * rng.standard_normal(VOCAB)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    ids = np.argsort(-probs)[:K]
    mass = float(probs[ids].sum())
    return BeliefPacket(ids.tolist(), (probs[ids] / mass).tolist(), vocab=VOCAB, mass=mass)


def divergence(p: BeliefPacket, q: BeliefPacket) -> float:
    """KL(p || q) in nats of two packets with the same ids."""
    other = dict(zip(q.ids, q.probs, strict=True))
    pairs = ((x, other[i]) for i, x in zip(p.ids, p.probs, strict=True) if x > 0)
    return sum(x * float(np.log(x / y)) for x, y in pairs)


def main() -> None:
    rng = np.random.default_rng(7)
    packets = [belief(rng) for _ in range(STEPS)]
    print(packets[0], f"entropy {packets[0].entropy():.4f} nats")

    print("\nencoding  bytes/packet  mean KL in nats")
    for encoding in ("f32", "f16", "bf16", "compact"):
        sent = [packet.to_bytes(encoding) for packet in packets]
        got = [BeliefPacket.from_bytes(data) for data in sent]
        kl = np.mean([divergence(p, q) for p, q in zip(packets, got, strict=True)])
        size = np.mean([len(data) for data in sent])
        print(f"{encoding:<8}  {size:12.1f}  {kl:.2e}")

    transcript = Transcript(list(enumerate(packets)), vocab=VOCAB)
    small, exact = transcript.to_bytes("compact"), transcript.to_bytes("f32")
    print(f"\ntranscript of {len(transcript)} packets: {len(exact)} bytes, compact {len(small)}")
    print(f"read back as it was: {Transcript.from_bytes(exact) == transcript}")

    broken = bytearray(small)
    broken[len(broken) // 2] ^= 1
    try:
        Transcript.from_bytes(bytes(broken))
    except PacketError as error:
        print(f"one flipped bit: {error}")


if __name__ == "__main__":
    main()
