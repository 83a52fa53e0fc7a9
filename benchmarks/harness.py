"""Checks, then times in turns, then memory: the rows of one case.

Every turn runs the floor and each implementation once, so that whatever else the machine does slows all alike;
ratios are taken within a turn. Before each run the caches are filled with something else. What was not right is
never timed.
"""

import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import floors, peak_memory
from benchmarks.check import Truth, WrongResult, backward, check, leaves
from benchmarks.implementations import Implementation, Outputs
from benchmarks.parts import Part
from benchmarks.rivals import all_implementations
from benchmarks.rows import PASSES, Row, median_ratio, times_of
from benchmarks.workload import Case, Inputs, build, checked_rows, only, take

FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # beyond the last cache of either
# Of a GPU, some 4.5 ms at 1.755 GHz: several times the 0.5 to 1 ms, by estimate, in which the host launches forward and
# backward through custom operators. Were the host late, the GPU's idle time would be measured.
SLEEP_CYCLES = 8_000_000


class Seconds(NamedTuple):
    forward: float
    both: float

    def of(self, passes: str) -> float:
        return {"forward": self.forward, "backward": self.both - self.forward, "both": self.both}[passes]


@dataclass
class Contender:
    """An implementation that passed its check, and what was measured of it."""

    implementation: Implementation
    function: Callable[[Inputs], Outputs]
    errors: dict[str, float]  # fields of a row
    seconds: list[Seconds] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str = ""  # in a timed run


def rows_of_part(part: Part, on_step: Callable[[str], None] = lambda _: None) -> Iterator[Row]:
    """Yield all rows of a case: of the floor, of each implementation that is right, and of those that have no number.

    Args:
        on_step: is told what is being done.
    """
    case = part.case
    inputs = build(case)
    truth = Truth(inputs, checked_rows(case.n, case.device))
    sizes = truth.outputs["nucleus_size"].double()
    nucleus = (int(sizes.median()), int(sizes.max()))
    spare = torch.empty_like(inputs.rows)
    contenders: list[Contender] = []
    for name in part.names:
        on_step(f"check {name}")
        implementation = all_implementations()[name]
        admitted = admit(implementation, case, inputs, spare, truth)
        if isinstance(admitted, Contender):
            contenders.append(admitted)
        else:
            yield from _rows_without(part, implementation, PASSES, *admitted)

    floor_seconds = take_turns(part, inputs, spare, contenders, on_step)
    for contender in contenders:
        if contender.failure:
            yield from _rows_without(part, contender.implementation, PASSES, "failed", contender.failure)
    contenders = [contender for contender in contenders if not contender.failure]
    if part.with_memory and case.device == "cpu" and contenders:
        on_step("memory, in a new process")
        peaks = peak_bytes([c.implementation.name for c in contenders], inputs)
        for contender in contenders:
            contender.peak_bytes = peaks[contender.implementation.name]
    for passes in PASSES:
        seconds = [turn.of(passes) for turn in floor_seconds]
        yield part.row(floors.name_of(case), "torch", passes, **_timed(case, passes, seconds), share=1.0)
    for contender in contenders:
        yield from _rows_of(part, contender, floor_seconds, contenders[0], nucleus)


def admit(
    implementation: Implementation, case: Case, inputs: Inputs, spare: Tensor, truth: Truth
) -> Contender | tuple[str, str]:
    """Check the implementation; return it ready to be timed, or a row's status and reason."""
    if reason := implementation.why_not(case):
        return reason
    try:
        function = implementation.prepare()
        tried = leaves(fresh(implementation, only(inputs, truth.rows), spare))
        found = function(tried)
        backward(found, implementation.gradients, tried.weights)
        found = {name: value.detach() for name, value in found.items()}
        return Contender(implementation, function, check(implementation, case, tried, found, truth))
    except WrongResult as wrong:
        return "wrong", str(wrong)
    except Exception as error:  # whatever a rival raises, the others are still measured
        reason = described(error)
    gc.collect()  # frames that the error's traceback keeps, often in a cycle, hold the run's tensors
    return "failed", reason


