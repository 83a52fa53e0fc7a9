"""Measures everything and writes the rows, the plots and the page: ``python -m benchmarks.sweep --help``."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import page
from benchmarks.harness import described, rows_of_part
from benchmarks.parts import Part, parts_on_cpu, parts_on_gpu
from benchmarks.rivals import all_implementations
from benchmarks.rows import RESULTS, Row, RowFile, path_of


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
    if device == "cpu":
        torch.set_num_threads(options.threads)
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
    end = time.monotonic() + 60 * options.minutes
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress, ExitStack() as stack:
        paths = {part.section: path_of(options.out, device, part.section) for part in parts}
        files = {section: stack.enter_context(closing(RowFile(path))) for section, path in paths.items()}
        task = progress.add_task("", total=len(parts))
        for part in parts:
            tell = lambda step, p=part: progress.update(task, description=f"{p.label}: {step}")  # noqa: E731
            for row in rows_of(part, time.monotonic() > end, tell):
                files[part.section].write(row)
                if row.passes in ("both", "step"):
                    console.print(line(row), highlight=False, soft_wrap=True)
            progress.advance(task)
        progress.update(task, description="done")


def rows_of(part: Part, too_late: bool, tell: Callable[[str], None]) -> Iterator[Row]:
    """A part that is too late, or that raises, has rows that say so, and the sweep goes on."""
    if too_late:
        yield from rows_without(part, "skipped", "the sweep's time was spent")
        return
    found: set[tuple[str, str]] = set()
    try:
        for row in measured(part, tell):
            found.add((row.implementation, row.passes))
            yield row
    except Exception as error:
        for row in rows_without(part, "failed", described(error)):
            if (row.implementation, row.passes) not in found:
                yield row


def measured(part: Part, tell: Callable[[str], None]) -> Iterator[Row]:
    tell("inputs")
    if part.section == "step":
        from benchmarks import step  # the training's packages, which nothing else here needs

        yield from step.step_rows(part, tell)
    elif part.section == "trl":
        from benchmarks import trl_step  # TRL itself

        yield from trl_step.step_rows(part, tell)
    else:
        yield from rows_of_part(part, tell)


def rows_without(part: Part, status: str, reason: str) -> Iterator[Row]:
    """Yield a row of everything that the part would measure."""
    for name in part.names or ("all",):
        for passes in part.passes:
            source = all_implementations()[name].source if part.names else ""
            yield part.row(name, source, passes, status=status, reason=reason)


def line(row: Row) -> str:
    shape = f"{row.section:10} {row.n:>6,} x {row.v:>7,} {row.dtype:8} {row.logits:12} {row.implementation:28}"
    if row.p50 is None:
        return f"{shape} {row.status}: {row.reason}"
    share = "" if row.share is None else f"{100 * row.share:6.1f} % of the floor"
    return f"{shape} {1e3 * row.p50:10.2f} ms {share}"


if __name__ == "__main__":
    main()
