"""The tokens of an optimiser step that Clip-Cov and KL-Cov treat apart, by the covariance of log-prob and advantage.

Marks are as in `policy`.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels import checks
from paec_kernels.losses.policy import (
    check_numbers,
    check_tokens,
    full_precision,
    mean_over,
    silenced_by_clipping,
    where_valid,
)
from paec_kernels.losses.ranks import check_group, gather_columns, rank_and_world


@torch.no_grad()
def clip_cov_selection(
    logp: Sequence[Tensor],
    old_logp: Sequence[Tensor],
    advantages: Sequence[Tensor],
    valid: Sequence[Tensor],
    *,
    seed: int,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Choose the tokens of an optimiser step that Clip-Cov removes (arXiv 2505.22617, section 4).

        cov = (logp - mean logp) (A - mean A), means over the step's N valid tokens
        max(1, floor(fraction N)) tokens, at random, of those with cov_low < cov < cov_high

    Tokens that PPO's clipping already silences are not candidates [code]. The pick depends on the seed and on the
    candidates in the order of ranks, micro-batches, rows and positions, not on how they are split.

    Args:
        logp, old_logp, advantages, valid: as in ``clip_cov_loss``, one tensor for each micro-batch of this rank.
        seed: of the random pick, the same on every rank.
        fraction, cov_low, cov_high: 2e-4, 1 and 5 [code].
        process_group: the data-parallel ranks, as in ``PAEC``; all must call.
    Returns:
        one bool mask ``[...]`` for each micro-batch; False everywhere with no candidate.
    Raises:
        TypeError, ValueError: a wrong type, shape, device or range.
    """
    named = {"logp": logp, "old_logp": old_logp, "advantages": advantages, "valid": valid}
    fraction = _check_selection(fraction, process_group, **named)
    seed = checks.integer("seed", seed)
    clip_low, clip_high, _, _ = check_numbers(clip_low, clip_high)
    cov_low, cov_high = check_covariances(cov_low, cov_high)
    silenced = []
    for log_p, old, a, v in zip(logp, old_logp, advantages, valid, strict=True):
        _, log_ratio, a = where_valid(log_p, old, a, v)
        silenced.append(silenced_by_clipping(log_ratio.exp(), a, clip_low, clip_high).any(0))
    step = _StepTokens(logp, advantages, valid, silenced, process_group=process_group)
    candidates = (step.valid & (step.extra == 0) & (step.cov > cov_low) & (step.cov < cov_high)).nonzero()[:, 0]
    generator = torch.Generator("cpu").manual_seed(seed)  # on the CPU: the same pick on every device
    shuffled = torch.randperm(len(candidates), generator=generator, device="cpu").to(candidates.device)
    return step.masks(candidates[shuffled[: step.at_least_one(fraction)]])


@torch.no_grad()
def kl_cov_selection(
    logp: Sequence[Tensor],
    advantages: Sequence[Tensor],
    valid: Sequence[Tensor],
    *,
    fraction: float = 2e-3,
    process_group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """Choose the tokens of an optimiser step that KL-Cov penalises (arXiv 2505.22617, section 4).

        cov = (logp - mean logp) (A - mean A), means over the step's N valid tokens
        the max(1, floor(fraction N)) tokens of the highest cov; among equals, those that come first

    Args:
        logp, advantages, valid: as in ``kl_cov_loss``, one tensor for each micro-batch of this rank.
        fraction: 2e-3, for a 7B model; 2e-4 for 32B [code].
        process_group: the data-parallel ranks, as in ``PAEC``; all must call.
    Returns:
        one bool mask ``[...]`` for each micro-batch.
    Raises:
        TypeError, ValueError: a wrong type, shape, device or range.
    """
    fraction = _check_selection(fraction, process_group, logp=logp, advantages=advantages, valid=valid)
    step = _StepTokens(logp, advantages, valid, process_group=process_group)
    descending = torch.where(step.valid, step.cov, -math.inf).sort(descending=True, stable=True).indices
    return step.masks(descending[: step.at_least_one(fraction)])


class _StepTokens:
    """Every token of an optimiser step on every rank, with its covariance; the way back to micro-batches."""

    def __init__(
        self,
        logp: Sequence[Tensor],
        advantages: Sequence[Tensor],
        valid: Sequence[Tensor],
        extra: Sequence[Tensor] | None = None,
        *,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self._shapes = [v.shape for v in valid]
        self._group = process_group
        columns = []
        for i, v in enumerate(valid):
            rows = [logp[i], advantages[i].expand(v.shape), torch.zeros_like(logp[i]) if extra is None else extra[i]]
            columns.append(torch.stack([torch.where(v, full_precision(row), math.inf).flatten() for row in rows]))
        log_p, a, self.extra = gather_columns(torch.cat(columns, dim=1), process_group)
        self.valid = self.extra != math.inf
        self.cov = (log_p - mean_over(log_p, self.valid)) * (a - mean_over(a, self.valid))

    def at_least_one(self, fraction: float) -> int:
        """Return the fraction as a number of tokens, 1 at least where there is a token."""
        n_valid = int(self.valid.sum())
        return min(n_valid, max(1, int(fraction * n_valid)))

    def masks(self, chosen: Tensor) -> list[Tensor]:
        """Return this rank's part of the chosen positions, a mask for each of its micro-batches."""
        mask = torch.zeros_like(self.valid)
        mask[chosen] = True
        rank, world = rank_and_world(self._group)
        mine = mask.chunk(world)[rank] if len(mask) else mask
        sizes = [shape.numel() for shape in self._shapes]
        parts = mine[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


def check_covariances(cov_low: float, cov_high: float) -> tuple[float, float]:
    """Return Clip-Cov's bounds as floats, or refuse those that are no numbers or in the wrong order."""
    low = checks.number("cov_low", cov_low, least=-math.inf, most=math.inf)
    high = checks.number("cov_high", cov_high, least=-math.inf, most=math.inf)
    if low > high:
        raise ValueError(f"cov_low must be <= cov_high = {high!r}, got {low!r}")
    return low, high


def _check_selection(fraction: float, process_group: dist.ProcessGroup | None, **named: Sequence[Tensor]) -> float:
    """Check the arguments of a selection before any rank waits for another; return the fraction as a float."""
    check_group(process_group)
    for name, tensors in named.items():
        checks.micro_batches(name, tensors)
    counts = {name: len(tensors) for name, tensors in named.items()}
    if len(set(counts.values())) > 1 or not counts["valid"]:
        raise ValueError(f"{', '.join(counts)} must have one tensor for each micro-batch, at least one, got {counts}")
    for micro_batch in zip(*named.values(), strict=True):
        check_tokens(**dict(zip(named, micro_batch, strict=True)))
    return checks.number("fraction", fraction, least=0, most=1)
