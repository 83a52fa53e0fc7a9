"""Heads, what they are given, and their gradients by the reference.

Hidden states, weights and biases are small whole numbers, over a power of two: every logit is then exact in all dtypes
and in any order of its sum, so the statistics are held to those of the very same logits.
"""

from typing import Any, NamedTuple

import torch
from fuzz.strategies import FLOATS, Options, evenly, mostly, seeds, sizes
from hypothesis import strategies as st
from ops.rows import Truth, truth_of
from torch import Tensor

import paec_kernels as pk
from paec_kernels import reference


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
