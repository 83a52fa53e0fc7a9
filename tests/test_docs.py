"""The code of docs/in_your_trainer.md and of the README, run as it stands there."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import paec_kernels as pk

PAGE = Path(__file__).parents[1] / "docs" / "in_your_trainer.md"
B, L, V, D = 4, 12, 50, 8


@pytest.fixture
def page() -> dict:
    """The names that the page's code defines, in one namespace."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False))


@pytest.fixture
def batches(model) -> list[SimpleNamespace]:
    torch.manual_seed(1)
    made = []
    for _ in range(2):
        input_ids = torch.randint(V, (B, L))
        valid = torch.rand(B, L - 1) < 0.7
        with torch.no_grad():
            old_logp = pk.token_stats(model(input_ids)[:, :-1], input_ids[:, 1:], valid=valid).logp
        made.append(SimpleNamespace(input_ids=input_ids, valid=valid, advantages=torch.randn(B), old_logp=old_logp))
    return made


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


def test_accelerate(page, model, batches):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    bare = trained(model, lambda m, o: page["accumulated_step"](m, batches, o))
    page["paec"].load_state_dict(pk.PAEC(pk.PAECConfig()).state_dict())

    def step(m, o):
        m, o = accelerator.prepare(m, o)
        page["accelerate_step"](accelerator, m, batches, o)

    assert_alike(bare, trained(model, step))


def test_tokens_of_all_ranks(page, batches):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert page["tokens_per_rank"](batches) == sum(int(batch.valid.sum()) for batch in batches)
    finally:
        torch.distributed.destroy_process_group()
