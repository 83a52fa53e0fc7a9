"""A run's folder on disk: config.json, log.jsonl with an object a step, checkpoint.pt, eval.json, TensorBoard's events,
and a Hugging Face model as such.

A run may be killed at any moment. Each file is therefore either whole or as it was, except the log, whose last line may
be cut off and whose rows after the checkpoint are made again. What a checkpoint's steps wrote is on the disk before it.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from paec_kernels.extras import extra
from paec_kernels.saved_state import (
    UnreadableFileError,
    differing_fields,
    is_out_of_memory,
    load_saved,
    naming,
    options_as_json,
    read_json,
    whole_file,
    without_nan,
    write_json,
)

with extra("train"):
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.pt"
MODEL = "model"  # the folder of a Hugging Face model as it was trained
A_CHECKPOINT = "a checkpoint of paec train"
REMEDY = "Put a copy of it back, or move it away: without it the run starts again from its first step."


class RunLog:
    """Writes config.json, then rows of log.jsonl and of TensorBoard; drops the rows after ``steps_done``.

    Raises:
        ValueError: log.jsonl is damaged, or does not hold each step up to ``steps_done``; nothing has changed.
        OSError: a file cannot be written; the message names it. So do the methods.
    """

    def __init__(self, folder: Path, config: dict[str, Any], steps_done: int) -> None:
        self._path, self._board_path = folder / "log.jsonl", folder / "tensorboard"
        kept = read_rows(folder, steps_done)
        if len(kept) < steps_done:
            what = f"the log of the {steps_done} steps that are in {CHECKPOINT}"
            remedy = f"Put a copy of it back, or move {CHECKPOINT} away: the run then starts again from its first step."
            raise UnreadableFileError(self._path, what, f"it ends after {len(kept)}", remedy)
        write_json(folder / "config.json", config)
        with whole_file(self._path) as partial:
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._file = self._path.open("ab", buffering=0)
        with naming(self._board_path):
            self._board = SummaryWriter(str(self._board_path), purge_step=steps_done + 1)

    def write(self, row: dict[str, float]) -> None:
        with naming(self._path):
            left = memoryview(_line(row).encode())
            while left:  # on a disk that gets full, a part is written before the error
                left = left[self._file.write(left) :]
        with naming(self._board_path):
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())
        with naming(self._board_path):
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        with naming(self._board_path):
            self._board.close()


def read_rows(folder: Path, most: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of log.jsonl, none if there is no such file; a line that a kill cut off is left out.

    Args:
        most: how many rows are wanted; what comes after them is not looked at.
    Raises:
        ValueError: a line is not a JSON object, or not of the step after the line before; file and line are named.
    """
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True)[:most], start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} must hold a JSON object a line, but line {number} is none: {error}") from error
        step = row.get("step") if isinstance(row, dict) else None
        if step != number:
            raise ValueError(
                f"{path} must hold a JSON object a line, of step 1, 2, ..., but line {number} is {row!r:.60}"
            )
        rows.append(row)
    return rows


def count_rows(folder: Path) -> int:
    """Count the rows of log.jsonl while another process may be writing it."""
    path = folder / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


class OtherConfigError(ValueError):
    """The checkpoint was made with another configuration."""


def set_results_aside(folder: Path, steps: int) -> None:
    """Rename what was made of the weights after these steps, since they will not be those of the run's end.

    Where a name is taken, as by the results of an earlier start from the first step, a number follows it.
    """
    for path in (folder / "eval.json", folder / MODEL):
        if path.exists():
            aside, times = path.with_stem(f"{path.stem}-{steps}"), 1
            while aside.exists():
                times += 1
                aside = path.with_stem(f"{path.stem}-{steps}-{times}")
            path.rename(aside)


def refuse_full_disk(module: nn.Module, path: Path) -> None:
    """Raise OSError where the disk has no room for a checkpoint: the weights, and as much for each of Adam's two."""
    needed = 3 * sum(parameter.nbytes for parameter in module.parameters())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"a checkpoint needs {needed:,} bytes, and the disk has {free:,}", str(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state saved at ``path``, on the CPU; errors as `saved_state.load_saved`."""
    return load_saved(path, A_CHECKPOINT, REMEDY)


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the state saved at ``path`` if it belongs to ``config``.

    Raises:
        OSError, UnreadableFileError: as `saved_state.load_saved`.
        OtherConfigError: its ``config`` differs from ``config``; the message names each field and both values.
    """
    state = load_saved(path, A_CHECKPOINT, REMEDY, ["config"])
    with fitting(path):
        differing = differing_fields(options_as_json(state["config"]), config)
    if differing:
        raise OtherConfigError(
            f"{path} was made with another configuration: {'; '.join(differing)}. "
            "Use those values again, or another --out."
        )
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Give the errors of a state that does not fit what it is loaded into the name of its file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        first_line = str(error).partition("\n")[0]
        found = f"it does not fit: {type(error).__name__}, {first_line}"
        raise UnreadableFileError(path, A_CHECKPOINT, found, REMEDY) from error


def read_config(folder: Path, fields: list[str]) -> dict[str, Any]:
    """Return a run's config.json.

    Raises:
        OSError: there is none, or it may not be read.
        UnreadableFileError: it is damaged, or has not these fields; the message names it.
    """
    config = read_json(folder / "config.json", "a JSON object", "Put a copy of it back.", fields)
    return options_as_json(config)  # earlier versions wrote infinities as Python does


def _line(row: dict[str, float]) -> str:
    return json.dumps(without_nan(row)) + "\n"
