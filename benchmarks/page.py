"""`bench_results/README.md`, written from the rows alone: no figure on it is typed by hand.

python -m benchmarks.page      # again from the rows that are there, measuring nothing
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import cost_model, floors, plots
from benchmarks.implementations import STATISTICS
from benchmarks.rivals import all_implementations
from benchmarks.rows import PASSES, RESULTS, Row, grouped, only, path_of, plain, read, shape, span_of_dates

DEVICES = {"cuda": "On a GPU", "cpu": "On a CPU"}
CASE = ("n", "v", "d", "dtype", "logits")
COMMANDS = {"cuda": "make bench-gpu", "cpu": "make bench"}


def write(folder: Path = RESULTS) -> list[Path]:
    """Write the plots and the page, and return what was written."""
    rows = {device: {s: read(path_of(folder, device, s)) for s in SECTIONS} for device in DEVICES}
    drawn = [name for device, found in rows.items() for name in draw(found, folder / "plots", device)]
    compiled, predictions = (
        json.loads(path.read_text()) if path.exists() else None
        for path in (folder / "compiled_code.json", folder / "predictions.json")
    )
    page = folder / "README.md"
    page.write_text(text(rows, drawn, compiled, predictions))
    return [page, *(folder / "plots" / f"{name}.png" for name in drawn)]


def draw(rows: dict[str, list[Row]], folder: Path, device: str) -> list[str]:
    """Write ``<device>_<name>.png`` into ``folder`` for whatever there are rows of, and return these stems."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"{device}_{name}": figure for name, figure in figures(rows)}
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=130, metadata={"Software": None})
    return list(drawn)


def figures(rows: dict[str, list[Row]]) -> Iterator[tuple[str, plots.Figure]]:
    """Draw each section's plots. One for which no row has a number does not exist."""
    for section, (_, _, pictures) in SECTIONS.items():
        measured = only(rows.get(section, []), status="ok")
        for name, plot in pictures:
            figure = plot(measured) if measured else None
            if figure is not None:
                yield name, figure


def text(
    rows: dict[str, dict[str, list[Row]]],
    drawn: list[str],
    compiled: dict[str, Any] | None,
    predictions: dict[str, Any] | None,
) -> str:
    return "\n".join(
        [
            "# Measurements",
            "",
            "Written by `python -m benchmarks.sweep` from the rows in this folder, one JSON object a measurement;",
            "`python -m benchmarks.page` writes it again. Every implementation's outputs and gradients are held",
            "against float64 before it is timed, and one that is wrong, missing or skipped has a reason and no number.",
            "Implementations take turns with the floor in one process and the caches are flushed before each run.",
            "Times are medians (20th to 80th percentile); ratios and shares are medians over the turns. The share of",
            "bandwidth, of forward, backward and both, is that of reading or copying a tensor of the logits' size in",
            "the same turn. Peak memory is what forward and backward hold beyond the inputs: for logits with their",
            "gradient, for the linear form without the gradients of hidden states and head. Errors are the largest",
            "against float64, in nats, and of the gradient relative to its largest entry.",
            "",
            "## What each computes",
            "",
            *what_each_computes(),
            "",
            *(line for device in DEVICES for line in of_device(device, rows[device], drawn)),
            "## What the kernels compile to",
            "",
            *compiled_code(compiled),
            "",
            "## Predicted, and measured",
            "",
            *predicted(predictions, [row for section in ("vocabulary", "rows") for row in rows["cuda"][section]]),
            "",
        ]
    )


def what_each_computes() -> Iterator[str]:
    """Tabulate the implementations' own declarations."""
    yield from (
        "Gradient: through which of its outputs. A loss is GRPO's, of each token or the mean; its log-probabilities",
        "stay inside.",
        "",
    )
    heads = ["", "called as", *(name.replace("_", " ") for name in STATISTICS), "gradient", ""]
    yield from _header(heads)
    for i in all_implementations().values():
        cells = ["yes" if name in i.computes else "" for name in STATISTICS]
        gradient = ", ".join(name.replace("_", " ") for name in i.gradients) or "none"
        yield _cells([i.name, f"`{i.source}`", *cells, gradient, i.note])


def of_device(device: str, rows: dict[str, list[Row]], drawn: list[str]) -> Iterator[str]:
    yield from (f"## {DEVICES[device]}", "")
    if not any(rows.values()):
        yield from (f"**No row yet.** `{COMMANDS[device]}` fills these tables:", "")
        for section in SECTIONS.values():
            yield f"- {section.title}: empty"
        yield ""
        return
    for name, (title, table, pictures) in SECTIONS.items():
        yield from (f"### {title}", "")
        found = rows[name]
        if not found:
            yield from ("Empty: not measured yet.", "")
            continue
        yield from (origin(found), "")
        yield from table(found)
        for plot, _ in pictures:
            if f"{device}_{plot}" in drawn:
                yield from (f"![{plot.replace('_', ' ')}](plots/{device}_{plot}.png)", "")


