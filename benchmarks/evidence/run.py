"""Run the plan, or what is missing of it, and keep a row for each run.

python -m benchmarks.evidence.run grid --families chain --jobs 2
python -m benchmarks.evidence.run main --families chain --jobs 2 --minutes 60
python -m benchmarks.evidence.run main --jobs 16 --seeds 64     # where there are many cores

The rows are ``bench_results/rlvr/long/FAMILY.jsonl.xz``: what was asked, the log's columns, and every answer.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.evidence import plan
from benchmarks.provenance import provenance
from paec_kernels.saved_state import whole_file
from paec_kernels.train import loop
from paec_kernels.train.config import TrainConfig
from paec_kernels.train.policies import starting_policy
from paec_kernels.train.presets import with_arm_and_seed
from paec_kernels.train.report.evaluate import Settings, evaluate
from paec_kernels.train.report.statistics import reward_area
from paec_kernels.train.tasks.task import ROLES

ROWS = Path("bench_results/rlvr/long")
RERUNS, FRESH = "reruns.json", "fresh.json"  # there: of runs made again, and of other seeds
DIGITS = 4  # of a logged number
# Columns of the log that are kept, where the run has them.
KEPT = (
    *("reward", "mostly_right", "mixed_groups", "response_length", "gradient_norm", "entropy", "clip_fraction"),
    *(f"{what}/{role}" for what in ("entropy", "mask") for role in ROLES),
    *("threshold", "mean_mask", "mask_on_certain", "selected_entropy", "floor"),
    *("term/mean_entropy", "term/floor_ratio", "term/penalty_active", "term/penalty_per_token", "term/coefficient"),
)

Row = dict[str, Any]
Call = tuple[str, str, str, int, TrainConfig]  # of `run_one`


def rows_in(path: Path) -> list[Row]:
    """Return the rows of a compressed file, a JSON object a line; none where there is no file."""
    if not path.exists():
        return []
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read(family: str, folder: Path = ROWS) -> list[Row]:
    """Return a family's rows, none where there is no file.

    Raises:
        ValueError: one run is there twice, or is of the family or of options as they were once.
    """
    path = folder / f"{family}.jsonl.xz"
    rows = rows_in(path)
    seen, options = set(), common(plan.config(family, Path()).identity())
    for row in rows:
        run = row["stage"], row["arm"], row["seed"]
        if run in seen:
            raise ValueError(f"{path} must hold a run once, got {run} twice")
        seen.add(run)
        if row["fingerprint"] != plan.fingerprint(family):
            raise ValueError(
                f"{path} must hold runs of {family!r} as it is now, fingerprint {plan.fingerprint(family)}, got {run} "
                f"of {row['fingerprint']}; take those out, and run them again"
            )
        if common(row["config"]) != options:
            raise ValueError(
                f"{path} must hold runs with the options {options}, got {run} with {common(row['config'])}"
            )
    return rows


def common(options: dict[str, Any]) -> dict[str, Any]:
    """Return of a run's options those that all arms and seeds of a family share."""
    start = {name: value for name, value in options["warm_start"].items() if name != "seed"}
    return {name: value for name, value in options.items() if name not in ("algo", "method", "seed")} | {
        "warm_start": start
    }


def add(rows: Iterable[Row], family: str, folder: Path = ROWS) -> None:
    """Add rows to a family's file, all of them or none. Each is compressed by itself, so that a row more takes no
    longer the more there are."""
    path = folder / f"{family}.jsonl.xz"
    known = path.read_bytes() if path.exists() else b""
    with whole_file(path) as partial:
        partial.write_bytes(known + b"".join(lzma.compress(f"{json.dumps(row)}\n".encode()) for row in rows))


def wanted(
    family: str, stage: str, rows: list[Row], arms: Iterable[str], seeds: Iterable[int] = plan.SEEDS
) -> list[tuple[str, int]]:
    """Return arm, as `paec compare` spells it, and seed of each run that the stage still lacks, seed by seed.

    Args:
        arms: those of the plan that are asked for.
        seeds: of the main runs.
    Raises:
        ValueError: a main run is asked for before the whole grid of its arm is there.
    """
    done = {(row["stage"], row["arm"], row["seed"]) for row in rows}
    chosen = best(rows)
    if stage == "grid":
        seeds, spelled = plan.GRID_SEEDS, [each for arm in arms for each in plan.ARMS[arm].candidates]
    elif missing := [arm for arm in arms if arm not in chosen]:
        raise ValueError(
            f"rows of {family!r} must hold the whole grid of an arm before its main runs; missing: {', '.join(missing)}"
        )
    else:
        spelled = [chosen[arm] for arm in arms]
    return [(arm, seed) for seed in seeds for arm in spelled if (stage, arm, seed) not in done]


