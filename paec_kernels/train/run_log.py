"""A run's folder: config.json, log.jsonl with one row a step, and TensorBoard's events."""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from paec_kernels.saved_state import whole_file


class RunLog:
    """Rows of a run that may have been stopped at any moment: those after ``steps_done`` are dropped and made again."""

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
    """The rows of ``folder``'s log.jsonl, none if there is no such file; a line cut off by a kill is left out."""
    path = folder / "log.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(row: dict[str, float]) -> str:
    """JSON has no NaN: null."""
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite) + "\n"


def _replace(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
