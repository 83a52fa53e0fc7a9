"""What each process of `test_trl_ranks` runs; a module of its own, so that spawned processes can import it."""

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

RANKS = 2
SHARDINGS = ("whole", "sharded", "head apart")
METRICS = ("threshold", "mean_entropy", "mask_sum", "penalty")
OPTIONS = {"paec_beta": 0.1, "paec_anchor_steps": 1, "paec_rho_min": 1.2, "max_steps": 3, "max_grad_norm": 0.0}


def run(rank: int, port: int, folder: str) -> None:
    """Train, and write to ``folder/rank`` what this rank saw, its gradients and its log."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore", FutureWarning)
    saved = recorded(Path(folder) / "out")
    for sharding in SHARDINGS:
        saved[sharding] = gradients_of_a_pass(Path(folder) / "out", sharding)
    torch.save(saved, Path(folder) / str(rank))
    # DistributedDataParallel must go first: the last to let go of gloo's threads can wait for them for ever.
    gc.collect()
    torch.distributed.destroy_process_group()


def recorded(folder: Path) -> dict[str, Any]:
    from integrations import tiny_trl

    recorder = tiny_trl.Recorder()
    trainer = recorder.run = tiny_trl.trainer(
        folder, reward=tiny_trl.constant, callbacks=[recorder], ddp_backend="gloo", **OPTIONS
    )
    trainer.train()
    return {
        "steps": [(list(map(tuple, step.pieces)), step.weights, step.gradients) for step in recorder.steps],
        "metrics": {name: tiny_trl.logged(trainer, f"paec/{name}") for name in METRICS},
        "loss": tiny_trl.logged(trainer, "loss"),
        "anchor": trainer.paec.anchor_sum,
    }


def gradients_of_a_pass(folder: Path, sharding: str) -> dict[str, torch.Tensor]:
    """Through the trainer's scoring pass, the model whole or in FSDP2's shards, its head by itself or not."""
    from integrations import tiny_trl

    trainer = tiny_trl.trainer(folder, ddp_backend="gloo")
    model = trainer.model
    if sharding != "whole":
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        if sharding == "head apart":
            fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = torch.arange(2, 32).view(2, 15)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), 10)
    (logps.sum() + trainer._scored.pop()[1].nucleus_entropy.sum()).backward()
    return {name: p.grad if sharding == "whole" else p.grad.full_tensor() for name, p in model.named_parameters()}
