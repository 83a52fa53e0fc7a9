"""A run's folder on disk: config.json, log.jsonl with an object a step, checkpoint.pt, eval.json, TensorBoard's events.

A run may be killed at any moment. Each file is therefore either whole or as it was, except the log, whose last line may
be cut off and whose rows after the checkpoint are made again.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from paec_kernels.saved_state import differing_fields, whole_file
from paec_kernels.train.report.evaluate import Evaluation

LOGGED = "step reward entropy selected_entropy floor".split()  # the columns that a comparison reads


class RunLog:
    """Writes config.json, then rows of log.jsonl and of TensorBoard; drops the rows after ``steps_done``."""

    def __init__(self, folder: Path, config: dict[str, Any], steps_done: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "config.json", json.dumps(config, indent=1) + "\n")
        kept = [row for row in read_rows(folder) if row["step"] <= steps_done]
        _replace(folder / "log.jsonl", "".join(map(_line, kept)))
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


@dataclass(frozen=True)
class Run:
    """A finished training run, as its folder tells it."""

    folder: Path
    arm: str
    seed: int
    config: dict[str, Any]
    log: dict[str, np.ndarray]  # the columns LOGGED, float64 [steps]; NaN where a step has no value
    evaluation: Evaluation


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return each folder that is a run, and all runs anywhere below those that are not, in order of their names.

    Raises:
        ValueError: a folder holds none.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = sorted(path.parent for path in folder.rglob("eval.json")) if folder.is_dir() else []
        if not runs:
            raise ValueError(f"folders must hold finished runs (with eval.json), got {folder}")
        found |= dict.fromkeys(runs)
    return list(found)


def read_run(folder: Path, *, arm_fields: Sequence[str] = ("algo",)) -> Run:
    """Read a run's folder.

    Args:
        arm_fields: fields of the config that name the arm, dots for nested ones: ``("algo", "paec.lam")`` gives the
            arms ``paec, paec.lam=0.3`` and so on.
    Raises:
        ValueError: a file or a field is missing or malformed; the message names it.
    """
    path = folder / "config.json"
    try:
        config = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} must be a JSON object: {error}") from error
    seed, first, *others = (_field(config, name, path) for name in ("seed", *arm_fields))
    arm = ", ".join([str(first), *(f"{name}={v}" for name, v in zip(arm_fields[1:], others, strict=True))])
    if not (folder / "eval.json").is_file():
        raise ValueError(f"a run to compare must have been evaluated: there is no {folder / 'eval.json'}")
    return Run(folder, arm, seed, config, _log(folder), Evaluation.load(folder / "eval.json"))


def _field(config: dict[str, Any], name: str, path: Path) -> Any:
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{path} must hold the field {name!r}, got {', '.join(config) or 'no fields'}")
        value = value[part]
    return value


def _log(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "log.jsonl"
    try:
        rows = read_rows(folder)
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object a line: {error}") from error
    if not rows:
        raise ValueError(f"{path} must hold at least one step, got none")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in LOGGED if name not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: a step must have {', '.join(LOGGED)}; {missing[0]} is missing")
    return {name: np.array([row[name] for row in rows], dtype=float) for name in LOGGED}  # None becomes NaN


def _line(row: dict[str, float]) -> str:
    """Return the row as a line of JSON, which has no NaN: null."""
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite) + "\n"


def _replace(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
