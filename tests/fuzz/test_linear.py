"""`linear_token_stats` and `one_pass_loss` in any chunks, against the reference in float64."""

import os

import pytest
import torch
from fuzz.heads import close, exact_and_eager, gradients, heads, make
from fuzz.properties import holds
from fuzz.strategies import evenly, options, sizes
from hypothesis import strategies as st
from ops.heads import head, logits_seen
from ops.rows import check_against, is_uncertain
from torch import Tensor

import paec_kernels as pk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: overflow


@holds(tests=4, fuzz=600, sizes=heads, given=options)
def test_any_head_in_any_chunks(backend, sizes, given):
    case, truth = make(sizes, given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "PAEC_CHUNK_BYTES", str(sizes.budget))
        stats, got = gradients(
            lambda hidden, weight, bias: pk.linear_token_stats(
                hidden, weight, case.token_ids, bias=bias, chunk_rows=sizes.chunk_rows, backend=backend, **case.options
            ),
            list(case.tensors),
            case.coefficients,
        )
    check_against(stats, truth)
    for gradient, exact, eager in zip(got, *exact_and_eager(case), strict=True):
        close(gradient, exact, eager)
    return is_uncertain(truth.exact)


@holds(tests=3, fuzz=500, sizes=heads, given=options)
def test_one_pass_of_a_sum_over_tokens(backend, sizes, given):
    case, truth = make(sizes, given)
    seen = []

    def chunk_loss(stats: pk.TokenStats, rows: Tensor) -> Tensor:
        seen.append(rows)
        terms = zip(case.coefficients[:, rows], stats[:3], strict=True)
        return sum(((c * row).sum() for c, row in terms if row is not None), torch.zeros(()))

    leaves = [None if x is None else x.clone().requires_grad_() for x in case.tensors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "PAEC_CHUNK_BYTES", str(sizes.budget))
        loss = pk.one_pass_loss(
            leaves[0], leaves[1], case.token_ids, chunk_loss, bias=leaves[2], chunk_rows=sizes.chunk_rows,
            backend=backend, **case.options,
        )  # fmt: skip
    valid = case.options.get("valid", torch.ones(sizes.rows, dtype=torch.bool))
    assert torch.cat([torch.empty(0), *seen]).tolist() == valid.nonzero().squeeze(1).tolist()
    exact_loss, eager_loss = (
        sum(
            (c.double() * row.double()).sum()
            for c, row in zip(case.coefficients, s[:3], strict=True)
            if row is not None
        )
        for s in (truth.exact, truth.eager)
    )
    # A sum of as many numbers as there are rows, each with an error of its own.
    assert (loss - exact_loss).abs() <= (eager_loss - exact_loss).abs() + 1e-5 * (1 + 3 * exact_loss.abs() + sizes.rows)
    got = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    for gradient, exact, eager in zip(got, *exact_and_eager(case), strict=True):
        close(gradient, exact, eager)
    return is_uncertain(truth.exact)


@holds(
    fuzz=500,
    rows=sizes(1, 200),
    hidden=sizes(1, 64),
    width=sizes(1, 700),
    chunk_rows=evenly(st.none(), sizes(1, 250)),
    budget=sizes(1, 20).map(lambda power: 2**power),
)
def test_backward_sees_the_logits_that_forward_saw(rows, hidden, width, chunk_rows, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "PAEC_CHUNK_BYTES", str(budget))
        seen = logits_seen(head(rows, hidden, width), chunk_rows)
    assert torch.equal(seen["forward"], seen["backward"])
    return True
