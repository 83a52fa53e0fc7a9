"""What a family's runs came to: scores, mechanism and curves, each from a row alone, by arm of the plan and seed."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.evidence import plan
from benchmarks.evidence.run import Row, best, grid_areas
from paec_kernels.train.report.evaluate import pass_ks
from paec_kernels.train.report.metrics import majority_vote, mean_at_k, pass_at_k
from paec_kernels.train.report.statistics import batches_to_discovery, reward_area
from paec_kernels.train.tasks.long_families import LONG_FAMILIES
from paec_kernels.train.tasks.task import ROLES

BY_ROLE = tuple(f"{what}/{role}" for what in ("entropy", "mask") for role in ROLES)
OF_MASK = ("threshold", "mask_on_certain")
OF_PENALTY = ("term/penalty_active", "term/penalty_per_token", "term/floor_ratio")
TIMES = ("start", "middle", "end")
NEEDED = ("reward", "mostly_right", *BY_ROLE, *OF_MASK)  # in every log; the penalty's are in those that have one


class Run(NamedTuple):
    """What is told of a run."""

    scores: dict[str, float]
    mechanism: dict[str, float]
    curves: dict[str, np.ndarray]  # the entropy of each role in nats, [batches]


@dataclass(frozen=True)
class Family:
    """The runs that count: of each arm the same seeds."""

    name: str
    batches: int
    problems: int
    samples: int
    seeds: list[int]
    runs: dict[str, dict[int, Run]]  # by arm, in the plan's order, and seed
    areas: dict[str, dict[str, float]]  # of the grid, by arm and candidate
    chosen: dict[str, str]
    few: dict[str, int]  # arms whose runs are missing or too few, and how many runs there are
    made: list[dict[str, Any]]  # each row's provenance and seconds, of the grid too

    @property
    def scores(self) -> dict[str, dict[int, dict[str, float]]]:
        return {arm: {seed: run.scores for seed, run in runs.items()} for arm, runs in self.runs.items()}


def gather(name: str, rows: list[Row]) -> Family | str:
    """Return the family's runs, or what is missing before anything can be said of it.

    The seeds are those that the planned comparisons' arms have in common, where an arm with fewer than two runs of a
    warm start counts as not run. Any other arm counts if it has all of these.

    Raises:
        ValueError: a row without a column, of another length than the others, or of no arm of the plan.
    """
    areas, chosen = grid_areas(rows), best(rows)
    if plan.BASELINE not in chosen:
        return f"{sum(row['stage'] == 'grid' for row in rows)} runs of the grid" if rows else "nothing"
    by_arm: dict[str, dict[int, Row]] = {arm: {} for arm in plan.ARMS}
    names = {spelled: arm for arm, spelled in chosen.items()}
    of_main = [row for row in rows if row["stage"] == "main"]
    for row in of_main:
        if row["arm"] not in names:
            raise ValueError(f"{_who(row)} must be of an arm that the grid chose, among {', '.join(names)}")
        _check(row, of_main[0])
        by_arm[names[row["arm"]]][row["seed"]] = row

    enough = [arm for arm in plan.ARMS if arm in plan.PLANNED_ARMS and fill_warm_starts(by_arm[arm])]
    if not any(set(pair) <= set(enough) for pair in plan.PLANNED) or plan.BASELINE not in enough:
        return f"{len(of_main)} of the main runs"
    seeds = sorted(set.intersection(*(set(by_arm[arm]) for arm in enough)))
    counted = [arm for arm, found in by_arm.items() if set(seeds) <= set(found)]
    if not fill_warm_starts(seeds):
        return f"{len(of_main)} of the main runs, few of them with seeds in common"
    first = of_main[0]
    return Family(
        name=name,
        batches=len(first["log"]["mostly_right"]),
        problems=len(first["correct"]),
        samples=len(first["correct"][0]),
        seeds=seeds,
        runs={arm: {seed: _run(by_arm[arm][seed]) for seed in seeds} for arm in counted},
        areas=areas,
        chosen=chosen,
        few={arm: len(found) for arm, found in by_arm.items() if arm not in counted},
        made=[row["provenance"] | {"seconds": row["seconds"]} for row in rows],
    )


def scores(row: Row) -> dict[str, float]:
    """Return a run's outcomes: shares, but for ``discovery``, which is in batches.

    ``area`` and ``reward`` are means over all batches, of prompts mostly right and of the reward. ``discovery`` is the
    batch at which the plan's share of prompts is first mostly right, and ``found`` tells whether that came. Then those
    of the evaluation; maj@k is the mean over a problem's samples taken k at a time.
    """
    right = row["log"]["mostly_right"]
    correct, answers = np.array(row["correct"], dtype=bool), row["answers"]
    discovery = batches_to_discovery(right, plan.DISCOVERED, plan.WINDOW)
    samples = correct.shape[1]
    found = {
        "area": reward_area(right),
        "reward": reward_area(row["log"]["reward"]),
        "discovery": float(discovery),
        "found": float(discovery <= len(right)),
        "greedy": float(np.mean(row["greedy"])),
        f"mean@{samples}": float(mean_at_k(correct).mean()),
    }
    for k in pass_ks(samples):
        # Of the first k alone it would be noise that all arms share, as a seed's draws are alike for all.
        starts = range(0, samples - k + 1, k)
        taken = [of_problem[start : start + k] for of_problem in answers for start in starts]
        votes = majority_vote(correct[:, : k * len(starts)].reshape(-1, k), taken)
        found |= {f"maj@{k}": float(votes.mean()), f"pass@{k}": float(pass_at_k(correct, k).mean())}
    return found


def mechanism(row: Row) -> dict[str, float]:
    """Return what a run did with entropy and mask; NaN where it has no such thing.

    Each number of the first batch, as ``start entropy/fork``, of the batches of `middle`, as ``middle entropy/fork``,
    and of the last tenth, as ``end entropy/fork``.
    """
    log = row["log"]
    batches = len(log["mostly_right"])
    spans = dict(zip(TIMES, (slice(1), middle(batches), slice(-max(1, batches // 10), None)), strict=True))
    return {
        f"{when} {name}": known_mean(_numbers(log[name])[span]) if name in log else np.nan
        for name in (*BY_ROLE, *OF_MASK, *OF_PENALTY)
        for when, span in spans.items()
    }


def middle(batches: int) -> slice:
    """Return the third and fourth tenth of the batches: most runs have discovered nothing yet, so that what a method
    does to hold forks open still counts."""
    tenth = max(1, batches // 10)
    return slice(2 * tenth, 4 * tenth)


def has(family: Family, role: str) -> bool:
    return role in LONG_FAMILIES[family.name].roles


def told(family: Family, arm: str, name: str) -> float:
    """Return the mean of a number of the mechanism over an arm's seeds."""
    return mean(run.mechanism[name] for run in family.runs[arm].values())


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _run(row: Row) -> Run:
    return Run(scores(row), mechanism(row), {role: _numbers(row["log"][f"entropy/{role}"]) for role in ROLES})


