"""An optimiser step of the reference loop on SmolLM2-135M: what PAEC adds to GRPO, by the operator and by a sort.

The loop looks at all tokens without gradients, for the old log-probs; PAEC plans on the same look. From the second
update of a batch on GRPO needs no look, as its old log-probs are known, and PAEC still does. Sampling is left out; the
rollout is the same for all, and so is each turn's step, since the learning rate is 0. Each loss is held against
`paec_kernels.reference` in float64 before anything is timed.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import paec_kernels as pk
from benchmarks import smollm2
from benchmarks.parts import Part
from benchmarks.rivals.eager import by_sort
from benchmarks.rows import Row, median_ratio, times_of
from benchmarks.workload import ADVANTAGE, CLIP_HIGH, RATIO_NOISE
from paec_kernels.train import loop
from paec_kernels.train.algorithms import NO_NUCLEUS, Algorithm, GRPOOptions, MicroBatch, PAECOptions
from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.presets import PRESETS
from paec_kernels.train.tasks.by_name import load_tasks

PAEC = PAECOptions(paec=pk.PAECConfig(anchor_steps=1))
CONFIG = replace(
    PRESETS["smollm2"],
    prompts=1,
    updates=1,
    micro_batch=8,
    max_new_tokens=48,
    operator="logits",
    precision="float32",
    method=PAEC,
)
ANSWERS = {"cpu": 2, "cuda": 64}
TOLERANCE = 1e-4  # of the loss, relative


class ByLogSoftmax(loop.Run):
    """The loop with nothing but log-probs, by log_softmax."""

    def statistics(self, model: nn.Module, head: Tensor, rollout: Rollout) -> pk.TokenStats:
        log_p = self._logits(model, head, rollout).log_softmax(-1)
        logp = log_p.gather(-1, rollout.token_ids[..., None]).squeeze(-1)
        zero = torch.zeros_like(logp.detach())
        return pk.TokenStats(logp, zero, zero, zero, zero, zero.int())

    def _logits(self, model: nn.Module, head: Tensor, rollout: Rollout) -> Tensor:
        return model(rollout.sequences, rollout.attention_mask, rollout.prompt_length) @ head.T


class BySort(ByLogSoftmax):
    """The loop with the statistics that one writes without this package."""

    def statistics(self, model: nn.Module, head: Tensor, rollout: Rollout) -> pk.TokenStats:
        found = by_sort(self._logits(model, head, rollout).flatten(0, 1), rollout.token_ids.flatten())
        stats = {name: value.view(rollout.valid.shape) for name, value in found.items()}
        return pk.TokenStats(lse=torch.zeros_like(stats["margin"]), **stats)


class Way(NamedTuple):
    source: str  # what it is made of
    kind: type[loop.Run]
    calibrated: bool  # with PAEC's term
    looks: bool = True


WAYS = {
    "GRPO, log_softmax": Way("torch: log_softmax, gather; grpo_loss", ByLogSoftmax, calibrated=False),
    "GRPO": Way(f"token_stats(top_p={NO_NUCLEUS}), grpo_loss", loop.Run, calibrated=False),
    "GRPO, old log-probs known": Way("as GRPO, without the look", loop.Run, calibrated=False, looks=False),
    "GRPO + PAEC": Way("token_stats, grpo_loss, PAEC", loop.Run, calibrated=True),
    "GRPO + PAEC, sort": Way("torch: log_softmax, sort, cumsum; grpo_loss, PAEC", BySort, calibrated=True),
}


def step_rows(part: Part, on_step: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Yield a row for each way; GRPO by log_softmax is the anchor of the ratios."""
    config = replace(CONFIG, answers=ANSWERS[part.case.device])
    policy = smollm2.policy(part.case.device)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=0.0, weight_decay=0.0)
    runs = {
        name: way.kind(config, policy, policy.module, optimizer, algorithm_of(way).to(policy.head.device))
        for name, way in WAYS.items()
    }
    micro_batches = sample_step(runs["GRPO"])
    anchor = set_anchors(runs, micro_batches)
    on_step("check the losses")
    policy_loss, entropy_loss = losses_in_float64(runs["GRPO"], micro_batches, anchor)
    steps = {}
    for name, way in WAYS.items():
        error = relative_error(runs[name], micro_batches, policy_loss + entropy_loss * way.calibrated)
        steps[name] = Step(way.source, partial(take_step, runs[name], micro_batches, way.looks), error)
    tokens = sum(int(batch.valid.sum()) for batch in micro_batches)
    part = replace(part, case=replace(part.case, n=tokens, v=len(policy.head)))
    yield from rows_in_turns(part, steps, TOLERANCE, on_step)


