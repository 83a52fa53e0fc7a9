"""An optimiser step of the reference loop: GRPO with nothing measured, and GRPO with PAEC.

The loop looks at all tokens of a batch without gradients, for the old log-probs; PAEC plans on the same look. From the
second update of a batch on GRPO needs no look, as its old log-probs are known, and PAEC still does. The loop's own
``grpo`` has PAEC's statistics logged beside it, so here GRPO is an algorithm without them.

Sampling is left out; rollouts are the same for all. The learning rate is 0, so that each turn takes the same step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from paec_kernels.train.operator_clock import OperatorClock
from torch import Tensor

import paec_kernels as pk
from benchmarks.harness import Run
from benchmarks.rivals.ours import NO_NUCLEUS
from benchmarks.rows import Row
from benchmarks.step_turns import Way, rows_in_turns
from benchmarks.workload import ADVANTAGE, CLIP_HIGH, RATIO_NOISE, Case
from paec_kernels.train import algorithms, loop
from paec_kernels.train.config import TrainConfig
from paec_kernels.train.models.by_name import pick_device, starting_policy
from paec_kernels.train.tasks.by_name import load_tasks

CONFIG = TrainConfig(method=algorithms.PAECOptions(paec=pk.PAECConfig(anchor_steps=1)))
SOURCES = {
    "GRPO": f"loop: look, optimiser_step; token_stats(top_p={NO_NUCLEUS}), grpo_loss",
    "GRPO + PAEC": "loop: look, optimiser_step; token_stats, Algorithm of paec",
    "GRPO, old log-probs known": "as GRPO, without the look",
}
KIND = "tiny model"


class GRPOAlone:
    """What the loop asks of an algorithm, and no more: no nucleus, no masked mean, no metrics."""

    top_p = NO_NUCLEUS

    def plan(self, micro_batches: Sequence[algorithms.Batch], *, seed: int) -> algorithms.Plan:
        normalizer = torch.stack([batch.valid.sum() for batch in micro_batches]).sum()
        return algorithms.Plan(normalizer, None, None, {})

    def loss(self, batch: algorithms.Batch, plan: algorithms.Plan, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = pk.grpo_loss(
            batch.stats.logp, batch.old_logp, batch.advantages, batch.valid, normalizer=plan.normalizer
        )
        return loss, {}

    def step(self) -> None:
        pass


class Step(NamedTuple):
    """The tokens of one optimiser step."""

    micro_batches: list[loop.MicroBatch]
    old_logps: list[Tensor]

    def batches(self, seen: Sequence[pk.TokenStats]) -> list[algorithms.Batch]:
        return [
            algorithms.Batch(stats, old_logp, each.advantages, each.accuracy, each.rollout.valid)
            for stats, old_logp, each in zip(seen, self.old_logps, self.micro_batches, strict=True)
        ]


def loop_rows(run: Run, device: str, on_step: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """A row for each way; GRPO with its look is the anchor of the ratios."""
    on_step("inputs; the tiny model's warm start where it is not in the cache")
    paec = make_run(device)
    grpo = replace(paec, algorithm=GRPOAlone())
    step = sample_step(grpo)
    on_step("check the losses")
    policy_loss, entropy_loss = losses_in_float64(paec, step, set_anchor(paec, step))
    errors = {
        "GRPO": relative_error(grpo, step, policy_loss),
        "GRPO + PAEC": relative_error(paec, step, policy_loss + entropy_loss),
    }
    errors["GRPO, old log-probs known"] = errors["GRPO"]
    seen = grpo.look(step.micro_batches)
    takes = {
        "GRPO": partial(take_step, grpo, step),
        "GRPO + PAEC": partial(take_step, paec, step),
        "GRPO, old log-probs known": partial(take_step, grpo, step, seen),
    }
    ways = {name: Way(SOURCES[name], errors[name], takes[name]) for name in SOURCES}
    tokens = sum(int(each.rollout.valid.sum()) for each in step.micro_batches)
    case = Case(tokens, len(paec.policy.head), torch.float32, KIND, device)
    yield from rows_in_turns(run, case, ways, on_step)


def make_run(device: str) -> loop.Run:
    """As `loop.train` makes it."""
    where = pick_device(device)
    policy = starting_policy(CONFIG, where)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=0.0, weight_decay=0.0)
    algorithm = algorithms.make(CONFIG.algo, CONFIG.method).to(where)
    return loop.Run(CONFIG, policy, policy.module, optimizer, algorithm, OperatorClock(where))


def sample_step(run: loop.Run) -> Step:
    tasks, _ = load_tasks(CONFIG.tasks, ())
    micro_batches, *_ = loop.split(CONFIG, *loop.sample(CONFIG, run.policy, tasks, 0, 0, 1), 1)  # the first step's
    # Where every answer is right, or every one wrong, the loss would be 0.
    micro_batches = [each._replace(advantages=torch.full_like(each.advantages, ADVANTAGE)) for each in micro_batches]
    torch.manual_seed(0)
    logps = [stats.logp for stats in run.look(micro_batches)]
    return Step(micro_batches, [logp + RATIO_NOISE * torch.randn_like(logp) for logp in logps])


def set_anchor(run: loop.Run, step: Step) -> float:
    """As one step of training does; nats."""
    plan = run.algorithm.plan(step.batches(run.look(step.micro_batches)), seed=0)
    run.algorithm.step()
    return plan.metrics["selected_entropy"].item()


@torch.no_grad()
def losses_in_float64(run: loop.Run, step: Step, anchor: float) -> tuple[Tensor, Tensor]:
    """GRPO's and PAEC's, by the definitions, of all tokens at once."""
    columns = []
    for each, old_logp in zip(step.micro_batches, step.old_logps, strict=True):
        rollout, valid = each.rollout, each.rollout.valid
        hidden = run.model(rollout.sequences, rollout.attention_mask, rollout.prompt_length)
        stats = pk.reference.token_stats((hidden @ run.policy.head.T)[valid].double(), rollout.token_ids[valid])
        columns.append((*stats, old_logp[valid].double(), each.advantages.expand_as(valid)[valid].double()))
    *found, old_logp, advantages = (torch.cat(column) for column in zip(*columns, strict=True))
    stats = pk.TokenStats(*found)
    valid = torch.ones_like(old_logp, dtype=torch.bool)
    policy_loss = pk.reference.grpo_loss(stats.logp, old_logp, advantages, valid, clip_high=CLIP_HIGH)
    return policy_loss, pk.reference.paec_loss(stats, valid, CONFIG.method.paec, anchor)[0]


@torch.no_grad()
def relative_error(run: loop.Run, step: Step, expected: Tensor) -> float:
    batches = step.batches(run.look(step.micro_batches))
    plan = run.algorithm.plan(batches, seed=0)
    loss = sum(run.algorithm.loss(batch, plan, number)[0] for number, batch in enumerate(batches))
    return ((loss - expected).abs() / expected.abs()).item()


def take_step(run: loop.Run, step: Step, seen: list[pk.TokenStats] | None = None) -> None:
    seen = run.look(step.micro_batches) if seen is None else seen
    loop.optimiser_step(run, step.micro_batches, seen, step.old_logps, seed=0)
    run.clock.seconds()  # forgets the spans, as each step of the loop does
