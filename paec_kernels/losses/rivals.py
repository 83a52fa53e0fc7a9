"""The entropy terms that PAEC is compared with: a uniform bonus, AER and SIREN.

Marks: [paper] the method's paper says so, [code] its official implementation does so, [reported] public summaries of
the paper say so, [ours] this package's choice where those that we have are silent. Entropies are in nats.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels import checks
from paec_kernels.losses.entropy_term import EntropyTerm
from paec_kernels.losses.quantile import as_fraction, quantile
from paec_kernels.losses.ranks import gather_columns, world_size
from paec_kernels.types import TokenStats


class EntropyPlan(NamedTuple):
    """What every micro-batch of an optimiser step must know of the whole batch; 0-d tensors, no gradient."""

    mean_entropy: Tensor
    """The mean that the method is about, in nats; 0 without any token."""
    items: Tensor
    """How many tokens (SIREN: answers) it is the mean of, divided by the ranks."""
    coefficient: Tensor
    """What the method's bonus or penalty is multiplied by."""
    target: Tensor
    """The entropy aimed at, in nats; NaN where there is none."""


class MeanEntropyTerm(EntropyTerm):
    """A term that depends on the whole step through a mean over its tokens or answers alone."""

    PLAN = EntropyPlan

    def __init__(self, config: Any = None, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(self.CONFIG() if config is None else config, process_group)

    def _observation(self, stats: TokenStats, valid: Tensor, anchor_stats: TokenStats | None) -> Tensor:
        return torch.stack(self._sum_and_count(stats, valid))

    def _plan(self, observed: list[Tensor]) -> tuple[EntropyPlan, Tensor]:
        columns = torch.stack(observed, dim=1) if observed else self.anchor_sum.new_empty(2, 0)
        gathered = gather_columns(columns, self.process_group, fill=0.0)
        total, items = (gathered.sum(1) / world_size(self.process_group)).unbind()
        mean = total / (items + (items == 0))
        plan = EntropyPlan(mean, items, *(x.to(mean) for x in self._coefficient_and_target(mean)))
        return plan, torch.where(items == 0, torch.nan, mean)

    def _term(
        self,
        stats: TokenStats,
        valid: Tensor,
        plan: EntropyPlan,
        accuracy: Tensor | None,
        anchor_stats: TokenStats | None,
    ) -> Tensor:
        return self._weighted_sum(stats, valid, plan, accuracy) / (plan.items + (plan.items == 0))

    def _sum_and_count(self, stats: TokenStats, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return this micro-batch's sum of what the mean is of, with its gradient, and how many it sums."""
        return torch.where(valid, stats.entropy, 0.0).sum(), valid.sum().to(stats.entropy.dtype)

    def _coefficient_and_target(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the plan's last two fields, given the step's mean."""
        raise NotImplementedError

    def _weighted_sum(self, stats: TokenStats, valid: Tensor, plan: EntropyPlan, accuracy: Tensor | None) -> Tensor:
        """Return the micro-batch's part of the loss, before the division by the step's items."""
        return -plan.coefficient * self._sum_and_count(stats, valid)[0]


@dataclass(frozen=True)
class GlobalEntropyConfig:
    """The constant of the uniform bonus."""

    coef: float = 0.005
    """Weight of the mean entropy, >= 0, per nat; PAEC's beta, so that only the place of the bonus differs [ours]."""

    def __post_init__(self) -> None:
        checks.number_field(self, "coef", least=0)


class GlobalEntropy(MeanEntropyTerm):
    """L = -coef * mean of H over all valid tokens: the same bonus everywhere.

    The classical form (A3C, arXiv 1602.01783, section 4), token by token.
    """

    CONFIG = GlobalEntropyConfig
    config: GlobalEntropyConfig

    def _coefficient_and_target(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(mean, self.config.coef), torch.full_like(mean, torch.nan)


@dataclass(frozen=True)
class AERConfig:
    """Constants of AER."""

    target_ratio: float = 0.4
    """tau, the target entropy as a fraction of the initial policy's, >= 0; best near 0.4 [reported]."""
    initial_coef: float = 0.0
    """alpha of the first step, >= 0, per nat [ours]."""
    coef_step: float = 0.005
    """eta, how much alpha changes for each nat that the entropy is off its target, >= 0 [ours]."""

    def __post_init__(self) -> None:
        for name in ("target_ratio", "initial_coef", "coef_step"):
            checks.number_field(self, name, least=0)


class AER(MeanEntropyTerm):
    """Adaptive entropy regularisation (arXiv 2510.10959): more entropy for hard questions, as much as a target asks.

        L = -(1/N) sum_t alpha (1 - g_t) H_t     g_t: accuracy of the group of the token's answer
        H* = tau H_0                             H_0: mean entropy of the first optimiser step
        alpha <- max(0, alpha + eta (H* - H))    after each step; H: its mean entropy

    That the coefficient depends on difficulty, that the target is anchored at the initial policy's entropy and below
    it, and that a global coefficient is adjusted to hold it is [paper]. Difficulty as the group's accuracy, the linear
    weight 1 - g and the integral controller are [ours]: the text that we have does not give them.

    Its ``term`` needs ``accuracy``.
    """

    CONFIG = AERConfig
    config: AERConfig
    coef: Tensor  # alpha

    def __init__(self, config: AERConfig | None = None, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(config, process_group)
        self.register_buffer("coef", torch.tensor(self.config.initial_coef, dtype=torch.float32))

    @torch.no_grad()
    def step(self) -> None:
        super().step()
        mean = self.last_mean_entropy
        moved = self.coef + self.config.coef_step * (self.config.target_ratio * self.anchor - mean)
        self.coef.copy_(torch.where(mean.isfinite(), moved.clamp(min=0), self.coef))

    def _coefficient_and_target(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        return self.coef.clone(), self.config.target_ratio * self.anchor

    def _weighted_sum(self, stats: TokenStats, valid: Tensor, plan: EntropyPlan, accuracy: Tensor | None) -> Tensor:
        checks.tensor("accuracy", accuracy, kind="floating", like=("stats.entropy", stats.entropy), broadcast=True)
        assert accuracy is not None  # the check refuses it
        return -plan.coefficient * torch.where(valid, (1 - accuracy.detach()) * stats.entropy, 0.0).sum()


@dataclass(frozen=True)
class SIRENConfig:
    """Constants of SIREN."""

    top_p: float = 0.8
    """Mass of the nucleus that the entropy is of, in (0, 1]: what ``token_stats`` must be called with [code]."""
    rho: float = 0.8
    """Quantile in [0, 1] of an answer's entropies above which a position counts: the top fifth [code]."""
    coef: float = 0.005
    """Weight of the squared distance from the anchor, >= 0, per square nat [code]."""

    def __post_init__(self) -> None:
        checks.number_field(self, "top_p", above=0, most=1)
        checks.number_field(self, "rho", least=0, most=1)
        checks.number_field(self, "coef", least=0)


class SIREN(MeanEntropyTerm):
    """Selective entropy regularisation (arXiv 2509.25133): the peaks of the nucleus entropy, held where they began.

        L = coef (H_bar - H_0)^2
        H_bar = mean over answers of the mean of H_p,t over the positions t with H_p,t > quantile_rho(H_p of the answer)
        H_0 = H_bar of the first optimiser step, whose loss and gradient are therefore 0

    Nucleus entropy, peak positions and the squared distance from the initial value are [paper]; a quantile for each
    answer, the mean of means, and an answer without a peak counting as 0 are [code]. There the nucleus is the largest
    set whose mass does not exceed top_p; here it is the smallest that reaches it [ours], and H_0 is of one optimiser
    step, not of a whole rollout batch [ours]. The selection is a constant of the gradient.

    Its statistics are ``[B, T]``, a row for each answer.
    """

    CONFIG = SIRENConfig
    config: SIRENConfig

    def _sum_and_count(self, stats: TokenStats, valid: Tensor) -> tuple[Tensor, Tensor]:
        if valid.dim() != 2:
            raise ValueError(f"valid must be [B, T], a row for each answer, got shape {tuple(valid.shape)}")
        peaks = peak_positions(stats.nucleus_entropy.detach(), valid, self.config.rho)
        sums = torch.where(peaks, stats.nucleus_entropy, 0.0).sum(1)
        return (sums / peaks.sum(1).clamp(min=1)).sum(), valid.any(1).sum().to(sums.dtype)

    def _coefficient_and_target(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        anchor = self.anchor.to(mean.dtype)
        return torch.full_like(mean, self.config.coef), torch.where(anchor.isnan(), mean, anchor)

    def _weighted_sum(self, stats: TokenStats, valid: Tensor, plan: EntropyPlan, accuracy: Tensor | None) -> Tensor:
        # L is not a sum over answers, but its tangent at the plan's H_bar is, and equals it there:
        #   L = c d^2 = c d (2 H_bar - (H_bar + H_0)),  dL/dH_bar = 2 c d,  d = H_bar - H_0
        total, items = self._sum_and_count(stats, valid)
        distance = plan.mean_entropy - plan.target
        return plan.coefficient * distance * (2 * total - items * (plan.mean_entropy + plan.target))


def peak_positions(entropy: Tensor, valid: Tensor, rho: float) -> Tensor:
    """Tell where an answer's entropy exceeds the rho-quantile of its valid positions, bool ``[B, T]``.

    A row with NaN at a valid position is all True there, so that the NaN shows in the loss.
    """
    score = torch.where(valid, entropy, torch.inf)
    threshold = quantile(score, as_fraction(rho))[:, None]
    return valid & ((entropy > threshold) | threshold.isnan())
