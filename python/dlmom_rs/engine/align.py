"""Hidden states as input embeddings: the alignment of LatentMAS (arXiv 2511.20639, section 3).

A model's last hidden state (after its final norm) becomes ``e = (h W) m / |h W|``: W is the ridge
solution that takes output embeddings U to input embeddings E, ``W = (U^T U + 1e-5 I)^-1 U^T E``, or
the identity; m is the mean norm of the input embeddings. With tied embeddings the ridge solution is
the identity up to the ridge.
"""

from typing import Any

import torch
from torch import Tensor, nn

#: The ridge, absolute, as in the paper's code.
RIDGE = 1e-5
#: Rows of the tables that are multiplied at a time.
ROWS = 16_384


class Aligner:
    """Both alignments of one model. ``vocab`` is the number of real tokens."""

    def __init__(self, model: Any, embeddings: nn.Module, vocab: int) -> None:
        self._model = model
        self._embeddings = embeddings
        self._vocab = vocab
        self._ridge: Tensor | None = None
        self._norm: Tensor | None = None

    def _tables(self, start: int) -> tuple[Tensor, Tensor]:
        """Rows of input and output embeddings from ``start`` on, [<= ROWS, hidden] each."""
        weight = self._model.get_output_embeddings().weight
        stop = min(start + ROWS, self._vocab)
        ids = torch.arange(start, stop, device=weight.device)
        # float64 where there is a fast one; the sums run over the whole vocabulary.
        wide = torch.float64 if weight.device.type == "cpu" else torch.float32
        return self._embeddings(ids).to(wide), weight[start:stop].to(wide)

    @property
    def norm(self) -> Tensor:
        """The mean norm of the input embeddings, a scalar."""
        if self._norm is None:
            tables = (self._tables(start)[0] for start in range(0, self._vocab, ROWS))
            parts = [torch.linalg.vector_norm(table, dim=1).sum() for table in tables]
            self._norm = torch.stack(parts).sum() / self._vocab
        return self._norm

    @property
    def ridge(self) -> Tensor:
        """The ridge solution, [hidden, hidden]."""
        if self._ridge is None:
            gram: Tensor | None = None
            cross: Tensor | None = None
            for start in range(0, self._vocab, ROWS):
                e, u = self._tables(start)
                more_gram, more_cross = u.T @ u, u.T @ e
                gram = more_gram if gram is None else gram + more_gram
                cross = more_cross if cross is None else cross + more_cross
            assert gram is not None
            assert cross is not None
            gram.diagonal().add_(RIDGE)
            self._ridge = torch.linalg.solve(gram, cross)
        return self._ridge

    def __call__(self, states: Tensor, ridge: bool) -> Tensor:
        """Align ``states`` [n, hidden] in the model's dtype -> [n, hidden] of the same.

        Row by row, so that a row's bits do not depend on how many there are. A state of zeros stays
        zero.
        """
        norm = self.norm
        rows = []
        for state in states:
            row = state.to(norm.dtype)[None]
            if ridge:
                row = row @ self.ridge
            rows.append(row * (norm / torch.linalg.vector_norm(row).clamp_min(1e-6)))
        return torch.cat(rows).to(states.dtype)
