"""A comparison as tables for terminals and Markdown, and as JSON and CSV files."""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from paec_kernels.train.report.compare import OF_TRAINING, Comparison, Row, run_scores
from paec_kernels.train.report.evaluate import format_number, summarise
from paec_kernels.train.report.metrics import Estimate
from paec_kernels.train.run_folder import Run


def save(comparison: Comparison, runs: Sequence[Run], out: Path) -> list[Path]:
    """Write comparison.json, comparison.csv (its rows), runs.csv (each run's scores by task) and comparison.md."""
    out.mkdir(parents=True, exist_ok=True)
    document = asdict(comparison) | {
        "rows": [_plain(row) for row in comparison.rows],
        "runs": [{"folder": str(run.folder), "arm": run.arm, "seed": run.seed} for run in runs],
    }
    columns = [f"{kind}{part}" for kind in ("", "difference_") for part in ("mean", "low", "high")]
    summary: list[list[Any]] = [["arm", "metric", "seeds", *columns]]
    for row in comparison.rows:
        numbers = [*row.estimate, *(row.difference or [math.nan] * 3)]
        summary.append([row.arm, row.metric, row.seeds, *("" if math.isnan(x) else x for x in numbers)])
    raw: list[list[Any]] = [["arm", "seed", "task", "metric", "value"]]
    for run in runs:
        for task, scores in summarise(run.evaluation).items():
            raw += [[run.arm, run.seed, task, name, estimate.mean] for name, estimate in scores.items()]
        raw += [[run.arm, run.seed, "", name, run_scores(run)[name]] for name in OF_TRAINING]
    text = {
        "comparison.json": json.dumps(document, indent=1, allow_nan=False) + "\n",
        "comparison.md": to_markdown(comparison),
    }
    for name, content in text.items():
        (out / name).write_text(content)
    for name, lines in (("comparison.csv", summary), ("runs.csv", raw)):
        with (out / name).open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
    return [out / name for name in (*text, "comparison.csv", "runs.csv")]


def to_markdown(comparison: Comparison) -> str:
    """Both tables, of means and of differences, and what the configs differ in."""
    parts = []
    for title, header, lines in _tables(comparison):
        rule = ["---", *["---:"] * (len(header) - 1)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
        parts.append(f"{title}\n\n{body}\n")
    if comparison.differing:
        fields = "; ".join(f"`{name}` ({', '.join(map(str, values))})" for name, values in comparison.differing.items())
        parts.append(f"The runs also differ in {fields}.\n")
    return "\n".join(parts)


def format_tables(comparison: Comparison) -> list[Table]:
    """The same for a terminal."""
    tables = []
    for title, header, lines in _tables(comparison):
        # All of it fits 80 columns: an interval is below its mean, and only an arm's name may be folded.
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(header[0], overflow="fold", min_width=7)
        for name in header[1:]:
            table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
        for line in lines:
            table.add_row(line[0], *(cell.replace(" ", "\n", 1) for cell in line[1:]))
        tables.append(table)
    return tables


def _tables(comparison: Comparison) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of the table of means and, where there are any, of that of differences."""
    passes = [name for name in comparison.metrics if name.startswith("pass@")]  # all are in the files
    hidden = {"operator share", *passes[:-1]}
    shown = [name for name in comparison.metrics if name not in hidden]
    means = []
    differences = []
    for arm in comparison.arms:
        rows = [comparison.row(arm, name) for name in shown]
        means.append([f"{arm} ({rows[0].seeds})", *(_cell(row.metric, row.estimate) for row in rows)])
        if arm != comparison.baseline:
            differences.append([arm, *(_cell(row.metric, row.difference, signed=True) for row in rows)])
    title = "Macro-averages over tasks with 95 % t intervals over seeds; scores in per cent, entropy in nats"
    yield title, ["arm (seeds)", *shown], means
    if any(row.difference for row in comparison.rows):
        title = f"Differences from {comparison.baseline}, paired by seed, with 95 % t intervals"
        yield title, ["arm", *shown], differences


def _cell(metric: str, estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    sign = "+" if signed and estimate.mean > 0 else ""
    mean, half = (_number(metric, x) for x in (estimate.mean, estimate.high - estimate.mean))  # t's are symmetric
    return f"{sign}{mean}" if math.isnan(estimate.high) else f"{sign}{mean} ± {half}"


def _number(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric == "final entropy" else format_number(metric, value)


def _plain(row: Row) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    plain: dict[str, Any] = row._asdict()
    for name in ("estimate", "difference"):
        estimate = plain[name]
        plain[name] = estimate and {k: None if math.isnan(x) else x for k, x in estimate._asdict().items()}
    return plain
