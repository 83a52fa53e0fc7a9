"""Evaluations and comparisons as tables for terminals and Markdown; comparisons also as JSON and CSV files."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paec_kernels.extras import extra
from paec_kernels.saved_state import whole_file, without_nan, write_json
from paec_kernels.train.report.compare import OF_TRAINING, Comparison, Row, run_scores
from paec_kernels.train.report.evaluate import Evaluation, mean_scores, summarise
from paec_kernels.train.report.runs import Run
from paec_kernels.train.report.statistics import ENOUGH, Estimate

with extra("train"):
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.markup import escape
    from rich.table import Table

A_SEED = "· seed "  # begins the line of a seed
FIRST_COLUMN = 15  # letters that names have at least
DIGITS = {"length": 0, "distinct": 2, "final entropy": 3}  # after the point; all other metrics are in per cent


class Fitted:
    """A table for any width: the columns that do not fit beside the others stand in further tables below.

    Only the first column may fold. A header's spaces, and the cells' line ends, break lines.
    """

    def __init__(self, title: str, header: Sequence[str]) -> None:
        self.title = title
        self.header = [header[0], *(name.replace(" ", "\n") for name in header[1:])]
        self.rows: list[tuple[Sequence[str], str | None]] = []

    def add_row(self, *cells: str, style: str | None = None) -> None:
        self.rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unbounded = options.update(max_width=10_000)
        done = 1
        while done < len(self.header):
            end = done + 1
            while end < len(self.header):
                wider = self._table(range(done, end + 1), options.max_width)
                # The maximum, since rich takes spaces for places to break in the minimum of columns that do not wrap.
                if console.measure(wider, options=unbounded).maximum > options.max_width:
                    break
                end += 1
            yield self._table(range(done, end), options.max_width)
            yield ""
            done = end

    def _table(self, columns: range, width: int) -> Table:
        title = self.title if columns.start == 1 else None
        looks: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
        table = Table(title=title, title_justify="left", **looks)
        longest = max(map(cell_len, (*self.header[0].split(), *(cells[0] for cells, _ in self.rows))))
        table.add_column(self.header[0], overflow="fold", width=min(longest, max(FIRST_COLUMN, width // 5)))
        for column in columns:
            table.add_column(self.header[column], justify="right", no_wrap=True)
        for cells, style in self.rows:
            table.add_row(cells[0], *(cells[column] for column in columns), style=style)
        return table


def format_evaluation(evaluation: Evaluation) -> Fitted:
    """Return tasks by metrics with 95 % intervals below the means, the macro-average last."""
    settings = evaluation.settings
    summary = summarise(evaluation)
    shown = _without_passes(list(summary["macro"]))
    table = Fitted(
        f"{settings.samples} samples a problem at temperature {settings.temperature:g}; "
        "scores in per cent, 95 % intervals over problems",
        ["task", "problems", *shown],
    )
    counts = {task: len(results) for task, results in evaluation.tasks.items()}
    counts["macro"] = sum(counts.values())
    for task, scores in summary.items():
        cells = [f"{_number(name, scores[name].mean)}\n[dim]{_interval(name, scores[name])}[/]" for name in shown]
        name, style = ("macro-average", "bold") if task == "macro" else (escape(task), None)
        table.add_row(name, str(counts[task]), *cells, style=style)
    return table


def format_comparison(comparison: Comparison) -> list[Fitted]:
    """Return the table of means and, if there is a baseline, that of differences from it; intervals below means."""
    tables = []
    for title, header, lines in _tables(comparison):
        table = Fitted(title, header)
        for line in lines:
            style = "dim" if line[0].startswith(A_SEED) else None
            cells = (cell.replace(" ±", "\n±").replace(", p", "\np") for cell in line[1:])
            table.add_row(escape(line[0]), *cells, style=style)
        tables.append(table)
    return tables


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
    summary: list[list[Any]] = [["arm", "metric", "seeds", *columns, "p_value"]]
    rows = []
    for row in comparison.rows:
        difference = row.difference and row.difference._asdict()
        rows.append(row._asdict() | {"estimate": row.estimate._asdict(), "difference": difference})
        numbers = [*row.estimate, *(row.difference or [math.nan] * 3), row.p_value]
        summary.append([row.arm, row.metric, row.seeds, *("" if math.isnan(x) else x for x in numbers)])
    raw: list[list[Any]] = [["arm", "seed", "task", "metric", "value"]]
    for run in runs:
        for task, scores in mean_scores(run.evaluation).items():
            raw += [[run.arm, run.seed, task, name, value] for name, value in scores.items()]
        raw += [[run.arm, run.seed, "", name, run_scores(run)[name]] for name in OF_TRAINING]
    read = [{"folder": str(run.folder), "arm": run.arm, "seed": run.seed} for run in runs]
    document = asdict(comparison) | {"rows": without_nan(rows), "runs": read}
    del document["scores"]  # they are in runs.csv
    write_json(out / "comparison.json", document)
    with whole_file(out / "comparison.md") as partial:
        partial.write_text(to_markdown(comparison))
    for name, lines in (("comparison.csv", summary), ("runs.csv", raw)):
        with whole_file(out / name) as partial, partial.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
    return [out / name for name in ("comparison.json", "comparison.md", "comparison.csv", "runs.csv")]


def _tables(comparison: Comparison) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield title, header and cells of the table of means and, if there are any, of that of differences.

    An arm with several seeds, but fewer than ENOUGH, has a line for each seed below its own.
    """
    shown = _without_passes(comparison.metrics)
    means = []
    differences = []
    for arm in comparison.arms:
        rows = [comparison.row(arm, name) for name in shown]
        means.append([f"{arm} ({rows[0].seeds})", *(_cell(row.metric, row.estimate) for row in rows)])
        means += _seeds(comparison.scores[arm], shown)
        if arm != comparison.baseline:
            differences.append([arm, *map(difference_cell, rows)])
            differences += _seeds(comparison.differences(arm), shown, signed=True)
    few = any(line[0].startswith(A_SEED) for line in (*means, *differences))
    seeds = f"{ENOUGH} seeds or more, else each seed" if few else "seeds"
    yield (
        f"Macro-averages over tasks with 95 % t intervals over {seeds}; scores in per cent, entropy in nats",
        ["arm (seeds)", *shown],
        means,
    )
    if any(row.difference for row in comparison.rows):
        yield (
            f"Differences from {comparison.baseline}, paired by seed, with 95 % t intervals and uncorrected p of "
            f"sign-flip tests over {seeds}",
            ["arm", *shown],
            differences,
        )


def _seeds(scores: dict[int, dict[str, float]], shown: Sequence[str], signed: bool = False) -> list[list[str]]:
    if not 1 < len(scores) < ENOUGH:
        return []
    return [
        [f"{A_SEED}{seed}", *(_cell(name, Estimate(values[name], math.nan, math.nan), signed) for name in shown)]
        for seed, values in sorted(scores.items())
    ]


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


def difference_cell(row: Row) -> str:
    """Return a difference with its interval and p-value, for which there may be too few seeds."""
    p = "" if math.isnan(row.p_value) else f", p {row.p_value:.2g}"
    return _cell(row.metric, row.difference, signed=True) + p


def _number(metric: str, value: float) -> str:
    """Return a score in per cent, but those of DIGITS as they are; a dash for NaN."""
    if math.isnan(value):
        return "-"
    return f"{value:.{DIGITS[metric]}f}" if metric in DIGITS else f"{100 * value:.1f}"


def _interval(metric: str, estimate: Estimate) -> str:
    """Return low-high, of a score in whole per cents: more would not fit 80 columns."""
    ends = (estimate.low, estimate.high)
    return "-".join(_number(metric, end) if metric in DIGITS else f"{100 * end:.0f}" for end in ends)
