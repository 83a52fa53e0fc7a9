"""Columns of the vocabulary on several ranks, as gloo processes: statistics and gradients of one process."""

from functools import cache

import pytest
import torch
from helpers import on_ranks_once
from ops import split_cases
from ops.rows import (
    ExpectedGradient,
    Truth,
    check_against,
    check_against_gradient,
    check_same_bits,
    expected_gradient,
    truth_of,
)
from ops.split_cases import FOR_TRITON, GROUPS, cases, weights

from paec_kernels import TokenStats

of_cases = pytest.mark.parametrize(
    ("group", "name"),
    [(str(n), name) for n in GROUPS for name in cases()] + [("triton", name) for name in FOR_TRITON],
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return on_ranks_once(max(GROUPS), split_cases.work, tmp_path_factory)


def of_case(ranks: list[dict], group: str, name: str) -> list[dict]:
    if group not in ranks[0]:
        pytest.skip("compiled kernels take no CPU tensors: needs triton and TRITON_INTERPRET=1")
    return [rank[group][name] for rank in ranks if group in rank]


def options_of(name: str) -> dict:
    return {key: value for key, value in cases()[name].options.items() if key != "inplace_backward"}


@cache
def truth(name: str) -> Truth:
    return truth_of(cases()[name].logits, cases()[name].token_ids, **options_of(name))


@cache
def gradient(name: str) -> ExpectedGradient:
    case = cases()[name]
    return expected_gradient(case.logits.clone(), case.token_ids, weights(case), **options_of(name))


@of_cases
def test_statistics_are_those_of_one_process(ranks, group, name):
    check_against(TokenStats(*of_case(ranks, group, name)[0]["stats"][0]), truth(name))


@of_cases
def test_gradients_are_those_of_one_process(ranks, group, name):
    of_ranks = [rank["gradients"][0] for rank in of_case(ranks, group, name)]
    check_against_gradient(torch.cat(of_ranks, dim=-1), gradient(name))


@of_cases
def test_the_same_to_the_bit_on_every_rank_and_in_every_run(ranks, group, name):
    found = of_case(ranks, group, name)
    for rank in found:
        for stats in rank["stats"]:
            check_same_bits(stats, found[0]["stats"][0])
        for gradient in rank["gradients"]:
            check_same_bits([gradient], rank["gradients"][:1])
