"""What `--algo` chooses: a policy loss, and the entropy term added to it; exact over an optimiser step.

::

    algorithm = Algorithm(PAECOptions())
    for micro_batches in optimiser_steps:
        micro_batches, plan = algorithm.plan(micro_batches, seed=step)    # statistics without a gradient
        for batch in micro_batches:
            loss, metrics = algorithm.loss(batch._replace(stats=stats_of(batch.rollout)), plan)    # with one
            loss.backward()
        optimizer.step(); algorithm.step()

Each method is a frozen dataclass of its options, which knows its policy loss and its entropy term; a new one is such a
class and its name in ``ALGORITHMS``. Marks of the defaults are as in ``losses``.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paec_kernels import checks
from paec_kernels.losses.covariance import check_covariances, clip_cov_selection, kl_cov_selection
from paec_kernels.losses.entropy_term import EntropyTerm, check_stats
from paec_kernels.losses.paec import PAEC
from paec_kernels.losses.paec import Plan as PAECPlan
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.policy import (
    check_numbers,
    check_tokens,
    cispo_loss,
    clip_cov_loss,
    grpo_loss,
    kl_cov_loss,
)
from paec_kernels.losses.ranks import mean_over_ranks
from paec_kernels.losses.rivals import (
    AER,
    SIREN,
    AERConfig,
    EntropyPlan,
    GlobalEntropy,
    GlobalEntropyConfig,
    SIRENConfig,
)
from paec_kernels.saved_state import refuse_other_config
from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.tasks.task import FORK, ROLES
from paec_kernels.types import TokenStats

LossAndMetrics = tuple[Tensor, dict[str, Tensor]]
HARD_TAU_M = 1e-30  # (s - q) / tau_m is huge unless s is q: every other m is 0 or 1 to the bit, in float32 and float64
NO_NUCLEUS = 1e-9  # a top_p that the likeliest token reaches alone: no statistic of the nucleus takes less time
UNIFORM_TAU_M = 1e30  # (s - q) / tau_m vanishes beside 1: every m is 1/2 to the bit, in float32 and float64


class MicroBatch(NamedTuple):
    """B answers of one optimiser step, padded to T tokens: whole groups or parts of them."""

    rollout: Rollout
    advantages: Tensor  # [B, 1]
    accuracy: Tensor  # [B, 1], the mean reward of the answer's group, in [0, 1]
    stats: TokenStats  # [B, T], of the current weights, at the algorithm's top_p
    old_logp: Tensor  # [B, T], of the sampling policy
    anchor_stats: TokenStats | None = None  # [B, T], of the anchor policy, where the algorithm needs them
    selected: Tensor | None = None  # bool [B, T], the tokens that the policy loss treats apart; filled in by `plan`

    @property
    def valid(self) -> Tensor:
        """The answers' tokens, bool [B, T]."""
        return self.rollout.valid


class Plan(NamedTuple):
    """What the micro-batches of an optimiser step must know of each other; no gradient."""

    normalizer: Tensor  # the step's valid tokens, divided by the ranks
    term: PAECPlan | EntropyPlan | None  # of the entropy term
    metrics: dict[str, Tensor]  # of the whole step, 0-d, the same on every rank


@dataclass(frozen=True)
class Method:
    """What every method answers. Its options are checked when it is made."""

    def __post_init__(self) -> None:
        checks.fields(self)
        shared = ("clip_low", "clip_high", "kl_coef")
        check_numbers(**{name: value for name, value in vars(self).items() if name in shared})
        if hasattr(self, "fraction"):
            checks.number("fraction", self.fraction, least=0, most=1)

    def select(self, micro_batches: Sequence[MicroBatch], seed: int) -> list[Tensor] | None:
        """Choose the tokens of the step that the policy loss treats apart, a bool mask ``[B, T]`` for each."""
        return None

    def policy_loss(self, batch: MicroBatch, normalizer: Tensor) -> LossAndMetrics:
        """Return the loss of a micro-batch, and metrics that are means over its tokens."""
        raise NotImplementedError

    def entropy_term(self, steps_per_batch: int | None) -> EntropyTerm | None:
        """Make a fresh entropy term, for a trainer that takes so many optimiser steps on each batch of rollouts."""
        return None

    def where(self, batch: MicroBatch) -> Tensor:
        """Tell which tokens the entropy term is about, bool ``[B, T]``."""
        return batch.valid


