"""The exact quantile of the valid scores, without a host sync."""

import math
from fractions import Fraction

import torch
from torch import Tensor


def as_fraction(q: float) -> Fraction:
    """Return 0.8 as 4/5, so that a position q * (n - 1) is exact in int64 up to n = 2^33."""
    return Fraction(str(q)).limit_denominator(2**30)


def quantile(score: Tensor, q: Fraction) -> Tensor:
    """Return the q-quantile of the scores that are not +inf, with linear interpolation as in ``torch.quantile``.

    ``torch.quantile`` refuses more than 2^24 elements and rounds the position q * (n - 1) to the scores'
    dtype; here any n works and the position is exact. How many scores are valid is known only on the
    device: the invalid ones (+inf) sort to the end and the position is computed there.

    Args:
        score: ``[..., N]``; +inf marks an invalid position.
        q: in [0, 1], as ``as_fraction`` makes it.
    Returns:
        ``[...]``, of the scores' dtype. NaN with no valid score; NaN if any score is NaN, as ``torch.quantile``:
        a broken row then shows in the loss instead of shifting every mask a little.
    """
    if score.shape[-1] == 0:
        return score.new_full(score.shape[:-1], math.nan)
    ordered = score.sort().values
    n_valid = (score != math.inf).sum(-1)
    position = q.numerator * (n_valid - 1).clamp(min=0)  # in units of 1 / q.denominator
    low = position // q.denominator
    high = torch.minimum(low + 1, (n_valid - 1).clamp(min=0))
    weight = (position % q.denominator).to(score.dtype) / q.denominator
    below, above = ordered.gather(-1, torch.stack([low, high], -1)).unbind(-1)
    value = below + (above - below) * weight
    undefined = (n_valid == 0) | score.isnan().any(-1)
    return torch.where(undefined, math.nan, value)
