"""Kills runs of PAECGRPOTrainer at random moments; what it left, and how it goes on, as a record.

PYTHONPATH=tests python -m integrations.kills_trl --kills 20 --out bench_results/trust/kills_trl.json
"""

import json
import tempfile
import warnings
from pathlib import Path

import kills
import torch
from integrations import tiny_trl
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from paec_kernels.integrations.trl import PAECGRPOTrainer

STEPS = 6
OPTIONS = tiny_trl.PAEC_ON | {"paec_anchor_steps": 3}
OPTIONS |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "max_completion_length": 6}
# Measured, or of the last process alone, as TRL has it: train_loss is a mean of what this process saw.
LEFT_OUT = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


class Say(TrainerCallback):
    """Says which step is saved, when the trainer does."""

    def on_save(self, args, state, control, **_):
        kills.say(f"saved {state.global_step}")


class Killed:
    """TRL's trainer with PAEC, as `kills.Trainer`."""

    SAVE = Trainer._save_checkpoint.__code__  # beneath TRL's, which writes a model card first

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
        log = [{name: x for name, x in row.items() if name not in LEFT_OUT} for row in run.state.log_history]
        end = {"weights": run.model.state_dict(), "log": log, "paec": run.paec.state_dict()}
        torch.save(end, folder / "end.pt")

    def newest(self, folder: Path) -> int:
        steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if self._complete(path)]
        return max(steps, default=0)

    @staticmethod
    def _made(folder: Path) -> PAECGRPOTrainer:
        return tiny_trl.trainer(folder, callbacks=[Say()], **OPTIONS)

    @staticmethod
    def _complete(checkpoint: Path) -> bool:
        """Tell whether what the trainer writes last is there, whole."""
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False
        return True


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        kills.command(Killed(), Path(work), __doc__, ("trl", "transformers", "accelerate"))