@dataclass(frozen=True)
class GRPOOptions(Method):
    """GRPO, token-level with clip-higher (DAPO, arXiv 2503.14476)."""

    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped; DAPO's value."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high are clipped; DAPO's value."""

    def policy_loss(self, batch: MicroBatch, normalizer: Tensor) -> LossAndMetrics:
        return grpo_loss(*_tokens(batch), clip_low=self.clip_low, clip_high=self.clip_high, normalizer=normalizer)


@dataclass(frozen=True)
class GlobalOptions(GRPOOptions):
    """GRPO with the same entropy bonus at every token."""

    bonus: GlobalEntropyConfig = field(default_factory=GlobalEntropyConfig)
    """The bonus."""

    def entropy_term(self, steps_per_batch: int | None) -> GlobalEntropy:
        return GlobalEntropy(self.bonus)


@dataclass(frozen=True)
class PAECOptions(GRPOOptions):
    """GRPO with PAEC (arXiv 2606.08543)."""

    paec: PAECConfig = field(default_factory=PAECConfig)
    """PAEC's constants."""

    def entropy_term(self, steps_per_batch: int | None) -> PAEC:
        return PAEC(self.paec, steps_per_batch=steps_per_batch)


@dataclass(frozen=True)
class PAECHardMaskOptions(PAECOptions):
    """PAEC on a hard top fifth: the mask is 1 above the threshold and 0 below it, paec.tau_m unused."""

    def entropy_term(self, steps_per_batch: int | None) -> PAEC:
        return PAEC(replace(self.paec, tau_m=HARD_TAU_M), steps_per_batch=steps_per_batch)


@dataclass(frozen=True)
class PAECNoMaskOptions(PAECOptions):
    """PAEC's bonus and floor on the plain mean entropy of all tokens: the mask is uniform, paec.tau_m unused."""

    def entropy_term(self, steps_per_batch: int | None) -> PAEC:
        return PAEC(replace(self.paec, tau_m=UNIFORM_TAU_M), steps_per_batch=steps_per_batch)


@dataclass(frozen=True)
class OracleOptions(PAECNoMaskOptions):
    """PAEC's bonus and floor on the mean entropy of the true forks, which only tasks with known roles can tell.

    The ceiling of what any mask could select.
    """

    def where(self, batch: MicroBatch) -> Tensor:
        if batch.rollout.roles is None:
            raise ValueError("the oracle needs tasks whose forks are known, as the long families, got others")
        return batch.valid & (batch.rollout.roles == ROLES.index(FORK))


@dataclass(frozen=True)
class PAECNoPenaltyOptions(PAECOptions):
    """PAEC's bonus at the selected positions without the floor: paec.lam is unused, 0."""

    def entropy_term(self, steps_per_batch: int | None) -> PAEC:
        return PAEC(replace(self.paec, lam=0.0), steps_per_batch=steps_per_batch)


@dataclass(frozen=True)
class CISPOOptions(Method):
    """CISPO (MiniMax-M1, arXiv 2506.13585)."""

    clip_low: float = 1.0
    """Importance weights below 1 - clip_low are raised to it; 1 is no lower bound [reported]."""
    clip_high: float = 0.28
    """Importance weights above 1 + clip_high are lowered to it; DAPO's value [ours]."""

    def policy_loss(self, batch: MicroBatch, normalizer: Tensor) -> LossAndMetrics:
        return cispo_loss(*_tokens(batch), clip_low=self.clip_low, clip_high=self.clip_high, normalizer=normalizer)


@dataclass(frozen=True)
class ClipCovOptions(Method):
    """No gradient from a few tokens of high covariance (Clip-Cov, arXiv 2505.22617), in place of tight clipping."""

    clip_low: float = 1.0
    """Ratios below 1 - clip_low are clipped; 1 is no lower bound [code]."""
    clip_high: float = 1.0
    """Ratios above 1 + clip_high are clipped [code]."""
    fraction: float = 2e-4
    """Share of the step's tokens that get no gradient, one token at least [code]."""
    cov_low: float = 1.0
    """Only tokens of a covariance above this [code]."""
    cov_high: float = 5.0
    """Only tokens of a covariance below this [code]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_covariances(self.cov_low, self.cov_high)

    def select(self, micro_batches: Sequence[MicroBatch], seed: int) -> list[Tensor]:
        columns = map(list, zip(*map(_tokens, micro_batches), strict=True))
        return clip_cov_selection(*columns, seed=seed, **asdict(self))

    def policy_loss(self, batch: MicroBatch, normalizer: Tensor) -> LossAndMetrics:
        assert batch.selected is not None  # by plan()
        return clip_cov_loss(
            *_tokens(batch), batch.selected, clip_low=self.clip_low, clip_high=self.clip_high, normalizer=normalizer
        )


@dataclass(frozen=True)
class KLCovOptions(Method):
    """A KL penalty on the tokens of the highest covariance (KL-Cov, arXiv 2505.22617); nothing is clipped."""

    fraction: float = 2e-3
    """Share of the step's tokens that are penalised, one token at least; 2e-3 for 7B models, 2e-4 for 32B [code]."""
    kl_coef: float = 1.0
    """Weight of the penalty [code]."""

    def select(self, micro_batches: Sequence[MicroBatch], seed: int) -> list[Tensor]:
        logp, _, advantages, valid = map(list, zip(*map(_tokens, micro_batches), strict=True))
        return kl_cov_selection(logp, advantages, valid, fraction=self.fraction)

    def policy_loss(self, batch: MicroBatch, normalizer: Tensor) -> LossAndMetrics:
        assert batch.selected is not None  # by plan()
        return kl_cov_loss(*_tokens(batch), batch.selected, kl_coef=self.kl_coef, normalizer=normalizer)


