"""Greedy and sampled answers of a policy to evaluation problems, kept raw, and the scores that they give."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from paec_kernels.checks import integer, number
from paec_kernels.losses.ranks import rank_and_world
from paec_kernels.saved_state import write_json
from paec_kernels.train.config import EvalOptions, TrainConfig, seed_of
from paec_kernels.train.models.policy import Policy
from paec_kernels.train.report import metrics
from paec_kernels.train.report.statistics import Estimate, bootstrap
from paec_kernels.train.tasks.task import Problem, Task

Summary = dict[str, Estimate]  # by metric; see `summarise`


@dataclass(frozen=True)
class ProblemResult:
    """A problem's responses: their final answers, verdicts, and lengths in tokens.

    Answers that the verifier holds equal are the same string, which one of them is; None is a response without one.
    """

    prompt: str
    answer: str  # what the verifier expects
    greedy_answer: str | None
    greedy_correct: bool
    greedy_length: int
    answers: list[str | None]  # of the k samples, as the next two
    correct: list[bool]
    lengths: list[int]


@dataclass(frozen=True, kw_only=True)
class Settings(EvalOptions):
    """What an evaluation was asked for; two are comparable where these agree."""

    max_new_tokens: int
    temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        integer("max_new_tokens", self.max_new_tokens, least=1)
        number("temperature", self.temperature, above=0)  # the greedy responses come by themselves

    @classmethod
    def after(cls, config: TrainConfig) -> "Settings":
        """Return what a training asks for at its end."""
        return cls(**asdict(config.evaluate), max_new_tokens=config.max_new_tokens, temperature=config.temperature)


@dataclass(frozen=True)
class Evaluation:
    """The results of each task's problems, by the task's name."""

    settings: Settings
    tasks: dict[str, list[ProblemResult]]

    def save(self, path: Path) -> None:
        """Write JSON with the summary beside the raw results; whole or not at all."""
        write_json(path, asdict(self) | {"summary": summarise(self)})

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what `save` wrote; the summary is computed anew when asked for.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            document = json.loads(path.read_text())
            tasks = {name: [ProblemResult(**row) for row in rows] for name, rows in document["tasks"].items()}
            return cls(Settings(**document["settings"]), tasks)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"path must be a file that Evaluation.save wrote, got {path}: {error}") from error


class _Batch(NamedTuple):
    """Problems of one task that are answered together."""

    task: Task
    problems: list[Problem]
    seeds: list[int]  # one for each


@torch.no_grad()
def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    settings: Settings,
    *,
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Sample one greedy and ``settings.samples`` other responses to each evaluation problem.

    Each problem is sampled with a seed of its own, made from the settings' seed, its task's name and its place, so that
    a problem's answers do not depend on which other tasks or problems are evaluated.

    With more than one rank each takes its share of the batches, which are those of a single process, and all ranks
    return all results. Every rank must call it, with the same arguments and weights.

    Args:
        batch_size: responses sampled at once; at least a problem's samples are.
        on_progress: called with this rank's responses done and their total.
    Raises:
        ValueError: a batch size below 1, or as `check_names`.
    """
    integer("batch_size", batch_size, least=1)
    check_names(tasks)
    batches = [batch for task in tasks for batch in _batches(task, settings, max(1, batch_size // settings.samples))]
    rank, world = rank_and_world()
    ours = batches[rank::world]
    done, total = 0, (1 + settings.samples) * sum(len(batch.problems) for batch in ours)
    found = []
    for batch in ours:
        found.append(_results(policy, batch, settings))
        done += (1 + settings.samples) * len(batch.problems)
        on_progress(done, total)
    results: dict[str, list[ProblemResult]] = {task.name: [] for task in tasks}
    for batch, of_batch in zip(batches, _of_all_ranks(found, len(batches)), strict=True):
        results[batch.task.name] += of_batch
    return Evaluation(settings, results)


def check_names(tasks: Iterable[Task]) -> None:
    """Refuse tasks whose results could not be told apart by their names.

    Neither case nor the order of the options after a name makes a difference: such are the same file on some systems,
    or the same problems.

    Raises:
        ValueError: no task, one name twice, or "macro", under which a summary has the averages.
    """
    names = [task.name for task in tasks]
    same = {",".join([first, *sorted(options)]) for first, *options in (name.casefold().split(",") for name in names)}
    if not names or len(same) < len(names) or "macro" in same:
        raise ValueError(
            f"tasks must be at least one, with names that differ and are not 'macro', got {names}; "
            "the name of a .jsonl file is its own, without its folder"
        )


def summarise(evaluation: Evaluation) -> dict[str, Summary]:
    """Return each task's means over its problems, and under "macro" those over the tasks, with bootstrap intervals.

    The metrics: "greedy", "mean@k", "maj@k", "pass@1" to "pass@k" in powers of two (k samples each), "distinct"
    (answers of a problem's samples) and "length" (tokens of a sampled response).
    """
    return _by_task(evaluation, bootstrap)


def mean_scores(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return the means of `summarise` alone, which take no resampling."""
    return _by_task(evaluation, lambda tasks: np.mean([values.mean(axis=0) for values in tasks], axis=0).tolist())


def pass_ks(samples: int) -> list[int]:
    """Return 1, 2, 4 ... and the number of samples itself."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def _by_task(evaluation: Evaluation, reduce: Callable[[list[np.ndarray]], list[Any]]) -> dict[str, dict[str, Any]]:
    """Reduce each task's values [problems, metrics], and under "macro" those of all tasks, to an item a metric."""
    scores = {task: _scores(results) for task, results in evaluation.tasks.items()}
    values = {task: np.stack(list(of_task.values()), axis=1) for task, of_task in scores.items()}
    groups = {task: [of_task] for task, of_task in values.items()} | {"macro": list(values.values())}
    names = next(iter(scores.values()))
    return {group: dict(zip(names, reduce(tasks), strict=True)) for group, tasks in groups.items()}


def _scores(results: Sequence[ProblemResult]) -> dict[str, np.ndarray]:
    """Return the metrics of a task's problems, float64 [problems] each."""
    correct = np.array([result.correct for result in results])
    answers = [result.answers for result in results]
    k = correct.shape[1]
    return {
        "greedy": np.array([float(result.greedy_correct) for result in results]),
        f"mean@{k}": metrics.mean_at_k(correct),
        f"maj@{k}": metrics.majority_vote(correct, answers),
        **{f"pass@{n}": metrics.pass_at_k(correct, n) for n in pass_ks(k)},
        "distinct": metrics.distinct_answers(answers),
        "length": np.array([np.mean(result.lengths) for result in results]),
    }


def _batches(task: Task, settings: Settings, size: int) -> Iterator[_Batch]:
    problems = task.eval_problems(settings.problems)
    seeds = [seed_of(settings.seed, "evaluate", task.name, place) for place in range(len(problems))]
    for start in range(0, len(problems), size):
        yield _Batch(task, problems[start : start + size], seeds[start : start + size])


def _results(policy: Policy, batch: _Batch, settings: Settings) -> list[ProblemResult]:
    greedy = _respond(policy, batch, 1, settings.max_new_tokens, 0.0)
    sampled = _respond(policy, batch, settings.samples, settings.max_new_tokens, settings.temperature)
    task, results = batch.task, []
    for problem, (greedy_texts, greedy_lengths), (texts, lengths) in zip(batch.problems, greedy, sampled, strict=True):
        said = [*greedy_texts, *texts]
        judged = {text: (task.extract(text), task.reward(problem, text) == 1.0) for text in dict.fromkeys(said)}
        greedy_answer, *answers = metrics.vote_classes([judged[text][0] for text in said], task.same)
        greedy_correct, *correct = [judged[text][1] for text in said]
        result = ProblemResult(
            problem.prompt, problem.answer, greedy_answer, greedy_correct, greedy_lengths[0], answers, correct, lengths
        )
        results.append(result)
    return results


def _respond(
    policy: Policy, batch: _Batch, answers: int, max_new_tokens: int, temperature: float
) -> Iterator[tuple[list[str], list[int]]]:
    """Yield for each problem its responses, and their lengths in tokens."""
    prompts = [problem.prompt for problem in batch.problems]
    rollout = policy.sample(prompts, answers, max_new_tokens=max_new_tokens, temperature=temperature, seeds=batch.seeds)
    texts, lengths = policy.texts(rollout), rollout.valid.sum(dim=1).tolist()
    for start in range(0, len(texts), answers):
        yield texts[start : start + answers], lengths[start : start + answers]


def _of_all_ranks(found: list[Any], count: int) -> list[Any]:
    """Return ``count`` items in order, of which each rank found every world-th from its own rank on."""
    if not dist.is_initialized():
        return found
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]
