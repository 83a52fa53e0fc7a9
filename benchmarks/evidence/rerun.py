"""Make published runs again: the same to the digit, and answers whose letters stand where their roles say. And hold
runs of other seeds, by `paec compare`, against the published ones.

python -m benchmarks.evidence.rerun --families carry+ --arms grpo paec-positions --seed 3
paec compare --train.preset long --train.tasks carry+ --warm-starts 4 --seeds 3 --first-seed 200 --out runs/fresh \\
    --arms grpo paec,paec.anchored=positions,paec.rho_min=0.8
python -m benchmarks.evidence.rerun --compared runs/fresh

The records, ``reruns.json`` and ``fresh.json`` in ``bench_results/rlvr/long``, are tables of the page.
"""

import argparse
import json
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import plan
from benchmarks.evidence.run import FRESH, RERUNS, ROWS, best, kept, read
from benchmarks.provenance import provenance
from paec_kernels.saved_state import write_json
from paec_kernels.train import loop
from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.policies import starting_policy
from paec_kernels.train.presets import with_arm_and_seed
from paec_kernels.train.report.runs import find_runs, read_run
from paec_kernels.train.report.statistics import reward_area
from paec_kernels.train.run_folder import read_rows
from paec_kernels.train.tasks.families import Habits
from paec_kernels.train.tasks.long_families import LONG_FAMILIES


@cache
def letters_at(family: str) -> list[set[str]]:
    """Return the letters that solutions have at each place of an answer."""
    task, rng = LONG_FAMILIES[family], random.Random(0)
    solutions = [task.solution(task.train_problem(i), Habits(), rng, skill=i % 2 == 0) for i in range(1000)]
    return [set(letters) for letters in zip(*solutions, strict=True)]


def fits(family: str, answer: str) -> bool:
    """Tell whether each letter of an answer is one that solutions have there, so that its role is that of the place."""
    places = letters_at(family)
    return len(answer) == len(places) and all(letter in known for letter, known in zip(answer, places, strict=True))


def rerun(family: str, arm: str, seed: int, cache: Path, folder: Path) -> dict[str, Any]:
    """Train a published run of the main stage again, and compare its log.

    Raises:
        ValueError: it is not published.
    """
    rows = read(family, folder)
    spelled = best(rows).get(arm)
    published = [row for row in rows if (row["stage"], row["arm"], row["seed"]) == ("main", spelled, seed)]
    if not published:
        raise ValueError(f"rows of {family!r} must hold the main run of {arm!r} with seed {seed}, got none")
    config = with_arm_and_seed(plan.config(family, cache), str(spelled), seed, plan.WARM_STARTS)
    run = loop.new_run(config, starting_policy(config, torch.device("cpu")))
    tasks, _ = config.load_tasks()
    fitting: list[bool] = []
    texts_of = run.policy.texts

    def texts(rollout: Rollout) -> list[str]:
        found = texts_of(rollout)
        fitting.extend(fits(family, text) for text in found)
        return found

    run.policy.texts = texts  # type: ignore[method-assign]
    steps = [loop.train_step(run, tasks, 0, 1) for _ in range(config.steps)]
    log, again = published[0]["log"], kept(steps)
    same = sum(values == again.get(name) for name, values in log.items())
    return {
        "family": family,
        "arm": arm,
        "seed": seed,
        "columns": len(log),
        "same": same,
        "answers": len(fitting),
        "fitting": sum(fitting),
    }


def fresh(runs: Path, folder: Path) -> list[dict[str, Any]]:
    """Return the area of each run of `paec compare`, and the smallest and the largest of the same arm's published ones.

    Raises:
        ValueError: of an arm or a family that is not published, or a seed that is.
    """
    found = []
    for path in find_runs([runs]):
        run = read_run(path)
        (family,) = run.config["tasks"]
        rows = read(family, folder)
        own = [r for r in rows if r["stage"] == "main" and r["config"]["method"] == run.config["method"]]
        if not own or run.seed in {row["seed"] for row in own}:
            raise ValueError(f"{path} must be of an arm that is published, with another seed, got seed {run.seed}")
        areas = [reward_area(row["log"]["mostly_right"]) for row in own]
        area = reward_area([row["mostly_right"] for row in read_rows(path)])
        arm = next(name for name, spelled in best(rows).items() if spelled == own[0]["arm"])
        found.append(
            {"family": family, "arm": arm, "seed": run.seed, "area": area, "low": min(areas), "high": max(areas)}
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=plan.FAMILIES, default=["carry+"])
    parser.add_argument("--arms", nargs="+", choices=tuple(plan.ARMS), default=list(plan.PLANNED_ARMS))
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROWS, help="folder of the rows and of the record")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "paec_kernels")
    parser.add_argument("--compared", type=Path, help="folder of runs of `paec compare`, of other seeds")
    asked = parser.parse_args(arguments)
    if asked.compared:
        runs = fresh(asked.compared, asked.out)
        write_json(asked.out / FRESH, runs)
        return int(any(not each["low"] <= each["area"] <= each["high"] for each in runs))
    torch.set_num_threads(1)
    path = asked.out / RERUNS
    record = json.loads(path.read_text()) if path.exists() else []
    made = provenance() | {"command": "python -m benchmarks.evidence.rerun"}
    for family in asked.families:
        for arm in asked.arms:
            found = rerun(family, arm, asked.seed, asked.cache, asked.out)
            which = (family, arm, asked.seed)
            record = [each for each in record if (each["family"], each["arm"], each["seed"]) != which]
            record.append(found | {"provenance": made})
            write_json(path, record)
            print(found, flush=True)
    return int(any(each["same"] < each["columns"] for each in record))


if __name__ == "__main__":
    sys.exit(main())
