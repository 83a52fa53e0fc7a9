"""A whole optimiser step of the demo's model: GRPO alone, and GRPO with PAEC.

Forward through the model, loss, backward, AdamW, in one batch. The learning rate is 0, so that each turn takes the
same step. The losses are held against `paec_kernels.reference` in float64 before anything is timed.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import paec_kernels as pk
from benchmarks import smollm2
from benchmarks.harness import Run
from benchmarks.rivals.eager import by_sort
from benchmarks.rows import Row
from benchmarks.step_turns import Way, rows_in_turns
from benchmarks.workload import ADVANTAGE, CLIP_HIGH, RATIO_NOISE, Case
from paec_kernels.demo.rollout import Rollout, answer_hidden

CONFIG = pk.PAECConfig(anchor_steps=1)


class Batch(NamedTuple):
    """``logits`` below are [B, T, V] of the answers' tokens; old_logp [B, T], advantages [B, 1]."""

    answers: Rollout
    old_logp: Tensor
    advantages: Tensor
    paec: pk.PAEC  # its anchor is set
    anchor: Tensor  # nats, 0-d


Loss = Callable[[Tensor, Batch], Tensor]


def grpo_by_log_softmax(logits: Tensor, batch: Batch) -> Tensor:
    logp = logits.log_softmax(-1).gather(-1, batch.answers.token_ids[..., None]).squeeze(-1)
    return pk.grpo_loss(logp, batch.old_logp, batch.advantages, batch.answers.valid)[0]


def statistics(logits: Tensor, batch: Batch) -> pk.TokenStats:
    return pk.token_stats(
        logits, batch.answers.token_ids, valid=batch.answers.valid, top_p=CONFIG.top_p, inplace_backward=True
    )


def grpo_by_token_stats(logits: Tensor, batch: Batch) -> Tensor:
    stats = statistics(logits, batch)
    return pk.grpo_loss(stats.logp, batch.old_logp, batch.advantages, batch.answers.valid)[0]


def paec_by_token_stats(logits: Tensor, batch: Batch) -> Tensor:
    stats = statistics(logits, batch)
    policy = pk.grpo_loss(stats.logp, batch.old_logp, batch.advantages, batch.answers.valid)[0]
    return policy + batch.paec(stats, batch.answers.valid).loss


def paec_by_sort(logits: Tensor, batch: Batch) -> Tensor:
    """What one writes without this package."""
    valid = batch.answers.valid
    found = by_sort(logits.flatten(0, 1), batch.answers.token_ids.flatten())
    stats = pk.TokenStats(lse=None, **{name: value.view(valid.shape) for name, value in found.items()})
    policy = pk.reference.grpo_loss(stats.logp, batch.old_logp, batch.advantages, valid, clip_high=CLIP_HIGH)
    return policy + pk.reference.paec_loss(stats, valid, CONFIG, batch.anchor)[0]


WAYS: dict[str, tuple[str, Loss]] = {
    "GRPO, log_softmax": ("torch: log_softmax, gather", grpo_by_log_softmax),
    "GRPO, token_stats": ("paec_kernels: token_stats, grpo_loss", grpo_by_token_stats),
    "GRPO + PAEC, token_stats": ("paec_kernels: token_stats, grpo_loss, PAEC", paec_by_token_stats),
    "GRPO + PAEC, sort": ("torch: log_softmax, sort, cumsum; paec_kernels.reference.paec_loss", paec_by_sort),
}


SOURCES = {name: source for name, (source, _) in WAYS.items()}
KIND = "SmolLM2-135M"


def step_rows(run: Run, device: str, answers: int, on_step: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """A row for each way; GRPO by log_softmax is the anchor of the ratios."""
    policy, sampled = smollm2.sampled(device, answers)
    batch = make_batch(policy, sampled)
    case = Case(int(sampled.valid.sum()), policy.lm_head.out_features, torch.float32, KIND, device)
    on_step("check the losses")
    errors = errors_of_losses(policy, batch)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, weight_decay=0.0)
    ways = {
        name: Way(source, errors[name], partial(take_step, policy, optimizer, batch, loss))
        for name, (source, loss) in WAYS.items()
    }
    yield from rows_in_turns(run, case, ways, on_step)


@torch.no_grad()
def make_batch(policy: PreTrainedModel, answers: Rollout) -> Batch:
    logits = policy.lm_head(answer_hidden(policy, answers))
    stats = pk.token_stats(logits, answers.token_ids, valid=answers.valid, top_p=CONFIG.top_p)
    paec = pk.PAEC(CONFIG).to(logits.device)
    first = paec(stats, answers.valid)
    paec.step()
    signs = torch.ones(len(answers.sequences), 1, device=logits.device)
    signs[::2] = -1  # half of the answers were right
    old_logp = stats.logp + RATIO_NOISE * torch.randn_like(stats.logp)
    return Batch(answers, old_logp, ADVANTAGE * signs, paec, first.metrics["mean_entropy"])


@torch.no_grad()
def errors_of_losses(policy: PreTrainedModel, batch: Batch) -> dict[str, float]:
    """Of each way, against the definitions in float64, relative."""
    logits = policy.lm_head(answer_hidden(policy, batch.answers))
    valid = batch.answers.valid
    parts = [  # an answer at a time: float64 and a sort take twenty times the memory of the logits
        pk.reference.token_stats(row.double(), ids, top_p=CONFIG.top_p)
        for row, ids in zip(logits, batch.answers.token_ids, strict=True)
    ]
    stats = pk.TokenStats(*(torch.stack(column) for column in zip(*parts, strict=True)))
    grpo = pk.reference.grpo_loss(stats.logp, batch.old_logp.double(), batch.advantages, valid, clip_high=CLIP_HIGH)
    paec = pk.reference.paec_loss(stats, valid, CONFIG, batch.anchor.item())[0]
    errors = {}
    for name, (_, loss) in WAYS.items():
        expected = grpo + paec if loss in (paec_by_token_stats, paec_by_sort) else grpo
        errors[name] = ((loss(logits, batch) - expected).abs() / expected.abs()).item()
    return errors


def take_step(policy: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch, loss: Loss) -> None:
    loss(policy.lm_head(answer_hidden(policy, batch.answers)), batch).backward()
    optimizer.step()
    optimizer.zero_grad()
