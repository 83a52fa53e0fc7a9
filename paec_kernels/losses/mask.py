"""Score, soft mask and gradient coefficients of N token positions, by Triton or by plain PyTorch.

None is differentiable: score and mask are constants of the loss [reported: stop-gradient], and the
coefficients are its gradient. float64 statistics (the reference's) are always computed by PyTorch.
"""

import math
from types import ModuleType

import torch
from torch import Tensor

from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.ops.operator import resolve_backend
from paec_kernels.types import TokenStats

INVALID = math.inf  # the score of a position that is not valid: sorts after every other, and marks it


def position_score(stats: TokenStats, valid: Tensor, config: PAECConfig, backend: str = "auto") -> Tensor:
    """s = alpha * h + (1 - alpha) * c, flat ``[N]``, ``INVALID`` where ``valid`` is False, no gradient.

    h is the normalised nucleus entropy, c = exp(-margin / tau_c) the top-two competition [reported; the
    weight, the form of c and the norm are ours]. A row of NaN statistics has a NaN score.
    """
    nucleus_entropy, margin, valid = _flat(stats.nucleus_entropy), _flat(stats.margin), _flat(valid)
    nucleus_size = _flat(stats.nucleus_size)
    log_size = config.nucleus_norm == "log_size"
    h_scale = 1.0
    if config.nucleus_norm == "log_vocab":
        assert config.vocab_size is not None
        h_scale = 1 / math.log(config.vocab_size)
    if kernels := _kernels(backend, margin):
        return kernels.position_score(
            nucleus_entropy, nucleus_size, margin, valid, config.alpha, config.tau_c, h_scale, log_size
        )
    if log_size:
        h = nucleus_entropy / nucleus_size.clamp(min=2).to(margin.dtype).log()
        h = torch.where(nucleus_size == 1, 0.0, h)
    else:
        h = nucleus_entropy * h_scale
    score = config.alpha * h + (1 - config.alpha) * torch.exp(-margin / config.tau_c)
    return torch.where(valid, score, INVALID)


def soft_mask(
    score: Tensor, entropy: Tensor, threshold: Tensor, tau_m: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """m = sigmoid((s - threshold) / tau_m), 0 where the score is ``INVALID``, and its two sums.

    Args:
        score, entropy: ``[N]``; threshold: 0-d.
    Returns:
        mask ``[N]``, and ``[2]``: sum(m), sum(m * entropy), the same to the bit in every run.
    """
    score, entropy = score.detach(), _flat(entropy)
    if kernels := _kernels(backend, score):
        return kernels.soft_mask(score, entropy, threshold, tau_m)
    valid = score != INVALID
    mask = torch.where(valid, torch.sigmoid((score - threshold) / tau_m), 0.0)
    return mask, torch.stack([mask.sum(), (mask * torch.where(valid, entropy, 0.0)).sum()])


def penalty_coefficients(mask: Tensor, mask_sum: Tensor, slope: Tensor, backend: str = "auto") -> Tensor:
    """b_t = dL/dH_t = g * m_t / sum(m), ``[N]``.

    Args:
        mask: ``[N]``; mask_sum, slope: 0-d, of the whole batch; slope is g = dL/dH_bar.
    """
    if kernels := _kernels(backend, mask):
        return kernels.penalty_coefficients(mask, mask_sum, slope)
    # 0 at invalid positions even where the scale is not finite: without any valid token, or in a NaN step.
    return torch.where(mask == 0, 0.0, slope / mask_sum * mask)


def _flat(x: Tensor) -> Tensor:
    return x.detach().reshape(-1).contiguous()


def _kernels(backend: str, x: Tensor) -> ModuleType | None:
    """Return the Triton forms where they are to be used; imported there alone, since not every machine has Triton."""
    if resolve_backend(backend, x.device) != "triton" or x.dtype != torch.float32:
        return None
    from paec_kernels.losses import mask_kernels

    return mask_kernels
