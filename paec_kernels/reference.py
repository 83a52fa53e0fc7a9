"""The method in plain PyTorch: sorts, masks, autograd, no tricks and no Triton.

Every function here is the definition that a faster one elsewhere is held against, and float64 inputs make
it the truth. Entropies are in nats. Marks: [paper] PAEC's abstract (arXiv 2606.08543), [reported] public
summaries of its text, [ours] this package's documented choice.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from paec_kernels.types import CERTAIN, IGNORE_INDEX, MAX_LOG_RATIO, TokenStats


def scaled_logits(z: Tensor, temperature: float | Tensor = 1.0, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """x = z / T, or softcap * tanh(z / softcap) / T, as x - max(x) and max(x) ``[..., 1]``, a constant.

    Their sum would lose the digits in which large logits differ. ``temperature`` is a float or ``z.shape[:-1]``.
    """
    if softcap is not None:
        z = torch.where(z == -math.inf, -math.inf, softcap * torch.tanh(z / softcap))  # a masked token stays masked
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(z.dtype)[..., None]
    top = z.detach().amax(-1, keepdim=True)
    return (z - top) / temperature, top / temperature


def nucleus_weights(z: Tensor, p: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return how much of each token belongs to the nucleus, and the nucleus' size.

    The nucleus is the smallest set of tokens, by descending probability, with mass >= top_p [paper]. Tokens
    tied at its threshold share the places that a sort would give to some of them: w = k / n [ours].

    Args:
        z: ``[..., V]`` logits, p: ``[..., V]`` their softmax.
    Returns:
        weights ``[..., V]`` in {0, k/n, 1}, of p's dtype; size ``[...]`` int64, at least 1.
    """
    z_sorted, order = z.sort(dim=-1, descending=True)
    cumulative = p.gather(-1, order).cumsum(-1)
    n_finite = (z > -math.inf).sum(-1, keepdim=True)
    short_of_top_p = (cumulative < top_p * cumulative[..., -1:]).sum(-1, keepdim=True)
    # At top_p = 1 the cumulative sum stops growing before the last token; every token with p > 0 belongs.
    size = n_finite if top_p == 1.0 else torch.minimum(short_of_top_p + 1, n_finite)
    size = size.clamp(min=1)
    threshold = z_sorted.gather(-1, size - 1)
    above, tied = z > threshold, z == threshold
    n_tied = tied.sum(-1, keepdim=True).clamp(min=1)
    weight = (size - above.sum(-1, keepdim=True)).to(p.dtype) / n_tied
    return above.to(p.dtype) + weight * tied, size.squeeze(-1)


