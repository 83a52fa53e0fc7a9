"""Arms x seeds side by side: means with intervals over seeds, and differences from a baseline paired by seed."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from paec_kernels.train.algorithms import ALGORITHMS
from paec_kernels.train.report.evaluate import mean_scores
from paec_kernels.train.report.runs import Run
from paec_kernels.train.report.statistics import (
    Estimate,
    paired_differences,
    reward_area,
    sign_flip_test,
    t_interval,
)

OF_TRAINING = ("training reward", "final entropy")
FINAL_SHARE = 0.1  # the last tenth of the steps gives the final entropy


class Row(NamedTuple):
    """A metric of an arm over its seeds, and its difference from the baseline over the seeds that both have."""

    arm: str
    metric: str
    seeds: int
    estimate: Estimate
    difference: Estimate | None
    p_value: float  # of the difference by itself, from `sign_flip_test`; NaN where the difference has no interval


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    arms: list[str]
    metrics: list[str]
    baseline: str
    rows: list[Row]  # arms x metrics
    differing: dict[str, list[Any]]  # fields of the configs, beside arm and seed, with more than one value
    scores: dict[str, dict[int, dict[str, float]]]  # by arm, seed and metric

    def row(self, arm: str, metric: str) -> Row:
        return next(row for row in self.rows if (row.arm, row.metric) == (arm, metric))

    def differences(self, arm: str) -> dict[int, dict[str, float]]:
        """Return the arm's scores less the baseline's, by seed and metric, for the seeds that both have."""
        base = self.scores.get(self.baseline, {})
        return {
            seed: {name: scores[name] - base[seed][name] for name in self.metrics}
            for seed, scores in sorted(self.scores[arm].items())
            if seed in base
        }


def compare(runs: Sequence[Run], *, baseline: str = "grpo", arm_fields: Sequence[str] = ("algo",)) -> Comparison:
    """Return each arm's macro-averages over its seeds with 95 % t intervals, and paired differences from ``baseline``.

    Fewer than `statistics.ENOUGH` seeds give no interval; without a run of the baseline there are no differences. Where
    one seed makes most of a difference its t interval misleads: the p-value of a sign-flip test stands beside it.

    Args:
        arm_fields: the fields that the runs were read with.
    Raises:
        ValueError: no runs; two of one arm and seed; or evaluations of other tasks, problems or settings.
    """
    _check_comparable(runs)
    by_arm: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in sort_arms(run.arm for run in runs)}
    for run in runs:
        by_arm[run.arm][run.seed] = run_scores(run)
    names = list(run_scores(runs[0]))
    rows = []
    for arm, seeds in by_arm.items():
        for name in names:
            values = {seed: scores[name] for seed, scores in seeds.items()}
            base = {seed: scores[name] for seed, scores in by_arm.get(baseline, {}).items()}
            estimate, difference, p_value = t_interval(list(values.values())), None, math.nan
            differences = paired_differences(values, base)
            if arm != baseline and len(differences):
                difference = t_interval(differences)
                p_value = math.nan if math.isnan(difference.low) else sign_flip_test(differences)
            rows.append(Row(arm, name, len(values), estimate, difference, p_value))
    return Comparison(list(by_arm), names, baseline, rows, _differing(runs, {"seed", *arm_fields}), by_arm)


def run_scores(run: Run) -> dict[str, float]:
    """Return a run's macro-averages and OF_TRAINING: "training reward", the mean over all its steps, which is the
    higher the sooner the policy learns; and "final entropy", the mean over the last tenth of them, in nats."""
    final = run.log["entropy"][-max(1, round(FINAL_SHARE * len(run.log["step"]))) :]
    of_training = (reward_area(run.log["reward"]), float(final.mean()))
    return mean_scores(run.evaluation)["macro"] | dict(zip(OF_TRAINING, of_training, strict=True))


def sort_arms(arms: Iterable[str]) -> list[str]:
    """Return the arms without repeats, in the order of ALGORITHMS; others after them by name."""
    order = list(ALGORITHMS)

    def place(arm: str) -> tuple[int, str]:
        name = arm.partition(",")[0]
        return (order.index(name) if name in order else len(order), arm)

    return sorted(set(arms), key=place)


def _check_comparable(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("runs must be at least one, got none")
    first: dict[tuple[str, int], Run] = {}
    by_seed: dict[int, Run] = {}
    for run in runs:
        same = first.setdefault((run.arm, run.seed), run)
        if same is not run:
            raise ValueError(
                f"arm {run.arm!r} must have one run with seed {run.seed}, got {same.folder} and {run.folder}; "
                "more fields of the config can tell arms apart"
            )
        _check_alike(runs[0], run, "tasks", *(list(r.evaluation.tasks) for r in (runs[0], run)))
        for name, value in asdict(run.evaluation.settings).items():
            if name != "seed":  # an evaluation may be seeded as its run is
                _check_alike(runs[0], run, name, getattr(runs[0].evaluation.settings, name), value)
        paired = by_seed.setdefault(run.seed, run)
        for task, results in run.evaluation.tasks.items():
            if [r.prompt for r in results] != [r.prompt for r in paired.evaluation.tasks[task]]:
                raise ValueError(
                    f"runs with one seed must be evaluated on the same problems: {task!r} has others in "
                    f"{paired.folder} than in {run.folder}"
                )


def _check_alike(first: Run, other: Run, name: str, value: Any, other_value: Any) -> None:
    if value != other_value:
        raise ValueError(
            f"runs must be evaluated alike: {name} is {value!r} in {first.folder}, {other_value!r} in {other.folder}"
        )


def _differing(runs: Sequence[Run], besides: set[str]) -> dict[str, list[Any]]:
    """Return the values, in order of appearance, of each field that differs.

    A method's own options belong to the arm, so they count only where they differ inside an arm. Folders and devices
    say nothing about what was trained.
    """
    flat = [dict(_flatten(run.config)) for run in runs]
    found = {}
    for name in dict.fromkeys(name for config in flat for name in config):
        if name in besides or name in ("out", "cache", "device"):
            continue
        values = {json.dumps(config.get(name)): config.get(name) for config in flat}
        of_arms = {(run.arm, json.dumps(config.get(name))) for run, config in zip(runs, flat, strict=True)}
        arms = {arm for arm, _ in of_arms}
        if len(of_arms) > len(arms) or (len(values) > 1 and not name.startswith("method.")):
            found[name] = list(values.values())
    return found


def _flatten(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
