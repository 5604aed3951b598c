"""Captured steps: the launches of a forward, recorded once for each visible length and replayed.

A step of few rows on a GPU is bound by its launches, some hundred for each layer, and not by its
arithmetic. A capture holds addresses and no decisions of the host: what a step reads and writes has
to stay where it is, and no value may pass through the host on the way. The row-slot lanes keep
inputs, positions, keys and values in place, so their forward is such a step.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """One captured piece of work."""

    def capture(self, work: Callable[[], Tensor]) -> None:
        """Record the work; it may be run as well, any number of times."""

    def replay(self) -> Tensor:
        """Do the work again on what now lies where it read; always the same tensor."""


class CudaGraph:
    """``torch.cuda.CUDAGraph``, on HIP as well; graphs that share a ``pool`` never overlap."""

    def __init__(self, pool: Any, device: torch.device) -> None:
        self._pool = pool
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._output: Tensor | None = None

    def capture(self, work: Callable[[], Tensor]) -> None:
        # Streams and graphs are those of the current device.
        with torch.cuda.device(self._device):
            # Outside of the capture first: libraries pick kernels and workspaces in first calls.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    work()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                self._output = work()

    def replay(self) -> Tensor:
        assert self._output is not None
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._output


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """Makes graphs of one agent's steps, which share their memory: only one of them runs."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool, device)