def token_stats(
    logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    top_p: float = 0.95,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> TokenStats:
    """Compute token statistics by definition: a softmax, a full sort and autograd.

    Args:
        logits: ``[..., V]``, any floating dtype; 16-bit logits are computed in float32, others in their own.
        token_ids: integer ``[...]``; -100 gives logp 0 and no gradient from it.
        valid: bool ``[...]``; an invalid row has statistics 0 and gradient 0.
        top_p: nucleus mass in (0, 1]; 1 takes every token of non-zero probability.
        temperature: float, or a tensor ``[...]``, one for each row.
        softcap: x = softcap * tanh(z / softcap) / temperature.
        vocab_size: columns from here on are padding.
    Returns:
        TokenStats in the dtype of the computation. A row with NaN, +inf or no finite logit gives NaN.
    """
    z = logits[..., :vocab_size]
    if z.dtype not in (torch.float32, torch.float64):
        z = z.float()
    row_valid = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if valid is None else valid
    z = torch.where(row_valid[..., None], z, 0.0)
    broken = ~((z < math.inf).all(-1) & (z > -math.inf).any(-1))
    z = z + torch.where(broken, math.nan, 0.0).to(z.dtype)[..., None]

    x, top = scaled_logits(z, temperature, softcap)
    log_total = x.logsumexp(-1)
    log_p = x - log_total[..., None]
    p = log_p.exp()
    log_p_finite = torch.where(p == 0, 0.0, log_p)  # 0 log 0 = 0, in the gradient too

    # H = -sum p log p  [paper]
    entropy = -(p * log_p_finite).sum(-1)

    # H_p = -sum w q log q,  q = p / M,  M = sum w p  [reported]
    weights, size = nucleus_weights(z.detach(), p.detach(), top_p)
    mass = (weights * p).sum(-1)
    nucleus_entropy = mass.log() - (weights * p * log_p_finite).sum(-1) / mass

    # margin = log p(1) - log p(2)  [paper]; with one token there is no rival
    best = x.detach().topk(min(2, x.shape[-1]), dim=-1).values
    margin = best[..., 0] - best[..., 1] if best.shape[-1] == 2 else torch.full_like(best[..., 0], math.inf)
    margin = torch.where(broken, math.nan, margin)

    logp: Any = None
    if token_ids is not None:
        targeted = (token_ids != IGNORE_INDEX) & row_valid
        index = torch.where(targeted, token_ids, 0).long()
        logp = torch.where(targeted, log_p.gather(-1, index[..., None]).squeeze(-1), 0.0)
        logp = torch.where(broken, math.nan, logp)

    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return TokenStats(
        logp,
        torch.where(row_valid, entropy, zero),
        torch.where(row_valid, nucleus_entropy, zero),
        torch.where(row_valid, margin, zero),
        torch.where(row_valid, top.squeeze(-1) + log_total.detach(), zero),
        torch.where(row_valid & ~broken, size, 0).int(),
    )


def linear_token_stats(
    hidden: Tensor, weight: Tensor, token_ids: Tensor | None = None, *, bias: Tensor | None = None, **options
) -> TokenStats:
    """Compute ``token_stats`` of hidden @ weight.T + bias. hidden ``[..., D]``, weight ``[V, D]``, bias ``[V]``."""
    return token_stats(torch.nn.functional.linear(hidden, weight, bias), token_ids, **options)


def position_score(stats: TokenStats, config) -> Tensor:
    """s = alpha * h + (1 - alpha) * c, ``[...]``, without a gradient.

    h is the normalised nucleus entropy and c = exp(-margin / tau_c) the top-two competition. The weighted
    sum is [reported]; the weight, the form of c and "normalised" as H_p / log|S| are [ours].
    """
    nucleus_entropy = stats.nucleus_entropy.detach()
    if config.nucleus_norm == "log_size":
        h = nucleus_entropy / stats.nucleus_size.clamp(min=2).to(nucleus_entropy.dtype).log()
        h = torch.where(stats.nucleus_size == 1, 0.0, h)
    elif config.nucleus_norm == "log_vocab":
        h = nucleus_entropy / math.log(config.vocab_size)
    else:
        h = nucleus_entropy
    return config.alpha * h + (1 - config.alpha) * torch.exp(-stats.margin / config.tau_c)


def soft_mask(score: Tensor, valid: Tensor, config) -> tuple[Tensor, Tensor]:
    """m = sigmoid((s - q) / tau_m), 0 where invalid; q is the rho-quantile of the valid scores [reported].

    Returns:
        mask ``[...]`` and the threshold q, a 0-d tensor (NaN with no valid token).
    """
    scores = score[valid].sort().values
    if scores.numel() == 0:
        return torch.zeros_like(score), score.new_full((), math.nan)
    position = config.rho * (scores.numel() - 1)
    low, high = scores[math.floor(position)], scores[math.ceil(position)]
    threshold = low + (high - low) * (position - math.floor(position))
    mask = torch.sigmoid((score - threshold) / config.tau_m)
    return torch.where(valid, mask, 0.0), threshold


def paec_loss(
    stats: TokenStats,
    valid: Tensor,
    config,
    anchor: float | None = None,
    anchor_stats: TokenStats | None = None,
    strength: float = 0.0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """L = -beta * H_bar + lam * max(0, floor - H_bar)^2 of the whole batch, floor = rho_min * anchor [reported].

    H_bar = sum(m * H) / sum(m). The relative penalty is max(0, 1 - H_bar / floor)^2, the proportional one
    max(0, floor - H_bar)^2 / floor, and the integral one -strength * H_bar in place of lam times a square [ours].
    Without an anchor the penalty is inactive; with no valid token the loss is 0.

    With another ``config.anchored`` than "mean" the scores are of ``anchor_stats``, the anchor policy's on the same
    tokens [ours]. With "positions" each position has a floor of its own, the penalty being
    sum(m * max(0, rho_min * H_anchor - H)^2) / sum(m), H_anchor the anchor policy's entropy there [ours].

    Args:
        strength: c of the integral penalty, otherwise 0.
    Returns:
        loss (0-d, differentiable), mask ``[...]``, and metrics by the names that ``losses.paec.Plan`` has for them.
    """
    with torch.no_grad():
        scored = stats if config.anchored == "mean" else cast(TokenStats, anchor_stats)
        mask, threshold = soft_mask(position_score(scored, config), valid, config)
    entropy = stats.entropy if config.entropy_support == "full" else stats.nucleus_entropy
    mask_sum = mask.sum()

    def masked_mean(x: Tensor) -> Tensor:
        return torch.where(valid, mask * x, 0.0).sum() / mask_sum.clamp(min=torch.finfo(mask.dtype).tiny)

    mean_entropy = masked_mean(entropy)
    of, floor = mean_entropy, mean_entropy.new_tensor(0.0 if anchor is None else config.rho_min * anchor)
    if config.anchored == "positions":
        anchor_entropy = scored.entropy if config.entropy_support == "full" else scored.nucleus_entropy
        of, floor = entropy, config.rho_min * anchor_entropy.detach()
    shortfall = torch.where(floor > 0, (floor - of).clamp(min=0), 0.0)
    infinite = torch.full_like(floor, math.inf)
    unit = {"absolute": floor**0, "relative": floor**2, "proportional": floor, "integral": infinite}[config.penalty]
    unit = torch.where(floor > 0, unit, 1.0)
    pulls = strength + 2 * config.lam * shortfall / unit
    active = pulls > 0 if config.penalty == "integral" else shortfall > 0
    # Means over tokens only where each has a floor, but 0 without any.
    penalty, pull, active = map(masked_mean, (shortfall.square() / unit, pulls, active.to(mask.dtype)))
    loss = -(config.beta + strength) * mean_entropy + config.lam * penalty
    n = valid.sum().to(mask.dtype)
    metrics = {
        "mean_entropy": mean_entropy,
        "penalty": penalty,
        "threshold": threshold,
        "mask_sum": mask_sum,
        "mean_mask": mask_sum / n,
        "mask_on_certain": torch.where(entropy < CERTAIN, mask, 0.0).sum() / mask_sum,
        "penalty_active": active,
        "bonus_per_token": config.beta * n / mask_sum,
        "penalty_per_token": pull * n / mask_sum,
        "pull": pull,
    }
    return loss, mask, {name: value.detach() for name, value in metrics.items()}


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
) -> Tensor:
    """Token-level GRPO with clip-higher (DAPO, arXiv 2503.14476) and the k3 estimator of the KL, 0-d.

    L = -mean over valid tokens of min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coef * KL,
    r = exp(logp - old_logp),  KL = exp(ref - logp) - (ref - logp) - 1; a log-ratio above 20 counts as 20.
    """
    full = torch.promote_types(logp.dtype, torch.float32)  # 16 bits do not hold exp(20)
    logp, old_logp, advantages = (torch.where(valid, x.to(full), 0.0) for x in (logp, old_logp, advantages))
    ratio = torch.exp(bounded(logp - old_logp))
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if ref_logp is not None:
        log_ratio = bounded(torch.where(valid, ref_logp.to(full), 0.0) - logp)
        objective = objective - kl_coef * (log_ratio.exp() - log_ratio - 1)
    return -torch.where(valid, objective, 0.0).sum() / valid.sum().clamp(min=1)


def bounded(log_ratio: Tensor) -> Tensor:
    """min(log_ratio, 20), NaN where it is not finite."""
    return log_ratio.clamp(max=MAX_LOG_RATIO) + 0 * log_ratio
