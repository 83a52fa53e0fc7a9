"""One row a measurement, in files of JSON lines: what the page and the plots are made from, and nothing else."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "bench_results"
PASSES = ("forward", "backward", "both")
RESULT = ("ok", "wrong")
STATUSES = (*RESULT, "missing", "skipped", "failed")


@dataclass(frozen=True)
class Row:
    """Seconds are of one pass; ``reason`` says why there are none.

    Attributes:
        passes: "forward", "backward" or "both"; "step" for a whole optimiser step.
        bytes: that the operation cannot avoid: logits read once forward, read once and their gradient written once
            backward. None for the linear form, whose floor is four products.
        operations: floating-point ones of the four products; None on logits.
        share: of the floor in the same turns: its seconds / these, the median over the turns. On logits the floor
            reads (forward) or copies (backward) a tensor of their size; of the linear form it is the bare products.
        relative: seconds / those of ``anchor`` in the same turns, the median over the turns.
        peak_bytes: beyond the inputs, in forward and backward together; of the linear form also beyond gradients.
        value_error, gradient_error: largest against float64 before anything was timed; in nats, and relative to the
            largest entry of the gradient.
        nucleus: sizes in the rows that were checked: median and largest.
    """

    section: str
    implementation: str
    source: str
    passes: str
    n: int
    v: int
    d: int
    dtype: str
    logits: str
    device: str
    command: str
    commit: str
    date: str
    versions: dict[str, str]
    status: str = "ok"
    reason: str = ""
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    turns: int = 0
    bytes: int | None = None
    bandwidth: float | None = None
    operations: int | None = None
    share: float | None = None
    anchor: str | None = None
    relative: float | None = None
    peak_bytes: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None
    nucleus: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        numbers = ("p20", "p50", "p80", "bandwidth", "share", "relative", "peak_bytes")
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")
        if self.status == "ok" and self.p50 is None:
            raise ValueError("a row that is ok has a time")
        if self.status != "ok" and any(getattr(self, name) is not None for name in numbers):
            raise ValueError(f"a row that is {self.status} has no number")
        if (self.status == "ok") == bool(self.reason):
            raise ValueError(f"status {self.status!r} with reason {self.reason!r}")


def times_of(seconds: list[float]) -> dict[str, Any]:
    """Sum up the turns, one time of each, in a row's fields."""
    p20, p50, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    return {"p20": p20, "p50": p50, "p80": p80, "turns": len(seconds)}


def median_ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios within each turn."""
    return median(a / b for a, b in zip(above, below, strict=True))


def plain(value: float) -> str:
    """Write three digits or more, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shape(row: Row) -> str:
    width = f", D = {row.d:,}" if row.d else ""
    return f"N = {row.n:,}, V = {row.v:,}{width}, {row.dtype}, {row.logits}"


def span_of_dates(rows: Iterable[Row]) -> str:
    dates = sorted({row.date for row in rows})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


class RowFile:
    """A section's file. Each row is on disk before the next is made, whatever comes then.

    It is begun anew with the first row that holds a result; rows without one wait until then, so that a sweep that
    comes too late for a section, or fails in it, leaves what an earlier one measured.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[Row] = []
        self._begun = False

    def write(self, row: Row) -> None:
        self._waiting.append(row)
        if self._begun or row.status in RESULT:
            self._flush()

    def close(self) -> None:
        """End the sweep: rows without a result are better than no file."""
        if self._waiting and not self._path.exists():
            self._flush()

    def _flush(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a" if self._begun else "w") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in self._waiting)
        self._begun, self._waiting = True, []


def path_of(folder: Path, device: str, section: str) -> Path:
    return folder / device / f"{section}.jsonl"


def read(path: Path) -> list[Row]:
    """Read the rows of a file; none where there is no file."""
    if not path.exists():
        return []
    return [_row(json.loads(line)) for line in path.read_text().splitlines()]


def _row(found: dict[str, Any]) -> Row:
    names = {field.name for field in fields(Row)}
    if set(found) != names:
        raise ValueError(f"a row with other fields than today's: {sorted(set(found) ^ names)}")
    return Row(**{**found, "nucleus": None if found["nucleus"] is None else tuple(found["nucleus"])})


def grouped(rows: Iterable[Row], *names: str) -> list[list[Row]]:
    """Split the rows by the values of these fields, in the order in which they come first."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return list(groups.values())


def only(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Pick the rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