def origin(rows: list[Row]) -> str:
    """Say where the figures come from: all that the section's rows tell of it."""
    versions = {name: version for row in rows for name, version in row.versions.items() if name != "machine"}
    return "  \n".join(
        [
            f"Device: {', '.join(sorted({row.device for row in rows}))}.",
            f"Command: {', '.join(f'`{c}`' for c in sorted({row.command for row in rows}))}.",
            f"Commit {', '.join(sorted({row.commit for row in rows}))}, {span_of_dates(rows)}.",
            f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        ]
    )


def comparison(rows: list[Row]) -> Iterator[str]:
    """Write a table for each case: one line an implementation, the floor first."""
    for own in grouped(rows, *CASE):
        sizes = next((row.nucleus for row in own if row.nucleus), None)
        nuclei = "" if sizes is None else f"; nuclei of {sizes[0]:,} tokens at the median, {sizes[1]:,} at most"
        yield from (f"{shape(own[0])}{nuclei}", "")
        anchor = next((row.anchor for row in own if row.anchor), None)
        floor = floors.name_of(own[0])
        heads = ["", "forward, ms", "backward, ms", "both, ms", f"times {anchor}"]
        yield from _header([*heads, f"both / {floor}" if own[0].d else "share of bandwidth", "peak, MiB", "error"])
        by_name = grouped(own, "implementation")
        for found in sorted(by_name, key=lambda found: (found[0].implementation != floor, _unmeasured(found))):
            yield _cells([found[0].implementation, *_of_implementation(found)])
        yield ""


def _of_implementation(rows: list[Row]) -> list[str]:
    by_pass = {row.passes: row for row in rows}
    if _unmeasured(rows):
        return [f"{rows[0].status}: {rows[0].reason}"] + 6 * [""]
    whole = by_pass["both"] if by_pass["both"].status == "ok" else by_pass["forward"]
    times = [milliseconds(by_pass[p]) for p in PASSES]
    share = ""
    if whole.anchor is None:  # the floor itself
        rates = [by_pass[p].operations / by_pass[p].p50 if whole.d else by_pass[p].bandwidth for p in by_pass]
        share = ", ".join(plain(rate / 1e9) for rate in rates) + (" G operations/s" if whole.d else " GB/s")
    elif whole.share is not None:
        share = times_over(1 / whole.share) if whole.d else ", ".join(percent(by_pass[p]) for p in by_pass)
    error = "" if whole.value_error is None else f"{whole.value_error:.0e}"
    if whole.gradient_error is not None:
        error += f", gradient {whole.gradient_error:.0e}"
    return [*times, times_over(whole.relative), share, mebibytes(whole), error]


def steps(rows: list[Row]) -> Iterator[str]:
    """Write a table for each case: one line a way to take the step."""
    for own in grouped(rows, *CASE):
        anchor = next((row.anchor for row in own if row.anchor), None)
        if own[0].n:
            yield from (f"{own[0].logits}; {own[0].n:,} answer tokens, V = {own[0].v:,}, {own[0].dtype}", "")
        yield from _header(["", "made of", "step, ms", f"times {anchor}", "error of the loss"])
        for row in own:
            error = "" if row.value_error is None else f"{row.value_error:.0e}"
            yield _cells([row.implementation, row.source, milliseconds(row), times_over(row.relative), error])
        yield ""


def sweep(rows: list[Row]) -> Iterator[str]:
    """Write one line for each case and implementation."""
    heads = ["N", "V", "dtype", "logits", "nuclei", "", "forward, ms", "backward, ms", "both, ms", "ratio"]
    yield from _header([*heads, "share of bandwidth", "peak, MiB"])
    for own in grouped(rows, *CASE, "implementation"):
        by_pass = {row.passes: row for row in own}
        row = by_pass["both"]
        sizes = "" if row.nucleus is None else f"{row.nucleus[0]:,}, {row.nucleus[1]:,}"
        where = [f"{row.n:,}", f"{row.v:,}", row.dtype, row.logits, sizes, row.implementation]
        if row.status != "ok":
            yield _cells([*where, f"{row.status}: {row.reason}"] + 5 * [""])
            continue
        times = [milliseconds(by_pass[p]) for p in PASSES]
        shares = f"{percent(by_pass['forward'])}, {percent(by_pass['backward'])}"
        yield _cells([*where, *times, times_over(row.relative), shares, mebibytes(row)])
    yield ""


class Section(NamedTuple):
    """Says how a section's rows are shown. What is measured for it is in `benchmarks.parts`."""

    title: str
    table: Callable[[list[Row]], Iterator[str]]
    pictures: tuple[tuple[str, plots.Plot], ...] = ()


