"""Saved state: files that are either whole or as they were, and refusals of another configuration's."""

import json
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
    that share the disk (whose process ids may coincide). After an error it is gone. A missing folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a whole file; ValueError for NaN and infinities, which JSON does not have."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Return the value as JSON's types, with None for NaN and infinities."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


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
