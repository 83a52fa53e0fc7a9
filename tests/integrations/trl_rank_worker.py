"""What each process of `test_trl_ranks` runs; a module of its own, so that spawned processes can import it."""

import os
import warnings
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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
        "whole": gradients_of_a_pass(Path(folder) / "out", sharded=False),
        "sharded": gradients_of_a_pass(Path(folder) / "out", sharded=True),
    }
    torch.save(saved, Path(folder) / str(rank))


def gradients_of_a_pass(folder: Path, *, sharded: bool) -> dict[str, torch.Tensor]:
    """Through the trainer's scoring pass, the model whole or in FSDP2's shards."""
    from integrations import tiny_trl

    trainer = tiny_trl.trainer(folder, ddp_backend="gloo")
    model = trainer.model
    if sharded:
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.arange(2, 32).view(2, 15)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 10)
    (logps.sum() + trainer._scored.pop()[1].nucleus_entropy.sum()).backward()
    return {name: p.grad.full_tensor() if sharded else p.grad for name, p in model.named_parameters()}
