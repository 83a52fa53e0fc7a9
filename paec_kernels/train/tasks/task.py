"""A question with its verifier's answer, and where such questions come from."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

FORK, STEP, FREE = "fork", "step", "free"  # a choice of route; what follows from it; a choice that changes nothing
ROLES = (FORK, STEP, FREE)


class Problem(NamedTuple):
    """``prompt`` is what the model reads (plain text), ``answer`` what the verifier expects, ``task`` its family."""

    task: str
    prompt: str
    answer: str


class Task(Protocol):
    """A source of problems and their verifier. Training and evaluation problems never coincide."""

    @property
    def name(self) -> str: ...

    @property
    def roles(self) -> Sequence[str]:
        """The role of each place of an answer, of ROLES, up to the last that has one; none where they are unknown."""
        ...

    def train_problem(self, index: int) -> Problem:
        """Return the ``index``-th training problem, for any index >= 0 always the same one."""
        ...

    def eval_problems(self, count: int) -> list[Problem]:
        """Return the first ``count`` evaluation problems, or all if there are fewer."""
        ...

    def extract(self, text: str) -> str | None:
        """Return a response's final answer, None without one."""
        ...

    def reward(self, problem: Problem, text: str) -> float:
        """Return 1.0 if the response's final answer is right, else 0.0."""
        ...

    def same(self, one: str, other: str) -> bool | None:
        """Return whether the verifier holds two final answers equal; None if it cannot tell in time."""
        ...
