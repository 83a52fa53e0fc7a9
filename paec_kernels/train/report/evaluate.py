"""Greedy and sampled answers of a policy to evaluation problems, kept raw, and the scores that they give."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.table import Table

from paec_kernels.saved_state import whole_file
from paec_kernels.train.config import seed_of
from paec_kernels.train.models.policy import Policy
from paec_kernels.train.ranges import above_zero, at_least
from paec_kernels.train.report import metrics
from paec_kernels.train.report.metrics import Estimate
from paec_kernels.train.tasks.task import Problem, Task

Summary = dict[str, Estimate]  # by metric; see `summarise`


@dataclass(frozen=True)
class ProblemResult:
    """A problem's responses: their canonical final answers (None without one), verdicts, and lengths in tokens."""

    prompt: str
    answer: str  # what the verifier expects
    greedy_answer: str | None
    greedy_correct: bool
    greedy_length: int
    answers: list[str | None]  # of the k samples, as the next two
    correct: list[bool]
    lengths: list[int]


@dataclass(frozen=True)
class Settings:
    """What an evaluation was asked for; two are comparable where these agree."""

    problems: int  # of each task, at most
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Evaluation:
    settings: Settings
    tasks: dict[str, list[ProblemResult]]

    def save(self, path: Path) -> None:
        """JSON with the summary beside the raw results; whole or not at all."""
        document = asdict(self) | {"summary": summarise(self)}
        with whole_file(path) as partial:
            partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """What `save` wrote; the summary is computed anew when asked for.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            document = json.loads(path.read_text())
            tasks = {name: [ProblemResult(**row) for row in rows] for name, rows in document["tasks"].items()}
            return cls(Settings(**document["settings"]), tasks)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
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
    *,
    problems: int,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """One greedy and ``samples`` sampled responses to each evaluation problem.

    Each problem is sampled with a seed of its own, made from ``seed``, its task's name and its place, so that a
    problem's answers do not depend on which other tasks or problems are evaluated.

    With more than one rank each takes its share of the batches, which are those of a single process, and all ranks
    return all results. Every rank must call it, with the same arguments and weights.

    Args:
        problems: of each task; all where it has fewer.
        batch_size: responses sampled at once; at least a problem's ``samples`` are.
        on_progress: called with this rank's responses done and their total.
    Raises:
        ValueError: a number below 1, a temperature that is not positive, no task, or one name twice.
    """
    settings = Settings(problems, samples, max_new_tokens, temperature, seed)
    _check(settings, tasks, batch_size)
    batches = [batch for task in tasks for batch in _batches(task, settings, max(1, batch_size // samples))]
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ours = batches[rank::world]
    done, total = 0, (1 + samples) * sum(len(batch.problems) for batch in ours)
    found = []
    for batch in ours:
        found.append(_results(policy, batch, settings))
        done += (1 + samples) * len(batch.problems)
        on_progress(done, total)
    results: dict[str, list[ProblemResult]] = {task.name: [] for task in tasks}
    for batch, of_batch in zip(batches, _of_all_ranks(found, len(batches)), strict=True):
        results[batch.task.name] += of_batch
    return Evaluation(settings, results)


def summarise(evaluation: Evaluation, *, confidence: float = 0.95) -> dict[str, Summary]:
    """Each task's means over its problems, and under "macro" the means over the tasks, with bootstrap intervals.

    The metrics: "greedy", "mean@k", "maj@k", "pass@1" to "pass@k" in powers of two (k samples each), "distinct"
    (answers of a problem's samples) and "length" (tokens of a sampled response).
    """
    names = metric_names(evaluation.settings.samples)
    values = {task: _values(results) for task, results in evaluation.tasks.items()}
    summary = {
        task: dict(zip(names, metrics.bootstrap([rows], confidence=confidence), strict=True))
        for task, rows in values.items()
    }
    macro = metrics.bootstrap(list(values.values()), confidence=confidence)
    return summary | {"macro": dict(zip(names, macro, strict=True))}


def metric_names(samples: int) -> list[str]:
    """The metrics of an evaluation with so many samples of a problem, in the order of its tables."""
    passes = [f"pass@{k}" for k in pass_ks(samples)]
    return ["greedy", f"mean@{samples}", f"maj@{samples}", *passes, "distinct", "length"]


def pass_ks(samples: int) -> list[int]:
    """1, 2, 4 ... and the number of samples itself."""
    return sorted({2**i for i in range(samples.bit_length())} | {samples})


def format_number(metric: str, value: float) -> str:
    """A score in per cent, "distinct" and "length" as they are; a dash for NaN."""
    if np.isnan(value):
        return "-"
    if metric == "length":
        return f"{value:.0f}"
    return f"{value:.2f}" if metric == "distinct" else f"{100 * value:.1f}"


def format_table(evaluation: Evaluation) -> Table:
    """Tasks by metrics with 95 % intervals below the means, the macro-average last."""
    samples = evaluation.settings.samples
    shown = list(
        dict.fromkeys(["greedy", f"mean@{samples}", f"maj@{samples}", f"pass@{samples}", "distinct", "length"])
    )
    table = Table(
        title=f"{samples} samples a problem at temperature {evaluation.settings.temperature:g}; "
        "scores in per cent, 95 % intervals over problems",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("task", no_wrap=True)
    for name in ("problems", *shown):
        table.add_column(name, justify="right")
    for task, summary in summarise(evaluation).items():
        is_macro = task == "macro"
        cells = [
            f"{format_number(metric, e.mean)}\n[dim]{format_number(metric, e.low)}-{format_number(metric, e.high)}[/]"
            for metric, e in ((metric, summary[metric]) for metric in shown)
        ]
        count = sum(map(len, evaluation.tasks.values())) if is_macro else len(evaluation.tasks[task])
        if is_macro:
            table.add_section()
        table.add_row("macro-average" if is_macro else task, f"{count}", *cells, style="bold" if is_macro else None)
    return table


def _values(results: Sequence[ProblemResult]) -> np.ndarray:
    """[problems, metrics], the columns of `metric_names`."""
    correct = np.array([result.correct for result in results])
    answers = [result.answers for result in results]
    columns = [
        np.array([float(result.greedy_correct) for result in results]),
        metrics.mean_at_k(correct),
        metrics.majority_vote(correct, answers),
        *(metrics.pass_at_k(correct, k) for k in pass_ks(correct.shape[1])),
        metrics.distinct_answers(answers),
        np.array([np.mean(result.lengths) for result in results]),
    ]
    return np.stack(columns, axis=1)


def _batches(task: Task, settings: Settings, size: int) -> Iterator[_Batch]:
    problems = task.eval_problems(settings.problems)
    for start in range(0, len(problems), size):
        places = range(start, min(start + size, len(problems)))
        seeds = [seed_of(settings.seed, "evaluate", task.name, place) for place in places]
        yield _Batch(task, [problems[place] for place in places], seeds)


def _results(policy: Policy, batch: _Batch, settings: Settings) -> list[ProblemResult]:
    greedy = _respond(policy, batch, 1, settings.max_new_tokens, 0.0)
    sampled = _respond(policy, batch, settings.samples, settings.max_new_tokens, settings.temperature)
    results = []
    for problem, (greedy_texts, greedy_lengths), (texts, lengths) in zip(batch.problems, greedy, sampled, strict=True):
        judged = {text: _judge(batch.task, problem, text) for text in {*greedy_texts, *texts}}
        answers, correct = zip(*(judged[text] for text in texts), strict=True)
        results.append(
            ProblemResult(
                problem.prompt,
                problem.answer,
                *judged[greedy_texts[0]],
                greedy_lengths[0],
                list(answers),
                list(correct),
                lengths,
            )
        )
    return results


def _of_all_ranks(found: list[Any], count: int) -> list[Any]:
    """``count`` items in order, of which each rank found every world-th from its own rank on."""
    if not dist.is_initialized():
        return found
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, found)
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def _respond(
    policy: Policy, batch: _Batch, answers: int, max_new_tokens: int, temperature: float
) -> Iterator[tuple[list[str], list[int]]]:
    """For each problem its responses, and their lengths in tokens."""
    rollout = policy.sample(
        [problem.prompt for problem in batch.problems],
        answers,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seeds=batch.seeds,
    )
    texts, lengths = policy.texts(rollout), rollout.valid.sum(dim=1).tolist()
    for start in range(0, len(texts), answers):
        yield texts[start : start + answers], lengths[start : start + answers]


def _judge(task: Task, problem: Problem, text: str) -> tuple[str | None, bool]:
    return task.extract(text), task.reward(problem, text) == 1.0


def _check(settings: Settings, tasks: Sequence[Task], batch_size: int) -> None:
    at_least(settings, 1, "problems", "samples", "max_new_tokens")
    at_least(settings, 0, "seed")
    above_zero(settings, "temperature")  # the greedy responses come by themselves
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names) or "macro" in names:
        raise ValueError(f"tasks must be at least one, with names that differ and are not 'macro', got {names}")
