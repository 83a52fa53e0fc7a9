"""``paec inspect``: what PAEC sees of a model's answers, token by token, and what one optimiser step changes.

Sampling, rewards and the step are the training loop's own; the report is one dictionary, shown by `report.tokens` and
written as JSON.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import paec_kernels as pk
from paec_kernels import checks
from paec_kernels.extras import extra
from paec_kernels.train import loop
from paec_kernels.train.algorithms import MicroBatch, PAECOptions
from paec_kernels.train.config import TrainConfig, plain, seed_of
from paec_kernels.train.models.policy import Policy
from paec_kernels.train.policies import pick_device, starting_policy, trained_policy
from paec_kernels.train.presets import PRESETS
from paec_kernels.train.report.tokens import SUMMARISED, Report
from paec_kernels.train.run_folder import read_config
from paec_kernels.train.tasks.by_name import load_tasks
from paec_kernels.train.tasks.task import Problem, Task

with extra("train"):
    from rich.progress import Progress


@dataclass(frozen=True)
class InspectConfig:
    """Show a model's answers with each token coloured by PAEC's soft mask, take one optimiser step, and look again.

    Writes OUT/inspect.json: what is shown, and every token's statistics.
    """

    model: str = "tiny"
    """tiny (its start), smollm2, or a Hugging Face id or folder."""
    chat: bool | None = None
    """Put each prompt into the tokenizer's chat template. None: where it has one."""
    run: Path | None = None
    """Folder of a training run: look at its last checkpoint, and take the defaults below from it."""
    tasks: tuple[str, ...] = ()
    """As in `paec train`; by default the run's, else the families of the tiny model or preset smollm2's."""
    prompts: tuple[str, ...] = ()
    """Texts to answer in place of tasks. Nothing judges these answers, so that no step is taken."""
    problems: int = 5
    """How many problems are asked; the tasks take turns."""
    answers: int = 8
    """Answers sampled for each: a group, and a micro-batch of the step."""
    max_new_tokens: int | None = None
    """Where an answer is cut off; by default as in the run or preset."""
    temperature: float | None = None
    """The temperature of the sampling and of all statistics; by default as in the run or preset."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default as in the run or preset."""
    paec: pk.PAECConfig = field(default_factory=lambda: pk.PAECConfig(anchor_steps=1))
    """PAEC's constants. With anchor_steps 1 this step sets the floor, which is then shown."""
    seed: int = 0
    """Chooses the problems, and is the seed of the sampling."""
    operator: Literal["logits", "linear"] = "logits"
    """Statistics from logits, or from hidden states with logits that exist a chunk at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    out: Path = Path("runs/inspect")
    """Folder for inspect.json."""

    def __post_init__(self) -> None:
        checks.integer("problems", self.problems, least=1)
        if self.prompts and self.tasks:
            raise ValueError(f"prompts must be none where tasks are named, got {self.prompts}")
        if not all(self.prompts):
            raise ValueError(f"prompts must not be empty texts, got {self.prompts}")
        if self.run is not None and (self.model, self.chat) != ("tiny", None):
            raise ValueError(f"model and chat must be left to the run, got {self.model!r} and {self.chat}")

    def training(self) -> TrainConfig:
        """Return the training whose step is taken; what is not given comes from the run, or from a preset.

        Raises:
            FileNotFoundError: the run holds no config.json.
            UnreadableFileError: it is damaged.
        """
        if self.run is not None:
            inherited = ("model", "chat", "max_new_tokens", "temperature", "learning_rate", "precision")
            saved = read_config(self.run, ["tasks", "eval_tasks", *inherited])
            start = TrainConfig(
                tasks=tuple(saved["tasks"]),
                eval_tasks=tuple(saved["eval_tasks"]),
                **{name: saved[name] for name in inherited},
            )
        else:
            preset = PRESETS["tiny" if self.model == "tiny" else "smollm2"]
            start = replace(preset, model=self.model, chat=self.chat)
        asked = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "learning_rate")}
        return replace(
            start,
            **{name: value for name, value in asked.items() if value is not None},
            tasks=self.tasks or start.tasks,
            algo="paec",
            method=PAECOptions(paec=self.paec),
            seed=self.seed,
            prompts=1,  # a group at a time
            updates=1,
            answers=self.answers,
            micro_batch=self.answers,
            operator=self.operator,
            device=self.device,
        )


@dataclass(frozen=True)
class OwnPrompt:
    """A `Task` of one text that has no verifier: every reward is 0."""

    text: str
    name: str = "prompt"
    roles: tuple[str, ...] = ()

    def train_problem(self, index: int) -> Problem:
        return Problem(self.name, self.text, "")

    def eval_problems(self, count: int) -> list[Problem]:
        return [self.train_problem(0)]

    def extract(self, text: str) -> str | None:
        return None

    def reward(self, problem: Problem, text: str) -> float:
        return 0.0

    def same(self, one: str, other: str) -> bool:
        return one == other


def make_report(config: InspectConfig, progress: Progress) -> Report:
    """Sample answers, look at them, take the optimiser step, and look again.

    Returns:
        ``groups``, each a problem with its answers and their tokens' statistics, before the step and ``_after`` it;
        ``statistics``, a summary of those before; the whole batch ``before`` and ``after``; the ``step``'s own terms;
        the mean ``logp_change`` of a token, NaN without such an answer; and ``options``, ``training``, ``device`` and
        ``torch``, from which all this came. Entropies and log-probs are in nats; what comes from a step is None where
        none was taken.
    """
    training = config.training()
    tasks: Sequence[Task] = [OwnPrompt(text) for text in config.prompts]
    if not tasks:
        # A run's problems are those that its evaluation left to it; of a file that is named here any may be asked.
        tasks, _ = load_tasks(config.tasks, ()) if config.tasks else training.load_tasks()
    run = start(config, training, progress)
    n_groups = len(config.prompts) or config.problems
    bar = progress.add_task("sample", total=n_groups * (2 if config.prompts else 4))
    run.policy.module.register_forward_hook(lambda *_: progress.advance(bar))  # each pass over a micro-batch

    groups: list[Report] = []
    batches: list[MicroBatch] = []
    for number in range(n_groups):
        rollout, rewards = loop.sample(training, run.policy, tasks, number, rank=0, world=1)
        [[batch]] = loop.split(run, rollout, rewards)
        batches.append(batch)
        groups.append(describe(run.policy, *loop.problem_at(tasks, config.seed, number), batch))
        progress.advance(bar)
    answers = [answer for group in groups for answer in group["answers"]]

    paec = pk.PAEC(config.paec, steps_per_batch=1)
    tokens, before = calibrate(paec, batches)
    add_columns(answers, tokens)
    report: Report = {
        "options": plain(config),
        "training": training.identity(),
        "device": str(run.policy.head.device),
        "torch": torch.__version__,
        "groups": groups,
        "statistics": summary(tokens),
        "before": before,
        **dict.fromkeys(("step", "after", "logp_change")),
    }
    if not config.prompts:
        progress.update(bar, description="step")
        metrics = loop.optimiser_step(run, batches, seed_of(config.seed, "update", 0, 0))
        report["step"] = {name: metrics[name] for name in ("policy_loss", "entropy_loss", "gradient_norm")}
        paec.step()
        progress.update(bar, description="look again")
        tokens_after, report["after"] = calibrate(paec, loop.look_again(run, batches))
        add_columns(answers, {f"{name}_after": tokens_after[name] for name in ("logp", "entropy")})
        change = (tokens_after["logp"] - tokens["logp"]).cpu()
        rewarded = torch.tensor([answer["reward"] > 0 for answer in answers for _ in answer["tokens"]])
        kinds = {"rewarded": rewarded, "others": ~rewarded}
        report["logp_change"] = {name: change[of_kind].mean().item() for name, of_kind in kinds.items()}
    return report


def start(config: InspectConfig, training: TrainConfig, progress: Progress) -> loop.Run:
    """Load the model, and what steps it."""
    device = pick_device(training.device)
    bar = progress.add_task(f"load {training.model}", total=None)
    policy = starting_policy(training, device) if config.run is None else trained_policy(config.run, device)
    progress.remove_task(bar)
    return loop.new_run(training, policy)


def calibrate(paec: pk.PAEC, batches: list[MicroBatch]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Calibrate over all answers' tokens.

    Returns:
        the statistics and PAEC's soft mask of all N valid tokens, [N] by name, those of each answer in a row; and of
        the whole batch PAEC's metrics, its weighted terms and the mean entropy.
    """

    def of_all_tokens(of_batch: Callable[[MicroBatch], pk.TokenStats | None]) -> pk.TokenStats:
        columns = zip(*([x[batch.valid] for x in of_batch(batch) or ()] for batch in batches), strict=True)
        return pk.TokenStats(*map(torch.cat, columns))

    stats = of_all_tokens(lambda batch: batch.stats)
    anchor_stats = None if batches[0].anchor_stats is None else of_all_tokens(lambda batch: batch.anchor_stats)
    calibrated = paec(stats, torch.ones_like(stats.margin, dtype=torch.bool), anchor_stats=anchor_stats)
    batch = calibrated.metrics | {
        "entropy": stats.entropy.mean(),
        "entropy_bonus": -paec.config.beta * calibrated.metrics["mean_entropy"],
        "floor_penalty": paec.config.lam * calibrated.metrics["penalty"],
    }
    tokens = stats._asdict() | {"mask": calibrated.mask}
    return tokens, {name: value.item() for name, value in batch.items()}


