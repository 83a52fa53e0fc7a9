"""Plain PyTorch: the full sort, and the cut to the best k tokens before it; both also through `torch.compile`."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import TOP_P, Inputs

SIREN_TOP_K = 10_000  # entropy_topk of github.com/Linn3a/siren, verl/workers/actor/dp_actor.py


def by_sort(logits: Tensor, token_ids: Tensor) -> Outputs:
    """Sort the log-probabilities once for nucleus and margin: the shortest correct eager form we know."""
    log_p = logits.float().log_softmax(-1)
    return statistics(log_p, log_p.sort(dim=-1, descending=True).values, token_ids)


def by_top_k(logits: Tensor, token_ids: Tensor) -> Outputs:
    """Compute what `by_sort` does, but look for the nucleus among the k best tokens alone.

    SIREN's own code also leaves out the token that crosses top_p, and fills its mask in a loop over rows; here the
    nucleus is the usual one, and no loop slows it.
    """
    log_p = logits.float().log_softmax(-1)
    return statistics(log_p, log_p.topk(min(SIREN_TOP_K, log_p.shape[-1]), dim=-1).values, token_ids)


def without_nucleus(logits: Tensor, token_ids: Tensor) -> Outputs:
    log_p = logits.float().log_softmax(-1)
    return {
        "logp": log_p.gather(-1, token_ids[:, None]).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
    }


def statistics(log_p: Tensor, log_p_sorted: Tensor, token_ids: Tensor) -> Outputs:
    """H = -sum p log p;  H_p = log M - sum over the nucleus of p log p / M,  M its mass."""
    p_sorted = log_p_sorted.exp()
    in_nucleus = p_sorted.cumsum(-1) - p_sorted < TOP_P
    p_nucleus = p_sorted * in_nucleus
    mass = p_nucleus.sum(-1)
    return {
        "logp": log_p.gather(-1, token_ids[:, None]).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "nucleus_entropy": mass.log() - (p_nucleus * log_p_sorted).sum(-1) / mass,
        "nucleus_size": in_nucleus.sum(-1),
        "margin": (log_p_sorted[:, 0] - log_p_sorted[:, 1]).detach(),
    }


def on_logits(
    function: Callable[[Tensor, Tensor], Outputs], compiled: bool = False
) -> Callable[[], Callable[[Inputs], Outputs]]:
    def prepare() -> Callable[[Inputs], Outputs]:
        run = torch.compile(function, dynamic=False) if compiled else function  # as a user would, for one shape
        return lambda inputs: run(inputs.rows, inputs.token_ids)

    return prepare


def on_hidden_compiled(function: Callable[[Tensor, Tensor], Outputs]) -> Callable[[], Callable[[Inputs], Outputs]]:
    def prepare() -> Callable[[Inputs], Outputs]:
        fused = torch.compile(lambda hidden, head, token_ids: function(hidden @ head.T, token_ids), dynamic=False)
        return lambda inputs: fused(inputs.rows, inputs.head, inputs.token_ids)

    return prepare


CUT = "approximate: nuclei beyond 10,000 tokens are cut there"

IMPLEMENTATIONS = (
    Implementation(
        "eager, sort",
        "torch: log_softmax, sort, cumsum",
        on_logits(by_sort),
    ),
    Implementation(
        "eager, top-k cut",
        "torch: log_softmax, topk(10000), cumsum, after SIREN",
        on_logits(by_top_k),
        note=CUT,
        keeps=SIREN_TOP_K,
    ),
    Implementation(
        "torch.compile, sort",
        "torch.compile of 'eager, sort'",
        on_logits(by_sort, compiled=True),
        compiled=True,
    ),
    Implementation(
        "torch.compile, top-k cut",
        "torch.compile of 'eager, top-k cut'",
        on_logits(by_top_k, compiled=True),
        compiled=True,
        note=CUT,
        keeps=SIREN_TOP_K,
    ),
    Implementation(
        "torch.compile, no nucleus",
        "torch.compile of log_softmax, gather, entropy",
        on_logits(without_nucleus, compiled=True),
        ("logp", "entropy"),
        ("logp", "entropy"),
        compiled=True,
    ),
    Implementation(
        "torch.compile, matmul, no nucleus",
        "torch.compile of hidden @ head.T, log_softmax, gather, entropy",
        on_hidden_compiled(without_nucleus),
        ("logp", "entropy"),
        ("logp", "entropy"),
        linear=True,
        compiled=True,
    ),
    Implementation(
        "torch.compile, matmul and sort",
        "torch.compile of hidden @ head.T and 'eager, sort'",
        on_hidden_compiled(by_sort),
        linear=True,
        compiled=True,
    ),
)
