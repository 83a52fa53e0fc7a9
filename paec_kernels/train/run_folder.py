"""A run's folder on disk: config.json, log.jsonl with an object a step, checkpoint.pt, eval.json, TensorBoard's events.

A run may be killed at any moment. Each file is therefore either whole or as it was, except the log, whose last line may
be cut off and whose rows after the checkpoint are made again.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from paec_kernels.saved_state import differing_fields, whole_file, without_nan


class RunLog:
    """Writes config.json, then rows of log.jsonl and of TensorBoard; drops the rows after ``steps_done``."""

    def __init__(self, folder: Path, config: dict[str, Any], steps_done: int) -> None:
        with whole_file(folder / "config.json") as partial:
            partial.write_text(json.dumps(config, indent=1) + "\n")  # an option may be infinite: Python reads that
        kept = [row for row in read_rows(folder) if row["step"] <= steps_done]
        with whole_file(folder / "log.jsonl") as partial:
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._file = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def write(self, row: dict[str, float]) -> None:
        self._file.write(_line(row))
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of log.jsonl, none if there is no such file; a line that a kill cut off is left out."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class OtherConfigError(ValueError):
    """The checkpoint was made with another configuration."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Replace ``path`` in one step: whoever is killed meanwhile leaves the old file."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state saved at ``path``, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the state saved at ``path`` if it belongs to ``config``.

    Raises:
        OtherConfigError: its ``config`` differs from ``config``; the message names each field and both values.
    """
    state = read_checkpoint(path)
    if differing := differing_fields(state["config"], config):
        raise OtherConfigError(
            f"{path} was made with another configuration: {'; '.join(differing)}. "
            "Use those values again, or another --out."
        )
    return state


def _line(row: dict[str, float]) -> str:
    return json.dumps(without_nan(row)) + "\n"
