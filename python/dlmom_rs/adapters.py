"""Between the Rust loop's buffers and the arrays that a user's own classes work on."""

from __future__ import annotations

from typing import Any

import numpy as np


def call_merge(consensus: Any, centred: bytearray, experts: int, vocab: int) -> bytes:
    """Call ``consensus.merge(rows)`` with ``rows`` [experts, vocab] float32, centred logits.

    Returns the merged row [vocab] as little-endian float32. Raises ValueError for an answer of
    another shape or one that is not finite, and whatever ``merge`` raises.
    """
    rows = np.frombuffer(centred, dtype="<f4").reshape(experts, vocab)
    answer = np.asarray(consensus.merge(rows), dtype="<f4")
    if answer.shape != (vocab,):
        raise ValueError(
            f"consensus: merge answered with shape {list(answer.shape)}, not [{vocab}]"
        )
    if not np.isfinite(answer).all():
        raise ValueError("consensus: merge answered with NaN or Inf")
    return np.ascontiguousarray(answer).tobytes()
