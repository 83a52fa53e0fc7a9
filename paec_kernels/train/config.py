"""The options of a training run."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from paec_kernels.checks import fields, integer, number, one_of
from paec_kernels.saved_state import options_as_json
from paec_kernels.train.algorithms import ALGORITHMS, Method, OracleOptions
from paec_kernels.train.models.warm_start import WarmStart
from paec_kernels.train.tasks.by_name import load_tasks
from paec_kernels.train.tasks.families import FAMILIES
from paec_kernels.train.tasks.long_families import LONG_FAMILIES
from paec_kernels.train.tasks.task import Task

if TYPE_CHECKING:
    AlgoName: TypeAlias = str
else:
    AlgoName = Literal[*ALGORITHMS]  # the choices that --help lists


@dataclass(frozen=True)
class EvalOptions:
    """How a policy is evaluated."""

    problems: int = 64
    """Number of problems of each task."""
    samples: int = 16
    """Answers sampled for each problem, besides the greedy one."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        fields(self)
        for name, least in (("problems", 1), ("samples", 1), ("seed", 0)):
            integer(name, getattr(self, name), least=least)


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model by reinforcement learning with verifiable rewards."""

    preset: Literal["tiny", "long", "smollm2", "paper"] = "tiny"
    """Set of defaults for all options below."""
    out: Path = Path("runs/train")
    """Folder for config.json, log.jsonl, eval.json, checkpoint.pt, TensorBoard's events, and a Hugging Face model's end
    as model/. A run that is there already goes on from its checkpoint."""
    model: str = "tiny"
    """tiny, smollm2, or a Hugging Face id or folder."""
    chat: bool | None = None
    """Put each prompt into the tokenizer's chat template. None: if it has one. False suits most base models."""
    tasks: tuple[str, ...] = tuple(FAMILIES)
    """Families of the tiny model: add, sub, parity, sort, count; long ones, whose forks are known: chain, scan, carry,
    and with harmless choices chain+, scan+, carry+, of which chain+ and carry+ need --max-new-tokens 40. Or gym:NAME,
    gym:NAME,FIELD=VALUE,... for a reasoning-gym dataset, or JSONL files. Prompts come from them in turn."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of the evaluation. By default it takes those of the training, on problems held out from it."""
    algo: AlgoName = "paec"
    """Policy loss and entropy term; `paec train --algo NAME --help` lists the options of each."""
    method: Method = field(default_factory=ALGORITHMS["paec"])
    seed: int = 0
    """Seed of the order of problems and of the sampling."""
    steps: int = 250
    """Number of batches of rollouts."""
    prompts: int = 20
    """Prompts in a batch, over all processes."""
    answers: int = 16
    """Answers sampled for each prompt: the size of a group."""
    updates: int = 2
    """Optimiser steps for each batch, each on its own part of the prompts.
    With 1 every ratio is 1: grpo, cispo and kl-cov are then the same."""
    micro_batch: int = 64
    """Answers in a forward and backward pass; an optimiser step accumulates the gradients of as many as it needs."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Temperature of the sampling and of all statistics."""
    learning_rate: float = 1e-4
    """AdamW's learning rate, constant."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    operator: Literal["logits", "linear"] = "logits"
    """Take statistics from logits, or from hidden states, with logits that exist a chunk at a time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of forward passes, by autocast; weights stay float32, and the tiny model samples in float32.
    auto: bfloat16 on a GPU that has it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto: a GPU if there is one."""
    checkpoint_every: int = 25
    """Batches between checkpoints."""
    evaluate: EvalOptions = field(default_factory=EvalOptions)
    warm_start: WarmStart = field(default_factory=WarmStart)
    cache: Path = Path.home() / ".cache" / "paec_kernels"
    """Folder that keeps the tiny model's start."""

    def __post_init__(self) -> None:
        fields(self)
        for name in "steps prompts answers updates micro_batch max_new_tokens checkpoint_every".split():
            integer(name, getattr(self, name), least=1)
        integer("seed", self.seed, least=0)
        number("weight_decay", self.weight_decay, least=0)
        for name in ("temperature", "learning_rate", "max_grad_norm"):
            number(name, getattr(self, name), above=0)
        if self.prompts % self.updates:
            raise ValueError(f"prompts must be a multiple of updates = {self.updates}, got {self.prompts}")
        if type(self.method) is not ALGORITHMS[self.algo]:
            raise TypeError(f"method must be {ALGORITHMS[self.algo].__name__} for {self.algo!r}, got {self.method!r}")
        if not self.tasks:
            raise ValueError("tasks must name at least one, got none")
        _refuse_twice("tasks", self.tasks)
        _refuse_tiny_chat(self.model, self.chat)
        _refuse_unknown_forks((self.algo,), self.model, self.tasks)

    def load_tasks(self) -> tuple[list[Task], list[Task]]:
        """Return the tasks of the training and of its evaluation; ValueError as `tasks.by_name.load_tasks`."""
        return load_tasks(self.tasks, self.eval_tasks or None)

    def identity(self) -> dict[str, Any]:
        """Return the options that identify a run: all but its output, its length and its evaluation."""
        elsewhere = ("preset", "out", "steps", "checkpoint_every", "evaluate", "eval_tasks", "cache")
        return {name: value for name, value in plain(self).items() if name not in elsewhere}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model: greedy, mean@k, majority vote, pass@k, distinct answers and length, with intervals."""

    run: Path | None = None
    """Folder of a training run. Its last checkpoint is evaluated, on its own tasks unless others are named."""
    model: str = "tiny"
    """Model to evaluate without a run: tiny (its start), smollm2, or a Hugging Face id or folder."""
    chat: bool | None = None
    """Chat template without a run, as in `paec train`."""
    tasks: tuple[str, ...] = ()
    """Tasks as in `paec train`; by default the run's, or the tiny model's families."""
    out: Path | None = None
    """Folder for eval.json; by default the run's, or runs/eval."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens; by default the run's, or that of `paec train`."""
    temperature: float | None = None
    """Temperature of the sampling; by default the run's, or that of `paec train`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on. auto: a GPU if there is one."""
    evaluate: EvalOptions = field(default_factory=EvalOptions)

    def __post_init__(self) -> None:
        fields(self)
        if self.max_new_tokens is not None:
            integer("max_new_tokens", self.max_new_tokens, least=1)
        if self.temperature is not None:
            number("temperature", self.temperature, above=0)
        if self.run is None:
            _refuse_tiny_chat(self.model, self.chat)
        elif self.chat is not None:
            raise ValueError(f"chat must be None for a run, which is evaluated as it was trained, got {self.chat}")


