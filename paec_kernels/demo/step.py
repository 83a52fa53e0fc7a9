"""One optimiser step: GRPO plus PAEC, exact over micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import paec_kernels as pk
from paec_kernels.calibration import Plan
from paec_kernels.demo.rollout import Rollout, answer_logits


class Scored(NamedTuple):
    """What one pass over all answers tells: their tokens' statistics [B, T], and PAEC's plan of the batch."""

    stats: pk.TokenStats
    plan: Plan

    @property
    def logp(self) -> Tensor:
        """Of the sampled tokens, [B, T]."""
        assert self.stats.logp is not None
        return self.stats.logp


@dataclass(frozen=True)
class StepResult:
    """Terms of the loss; their sum is what was differentiated."""

    policy_loss: float
    entropy_bonus: float  # -beta * H_bar
    weighted_penalty: float  # lam * P
    gradient_norm: float  # before clipping to 1


@torch.no_grad()
def score(
    model: PreTrainedModel,
    paec: pk.PAEC,
    micro_batches: list[Rollout],
    temperature: float,
    on_micro_batch: Callable[[Rollout, Tensor], None],
) -> Scored:
    """The pass without gradients: the old policy's log-probs, and what PAEC must know of the whole batch.

    Args:
        on_micro_batch: called with each micro-batch and its logits [b, T, V].
    """
    parts = []
    for batch in micro_batches:
        logits = answer_logits(model, batch)
        stats = pk.token_stats(
            logits,
            batch.token_ids,
            valid=batch.valid,
            top_p=paec.config.top_p,
            temperature=temperature,
        )
        paec.observe(stats, batch.valid)
        parts.append(stats)
        on_micro_batch(batch, logits)
    return Scored(pk.TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True))), paec.plan())


def take_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    paec: pk.PAEC,
    micro_batches: list[Rollout],
    advantages: Tensor,
    scored: Scored,
    temperature: float,
    on_micro_batch: Callable[[], None],
) -> StepResult:
    """Backward through the model micro-batch by micro-batch, then one step of the optimiser and the anchor.

    Args:
        advantages: [B], in the micro-batches' order.
        scored: of the same weights.
    """
    sizes = [len(batch.sequences) for batch in micro_batches]
    old_logps = scored.logp.split(sizes)
    n_tokens = sum(int(batch.valid.sum()) for batch in micro_batches)
    policy_loss = 0.0
    for batch, old_logp, advantage in zip(micro_batches, old_logps, advantages.split(sizes), strict=True):
        stats = pk.token_stats(
            answer_logits(model, batch),
            batch.token_ids,
            valid=batch.valid,
            top_p=paec.config.top_p,
            temperature=temperature,
            inplace_backward=True,  # nothing else needs these logits
        )
        assert stats.logp is not None
        policy, _ = pk.grpo_loss(stats.logp, old_logp, advantage[:, None], batch.valid, normalizer=n_tokens)
        (policy + paec.term(stats, batch.valid, scored.plan)).backward()
        policy_loss += policy.item()
        on_micro_batch()
    gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    paec.step()
    return StepResult(
        policy_loss,
        -paec.config.beta * scored.plan.mean_entropy.item(),
        paec.config.lam * scored.plan.penalty.item(),
        gradient_norm.item(),
    )
