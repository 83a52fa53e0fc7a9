"""PAECTrainingWorker on two gloo ranks of three micro-batches each, in FSDP2's shards, against one process for all."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: its transformers is an older one, see make test-verl")
from helpers import free_port, relative_error
from integrations_verl.tiny_verl import (
    MICRO_BATCH,
    PAEC,
    TEMPERATURE,
    Sequences,
    Truth,
    save_model,
    truth,
)
from integrations_verl.verl_rank_worker import RANKS, STEPS, hand_over_in_parts, run

from paec_kernels import PAECConfig, reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_model(folder / "model")
    torch.multiprocessing.spawn(run, (free_port(), str(folder)), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[list[tuple]]:
    """Read each rank's steps: their sequences, weights, gradients, metrics."""
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(RANKS)]


@pytest.fixture(scope="module")
def exact(folder: Path, ranks: list[list[tuple]]) -> list[Truth]:
    """Compute each optimiser step over the six micro-batches."""
    steps: list[Truth] = []
    for i in range(STEPS):
        micro_batches = []
        for rank in ranks:
            columns = [column.split(MICRO_BATCH) for column in rank[i][0]]
            micro_batches += [Sequences(*rows) for rows in zip(*columns, strict=True)]
        anchor = steps[0].metrics["mean_entropy"] if steps else None
        steps.append(truth(folder / "model", micro_batches, ranks[0][i][1], PAECConfig(**PAEC), anchor))
    return steps


def test_the_plan_is_that_of_all_micro_batches(ranks: list[list[tuple]], exact: list[Truth]) -> None:
    for rank in ranks:
        for (*_, metrics), step in zip(rank, exact, strict=True):
            for name, value in step.metrics.items():
                assert metrics[f"paec/{name}"] == pytest.approx(value, rel=1e-5), name


def test_the_loss_that_verl_reports_is_that_of_all_micro_batches(ranks, exact: list[Truth]) -> None:
    for rank in ranks:
        assert [metrics["loss"] for *_, metrics in rank] == pytest.approx([t.metrics["loss"] for t in exact], rel=1e-5)


def test_the_gradient_is_that_of_all_micro_batches(ranks: list[list[tuple]], exact: list[Truth]) -> None:
    for i, step in enumerate(exact):
        assert step.metrics["penalty"] > 0.01 or i == 0
        for rank in ranks:
            assert relative_error(rank[i][2], step.gradients) < 1e-5


def test_a_plan_of_each_micro_batch_would_be_seen(exact: list[Truth]) -> None:
    for step in exact:
        assert max(abs(threshold - step.metrics["threshold"]) for threshold in step.thresholds) > 1e-2


def test_the_anchor_is_that_of_the_first_step(ranks: list[list[tuple]], exact: list[Truth]) -> None:
    for rank in ranks:
        assert "paec/anchor" not in rank[0][3]
        assert [step[3]["paec/anchor"] for step in rank[1:]] == pytest.approx([exact[0].metrics["mean_entropy"]] * 2)


def test_ranks_that_share_a_sequence_see_all_of_it(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    torch.multiprocessing.spawn(hand_over_in_parts, (free_port(), str(tmp_path)), nprocs=RANKS)
    parts = [torch.load(tmp_path / f"part{rank}", weights_only=True) for rank in range(RANKS)]
    logits = parts[0]["logits"].double().requires_grad_()
    true = reference.token_stats(logits, parts[0]["token_ids"], top_p=PAECConfig().top_p, temperature=TEMPERATURE)
    (gradient,) = torch.autograd.grad(true.logp.sum() + true.entropy.sum(), logits)
    for part in parts:
        for name, value in true._asdict().items():
            torch.testing.assert_close(part[f"paec_{name}"].double(), value.double(), rtol=1e-5, atol=1e-5)
        assert part["ranks of a step"] == 1  # else PAEC would count the sequence once for each
    # verl multiplies by the number of ranks that share a sequence, and FSDP averages over them.
    gathered = torch.cat([part["gradient"] for part in parts])[: len(logits)]
    torch.testing.assert_close(gathered / RANKS, gradient.float(), rtol=1e-5, atol=1e-5)
