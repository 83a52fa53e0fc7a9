"""Evaluations and comparisons as tables for terminals and Markdown; comparisons also as JSON and CSV files."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from paec_kernels.saved_state import whole_file, without_nan, write_json
from paec_kernels.train.report.compare import OF_TRAINING, Comparison, run_scores
from paec_kernels.train.report.evaluate import Evaluation, mean_scores, summarise
from paec_kernels.train.report.metrics import Estimate
from paec_kernels.train.report.runs import Run

DIGITS = {"length": 0, "distinct": 2, "final entropy": 3}  # after the point; all other metrics are in per cent


def format_evaluation(evaluation: Evaluation) -> Table:
    """Return tasks by metrics with 95 % intervals below the means, the macro-average last."""
    settings = evaluation.settings
    summary = summarise(evaluation)
    shown = _without_passes(list(summary["macro"]))
    table = _terminal_table(
        f"{settings.samples} samples a problem at temperature {settings.temperature:g}; "
        "scores in per cent, 95 % intervals over problems",
        ["task", "problems", *shown],
    )
    counts = {task: len(results) for task, results in evaluation.tasks.items()}
    for task, scores in summary.items():
        cells = [f"{_number(name, scores[name].mean)}\n[dim]{_interval(name, scores[name])}[/]" for name in shown]
        if task == "macro":
            table.add_section()
            table.add_row("macro-average", str(sum(counts.values())), *cells, style="bold")
        else:
            table.add_row(task, str(counts[task]), *cells)
    return table


def format_comparison(comparison: Comparison) -> list[Table]:
    """Return the table of means and, if there is a baseline, that of differences from it."""
    tables = []
    for title, header, lines in _tables(comparison):
        table = _terminal_table(title, header)
        for line in lines:
            table.add_row(line[0], *(cell.replace(" ", "\n", 1) for cell in line[1:]))
        tables.append(table)
    return tables


def _terminal_table(title: str, header: Sequence[str]) -> Table:
    """Return a table whose numbers fit 80 columns: intervals are below means, and only the first column may fold."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(header[0], overflow="fold", min_width=7)
    for name in header[1:]:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    return table


def to_markdown(comparison: Comparison) -> str:
    """Return the same tables in Markdown, and what the configs differ in."""
    parts = []
    for title, header, lines in _tables(comparison):
        rule = ["---", *["---:"] * (len(header) - 1)]
        body = "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
        parts.append(f"{title}\n\n{body}\n")
    if comparison.differing:
        fields = "; ".join(f"`{name}` ({', '.join(map(str, values))})" for name, values in comparison.differing.items())
        parts.append(f"The runs also differ in {fields}.\n")
    return "\n".join(parts)


def save(comparison: Comparison, runs: Sequence[Run], out: Path) -> list[Path]:
    """Write comparison.json, comparison.csv (its rows), runs.csv (each run's scores by task) and comparison.md."""
    columns = [f"{kind}{part}" for kind in ("", "difference_") for part in ("mean", "low", "high")]
    summary: list[list[Any]] = [["arm", "metric", "seeds", *columns]]
    rows = []
    for row in comparison.rows:
        difference = row.difference and row.difference._asdict()
        rows.append(row._asdict() | {"estimate": row.estimate._asdict(), "difference": difference})
        numbers = [*row.estimate, *(row.difference or [math.nan] * 3)]
        summary.append([row.arm, row.metric, row.seeds, *("" if math.isnan(x) else x for x in numbers)])
    raw: list[list[Any]] = [["arm", "seed", "task", "metric", "value"]]
    for run in runs:
        for task, scores in mean_scores(run.evaluation).items():
            raw += [[run.arm, run.seed, task, name, value] for name, value in scores.items()]
        raw += [[run.arm, run.seed, "", name, run_scores(run)[name]] for name in OF_TRAINING]
    read = [{"folder": str(run.folder), "arm": run.arm, "seed": run.seed} for run in runs]
    write_json(out / "comparison.json", asdict(comparison) | {"rows": without_nan(rows), "runs": read})
    with whole_file(out / "comparison.md") as partial:
        partial.write_text(to_markdown(comparison))
    for name, lines in (("comparison.csv", summary), ("runs.csv", raw)):
        with whole_file(out / name) as partial, partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
    return [out / name for name in ("comparison.json", "comparison.md", "comparison.csv", "runs.csv")]


def _tables(comparison: Comparison) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, header and cells of the table of means and, if there are any, of that of differences."""
    shown = _without_passes(comparison.metrics)
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


def _without_passes(names: Sequence[str]) -> list[str]:
    """Return the metrics without pass@k for k below the number of samples; all are in the files."""
    passes = [name for name in names if name.startswith("pass@")]
    return [name for name in names if name not in passes[:-1]]


def _cell(metric: str, estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    sign = "+" if signed and estimate.mean > 0 else ""
    mean, half = (_number(metric, x) for x in (estimate.mean, estimate.high - estimate.mean))  # t's are symmetric
    return f"{sign}{mean}" if math.isnan(estimate.high) else f"{sign}{mean} ± {half}"


def _number(metric: str, value: float) -> str:
    """Return a score in per cent, but those of DIGITS as they are; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.{DIGITS[metric]}f}" if metric in DIGITS else f"{100 * value:.1f}"


def _interval(metric: str, estimate: Estimate) -> str:
    """Return low-high, of a score in whole per cents: more would not fit 80 columns."""
    ends = (estimate.low, estimate.high)
    return "-".join(_number(metric, end) if metric in DIGITS else f"{100 * end:.0f}" for end in ends)
