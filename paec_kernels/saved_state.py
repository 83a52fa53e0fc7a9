"""Saved state: files that are either whole or as they were, and refusals of another configuration's."""

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ABSENT = "absent"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, beside ``path``, which it replaces in one step when the block ends without an error.

    Each call gives a path of its own, so that several processes may write the same file at once, on whatever machines
    that share the disk (whose process ids may coincide). After an error it is gone.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def differing_fields(saved: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List ``field: checkpoint VALUE, here VALUE`` for each that differs; nested fields by their dotted names."""
    found = []
    for name in {**ours, **saved}:
        theirs, own = saved.get(name, ABSENT), ours.get(name, ABSENT)
        if isinstance(theirs, Mapping) and isinstance(own, Mapping):
            found += differing_fields(theirs, own, f"{prefix}{name}.")
        elif theirs != own:
            found.append(f"{prefix}{name}: checkpoint {theirs!r}, here {own!r}")
    return found


def refuse_other_config(saved: Mapping[str, Any], ours: Mapping[str, Any], what: str) -> None:
    """Raise where a checkpoint's config is another one.

    Raises:
        RuntimeError: each differing field is named with both values.
    """
    differing = differing_fields(saved, ours)
    if differing:
        raise RuntimeError(f"the checkpoint is of another {what} (" + "; ".join(differing) + ")")
