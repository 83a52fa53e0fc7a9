"""What is measured: the inputs of one case, rebuilt from its description alone in whatever process needs them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import logits

TOP_P = 0.95
PLANTED, SMOLLM2 = "planted", "SmolLM2"
ADVANTAGE = 0.5  # of every token; GRPO's loss per token is -min(r A, clip(r) A)
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
RATIO_NOISE = 0.02  # of logp - old_logp: inside the clip range
CHECKED_ROWS = 64  # held against float64


@dataclass(frozen=True)
class Case:
    """N rows of logits over V tokens, or of hidden states of width D with a head ``[V, D]`` where D is not 0."""

    n: int
    v: int
    dtype: torch.dtype
    kind: str  # of `logits.KINDS`; of hidden states PLANTED or SMOLLM2
    device: str  # "cpu" or "cuda"
    d: int = 0


class Inputs(NamedTuple):
    """``valid`` rows alone carry weight in the loss sum(weights[k] * output[k]) that is differentiated."""

    rows: Tensor  # [N, V] logits, or [N, D] hidden states
    head: Tensor | None  # [V, D]
    token_ids: Tensor  # int64 [N]
    old_logp: Tensor  # float32 [N]
    valid: Tensor  # bool [N]
    weights: dict[str, Tensor]  # float32 [N] for each output that has a gradient


def build(case: Case) -> Inputs:
    """Make the same inputs every time, on the case's device. Large tensors are made a slice at a time."""
    generator = torch.Generator(case.device).manual_seed(0)
    if case.kind == SMOLLM2:
        from benchmarks import smollm2  # transformers, which nothing else here needs

        rows, head, token_ids = (value.to(case.device) for value in smollm2.hidden_states(case.n))
    elif case.d:
        rows, head, token_ids = logits.hidden_states(case.n, case.d, case.v, case.dtype, generator)
    else:
        rows, token_ids = logits.make(case.kind, case.n, case.v, case.dtype, generator)
        head = None
    logp = torch.cat(
        [
            chosen_logp(part if head is None else part @ head.T, ids)
            for part, ids in zip(rows.split(logits.SLICE), token_ids.split(logits.SLICE), strict=True)
        ]
    )
    noise = torch.randn(3, case.n, generator=generator, device=case.device)
    weights = {"logp": noise[0] / case.n, "entropy": noise[1] / case.n, "nucleus_entropy": noise[2] / case.n}
    weights["policy_loss"] = weights["logp"]
    return Inputs(
        rows,
        head,
        token_ids,
        logp + RATIO_NOISE * torch.randn(case.n, generator=generator, device=case.device),
        torch.ones(case.n, dtype=torch.bool, device=case.device),
        weights,
    )


def chosen_logp(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-prob of each row's token, of logits ``[n, V]``; float32 ``[n]``."""
    return -torch.nn.functional.cross_entropy(logits.float(), token_ids, reduction="none")


def only(inputs: Inputs, rows: Tensor) -> Inputs:
    """Keep the shapes, but let these rows alone carry weight, so that a few rows' truth is the whole gradient."""
    valid = torch.zeros_like(inputs.valid)
    valid[rows] = True
    return inputs._replace(valid=valid, weights={name: weight * valid for name, weight in inputs.weights.items()})


def take(inputs: Inputs, rows: Tensor) -> Inputs:
    """Copy those rows alone."""
    return Inputs(
        inputs.rows[rows],
        inputs.head,
        inputs.token_ids[rows],
        inputs.old_logp[rows],
        inputs.valid[rows],
        {name: weight[rows] for name, weight in inputs.weights.items()},
    )


def checked_rows(n: int, device: str) -> Tensor:
    """Choose rows spread over all but the last, which not every implementation has a token for."""
    return torch.linspace(0, max(n - 2, 0), min(CHECKED_ROWS, max(n - 1, 1)), device=device).long().unique()


def policy_loss(logp: Tensor, old_logp: Tensor) -> Tensor:
    """GRPO's loss of each token, -min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logp - old_logp)."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * ADVANTAGE, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * ADVANTAGE)
