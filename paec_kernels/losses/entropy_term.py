"""The life cycle that PAEC and the methods it is compared with share: observe, plan, term, step.

::

    for batch in micro_batches:
        with torch.no_grad(): term.observe(stats_of(batch), batch.valid)
    plan = term.plan()
    for batch in micro_batches:
        (policy_loss(batch) + term.term(stats_of(batch), batch.valid, plan)).backward()
    optimizer.step(); term.step()
"""

import math
from dataclasses import asdict
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paec_kernels import checks
from paec_kernels.losses.ranks import check_group, world_size
from paec_kernels.saved_state import refuse_other_config
from paec_kernels.types import TokenStats


class EntropyTerm(nn.Module):
    """An entropy term of the loss, exact over the micro-batches and ranks of an optimiser step.

    Terms summed over micro-batches and averaged over ranks, as DistributedDataParallel averages gradients, equal the
    whole batch's loss in value and gradient. With no valid token anywhere both are 0. What stands at invalid
    positions reaches nothing. A NaN at a valid one makes the loss NaN, and neither such a step nor an empty one enters
    the state.

    The state is in ``state_dict`` together with the config; a checkpoint of another config, or one that is not
    complete, is refused and changes nothing. The state follows the statistics to their device.

    A subclass names its ``CONFIG`` and ``PLAN`` and says, in ``_observation``, ``_plan`` and ``_term``, what a
    micro-batch leaves for the plan, what the plan is, and what the micro-batch's share of the loss is.

    Args:
        config: the method's constants.
        process_group: the data-parallel ranks that share an optimiser step. None is all ranks, as everywhere in
            torch.distributed, or this process alone where that is not initialised. Pass the data-parallel group
            where ranks also split the model, and a group of one rank to calibrate it by itself.
    Raises:
        TypeError: ``config`` is of another type.
    """

    CONFIG: ClassVar[type]
    PLAN: ClassVar[Any]
    config: Any  # of type CONFIG
    anchor_steps = 1  # the optimiser steps whose mean entropies are averaged into the anchor
    anchor_sum: Tensor
    anchor_count: Tensor
    last_mean_entropy: Tensor

    def __init__(self, config: Any, process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        checks.instance("config", config, self.CONFIG)
        check_group(process_group)
        self.config = config
        self.process_group = process_group
        self.register_buffer("anchor_sum", torch.zeros((), dtype=torch.float32))
        self.register_buffer("anchor_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_mean_entropy", torch.full((), math.nan, dtype=torch.float32), persistent=False)
        self._observed: list[Tensor] = []
        self._planned = False

    @property
    def anchor(self) -> Tensor:
        """The anchor in nats, 0-d, which is NaN until it is set."""
        is_set = self.anchor_count >= self.anchor_steps
        return torch.where(is_set, self.anchor_sum / self.anchor_steps, math.nan)

    @torch.no_grad()
    def observe(self, stats: TokenStats, valid: Tensor, *, anchor_stats: TokenStats | None = None) -> None:
        """Keep what the plan needs of a micro-batch; no graph.

        Args:
            stats: float32 (or the reference's float64) statistics ``[...]``.
            valid: bool ``[...]``, True at response tokens.
            anchor_stats: those of the same tokens by the anchor policy, which PAEC with another ``anchored`` than
                ``"mean"`` needs; otherwise unused.
        Raises:
            TypeError, ValueError: statistics or ``valid`` of another type, dtype, shape or device.
        """
        check_stats(stats, valid)
        observation = self._observation(stats, valid, anchor_stats)
        if self.anchor_sum.device != valid.device:
            self.to(valid.device)
        self._observed.append(observation)

    def forget(self) -> None:
        """Drop what was observed for a plan that will not be made, as when a micro-batch after it failed."""
        self._observed = []

    @torch.no_grad()
    def plan(self) -> Any:
        """Return what every micro-batch's term must know of the whole optimiser step.

        All ranks must call it; a rank that observed nothing takes part with no token.

        Raises:
            RuntimeError: called twice on the same micro-batches.
        """
        if not self._observed and self._planned and world_size(self.process_group) == 1:
            raise RuntimeError("plan() was already made of this step's micro-batches; observe() the next ones first")
        observed, self._observed = self._observed, []
        plan, mean_entropy = self._plan(observed)
        self.last_mean_entropy.copy_(mean_entropy)
        self._planned = True
        return plan

    def term(
        self,
        stats: TokenStats,
        valid: Tensor,
        plan: Any,
        accuracy: Tensor | None = None,
        *,
        anchor_stats: TokenStats | None = None,
    ) -> Tensor:
        """Return this micro-batch's share of the loss, 0-d.

        Args:
            stats, valid: the micro-batch as it was observed, by the same weights of the policy.
            plan: what ``plan`` returned for this optimiser step.
            accuracy: floating ``[B, 1]``, the share of right answers in the group of each answer, in [0, 1]; used by
                AER alone.
            anchor_stats: as in ``observe``.
        Raises:
            TypeError, ValueError: as ``observe``, and for another plan.
        """
        if not isinstance(plan, self.PLAN):
            raise TypeError(
                f"plan must be the {self.PLAN.__name__} that plan() returned for this step, got {checks.shown(plan)}"
            )
        check_stats(stats, valid)
        for name, value in zip(plan._fields, plan, strict=True):
            checks.tensor(f"plan.{name}", value, kind="floating")
            if value.dim() != 0 or value.device != valid.device:
                raise ValueError(
                    f"plan.{name} must be 0-d and on the device of valid, {valid.device}, "
                    f"got shape {tuple(value.shape)} on {value.device}"
                )
        return self._term(stats, valid, plan, accuracy, anchor_stats)

    @torch.no_grad()
    def step(self) -> None:
        """Commit the last plan's mean entropy to the state, once for each optimiser step and after it.

        Raises:
            RuntimeError: no plan was made since the last ``step``.
        """
        if not self._planned:
            raise RuntimeError("step() commits a step's mean entropy: call forward() or plan() before it")
        self._planned = False
        taken = self.last_mean_entropy.isfinite() & (self.anchor_count < self.anchor_steps)
        self.anchor_sum += torch.where(taken, self.last_mean_entropy, 0.0)
        self.anchor_count += taken

    def _observation(self, stats: TokenStats, valid: Tensor, anchor_stats: TokenStats | None) -> Tensor:
        """Return what ``_plan`` needs of the micro-batch, whose tensors were checked except ``anchor_stats``."""
        raise NotImplementedError

    def _plan(self, observed: list[Tensor]) -> tuple[Any, Tensor]:
        """Return the plan, and the step's mean entropy, NaN where it has no token."""
        raise NotImplementedError

    def _term(
        self,
        stats: TokenStats,
        valid: Tensor,
        plan: Any,
        accuracy: Tensor | None,
        anchor_stats: TokenStats | None,
    ) -> Tensor:
        """Return what ``term`` does, of arguments that were checked except ``accuracy`` and ``anchor_stats``."""
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        """Move with the module, but stay float32 under `.half()` and the like: the state is a mean of few steps."""
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, moved.float() if value.is_meta else value.to(moved.device))
        return self

    def get_extra_state(self) -> dict[str, Any]:
        return {"config": asdict(self.config)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore nothing: the config was compared before anything was copied."""

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *others) -> None:
        """Copy a complete state of the same config, or nothing."""
        absent = [prefix + name for name in self.state_dict() if prefix + name not in state_dict]
        missing_keys.extend(absent)
        if not absent:
            self.refuse_misfit(state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)

    def refuse_misfit(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Raise RuntimeError where a complete state is damaged or of another config."""
        for name in self.state_dict():
            value = state_dict[prefix + name]
            if name != "_extra_state" and not (
                isinstance(value, Tensor) and value.dim() == 0 and value.isfinite() and value >= 0
            ):
                raise RuntimeError(f"{prefix}{name} must be a finite 0-d tensor >= 0, got {value!r}")
        extra, what = state_dict[prefix + "_extra_state"], self.CONFIG.__name__
        if not isinstance(extra, dict) or not isinstance(extra.get("config"), dict):
            raise RuntimeError(f"{prefix}_extra_state must hold the {what} of the checkpoint, got {extra!r}")
        refuse_other_config(extra["config"], self.get_extra_state()["config"], what)


def check_stats(stats: TokenStats, valid: Tensor, what: str = "stats") -> None:
    """Refuse statistics that do not fit together, and a mask that does not fit them.

    Args:
        what: the argument's name.
    Raises:
        TypeError, ValueError: the argument that does not fit is named, with its value and what was expected.
    """
    if not isinstance(stats, TokenStats):
        raise TypeError(f"{what} must be a TokenStats, got {type(stats).__name__}")
    checks.tensor(f"{what}.entropy", stats.entropy)
    like = (f"{what}.entropy", stats.entropy)
    for name in ("entropy", "nucleus_entropy", "margin"):
        value = getattr(stats, name)
        checks.tensor(f"{what}.{name}", value, like=like)
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{what}.{name} must be float32 or float64, got {value.dtype}")
    checks.tensor(f"{what}.nucleus_size", stats.nucleus_size, like=like)
    if stats.nucleus_size.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{what}.nucleus_size must be int32 or int64, got {stats.nucleus_size.dtype}")
    checks.tensor("valid", valid, kind="bool", like=like)