def algorithm_of(way: Way) -> Algorithm:
    return Algorithm(PAEC) if way.calibrated else Algorithm(GRPOOptions(), monitored=False)


def sample_step(run: loop.Run) -> list[MicroBatch]:
    tasks, _ = load_tasks(run.config.tasks)
    [micro_batches] = loop.split(run, *loop.sample(run.config, run.policy, tasks, 0, 0, 1))
    torch.manual_seed(0)
    changed = []
    for batch in micro_batches:
        # Where every answer is right, or every one wrong, the loss would be 0.
        advantages = torch.full_like(batch.advantages, ADVANTAGE)
        old_logp = batch.old_logp + RATIO_NOISE * torch.randn_like(batch.old_logp)
        changed.append(batch._replace(advantages=advantages, old_logp=old_logp))
    return changed


def set_anchors(runs: dict[str, loop.Run], micro_batches: list[MicroBatch]) -> float:
    """Set PAEC's anchors as one step of training does; return the anchor, nats."""
    for name, run in runs.items():
        if WAYS[name].calibrated:
            _, plan = run.algorithm.plan(loop.look_again(run, micro_batches), seed=0)
            run.algorithm.step()
    return plan.metrics["selected_entropy"].item()


@torch.no_grad()
def losses_in_float64(run: loop.Run, micro_batches: list[MicroBatch], anchor: float) -> tuple[Tensor, Tensor]:
    """Return GRPO's and PAEC's loss of all tokens at once, by the definitions."""
    columns = []
    for batch in micro_batches:
        rollout = batch.rollout
        hidden = run.model(rollout.sequences, rollout.attention_mask, rollout.prompt_length)
        for row, valid in enumerate(batch.valid):  # float64 and a sort take twenty times the memory of the logits
            logits = (hidden[row, valid] @ run.policy.head.T).double()
            stats = pk.reference.token_stats(logits, rollout.token_ids[row, valid])
            advantages = batch.advantages.expand_as(batch.valid)[row, valid].double()
            columns.append((*stats, batch.old_logp[row, valid].double(), advantages))
    *found, old_logp, advantages = (torch.cat(column) for column in zip(*columns, strict=True))
    stats = pk.TokenStats(*found)
    valid = torch.ones_like(old_logp, dtype=torch.bool)
    policy_loss = pk.reference.grpo_loss(stats.logp, old_logp, advantages, valid, clip_high=CLIP_HIGH)
    return policy_loss, pk.reference.paec_loss(stats, valid, PAEC.paec, anchor)[0]


@torch.no_grad()
def relative_error(run: loop.Run, micro_batches: list[MicroBatch], expected: Tensor) -> float:
    batches, plan = run.algorithm.plan(loop.look_again(run, micro_batches), seed=0)
    loss = sum(run.algorithm.loss(batch, plan)[0] for batch in batches)
    return ((loss - expected).abs() / expected.abs()).item()


def take_step(run: loop.Run, micro_batches: list[MicroBatch], looks: bool) -> None:
    loop.optimiser_step(run, loop.look_again(run, micro_batches) if looks else micro_batches, seed=0)


class Step(NamedTuple):
    """An optimiser step, which leaves everything as it was."""

    source: str  # what it is made of
    take: Callable[[], object]
    error: float  # of its loss


def rows_in_turns(
    part: Part, steps: dict[str, Step], tolerance: float, on_step: Callable[[str], None]
) -> Iterator[Row]:
    """Yield a row for each; the first that is right is the anchor of the ratios. What is not right is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name, step in steps.items() if step.error <= tolerance}
    order = deque(seconds)
    for turn in range(part.turns + 1):
        on_step(f"turn {turn} of {part.turns}")
        for name in order:
            elapsed = _seconds(steps[name].take, part.case.device)
            if turn > 0:  # the first turn warms up
                seconds[name].append(elapsed)
        order.rotate(-1)  # each comes first in its turn
    anchor = next(iter(seconds), None)
    for name, step in steps.items():
        if name in seconds:
            relative = median_ratio(seconds[name], seconds[anchor])
            found = times_of(seconds[name]) | {"anchor": anchor, "relative": relative, "value_error": step.error}
        else:
            found = {"status": "wrong", "reason": f"its loss is off by {step.error:.1e}; allowed {tolerance:.1e}"}
        yield part.row(name, step.source, "step", **found)


def _seconds(take: Callable[[], object], device: str) -> float:
    """Time one step, to its end on the device."""
    synchronize = torch.get_device_module(device).synchronize  # on a CPU it does nothing
    synchronize()
    start = time.perf_counter()
    take()
    synchronize()
    return time.perf_counter() - start
