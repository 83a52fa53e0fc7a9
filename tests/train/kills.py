"""Kills `paec train` at random moments; what it left, and how it goes on, as a record.

PYTHONPATH=tests:. python -m train.kills --kills 20 --out bench_results/trust/kills_train.json
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import kills
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paec_kernels import cli, saved_state
from paec_kernels.saved_state import OLD, PARTIAL
from paec_kernels.train import out_folder, run_folder
from paec_kernels.train.report.evaluate import Evaluation

OPTIONS = (
    "--steps 6 --checkpoint-every 2 --tasks parity count --prompts 2 --answers 4 --max-new-tokens 8 "
    "--method.paec.anchor-steps 3 --evaluate.problems 3 --evaluate.samples 2 "
    "--warm-start.skill-steps 60 --warm-start.habit-steps 0 --warm-start.batch 16"
).split()
MEASURED = ("seconds", "sample_seconds")


class Killed(kills.Trainer):
    """The command, which goes on by itself in a folder that holds a checkpoint."""

    AIMS: ClassVar = {
        out_folder._lock.__code__: "start",
        run_folder.RunLog.__init__.__code__: "start",
        run_folder.RunLog.write.__code__: "log",
        run_folder.RunLog.sync.__code__: "log",
        saved_state.write_saved.__code__: "checkpoint",
        Evaluation.save.__code__: "evaluation",
    }
    MOMENTS = ("checkpoint", "log", "time", "start", "checkpoint", "log", "time", "evaluation")
    SAVED = r"saved step (\d+)"

    def __init__(self, work: Path) -> None:
        self.cache = work / "cache"
        self.train(work / "first")  # makes the start that the others read

    def train(self, folder: Path) -> None:
        try:
            cli.main(["train", "--out", str(folder), "--cache", str(self.cache), *OPTIONS])
        except SystemExit as ended:
            if ended.code:
                raise

    def newest(self, folder: Path) -> int:
        try:
            return run_folder.read_checkpoint(folder / run_folder.CHECKPOINT)["steps_done"]
        except FileNotFoundError:
            return 0

    def states(self, folder: Path) -> dict[str, Any]:
        config = json.loads((folder / "config.json").read_text())
        board = EventAccumulator(str(folder / "tensorboard")).Reload()
        return {
            "checkpoint": run_folder.read_checkpoint(folder / run_folder.CHECKPOINT),
            "log": rows(folder),
            "evaluation": (folder / "eval.json").read_text(),
            "config": {name: value for name, value in config.items() if name != "out"},
            "files": sorted(path.name for path in folder.iterdir()),
            "tensorboard": {
                name: [(event.step, event.value) for event in board.Scalars(name)]
                for name in board.Tags()["scalars"]
                if name not in MEASURED
            },
        }

    def leftovers(self, folder: Path) -> list[Path]:
        """Return what was to replace a file; the checkpoint itself must be whole, else `newest` raises."""
        return [*folder.glob(f"*{PARTIAL}"), *folder.glob(f"*{OLD}")]

    def steps_lost(self, folder: Path, saved: int) -> int:
        """Count the steps up to ``saved`` that the folder does not hold, in its checkpoint or in its log."""
        kept = [a == b for a, b in zip(rows(folder)[:saved], rows(self.undisturbed)[:saved], strict=False)]
        return max(super().steps_lost(folder, saved), saved - sum(kept))


def rows(folder: Path) -> list[dict[str, Any]]:
    if not (folder / "log.jsonl").exists():
        return []
    return [{name: x for name, x in row.items() if name not in MEASURED} for row in run_folder.read_rows(folder)]


if __name__ == "__main__":
    logging.disable()  # TensorBoard's reader tells of each row that was made again
    with tempfile.TemporaryDirectory() as work:
        kills.command(lambda: Killed(Path(work)), Path(work), __doc__, ("tensorboard",))
