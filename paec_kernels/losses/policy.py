"""Policy-gradient losses on token log-probabilities.

Marks: [paper] the method's paper says so, [code] the implementation or recipe that its authors gave to verl does so,
[reported] others say so of the paper, [ours] this package's choice.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paec_kernels import checks
from paec_kernels.types import MAX_LOG_RATIO

STD_EPSILON = 1e-4  # TRL's; keeps a group of equal rewards at advantage 0


def group_advantages(rewards: Tensor) -> Tensor:
    """Normalise rewards within their groups as GRPO does (DeepSeekMath, arXiv 2402.03300, 4.1.2).

        A_gi = (r_gi - mean_g) / (std_g + 1e-4)

    Args:
        rewards: floating ``[groups, samples]``: the samples of one prompt in a row.
    Returns:
        ``[groups, samples]``, std with Bessel's correction as TRL and verl take it; exactly 0 for a single sample and
        for equal rewards. A group with a reward that is not finite is NaN.
    Raises:
        TypeError, ValueError: rewards of another type or number of dimensions.
    """
    checks.tensor("rewards", rewards, kind="floating")
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [groups, samples], got shape {tuple(rewards.shape)}")
    # Relative to the first and in units of their spread: a mean of equal rewards rounds, and squares of large ones
    # overflow; a difference of near ones is exact.
    shifted = full_precision(rewards) - full_precision(rewards[:, :1])
    spread = shifted.abs().sum(dim=1, keepdim=True)
    scaled = shifted / spread
    centred = scaled - scaled.mean(dim=1, keepdim=True)
    std = (centred.square().sum(dim=1, keepdim=True) / max(1, rewards.shape[1] - 1)).sqrt()
    return torch.where(spread == 0, 0.0, centred / (std + STD_EPSILON / spread)).to(rewards.dtype)


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
    """Compute GRPO's loss (arXiv 2402.03300, eq. 3), token-level with clip-higher as DAPO (arXiv 2503.14476, eq. 8).

        L = -sum over valid tokens of [min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coef KL]
            / normalizer,  r = exp(logp - old_logp),  KL = exp(ref - logp) - (ref - logp) - 1  (k3)

    A log-ratio above 20 counts as 20, that of the KL too, so finite arguments give a finite loss and gradient; NaN or
    an infinity at a valid position makes the loss NaN or infinite. Every token weighs the same, whatever the length of
    its answer. What stands at an invalid position, NaN and infinities included, reaches neither loss nor gradient;
    with no valid token both are 0. 16-bit arguments are computed in float32.

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
    check_tokens(logp=logp, old_logp=old_logp, advantages=advantages, valid=valid)
    clip_low, clip_high, kl_coef, normalizer = check_numbers(clip_low, clip_high, kl_coef, normalizer, logp)
    if ref_logp is not None:
        check_tokens(logp=logp, ref_logp=ref_logp)
    elif kl_coef > 0:
        raise ValueError(f"kl_coef = {kl_coef!r} needs ref_logp, got None")
    logp, log_ratio, advantages = where_valid(logp, old_logp, advantages, valid)
    objective = _clipped_surrogate(log_ratio, advantages, clip_low, clip_high)
    metrics = _ratio_metrics(log_ratio.detach(), advantages, valid, clip_low, clip_high)
    if ref_logp is not None:
        kl = _k3(_bounded(_zero_elsewhere(ref_logp.detach(), valid) - logp))
        if kl_coef > 0:
            objective = objective - kl_coef * kl
        metrics["ref_kl"] = mean_over(kl.detach(), valid)
    return _negative_mean(objective, valid, normalizer), metrics


