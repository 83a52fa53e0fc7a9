"""Rows of whole optimiser steps: ways to take the same one, timed in turns."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from benchmarks.harness import Run
from benchmarks.rows import Row, percentile
from benchmarks.workload import Case

TOLERANCE = 1e-4  # of the loss, relative


class Way(NamedTuple):
    """A way to take the step, which leaves everything as it was: the learning rate is 0."""

    source: str  # what it is made of
    error: float  # of its loss against float64, relative
    take: Callable[[], None]


def rows_in_turns(run: Run, case: Case, ways: dict[str, Way], on_step: Callable[[str], None]) -> Iterator[Row]:
    """A row for each way; the first that is right is the anchor of the ratios. What is not right is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name, way in ways.items() if way.error <= TOLERANCE}
    order = deque(seconds)
    for turn in range(run.turns + 1):
        on_step(f"turn {turn} of {run.turns}")
        for name in order:
            elapsed = _seconds(ways[name].take, case.device)
            if turn > 0:  # the first turn warms up
                seconds[name].append(elapsed)
        order.rotate(-1)  # each comes first in its turn
    anchor = next(iter(seconds), None)
    for name, way in ways.items():
        if name not in seconds:
            reason = f"its loss is off by {way.error:.1e}, relative; allowed {TOLERANCE:.1e}"
            yield run.row(case, name, way.source, "step", status="wrong", reason=reason)
            continue
        own = seconds[name]
        yield run.row(
            case,
            name,
            way.source,
            "step",
            p20=percentile(own, 20),
            p50=percentile(own, 50),
            p80=percentile(own, 80),
            turns=len(own),
            anchor=anchor,
            relative=percentile([a / b for a, b in zip(own, seconds[anchor], strict=True)], 50),
            value_error=way.error,
        )


def _seconds(take: Callable[[], None], device: str) -> float:
    """Of one step, to its end on the device."""
    _synchronize(device)
    start = time.perf_counter()
    take()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
