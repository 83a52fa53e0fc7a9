"""PAECGRPOTrainer on two gloo ranks with two micro-batches each, against one process that holds all four."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")
from helpers import free_port, relative_error
from integrations.tiny_trl import Piece, Truth, truth
from integrations.trl_rank_worker import OPTIONS, RANKS, run

from paec_kernels.losses.paec_config import PAECConfig

CONFIG = PAECConfig(**{name.removeprefix("paec_"): value for name, value in OPTIONS.items() if name[:5] == "paec_"})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run, (free_port(), str(folder)), nprocs=RANKS)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(RANKS)]


def pieces_of(ranks: list[dict], i: int) -> list[Piece]:
    return [Piece(*piece) for rank in ranks for piece in rank["steps"][i][0]]


@pytest.fixture(scope="module")
def exact(ranks: list[dict]) -> list[Truth]:
    """Compute each optimiser step over the four pieces."""
    first = truth(pieces_of(ranks, 0), ranks[0]["steps"][0][1], CONFIG, None)
    anchor = first.metrics["mean_entropy"].item()
    others = range(1, OPTIONS["max_steps"])
    return [first] + [truth(pieces_of(ranks, i), ranks[0]["steps"][i][1], CONFIG, anchor) for i in others]


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


def test_a_plan_of_each_piece_would_be_seen(ranks: list[dict], exact: list[Truth]) -> None:
    for i, step in enumerate(exact):
        pieces = pieces_of(ranks, i)
        assert len({int(piece.completion_mask.sum()) for piece in pieces}) > 2  # ragged
        assert max(abs(threshold - step.metrics["threshold"]) for threshold in step.thresholds) > 1e-2


@pytest.mark.parametrize("sharding", ["sharded", "head apart"])
def test_a_model_in_fsdp2_shards_gets_the_same_gradient(ranks: list[dict], sharding: str) -> None:
    for rank in ranks:
        assert max(value.abs().max() for value in rank["whole"].values()) > 1
        for name, value in rank["whole"].items():
            torch.testing.assert_close(rank[sharding][name], value, rtol=1e-5, atol=1e-5)
