"""The tiny model's supervised start, from a seed and cached on disk."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from paec_kernels.checks import fields, integer, number, one_of
from paec_kernels.saved_state import load_saved, write_saved
from paec_kernels.train.models.tiny import N_HEADS, PAD_ID, TinyModel, encode
from paec_kernels.train.tasks.by_name import OF_LETTERS
from paec_kernels.train.tasks.families import END, FAMILIES, Family, Habits
from paec_kernels.train.tasks.long_families import LONG_FAMILIES, LongFamily


@dataclass(frozen=True)
class WarmStart:
    """Supervised steps on noisy worked solutions of training problems: first both routes, then the habit."""

    families: tuple[str, ...] = ()
    """Families whose solutions are learned. None: those of the tasks where these name a long one, else the short ones.
    """
    habits: Habits = field(default_factory=Habits)
    width: int = 96
    """Size of the model's hidden states, a multiple of its 4 heads."""
    layers: int = 3
    """Layers of the model."""
    skill_steps: int = 1000
    """Steps in which half of the solutions take the careful route, or of a long family some the routes that the problem
    needs and the others all alike, so that they are learned at all."""
    habit_steps: int = 200
    """Steps after them, in which as many are careful, or rare, as the habits say."""
    batch: int = 128
    """Solutions in a step."""
    learning_rate: float = 2e-3
    """AdamW's learning rate; it falls to a tenth by cosine over the skill steps and stays there."""
    seed: int = 0
    """Seed of the weights and of the solutions."""

    def __post_init__(self) -> None:
        fields(self)
        for name in ("width", "layers", "skill_steps", "batch"):
            integer(name, getattr(self, name), least=1)
        for name in ("habit_steps", "seed"):
            integer(name, getattr(self, name), least=0)
        for name in self.families:
            one_of("families", name, OF_LETTERS)
        if self.width % N_HEADS:
            raise ValueError(f"width must be a multiple of {N_HEADS}, got {self.width}")
        number("learning_rate", self.learning_rate, above=0)

    def for_tasks(self, tasks: Sequence[str]) -> "WarmStart":
        """Return the same with its families named, for a training on these tasks."""
        if self.families:
            return self
        long = any(name in LONG_FAMILIES for name in tasks)
        return replace(self, families=tuple(name for name in tasks if name in OF_LETTERS) if long else tuple(FAMILIES))


def draw_solutions(
    families: Sequence[Family | LongFamily], options: WarmStart, step: int
) -> tuple[list[str], list[str]]:
    """Return the prompts and the solutions of a step, drawn evenly from the families."""
    rng = random.Random(f"warm start {options.seed} {step}")
    prompts, solutions = [], []
    for row in range(options.batch):
        family = families[row % len(families)]
        problem = family.train_problem(rng.randrange(10**9))
        prompts.append(problem.prompt)
        solutions.append(family.solution(problem, options.habits, rng, skill=step < options.skill_steps) + END)
    return prompts, solutions


def first_solutions(families: Sequence[Family | LongFamily], options: WarmStart) -> list[tuple[list[str], list[str]]]:
    """Return those of the first step of each phase, by which a start, or a family, is told from one changed since."""
    return [draw_solutions(families, options, step) for step in (0, options.skill_steps)]


def batch_loss(
    model: TinyModel, families: Sequence[Family | LongFamily], options: WarmStart, step: int
) -> torch.Tensor:
    """Return the mean cross-entropy (nats) of the letters in the step's solutions."""
    prompts, solutions = draw_solutions(families, options, step)
    prompt_ids, prompt_mask = encode(prompts)
    answer_ids, answer_mask = (x.flip(1) for x in encode([text[::-1] for text in solutions]))  # padded on the right
    ids = torch.cat((prompt_ids, answer_ids), dim=1)
    mask = torch.cat((prompt_mask, answer_mask), dim=1)
    logits = model(ids, mask, prompt_ids.shape[1]) @ model.embedding.weight.T
    return F.cross_entropy(logits.transpose(1, 2), answer_ids, ignore_index=PAD_ID)


def warm_start(
    options: WarmStart, folder: Path, on_step: Callable[[int, float], None] = lambda step, loss: None
) -> TinyModel:
    """Return the model after the steps, from ``folder`` if it was made before.

    Args:
        on_step: called with each step's number from 0, and its loss in nats.
    Raises:
        ValueError: the file that should hold the start is damaged; the message names it.
    """
    options = options.for_tasks(())
    torch.manual_seed(options.seed)
    model = TinyModel(options.width, options.layers)
    families = [OF_LETTERS[name] for name in options.families]
    # What is learned belongs to the key: a family may be written otherwise some day.
    learned = first_solutions(families, options)
    key = hashlib.sha256(json.dumps([asdict(options), learned], sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"tiny-{key}.pt"
    if path.exists():
        remedy = "Move it away: it is made again."
        model.load_state_dict(load_saved(path, "the tiny model's start", remedy, list(model.state_dict())))
        return model
    folder.mkdir(parents=True, exist_ok=True)  # before the work, for which there must be a place
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    for step in range(options.skill_steps + options.habit_steps):
        cooled = (1 + math.cos(math.pi * min(1, step / options.skill_steps))) / 2
        optimizer.param_groups[0]["lr"] = options.learning_rate * min(1, (step + 1) / 100) * (0.1 + 0.9 * cooled)
        loss = batch_loss(model, families, options, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()  # after, so that no gradient goes along with the model
        on_step(step, loss.item())
    write_saved(path, model.state_dict())
    return model
