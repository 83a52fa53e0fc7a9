"""The entropy regularisers that PAEC is compared with, on TokenStats and with PAEC's life cycle.

::

    for mb in micro_batches:
        with torch.no_grad(): regulariser.observe(stats_of(mb), mb.valid)
    plan = regulariser.plan()
    for mb in micro_batches:
        (policy_loss(mb) + regulariser.term(stats_of(mb), mb.valid, plan)).backward()
    optimizer.step(); regulariser.step()

Marks: [paper] the method's paper says so, [code] its official implementation does so, [reported] public summaries of
the paper say so, [ours] this package's choice where those that we have are silent. Entropies are in nats.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paec_kernels.losses.policy import check_tokens
from paec_kernels.losses.quantile import as_fraction, quantile
from paec_kernels.losses.ranks import mean_over_ranks
from paec_kernels.saved_state import refuse_other_config
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


class EntropyRegulariser(nn.Module):
    """What the regularisers share: a mean over the optimiser step, and a checkpoint that knows its config.

    Terms summed over micro-batches and averaged over ranks, as DistributedDataParallel averages gradients, equal the
    whole batch's loss in value and gradient. With no valid token anywhere both are 0. What stands at invalid
    positions reaches nothing. A NaN at a valid one makes the loss NaN and enters no state.

    The state is in ``state_dict`` together with the config; a checkpoint of another config is refused and changes
    nothing.

    Args:
        config: the method's constants.
        process_group: the data-parallel ranks that share an optimiser step, as in ``PAEC``.
    """

    Config: type[Any]  # the type of `config`
    config: Any
    STATE: tuple[str, ...] = ()  # the attributes, floats, that a checkpoint holds

    def __init__(self, config: Any = None, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        config = self.Config() if config is None else config
        if not isinstance(config, self.Config):
            raise TypeError(f"config must be of type {self.Config.__name__}, got {config!r}")
        self.config = config
        self.process_group = process_group
        self._observed: list[Tensor] = []
        self._plan: EntropyPlan | None = None

    @torch.no_grad()
    def observe(self, stats: TokenStats, valid: Tensor) -> None:
        """Keep a micro-batch's part of the mean, two numbers.

        Args:
            stats: statistics ``[B, T]``, a row for each answer.
            valid: bool ``[B, T]``, True at response tokens.
        Raises:
            TypeError, ValueError: statistics or ``valid`` of another type, dtype, shape or device.
        """
        self._observed.append(torch.stack(self._sum_and_count(stats, valid)))

    @torch.no_grad()
    def plan(self) -> EntropyPlan:
        """The mean over all observed micro-batches of all ranks; all ranks must call it and have observed some.

        Raises:
            RuntimeError: nothing was observed since the last plan.
        """
        if not self._observed:
            raise RuntimeError("plan() is of observed micro-batches: observe() them first")
        observed, self._observed = self._observed, []
        total, items = mean_over_ranks(torch.stack(observed).sum(0), self.process_group).unbind()
        mean = total / (items + (items == 0))
        coefficient, target = self._coefficient_and_target(mean)
        self._plan = EntropyPlan(mean, items, mean.new_tensor(coefficient), torch.as_tensor(target).to(mean))
        return self._plan

    def step(self) -> None:
        """Commit this optimiser step's mean to the state, once for each optimiser step and after it.

        Raises:
            RuntimeError: ``plan`` was not called since the last ``step``.
        """
        if self._plan is None:
            raise RuntimeError("step() commits a step's mean entropy: call plan() before it")
        plan, self._plan = self._plan, None
        mean = float(plan.mean_entropy)
        if plan.items > 0 and math.isfinite(mean):
            self._commit(mean)

    def _sum_and_count(self, stats: TokenStats, valid: Tensor) -> tuple[Tensor, Tensor]:
        """This micro-batch's sum of what the mean is of, with its gradient, and how many it sums."""
        entropy = _entropy(stats, valid)
        return torch.where(valid, entropy, 0.0).sum(), valid.sum().to(entropy.dtype)

    def _coefficient_and_target(self, mean: Tensor) -> tuple[float | Tensor, float | Tensor]:
        raise NotImplementedError

    def _commit(self, mean: float) -> None:
        """Take the step's mean into the state."""

    def get_extra_state(self) -> dict[str, Any]:
        return {"config": asdict(self.config), **{name: getattr(self, name) for name in self.STATE}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """All or nothing: a complete state of the same config."""
        what = type(self).__name__
        if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
            raise RuntimeError(f"the state of {what} must be a dict with its config, got {state!r}")
        refuse_other_config(state["config"], asdict(self.config), self.Config.__name__)
        for name in self.STATE:
            if not isinstance(state.get(name), float):
                raise RuntimeError(f"{name} in the state of {what} must be a float, got {state.get(name)!r}")
        for name in self.STATE:
            setattr(self, name, state[name])


@dataclass(frozen=True)
class GlobalEntropyConfig:
    """The constant of the uniform bonus."""

    coef: float = 0.005
    """Weight of the mean entropy, >= 0, per nat; PAEC's beta, so that only the place of the bonus differs [ours]."""

    def __post_init__(self) -> None:
        _check(self, coef=(0, math.inf))


class GlobalEntropy(EntropyRegulariser):
    """L = -coef * mean of H over all valid tokens: the same bonus everywhere.

    The classical form (A3C, arXiv 1602.01783, section 4), token by token.
    """

    Config = GlobalEntropyConfig

    def term(self, stats: TokenStats, valid: Tensor, plan: EntropyPlan) -> Tensor:
        """This micro-batch's share of the loss, 0-d.

        Args:
            stats, valid: as observed, by the same weights.
            plan: what ``plan`` returned for this optimiser step.
        """
        _check_plan(plan)
        total, _ = self._sum_and_count(stats, valid)
        return _share(-plan.coefficient * total, plan)

    def _coefficient_and_target(self, mean: Tensor) -> tuple[float, float]:
        return self.config.coef, math.nan


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
        _check(self, target_ratio=(0, math.inf), initial_coef=(0, math.inf), coef_step=(0, math.inf))


class AER(EntropyRegulariser):
    """Adaptive entropy regularisation (arXiv 2510.10959): more entropy for hard questions, as much as a target asks.

        L = -(1/N) sum_t alpha (1 - g_t) H_t     g_t: accuracy of the group of the token's answer
        H* = tau H_0                             H_0: mean entropy of the first optimiser step
        alpha <- max(0, alpha + eta (H* - H))    after each step; H: its mean entropy

    That the coefficient depends on difficulty, that the target is anchored at the initial policy's entropy and below
    it, and that a global coefficient is adjusted to hold it is [paper]. Difficulty as the group's accuracy, the linear
    weight 1 - g and the integral controller are [ours]: the text that we have does not give them.
    """

    Config = AERConfig
    STATE = ("coef", "anchor")

    def __init__(self, config: AERConfig | None = None, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(config, process_group)
        self.coef: float = self.config.initial_coef
        self.anchor: float = math.nan  # H_0

    def term(self, stats: TokenStats, valid: Tensor, plan: EntropyPlan, accuracy: Tensor) -> Tensor:
        """This micro-batch's share of the loss, 0-d.

        Args:
            stats, valid: as observed, by the same weights.
            plan: what ``plan`` returned for this optimiser step.
            accuracy: floating ``[B, 1]``, the share of right answers in the group of each answer, in [0, 1].
        """
        _check_plan(plan)
        entropy = _entropy(stats, valid)
        check_tokens(entropy=entropy, accuracy=accuracy)
        total = torch.where(valid, (1 - accuracy.detach()) * entropy, 0.0).sum()
        return _share(-plan.coefficient * total, plan)

    def _coefficient_and_target(self, mean: Tensor) -> tuple[float, float]:
        return self.coef, self.config.target_ratio * self.anchor

    def _commit(self, mean: float) -> None:
        if math.isnan(self.anchor):
            self.anchor = mean
        target = self.config.target_ratio * self.anchor
        self.coef = max(0.0, self.coef + self.config.coef_step * (target - mean))


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
        _check(self, top_p=(0, 1), rho=(0, 1), coef=(0, math.inf))
        if self.top_p == 0:
            raise ValueError("SIRENConfig.top_p must be in (0, 1], got 0")


class SIREN(EntropyRegulariser):
    """Selective entropy regularisation (arXiv 2509.25133): the peaks of the nucleus entropy, held where they began.

        L = coef (H_bar - H_0)^2
        H_bar = mean over answers of the mean of H_p,t over the positions t with H_p,t > quantile_rho(H_p of the answer)
        H_0 = H_bar of the first optimiser step, whose loss and gradient are therefore 0

    Nucleus entropy, peak positions and the squared distance from the initial value are [paper]; a quantile for each
    answer, the mean of means, and an answer without a peak counting as 0 are [code]. There the nucleus is the largest
    set whose mass does not exceed top_p; here it is the smallest that reaches it [ours], and H_0 is of one optimiser
    step, not of a whole rollout batch [ours]. The selection is a constant of the gradient.
    """

    Config = SIRENConfig
    STATE = ("anchor",)

    def __init__(self, config: SIRENConfig | None = None, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__(config, process_group)
        self.anchor: float = math.nan  # H_0

    def term(self, stats: TokenStats, valid: Tensor, plan: EntropyPlan) -> Tensor:
        """This micro-batch's share of the loss, 0-d.

        Args:
            stats, valid: as observed, by the same weights.
            plan: what ``plan`` returned for this optimiser step.
        """
        _check_plan(plan)
        # L is not a sum over answers, but its tangent at the plan's H_bar is, and equals it there:
        #   L = c d^2 = c d (2 H_bar - (H_bar + H_0)),  dL/dH_bar = 2 c d,  d = H_bar - H_0
        total, items = self._sum_and_count(stats, valid)
        distance = plan.mean_entropy - plan.target
        tangent = 2 * total - items * (plan.mean_entropy + plan.target)
        return _share(plan.coefficient * distance * tangent, plan)

    def _sum_and_count(self, stats: TokenStats, valid: Tensor) -> tuple[Tensor, Tensor]:
        nucleus_entropy = _entropy(stats, valid, "nucleus_entropy")
        if valid.dim() != 2:
            raise ValueError(f"valid must be [B, T], a row for each answer, got shape {tuple(valid.shape)}")
        peaks = peak_positions(nucleus_entropy.detach(), valid, self.config.rho)
        sums = torch.where(peaks, nucleus_entropy, 0.0).sum(1)
        return (sums / peaks.sum(1).clamp(min=1)).sum(), valid.any(1).sum().to(sums.dtype)

    def _coefficient_and_target(self, mean: Tensor) -> tuple[float, float | Tensor]:
        return self.config.coef, mean if math.isnan(self.anchor) else self.anchor

    def _commit(self, mean: float) -> None:
        if math.isnan(self.anchor):
            self.anchor = mean


def peak_positions(entropy: Tensor, valid: Tensor, rho: float) -> Tensor:
    """Where an answer's entropy exceeds the rho-quantile of its valid positions, bool ``[B, T]``.

    A row with NaN at a valid position is all True there, so that the NaN shows in the loss.
    """
    score = torch.where(valid, entropy, math.inf)
    if score.numel() == 0:
        return valid
    threshold = torch.func.vmap(lambda row: quantile(row, as_fraction(rho)))(score)[:, None]
    return valid & ((entropy > threshold) | threshold.isnan())


def _entropy(stats: TokenStats, valid: Tensor, field: str = "entropy") -> Tensor:
    """One of the statistics, after checking the arguments."""
    if not isinstance(stats, TokenStats):
        raise TypeError(f"stats must be a TokenStats, got {type(stats).__name__}")
    entropy = getattr(stats, field)
    check_tokens(**{field: entropy, "valid": valid})
    return entropy


def _check_plan(plan: EntropyPlan) -> None:
    if not isinstance(plan, EntropyPlan):
        raise TypeError(f"plan must be the EntropyPlan that plan() returned for this step, got {plan!r}")


def _share(x: Tensor, plan: EntropyPlan) -> Tensor:
    """x over the step's items for each rank, as ranks are averaged; 0 in an empty step."""
    return x / (plan.items + (plan.items == 0))


def _check(config: Any, **bounds: tuple[float, float]) -> None:
    """Every field of these dataclasses is a number within its bounds, infinity excluded."""
    for field in fields(config):
        value, (low, high) = getattr(config, field.name), bounds[field.name]
        what = f"{type(config).__name__}.{field.name}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{what} must be a number, got {value!r}")
        if not (low <= value <= high and math.isfinite(value)):
            expected = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
            raise ValueError(f"{what} must be {expected}, got {value!r}")
        object.__setattr__(config, field.name, float(value))