def _check(row: Row, first: Row) -> None:
    missing = [name for name in NEEDED if name not in row["log"]]
    if missing:
        raise ValueError(f"{_who(row)} must log {', '.join(NEEDED)}; missing: {', '.join(missing)}")
    batches = len(first["log"]["mostly_right"])
    for name, values in row["log"].items():
        if len(values) != batches:
            raise ValueError(f"{_who(row)} must have {batches} batches as {_who(first)}, got {len(values)} of {name!r}")
    for name in ("greedy", "answers", "correct"):
        if len(row[name]) != len(first[name]):
            raise ValueError(
                f"{_who(row)} must have {len(first[name])} problems as {_who(first)}, got {len(row[name])}"
            )
    sizes = {len(of_problem) for name in ("answers", "correct") for of_problem in row[name]}
    if sizes != {len(first["correct"][0])}:
        raise ValueError(f"{_who(row)} must have {len(first['correct'][0])} samples a problem, got {sorted(sizes)}")


def _who(row: Row) -> str:
    return f"the row of {row['family']!r}, {row['arm']!r}, seed {row['seed']}"


def fill_warm_starts(seeds: Iterable[int]) -> bool:
    """Tell whether there are two seeds or more of each warm start, as the bootstrap needs."""
    of_start = Counter(seed % plan.WARM_STARTS for seed in seeds)
    return all(of_start[start] > 1 for start in range(plan.WARM_STARTS))


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array(values, dtype=float)  # None becomes NaN


def known_mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