def cispo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    valid: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute CISPO's loss (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5): REINFORCE under a clipped importance weight.

        L = -sum over valid tokens of sg(clip(r, 1 - clip_low, 1 + clip_high)) A logp / normalizer,
        r = exp(logp - old_logp),  sg the stop-gradient

    No token loses its gradient: clipping bounds its weight instead.

    Args:
        logp, old_logp, advantages, valid, normalizer: as in ``grpo_loss``.
        clip_low: 1, no lower bound [reported].
        clip_high: the paper tunes it [reported]; 0.28 is DAPO's [ours].
    Returns:
        loss, 0-d, and ``grpo_loss``'s metrics, in which clipping means a bounded weight, whatever the sign of A.
    Raises:
        TypeError, ValueError: a wrong type, shape, device or range.
    """
    check_tokens(logp=logp, old_logp=old_logp, advantages=advantages, valid=valid)
    clip_low, clip_high, _, normalizer = check_numbers(clip_low, clip_high, normalizer=normalizer, like=logp)
    logp, log_ratio, advantages = where_valid(logp, old_logp, advantages, valid)
    ratio = log_ratio.detach().exp()
    objective = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages * logp
    metrics = _ratio_metrics(log_ratio.detach(), advantages, valid, clip_low, clip_high)
    low, high = mean_over(ratio < 1 - clip_low, valid), mean_over(ratio > 1 + clip_high, valid)
    metrics |= {"clip_fraction": low + high, "clip_fraction_low": low, "clip_fraction_high": high}
    return _negative_mean(objective, valid, normalizer), metrics


def clip_cov_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    valid: Tensor,
    removed: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute Clip-Cov's loss (arXiv 2505.22617): a few tokens of high covariance get no gradient.

        L = -sum over valid tokens that are not removed of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)
            / normalizer

    Removed tokens still count in the normalizer [code].

    Args:
        logp, old_logp, advantages, valid, normalizer: as in ``grpo_loss``.
        clip_low, clip_high: as in ``grpo_loss``; both 1 in its recipes, so that little is clipped [code].
        removed: bool ``[...]``, this micro-batch's part of ``clip_cov_selection``.
    Returns:
        loss, 0-d, and ``grpo_loss``'s metrics with ``selected_fraction``, the removed ones among the valid tokens.
    Raises:
        TypeError, ValueError: a wrong type, shape, device or range.
    """
    check_tokens(logp=logp, old_logp=old_logp, advantages=advantages, valid=valid, removed=removed)
    clip_low, clip_high, _, normalizer = check_numbers(clip_low, clip_high, normalizer=normalizer, like=logp)
    _, log_ratio, advantages = where_valid(logp, old_logp, advantages, valid)
    objective = _clipped_surrogate(log_ratio, advantages, clip_low, clip_high) * ~removed
    metrics = _ratio_metrics(log_ratio.detach(), advantages, valid, clip_low, clip_high)
    metrics["selected_fraction"] = mean_over(removed, valid)
    return _negative_mean(objective, valid, normalizer), metrics


def kl_cov_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    valid: Tensor,
    penalised: Tensor,
    *,
    kl_coef: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute KL-Cov's loss (arXiv 2505.22617): the tokens of highest covariance are held back.

        L = -sum over valid tokens of [r A - kl_coef |logp - old_logp| where penalised] / normalizer

    The penalty stands for the KL divergence from the sampling policy; that it is the absolute log-ratio is [code].
    It has no gradient at a ratio of 1, so it acts from the second update of a rollout batch on. There is no
    clipping [code].

    Args:
        logp, old_logp, advantages, valid, normalizer: as in ``grpo_loss``.
        penalised: bool ``[...]``, this micro-batch's part of ``kl_cov_selection``.
        kl_coef: >= 0; 1 [code].
    Returns:
        loss, 0-d, and metrics, 0-d: ``approx_kl``, ``ratio_mean`` and ``ratio_max`` as in ``grpo_loss``, and
        ``selected_fraction``, the penalised ones among the valid tokens.
    Raises:
        TypeError, ValueError: a wrong type, shape, device or range.
    """
    check_tokens(logp=logp, old_logp=old_logp, advantages=advantages, valid=valid, penalised=penalised)
    _, _, kl_coef, normalizer = check_numbers(kl_coef=kl_coef, normalizer=normalizer, like=logp)
    _, log_ratio, advantages = where_valid(logp, old_logp, advantages, valid)
    objective = log_ratio.exp() * advantages - kl_coef * torch.where(penalised, log_ratio.abs(), 0.0)
    metrics = _ratio_metrics(log_ratio.detach(), advantages, valid, 1.0, math.inf)
    metrics = {name: metrics[name] for name in ("approx_kl", "ratio_mean", "ratio_max")}
    metrics["selected_fraction"] = mean_over(penalised, valid)
    return _negative_mean(objective, valid, normalizer), metrics


def where_valid(logp: Tensor, old_logp: Tensor, advantages: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logp, log-ratio and advantages ``[...]``, 0 at invalid positions; only logp keeps its gradient."""
    logp = _zero_elsewhere(logp, valid)
    log_ratio = _bounded(logp - _zero_elsewhere(old_logp.detach(), valid))
    return logp, log_ratio, _zero_elsewhere(advantages.detach(), valid)


