"""The options of a training run."""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from paec_kernels.train.algorithms import ALGORITHMS, Method
from paec_kernels.train.models.warm_start import WarmStart
from paec_kernels.train.ranges import above_zero, at_least
from paec_kernels.train.tasks.families import FAMILIES

AlgoName = Literal[
    "grpo", "global", "paec", "paec-no-mask", "paec-no-penalty", "cispo", "clip-cov", "kl-cov", "aer", "siren"
]


@dataclass(frozen=True)
class EvalOptions:
    """How a policy is evaluated."""

    problems: int = 64
    """Problems of each task."""
    samples: int = 16
    """Answers sampled for each, besides the greedy one."""
    seed: int = 0
    """Of the sampling."""

    def __post_init__(self) -> None:
        at_least(self, 1, "problems", "samples")
        at_least(self, 0, "seed")


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model by reinforcement learning with verifiable rewards."""

    preset: Literal["tiny", "smollm2", "paper"] = "tiny"
    """Defaults that belong together, for all options below."""
    out: Path = Path("runs/train")
    """Folder for config.json, log.jsonl, eval.json, checkpoint.pt and TensorBoard's events. A run that it holds goes on
    where it was."""
    model: str = "tiny"
    """tiny, smollm2, or a Hugging Face id or folder."""
    chat: bool | None = None
    """Put each prompt into the tokenizer's chat template. None: where it has one. False suits most base models."""
    tasks: tuple[str, ...] = tuple(FAMILIES)
    """Families of the tiny model, gym:NAME or gym:NAME,FIELD=VALUE,... for a reasoning-gym dataset, or JSONL files;
    they take turns."""
    eval_tasks: tuple[str, ...] = ()
    """Tasks of the evaluation; by default those of the training, on problems it never sees."""
    algo: AlgoName = "paec"
    """The policy loss and its entropy term; `paec train --algo NAME --help` lists the options of each."""
    method: Method = field(default_factory=ALGORITHMS["paec"])
    seed: int = 0
    """Of the order of problems and of the sampling."""
    steps: int = 250
    """Batches of rollouts."""
    prompts: int = 20
    """Prompts in a batch, over all processes."""
    answers: int = 16
    """Answers sampled for each prompt: a group."""
    updates: int = 2
    """Optimiser steps for each batch, each on its own part of the prompts. With 1 every ratio is 1: grpo, cispo and
    kl-cov are then the same."""
    micro_batch: int = 64
    """Answers in a forward and backward pass; gradients are accumulated over as many as an optimiser step needs."""
    max_new_tokens: int = 32
    """Where an answer is cut off."""
    temperature: float = 1.0
    """Of the sampling and of all statistics."""
    learning_rate: float = 1e-4
    """Of AdamW, constant."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    operator: Literal["logits", "linear"] = "logits"
    """Statistics from logits, or from hidden states with logits that exist a chunk at a time."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass, by autocast; weights stay float32. auto: bfloat16 on a GPU that has it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    checkpoint_every: int = 25
    """Batches between checkpoints."""
    evaluate: EvalOptions = field(default_factory=EvalOptions)
    warm_start: WarmStart = field(default_factory=WarmStart)
    cache: Path = Path.home() / ".cache" / "paec_kernels"
    """Where the tiny model's start is kept."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "prompts", "answers", "updates", "micro_batch", "max_new_tokens", "checkpoint_every")
        at_least(self, 0, "seed", "weight_decay")
        above_zero(self, "temperature", "learning_rate", "max_grad_norm")
        if self.prompts % self.updates:
            raise ValueError(f"prompts must be a multiple of updates = {self.updates}, got {self.prompts}")
        if type(self.method) is not ALGORITHMS[self.algo]:
            raise TypeError(f"method must be {ALGORITHMS[self.algo].__name__} for {self.algo!r}, got {self.method!r}")
        if not self.tasks:
            raise ValueError("tasks must name at least one, got none")
        _refuse_tiny_chat(self.model, self.chat)

    def identity(self) -> dict[str, Any]:
        """What two runs must share to be the same run: all but where it is written, how long, and how it is judged.

        An option left open (None) is no part of it, so that a run from before there was such an option goes on.
        """
        elsewhere = ("preset", "out", "steps", "checkpoint_every", "evaluate", "eval_tasks", "cache")
        return {name: value for name, value in plain(self).items() if name not in elsewhere and value is not None}


@dataclass(frozen=True)
class EvalConfig:
    """Evaluate a model: greedy, mean@k, majority vote, pass@k, distinct answers and length, with intervals."""

    run: Path | None = None
    """Folder of a training run; its last checkpoint is evaluated, on its own tasks unless others are named."""
    model: str = "tiny"
    """Without a run: tiny (its start), smollm2, or a Hugging Face id or folder."""
    chat: bool | None = None
    """Without a run: as in `paec train`."""
    tasks: tuple[str, ...] = ()
    """As in `paec train`; by default the run's, or the tiny model's families."""
    out: Path | None = None
    """Folder for eval.json; by default the run's, or runs/eval."""
    max_new_tokens: int | None = None
    """Where an answer is cut off; by default where the run does, or `paec train`."""
    temperature: float | None = None
    """Of the sampling; by default the run's, or that of `paec train`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    evaluate: EvalOptions = field(default_factory=EvalOptions)

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            at_least(self, 1, "max_new_tokens")
        if self.temperature is not None:
            above_zero(self, "temperature")
        if self.run is None:
            _refuse_tiny_chat(self.model, self.chat)
        elif self.chat is not None:
            raise ValueError(f"chat must be None for a run, which is evaluated as it was trained, got {self.chat}")


@dataclass(frozen=True)
class CompareConfig:
    """Train arms x seeds and compare them, or compare runs that are there; runs that were stopped go on."""

    out: Path = Path("runs/compare")
    """Folder for the tables and plots, and for the runs as ARM/SEED."""
    runs: tuple[Path, ...] = ()
    """Folders of finished runs, or folders that hold some: compare those, train nothing."""
    arms: tuple[AlgoName, ...] = ("grpo", "paec")
    """Algorithms to train, each with the default options of `paec train --algo ARM`."""
    seeds: int = 4
    """Each arm is trained with seeds 0 to SEEDS - 1."""
    jobs: int = 1
    """Runs at a time, each a process with its share of the cores."""
    arm_fields: tuple[str, ...] = ("algo",)
    """Fields of a run's config.json that tell arms apart, such as algo method.paec.lam."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Of every run, except out, seed, algo and method."""

    def __post_init__(self) -> None:
        at_least(self, 1, "seeds", "jobs")


def _refuse_tiny_chat(model: str, chat: bool | None) -> None:
    if model == "tiny" and chat:
        raise ValueError(f"chat must not be True for the tiny model, which has no chat template, got {chat}")


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as JSON's types."""

    def simple(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: simple(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [simple(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return simple(asdict(config))


def seed_of(*parts: int | str) -> int:
    """A seed for torch from any names and numbers, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())
