"""What each process of `test_evaluate` runs; a module of its own, so that spawned processes can import it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from train.rote import SETTINGS, Counting, Rote

from paec_kernels.train.report.evaluate import evaluate

TASKS = [Counting("a", 10, 3), Counting("b", 500, 2)]


def run(rank: int, world_size: int, folder: str) -> None:
    """Write to ``folder`` the evaluation as this rank has it, and how many problems it sampled."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    policy = Rote()
    evaluate(policy, TASKS, replace(SETTINGS, problems=9), batch_size=12).save(Path(folder, f"{rank}.json"))
    asked = sum(problems for problems, answers, _ in policy.calls if answers > 1)
    Path(folder, f"{rank}.asked").write_text(json.dumps(asked))
    dist.destroy_process_group()
