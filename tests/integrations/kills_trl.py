"""Kills runs of PAECGRPOTrainer at random moments; what it left, and how it goes on, as a record.

PYTHONPATH=tests:. python -m integrations.kills_trl --kills 20 --out bench_results/trust/kills_trl.json
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any, ClassVar

import kills
import torch
from integrations import tiny_trl
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from paec_kernels.integrations.trl import PAECGRPOTrainer

# All within the first epoch, of eight steps: from a checkpoint at an epoch's end, or in a later epoch, the stock
# trainer does not go on as if undisturbed either; `resumes` measures it.
STEPS, EVERY = 7, 3
OPTIONS = tiny_trl.PAEC_ON | {"paec_anchor_steps": 3, "max_completion_length": 6, "max_steps": STEPS}
SAVED = {"save_strategy": "steps", "save_steps": EVERY, "per_device_train_batch_size": 2}
MEASURED = ("step_time",)


class Say(TrainerCallback):
    """Says which step is saved, when the trainer does."""

    def on_save(self, args, state, control, **_):
        kills.say(f"saved {state.global_step}")


class Killed(kills.Trainer):
    """TRL's trainer with PAEC."""

    AIMS: ClassVar = {Trainer._save_checkpoint.__code__: "checkpoint"}  # beneath TRL's, which writes a model card first
    MOMENTS = ("checkpoint", "checkpoint", "time")

    def train(self, folder: Path) -> None:
        warnings.simplefilter("ignore")
        step = self.newest(folder)
        newest = str(folder / f"checkpoint-{step}") if step else None
        for path in self.leftovers(folder):  # one at most, the last
            kills.try_leftover(path, lambda: self._made(folder).train(resume_from_checkpoint=True))
        if step < STEPS:
            self._made(folder).train(resume_from_checkpoint=newest)

    def newest(self, folder: Path) -> int:
        steps = [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*") if self._complete(path)]
        return max(steps, default=0)

    def leftovers(self, folder: Path) -> list[Path]:
        return [path for path in folder.glob("checkpoint-*") if not self._complete(path)]

    def states(self, folder: Path) -> dict[str, Any]:
        checkpoint = folder / f"checkpoint-{STEPS}"
        log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        return {
            "weights": load_file(checkpoint / "model.safetensors"),
            "log": [{name: x for name, x in row.items() if name not in MEASURED} for row in log],
            **{
                name: torch.load(checkpoint / f"{name}.pt", weights_only=True)
                for name in ("optimizer", "scheduler", "paec")
            },
        }

    @staticmethod
    def _made(folder: Path) -> PAECGRPOTrainer:
        return tiny_trl.trainer(folder, callbacks=[Say()], **OPTIONS | SAVED)

    @staticmethod
    def _complete(checkpoint: Path) -> bool:
        """Tell whether what the trainer writes last is there, whole."""
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            return False
        return True


def resumes(folder: Path) -> dict[str, Any]:
    """Whether each trainer, resumed and not killed, ends with the weights of a whole run, at four steps an epoch."""
    steps = {"within the first epoch": 2, "at its end": 4, "within the second": 6}
    found: dict[str, dict[str, bool]] = {}
    for name, stock in (("stock", True), ("ours", False)):
        own = {key: value for key, value in OPTIONS.items() if not (stock and key.startswith("paec_"))}
        whole = tiny_trl.trainer(folder / name, stock=stock, **own, save_strategy="steps", save_steps=2)
        whole.train()
        found[name] = {}
        for where, step in steps.items():
            resumed = tiny_trl.trainer(folder / "resumed", stock=stock, **own)
            resumed.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{step}"))
            pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
            found[name][where] = all(torch.equal(*pair) for pair in pairs)
    return {"resumed_without_a_kill_equal_to_the_bit": found}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        kills.command(Killed, Path(work), __doc__, ("trl", "transformers", "accelerate"), resumes)
