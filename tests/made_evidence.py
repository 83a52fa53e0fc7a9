"""Made-up rows of the evidence: a level of prompts mostly right for each arm, noise of each seed, no training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.evidence import plan
from benchmarks.evidence.run import Row

BATCHES, PROBLEMS, SAMPLES = 20, 8, 16
PROVENANCE = {
    "command": "python -m benchmarks.evidence.run main",
    "date": "2026-11-28 06:00 UTC",
    "commit": "0123456789",
    "python": "3.11",
    "torch": "2.13",
    "triton": "3.9",
    "machine": "made up",
}
ROLE_ENTROPIES = {"fork": (1.2, 0.2), "step": (0.02, 0.01), "free": (1.0, 0.8)}


def made_row(stage: str, arm: str, seed: int, level: float, *, family: str = "chain", batches: int = BATCHES) -> Row:
    """Return a row whose prompts become mostly right up to ``level``, give or take what the seed draws."""
    rng = np.random.default_rng([seed, *arm.encode(), *stage.encode(), *family.encode()])
    right = np.clip(level * np.linspace(0.2, 1, batches) + rng.normal(0, 0.05, batches), 0, 1)
    correct = rng.random((PROBLEMS, SAMPLES)) < level
    log = {"reward": right * 0.9, "mostly_right": right, "threshold": right, "mask_on_certain": right}
    for role, (start, end) in ROLE_ENTROPIES.items():
        values = np.geomspace(start, end, batches) * (1 + level) * rng.uniform(0.8, 1.2, batches)
        log[f"entropy/{role}"] = np.full(batches, np.nan) if role == "free" and "+" not in family else values
        log[f"mask/{role}"] = rng.random(batches)
    if arm.startswith(("paec", "oracle")):
        log |= {"term/penalty_active": rng.integers(0, 2, batches), "term/penalty_per_token": rng.random(batches)}
        log["term/floor_ratio"] = np.append(np.nan, rng.uniform(0.8, 1.2, batches - 1))  # not there at once
    return {
        "family": family,
        "fingerprint": plan.fingerprint(family),
        "stage": stage,
        "arm": arm,
        "seed": seed,
        "warm_start": seed % plan.WARM_STARTS,
        "config": plan.config(family, Path()).identity(),
        "seconds": 36.0,
        "log": {name: [None if np.isnan(x) else round(float(x), 5) for x in values] for name, values in log.items()},
        "greedy": [bool(x) for x in rng.random(PROBLEMS) < level],
        "answers": [[("1" if x else str(rng.integers(2, 5))) for x in of_problem] for of_problem in correct],
        "correct": [[int(x) for x in of_problem] for of_problem in correct],
        "provenance": PROVENANCE,
    }


def made_rows(levels: Mapping[str, float], seeds: Sequence[int], *, family: str = "chain") -> list[Row]:
    """Return the grid of the plan's arms, in which each arm's last candidate is the best, and that one's main runs."""
    rows = []
    for name, arm in plan.ARMS.items():
        for number, candidate in enumerate(arm.candidates):
            rows += [made_row("grid", candidate, seed, 0.3 + 0.2 * number, family=family) for seed in plan.GRID_SEEDS]
        rows += [
            made_row("main", arm.candidates[-1], seed, levels[name], family=family) for seed in seeds if name in levels
        ]
    return rows
