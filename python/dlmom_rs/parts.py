"""What an ensemble asks of a user's own parts.

Any object with the right methods will do; nothing has to be inherited. Whatever a part raises ends
the call it was raised in and comes out as the same exception object, with a note saying where; a
consensus is named there by its attribute ``name``, else by its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

Mode: TypeAlias = Literal["latent", "explicit"]


@runtime_checkable
class ControllerLike(Protocol):
    """Decides the mode of every step of one sample, in place of the configured gate.

    It is a wish: the configured ``cap``, ``min_dwell_latent``, ``min_dwell_explicit``,
    ``max_latent_steps`` and ``answer_reserve`` still bind it, and a certain end of the sequence
    ends latent mode.
    """

    def observe(self, entropy: float, mode: Mode | None, /) -> Mode:
        """The mode wanted for the next step.

        ``entropy`` is the mean of the experts' entropies in the configured ``alpha_unit``
        (divided by ``ln V``, or nats); ``mode`` is that of the last step, None before the first.
        Called once a step, forced steps included.
        """
        ...


ControllerFactory: TypeAlias = Callable[[], ControllerLike]
"""A class or another callable without arguments: every sample gets a controller of its own."""


@runtime_checkable
class ConsensusLike(Protocol):
    """Merges the experts' preferences, in place of the configured operator.

    One expert alone has nothing to merge: ``merge`` is not called then.
    """

    def merge(self, rows: npt.NDArray[np.float32], /) -> npt.ArrayLike:
        """One row [V] of finite logits, read as float32, out of ``rows``.

        ``rows`` [K, V] float32 are the experts' centred logits ``z - mean(z)``, all finite; the
        array is the callee's to change. Called once a sample and step.
        """
        ...


@runtime_checkable
class CompressorLike(Protocol):
    """Rewrites what the experts' key-value lanes hold, keeping the number of positions."""

    def compress(
        self, keys: Tensor, values: Tensor, *, layer: int, agent: int
    ) -> tuple[Tensor, Tensor]:
        """What one layer of one agent's lane is to hold.

        ``keys`` and ``values`` are copies, [heads, positions, head_dim] in the model's dtype on its
        device; the answer is a pair of the same shapes. Called for every layer once the prompt is
        in, and whenever the lane has grown by ``compress_every`` positions.
        """
        ...


def check(
    *, controller: ControllerFactory | None = None, consensus: ConsensusLike | None = None
) -> None:
    """Run the loop's conformance kit on parts, without any model.

    A controller has to decide the same for the same entropies in every sample; a consensus has to
    be finite and to depend on its rows alone. Raises :class:`dlmom_rs.ProtocolError` naming the
    first rule broken, and TypeError for an object that lacks the method.
    """
    from dlmom_rs import _core

    _core.conformance_of_parts(controller, consensus)
