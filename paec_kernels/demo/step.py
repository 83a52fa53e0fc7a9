"""One optimiser step: GRPO plus PAEC, exact over micro-batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import paec_kernels as pk
from paec_kernels.demo.rollout import Rollout, answer_hidden
from paec_kernels.losses.paec import Plan


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


@dataclass(frozen=True)
class Head:
    """How statistics come from hidden states: through logits, or chunk_rows of them at a time where that is not 0."""

    temperature: float
    top_p: float
    chunk_rows: int = 0

    def __call__(self, model: PreTrainedModel, hidden: Tensor, batch: Rollout) -> pk.TokenStats:
        """hidden [b, T, D]."""
        if self.chunk_rows:
            return pk.linear_token_stats(
                hidden,
                model.lm_head.weight,
                batch.token_ids,
                valid=batch.valid,
                top_p=self.top_p,
                temperature=self.temperature,
                chunk_rows=self.chunk_rows,
            )
        return pk.token_stats(
            model.lm_head(hidden),
            batch.token_ids,
            valid=batch.valid,
            top_p=self.top_p,
            temperature=self.temperature,
            inplace_backward=True,  # nothing else needs these logits
        )


@torch.no_grad()
def score(
    model: PreTrainedModel,
    head: Head,
    paec: pk.PAEC,
    micro_batches: list[Rollout],
    on_micro_batch: Callable[[Rollout, Tensor], None],
) -> Scored:
    """The pass without gradients: the old policy's log-probs, and what PAEC must know of the whole batch.

    Args:
        on_micro_batch: called with each micro-batch and its hidden states [b, T, D].
    """
    parts = []
    for batch in micro_batches:
        hidden = answer_hidden(model, batch)
        stats = head(model, hidden, batch)
        paec.observe(stats, batch.valid)
        parts.append(stats)
        on_micro_batch(batch, hidden)
    return Scored(pk.TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True))), paec.plan())


def take_step(
    model: PreTrainedModel,
    head: Head,
    optimizer: torch.optim.Optimizer,
    paec: pk.PAEC,
    micro_batches: list[Rollout],
    advantages: Tensor,
    scored: Scored,
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
        stats = head(model, answer_hidden(model, batch), batch)
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
