"""PAEC: the calibrated entropy term of one optimiser step, over all its micro-batches and ranks."""

import math
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paec_kernels import checks
from paec_kernels.losses.mask import penalty_coefficients, position_score, soft_mask
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.quantile import as_fraction, quantile
from paec_kernels.losses.ranks import gather_columns, world_size
from paec_kernels.ops.operator import BACKENDS
from paec_kernels.saved_state import differing_fields
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


class PAEC(nn.Module):
    """L = -beta * H_bar + lam * max(0, rho_min * H_0 - H_bar)^2, H_bar = sum(m H) / sum(m).  [reported]

    One call is a whole optimiser step; for gradient accumulation ``observe`` every micro-batch, ``plan``,
    and add ``term`` to each micro-batch's loss. Then ``step``. Terms summed over micro-batches and averaged
    over ranks, as DistributedDataParallel averages gradients, equal the whole batch's loss in value and
    gradient: the threshold, sum(m) and H_bar are of all tokens of the step. [ours]

    A NaN statistic at a valid position makes threshold, mask, loss and gradient NaN: the step is to be
    skipped, as with any NaN loss. With no valid token anywhere the loss and its gradient are 0. Neither
    step enters the anchor.

    The state (the anchor's sum and count) is in ``state_dict`` together with the config; a checkpoint of
    another config is refused and changes nothing. The state follows the statistics to their device.
    Nothing waits for the device except ``plan`` and ``forward`` with more than one rank.

    Args:
        config: the method's constants.
        process_group: the data-parallel ranks that share an optimiser step. None is all ranks, as everywhere in
            torch.distributed, or this process alone where that is not initialised. Pass the data-parallel group
            where ranks also split the model, and a group of one rank to calibrate it by itself.
        backend: as in ``token_stats``.
    """

    anchor_sum: Tensor
    anchor_count: Tensor
    last_mean_entropy: Tensor

    def __init__(
        self,
        config: PAECConfig,
        process_group: dist.ProcessGroup | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(config, PAECConfig):
            raise TypeError(f"config must be a PAECConfig, got {config!r}")
        checks.one_of("backend", backend, BACKENDS)
        self.config = config
        self.process_group = process_group
        self.backend = backend
        self.register_buffer("anchor_sum", torch.zeros((), dtype=torch.float32))
        self.register_buffer("anchor_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_mean_entropy", torch.full((), math.nan, dtype=torch.float32), persistent=False)
        self._rho = as_fraction(config.rho)
        self._observed: list[Tensor] = []
        self._planned = False

    def forward(self, stats: TokenStats, valid: Tensor) -> PAECOutput:
        """The whole optimiser step of this rank at once.

        Args:
            stats: float32 (or the reference's float64) statistics ``[...]``.
            valid: bool ``[...]``, True at response tokens.
        Raises:
            TypeError, ValueError: statistics or ``valid`` of another type, dtype, shape or device.
            RuntimeError: observed micro-batches still await ``plan``.
        """
        if self._observed:
            raise RuntimeError(
                f"forward() is a whole optimiser step, but {len(self._observed)} observed micro-batches "
                "await plan(); use either forward() or observe(), plan() and term()"
            )
        self.observe(stats, valid)
        plan = self.plan()
        loss, mask = self._term(stats, valid, plan)
        return PAECOutput(loss, mask, plan._asdict())

    @torch.no_grad()
    def observe(self, stats: TokenStats, valid: Tensor) -> None:
        """Keep the scores and entropies of a micro-batch (2 N numbers, no graph) for ``plan``."""
        entropy = self._checked_entropy(stats, valid)
        if self.anchor_sum.device != valid.device:
            self.to(valid.device)
        score = position_score(stats, valid, self.config, self.backend)
        self._observed.append(torch.stack([score, entropy.reshape(-1)]))

    @torch.no_grad()
    def plan(self) -> Plan:
        """Threshold, mask sum and mean entropy of all observed micro-batches of all ranks.

        One gather of the observed numbers, on which every rank then computes the same. All ranks must call
        it; a rank that observed nothing takes part with no token.
        """
        if not self._observed and self._planned and world_size(self.process_group) == 1:
            raise RuntimeError("plan() was already made of this step's micro-batches; observe() the next ones first")
        observed, self._observed = self._observed, []
        score, entropy = gather_columns(
            torch.cat(observed, dim=1) if observed else self.anchor_sum.new_empty(2, 0), self.process_group
        )
        threshold = quantile(score, self._rho)
        _, (mask_sum, masked_entropy) = soft_mask(score, entropy, threshold, self.config.tau_m, self.backend)
        empty = mask_sum == 0
        mean_entropy = torch.where(empty, 0.0, masked_entropy / mask_sum)
        is_set = self.anchor_count >= self.config.anchor_steps
        anchor = torch.where(is_set, self.anchor_sum / self.config.anchor_steps, math.nan).to(score.dtype)
        floor = torch.where(is_set, self.config.rho_min * anchor, 0.0)
        penalty = torch.where(empty, 0.0, (floor - mean_entropy).clamp(min=0).square())
        self.last_mean_entropy.copy_(torch.where(empty, math.nan, mean_entropy))
        self._planned = True
        return Plan(mean_entropy, floor, penalty, threshold, mask_sum, anchor)

    def term(self, stats: TokenStats, valid: Tensor, plan: Plan) -> Tensor:
        """This micro-batch's share of the loss, 0-d; the shares add up as the class says.

        Args:
            stats, valid: the micro-batch as it was observed, by the same weights of the policy.
            plan: what ``plan`` returned for this optimiser step.
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be the Plan that plan() returned for this step, got {plan!r}")
        return self._term(stats, valid, plan)[0]

    def _term(self, stats: TokenStats, valid: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        entropy = self._checked_entropy(stats, valid).reshape(-1)
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

    @torch.no_grad()
    def step(self) -> None:
        """Commit the last mean entropy to the anchor, once for each optimiser step and after it.

        Raises:
            RuntimeError: neither ``forward`` nor ``plan`` was called since the last ``step``.
        """
        if not self._planned:
            raise RuntimeError("step() commits a step's mean entropy: call forward() or plan() before it")
        taken = self.last_mean_entropy.isfinite() & (self.anchor_count < self.config.anchor_steps)
        self.anchor_sum += torch.where(taken, self.last_mean_entropy, 0.0)
        self.anchor_count += taken
        self._planned = False

    def _checked_entropy(self, stats: TokenStats, valid: Tensor) -> Tensor:
        """The entropy that the loss is about, after checking the arguments."""
        if not isinstance(stats, TokenStats):
            raise TypeError(f"stats must be a TokenStats, got {type(stats).__name__}")
        for name in ("entropy", "nucleus_entropy", "margin", "nucleus_size"):
            value = getattr(stats, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"stats.{name} must be a tensor, got {value!r}")
            if value.shape != stats.entropy.shape:
                expected, got = tuple(stats.entropy.shape), tuple(value.shape)
                raise ValueError(f"stats.{name} must have the shape of stats.entropy, {expected}, got {got}")
            if value.device != stats.entropy.device:
                raise ValueError(f"stats.{name} must be on stats.entropy's {stats.entropy.device}, got {value.device}")
        entropy = stats.entropy if self.config.entropy_support == "full" else stats.nucleus_entropy
        if entropy.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"stats must be float32 or float64, got {entropy.dtype}")
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            raise TypeError(f"valid must be a bool tensor, got {getattr(valid, 'dtype', valid)!r}")
        if valid.shape != entropy.shape:
            expected, got = tuple(entropy.shape), tuple(valid.shape)
            raise ValueError(f"valid must have the statistics' shape {expected}, got {got}")
        if valid.device != entropy.device:
            raise ValueError(f"valid must be on the statistics' device {entropy.device}, got {valid.device}")
        return entropy

    def _apply(self, fn, recurse=True):
        """Moves with the module, but stays float32 under `.half()` and the like: the anchor is a mean of few steps."""
        before = {name: getattr(self, name) for name in ("anchor_sum", "last_mean_entropy")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, moved.float() if value.is_meta else value.to(moved.device))
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {"config": asdict(self.config)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the config was compared before anything was copied."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All or nothing: only a complete state of the same config is copied."""
        absent = [prefix + name for name in self.state_dict() if prefix + name not in state_dict]
        if absent:
            missing_keys.extend(absent)
            return
        problem = self._why_not(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _why_not(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why a complete state cannot be loaded, or None."""
        for name in ("anchor_sum", "anchor_count"):
            value = state_dict[prefix + name]
            if not isinstance(value, Tensor) or value.dim() != 0 or not (value.isfinite() & (value >= 0)):
                return f"{prefix}{name} must be a finite 0-d tensor >= 0, got {value!r}"
        extra = state_dict[prefix + "_extra_state"]
        if not isinstance(extra, dict) or not isinstance(extra.get("config"), dict):
            return f"{prefix}_extra_state must hold the PAECConfig of the checkpoint, got {extra!r}"
        differing = differing_fields(extra["config"], asdict(self.config))
        return "the checkpoint is of another PAECConfig (" + "; ".join(differing) + ")" if differing else None
