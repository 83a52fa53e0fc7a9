"""Tasks of the library reasoning-gym: its generators make the problems, its scorers judge the answers."""

import re
from functools import cached_property, lru_cache
from typing import Any

from paec_kernels import checks
from paec_kernels.extras import extra
from paec_kernels.train.tasks.grader import LENGTH, TEXT, GaveUp, Grader
from paec_kernels.train.tasks.task import Problem

with extra("train"):
    import reasoning_gym  # type: ignore[import-untyped]
    from reasoning_gym.factory import DATASETS  # type: ignore[import-untyped]
    from reasoning_gym.utils import extract_answer  # type: ignore[import-untyped]

INSTRUCTION = "Provide your final answer between <answer> and </answer> tags."
EVAL_POOL = 128  # problems kept for evaluation; generated with seeds from 0 on
CHUNK = 1024  # problems that one dataset object generates: those of its seed, seed + 1, ...
TRAIN_SEEDS = range(2**20, 2**32 - CHUNK)  # all seeds that every generator takes, but for those of evaluation
ATTEMPTS = 64  # problems tried in place of one that is kept for evaluation

GRADER = Grader("gym")

NUMBER = re.compile(r"(?:(?<![\w)])[-+])?\d+(?:,\d{3})*(?:\.\d+)?(?!\d)")  # in "20-15" the minus is no sign


class GymProblem(Problem):
    """A problem with its generator's entry, from which the scorer reads."""

    entry: dict[str, Any]


class GymTask:
    """`Task` on a dataset of reasoning-gym, with the generator's default difficulty unless ``config`` says otherwise.

    The answer is what stands in the response's last <answer> tags. Where all answers of a dataset are numbers, a
    response without tags answers with its last number, which models too small to keep to a format depend on.

    Args:
        dataset: its name, such as ``basic_arithmetic``.
        config: fields of the dataset's own configuration; they are part of the task's name.
    Raises:
        ValueError: the library has no such dataset, or refuses the configuration.
    """

    roles: tuple[str, ...] = ()

    def __init__(self, dataset: str, **config: Any) -> None:
        checks.one_of("dataset", dataset, sorted(DATASETS))
        self.name = ",".join([f"gym:{dataset}", *(f"{field}={value}" for field, value in config.items())])
        self._dataset, self._config = dataset, config
        self._chunk = lru_cache(maxsize=4)(
            lambda seed: reasoning_gym.create_dataset(dataset, seed=seed, size=CHUNK, **config)
        )
        try:
            self._chunk(0)
        except (AssertionError, TypeError) as error:
            raise ValueError(
                f"config must be one that reasoning-gym's {dataset} takes, got {config}: {error}"
            ) from error

    def train_problem(self, index: int) -> Problem:
        """Return a problem made from a seed of its own.

        Raises:
            ValueError: nearly all problems that the dataset makes are kept for evaluation.
        """
        checks.integer("index", index, least=0)
        for attempt in range(ATTEMPTS):
            # The first attempt takes the index's own seed; others come from far away.
            place = (index + attempt * 1_000_000_007) % len(TRAIN_SEEDS)
            problem = self._problem(TRAIN_SEEDS[place - place % CHUNK], place % CHUNK)
            if problem.prompt not in self._eval_pool:
                return problem
        raise ValueError(f"{self.name} makes too few different problems to keep {EVAL_POOL} of them for evaluation")

    def eval_problems(self, count: int) -> list[Problem]:
        return list(self._eval_pool.values())[:count]

    def extract(self, text: str) -> str | None:
        text = text[-TEXT:]
        # The last pair of tags, which the library's own pattern would take quadratic time to find
        end = text.rfind("</answer>")
        start = -1 if end < 0 else text.rfind("<answer>", 0, end)
        answer = None if start < 0 else extract_answer(text[start : end + len("</answer>")])
        if not self._has_numbers:
            return answer or None  # unchanged: in a grid, lines and spaces count
        numbers = NUMBER.findall(text if answer is None else answer)
        return _plain_number(numbers[-1]) if numbers else answer

    def reward(self, problem: Problem, text: str) -> float:
        """Return 1.0 if the library gives the extracted answer its full score, else 0.0.

        An answer that its scorer cannot grade, in `grader.SECONDS` or for its length of more than `grader.LENGTH`, is
        wrong, and counted in ``GRADER.given_up``.
        """
        assert isinstance(problem, GymProblem)  # made here
        answer = self.extract(text)
        try:
            if answer is not None and len(answer) > LENGTH:
                raise GaveUp(f"longer than {LENGTH:,} characters")
            return float(GRADER("is_right", self._dataset, self._config, problem.entry, answer))
        except GaveUp as why:
            GRADER.give_up(answer, why)
            return 0.0

    def same(self, one: str, other: str) -> bool:
        return one == other

    @cached_property
    def _eval_pool(self) -> dict[str, Problem]:
        problems = [self._problem(0, index) for index in range(EVAL_POOL)]
        return {problem.prompt: problem for problem in problems}

    @cached_property
    def _has_numbers(self) -> bool:
        return all(NUMBER.fullmatch(problem.answer) for problem in self._eval_pool.values())

    def _problem(self, seed: int, index: int) -> GymProblem:
        entry = self._chunk(seed)[index]
        problem = GymProblem(self.name, f"{entry['question']}\n\n{INSTRUCTION}", str(entry["answer"]))
        problem.entry = entry
        return problem


def _plain_number(text: str) -> str:
    """Return the number without a plus, without commas, and without decimals that are all 0."""
    plain = text.replace(",", "").removeprefix("+")
    return plain.split(".")[0] if re.fullmatch(r"-?\d+\.0+", plain) else plain
