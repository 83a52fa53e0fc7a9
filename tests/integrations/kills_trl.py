"""Kills runs of PAECGRPOTrainer at random moments; what it left, and how it goes on, as a record.

PYTHONPATH=tests python -m integrations.kills_trl --kills 20 --out bench_results/trust/kills_trl.json
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import kills
import torch
from integrations import tiny_trl
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOTrainer

STEPS = 6
OPTIONS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "max_completion_length": 6}
PAEC = tiny_trl.PAEC_ON | {"paec_anchor_steps": 3}
TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


class Say(TrainerCallback):
    """Says which step is saved, when the trainer does."""

    def on_save(self, args, state, control, **_):
        kills.say(f"saved {state.global_step}")


class Killed:
    """TRL's trainer, with PAEC or stock, as `kills.Trainer`."""

    SAVE = Trainer._save_checkpoint.__code__  # beneath TRL's, which writes a model card first

    def __init__(self, stock: bool = False) -> None:
        self.stock = stock

    def train(self, folder: Path) -> None:
        warnings.simplefilter("ignore")
        step = self.newest(folder)
        newest = str(folder / f"checkpoint-{step}") if step else None
        last = get_last_checkpoint(folder) if folder.exists() else None
        if last != newest:  # what is left of a checkpoint that was being written
            try:
                self._made(folder).train(resume_from_checkpoint=True)
            except Exception as error:
                if str(last) in str(error):
                    kills.say(f"refused: {error}".replace("\n", " "))
        run = self._made(folder)
        run.train(resume_from_checkpoint=newest)
        end = {"weights": run.model.state_dict(), "log": self._log(run)}
        torch.save(end if self.stock else end | {"paec": run.paec.state_dict()}, folder / "end.pt")

    def newest(self, folder: Path) -> int:
        steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if self._complete(path)]
        return max(steps, default=0)

    def _made(self, folder: Path) -> GRPOTrainer:
        options = OPTIONS if self.stock else OPTIONS | PAEC
        return tiny_trl.trainer(folder, stock=self.stock, callbacks=[Say()], **options)

    def _complete(self, checkpoint: Path) -> bool:
        """Tell whether what the trainer writes last is there, whole."""
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False
        return True

    @staticmethod
    def _log(run: GRPOTrainer) -> list[dict[str, Any]]:
        return [{name: x for name, x in row.items() if name not in TIMES} for row in run.state.log_history]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        kills.command(Killed(), Path(work), __doc__, ("trl", "transformers", "accelerate"))
