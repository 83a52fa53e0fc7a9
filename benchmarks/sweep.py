"""Measures everything and writes the rows, the plots and the page: ``python -m benchmarks.sweep --help``."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import page
from benchmarks.cost_model import ROWS, VOCABULARIES
from benchmarks.harness import Run, described, rows_of_case
from benchmarks.logits import KINDS
from benchmarks.rivals import all_implementations
from benchmarks.rows import PASSES, RESULTS, Row, RowFile, path_of
from benchmarks.workload import PLANTED, SMOLLM2, Case

F32, BF16 = torch.float32, torch.bfloat16
IN_AND_OUT_OF_PLACE = ("token_stats", "token_stats in place")
WITH_AND_WITHOUT_NUCLEUS = ("token_stats", "token_stats, no nucleus")
OURS = (*IN_AND_OUT_OF_PLACE, "token_stats, no nucleus")
EAGER = "eager, sort"


@dataclass(frozen=True)
class Part:
    """One case of a section; ``case`` is None for the optimiser step, which makes its own."""

    section: str
    case: Case | None
    names: tuple[str, ...]
    turns: int
    with_memory: bool = False

    @property
    def label(self) -> str:
        if self.case is None:
            return self.section
        c = self.case
        return f"{self.section}: {c.n:,} x {c.v:,} {str(c.dtype).removeprefix('torch.')} {c.kind}"


def names_of(linear: bool) -> tuple[str, ...]:
    return tuple(name for name, i in all_implementations().items() if i.linear is linear)


def parts_on_cpu() -> Iterator[Part]:
    """Yield the smallest useful set first: against everything else at one size, then the linear form, then the sweeps.

    Turns go where medians are compared most. What eager takes, and what it holds, is shown once for each vocabulary.
    """
    cpu = "cpu"
    yield Part("rivals", Case(192, 49_152, F32, "real", cpu), names_of(linear=False), 12, with_memory=True)
    yield Part("linear", Case(256, 49_152, F32, SMOLLM2, cpu, d=576), names_of(linear=True), 8, with_memory=True)
    yield Part("step", None, (), 10)
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(32, v, F32, "real", cpu), (*IN_AND_OUT_OF_PLACE, EAGER), 3, with_memory=True)
    for n in (1, 8, 64, 256):
        yield Part("rows", Case(n, 49_152, F32, "real", cpu), (*IN_AND_OUT_OF_PLACE, EAGER), 4)
    for kind in KINDS:
        yield Part("kinds", Case(64, 49_152, F32, kind, cpu), (*WITH_AND_WITHOUT_NUCLEUS, EAGER), 4)
    for kind in KINDS:
        yield Part("kinds", Case(64, 49_152, BF16, kind, cpu), WITH_AND_WITHOUT_NUCLEUS, 6)
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(32, v, BF16, "real", cpu), IN_AND_OUT_OF_PLACE, 6)


def parts_on_gpu() -> Iterator[Part]:
    """Yield the same as on the CPU, at sizes that a GPU is bought for."""
    gpu = "cuda"
    fast = (*OURS, "TRL, fused", "Liger, GRPO loss", "quack, cross_entropy")
    yield Part("rivals", Case(4096, 151_936, BF16, "real", gpu), names_of(linear=False), 20)
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(4096, v, BF16, "real", gpu), fast, 20)
    yield Part("linear", Case(16_384, 151_936, BF16, PLANTED, gpu, d=2048), names_of(linear=True), 20)
    for dtype in (BF16, F32):
        for kind in KINDS:
            yield Part("kinds", Case(4096, 151_936, dtype, kind, gpu), (*WITH_AND_WITHOUT_NUCLEUS, EAGER), 12)
    for n in (1, *ROWS):
        yield Part("rows", Case(n, 151_936, BF16, "real", gpu), (*IN_AND_OUT_OF_PLACE, "TRL, fused"), 20)
    yield Part("step", None, (), 20)
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(4096, v, F32, "real", gpu), fast, 20)


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line by the standard library alone: a borrowed GPU's image may hold little else."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description="Measure the operator, its floors and its rivals; write OUT/<device>/<section>.jsonl, plots and "
        "OUT/README.md.",
    )
    add, sections = parser.add_argument, tuple(page.SECTIONS)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="by default a GPU where there is one")
    add("--out", type=Path, default=RESULTS, help="folder of the rows; a section's are replaced once it has new ones")
    add("--minutes", type=float, default=8.0, help="no case is begun after these (8); the others get a row each")
    add("--sections", nargs="+", choices=sections, default=sections, metavar="NAME", help="of " + ", ".join(sections))
    add("--threads", type=int, default=2, help="of PyTorch on a CPU (2)")
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of(sys.argv[1:])
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(options.threads if device == "cpu" else torch.get_num_threads())
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of the processes that measure memory
    every = parts_on_gpu() if device == "cuda" else parts_on_cpu()
    parts = [part for part in every if part.section in options.sections]
    console = Console()
    try:
        measure(parts, device, options, console)
    finally:  # however the sweep ends, what it measured is shown
        for path in page.write(options.out):
            console.print(f"wrote {path}")


def measure(parts: list[Part], device: str, options: argparse.Namespace, console: Console) -> None:
    command = " ".join(["python -m benchmarks.sweep", *sys.argv[1:]])
    end = time.monotonic() + 60 * options.minutes
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress, ExitStack() as closing:
        files = {section: RowFile(path_of(options.out, device, section)) for section in {p.section for p in parts}}
        for file in files.values():
            closing.callback(file.close)
        task = progress.add_task("", total=len(parts))
        for part in parts:
            run = Run(part.section, command, part.with_memory, part.turns)
            tell = lambda step, p=part: progress.update(task, description=f"{p.label}: {step}")  # noqa: E731
            for row in rows_of_part(part, run, device, time.monotonic() > end, tell):
                files[part.section].write(row)
                if row.passes in ("both", "step"):
                    console.print(line(row), highlight=False, soft_wrap=True)
            progress.advance(task)
        progress.update(task, description="done")


def rows_of_part(part: Part, run: Run, device: str, too_late: bool, tell: Callable[[str], None]) -> Iterator[Row]:
    """A part that is too late, or that raises, has rows that say so, and the sweep goes on."""
    if too_late:
        yield from rows_without(part, run, device, "skipped", "the sweep's time was spent")
        return
    found: set[tuple[str, str]] = set()
    try:
        for row in measured(part, run, device, tell):
            found.add((row.implementation, row.passes))
            yield row
    except Exception as error:
        for row in rows_without(part, run, device, "failed", described(error)):
            if (row.implementation, row.passes) not in found:
                yield row


def measured(part: Part, run: Run, device: str, tell: Callable[[str], None]) -> Iterator[Row]:
    tell("inputs")
    if part.case is None:
        from benchmarks import step  # the training's packages, which nothing else here needs

        yield from step.step_rows(run, device, answers=2 if device == "cpu" else 64, on_step=tell)
    else:
        yield from rows_of_case(run, part.case, list(part.names), on_step=tell)


def rows_without(part: Part, run: Run, device: str, status: str, reason: str) -> Iterator[Row]:
    """Yield a row of everything that the part would measure."""
    if part.case is None:
        yield run.row(Case(0, 0, F32, "", device), "all", "", "step", status=status, reason=reason)
        return
    for name in part.names:
        for passes in PASSES:
            source = all_implementations()[name].source
            yield run.row(part.case, name, source, passes, status=status, reason=reason)


def line(row: Row) -> str:
    shape = f"{row.section:10} {row.n:>6,} x {row.v:>7,} {row.dtype:8} {row.logits:12} {row.implementation:28}"
    if row.p50 is None:
        return f"{shape} {row.status}: {row.reason}"
    share = "" if row.share is None else f"{100 * row.share:6.1f} % of the floor"
    return f"{shape} {1e3 * row.p50:10.2f} ms {share}"


if __name__ == "__main__":
    main()
