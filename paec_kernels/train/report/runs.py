"""Finished training runs, as their folders tell them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paec_kernels.train.report.evaluate import Evaluation
from paec_kernels.train.run_folder import read_config, read_rows

LOGGED = "step reward entropy selected_entropy floor".split()  # the columns that a comparison reads


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
        arm_fields: fields of the config that name the arm, dots for nested ones: ``("algo", "method.paec.lam")``
            gives the arms ``paec, method.paec.lam=0.3`` and so on.
    Raises:
        ValueError: a file or a field is missing or malformed; the message names it.
    """
    path = folder / "config.json"
    config = read_config(folder, [])
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
    rows = read_rows(folder)
    if not rows:
        raise ValueError(f"{path} must hold at least one step, got none")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in LOGGED if name not in row]
        if missing:
            raise ValueError(f"{path}, line {number}: a step must have {', '.join(LOGGED)}; {missing[0]} is missing")
    return {name: np.array([row[name] for row in rows], dtype=float) for name in LOGGED}  # None becomes NaN
