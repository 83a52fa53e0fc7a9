"""A head with what it is given, and what its two passes make of it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import paec_kernels as pk
from paec_kernels.ops import layout, operator


def head(n=37, width=24, n_cols=530, dtype=torch.float32, bias=False):
    """Hidden states, a weight with logits of a language model's spread, ids with one ignored, and valid rows."""
    return SimpleNamespace(
        hidden=torch.randn(n, width).to(dtype),
        weight=(torch.randn(n_cols, width) * 3 / math.sqrt(width)).to(dtype),
        bias=torch.randn(n_cols).to(dtype) if bias else None,
        token_ids=torch.randint(0, n_cols, (n,)).index_fill(0, torch.tensor([2 % n]), -100),
        valid=torch.rand(n) > 0.3,
        coefficients=torch.randn(3, n),
    )


def run(statistics, case, **options):
    """Statistics, and the gradients of hidden, weight and bias of a mix of logp, H and H_p."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    stats = statistics(leaves[0], leaves[1], case.token_ids, bias=leaves[2], **options)
    loss = (stats.logp * case.coefficients[0]).sum()
    loss = loss + (stats.entropy * case.coefficients[1] + stats.nucleus_entropy * case.coefficients[2]).sum()
    loss.backward()
    return stats, [leaf.grad for leaf in leaves if leaf is not None]


def logits_seen(case: SimpleNamespace, chunk_rows: int | None) -> dict[str, Tensor]:
    """The logits ``[N, V]`` that the forward and the backward pass made, in float32 rows that begin at 16 elements."""
    sizes = (len(case.hidden), len(case.weight))
    seen = {name: torch.full(sizes, math.nan) for name in ("forward", "backward")}
    done = 0

    def forward(logits, *_):
        nonlocal done
        assert logits.stride(1) % 16 == 0
        seen["forward"][done : done + logits.shape[1]] = logits[0]
        done += logits.shape[1]
        return layout.new_table(torch.zeros, logits.shape[1], logits.device)

    def backward(d_stats, stats, rest, logits, *others):
        assert logits.stride(1) % 16 == 0
        first = others[-1]
        seen["backward"][:, first : first + logits.shape[2]] = logits[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "passes_of", lambda _: operator.Passes(forward, backward))
        run(pk.linear_token_stats, case, chunk_rows=chunk_rows)
    return seen
