"""Saved state: files that are either whole or as they were, and refusals of what is damaged or another's."""

import json
import os
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

ABSENT = "absent"


class UnreadableFileError(ValueError):
    """A saved file is empty, cut off, damaged or something else; the message names it and says what to do."""

    def __init__(self, path: str | Path, what: str, found: str, remedy: str) -> None:
        super().__init__(f"{path} must be {what}, but {found}. {remedy}")


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


def load_saved(path: str | Path, what: str, remedy: str, fields: Sequence[str] = ()) -> dict[str, Any]:
    """Read a dictionary that ``torch.save`` wrote, onto the CPU; no code that a file may hold is run.

    Args:
        what: what the file must be, as in "a checkpoint of paec train".
        remedy: a sentence that says what to do about another.
        fields: what the dictionary must hold.
    Raises:
        OSError: there is no such file, or it may not be read.
        UnreadableFileError: it is empty, cut off or damaged, holds code, or is another kind of file.
    """
    with open(path, "rb") as file:
        try:
            if damage := _damage(file):
                raise UnreadableFileError(path, what, damage, remedy)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, MemoryError, UnreadableFileError):
            raise
        except Exception as error:  # whatever foreign bytes do to a reader; torch's own advice is to run their code
            found = f"holds something else than tensors and plain values ({type(error).__name__})"
            raise UnreadableFileError(path, what, f"it {found}", remedy) from error
    if not isinstance(state, dict):
        raise UnreadableFileError(path, what, f"it holds a {type(state).__name__}", remedy)
    if missing := [name for name in fields if name not in state]:
        raise UnreadableFileError(path, what, f"it holds no {', '.join(missing)}", remedy)
    return state


def _damage(file: IO[bytes]) -> str | None:
    """Say what is wrong with a zip file, as torch.save writes them, by its checksums, which torch.load passes over."""
    if not file.read(1):
        return "it is empty"
    if not zipfile.is_zipfile(file):  # the directory of a zip file stands at its end
        return "it is cut off, or of another kind"
    with zipfile.ZipFile(file) as archive:
        try:
            damaged = archive.testzip()
        except Exception as error:  # as above
            damaged = str(error)
    file.seek(0)
    return f"it is damaged: {damaged}" if damaged else None


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
