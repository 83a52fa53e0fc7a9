"""Checks of arguments. Every error names the argument, what was expected and what was given."""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

KINDS = {
    "floating": lambda dtype: dtype.is_floating_point,
    "integer": lambda dtype: not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool),
    "bool": lambda dtype: dtype == torch.bool,
}


def number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """Return a real number as a float if least <= value, above < value and value <= most, for those that are given.

    Infinity is refused unless it is itself one of the bounds, and NaN always.

    Raises:
        TypeError: not a number; a bool is none.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    x = float(value)
    allowed = abs(x) < math.inf or x in (least, most)  # a comparison: torch.compile does not trace math.isfinite
    high_enough = (least is None or x >= least) and (above is None or x > above)
    if not (allowed and high_enough and (most is None or x <= most)):
        raise ValueError(f"{name} must be {_expected(least, above, most)}, got {value!r}")
    return x


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """Return an integer as an int if least <= value <= most, for those that are given.

    Raises:
        TypeError: not an integer; neither a bool nor 1.0 is one.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    n = int(value)
    if (least is not None and n < least) or (most is not None and n > most):
        raise ValueError(f"{name} must be {_expected(least, None, most, finite=True)}, got {value!r}")
    return n


def number_field(config: Any, name: str, **bounds: float) -> None:
    """Check a field of a frozen dataclass as `number` does, and keep it as a float."""
    value = number(f"{type(config).__name__}.{name}", getattr(config, name), **bounds)
    object.__setattr__(config, name, value)


def integer_field(config: Any, name: str, *, least: int) -> None:
    """Check a field of a frozen dataclass as `integer` does, and keep it as an int."""
    value = integer(f"{type(config).__name__}.{name}", getattr(config, name), least=least)
    object.__setattr__(config, name, value)


def boolean(name: str, value: Any) -> None:
    """Raise TypeError for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def one_of(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise TypeError for what is no text, and ValueError for a text that is not among the choices."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def tensor(
    name: str, value: Any, *, kind: str | None = None, like: tuple[str, Tensor] | None = None, broadcast: bool = False
) -> None:
    """Raise for what is not a tensor of that kind and of the shape and device of another.

    Args:
        kind: ``"floating"``, ``"integer"`` or ``"bool"``; any by default.
        like: the other tensor, after its name.
        broadcast: dimensions may be 1 where the other's are larger. Their number must agree all the same: ``[B]``
            against ``[B, T]`` would broadcast along the wrong dimension where B = T.

    Raises:
        TypeError: not a tensor, or of another kind.
        ValueError: of another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {value!r}")
    if kind is not None and not KINDS[kind](value.dtype):
        raise TypeError(f"{name} must be {'an' if kind == 'integer' else 'a'} {kind} tensor, got {value.dtype}")
    if like is None:
        return
    like_name, other = like
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {other.device}, got {value.device}")
    expected, got = tuple(other.shape), tuple(value.shape)
    if broadcast:
        if len(got) != len(expected) or any(n not in (1, size) for n, size in zip(got, expected, strict=True)):
            raise ValueError(
                f"{name} must have the shape of {like_name}, {expected}, or 1 in some of its dimensions "
                f"([..., 1] for one per answer), got {got}"
            )
    elif got != expected:
        raise ValueError(f"{name} must have the shape of {like_name}, {expected}, got {got}")


def _expected(least: float | None, above: float | None, most: float | None, finite: bool = False) -> str:
    """Say in words what the bounds allow; ``finite`` where it goes without saying."""
    low = least if above is None else above
    if low is not None and most is not None and math.isfinite(most):
        return f"in {'[' if above is None else '('}{low}, {most}]"
    parts = [f"{'>=' if above is None else '>'} {low}"] if low is not None and math.isfinite(low) else []
    parts += [f"<= {most}"] if most is not None and math.isfinite(most) else []
    unbounded = any(bound is not None and math.isinf(bound) for bound in (least, most))
    parts += [] if finite or unbounded else ["finite"]
    return " and ".join(parts) or "a number"
