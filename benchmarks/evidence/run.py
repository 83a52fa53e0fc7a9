"""Run the plan, or what is missing of it, and keep a row for each run.

python -m benchmarks.evidence.run grid --families chain --jobs 2
python -m benchmarks.evidence.run main --families chain --jobs 2 --minutes 60

The rows are ``bench_results/rlvr/long/FAMILY.jsonl.xz``: what was asked, the log's columns, and every answer.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence.plan import ARMS, FAMILIES, GRID_SEEDS, SEEDS, WARM_STARTS, config
from benchmarks.provenance import provenance
from paec_kernels.saved_state import whole_file
from paec_kernels.train import loop
from paec_kernels.train.config import TrainConfig, plain
from paec_kernels.train.policies import starting_policy
from paec_kernels.train.presets import with_arm
from paec_kernels.train.report.evaluate import Settings, evaluate

ROWS = Path("bench_results/rlvr/long")
DIGITS = 5  # of a logged number
LEFT_OUT = ("step", "seconds", "sample_seconds")

Row = dict[str, Any]


def read(family: str, folder: Path = ROWS) -> list[Row]:
    """Return a family's rows, none where there is no file."""
    path = folder / f"{family}.jsonl.xz"
    if not path.exists():
        return []
    with lzma.open(path, "rt") as lines:
        return [json.loads(line) for line in lines]


def write(rows: list[Row], family: str, folder: Path = ROWS) -> None:
    """Write a family's rows in the order of stage, arm and seed, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row["stage"], row["arm"], row["seed"]))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with whole_file(folder / f"{family}.jsonl.xz") as partial:
        partial.write_bytes(lzma.compress(text.encode()))


def wanted(stage: str, family: str, rows: list[Row]) -> Iterator[tuple[str, int]]:
    """Yield arm, as `paec compare` spells it, and seed of each run that the stage still lacks, seed by seed."""
    done = {(row["stage"], row["arm"], row["seed"]) for row in rows}
    arms = [arm for each in ARMS.values() for arm in each.candidates] if stage == "grid" else best(rows).values()
    for seed in GRID_SEEDS if stage == "grid" else SEEDS:
        for arm in arms:
            if (stage, arm, seed) not in done:
                yield arm, seed


def best(rows: list[Row]) -> dict[str, str]:
    """Return each arm with the coefficient whose grid runs have the largest mean of prompts mostly right, the mean over
    all batches: what finds sooner and keeps it. Of equals the first."""
    chosen = {}
    for name, arm in ARMS.items():
        area: dict[str, list[float]] = {candidate: [] for candidate in arm.candidates}
        for row in rows:
            if row["stage"] == "grid" and row["arm"] in area:
                values = row["log"]["mostly_right"]
                area[row["arm"]].append(sum(values) / len(values))
        if any(len(found) < len(GRID_SEEDS) for found in area.values()):
            raise ValueError(f"rows must hold the whole grid of {name!r} before the main runs, got {area}")
        chosen[name] = max(area, key=lambda candidate: sum(area[candidate]))
    return chosen


def run_one(family: str, stage: str, arm: str, seed: int, common: TrainConfig) -> Row:
    """Train and evaluate one arm and seed; nothing but the row is kept."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    start_seed = seed % WARM_STARTS
    run_config = replace(with_arm(common, arm), seed=seed, warm_start=replace(common.warm_start, seed=start_seed))
    tasks, eval_tasks = run_config.load_tasks()
    run = loop.new_run(run_config, starting_policy(run_config, torch.device("cpu")))
    steps = [loop.train_step(run, tasks, 0, 1) for _ in range(run_config.steps)]
    options = run_config.evaluate
    settings = Settings(
        options.problems,
        options.samples,
        options.seed,
        max_new_tokens=run_config.max_new_tokens,
        temperature=run_config.temperature,
    )
    evaluation = evaluate(run.policy, eval_tasks, settings)
    (results,) = evaluation.tasks.values()
    return {
        "family": family,
        "stage": stage,
        "arm": arm,
        "seed": seed,
        "warm_start": start_seed,
        "method": plain(run_config)["method"],
        "seconds": round(time.perf_counter() - start, 1),
        "log": {name: [_rounded(row[name]) for row in steps] for name in steps[0] if name not in LEFT_OUT},
        "greedy": [result.greedy_correct for result in results],
        "answers": [result.answers for result in results],
        "correct": [[int(right) for right in result.correct] for result in results],
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if value == value else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=("grid", "main"))
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after these")
    parser.add_argument("--out", type=Path, default=ROWS, help="folder of the rows")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "paec_kernels")
    asked = parser.parse_args()
    until = time.time() + 60 * asked.minutes
    made = provenance()
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        for family in asked.families:
            rows = read(family, asked.out)
            common = config(family, asked.cache)
            left = wanted(asked.stage, family, rows)
            running: set = set()
            while True:
                while len(running) < asked.jobs and time.time() < until and (job := next(left, None)):
                    running.add(pool.submit(run_one, family, asked.stage, *job, common))
                if not running:
                    break
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                rows += [{**future.result(), "provenance": made} for future in finished]
                write(rows, family, asked.out)
                last = rows[-1]
                right = last["log"]["mostly_right"]
                print(
                    f"{family} {last['arm']} seed {last['seed']}: {last['seconds']:.0f} s, mostly right "
                    f"{sum(right[:10]) / 10:.2f} -> {sum(right[-10:]) / 10:.2f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