def described(error: Exception) -> str:
    """Describe the error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def fresh(implementation: Implementation, inputs: Inputs, spare: Tensor) -> Inputs:
    """Put the inputs into the spare tensor where the implementation writes over them."""
    return inputs._replace(rows=spare.copy_(inputs.rows)) if implementation.overwrites else inputs


def take_turns(
    part: Part, inputs: Inputs, spare: Tensor, contenders: list[Contender], on_step: Callable[[str], None]
) -> list[Seconds]:
    """Fill the contenders' seconds, and return the floor's, turn by turn."""
    case = part.case
    flush = flusher(case.device)
    floor_seconds: list[Seconds] = []
    for turn in range(part.turns + 1):
        on_step(f"turn {turn} of {part.turns}")
        flush()
        of_floor = clock(case.device, lambda: floors.forward(inputs), lambda _: floors.backward(inputs, spare))
        if turn > 0:  # the first turn warms up
            floor_seconds.append(of_floor)
        for contender in contenders:
            if contender.failure:
                continue
            ready = fresh(contender.implementation, inputs, spare)
            flush()
            if case.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                seconds = run_once(contender, case.device, ready)
            except Exception as error:
                contender.failure = described(error)
            if contender.failure:
                gc.collect()  # as in `admit`
            elif turn > 0:
                contender.seconds.append(seconds)
                if case.device == "cuda":
                    held = torch.cuda.max_memory_allocated() - before
                    contender.peak_bytes = held - _gradients_not_counted(inputs)
    return floor_seconds


def run_once(contender: Contender, device: str, inputs: Inputs) -> Seconds:
    inputs = leaves(inputs)
    gradients = contender.implementation.gradients
    return clock(device, lambda: contender.function(inputs), lambda found: backward(found, gradients, inputs.weights))


def flusher(device: str) -> Callable[[], object]:
    """Return a function that evicts the caches by reading a large buffer.

    Lines that it wrote would be flushed inside the timed run.
    """
    buffer = torch.ones(FLUSH_BYTES[device] // 4, device=device)  # zeros may all be one page of a CPU's memory
    total = torch.empty((), device=device)
    return lambda: torch.sum(buffer, dim=0, out=total)


def clock(device: str, forward: Callable[[], Any], backward: Callable[[Any], object]) -> Seconds:
    """Time the two in a row: by the GPU's own events, by the wall's clock on a CPU."""
    if device == "cuda":
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda._sleep(SLEEP_CYCLES)  # until the host has launched it all, whose own time is not the GPU's
        start.record()
        found = forward()
        middle.record()
        backward(found)
        end.record()
        end.synchronize()
        return Seconds(start.elapsed_time(middle) / 1e3, start.elapsed_time(end) / 1e3)
    began = time.perf_counter()
    found = forward()
    halfway = time.perf_counter()
    backward(found)
    return Seconds(halfway - began, time.perf_counter() - began)


def peak_bytes(names: list[str], inputs: Inputs) -> dict[str, int]:
    """Find, on a CPU, how far a run raises the resident memory of a new process beyond its inputs (see `peak_memory`).

    PyTorch's profiler would miss what the backend's own threads allocate, and this process keeps freed memory. The
    new one gives every larger buffer back as soon as it is freed, so that no run finds memory of the one before.
    """
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"):
        path = Path(folder) / "inputs.pt"
        torch.save(tuple(inputs), path)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            growth = process.submit(_growth_in_new_process, path, names, torch.get_num_threads()).result()
    return {name: found - _gradients_not_counted(inputs) for name, found in growth.items()}


def _growth_in_new_process(path: Path, names: list[str], n_threads: int) -> dict[str, int]:
    torch.set_num_threads(n_threads)
    inputs = Inputs(*torch.load(path, weights_only=True))
    growth = {}
    for name in names:
        implementation = all_implementations()[name]
        contender = Contender(implementation, implementation.prepare(), errors={})
        # Loads code and starts threads; what is compiled for one shape must see that shape.
        warm_up = inputs if implementation.compiled else take(inputs, torch.arange(2))
        run_once(contender, "cpu", warm_up._replace(rows=warm_up.rows.clone()))
        ready = fresh(implementation, inputs, torch.empty_like(inputs.rows)) if implementation.overwrites else inputs
        growth[name] = peak_memory.growth(lambda c=contender, i=ready: run_once(c, "cpu", i))
        del ready
    return growth


def _gradients_not_counted(inputs: Inputs) -> int:
    """Count the bytes that every implementation must hold: the linear form's gradients.

    A gradient of logits counts as the implementation's own, since it can be avoided.
    """
    return inputs.rows.nbytes + inputs.head.nbytes if inputs.head is not None else 0


def _timed(case: Case, passes: str, seconds: list[float]) -> dict[str, Any]:
    times, moved = times_of(seconds), floors.bytes_moved(case, passes)
    bandwidth = None if moved is None else moved / times["p50"]
    return times | {"bytes": moved, "bandwidth": bandwidth, "operations": floors.operations(case, passes)}


def _rows_of(
    part: Part, contender: Contender, floor: list[Seconds], anchor: Contender, nucleus: tuple[int, int]
) -> Iterator[Row]:
    implementation = contender.implementation
    for passes in PASSES:
        if passes != "both" and implementation.gradient_in_forward:
            reason = "its gradient is made in the forward pass"
            yield from _rows_without(part, implementation, (passes,), "skipped", reason)
            continue
        if passes != "forward" and not implementation.gradients:
            yield from _rows_without(part, implementation, (passes,), "skipped", "it has no gradient")
            continue
        own, of_floor, of_anchor = (
            [turn.of(passes) for turn in turns] for turns in (contender.seconds, floor, anchor.seconds)
        )
        row = part.row(
            implementation.name,
            implementation.source,
            passes,
            **_timed(part.case, passes, own),
            share=median_ratio(of_floor, own),
            anchor=anchor.implementation.name,
            relative=median_ratio(own, of_anchor),
            peak_bytes=contender.peak_bytes,
            nucleus=nucleus,
            **contender.errors,
        )
        row.versions.update(implementation.versions())
        yield row


def _rows_without(
    part: Part, implementation: Implementation, passes: tuple[str, ...], status: str, reason: str
) -> Iterator[Row]:
    for one in passes:
        yield part.row(implementation.name, implementation.source, one, status=status, reason=reason)