@dataclass(frozen=True)
class AEROptions(GRPOOptions):
    """GRPO with adaptive entropy regularisation (AER, arXiv 2510.10959)."""

    aer: AERConfig = field(default_factory=AERConfig)
    """AER's constants."""

    def entropy_term(self, steps_per_batch: int | None) -> AER:
        return AER(self.aer)


@dataclass(frozen=True)
class SIRENOptions(GRPOOptions):
    """GRPO with selective entropy regularisation (SIREN, arXiv 2509.25133)."""

    siren: SIRENConfig = field(default_factory=SIRENConfig)
    """SIREN's constants."""

    def entropy_term(self, steps_per_batch: int | None) -> SIREN:
        return SIREN(self.siren)


ALGORITHMS: dict[str, type[Method]] = {
    "grpo": GRPOOptions,
    "global": GlobalOptions,
    "paec": PAECOptions,
    "paec-no-mask": PAECNoMaskOptions,
    "paec-no-penalty": PAECNoPenaltyOptions,
    "paec-hard-mask": PAECHardMaskOptions,
    "oracle": OracleOptions,
    "cispo": CISPOOptions,
    "clip-cov": ClipCovOptions,
    "kl-cov": KLCovOptions,
    "aer": AEROptions,
    "siren": SIRENOptions,
}


