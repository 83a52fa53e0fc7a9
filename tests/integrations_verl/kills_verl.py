"""Kills verl's actor worker with PAEC at random moments; what it left, and how it goes on, as a record.

PYTHONPATH=tests:. python -m integrations_verl.kills_verl --kills 20 --out bench_results/trust/kills_verl.json
"""

import shutil
import tempfile
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import integrations_verl.conftest  # noqa: F401  # what verl reads while it is imported
import kills
import torch
from helpers import free_port
from integrations_verl import tiny_verl
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from paec_kernels.integrations.verl import PAECPolicyLossConfig, PAECTrainingWorker

STEPS, EVERY = 6, 2
PAEC = PAECPolicyLossConfig(paec=tiny_verl.PAEC | {"anchor_steps": 3})
MEASURED = ("perf/", "mfu")  # times and memory


class Killed(kills.Trainer):
    """verl's worker, driven as verl's trainer does."""

    AIMS: ClassVar = {PAECTrainingWorker.save_checkpoint.__code__: "checkpoint"}
    MOMENTS = ("checkpoint", "checkpoint", "time")

    def __init__(self, model: Path) -> None:
        tiny_verl.save_model(model)
        self.model = model

    def train(self, folder: Path) -> None:
        warnings.simplefilter("ignore")
        tiny_verl.start_process_group(0, 1, free_port())
        worker = tiny_verl.worker(self.model, PAEC)
        done = self.newest(folder)
        for path in self.leftovers(folder):
            load = partial(tiny_verl.worker(self.model, PAEC).load_checkpoint, str(path / "actor"))
            whole = is_whole(path / "actor", self.undisturbed / path.name / "actor")
            kills.try_leftover(path, load, whole)
            shutil.rmtree(path)
        metrics: dict[int, dict[str, Any]] = {}
        if done:
            latest = Path(find_latest_ckpt_path(str(folder)))
            worker.load_checkpoint(str(latest / "actor"))
            metrics = torch.load(latest / "metrics.pt", weights_only=True)
        for step in range(done + 1, STEPS + 1):
            data = tiny_verl.batch(tiny_verl.sequences(6, seed=step), global_token_num=None)
            found = tiny_verl.take(worker, data).metrics
            metrics[step] = {name: float(x) for name, x in found.items() if not name.startswith(MEASURED)}
            if step % EVERY == 0:
                latest = folder / f"global_step_{step}"
                worker.save_checkpoint(str(latest / "actor"), global_step=step)
                torch.save(metrics, latest / "metrics.pt")
                # As verl's trainer marks a checkpoint that is complete
                (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
                kills.say(f"saved {step}")
        weights = {name: tiny_verl.whole(value) for name, value in worker.engine.module.state_dict().items()}
        torch.save({"weights": weights, "metrics": metrics, "paec": worker.paec.state_dict()}, folder / "end.pt")
        torch.distributed.destroy_process_group()

    def newest(self, folder: Path) -> int:
        path = find_latest_ckpt_path(str(folder))
        return int(path.split("_")[-1]) if path else 0

    def states(self, folder: Path) -> dict[str, Any]:
        return torch.load(folder / "end.pt", weights_only=True)

    def leftovers(self, folder: Path) -> list[Path]:
        done = self.newest(folder)
        return [path for path in folder.glob("global_step_*") if int(path.name.split("_")[-1]) > done]


def is_whole(checkpoint: Path, other: Path) -> bool:
    """Tell whether a checkpoint has every file of another, and none is cut off.

    Bytes would not do: in a file of tensors there is the process' random state too. What marks one as whole is the zip
    directory at its end.
    """
    files, others = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (checkpoint, other)
    )
    return files == others and all(
        zipfile.is_zipfile(checkpoint / file)
        if file.suffix == ".pt"
        else (checkpoint / file).read_bytes() == (other / file).read_bytes()
        for file in files
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        kills.command(lambda: Killed(Path(work) / "model"), Path(work), __doc__, ("verl", "transformers"))
