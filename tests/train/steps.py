"""An optimiser step of random answers, whole and in ragged micro-batches, for the tests of algorithms."""

from typing import NamedTuple

import torch
from torch import Tensor

from paec_kernels import reference
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.rivals import AERConfig, GlobalEntropyConfig, SIRENConfig
from paec_kernels.train.algorithms import (
    ALGORITHMS,
    AEROptions,
    Algorithm,
    CISPOOptions,
    ClipCovOptions,
    GlobalOptions,
    KLCovOptions,
    Method,
    MicroBatch,
    OracleOptions,
    PAECHardMaskOptions,
    PAECNoMaskOptions,
    PAECNoPenaltyOptions,
    PAECOptions,
    SIRENOptions,
)
from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.tasks.task import FORK, ROLES, STEP

VOCAB = 30
LENGTHS = [17, 4, 9, 0, 20, 11, 1, 6]  # of the answers; one is empty
PIECES = [(0, 3), (3, 4), (4, 6), (6, 8)]  # the micro-batches, each as wide as its longest answer; one has no token
# With which every part of the loss is active: large weights, and selections of several tokens.
WEIGHTY: list[Method] = [
    GlobalOptions(bonus=GlobalEntropyConfig(coef=0.3)),
    PAECOptions(paec=PAECConfig(beta=0.03, lam=0.7)),
    PAECNoMaskOptions(paec=PAECConfig(beta=0.03, lam=0.7)),
    PAECNoPenaltyOptions(paec=PAECConfig(beta=0.3)),
    PAECHardMaskOptions(paec=PAECConfig(beta=0.03, lam=0.7)),
    OracleOptions(paec=PAECConfig(beta=0.03, lam=0.7)),
    CISPOOptions(clip_low=0.2),
    ClipCovOptions(clip_low=0.2, clip_high=0.28, fraction=0.1, cov_low=0.1),
    KLCovOptions(fraction=0.1),
    AEROptions(aer=AERConfig(initial_coef=0.3)),
    SIRENOptions(siren=SIRENConfig(coef=0.5)),
]
OPTIONS = [next((options for options in WEIGHTY if type(options) is kind), kind()) for kind in ALGORITHMS.values()]


class Answers(NamedTuple):
    """A batch before its statistics."""

    logits: Tensor  # float64 [B, T, VOCAB], requires grad
    token_ids: Tensor  # [B, T]
    old_logp: Tensor  # [B, T]
    advantages: Tensor  # [B, 1]
    accuracy: Tensor  # [B, 1]
    valid: Tensor  # [B, T]
    roles: Tensor | None  # [B, T]

    def batch(self, top_p: float) -> MicroBatch:
        stats = reference.token_stats(self.logits, self.token_ids, valid=self.valid, top_p=top_p)
        rollout = Rollout(self.token_ids, torch.ones_like(self.token_ids), 0, self.valid, self.roles)
        return MicroBatch(rollout, self.advantages, self.accuracy, stats, self.old_logp)

    def piece(self, first: int, last: int) -> "Answers":
        """Answers first to last, cut after the longest; a leaf of its own."""
        longest = max(LENGTHS[first:last])
        cut = [x if x is None else x[first:last, :longest] if x.shape[1] > 1 else x[first:last] for x in self]
        cut[0] = cut[0].detach().clone().requires_grad_()
        return Answers(*cut)


def make_answers() -> Answers:
    """Positions from nearly certain to flat, ratios inside and outside the clipping; the last piece has no fork."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    width = 0.1 + 6 * torch.rand(*shape, 1, dtype=torch.float64, generator=generator)
    logits = width * torch.randn(*shape, VOCAB, dtype=torch.float64, generator=generator)
    token_ids = torch.randint(VOCAB, shape, generator=generator)
    logp = logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old_logp = logp + 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    advantages = torch.randn(shape[0], 1, dtype=torch.float64, generator=generator)
    accuracy = torch.rand(shape[0], 1, dtype=torch.float64, generator=generator)
    valid = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    roles = torch.randint(-1, len(ROLES), shape, generator=generator)
    roles[PIECES[-1][0] :][roles[PIECES[-1][0] :] == ROLES.index(FORK)] = ROLES.index(STEP)
    return Answers(logits.requires_grad_(), token_ids, old_logp, advantages, accuracy, valid, roles)


def started(options: Method) -> Algorithm:
    """An algorithm whose anchors are set, far from the entropy of these answers."""
    algorithm = Algorithm(options)
    for module in algorithm.children():
        module.anchor_count.fill_(module.anchor_steps)
        module.anchor_sum.fill_(4.0 * module.anchor_steps)
    return algorithm


class Outcome(NamedTuple):
    loss: Tensor
    grads: list[Tensor]  # of the logits of each micro-batch
    metrics: dict[str, Tensor]  # summed over micro-batches
    plan_metrics: dict[str, Tensor]


def run_step(algorithm: Algorithm, pieces: list[Answers]) -> Outcome:
    batches = [piece.batch(algorithm.top_p) for piece in pieces]
    batches, plan = algorithm.plan(batches, seed=3)
    losses, metrics = zip(*(algorithm.loss(batch, plan) for batch in batches), strict=True)
    grads = [torch.autograd.grad(loss, piece.logits)[0] for loss, piece in zip(losses, pieces, strict=True)]
    total = {name: torch.stack([m[name] for m in metrics]).sum() for name in metrics[0]}
    return Outcome(torch.stack(losses).sum().detach(), grads, total, plan.metrics)
