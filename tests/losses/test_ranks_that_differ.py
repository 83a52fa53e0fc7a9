"""Ranks whose statistics differ in dtype, or that have none: one plan everywhere, or one error everywhere; no hang."""

import copy
import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks_once
from losses.batches import accuracy_of, make_batch
from losses.test_entropy_term import TERMS

from paec_kernels.losses.covariance import clip_cov_selection, kl_cov_selection
from paec_kernels.losses.ranks import mean_over_ranks

FLOAT32, FLOAT64 = torch.float32, torch.float64
# What rank 0 and rank 1 observe: the dtypes of their micro-batches; "empty" is one without a token.
RANKS = {
    "float64 and nothing": ([FLOAT64], []),
    "nothing and float32": ([], [FLOAT32]),
    "nothing at all": ([], []),
    "float64 and no token of float32": ([FLOAT64], ["empty"]),
    "float32 and float64": ([FLOAT32], [FLOAT64]),
    "both types on one rank": ([FLOAT32, FLOAT64], [FLOAT64]),
}
DIFFER = {"float32 and float64"}
TERMS = {name: make for name, make in TERMS.items() if "Triton" not in name}


def micro_batches(rank: int, dtypes: list) -> list:
    return [
        make_batch(3, 0) if dtype == "empty" else make_batch(2, 9, dtype=dtype, seed=10 * rank + i)
        for i, dtype in enumerate(dtypes)
    ]


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TypeError as error:
        return str(error)


def step_of(term, batches: list) -> dict[str, Any]:
    """A whole optimiser step: the plan as floats, the sum of the terms, and the state after it."""
    for batch in batches:
        term.observe(batch.stats, batch.valid)
    plan = term.plan()
    terms = [term.term(b.stats, b.valid, plan, accuracy_of(b.stats)).item() for b in batches]
    term.step()
    state = {name: x.item() for name, x in term.state_dict().items() if isinstance(x, torch.Tensor)}
    return {"plan": {name: x.item() for name, x in plan._asdict().items()}, "terms": sum(terms), "state": state}


def work(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found = {}
    for name, make in TERMS.items():
        for situation, dtypes in RANKS.items():
            term = make()
            found[name, situation] = outcome(lambda: step_of(term, micro_batches(rank, dtypes[rank])))  # noqa: B023
            # The next step is as any other.
            found[name, situation, "after"] = step_of(term, micro_batches(rank, [FLOAT64]))["plan"]
    for situation, dtypes in {"float32 and float64": (FLOAT32, FLOAT64), "16 bits": (torch.bfloat16, FLOAT32)}.items():
        logp, advantages = -torch.ones(2, 3, dtype=dtypes[rank]), torch.tensor([[1.0], [-1.0]])
        valid = torch.ones(2, 3, dtype=torch.bool)
        selections = {
            "kl-cov": lambda: kl_cov_selection([logp], [advantages], [valid], fraction=0.2),  # noqa: B023
            "clip-cov": lambda: clip_cov_selection([logp], [logp], [advantages], [valid], seed=0),  # noqa: B023
        }
        found |= {(name, situation): outcome(select) for name, select in selections.items()}
    found["mean"] = mean_over_ranks(torch.tensor(1.0 + rank, dtype=(FLOAT32, FLOAT64)[rank]), None)
    found["count"] = mean_over_ranks(torch.tensor(5 + rank), None)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return on_ranks_once(2, work, tmp_path_factory)


@pytest.mark.parametrize("situation", sorted(RANKS.keys() - DIFFER))
@pytest.mark.parametrize("name", TERMS)
def test_ranks_of_one_dtype_have_one_plan(ranks, name, situation):
    mine, other = (rank[name, situation] for rank in ranks)
    assert str(mine["plan"]) == str(other["plan"])  # as text, in which NaN equals itself
    assert mine["state"] == other["state"]
    alone = step_of(TERMS[name](), [b for i in (0, 1) for b in micro_batches(i, RANKS[situation][i])])
    for field, expected in alone["plan"].items():
        expected /= 2 if field == "items" else 1
        assert mine["plan"][field] == pytest.approx(expected, rel=1e-6, nan_ok=True), field
    assert (mine["terms"] + other["terms"]) / 2 == pytest.approx(alone["terms"], rel=1e-6)


@pytest.mark.parametrize("name", [*TERMS, "kl-cov", "clip-cov"])
def test_ranks_of_two_dtypes_are_refused_on_every_rank(ranks, name):
    for rank in ranks:
        assert rank[name, "float32 and float64"] == (
            "all ranks must have tensors of one dtype on one type of device, "
            "got torch.float32 on cpu on rank 0, torch.float64 on cpu on rank 1"
        )


@pytest.mark.parametrize("name", TERMS)
def test_a_refused_step_leaves_nothing_behind(ranks, name):
    for situation in RANKS:
        assert str(ranks[0][name, situation, "after"]) == str(ranks[1][name, situation, "after"])
    term = TERMS[name]()
    expected = step_of(copy.deepcopy(term), [micro_batches(rank, [FLOAT64])[0] for rank in (0, 1)])["plan"]
    for field, value in expected.items():
        value /= 2 if field == "items" else 1
        after = ranks[0][name, "float32 and float64", "after"][field]
        assert after == pytest.approx(value, rel=1e-6, nan_ok=True), field


def test_selections_of_16_bits_are_made_in_float32(ranks):
    for name in ("kl-cov", "clip-cov"):
        assert all(isinstance(mask, torch.Tensor) for rank in ranks for mask in rank[name, "16 bits"])


def test_means_are_taken_of_any_dtypes(ranks):
    assert [rank["mean"].dtype for rank in ranks] == [FLOAT32, FLOAT64]
    assert all(rank["mean"] == 1.5 and rank["count"] == 5.5 for rank in ranks)
