"""The code of docs/in_your_trainer.md, run as it stands there, and the names in docs/diagnostics.md."""

import copy
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import on_ranks
from losses.batches import with_anchor

import paec_kernels as pk
from paec_kernels import reference
from paec_kernels.losses.paec import Plan

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "in_your_trainer.md"
B, L, V, D = 4, 12, 50, 8
RANKS = 2
STEPS = 2
# The first step sets the anchor; in the second the floor is above it, so that the penalty acts.
ON = pk.PAECConfig(beta=1.0, anchor_steps=1, rho_min=1.2)


def page_names() -> dict[str, Any]:
    """The names that the page's code defines, in one namespace."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, V, bias=False))


def ragged_batches(number: int) -> list[SimpleNamespace]:
    """Micro-batches of which each has more tokens than the one before."""
    torch.manual_seed(1)
    made = []
    for k in range(number):
        input_ids = torch.randint(V, (B, L))
        valid = torch.rand(B, L - 1) < (k + 1) / (number + 1)
        with torch.no_grad():
            old_logp = pk.token_stats(tiny_model()(input_ids)[:, :-1], input_ids[:, 1:], valid=valid).logp
        made.append(SimpleNamespace(input_ids=input_ids, valid=valid, advantages=torch.randn(B), old_logp=old_logp))
    return made


page = pytest.fixture(page_names)
model = pytest.fixture(tiny_model)


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


def work(rank: int, library: str, path: Path) -> dict[str, Any]:
    """Take the page's steps with this rank's half of the micro-batches.

    Returns:
        Weights, number of tokens, and the anchor's sum before it was saved and after it was loaded.
    """
    names = page_names()
    paec = names["paec"] = pk.PAEC(ON)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    micro_batches = ragged_batches(4)[2 * rank : 2 * rank + 2]
    if library == "accelerate":
        from accelerate import Accelerator

        ranks = Accelerator(cpu=True)
        model, optimizer = ranks.prepare(model, optimizer)
        ranks.register_for_checkpointing(paec)
        step, save, load = names["accelerate_step"], ranks.save_state, ranks.load_state
    else:
        from lightning_fabric import Fabric

        ranks = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
        ranks.launch()
        model, optimizer = ranks.setup(model, optimizer)
        state = {"model": model, "optimizer": optimizer, "paec": paec}
        step, save, load = names["fabric_step"], partial(ranks.save, state=state), partial(ranks.load, state=state)
    for _ in range(STEPS):
        step(ranks, model, micro_batches, optimizer)
    weights = [value.detach().clone() for value in model.parameters()]
    anchors = [paec.anchor_sum.clone()]
    save(str(path))
    torch.distributed.barrier()  # the first rank has written
    paec.load_state_dict(pk.PAEC(ON).state_dict())
    load(str(path))
    anchors.append(paec.anchor_sum)
    return {"weights": weights, "tokens": names["tokens_per_rank"](micro_batches), "anchors": anchors}


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

    for found in on_ranks(RANKS, work, tmp_path, library, tmp_path / "checkpoint"):
        for value, expected in zip(found["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=1e-4, atol=1e-5)
        assert found["tokens"] == sum(int(batch.valid.sum()) for batch in batches) / RANKS
        before, after = found["anchors"]
        assert before == after == pytest.approx(page["paec"].anchor_sum.item(), rel=1e-6)


def test_the_table_of_forces_is_that_of_real_logits(real_logits):
    """Each row of the docs: the floor, q and sum(m) / N, and each penalty's pull."""
    expected = []
    for times in (1, 4):
        stats = reference.token_stats(times * real_logits.logits.double())
        valid = torch.ones_like(stats.entropy, dtype=torch.bool)
        mean_entropy = pk.PAEC(pk.PAECConfig())(stats, valid).metrics["mean_entropy"].item()
        forces = []
        for penalty in ("absolute", "relative", "proportional"):
            paec = with_anchor(pk.PAEC(pk.PAECConfig(penalty=penalty, rho_min=0.5)), mean_entropy / 0.9 / 0.5)
            metrics = paec(stats, valid).metrics
            forces.append(metrics["penalty_per_token"])
        numbers = [metrics["floor"], metrics["threshold"], metrics["mean_mask"], *forces]
        expected.append(f"| x {times} | {' | '.join(f'{x:.2f}' for x in numbers)} |")
    assert re.findall(r"^\| x .*$", (DOCS / "diagnostics.md").read_text(), re.MULTILINE) == expected


def test_the_table_of_diagnostics_has_what_the_plan_has():
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "diagnostics.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert named == set(Plan._fields) - {"penalty", "mask_sum", "pull"}  # which the others are made of
