"""The rows as pictures, each readable by itself: titled with device, shapes, commit and date."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.floors import LINEAR, ON_LOGITS
from benchmarks.rows import Row, only, plain, shape, span_of_dates

OURS = ("#1f5fa8", "#6aa5e0", "#7fd0d8")
COLOURS = ("#d1662b", "#3a8f5c", "#8a5fb0", "#b8912a", "#b0446a", "#4a4a55", "#7a7a85", "#a86b4a")
PASS_STYLE = {"forward": "-", "backward": "--"}


Plot = Callable[[list[Row]], Figure | None]  # of rows with a number, one or more


def share_against_v(rows: list[Row]) -> Figure:
    def draw(axes: Axes, own: list[Row]) -> None:
        for name in _contenders(rows):
            for passes, style in PASS_STYLE.items():
                line = [(r.v, 100 * r.share) for r in only(own, implementation=name, passes=passes)]
                _line(axes, line, name, rows, style, name if passes == "forward" else None)
        axes.set_ylim(bottom=0)

    legend_title = "solid: forward / read\ndashed: backward / copy"
    return _against_v(rows, draw, "Bandwidth share against V", "share of measured bandwidth, %", legend_title)


def memory_against_v(rows: list[Row]) -> Figure | None:
    rows = [row for row in rows if row.peak_bytes is not None and row.passes == "both"]
    if not rows:
        return None

    def draw(axes: Axes, own: list[Row]) -> None:
        for name in _contenders(rows):
            line = [(r.v, r.peak_bytes / 2**20) for r in only(own, implementation=name)]
            _line(axes, line, name, rows, "-", name)
        logits = {row.v: row.bytes / 3 / 2**20 for row in own}
        axes.plot(*zip(*sorted(logits.items()), strict=True), ":", color="black", label="the logits themselves")
        axes.set_yscale("log")
        _plain_log_ticks(axes)

    title = "Peak memory of forward and backward against V"
    return _against_v(rows, draw, title, "peak memory beyond the logits, MiB")


def _against_v(
    rows: list[Row], draw: Callable[[Axes, list[Row]], None], title: str, y_label: str, legend_title: str = ""
) -> Figure:
    """Draw a panel for each dtype, from its rows."""
    dtypes = _in_order(row.dtype for row in rows)
    figure, panels = _figure(5.2 * len(dtypes) + 2.2, 4.6, len(dtypes))
    for axes, dtype in zip(panels, dtypes, strict=True):
        own = only(rows, dtype=dtype)
        draw(axes, own)
        axes.set_xscale("log")
        _thousands(axes, sorted({row.v for row in rows}))
        axes.set(xlabel="vocabulary V", title=f"{dtype}, N = {_range(row.n for row in own)}")
    panels[0].set_ylabel(y_label)
    _legend(figure, panels, legend_title)
    _title(figure, title, rows)
    return figure


def time_against_n(rows: list[Row]) -> Figure:
    figure, (axes,) = _figure(8.4, 4.8, 1)
    rows = only(rows, passes="both")
    for name in (ON_LOGITS, *_contenders(rows)):
        _line(axes, [(r.n, 1e3 * r.p50) for r in only(rows, implementation=name)], name, rows, "-", name)
    axes.set(xscale="log", yscale="log", xlabel="rows N", ylabel="forward and backward, ms")
    _plain_log_ticks(axes)
    _thousands(axes, sorted({row.n for row in rows}))
    _legend(figure, [axes])
    _title(figure, f"Time against N, V = {_range(row.v for row in rows)}, {rows[0].dtype}", rows)
    return figure


def bars(rows: list[Row]) -> Figure:
    """Stack forward and backward; draw a way that has only a forward pass, or one that cannot be split, as one bar."""
    names = sorted(_in_order(row.implementation for row in rows), key=lambda name: -_total(rows, name))
    figure, (axes,) = _figure(9.5, 1.6 + 0.42 * len(names), 1)
    for y, name in enumerate(names):
        own = {row.passes: row for row in only(rows, implementation=name)}
        colour = _colour(name, rows)
        end = 1e3 * _total(rows, name)
        if "forward" in own and "backward" in own:
            forward, backward = (1e3 * own[passes].p50 for passes in ("forward", "backward"))
            axes.barh(y, forward, color=colour)
            axes.barh(y, backward, left=forward, color=colour, alpha=0.45)
            end = max(end, forward + backward)  # medians need not add up
        else:
            axes.barh(y, end, color=colour, hatch="//", edgecolor="white", lw=0)
        only_pass = "" if "both" in own else " (forward only)"
        axes.text(end, y, f"  {plain(1e3 * _total(rows, name))}{only_pass}", va="center", size=9)
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.14)
    axes.set_xlabel("ms (dark: forward, light: backward, hatched: one number for both)")
    _title(figure, f"{'From hidden states' if rows[0].d else 'From logits'}: {shape(rows[0])}", rows)
    return figure


def _total(rows: list[Row], name: str) -> float:
    """Add up the seconds of both passes, or take the forward pass' where there is no other."""
    own = {row.passes: row.p50 for row in only(rows, implementation=name)}
    return own.get("both", own.get("forward"))


def _contenders(rows: list[Row]) -> list[str]:
    return [name for name in _in_order(row.implementation for row in rows) if name not in (ON_LOGITS, LINEAR)]


def _colour(name: str, rows: list[Row]) -> str:
    contenders = _contenders(rows)
    if name not in contenders:
        return "black"
    ours = "token_stats" in name
    colours = OURS if ours else COLOURS
    alike = [other for other in contenders if ("token_stats" in other) is ours]
    return colours[alike.index(name) % len(colours)]


def _line(axes: Axes, points: list[tuple[float, float]], name: str, rows: list[Row], style: str, label) -> None:
    if points:
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", ms=4, color=_colour(name, rows), label=label)


def _figure(width: float, height: float, n_panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, n_panels, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, which="major")
        axes.set_axisbelow(True)
    return figure, panels


def _legend(figure: Figure, panels: list[Axes], title: str = "") -> None:
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, alignment="left",
        fontsize=9, title=title, title_fontsize=9,
    )  # fmt: skip


def _thousands(axes: Axes, ticks: list[int]) -> None:
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=35, ha="right", size=8)
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _title(figure: Figure, what: str, rows: list[Row]) -> None:
    devices, commits = (sorted({getattr(row, name) for row in rows}) for name in ("device", "commit"))
    origin = f"{', '.join(devices)}; commit {', '.join(commits)}; {span_of_dates(rows)}"
    figure.suptitle(f"{what}\n{origin}", x=0.01, ha="left", fontsize=11)


def _in_order(values) -> list[str]:
    return list(dict.fromkeys(values))


def _range(values) -> str:
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"
