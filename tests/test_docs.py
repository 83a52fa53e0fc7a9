"""The code of docs/in_your_trainer.md, run as it stands there."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import free_port
from integrations import docs_rank_worker
from integrations.docs_rank_worker import ON, RANKS, STEPS, ragged_batches, tiny_model

import paec_kernels as pk


@pytest.fixture
def page() -> dict:
    return docs_rank_worker.page()


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_model()


@pytest.fixture
def batches() -> list[SimpleNamespace]:
    return ragged_batches(2)


def whole(batches) -> SimpleNamespace:
    columns = ("input_ids", "valid", "advantages", "old_logp")
    return SimpleNamespace(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in columns})


def trained(model, step) -> list[torch.Tensor]:
    """The weights after a step, which is called with a copy of the model and its optimiser."""
    model = copy.deepcopy(model)
    step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return list(model.parameters())


def assert_alike(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_the_drop_in_equals_accumulation_over_micro_batches(page, model, batches):
    together = trained(model, lambda m, o: page["train_step"](m, whole(batches), o))
    in_parts = trained(model, lambda m, o: page["accumulated_step"](m, batches, o))
    assert not torch.equal(together[0], next(model.parameters()))
    assert_alike(together, in_parts)
    assert page["loss_fn"].paec.anchor_count == page["paec"].anchor_count == 1


def test_a_plan_for_each_micro_batch_is_another_loss(page, model, batches):
    together = trained(model, lambda m, o: page["train_step"](m, whole(batches), o))
    page["paec"] = pk.PAEC(pk.PAECConfig(beta=1.0))

    def one_by_one(m, o):
        for batch in batches:
            page["accumulated_step"](m, [batch], o)

    assert (trained(model, one_by_one)[0] - together[0]).abs().max() > 1e-3


def test_hidden_states_give_the_same_statistics(page, model, batches):
    body, head = model
    for a, b in zip(
        page["statistics"](model, batches[0]), page["statistics_from_hidden"](body, head, batches[0]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("library", ["accelerate", "lightning_fabric"])
def test_two_ranks_take_the_step_of_one_process_for_all(page, model, library: str, tmp_path: Path):
    name = library.replace("_", "-")
    pytest.importorskip(library, reason=f"{name} is not installed: pip install {name}")
    batches = ragged_batches(4)
    page["paec"] = pk.PAEC(ON)
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    for _ in range(STEPS):
        plan = page["accumulated_step"](model, batches, optimizer)
    assert plan.penalty > 0.01

    torch.multiprocessing.spawn(docs_rank_worker.run, (free_port(), library, str(tmp_path)), nprocs=RANKS)
    for rank in range(RANKS):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        for value, expected in zip(found["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)
        assert found["tokens"] == sum(int(batch.valid.sum()) for batch in batches) / RANKS
        before, after = found["anchors"]
        assert before == after == pytest.approx(page["paec"].anchor_sum.item(), rel=1e-6)
