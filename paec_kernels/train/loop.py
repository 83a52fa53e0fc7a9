"""RLVR from rollouts to optimiser steps, top to bottom. Read `train` first.

Each step samples a group of answers to each prompt, rewards them with the task's verifier, normalises rewards within
the group, and takes one or more optimiser steps on the tokens. An optimiser step looks at all its tokens first and
then trains on them micro-batch by micro-batch, so that thresholds and means are those of the whole step.

What is simple here, and is not in a production trainer: sampling and training take turns on the same weights in the
same process; there is no reference model and no KL penalty; no curriculum, no dynamic sampling, no value model; the
learning rate is constant; data-parallel ranks hold whole models. For more, use TRL or verl.

Whatever is random depends on the seed, the step and the prompt's place alone, so a checkpoint needs no generator's
state: it holds parameters, optimiser, anchor and step, and a run is nothing else.
"""

import copy
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import paec_kernels as pk
from paec_kernels.checks import integer
from paec_kernels.losses.ranks import mean_over_ranks, rank_and_world, world_size
from paec_kernels.saved_state import write_saved
from paec_kernels.train.algorithms import Algorithm, MicroBatch
from paec_kernels.train.config import TrainConfig, plain, seed_of
from paec_kernels.train.models.policy import Policy, Rollout
from paec_kernels.train.out_folder import held
from paec_kernels.train.policies import autocast_dtype, pick_device, starting_policy
from paec_kernels.train.run_folder import (
    CHECKPOINT,
    RunLog,
    count_rows,
    fitting,
    load_checkpoint,
    refuse_full_disk,
    set_results_aside,
)
from paec_kernels.train.tasks.task import ROLES, Problem, Task

Row = dict[str, float]
PROBLEMS_OF_A_SEED = 10**9


class Interrupted(Exception):
    """SIGINT came; the checkpoint holds every step that was done."""


@dataclass
class Run:
    """All that training changes, and how the model is called."""

    config: TrainConfig
    policy: Policy
    model: nn.Module  # policy.module, wrapped where there is more than one process
    optimizer: torch.optim.Optimizer
    algorithm: Algorithm
    anchor_policy: Policy | None = None  # the policy as it was at the start, where the algorithm needs it
    steps_done: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.identity(),
            "steps_done": self.steps_done,
            "model": self.policy.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "algorithm": self.algorithm.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.steps_done = integer("steps_done", state["steps_done"], least=0)

    def statistics(self, model: nn.Module, head: Tensor, rollout: Rollout) -> pk.TokenStats:
        """Return the statistics of the answers' tokens, [B, T], under a model's weights and its head."""
        options: dict[str, Any] = {
            "token_ids": rollout.token_ids,
            "valid": rollout.valid,
            "top_p": self.algorithm.top_p,
            "temperature": self.config.temperature,
        }
        device = head.device
        dtype = autocast_dtype(self.config.precision, device)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            hidden = model(rollout.sequences, rollout.attention_mask, rollout.prompt_length)
            if self.config.operator == "linear":
                return pk.linear_token_stats(hidden, head, **options)
            return pk.token_stats(hidden @ head.T, inplace_backward=True, **options)

    @torch.no_grad()
    def look(self, rollout: Rollout, policy: Policy | None = None) -> pk.TokenStats:
        """Return the statistics without gradient, on this rank alone; of another policy if one is given."""
        policy = policy or self.policy
        return self.statistics(policy.module, policy.head, rollout)


def train(
    config: TrainConfig,
    on_step: Callable[[Row], None] = lambda row: None,
    on_saved: Callable[[int], None] = lambda steps_done: None,
    *,
    tasks: Sequence[Task] | None = None,
) -> Run:
    """Train to ``config.steps``, from the checkpoint in ``config.out`` if there is one.

    Args:
        on_step: called with each step's row of log.jsonl, on rank 0.
        on_saved: called with the number of steps after each checkpoint, on rank 0: a crash loses none of them.
        tasks: those that ``config`` names, where the caller has loaded them.
    Raises:
        FolderInUseError: another process writes into ``config.out``.
        OtherConfigError: the checkpoint belongs to another configuration; nothing is overwritten.
        UnreadableFileError: the checkpoint or the log is damaged; the message names it, nothing is overwritten.
        ValueError: more steps than ``config.steps`` are done.
        OSError: a file cannot be written; the last checkpoint stands.
        FloatingPointError: a gradient is not finite; the last checkpoint stands.
        Interrupted: on SIGINT, after the step under way is done and saved.
    """
    with held(config.out):
        return _train(config, on_step, on_saved, tasks)


