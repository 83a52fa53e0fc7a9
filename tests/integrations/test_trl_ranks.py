"""PAECGRPOTrainer on two gloo ranks with two micro-batches each, against one process that holds all four."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")
from helpers import on_ranks, relative_error
from integrations import tiny_trl
from integrations.tiny_trl import Piece, Step, Truth, truths

from paec_kernels.losses.paec_config import PAECConfig

RANKS = 2
SHARDINGS = ("whole", "sharded", "head apart")
METRICS = ("threshold", "mean_entropy", "mask_sum", "penalty")
OPTIONS = tiny_trl.PAEC_ON | {"max_steps": 3}
CONFIG = PAECConfig(**{name.removeprefix("paec_"): value for name, value in tiny_trl.PAEC_ON.items()})


def work(rank: int, folder: Path) -> dict[str, Any]:
    """What this rank saw of a run, its gradients and its log, and the gradients of a pass of its own."""
    warnings.simplefilter("ignore", FutureWarning)
    return recorded(folder) | {sharding: gradients_of_a_pass(folder, sharding) for sharding in SHARDINGS}


def recorded(folder: Path) -> dict[str, Any]:
    trainer, steps = tiny_trl.recorded(folder, reward=tiny_trl.constant, ddp_backend="gloo", **OPTIONS)
    trainer.train()
    return {
        "steps": [(list(map(tuple, step.pieces)), step.weights, step.gradients) for step in steps],
        "metrics": {name: tiny_trl.logged(trainer, f"paec/{name}") for name in METRICS},
        "loss": tiny_trl.logged(trainer, "loss"),
        "anchor": trainer.paec.anchor_sum,
    }


def gradients_of_a_pass(folder: Path, sharding: str) -> dict[str, torch.Tensor]:
    """Through the trainer's scoring pass, the model whole or in FSDP2's shards, its head by itself or not."""
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(RANKS, work, folder, folder / "out")


@pytest.fixture(scope="module")
def exact(ranks: list[dict]) -> list[Truth]:
    """Compute each optimiser step over the four pieces."""
    steps = []
    for of_ranks in zip(*(rank["steps"] for rank in ranks), strict=True):
        pieces = [Piece(*piece) for pieces, _, _ in of_ranks for piece in pieces]
        steps.append(Step(pieces, *of_ranks[0][1:]))
    return truths(steps, CONFIG)


def test_the_plan_is_that_of_all_pieces(ranks: list[dict], exact: list[Truth]) -> None:
    for rank in ranks:
        for name, values in rank["metrics"].items():
            assert values == pytest.approx([step.metrics[name].item() for step in exact], rel=1e-5), name
        assert rank["loss"] == pytest.approx([step.loss.item() for step in exact], abs=1e-5)
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0]["anchor"] == ranks[1]["anchor"]


def test_the_gradient_is_that_of_all_pieces(ranks: list[dict], exact: list[Truth]) -> None:
    for i, step in enumerate(exact):
        assert step.metrics["penalty"] > 0.01 or i == 0
        for rank in ranks:
            assert relative_error(rank["steps"][i][2], step.gradients) < 1e-5


@pytest.mark.parametrize("sharding", ["sharded", "head apart"])
def test_a_model_in_fsdp2_shards_gets_the_same_gradient(ranks: list[dict], sharding: str) -> None:
    for rank in ranks:
        assert max(value.abs().max() for value in rank["whole"].values()) > 1
        for name, value in rank["whole"].items():
            torch.testing.assert_close(rank[sharding][name], value, rtol=1e-5, atol=1e-5)
