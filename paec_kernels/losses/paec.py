"""PAEC: the calibrated entropy term of one optimiser step, over all its micro-batches and ranks."""

import math
import warnings
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels import checks
from paec_kernels.losses.entropy_term import EntropyTerm, check_stats
from paec_kernels.losses.mask import INVALID, penalty_coefficients, position_score, soft_mask
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.quantile import as_fraction, quantile
from paec_kernels.losses.ranks import gather_columns, world_size
from paec_kernels.ops.operator import BACKENDS
from paec_kernels.types import CERTAIN, TokenStats

POWER_OF_FLOOR = {"absolute": 0, "relative": 1, "proportional": 0.5}  # what a penalty's shortfall is divided by
SELECTIVE = 3  # a threshold of so many tau_m leaves a token of score 0 a mask of sigmoid(-3) = .05


class Plan(NamedTuple):
    """What every micro-batch of an optimiser step must know of the whole batch; 0-d tensors, no gradient.

    With no valid token ``mean_entropy``, ``penalty``, ``pull``, ``penalty_active`` and ``mask_sum`` are 0, and whatever
    else is of the tokens is NaN. docs/diagnostics.md says which values are healthy, and what to do about others.
    """

    mean_entropy: Tensor
    """H_bar, in nats."""
    floor: Tensor
    """rho_min * anchor, in nats; 0 until the anchor is set."""
    penalty: Tensor
    """max(0, floor - H_bar)^2, or as ``PAECConfig.penalty`` says; not multiplied by lam; 0 where that is "integral"."""
    pull: Tensor
    """What the penalty adds to beta, -lam dP/dH_bar: 2 lam (floor - H_bar) below the floor, or as the penalty is; the
    strength c where that is "integral"."""
    threshold: Tensor
    """q, the score at which the mask is 1/2."""
    mask_sum: Tensor
    """sum(m)."""
    anchor: Tensor
    """H_0, in nats; NaN until it is set."""
    mean_mask: Tensor
    """sum(m) / N over the step's N valid tokens, in [0, 1]; near 1 - rho where the mask selects [ours]."""
    mask_on_certain: Tensor
    """Share in [0, 1] of sum(m) that is on tokens with an entropy under CERTAIN = 0.02 nats [ours]."""
    floor_ratio: Tensor
    """H_bar / floor; NaN until there is a floor [ours]."""
    penalty_active: Tensor
    """1 where the penalty pulls, else 0, so that its mean over a log is the share of steps [ours]: where H_bar is below
    the floor, or, with the integral penalty, c is not 0. With a floor for each position the share of sum(m) on tokens
    below theirs."""
    bonus_per_token: Tensor
    """beta N / sum(m): what the entropy of a token with mask 1 weighs, where its policy gradient weighs 1 [ours]."""
    penalty_per_token: Tensor
    """The same for the penalty: ``pull`` N / sum(m) [ours]."""


class PAECOutput(NamedTuple):
    """``loss`` 0-d and differentiable, ``mask`` shaped as ``valid``, ``metrics`` 0-d tensors by name."""

    loss: Tensor
    mask: Tensor
    metrics: dict[str, Tensor]