SECTIONS = {
    "rivals": Section("From logits, beside everything else", comparison, (("time_of_rivals", plots.bars),)),
    "linear": Section("From hidden states, beside four bare products", comparison, (("time_of_linear", plots.bars),)),
    "step": Section("A whole optimiser step of the reference loop", steps),
    "trl": Section("An optimiser step in TRL", steps),
    "vocabulary": Section(
        "Against the vocabulary",
        sweep,
        (("share_against_v", plots.share_against_v), ("memory_against_v", plots.memory_against_v)),
    ),
    "rows": Section("Against the number of rows", sweep, (("time_against_n", plots.time_against_n),)),
    "kinds": Section("Kinds of logits, and what the nucleus costs", sweep),
}


def compiled_code(found: dict[str, Any] | None) -> Iterator[str]:
    """Read from machine code with no GPU."""
    if found is None:
        yield "Empty: `python -m benchmarks.compiled_code --out bench_results/compiled_code.json` fills it."
        return
    origin, loop, search = found["provenance"], found["main_loop"], found["nucleus_search"]
    yield from (
        "Compiled without a GPU, and read from the machine code: what the kernels ask for, not how fast they are.  ",
        f"Command: `{origin['command']}`. Commit {origin['commit']}, {origin['date']}; triton {origin['triton']}.",
        "",
        f"On sm_90 in bfloat16 the forward kernel's main loop is {loop['instructions']:.2f} instructions and "
        f"{loop['ex2']:g} ex2 an element; the nucleus search is {search['outside']:,} instructions a thread outside "
        f"its loop and {search['round']:,} in a round of it, in a program of {found['threads']} threads.",
        "",
    )
    yield from _header(["kernel", "target", "dtype", "softcap", "registers", "spills, bytes", "local, bytes"])
    for row in found["rows"]:
        kernel = row["kernel"] if row.get("aligned", True) else f"{row['kernel']}, unaligned rows"
        cells = [kernel, row["target"], row["dtype"], "yes" if row["softcap"] else ""]
        yield _cells([*cells, *(str(row[name]) for name in ("registers", "spills", "local"))])


def predicted(found: dict[str, Any] | None, rows: list[Row]) -> Iterator[str]:
    """Show the cost model's predictions, and beside each the time of the row of its case, where there is one."""
    if found is None:
        yield "Empty: `python -m benchmarks.compiled_code --model --out bench_results/predictions.json` fills it."
        return
    origin = found["provenance"]
    yield from (
        "Predictions of the cost model, `benchmarks/cost_model.py`, from the compiled kernels: **no measurement**.",
        "A cell is the time, the limit that binds and the share of a copy's bandwidth that this makes. Beside it",
        "stands, once it is measured, the median and its ratio to the prediction.  ",
        f"Command: `{origin['command']}`. Commit {origin['commit']}, {origin['date']}; triton {origin['triton']}.",
    )
    predictions = found["predictions"]
    kernels = list(dict.fromkeys(p["kernel"] for p in predictions))
    for device, dtype in dict.fromkeys((p["device"], p["dtype"]) for p in predictions):
        own = [p for p in predictions if (p["device"], p["dtype"]) == (device, dtype)]
        yield from ("", f"### {device}, {cost_model.TORCH_NAMES[dtype]}: predicted", "")
        yield from _header(["V", "N", *(f"{k}: {what}, ms" for k in kernels for what in ("predicted", "measured"))])
        for v, n in dict.fromkeys((p["v"], p["n"]) for p in own):
            cells = [cell for p in own if (p["v"], p["n"]) == (v, n) for cell in _beside(p, rows)]
            yield _cells([f"{v:,}", f"{n:,}", *cells])


def _beside(prediction: dict[str, Any], rows: list[Row]) -> tuple[str, str]:
    """Return the cells of a prediction and of its measurement."""
    implementation, passes = cost_model.MEASURED_AS[prediction["kernel"]]
    case = {"n": prediction["n"], "v": prediction["v"], "dtype": cost_model.TORCH_NAMES[prediction["dtype"]]}
    own = only(rows, implementation=implementation, passes=passes, logits="real", status="ok", **case)
    times = [row.p50 for row in own if prediction["device"] in row.device]
    ms, share = plain(1e3 * prediction["seconds"]), 100 * prediction["share"]
    measured = f"{plain(1e3 * times[0])}, times {times_over(times[0] / prediction['seconds'])}" if times else ""
    return f"{ms} ({prediction['limit']}, {share:.0f} %)", measured


def milliseconds(row: Row) -> str:
    if row.p50 is None:
        return row.reason
    return f"{plain(1e3 * row.p50)} ({plain(1e3 * row.p20)} to {plain(1e3 * row.p80)})"


def percent(row: Row) -> str:
    return "" if row.share is None else f"{100 * row.share:.3g} %"


def mebibytes(row: Row) -> str:
    return "" if row.peak_bytes is None else plain(row.peak_bytes / 2**20)


def times_over(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3g}"


def _unmeasured(rows: list[Row]) -> bool:
    return all(row.status != "ok" for row in rows)


def _header(names: list[str]) -> Iterator[str]:
    yield _cells(names)
    yield _cells(["---"] * len(names))


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    for path in write():
        print(f"wrote {path}")