def _train(
    config: TrainConfig,
    on_step: Callable[[Row], None],
    on_saved: Callable[[int], None],
    tasks: Sequence[Task] | None,
) -> Run:
    rank, world = rank_and_world()
    if config.prompts % (config.updates * world):
        raise ValueError(
            f"prompts must be a multiple of updates * processes = {config.updates * world}, got {config.prompts}"
        )
    device = pick_device(config.device)
    if tasks is None:
        tasks, _ = config.load_tasks()
    config = replace(config, warm_start=config.warm_start.for_tasks(config.tasks))  # what is saved names its families
    run = new_run(config, starting_policy(config, device))
    path = config.out / CHECKPOINT
    if path.exists():
        state = load_checkpoint(path, config.identity())
        with fitting(path):
            run.load_state_dict(state)
    if run.steps_done > config.steps:
        raise ValueError(f"steps must be >= {run.steps_done}, which {path} has done, got {config.steps}")
    log = None
    if rank == 0:
        refuse_full_disk(run.policy.module, path)
        if run.steps_done < config.steps:
            set_results_aside(config.out, run.steps_done or count_rows(config.out))  # the checkpoint may be gone
        log = RunLog(config.out, plain(config), run.steps_done)

    with _sigint_after_step() as interrupted, closing(log) if log else nullcontext():
        while run.steps_done < config.steps:
            row = train_step(run, tasks, rank, world)
            if log:
                log.write(row)
                on_step(row)
            stop = bool(mean_over_ranks(torch.tensor(float(interrupted()), device=device), None))  # on any rank
            if log and (stop or run.steps_done % config.checkpoint_every == 0 or run.steps_done == config.steps):
                log.sync()
                write_saved(path, run.state_dict())
                on_saved(run.steps_done)
            if stop and run.steps_done < config.steps:
                raise Interrupted(f"stopped after step {run.steps_done} of {config.steps}")
    return run


