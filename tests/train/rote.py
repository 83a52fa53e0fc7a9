"""A policy and tasks without a model, for the tests of evaluation."""

from collections.abc import Sequence

import torch

from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.report.evaluate import Settings
from paec_kernels.train.tasks.task import Problem


class Rote:
    """Greedy says the problem's own number; the i-th of its samples the number + (i + seed) % 3, or nothing."""

    module = torch.nn.Linear(1, 1)
    head = torch.zeros(1, 1)

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, float]] = []
        self.seeds: dict[tuple[str, float], int] = {}
        self._texts: list[str] = []

    def sample(
        self, prompts: Sequence[str], answers: int, *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Rollout:
        assert not torch.is_grad_enabled()
        self.calls.append((len(prompts), answers, temperature))
        self._texts = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            self.seeds[prompt, temperature] = seed
            offsets = [0] if temperature == 0 else [(i + seed) % 3 for i in range(answers)]
            self._texts += ["hm" if offset == 2 else str(int(prompt) + offset) for offset in offsets]
        length = torch.tensor([min(len(text), max_new_tokens) for text in self._texts])
        valid = torch.arange(max_new_tokens) < length[:, None]
        sequences = torch.zeros(len(length), 1 + max_new_tokens, dtype=torch.int64)
        return Rollout(sequences, torch.ones_like(sequences), 1, valid)

    def texts(self, rollout: Rollout) -> list[str]:
        return self._texts


class Counting:
    """Problems "start", "start + 1", ...: the answer is the prompt."""

    roles = ()

    def __init__(self, name: str, start: int, size: int) -> None:
        self.name, self._start, self._size = name, start, size

    def train_problem(self, index: int) -> Problem:
        raise NotImplementedError

    def eval_problems(self, count: int) -> list[Problem]:
        return [Problem(self.name, str(self._start + i), str(self._start + i)) for i in range(min(count, self._size))]

    def extract(self, text: str) -> str | None:
        return text if text.isdigit() else None

    def reward(self, problem: Problem, text: str) -> float:
        return float(self.extract(text) == problem.answer)

    def same(self, one: str, other: str) -> bool:
        return one == other


SETTINGS = Settings(problems=3, samples=6, seed=5, max_new_tokens=4, temperature=0.7)