class PAEC(EntropyTerm):
    """L = -beta * H_bar + lam * max(0, floor - H_bar)^2, H_bar = sum(m H) / sum(m), floor = rho_min * H_0.  [reported]

    One call is a whole optimiser step; for gradient accumulation ``observe`` every micro-batch, ``plan``, and add
    ``term`` to each micro-batch's loss. Then ``step``. Threshold, sum(m) and H_bar are those of all tokens of the step
    [ours]; sums, state and checkpoints are as `EntropyTerm` says. Nothing waits for the device except ``plan`` and
    ``forward`` with more than one rank.

    The metrics of ``forward`` are the fields of `Plan`, of which the last six are diagnostics. Whoever reads them hands
    the threshold to ``warn_unless_selective``.

    Args:
        config: the method's constants.
        process_group: as in `EntropyTerm`.
        steps_per_batch: optimiser steps that the trainer takes on each batch of rollouts, >= 1; needed by
            ``anchor_unit="rollout_batch"``, otherwise unused. A step that is skipped, or has no token, is made up for
            by a later one.
        backend: as in ``token_stats``.
    Raises:
        TypeError, ValueError: an argument of the wrong type or range, by name.
    """

    CONFIG, PLAN = PAECConfig, Plan
    config: PAECConfig
    strength: Tensor  # c of the integral penalty

    def __init__(
        self,
        config: PAECConfig,
        process_group: dist.ProcessGroup | None = None,
        *,
        steps_per_batch: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(config, process_group)
        checks.one_of("backend", backend, BACKENDS)
        self.backend = backend
        self.steps_per_batch = steps_per_batch
        self.anchor_steps = config.anchor_steps * _steps_in_unit(config, steps_per_batch)
        self._integral = config.penalty == "integral"
        self.register_buffer("strength", torch.zeros((), dtype=torch.float32), persistent=self._integral)
        self._rho = as_fraction(config.rho)
        self._of_positions = config.anchored == "positions"
        self._warned = False

    def forward(self, stats: TokenStats, valid: Tensor, *, anchor_stats: TokenStats | None = None) -> PAECOutput:
        """Take the whole optimiser step of this rank at once.

        Args:
            stats, valid, anchor_stats: as in ``observe``.
        Raises:
            TypeError, ValueError: as ``observe``.
            RuntimeError: observed micro-batches still await ``plan``.
        """
        if self._observed:
            raise RuntimeError(
                f"forward() is a whole optimiser step, but {len(self._observed)} observed micro-batches "
                "await plan(); use either forward() or observe(), plan() and term()"
            )
        self.observe(stats, valid, anchor_stats=anchor_stats)
        plan = self.plan()
        loss, mask = self._loss_and_mask(stats, valid, plan, anchor_stats)
        return PAECOutput(loss, mask, plan._asdict())

    @torch.no_grad()
    def mask(self, stats: TokenStats, valid: Tensor, plan: Plan, *, anchor_stats: TokenStats | None = None) -> Tensor:
        """Return the soft mask of a micro-batch under the step's plan, ``[...]`` as ``valid``, 0 where it is False."""
        score = self._score(stats, valid, anchor_stats)
        mask, _ = soft_mask(score, self._entropy(stats), plan.threshold, self.config.tau_m, self.backend)
        return mask.view(valid.shape)

    def loss_of(self, plan: Plan) -> Tensor:
        """Return the loss of the whole step that was planned, 0-d, no gradient: what its terms add up to."""
        bonus = self.config.beta + (plan.pull if self._integral else 0.0)
        return self.config.lam * plan.penalty - bonus * plan.mean_entropy

    def warn_unless_selective(self, threshold: float) -> None:
        """Warn, once, where a step's threshold is so near 0 that the mask passes every token.

        Args:
            threshold: the plan's, as a number: PAEC itself reads none, since that waits for the device. NaN, that of a
                step without a token, is passed over.
        """
        tau_m = self.config.tau_m
        if not self._warned and threshold < SELECTIVE * tau_m:
            self._warned = True
            warnings.warn(
                f"PAEC's mask is not selective: q < {SELECTIVE} tau_m means every token passes at a sizeable weight, "
                f"and this step has the threshold q = {threshold:.3g} with tau_m = {tau_m:.3g}. Set a smaller tau_m; "
                "mean_mask and mask_on_certain tell whether it helps",
                stacklevel=2,
            )

    @torch.no_grad()
    def step(self) -> None:
        """Commit the last plan's mean entropy to the anchor, and to the strength of the integral penalty.

        Raises:
            RuntimeError: as in `EntropyTerm`.
        """
        floor = self.config.rho_min * self.anchor  # that the step was planned with: NaN before it is set
        super().step()
        if self._integral:
            # c <- max(0, c + lam (1 - H_bar / floor))
            moved = self.strength + self.config.lam * (1 - self.last_mean_entropy / floor)
            self.strength.copy_(torch.where(moved.isfinite() & (floor > 0), moved.clamp(min=0), self.strength))

    def get_extra_state(self) -> dict[str, Any]:
        # The anchor is the mean of so many optimiser steps, and that also depends on how many are a batch.
        return {"config": asdict(self.config) | {"anchor_steps": self.anchor_steps}}

    def _observation(self, stats: TokenStats, valid: Tensor, anchor_stats: TokenStats | None) -> Tensor:
        """Return the scores and entropies, ``[2, N]``; with floors of positions the anchor policy's too, ``[3, N]``."""
        columns = [self._score(stats, valid, anchor_stats), self._entropy(stats)]
        if self._of_positions:
            columns.append(self._anchor_entropy(anchor_stats))
        return torch.stack(columns)

    def _plan(self, observed: list[Tensor]) -> tuple[Plan, Tensor]:
        """Gather the observed numbers of all ranks, on which every rank then computes the same."""
        score, entropy, *anchor_entropy = gather_columns(
            torch.cat(observed, dim=1) if observed else self.anchor_sum.new_empty(2 + self._of_positions, 0),
            self.process_group,
        )
        threshold = quantile(score, self._rho)
        mask, (mask_sum, masked_entropy) = soft_mask(score, entropy, threshold, self.config.tau_m, self.backend)
        n_valid = (score != INVALID).sum().to(score.dtype)
        empty = mask_sum == 0
        mean_entropy = torch.where(empty, 0.0, masked_entropy / mask_sum)

        def masked_mean(x: Tensor) -> Tensor:
            return torch.where(empty, 0.0, torch.where(mask == 0, 0.0, mask * x).sum() / mask_sum)

        anchor = self.anchor.to(score)
        if self._of_positions:
            anchor = torch.where(empty, torch.nan, masked_mean(anchor_entropy[0]))
        floor = torch.where(anchor.isnan(), 0.0, self.config.rho_min * anchor)
        if self._of_positions:
            penalty, pull = self._penalty(entropy, self.config.rho_min * anchor_entropy[0])
            penalty, pull, active = map(masked_mean, (penalty, pull, penalty > 0))
        else:
            penalty, pull = self._penalty(mean_entropy, floor)
            penalty, pull = torch.where(empty, 0.0, penalty), torch.where(empty, 0.0, pull)
            active = (pull if self._integral else penalty) > 0
        known_mean = torch.where(empty, torch.nan, mean_entropy)
        plan = Plan(
            mean_entropy,
            floor,
            penalty,
            pull,
            threshold,
            mask_sum,
            anchor,
            mean_mask=mask_sum / n_valid,
            mask_on_certain=torch.where(entropy < CERTAIN, mask, 0.0).sum() / mask_sum,
            floor_ratio=torch.where(floor == 0, torch.nan, known_mean / floor),
            penalty_active=active.to(score),
            bonus_per_token=self.config.beta * n_valid / mask_sum,
            penalty_per_token=pull * n_valid / mask_sum,
        )
        return plan, known_mean

    def _term(
        self,
        stats: TokenStats,
        valid: Tensor,
        plan: Plan,
        accuracy: Tensor | None,
        anchor_stats: TokenStats | None,
    ) -> Tensor:
        return self._loss_and_mask(stats, valid, plan, anchor_stats)[0]

    def _loss_and_mask(
        self, stats: TokenStats, valid: Tensor, plan: Plan, anchor_stats: TokenStats | None
    ) -> tuple[Tensor, Tensor]:
        entropy = self._entropy(stats)
        score = self._score(stats, valid, anchor_stats)
        mask, (mask_sum, _) = soft_mask(score, entropy, plan.threshold, self.config.tau_m, self.backend)
        entropy = torch.where(valid.reshape(-1), entropy, 0.0)
        world = world_size(self.process_group)  # as ranks are averaged
        if self._of_positions:
            # L = sum_t m_t (-beta H_t + lam P_t) / sum(m),  P_t: the penalty below rho_min H_t of the anchor policy
            floors = torch.where(valid.reshape(-1), self.config.rho_min * self._anchor_entropy(anchor_stats), 0.0)
            each = self.config.lam * self._penalty(entropy, floors)[0] - self.config.beta * entropy
            return world * (torch.where(mask == 0, 0.0, mask / plan.mask_sum) * each).sum(), mask.view(valid.shape)
        # L is not a sum over tokens, but its tangent at the plan's H_bar is, and equals it there:
        #   L = sum_t m_t / sum(m) * (g H_t + L - g H_bar) = sum_t b_t H_t + (L - g H_bar) sum_t m_t / sum(m)
        #   g = dL/dH_bar = -beta - pull
        slope = -self.config.beta - plan.pull
        offset = self.loss_of(plan) - slope * plan.mean_entropy
        coefficient = penalty_coefficients(mask, plan.mask_sum, slope, self.backend)
        share = torch.where(mask_sum == 0, 0.0, mask_sum / plan.mask_sum)
        return world * ((coefficient * entropy).sum() + offset * share), mask.view(valid.shape)

    def _score(self, stats: TokenStats, valid: Tensor, anchor_stats: TokenStats | None) -> Tensor:
        """Return the scores by which positions are selected, flat ``[N]``: of the policy or of the anchor policy."""
        if self.config.anchored == "mean":
            return position_score(stats, valid, self.config, self.backend)
        if anchor_stats is None:
            raise ValueError(
                f"anchor_stats is None, but anchored={self.config.anchored!r} needs the anchor policy's statistics of "
                "the same tokens"
            )
        check_stats(anchor_stats, valid, "anchor_stats")
        return position_score(anchor_stats, valid, self.config, self.backend)

    def _penalty(self, mean_entropy: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the penalty P = d^2, d = max(0, floor - H_bar) / u, and its pull 2 lam d / u.

        u is 1 nat, the floor where the penalty is relative, or the floor's square root where it is proportional.
        Without a floor it is infinite, so that nothing is short of it. The integral penalty pulls with the strength,
        and has no value of its own.
        """
        if self._integral:
            return torch.zeros_like(mean_entropy), self.strength.to(mean_entropy, copy=True)
        unit = torch.where(floor <= 0, math.inf, floor ** POWER_OF_FLOOR[self.config.penalty])  # < 0 by rounding
        shortfall = (floor - mean_entropy).clamp(min=0) / unit
        return shortfall.square(), 2 * self.config.lam * shortfall / unit

    def _anchor_entropy(self, anchor_stats: TokenStats | None) -> Tensor:
        assert anchor_stats is not None  # `_score` refuses it
        return self._entropy(anchor_stats).detach()

    def _entropy(self, stats: TokenStats) -> Tensor:
        """Return the entropy that the loss is about, flat ``[N]``."""
        entropy = stats.entropy if self.config.entropy_support == "full" else stats.nucleus_entropy
        return entropy.reshape(-1)


def _steps_in_unit(config: PAECConfig, steps_per_batch: int | None) -> int:
    """Return how many optimiser steps the unit of ``anchor_steps`` has."""
    if steps_per_batch is not None:
        steps_per_batch = checks.integer("steps_per_batch", steps_per_batch, least=1)
    if config.anchor_unit == "optimiser_step":
        return 1
    if steps_per_batch is None:
        raise ValueError("steps_per_batch is None, but anchor_unit='rollout_batch' needs an int >= 1")
    return steps_per_batch