def describe(policy: Policy, task: Task, problem: Problem, batch: MicroBatch) -> Report:
    """Return a problem and its answers in the micro-batch's order, as text and as tokens, with their rewards."""
    rollout = batch.rollout
    columns = (policy.texts(rollout), policy.tokens(rollout), rollout.answers(), batch.advantages.flatten().tolist())
    answers = [
        {
            "text": text,
            "reward": None if isinstance(task, OwnPrompt) else task.reward(problem, text),
            "advantage": advantage,
            "tokens": tokens,
            "token_ids": token_ids,
        }
        for text, tokens, token_ids, advantage in zip(*columns, strict=True)
    ]
    return {"task": task.name, "prompt": problem.prompt, "expected": problem.answer, "answers": answers}


def add_columns(answers: list[Report], columns: dict[str, Tensor]) -> None:
    """Give each answer its tokens' part of the columns, ``[N]`` over all answers."""
    lengths = [len(answer["tokens"]) for answer in answers]
    for name, column in columns.items():
        for answer, part in zip(answers, column.split(lengths), strict=True):
            answer[name] = part.tolist()


def summary(tokens: dict[str, Tensor]) -> Report:
    """Return of each column its median, 90 % quantile, maximum, mean, and mean by the soft mask, sum(m x) / sum(m)."""
    found = {}
    mask = tokens["mask"].double()
    for name in SUMMARISED:
        x = tokens[name].double()
        quantiles = x.sort().values[[int(share * (len(x) - 1)) for share in (0.5, 0.9, 1.0)]]
        values = [*quantiles.tolist(), x.mean().item(), ((mask * x).sum() / mask.sum()).item()]
        found[name] = dict(zip(("median", "90 %", "largest", "mean", "masked mean"), values, strict=True))
    return found
