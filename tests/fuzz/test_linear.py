"""`linear_token_stats` and `one_pass_loss` in any chunks, against the reference in float64.

Hidden states, weights and biases are small whole numbers, over a power of two: every logit is then exact in all dtypes
and in any order of its sum, so the statistics are held to those of the very same logits.
"""

import os
from typing import Any, NamedTuple

import pytest
import torch
from fuzz.properties import holds
from fuzz.strategies import FLOATS, Options, evenly, mostly, options, seeds, sizes
from hypothesis import strategies as st
from ops.heads import head, logits_seen
from ops.rows import Truth, check_against, is_uncertain, truth_of
from torch import Tensor

import paec_kernels as pk
from paec_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: overflow


class Head(NamedTuple):
    """The sizes of a head and of what it is given."""

    rows: int
    hidden: int
    width: int
    dtype: torch.dtype
    bias: bool
    power: int  # of two, that weights and biases are divided by
    chunk_rows: int | None
    budget: int  # bytes
    seed: int

    def make(self) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)

        def whole(most: int, *shape: int) -> Tensor:
            return torch.randint(-most, most + 1, shape, generator=generator).float()

        hidden, weight, bias = whole(2, self.rows, self.hidden), whole(3, self.width, self.hidden), whole(9, self.width)
        weight, bias = (x / 2**self.power for x in (weight, bias))
        return hidden.to(self.dtype), weight.to(self.dtype), bias.to(self.dtype) if self.bias else None


heads = st.builds(
    Head,
    rows=mostly(sizes(2, 9), sizes(0, 1)),
    hidden=sizes(1, 16),
    width=evenly(sizes(1, 40), sizes(2, 300), st.sampled_from([127, 128, 129, 257])),
    dtype=st.sampled_from(FLOATS),
    bias=st.booleans(),
    power=sizes(0, 4),
    chunk_rows=evenly(st.none(), sizes(1, 12)),
    budget=st.sampled_from([1000, 4000, 20_000, 10**8]),
    seed=seeds,
)


def gradients(statistics, leaves: list[Tensor | None], coefficients: Tensor) -> tuple[pk.TokenStats, list[Tensor]]:
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    stats = statistics(*leaves)
    rows = (stats.logp, stats.entropy, stats.nucleus_entropy)
    loss = sum((c * row).sum() for c, row in zip(coefficients, rows, strict=True) if row is not None)
    return stats, list(torch.autograd.grad(loss, [x for x in leaves if x is not None]))


def close(gradient: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Error at most eager's, by 1.2 since a largest error is itself a random number, + 1e-5 or one rounding."""
    assert gradient.dtype == eager.dtype
    error, allowed = ((x.double() - exact).abs().amax() if x.numel() else 0 for x in (gradient, eager))
    rounding = torch.finfo(gradient.dtype).eps * exact.abs().amax() if exact.numel() else 0
    assert error <= max(1.2 * allowed, rounding) + 1e-5, f"{error:.2e}, eager {allowed:.2e}"


class Case(NamedTuple):
    tensors: tuple[Tensor, Tensor, Tensor | None]
    token_ids: Tensor | None
    options: dict[str, Any]
    coefficients: Tensor  # [3, N], 0 for the nucleus entropy where rounding decides what it is of


def make(sizes: Head, given: Options) -> tuple[Case, Truth]:
    tensors = hidden, weight, bias = sizes.make()
    token_ids, arguments = given.for_rows((sizes.rows,), sizes.width)
    if given.padding:
        rubbish = torch.full((given.padding, sizes.hidden), float("nan"), dtype=sizes.dtype)
        weight = torch.cat([weight, rubbish])
        bias = None if bias is None else torch.cat([bias, rubbish[:, 0]])
        arguments["vocab_size"] = sizes.width
    logits = reference_logits(*tensors)
    options = {name: value for name, value in arguments.items() if name != "vocab_size"}
    truth = truth_of(logits.to(sizes.dtype), token_ids, **options)
    coefficients = torch.randn(3, sizes.rows, generator=torch.Generator().manual_seed(sizes.seed))
    coefficients[2, truth.ambiguous] = 0
    return Case((hidden, weight, bias), token_ids, arguments, coefficients), truth


def reference_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())


def exact_and_eager(case: Case) -> list[list[Tensor]]:
    vocab_size = case.options.get("vocab_size")

    def eager(hidden, weight, bias):
        return reference.linear_token_stats(
            hidden, weight[:vocab_size], case.token_ids, bias=None if bias is None else bias[:vocab_size],
            **{name: value for name, value in case.options.items() if name != "vocab_size"},
        )  # fmt: skip

    doubles = [None if x is None else x.double() for x in case.tensors]
    return [gradients(eager, list(leaves), case.coefficients)[1] for leaves in (doubles, case.tensors)]


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
