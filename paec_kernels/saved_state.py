"""Saved state: files that are either whole or as they were, and refusals of what is damaged or another's."""

import json
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

ABSENT = "absent"
# Fields that configs have got since, with what every checkpoint without them was made with.
ADDED = {
    # PAECConfig
    "penalty": "absolute",
    "anchor_unit": "optimiser_step",
    "anchored": "mean",
    # WarmStart and its habits
    "families": ["add", "sub", "parity", "sort", "count"],
    "width": 96,
    "layers": 3,
    "step_slip": 0.004,
}
PARTIAL = ".partial"
OLD = ".old"
# What `_beside` names.
_LEFTOVER = re.compile(rf"(.+)\.[0-9a-f]{{32}}(?:{re.escape(PARTIAL)}|{re.escape(OLD)})", re.DOTALL)


class UnreadableFileError(ValueError):
    """A saved file is empty, cut off, damaged or something else; the message names it and says what to do."""

    def __init__(self, path: str | Path, what: str, found: str, remedy: str) -> None:
        super().__init__(path, what, found, remedy)  # as they came: it is pickled on its way to another process

    def __str__(self) -> str:
        return "{} must be {}, but {}. {}".format(*self.args)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, beside ``path``, which it replaces in one step when the block ends without an error.

    Each call gives a path of its own, so that several processes may write the same file at once, on whatever machines
    that share the disk (whose process ids may coincide). After an error it is gone; of a writer that was killed it
    stays, ending in PARTIAL. Once the block has ended the file outlives a crash of the machine. A missing folder is
    made.

    Raises:
        OSError: the file cannot be written; the message names it.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(path, PARTIAL)
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to write to, which takes the place of ``path`` when the block ends, as `whole_file` does.

    A folder cannot replace another in one step: a kill between the two that it takes leaves none at ``path``, and the
    old one beside it until `remove_partials`.
    """
    with naming(path):
        partial, old = _beside(path, PARTIAL), _beside(path, OLD)
        partial.mkdir(parents=True)
        try:
            yield partial
            for written in (*partial.rglob("*"), partial):
                sync(written)
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            for left in (partial, old):
                shutil.rmtree(left, ignore_errors=True)


def remove_partials(folder: Path) -> None:
    """Remove what killed writers left in the folder; an old folder that nothing has replaced is put back."""
    for left in folder.iterdir():
        ours = _LEFTOVER.fullmatch(left.name)
        if ours is None:
            continue
        path = folder / ours[1]
        if left.name.endswith(OLD) and not path.exists():
            os.replace(left, path)
        elif left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _beside(path: Path, ending: str) -> Path:
    """Return a path of its own for each writer of ``path``."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{ending}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block, such as that of a full disk, the name of the file that could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # a library's own
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_saved(path: Path, state: Mapping[str, Any]) -> None:
    """Write, whole or not at all, what `load_saved` reads; OSError, naming the file, where that is not possible."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's zip writer says where it was, and hides why
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


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
        except (OSError, UnreadableFileError):
            raise
        except Exception as error:  # whatever foreign bytes do to a reader; torch's own advice is to run their code
            if is_out_of_memory(error):
                raise
            found = f"holds something else than tensors and plain values ({type(error).__name__})"
            raise UnreadableFileError(path, what, f"it {found}", remedy) from error
    return _with_fields(state, path, what, remedy, fields)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, Python's, a GPU's or torch's on the CPU: it says nothing of what was read."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def read_json(path: Path, what: str, remedy: str, fields: Sequence[str] = ()) -> dict[str, Any]:
    """Read an object of JSON; arguments and errors are those of `load_saved`."""
    content = path.read_bytes()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        found = f"it is not JSON ({error})" if content else "it is empty"
        raise UnreadableFileError(path, what, found, remedy) from error
    return _with_fields(value, path, what, remedy, fields)


def _with_fields(value: Any, path: str | Path, what: str, remedy: str, fields: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UnreadableFileError(path, what, f"it holds a {type(value).__name__}", remedy)
    if missing := [name for name in fields if name not in value]:
        raise UnreadableFileError(path, what, f"it holds no {', '.join(missing)}", remedy)
    return value


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


def options_as_json(options: Any) -> Any:
    """Return options as JSON's types: paths as text, tuples as lists, infinities as "inf" and "-inf"."""
    return json.loads(json.dumps(options, default=str), parse_constant=lambda name: str(float(name)))


def differing_fields(saved: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List ``field: checkpoint VALUE, here VALUE`` for each that differs; nested fields by their dotted names.

    A field of ADDED that the checkpoint does not have counts as its default.
    """
    found = []
    for name in {**ours, **saved}:
        theirs, own = saved.get(name, ADDED.get(name, ABSENT)), ours.get(name, ABSENT)
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
