"""PAEC: the calibrated entropy term of one optimiser step, over all its micro-batches and ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels import checks
from paec_kernels.losses.entropy_term import EntropyTerm
from paec_kernels.losses.mask import penalty_coefficients, position_score, soft_mask
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.quantile import as_fraction, quantile
from paec_kernels.losses.ranks import gather_columns, world_size
from paec_kernels.ops.operator import BACKENDS
from paec_kernels.types import TokenStats


class Plan(NamedTuple):
    """What every micro-batch of an optimiser step must know of the whole batch; 0-d tensors, no gradient.

    ``threshold`` is NaN with no valid token, ``anchor`` (nats) NaN until it is set, ``floor`` (nats) 0 until
    then, ``penalty`` max(0, floor - mean_entropy)^2, not multiplied by lam.
    """

    mean_entropy: Tensor
    floor: Tensor
    penalty: Tensor
    threshold: Tensor
    mask_sum: Tensor
    anchor: Tensor


class PAECOutput(NamedTuple):
    """``loss`` 0-d and differentiable, ``mask`` shaped as ``valid``, ``metrics`` 0-d tensors by name."""

    loss: Tensor
    mask: Tensor
    metrics: dict[str, Tensor]


class PAEC(EntropyTerm):
    """L = -beta * H_bar + lam * max(0, rho_min * H_0 - H_bar)^2, H_bar = sum(m H) / sum(m).  [reported]

    One call is a whole optimiser step; for gradient accumulation ``observe`` every micro-batch, ``plan``, and add
    ``term`` to each micro-batch's loss. Then ``step``. Threshold, sum(m) and H_bar are those of all tokens of the step
    [ours]; sums, state and checkpoints are as `EntropyTerm` says. Nothing waits for the device except ``plan`` and
    ``forward`` with more than one rank.

    Args:
        config: the method's constants.
        process_group: as in `EntropyTerm`.
        backend: as in ``token_stats``.
    """

    CONFIG, PLAN = PAECConfig, Plan
    config: PAECConfig

    def __init__(
        self, config: PAECConfig, process_group: dist.ProcessGroup | None = None, *, backend: str = "auto"
    ) -> None:
        super().__init__(config, process_group)
        checks.one_of("backend", backend, BACKENDS)
        self.backend = backend
        self.anchor_steps = config.anchor_steps
        self._rho = as_fraction(config.rho)

    def forward(self, stats: TokenStats, valid: Tensor) -> PAECOutput:
        """Take the whole optimiser step of this rank at once.

        Args:
            stats, valid: as in ``observe``.
        Raises:
            TypeError, ValueError: as ``observe``.
            RuntimeError: observed micro-batches still await ``plan``.
        """
        if self._observed:
            raise RuntimeError(
                f"forward() is a whole optimiser step, but {len(self._observed)} observed micro-batches "
                "await plan(); use either forward() or observe(), plan() and term()"
            )
        self.observe(stats, valid)
        plan = self.plan()
        loss, mask = self._loss_and_mask(stats, valid, plan)
        return PAECOutput(loss, mask, plan._asdict())

    @torch.no_grad()
    def mask(self, stats: TokenStats, valid: Tensor, plan: Plan) -> Tensor:
        """Return the soft mask of a micro-batch under the step's plan, ``[...]`` as ``valid``, 0 where it is False."""
        score = position_score(stats, valid, self.config, self.backend)
        mask, _ = soft_mask(score, self._entropy(stats), plan.threshold, self.config.tau_m, self.backend)
        return mask.view(valid.shape)

    def _observation(self, stats: TokenStats, valid: Tensor) -> Tensor:
        """Return the scores and entropies, ``[2, N]``."""
        return torch.stack([position_score(stats, valid, self.config, self.backend), self._entropy(stats)])

    def _plan(self, observed: list[Tensor]) -> tuple[Plan, Tensor]:
        """Gather the observed numbers of all ranks, on which every rank then computes the same."""
        score, entropy = gather_columns(
            torch.cat(observed, dim=1) if observed else self.anchor_sum.new_empty(2, 0), self.process_group
        )
        threshold = quantile(score, self._rho)
        _, (mask_sum, masked_entropy) = soft_mask(score, entropy, threshold, self.config.tau_m, self.backend)
        empty = mask_sum == 0
        mean_entropy = torch.where(empty, 0.0, masked_entropy / mask_sum)
        anchor = self.anchor.to(score)
        floor = torch.where(anchor.isnan(), 0.0, self.config.rho_min * anchor)
        penalty = torch.where(empty, 0.0, (floor - mean_entropy).clamp(min=0).square())
        plan = Plan(mean_entropy, floor, penalty, threshold, mask_sum, anchor)
        return plan, torch.where(empty, torch.nan, mean_entropy)

    def _term(self, stats: TokenStats, valid: Tensor, plan: Plan, accuracy: Tensor | None) -> Tensor:
        return self._loss_and_mask(stats, valid, plan)[0]

    def _loss_and_mask(self, stats: TokenStats, valid: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        entropy = self._entropy(stats)
        score = position_score(stats, valid, self.config, self.backend)
        mask, (mask_sum, _) = soft_mask(score, entropy, plan.threshold, self.config.tau_m, self.backend)
        coefficient = penalty_coefficients(
            mask, plan.mask_sum, plan.mean_entropy, plan.floor, self.config, self.backend
        )
        # L is not a sum over tokens, but its tangent at the plan's H_bar is, and equals it there:
        #   L = sum_t m_t / sum(m) * (g H_t + L - g H_bar) = sum_t b_t H_t + (L - g H_bar) sum_t m_t / sum(m)
        #   g = -beta - 2 lam d,  L - g H_bar = lam d (floor + H_bar),  d = max(0, floor - H_bar)
        # Times W, as ranks are averaged.
        shortfall = (plan.floor - plan.mean_entropy).clamp(min=0)
        offset = self.config.lam * shortfall * (plan.floor + plan.mean_entropy)
        share = torch.where(mask_sum == 0, 0.0, mask_sum / plan.mask_sum)
        tangent = (coefficient * torch.where(valid.reshape(-1), entropy, 0.0)).sum() + offset * share
        return world_size(self.process_group) * tangent, mask.view(valid.shape)

    def _entropy(self, stats: TokenStats) -> Tensor:
        """Return the entropy that the loss is about, flat ``[N]``."""
        entropy = stats.entropy if self.config.entropy_support == "full" else stats.nucleus_entropy
        return entropy.reshape(-1)
