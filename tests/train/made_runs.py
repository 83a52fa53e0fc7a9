"""Run folders with made-up numbers, for the comparison and its plots."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paec_kernels.train.report.evaluate import Evaluation, ProblemResult, Settings


def evaluation(right: Sequence[float], samples: int = 4, seed: int = 0) -> Evaluation:
    """A task for each share of right samples; of its 5 problems one gets its right answers first, one last, ..."""
    tasks = {}
    for number, share in enumerate(right):
        results = []
        for problem in range(5):
            correct = np.roll(np.arange(samples) < round(share * samples), problem).tolist()
            answers = ["1" if is_right else f"-{i}" for i, is_right in enumerate(correct)]
            results.append(
                ProblemResult(f"task {number}: {problem}?", "1", "1", correct[0], 9, answers, correct, [8] * samples)
            )
        tasks[f"task{number}"] = results
    return Evaluation(Settings(5, samples, seed, max_new_tokens=16, temperature=1.0), tasks)


def write_run(
    folder: Path,
    algo: str,
    seed: int,
    *,
    right: Sequence[float] = (0.5, 0.25),
    entropy: Sequence[float] = (0.5, 0.3),
    floor: float | None = None,
    evaluated: Evaluation | None = None,
    **config,
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"algo": algo, "seed": seed, "out": str(folder), "method": {"name": algo}} | config)
    )
    rows = [
        {
            "step": step,
            "reward": 0.5 + 0.01 * step,
            "entropy": value,
            "selected_entropy": 3 * value,
            "floor": floor if step > 1 else 0.0,
        }
        for step, value in enumerate(entropy, start=1)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (evaluated or evaluation(right, seed=seed)).save(folder / "eval.json")
    return folder