def new_run(config: TrainConfig, policy: Policy) -> Run:
    """Make a run at its start; its anchor policy is ``policy`` as it is. Nothing is read from disk or written to it."""
    model = DistributedDataParallel(policy.module) if world_size() > 1 else policy.module
    optimizer = torch.optim.AdamW(policy.module.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    algorithm = Algorithm(config.method, steps_per_batch=config.updates).to(policy.head.device)
    anchor_policy = copy.deepcopy(policy) if algorithm.needs_anchor_policy else None
    return Run(config, policy, model, optimizer, algorithm, anchor_policy)


def train_step(run: Run, tasks: Sequence[Task], rank: int, world: int) -> Row:
    """Sample one batch of rollouts, take its optimiser steps, and return its row of the log."""
    config, start = run.config, time.perf_counter()
    rollout, rewards = sample(config, run.policy, tasks, run.steps_done, rank, world)
    sample_seconds = time.perf_counter() - start

    metrics: list[Row] = []
    for number, micro_batches in enumerate(split(run, rollout, rewards)):
        if number > 0:  # the weights have changed since
            micro_batches = look_again(run, micro_batches)
        seed = seed_of(config.seed, "update", run.steps_done, number)
        metrics.append(optimiser_step(run, micro_batches, seed))

    run.steps_done += 1
    lengths = rollout.valid.sum(1).float()
    sampled = {
        "reward": rewards.mean(),
        "mostly_right": (rewards.mean(1) > 0.5).float().mean(),  # the share of prompts that a majority vote gets right
        "mixed_groups": (rewards != rewards[:, :1]).any(1).float().mean(),  # the share of prompts with an advantage
        "response_length": lengths.mean(),
        "truncated": (lengths == config.max_new_tokens).float().mean(),
    }
    return {
        "step": run.steps_done,
        **{name: mean_over_ranks(value, None).item() for name, value in sampled.items()},
        **{name: sum(row[name] for row in metrics) / len(metrics) for name in metrics[0]},
        "seconds": time.perf_counter() - start,
        "sample_seconds": sample_seconds,
    }


def sample(
    config: TrainConfig, policy: Policy, tasks: Sequence[Task], step: int, rank: int, world: int
) -> tuple[Rollout, Tensor]:
    """Sample a group of answers to every ``world``-th prompt of the step, with their rewards [prompts, answers]."""
    places = range(rank, config.prompts, world)
    asked = [problem_at(tasks, config.seed, step * config.prompts + place) for place in places]
    rollout = policy.sample(
        [problem.prompt for _, problem in asked],
        config.answers,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seeds=[seed_of(config.seed, "sample", step, place) for place in places],
    )
    # A letter is a token of the tiny model alone. On every rank, whichever tasks it has asked.
    if config.model == "tiny" and any(task.roles for task in tasks):
        rollout = rollout._replace(roles=roles_of([task for task, _ in asked], config.answers, rollout.valid))
    texts = iter(policy.texts(rollout))
    rewards = [[task.reward(problem, next(texts)) for _ in range(config.answers)] for task, problem in asked]
    return rollout, torch.tensor(rewards, device=rollout.sequences.device)


def roles_of(tasks: Sequence[Task], answers: int, valid: Tensor) -> Tensor:
    """Return the index in ROLES of each place of the ``answers`` of each task's problem, -1 where it has none.

    Args:
        valid: bool [B, T], of the answers.
    Returns:
        int64 [B, T].
    """
    roles = valid.new_full((len(tasks), valid.shape[1]), -1, dtype=torch.int64)
    for row, task in zip(roles, tasks, strict=True):
        known = [ROLES.index(role) for role in task.roles[: valid.shape[1]]]
        row[: len(known)] = torch.tensor(known, dtype=torch.int64, device=valid.device)
    return roles.repeat_interleave(answers, dim=0)


def problem_at(tasks: Sequence[Task], seed: int, index: int) -> tuple[Task, Problem]:
    """Find the problem of a place in the order of all: the tasks take turns, and each seed has problems of its own."""
    turn, which = divmod(index, len(tasks))
    return tasks[which], tasks[which].train_problem(seed * PROBLEMS_OF_A_SEED + turn)


def split(run: Run, rollout: Rollout, rewards: Tensor) -> list[list[MicroBatch]]:
    """Make the micro-batches of each optimiser step, with statistics by the weights that sampled the answers.

    As ranks take every ``world``-th prompt, a step has the same prompts however many ranks there are.
    """
    advantages = pk.group_advantages(rewards).flatten()[:, None]
    accuracy = rewards.mean(1).repeat_interleave(run.config.answers)[:, None]
    per_update = len(advantages) // run.config.updates
    updates = []
    for first in range(0, len(advantages), per_update):
        by_length = first + rollout.valid[first : first + per_update].sum(1).argsort(stable=True)  # little padding
        micro_batches = []
        for rows in by_length.split(run.config.micro_batch):
            part = rollout.rows(rows)
            stats = run.look(part)
            anchor = None if run.anchor_policy is None else run.look(part, run.anchor_policy)
            micro_batches.append(MicroBatch(part, advantages[rows], accuracy[rows], stats, stats.logp, anchor))
        updates.append(micro_batches)
    return updates


def look_again(run: Run, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Take the statistics by the current weights; the old log-probs stay those of the sampling."""
    return [batch._replace(stats=run.look(batch.rollout)) for batch in micro_batches]


def optimiser_step(run: Run, micro_batches: Sequence[MicroBatch], seed: int) -> Row:
    """Plan over all tokens, then train on them; return the step's metrics over all ranks.

    Args:
        micro_batches: with statistics by the current weights.
        seed: the same on every rank.
    Raises:
        FloatingPointError: the gradient is not finite; no weight has changed.
    """
    micro_batches, plan = run.algorithm.plan(micro_batches, seed=seed)
    shares: list[dict[str, Tensor]] = []
    for batch in micro_batches:
        with _gradients_stay_local(run.model, len(shares) + 1 < len(micro_batches)):
            stats = run.statistics(run.model, run.policy.head, batch.rollout)
            loss, metrics = run.algorithm.loss(batch._replace(stats=stats), plan)
            loss.backward()
        shares.append(metrics)
    gradient_norm = nn.utils.clip_grad_norm_(run.policy.module.parameters(), run.config.max_grad_norm)
    if not gradient_norm.isfinite():
        total = {name: torch.stack([each[name] for each in shares]).sum().item() for name in shares[0]}
        raise FloatingPointError(
            f"the gradient's norm is {gradient_norm.item()} in step {run.steps_done + 1}, where "
            + ", ".join(f"{name} is {value:.4g}" for name, value in total.items())
            + "; that optimiser step was not taken, and the last checkpoint stands"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.algorithm.step()
    metrics = {name: mean_over_ranks(torch.stack([each[name] for each in shares]).sum(), None) for name in shares[0]}
    metrics |= plan.metrics | {"gradient_norm": gradient_norm}
    row = {name: value.item() for name, value in metrics.items()}
    run.algorithm.warn_unless_selective(row)
    return row


def _gradients_stay_local(model: nn.Module, local: bool) -> AbstractContextManager:
    """Ranks average their gradients in the last micro-batch's backward only."""
    return model.no_sync() if local and isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def _sigint_after_step() -> Iterator[Callable[[], bool]]:
    """The first SIGINT is only noted; a second one ends the process as ever."""
    came = False

    def note(signum: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