def grid_areas(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return the mean area of each candidate over the grid's seeds, by arm, of the arms whose whole grid is there."""
    found = {
        (row["arm"], row["seed"]): reward_area(row["log"]["mostly_right"]) for row in rows if row["stage"] == "grid"
    }
    areas: dict[str, dict[str, float]] = {}
    for name, arm in plan.ARMS.items():
        runs = {candidate: [(candidate, seed) for seed in plan.GRID_SEEDS] for candidate in arm.candidates}
        if all(run in found for of_one in runs.values() for run in of_one):
            areas[name] = {candidate: mean(found[run] for run in of_one) for candidate, of_one in runs.items()}
    return areas


def best(rows: list[Row]) -> dict[str, str]:
    """Return each arm of `grid_areas` with the coefficient whose runs have the largest area; of equals the first."""
    return {name: max(areas, key=areas.__getitem__) for name, areas in grid_areas(rows).items()}


def make_start(config: TrainConfig) -> None:
    """Make a run's warm start, unless the cache has it."""
    torch.set_num_threads(1)
    starting_policy(config, torch.device("cpu"))


def run_one(family: str, stage: str, arm: str, seed: int, common: TrainConfig) -> Row:
    """Train and evaluate one arm and seed; nothing but the row is kept."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    run_config = with_arm_and_seed(common, arm, seed, plan.WARM_STARTS)
    tasks, eval_tasks = run_config.load_tasks()
    run = loop.new_run(run_config, starting_policy(run_config, torch.device("cpu")))
    steps = [loop.train_step(run, tasks, 0, 1) for _ in range(run_config.steps)]
    evaluation = evaluate(run.policy, eval_tasks, Settings.after(run_config))
    (results,) = evaluation.tasks.values()
    return {
        "family": family,
        "fingerprint": plan.fingerprint(family),
        "stage": stage,
        "arm": arm,
        "seed": seed,
        "warm_start": run_config.warm_start.seed,
        "config": run_config.identity(),
        "seconds": round(time.perf_counter() - start, 1),
        "log": kept(steps),
        "greedy": [result.greedy_correct for result in results],
        "answers": [result.answers for result in results],
        "correct": [[int(right) for right in result.correct] for result in results],
    }


def kept(steps: list[Row]) -> dict[str, list[float | None]]:
    """Return the columns of a log that a row keeps."""
    return {name: [rounded(step[name]) for step in steps] for name in KEPT if name in steps[0]}


def rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if value == value else None


def finished(calls: Iterable[Call], pool: Executor, jobs: int, until: float) -> Iterator[tuple[Call, Future]]:
    """Yield runs as they end, ``jobs`` of them under way at a time; none is started after ``until``.

    The warm starts come before a family's runs, or two that are under way at once would both make the same.
    """
    for _, of_family in groupby(calls, key=lambda call: call[0]):
        left = list(of_family)
        starts = {seed % plan.WARM_STARTS: (common, arm, seed) for _, _, arm, seed, common in left}
        if time.time() < until:  # what fails here fails again in a run, which tells it
            wait([pool.submit(make_start, with_arm_and_seed(*run, plan.WARM_STARTS)) for run in starts.values()])
        running: dict[Future, Call] = {}
        while running or (left and time.time() < until):
            while left and len(running) < jobs and time.time() < until:
                call = left.pop(0)
                running[pool.submit(run_one, *call)] = call
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=("grid", "main"))
    parser.add_argument("--families", nargs="+", choices=plan.FAMILIES, default=plan.FAMILIES)
    parser.add_argument("--arms", nargs="+", choices=tuple(plan.ARMS), default=tuple(plan.ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--seeds", type=int, default=len(plan.SEEDS), help="of the main runs, from 0 on")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after these")
    parser.add_argument("--out", type=Path, default=ROWS, help="folder of the rows")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "paec_kernels")
    asked = parser.parse_args(arguments)
    until = time.time() + 60 * asked.minutes
    # Which families, how many at a time and where the files lie makes no difference to a row.
    made = provenance() | {"command": f"python -m benchmarks.evidence.run {asked.stage}"}
    calls = [
        (family, asked.stage, arm, seed, plan.config(family, asked.cache))
        for family in dict.fromkeys(asked.families)
        for arm, seed in wanted(family, asked.stage, read(family, asked.out), asked.arms, range(asked.seeds))
    ]
    failed = 0
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        for (family, _, arm, seed, _), future in finished(calls, pool, asked.jobs, until):
            what = f"{family} {arm} seed {seed}"
            if error := future.exception():  # it loses this run alone
                print(f"{what} failed: {error!r}", file=sys.stderr, flush=True)
                failed += 1
                continue
            row = future.result()
            add([row | {"provenance": made}], family, asked.out)
            right = row["log"]["mostly_right"]
            tenth = max(1, len(right) // 10)
            print(
                f"{what}: {row['seconds']:.0f} s, mostly right {mean(right[:tenth]):.2f} -> {mean(right[-tenth:]):.2f}",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
