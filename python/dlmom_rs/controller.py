"""The mode controller by itself."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from dlmom_rs import _core
from dlmom_rs.knobs import as_json, plain, unknown

if TYPE_CHECKING:
    from dlmom_rs._core import Decision
    from dlmom_rs.parts import Mode


class ControllerKnobs(TypedDict, total=False):
    """Knobs of a controller; thresholds are in ``alpha_unit``, lengths in steps."""

    gate: Literal[
        "threshold",
        "trend",
        "reference",
        "latent_then_explicit",
        "always_latent",
        "always_explicit",
    ]
    """Rule: latent above ``alpha``; slope, mean and variance over ``w`` steps; against the entropy
    of the block's first step; one latent block; or one mode."""
    w: int | None
    """Window of the trend gate, at least 2."""
    alpha: float
    """Entropy threshold, 0.60."""
    alpha_unit: Literal["normalized", "nats", "quantile"]
    """Entropies divided by ``ln V``, in nats, or as ranks among those of a pilot."""
    cap: int
    """Most switches, forced ones included, 10; -1 is unlimited, 0 explicit only."""
    min_dwell_latent: int
    """Fewest latent steps in a row before the gate may leave latent mode, 1."""
    min_dwell_explicit: int
    """Fewest explicit steps in a row before the gate may enter latent mode again, 1."""
    convergence_threshold: float | None
    """Entropy below which the trend gate is done, ``0.25 alpha``."""
    slope_eps: float | None
    """Slope per step below minus which entropy falls, ``0.02 alpha``."""
    var_eps: float | None
    """Variance below which a falling entropy is settled, ``(0.1 alpha)**2``."""
    max_latent_steps: int
    """Most latent steps, 40; explicit for good after them."""
    start: Literal["gate", "latent"]
    """What decides the first step."""
    patience: int
    """Entropies below ``alpha``, one after another, that end the block of ``latent_then_explicit``,
    1."""


class Controller:
    """The state machine that turns entropies into modes, one per sample.

    Knobs left out have the reference pipeline's values. Source: DL-MoM paper, section 4.3 and
    Appendix B. In an ensemble it is set by ``config={"controller": {...}}``, with the same names;
    by itself it replays recorded entropies.

    Raises :class:`dlmom_rs.ConfigError` naming a knob that is unknown or out of range.
    """

    def __init__(self, **knobs: Unpack[ControllerKnobs]) -> None:
        names = ControllerKnobs.__annotations__
        given: dict[str, Any] = {}
        for name, value in knobs.items():
            if name not in names:
                raise unknown(name, names)
            given[name] = plain(name, value)
        try:
            self._core = _core.ControllerCore(as_json(given))
        except _core.ConfigError as error:
            raise _named(error, given) from None

    def observe(
        self,
        entropy: float,
        force: Literal["eos_certain", "answer_reserve", "locked", "terminated"] | None = None,
    ) -> Decision:
        """Decide the mode of the next step from the entropy of this one, in ``alpha_unit``.

        ``force`` says that explicit mode is due whatever the gate thinks: ``eos_certain`` (the end
        of the sequence is certain), ``answer_reserve`` (the steps left are for the answer),
        ``locked`` (the thinking has ended) or ``terminated`` (it was ended).
        Raises ValueError for an entropy that is not finite and for another ``force``.
        """
        return self._core.observe(float(entropy), force)

    def replay(self, entropies: Iterable[float]) -> list[Decision]:
        """The decisions of a fresh controller over ``entropies``; this one is left as it is.

        Raises ValueError naming the first entropy that is not finite.
        """
        return self._core.replay([float(entropy) for entropy in entropies])

    @property
    def switches(self) -> int:
        """Changes of mode so far, forced ones included; the first decision is none."""
        return self._core.switches

    @property
    def latent_steps(self) -> int:
        """Latent decisions so far."""
        return self._core.latent_steps

    @property
    def mode(self) -> Mode | None:
        """The mode of the last decision, None before the first."""
        return self._core.mode

    @property
    def knobs(self) -> ControllerKnobs:
        """Every knob, a copy; ``Controller(**controller.knobs)`` is a fresh one like it."""
        knobs: ControllerKnobs = json.loads(self._core.spec)
        return knobs

    def __repr__(self) -> str:
        knobs = ", ".join(f"{name}={value!r}" for name, value in self.knobs.items())
        return f"Controller({knobs})"


def _named(error: _core.ConfigError, given: dict[str, Any]) -> _core.ConfigError:
    """The error with the knob's name, which the core leaves out of errors of type."""
    for name, value in given.items():
        try:
            _core.ControllerCore(as_json({name: value}))
        except _core.ConfigError as own:
            if str(own) == str(error) and name not in str(own):
                return _core.ConfigError(str(own).replace("controller:", f"{name}: {value!r}:", 1))
    return error
