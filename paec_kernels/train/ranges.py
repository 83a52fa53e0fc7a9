"""Range checks that the dataclasses of options share."""

from typing import Any


def at_least(options: Any, least: int, *names: str) -> None:
    """Raises ValueError for the first of the fields that is smaller, or NaN."""
    for name in names:
        if not getattr(options, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")


def above_zero(options: Any, *names: str) -> None:
    """Raises ValueError for the first of the fields that is 0 or smaller, or NaN."""
    for name in names:
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(options, name)}")
