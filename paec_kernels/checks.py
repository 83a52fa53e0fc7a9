"""Checks of arguments. Every error names the argument, what was expected and what was given."""

import math
import os
import types
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

KINDS: dict[str, tuple[torch.dtype, ...]] = {
    "floating": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "integer": (
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    ),
    "bool": (torch.bool,),
}
# Whatever number a user gives ends in float32: one beyond its range is infinite there, and 1 over one below it.
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
LONGEST = 200  # characters of a value in a message


def number(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> float:
    """Return a real number as a float if least <= value, above < value and value <= most, for those that are given.

    Infinity is refused unless it is itself one of the bounds, and NaN always. What float32 does not hold counts as
    infinite, and as not above its bound what float32 does not tell from it.

    Raises:
        TypeError: not a number; a bool is none.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    real: Any = value
    if abs(real) > LARGEST:  # a comparison, which takes integers that no float holds
        x = math.inf if real > 0 else -math.inf
    else:
        x = float(real)
    allowed = abs(x) < math.inf or x in (least, most)  # a comparison: torch.compile does not trace math.isfinite
    high_enough = (least is None or x >= least) and (above is None or x - above >= SMALLEST)
    if not (allowed and high_enough and (most is None or x <= most)):
        raise ValueError(f"{name} must be {_expected(least, above, most)}, got {shown(value)}")
    return x


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """Return an integer as an int if least <= value <= most, for those that are given, and 64 bits hold it.

    Raises:
        TypeError: not an integer; neither a bool nor 1.0 is one.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    n = int(value)
    if (least is not None and n < least) or (most is not None and n > most):
        raise ValueError(f"{name} must be {_expected(least, None, most, finite=True)}, got {shown(value)}")
    if not -(2**63) <= n < 2**63:
        raise ValueError(f"{name} must be an int of 64 bits, got {shown(value)}")
    return n


def number_field(config: Any, name: str, **bounds: float) -> None:
    """Check a field of a frozen dataclass as `number` does, and keep it as a float."""
    value = number(f"{type(config).__name__}.{name}", getattr(config, name), **bounds)
    object.__setattr__(config, name, value)


def integer_field(config: Any, name: str, *, least: int) -> None:
    """Check a field of a frozen dataclass as `integer` does, and keep it as an int."""
    value = integer(f"{type(config).__name__}.{name}", getattr(config, name), least=least)
    object.__setattr__(config, name, value)


def fields(config: Any) -> None:
    """Check each field of a frozen dataclass by its annotation, and keep numbers, paths and tuples as just that.

    Ranges are left to the other checks.

    Raises:
        TypeError, ValueError: a field of another type; a text that is no choice of a Literal.
    """
    for name, hint in get_type_hints(type(config)).items():
        object.__setattr__(config, name, _of_type(name, getattr(config, name), hint))


def _of_type(name: str, value: Any, hint: Any) -> Any:
    kinds = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):  # with None, which alone has no type of its own
        return None if value is None else _of_type(name, value, kinds[0])
    if get_origin(hint) is Literal:
        one_of(name, value, kinds)
    elif get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} must be a list or tuple, got {shown(value)}")
        return tuple(_of_type(f"{name}[{i}]", item, kinds[0]) for i, item in enumerate(value))
    elif hint is float:
        is_nan = isinstance(value, float) and math.isnan(value)  # out of every range, whose check says what is in it
        return value if is_nan else number(name, value, least=-math.inf, most=math.inf)
    elif hint is int:
        return integer(name, value)
    elif hint is bool:
        boolean(name, value)
    elif hint is Path:
        if not isinstance(value, str | os.PathLike):
            raise TypeError(f"{name} must be a path, got {shown(value)}")
        return Path(value)
    else:
        instance(name, value, hint)
    return value


def boolean(name: str, value: Any) -> None:
    """Raise TypeError for anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")


def one_of(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise TypeError for what is no text, and ValueError for a text that is not among the choices."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(value)}")


def instance(name: str, value: Any, kind: type) -> None:
    """Raise TypeError for what is not of a class."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {shown(value)}")


def micro_batches(name: str, value: Any) -> None:
    """Raise TypeError for what is no list with an item for each micro-batch; a tensor or a generator is none."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a list with an item for each micro-batch, got {shown(value)}")


def tensor(
    name: str, value: Any, *, kind: str | None = None, like: tuple[str, Tensor] | None = None, broadcast: bool = False
) -> None:
    """Raise for what is not a dense tensor of that kind and of the shape and device of another.

    Args:
        kind: ``"floating"``, ``"integer"`` or ``"bool"``; any by default.
        like: the other tensor, after its name.
        broadcast: dimensions may be 1 where the other's are larger. Their number must agree all the same: ``[B]``
            against ``[B, T]`` would broadcast along the wrong dimension where B = T.

    Raises:
        TypeError: not a tensor, a sparse, nested or quantised one, or of another kind.
        ValueError: of another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {shown(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a {'nested' if value.is_nested else value.layout} one")
    if kind is not None and value.dtype not in KINDS[kind]:
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


def shown(value: Any) -> str:
    """Return a value's repr for a message, cut where it is long; integers of thousands of digits have none."""
    try:
        text = repr(value)
    except Exception:
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
