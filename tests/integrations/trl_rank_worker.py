"""What each process of `test_trl_ranks` runs; a module of its own, so that spawned processes can import it."""

import os
import warnings
from pathlib import Path

import torch

RANKS = 2
METRICS = ("threshold", "mean_entropy", "mask_sum", "penalty")
OPTIONS = {"paec_beta": 0.1, "paec_anchor_steps": 1, "paec_rho_min": 1.2, "max_steps": 3, "max_grad_norm": 0.0}


def run(rank: int, port: int, folder: str) -> None:
    """Train, and write to ``folder/rank`` what this rank saw, its gradients and its log."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore", FutureWarning)
    from integrations import tiny_trl

    recorder = tiny_trl.Recorder()
    trainer = recorder.run = tiny_trl.trainer(
        Path(folder) / "out", reward=tiny_trl.constant, callbacks=[recorder], ddp_backend="gloo", **OPTIONS
    )
    trainer.train()
    saved = {
        "steps": [(list(map(tuple, step.pieces)), step.weights, step.gradients) for step in recorder.steps],
        "metrics": {name: tiny_trl.logged(trainer, f"paec/{name}") for name in METRICS},
        "anchor": trainer.paec.anchor_sum,
    }
    torch.save(saved, Path(folder) / str(rank))