def full_precision(x: Tensor) -> Tensor:
    """Return a tensor of 16 bits in float32, any other as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _zero_elsewhere(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, full_precision(x), 0.0)


def _bounded(log_ratio: Tensor) -> Tensor:
    """Bound what an exponential takes. 0 times NaN or an infinity is NaN: they stay visible, in the gradient too."""
    return log_ratio.clamp(max=MAX_LOG_RATIO) + 0 * log_ratio


def _clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _negative_mean(objective: Tensor, valid: Tensor, normalizer: float | Tensor | None) -> Tensor:
    total = valid.sum() if normalizer is None else normalizer
    return -objective.sum() / (total + (total == 0))  # 0 / 1 with no valid token in the whole step


def silenced_by_clipping(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """Tell where PPO's clipping takes the gradient away, ``[2, ...]``: r too low, A < 0; r too high, A > 0."""
    return torch.stack([(ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)])


def _k3(log_ratio: Tensor) -> Tensor:
    return torch.expm1(log_ratio) - log_ratio


def _ratio_metrics(
    log_ratio: Tensor, advantages: Tensor, valid: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    ratio = log_ratio.exp()
    too_low, too_high = silenced_by_clipping(ratio, advantages, clip_low, clip_high)
    fraction_low, fraction_high = mean_over(too_low, valid), mean_over(too_high, valid)
    return {
        "clip_fraction": fraction_low + fraction_high,
        "clip_fraction_low": fraction_low,
        "clip_fraction_high": fraction_high,
        "approx_kl": mean_over(_k3(log_ratio), valid),
        "ratio_mean": mean_over(ratio, valid),
        "ratio_max": torch.cat([torch.where(valid, ratio, 0.0).reshape(-1), ratio.new_zeros(1)]).max(),
    }


def mean_over(x: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of x where ``valid`` is True, 0-d; 0 where it never is."""
    return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def check_tokens(**named: Tensor | None) -> None:
    """Refuse tensors of a batch of tokens that do not fit together.

    The first is floating, ``[...]``, and gives device and shape. ``advantages`` and ``accuracy`` may have dimensions
    of size 1; ``valid``, ``removed`` and ``penalised`` are bool, all others floating.

    Raises:
        TypeError, ValueError: the argument that does not fit is named, with its value and what was expected.
    """
    like: tuple[str, Any] | None = None
    for name, value in named.items():
        kind = "bool" if name in ("valid", "removed", "penalised") else "floating"
        checks.tensor(name, value, kind=kind, like=like, broadcast=name in ("advantages", "accuracy"))
        like = like or (name, value)


class Numbers(NamedTuple):
    """The options of these losses, checked, as Python's numbers or a 0-d tensor without gradient."""

    clip_low: float
    clip_high: float
    kl_coef: float
    normalizer: float | Tensor | None


def check_numbers(
    clip_low: float = 0.0,
    clip_high: float = 0.0,
    kl_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    like: Tensor | None = None,
) -> Numbers:
    """Return options of these losses, or refuse those that are out of range; they are named as there.

    Args:
        like: the log-probs, which a ``normalizer`` that is a tensor must fit.
    """
    clip_low = checks.number("clip_low", clip_low, least=0, most=1)
    clip_high = checks.number("clip_high", clip_high, least=0, most=math.inf)
    kl_coef = checks.number("kl_coef", kl_coef, least=0, most=math.inf)
    if isinstance(normalizer, Tensor):
        checks.tensor("normalizer", normalizer)
        if normalizer.dtype not in (*checks.KINDS["floating"], *checks.KINDS["integer"]):
            raise TypeError(f"normalizer must be a number or a 0-d tensor of one, got {normalizer.dtype}")
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be a number or 0-d, got shape {tuple(normalizer.shape)}")
        if like is not None and normalizer.device not in (like.device, torch.device("cpu")):
            raise ValueError(f"normalizer must be on the device of logp, {like.device}, got {normalizer.device}")
        normalizer = normalizer.detach() if normalizer.is_floating_point() else normalizer.long()
    elif normalizer is not None:
        normalizer = checks.number("normalizer", normalizer, least=0, most=math.inf)
    return Numbers(clip_low, clip_high, kl_coef, normalizer)
