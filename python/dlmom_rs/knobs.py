"""Changing configurations by field, with errors that name the field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from dlmom_rs._core import ConfigError

# Fields with this name choose among alternatives, and the fields beside them depend on the choice.
_TAGS = ("kind", "method")
_OPTIONAL = {
    *("w", "convergence_threshold", "slope_eps", "var_eps", "answer_cue", "lock_text"),
    *("spectral", "max_handoffs", "on_failure"),
}
_TEXT = {"answer_cue", "lock_text"}
# Fields that are null, lists or records of their own; the core checks what is in them.
_FREE = {
    *("ranks", "triggers", "enter_signal", "exit_signal", "gate", "weights", "temperatures"),
    *("roles", "groups"),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what an unknown name may have meant."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def unknown(path: str, known: Iterable[str]) -> ConfigError:
    """The error for a field there is not, naming the nearest one there is."""
    return ConfigError(f"{path}: unknown field; {nearest(path.rpartition('.')[2], known)}")


def plain(path: str, value: Any) -> Any:
    """``value`` as JSON has it: numbers of any library as int or float.

    Raises ConfigError for NaN and Inf, which no field takes.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise ConfigError(f"{path}: {value} is not a finite number")
        return float(value)
    raise ConfigError(f"{path}: {value!r} is neither a number nor text")


def _free(path: str, value: Any) -> Any:
    """``value`` as JSON has it, lists and records too."""
    if isinstance(value, Mapping):
        return {str(name): _free(f"{path}.{name}", part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_free(f"{path}[{place}]", part) for place, part in enumerate(value)]
    return plain(path, value)


def _checked(path: str, old: Any, value: Any) -> Any:
    """``value`` in place of ``old``, of the same kind."""
    value = plain(path, value)
    name = path.rpartition(".")[2]
    if value is None and name in _OPTIONAL:
        return value
    number = isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(old, str) or name in _TEXT:
        fits, wanted = isinstance(value, str), "text"
    elif isinstance(old, bool):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(old, int):
        fits, wanted = number and isinstance(value, int), "a whole number"
    else:
        fits, wanted = number, "a number"
    if not fits:
        raise ConfigError(f"{path}: {value!r} is not {wanted}")
    return value


def changed(
    base: Mapping[str, Any], changes: Mapping[str, Any], within: str = ""
) -> dict[str, Any]:
    """``base`` with the fields in ``changes`` replaced, nested mappings field by field.

    A choice (consensus, noise) that changes its ``method`` or ``kind`` is replaced whole, because
    the fields beside it are others then. Raises ConfigError naming a field that is unknown or of
    another type; ranges are the core's to check.
    """
    merged = dict(base)
    for key, value in changes.items():
        path = f"{within}{key}"
        if key not in base:
            raise unknown(path, base)
        old = base[key]
        if key in _FREE and within != "controller.":
            merged[key] = _free(path, value)
            continue
        if not isinstance(old, Mapping):
            merged[key] = _checked(path, old, value)
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: {value!r} is not a mapping of fields")
        tag = next((tag for tag in _TAGS if tag in old), None)
        if tag is not None and value.get(tag, old[tag]) != old[tag]:
            merged[key] = _free(path, value)
        else:
            merged[key] = changed(old, value, f"{path}.")
    return merged


def as_json(value: Mapping[str, Any]) -> str:
    """JSON text of plain values."""
    return json.dumps(value, allow_nan=False)
