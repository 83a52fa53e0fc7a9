"""Policy-gradient losses on token log-probabilities."""

import torch
from torch import Tensor

STD_EPSILON = 1e-4  # TRL's; keeps a group of equal rewards at advantage 0
MAX_LOG_RATIO = 20.0  # verl's; the exponential of more overflows, and infinity times advantage 0 is NaN


def group_advantages(rewards: Tensor) -> Tensor:
    """A_gi = (r_gi - mean_g) / (std_g + 1e-4), GRPO's normalisation (DeepSeekMath, arXiv 2402.03300, 4.1.2).

    Args:
        rewards: floating ``[groups, samples]``: the samples of one prompt in a row.
    Returns:
        ``[groups, samples]``, std with Bessel's correction as TRL and verl take it; 0 for a single sample.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [groups, samples], got shape {tuple(rewards.shape)}")
    if not rewards.is_floating_point():
        raise TypeError(f"rewards must be a floating tensor, got {rewards.dtype}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True, correction=min(1, rewards.shape[1] - 1))
    return centred / (std + STD_EPSILON)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    valid: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    ref_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO (arXiv 2402.03300, eq. 3) in DAPO's token-level form with clip-higher (arXiv 2503.14476, eq. 8).

        L = -sum over valid tokens of [min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coef KL]
            / normalizer,  r = exp(logp - old_logp),  KL = exp(ref - logp) - (ref - logp) - 1  (k3)

    A log-ratio above 20 counts as 20. Every token weighs the same, whatever the length of its answer. What stands at
    an invalid position, NaN and infinities included, reaches neither loss nor gradient; with no valid token both
    are 0.

    Args:
        logp: ``[...]``, the only argument that receives a gradient.
        old_logp, ref_logp: ``[...]``, of the sampling and of the reference policy.
        advantages: ``[...]``, or with dimensions of size 1: ``[..., 1]`` for one per answer.
        valid: bool ``[...]``, True at response tokens.
        normalizer: the valid tokens of the whole optimiser step, divided by the number of data-parallel
            ranks where gradients are averaged over them; then losses summed over micro-batches are exact.
            By default the valid tokens of this call.
    Returns:
        loss, 0-d, and metrics, 0-d without gradient: ``clip_fraction``, ``clip_fraction_low`` (r too low,
        A < 0), ``clip_fraction_high`` (r too high, A > 0), ``approx_kl`` (k3 from the sampling policy),
        ``ratio_mean``, ``ratio_max``; with ``ref_logp`` also ``ref_kl``. Means over the valid tokens of this
        call, 0 without any.
    Raises:
        TypeError, ValueError: a wrong type, shape, device or range.
    """
    _check(logp, old_logp, advantages, valid, clip_low, clip_high, ref_logp, kl_coef, normalizer)
    logp = torch.where(valid, logp, 0.0)
    old_logp = torch.where(valid, old_logp.detach(), 0.0)
    advantages = torch.where(valid, advantages.detach(), 0.0)

    log_ratio = (logp - old_logp).clamp(max=MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    metrics = _ratio_metrics(log_ratio.detach(), advantages, valid, clip_low, clip_high)
    if ref_logp is not None:
        kl = _k3(torch.where(valid, ref_logp.detach(), 0.0) - logp)
        if kl_coef > 0:
            objective = objective - kl_coef * kl
        metrics["ref_kl"] = _mean(kl.detach(), valid)

    total = valid.sum() if normalizer is None else normalizer
    return -objective.sum() / (total + (total == 0)), metrics  # 0 / 1 with no valid token in the whole step


def _k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1(log_ratio) - log_ratio


def _ratio_metrics(
    log_ratio: Tensor, advantages: Tensor, valid: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    ratio = log_ratio.exp()
    too_low = (ratio < 1 - clip_low) & (advantages < 0)
    too_high = (ratio > 1 + clip_high) & (advantages > 0)
    fraction_low, fraction_high = _mean(too_low, valid), _mean(too_high, valid)
    return {
        "clip_fraction": fraction_low + fraction_high,
        "clip_fraction_low": fraction_low,
        "clip_fraction_high": fraction_high,
        "approx_kl": _mean(_k3(log_ratio), valid),
        "ratio_mean": _mean(ratio, valid),
        "ratio_max": torch.cat([torch.where(valid, ratio, 0.0).reshape(-1), ratio.new_zeros(1)]).max(),
    }


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def _check(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    valid: Tensor,
    clip_low: float,
    clip_high: float,
    ref_logp: Tensor | None,
    kl_coef: float,
    normalizer: float | Tensor | None,
) -> None:
    named = {"logp": logp, "old_logp": old_logp, "advantages": advantages, "valid": valid}
    if ref_logp is not None:
        named["ref_logp"] = ref_logp
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {value!r}")
        if name == "valid" and value.dtype != torch.bool:
            raise TypeError(f"valid must be a bool tensor, got {value.dtype}")
        if name != "valid" and not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {value.dtype}")
        if value.device != logp.device:
            raise ValueError(f"{name} must be on logp's device {logp.device}, got {value.device}")
        if name != "advantages" and value.shape != logp.shape:
            raise ValueError(f"{name} must have logp's shape {tuple(logp.shape)}, got {tuple(value.shape)}")
    # [B] against [B, T] would broadcast along the wrong dimension where B = T.
    fits = advantages.dim() == logp.dim() and all(
        a in (1, n) for a, n in zip(advantages.shape, logp.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"advantages must have logp's shape {tuple(logp.shape)}, or 1 in some of its dimensions "
            f"([..., 1] for one per answer), got {tuple(advantages.shape)}"
        )
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low!r}")
    for name, number in (("clip_high", clip_high), ("kl_coef", kl_coef)):
        if not number >= 0:
            raise ValueError(f"{name} must be >= 0, got {number!r}")
    if kl_coef > 0 and ref_logp is None:
        raise ValueError(f"kl_coef = {kl_coef!r} needs ref_logp, got None")
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be a number or 0-d, got shape {tuple(normalizer.shape)}")
    elif normalizer is not None and not normalizer >= 0:
        raise ValueError(f"normalizer must be >= 0, got {normalizer!r}")