@dataclass(frozen=True)
class CompareConfig:
    """Train arms x seeds and compare them, or compare finished runs. Runs that were stopped go on."""

    out: Path = Path("runs/compare")
    """Folder for the tables and plots, and for the runs, as runs/ARM/SEED."""
    runs: tuple[Path, ...] = ()
    """Folders of finished runs, or folders that hold some: compare those, train nothing."""
    arms: tuple[str, ...] = ("grpo", "paec")
    """Algorithms to train, each as NAME or NAME,FIELD=VALUE,..., such as paec,paec.lam=5. Other fields have the
    defaults of `paec train --algo NAME`."""
    seeds: int = 4
    """Number of seeds that each arm is trained with."""
    first_seed: int = 0
    """The first of them."""
    warm_starts: int = 1
    """Number of starts of the tiny model. Run S begins with that of seed train.warm_start.seed + S modulo this."""
    jobs: int = 1
    """Runs at a time, each a process with its share of the cores."""
    arm_fields: tuple[str, ...] = ("algo",)
    """With RUNS, the fields of a run's config.json that tell arms apart, such as algo method.paec.lam."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Options of every run, except out, seed, algo and method."""

    def __post_init__(self) -> None:
        fields(self)
        for name in ("seeds", "jobs", "warm_starts"):
            integer(name, getattr(self, name), least=1)
        integer("first_seed", self.first_seed, least=0)
        for name in ("arms", "arm_fields"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got none")
            _refuse_twice(name, getattr(self, name))
        for arm in self.arms:
            one_of("arms", arm.partition(",")[0], ALGORITHMS)
        if not self.runs:
            _refuse_unknown_forks([arm.partition(",")[0] for arm in self.arms], self.train.model, self.train.tasks)


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's last checkpoint as a Hugging Face model with its tokenizer, as `paec train` does at its end."""

    run: Path = Path("runs/train")
    """Folder of a training run; the model is written to RUN/model, in place of one that is there."""

    def __post_init__(self) -> None:
        fields(self)


def _refuse_twice(name: str, values: Sequence[str]) -> None:
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise ValueError(f"{name} must name each once, got {', '.join(twice)} more than once")


def _refuse_tiny_chat(model: str, chat: bool | None) -> None:
    if model == "tiny" and chat:
        raise ValueError(f"chat must not be True for the tiny model, which has no chat template, got {chat}")


def _refuse_unknown_forks(algos: Sequence[str], model: str, tasks: Sequence[str]) -> None:
    for algo in algos:
        if issubclass(ALGORITHMS[algo], OracleOptions):
            why = f"for {algo!r}, which must know the forks of an answer"
            if unknown := [name for name in tasks if name not in LONG_FAMILIES]:
                raise ValueError(f"tasks must be among {', '.join(LONG_FAMILIES)} {why}, got {', '.join(unknown)}")
            if model != "tiny":  # to whose tokens the letters are none
                raise ValueError(f"model must be tiny {why}, got {model}")


def plain(config: Any) -> dict[str, Any]:
    """Return a dataclass as JSON's types: paths as text, tuples as lists, infinities as "inf"."""
    return options_as_json(asdict(config))


def seed_of(*parts: int | str) -> int:
    """Return a seed for torch made from any names and numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())