class Algorithm(nn.Module):
    """A method with its state, over an optimiser step.

    Losses summed over micro-batches and averaged over ranks, as DistributedDataParallel averages gradients, equal that
    of the whole step in one batch, in value and gradient. Micro-batches may differ in B and T; every rank has at least
    one, if without a valid token.

    Every algorithm is measured by the same PAEC, the monitor, whose anchor and floor are part of no other method's
    loss. A method that selects as PAEC does is measured by its own. With SIREN, the positions are chosen by a nucleus
    of its top_p.

    The state is in ``state_dict`` together with the method's name and options; a checkpoint of others is refused and
    changes nothing.

    Args:
        options: of one of ``ALGORITHMS``.
        monitored: whether to measure what PAEC would select, which takes a nucleus and one more gather over ranks.
        steps_per_batch: optimiser steps on each batch of rollouts, as in `PAEC`.
    """

    def __init__(self, options: Method, *, monitored: bool = True, steps_per_batch: int | None = None) -> None:
        super().__init__()
        names = [name for name, kind in ALGORITHMS.items() if kind is type(options)]
        if not names:
            raise TypeError(f"options must be of a type in ALGORITHMS, got {checks.shown(options)}")
        checks.boolean("monitored", monitored)
        self.name = names[0]
        self.options = options
        self.term = options.entropy_term(steps_per_batch)
        self.measures_itself = isinstance(self.term, PAEC) and not isinstance(options, PAECNoMaskOptions)
        self.monitor = PAEC(PAECConfig()) if monitored and not self.measures_itself else None

    @property
    def needs_anchor_policy(self) -> bool:
        """Whether micro-batches must come with ``anchor_stats``."""
        return isinstance(self.term, PAEC) and self.term.config.anchored != "mean"

    @property
    def top_p(self) -> float:
        """The nucleus mass that ``token_stats`` must be called with: the entropy term's, else the monitor's."""
        configs = [module.config for module in self._entropy_modules().values()]
        return next((config.top_p for config in configs if hasattr(config, "top_p")), NO_NUCLEUS)

    @torch.no_grad()
    def plan(self, micro_batches: Sequence[MicroBatch], *, seed: int) -> tuple[list[MicroBatch], Plan]:
        """Find what the step's losses need to know of all its tokens. All ranks must call it.

        Args:
            micro_batches: those of this rank, by the weights that ``loss`` will see; no gradient is kept.
            seed: of random picks; the same on every rank, another one for each step.
        Returns:
            the micro-batches with what is ``selected``, and the plan. Its metrics: ``entropy`` (nats), the mean over
            the step's valid tokens; what the entropy term plans, as ``term/...``; and where PAEC measures the step,
            ``nucleus_size`` (tokens), a mean as well, ``selected_entropy`` (PAEC's masked mean), ``floor`` (0 until it
            is set) and ``anchor`` (NaN until then), in nats, and of its mask ``threshold``, ``mean_mask`` and
            ``mask_on_certain``. Where roles are known, means over each role's tokens, NaN without one:
            ``entropy/fork``, and where PAEC measures ``mask/fork``, and so on.
        Raises:
            TypeError, ValueError: a micro-batch of wrong types, shapes or devices, or none at all.
        """
        _check(micro_batches)  # all of them, before any is observed
        seed = checks.integer("seed", seed)
        for batch in micro_batches:
            if self.term is not None:
                self.term.observe(batch.stats, self.options.where(batch), anchor_stats=batch.anchor_stats)
            if self.monitor is not None:
                self.monitor.observe(batch.stats, batch.valid)
        term = None if self.term is None else self.term.plan()
        measured = term if self.measures_itself else None
        if self.monitor is not None:
            measured = self.monitor.plan()

        valid = [batch.valid for batch in micro_batches]
        normalizer = mean_over_ranks(torch.stack([v.sum() for v in valid]).sum(), None)

        def step_mean(values: list[Tensor]) -> Tensor:
            total = torch.stack([torch.where(v, x, 0.0).sum() for x, v in zip(values, valid, strict=True)]).sum()
            return mean_over_ranks(total, None) / (normalizer + (normalizer == 0))

        metrics = {"entropy": step_mean([batch.stats.entropy for batch in micro_batches])}
        if measured is not None:
            sizes = [batch.stats.nucleus_size.to(batch.old_logp.dtype) for batch in micro_batches]
            metrics |= {"nucleus_size": step_mean(sizes), "selected_entropy": measured.mean_entropy}
            shown = ("floor", "anchor", "threshold", "mean_mask", "mask_on_certain")
            metrics |= {name: getattr(measured, name) for name in shown}
        if micro_batches[0].rollout.roles is not None:
            metrics |= self._by_role(micro_batches, measured)
        if term is not None:
            # "items" is no metric of the step: it is divided by the ranks.
            metrics |= {f"term/{name}": value for name, value in term._asdict().items() if name != "items"}
        selected = self.options.select(micro_batches, seed)
        if selected is not None:
            micro_batches = [batch._replace(selected=s) for batch, s in zip(micro_batches, selected, strict=True)]
        return list(micro_batches), Plan(normalizer, term, metrics)

    def _by_role(self, micro_batches: Sequence[MicroBatch], measured: PAECPlan | None) -> dict[str, Tensor]:
        """Return the mean entropy (nats), and PAEC's mean mask where it measures, at the places of each role."""
        columns = []  # for each micro-batch and role: sums of entropy and mask, tokens
        for batch in micro_batches:
            mask = torch.zeros_like(batch.stats.entropy)
            if measured is not None:
                paec = self.term if self.measures_itself else self.monitor
                assert isinstance(paec, PAEC)
                mask = paec.mask(batch.stats, batch.valid, measured, anchor_stats=batch.anchor_stats)
            assert batch.rollout.roles is not None
            of_role = [batch.valid & (batch.rollout.roles == role) for role in range(len(ROLES))]
            values = (batch.stats.entropy, mask, torch.ones_like(mask))
            columns.append(torch.stack([torch.where(at, x, 0.0).sum() for at in of_role for x in values]))
        sums = mean_over_ranks(torch.stack(columns).sum(0), None).view(len(ROLES), 3)
        entropy, mask = (sums[:, :2] / sums[:, 2:]).unbind(1)  # NaN for a role that no token has
        found = {f"entropy/{role}": value for role, value in zip(ROLES, entropy, strict=True)}
        if measured is not None:
            found |= {f"mask/{role}": value for role, value in zip(ROLES, mask, strict=True)}
        return found

    def loss(self, batch: MicroBatch, plan: Plan) -> LossAndMetrics:
        """Return a micro-batch's share of the step's loss.

        Args:
            batch: as ``plan`` returned it, now with the gradient of ``stats``.
            plan: of this optimiser step.
        Returns:
            the loss, 0-d, and metrics, 0-d without gradient. Both are shares: summed over micro-batches and averaged
            over ranks they are the step's. ``policy_loss``, ``entropy_loss`` (the term's, 0 without one), and the
            policy loss' own metrics.
        """
        loss, metrics = self.options.policy_loss(batch, plan.normalizer)
        share = batch.valid.sum() / (plan.normalizer + (plan.normalizer == 0))
        metrics = {name: share * mean for name, mean in metrics.items() if name != "ratio_max"}
        metrics |= {"policy_loss": loss.detach(), "entropy_loss": torch.zeros_like(loss)}
        if self.term is not None:
            term = self.term.term(
                batch.stats,
                self.options.where(batch),
                plan.term,
                batch.accuracy,
                anchor_stats=batch.anchor_stats,
            )
            metrics["entropy_loss"] = term.detach()
            loss = loss + term
        return loss, metrics

    def warn_unless_selective(self, row: dict[str, float]) -> None:
        """Warn as ``PAEC.warn_unless_selective`` where the method selects by PAEC's mask.

        Args:
            row: the metrics of an optimiser step, as numbers.
        """
        if self.measures_itself:
            assert isinstance(self.term, PAEC)
            self.term.warn_unless_selective(row["threshold"])

    def step(self) -> None:
        """Commit this optimiser step to anchors and coefficients, once for each and after it."""
        for module in self._entropy_modules().values():
            module.step()

    def _entropy_modules(self) -> dict[str, EntropyTerm]:
        modules = {"term": self.term, "monitor": self.monitor}
        return {name: module for name, module in modules.items() if module is not None}

    def get_extra_state(self) -> dict[str, Any]:
        return {"algo": self.name, **asdict(self.options)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore nothing: the options were compared before anything was copied."""

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """Raise before the parts are loaded, so that a checkpoint that does not fit changes nothing."""
        saved = state_dict.get(f"{prefix}_extra_state")
        if not isinstance(saved, dict):
            raise RuntimeError(f"{prefix}_extra_state must be a dict of the algorithm's options, got {saved!r}")
        refuse_other_config(saved, self.get_extra_state(), "algorithm")
        absent = [prefix + name for name in self.state_dict() if prefix + name not in state_dict]
        if absent:
            raise RuntimeError(f"the checkpoint must hold {', '.join(absent)}, got {', '.join(state_dict)}")
        for name, module in self._entropy_modules().items():
            module.refuse_misfit(state_dict, f"{prefix}{name}.")
        super()._load_from_state_dict(state_dict, prefix, *others)


def _tokens(batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.stats.logp, batch.old_logp, batch.advantages, batch.valid


def _check(micro_batches: Sequence[MicroBatch]) -> None:
    """Refuse micro-batches that the losses could not take. Reading the accuracies is the one wait for the device."""
    checks.micro_batches("micro_batches", micro_batches)
    if not micro_batches:
        raise ValueError("micro_batches must hold at least one micro-batch on each rank, got none")
    for batch in micro_batches:
        if not isinstance(batch, MicroBatch):
            raise TypeError(f"micro_batches must be MicroBatches, got {checks.shown(batch)}")
        check_stats(batch.stats, batch.valid)
        if batch.valid.dim() != 2:
            raise ValueError(f"valid must be [B, T], a row for each answer, got shape {tuple(batch.valid.shape)}")
        rest = {name: getattr(batch, name) for name in ("old_logp", "advantages", "accuracy", "valid")}
        check_tokens(logp=batch.stats.logp, **rest)
        _check_roles(batch.rollout.roles, batch.valid, micro_batches[0].rollout.roles)
    accuracy = torch.cat([batch.accuracy.flatten() for batch in micro_batches])
    if not bool(((accuracy >= 0) & (accuracy <= 1)).all()):
        raise ValueError(f"accuracy must be in [0, 1], got {accuracy.tolist()}")


def _check_roles(roles: Tensor | None, valid: Tensor, first: Tensor | None) -> None:
    """Refuse roles that do not stand beside ``valid``, or that some micro-batches have and the first has not."""
    if (roles is None) != (first is None):
        raise ValueError(f"roles must be of all micro-batches or of none, got {checks.shown(roles)} beside others")
    if roles is not None:
        checks.tensor("roles", roles, kind="integer", like=("valid", valid))
