"""The comparison's pictures: what happened over the steps, and what came of it."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paec_kernels.saved_state import whole_file
from paec_kernels.train.report.compare import Comparison, run_scores, sort_arms
from paec_kernels.train.report.evaluate import pass_ks
from paec_kernels.train.report.metrics import Estimate, t_interval
from paec_kernels.train.run_folder import Run


class Style(NamedTuple):
    colour: str
    dashes: tuple[float, ...] = ()  # lengths of dash and gap in line widths; () is a solid line
    width: float = 1.4


# The arms that the question is about stand out; PAEC's ablations share its hue, and dashes tell them apart.
STYLES = {
    "grpo": Style("#1a1a1a", width=2.2),
    "global": Style("#7f7f7f", (4, 1.5)),
    "paec": Style("#d1410c", width=2.6),
    "paec-no-mask": Style("#ef8a3c", (5, 1.5)),
    "paec-no-penalty": Style("#b8860b", (2, 1)),
    "cispo": Style("#1f77b4"),
    "clip-cov": Style("#2a9d8f"),
    "kl-cov": Style("#6aa84f", (6, 1.5)),
    "aer": Style("#8e44ad"),
    "siren": Style("#d672b0", (6, 1.5)),
}
OTHERS = ("#3b5b92", "#9c6b4e", "#5f9ea0", "#a0a03c", "#c06080")
GRID = "#e4e4e8"


def save_plots(comparison: Comparison, runs: Sequence[Run], out: Path) -> list[Path]:
    """entropy.png, reward.png, majority_vote.png, pass_at_k.png and operator_share.png in ``out``.

    Lines are means over seeds; bands, and the bars of points, 95 % t intervals.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "entropy": entropy_figure(runs),
        "reward": reward_figure(runs),
        "majority_vote": majority_vote_figure(comparison, runs),
        "pass_at_k": pass_at_k_figure(comparison, runs),
        "operator_share": operator_share_figure(comparison, runs),
    }
    paths = []
    for name, figure in figures.items():
        path = out / f"{name}.png"
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=130, format="png")
        paths.append(path)
    return paths


def styles(arms: Sequence[str]) -> dict[str, Style]:
    """Each arm's own, whichever arms are beside it; arms without one get the other colours in turn."""
    others = cycle(OTHERS)
    return {arm: STYLES.get(arm) or Style(next(others)) for arm in arms}


def mean_with_band(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high at each step, [steps] each, of runs' columns [steps]; the band is NaN with one run."""
    estimates = [t_interval(values) for values in np.array(columns).T]
    mean, low, high = np.array(estimates).T
    return mean, low, high


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of up to ``window`` values up to and with each; NaN is left out, and stays where all are NaN."""
    known = ~np.isnan(values)
    totals = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    totals[window:] -= totals[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to the wanted ones (least squares) that keep their order, are at least ``gap`` apart, and lie
    inside low..high; where that has too little room, the gap shrinks."""
    n = len(wanted)
    gap = min(gap, (high - low) / max(1, n - 1))
    order = np.argsort(wanted, kind="stable")
    # With i * gap taken off, places must only not decrease: isotonic regression, by pooling neighbours that do.
    pools: list[tuple[float, int]] = []  # mean, members
    for i, value in enumerate(np.asarray(wanted, dtype=float)[order]):
        mean, count = float(value) - i * gap, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    pooled = np.repeat([mean for mean, _ in pools], [count for _, count in pools])
    places = np.empty(n)
    places[order] = np.clip(pooled, low, high - (n - 1) * gap) + gap * np.arange(n)
    return places.tolist()


def entropy_figure(runs: Sequence[Run]) -> Figure:
    """Of all tokens, and of the selected positions with the floor of each arm that has one."""
    figure = Figure(figsize=(12.5, 5), layout="constrained")
    all_tokens, selected = figure.subplots(1, 2)
    _over_steps(all_tokens, runs, "entropy")
    all_tokens.set(title="All tokens, mean entropy", ylabel="nats")
    drawn = _over_steps(selected, runs, "selected_entropy")
    has_floor = False
    for arm, style in drawn.items():
        steps, floors = _aligned([run for run in runs if run.arm == arm], "floor")
        has_floor |= not np.isnan(floors).all()
        selected.plot(steps, floors.mean(axis=0), color=style.colour, lw=1.3, ls=(0, (1, 1.5)))
    title = "Selected positions, mean entropy"
    selected.set(title=f"{title} (dotted: its floor)" if has_floor else title)
    return figure


def reward_figure(runs: Sequence[Run]) -> Figure:
    """Over the steps."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    _over_steps(axes, runs, "reward")
    axes.set(title="Reward in training", ylabel="share of sampled answers that are right")
    return figure


def _over_steps(axes: Axes, runs: Sequence[Run], column: str) -> dict[str, Style]:
    """A line for each arm, named at its end; the arms' styles, without those that have no such column."""
    lines = {}
    drawn = {}
    seen: list[np.ndarray] = []
    window = 1
    for arm, style in styles(sort_arms(run.arm for run in runs)).items():
        steps, values = _aligned([run for run in runs if run.arm == arm], column)
        if np.isnan(values).all():
            continue
        window = max(1, len(steps) // 40)
        smoothed = [smooth(row, window) for row in values]
        seen += smoothed
        mean, low, high = mean_with_band(smoothed)
        axes.fill_between(steps, low, high, color=style.colour, alpha=_band_alpha(runs), lw=0)
        axes.plot(steps, mean, color=style.colour, lw=style.width, ls=(0, style.dashes) if style.dashes else "-")
        lines[arm] = float(mean[-1])
        drawn[arm] = style
    if seen:
        # The axis spans the runs: with two or three seeds a t interval is many times as wide.
        low, high = np.nanmin(seen), np.nanmax(seen)
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
    _label_ends(axes, lines, drawn)
    axes.set_xlabel("step" if window == 1 else f"step (running mean of {window})")
    _plain(axes)
    return drawn


def _aligned(runs: Sequence[Run], column: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that all runs have, [steps], and the runs' values there, [runs, steps]."""
    n_steps = min(len(run.log["step"]) for run in runs)
    return runs[0].log["step"][:n_steps], np.array([run.log[column][:n_steps] for run in runs])


def _label_ends(axes: Axes, ends: dict[str, float], of_arms: dict[str, Style]) -> None:
    """Each line's name to the right of the axes, joined to the line's end where names had to move apart."""
    axes.margins(x=0)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    fractions = [(y - low) / (high - low) for y in ends.values()]
    for arm, fraction, place in zip(ends, fractions, spread(fractions, 0.05, 0.0, 1.0), strict=True):
        style = of_arms[arm]
        x = (1.004, 1.034)
        axes.plot(x, (fraction, place), color=style.colour, lw=0.8, transform=axes.transAxes, clip_on=False)
        weight = "bold" if style.width > 2 else "normal"
        axes.text(1.042, place, arm, color=style.colour, weight=weight, va="center", transform=axes.transAxes)


def majority_vote_figure(comparison: Comparison, runs: Sequence[Run]) -> Figure:
    """Each arm's, with its single runs, and beside it the differences from the baseline where there are any."""
    (metric,) = [name for name in comparison.metrics if name.startswith("maj@")]
    has_differences = any(row.difference for row in comparison.rows)
    figure = Figure(figsize=(12.5 if has_differences else 7, 1.4 + 0.4 * len(comparison.arms)), layout="constrained")
    panels = figure.subplots(1, 1 + has_differences, sharey=True, squeeze=False)[0]
    per_run = {arm: [100 * run_scores(run)[metric] for run in runs if run.arm == arm] for arm in comparison.arms}
    _points(panels[0], comparison.arms, lambda arm: comparison.row(arm, metric).estimate, per_run)
    panels[0].set(title=f"{metric}, macro-average; small: single runs", xlabel="per cent")
    if has_differences:
        _points(panels[1], comparison.arms, lambda arm: comparison.row(arm, metric).difference, {})
        panels[1].axvline(0, color=STYLES["grpo"].colour, lw=1)
        panels[1].set(title=f"Difference from {comparison.baseline}, paired by seed", xlabel="percentage points")
    return figure


def _points(
    axes: Axes, arms: Sequence[str], estimate_of: Callable[[str], Estimate | None], per_run: dict[str, list[float]]
) -> None:
    """An arm a line: the mean with its interval, in per cent, and the single runs behind it."""
    for y, (arm, style) in enumerate(styles(arms).items()):
        single = per_run.get(arm, [])
        axes.plot(single, [y + 0.2] * len(single), "o", color=style.colour, alpha=0.45, ms=4, mew=0)
        estimate = estimate_of(arm)
        if estimate is None:
            continue
        mean, low, high = (100 * value for value in estimate)
        axes.plot([low, high], [y, y], color=style.colour, lw=2)
        axes.plot([mean], [y], "o", color=style.colour, ms=8, mec="white")
        axes.annotate(
            f"{mean:.1f}", (mean, y), xytext=(0, 6), textcoords="offset points", ha="center", size=8, color=style.colour
        )
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    _plain(axes)


def pass_at_k_figure(comparison: Comparison, runs: Sequence[Run]) -> Figure:
    """Against k."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    ks = pass_ks(runs[0].evaluation.settings.samples)
    of_arms = styles(comparison.arms)
    ends = {}
    for arm, style in of_arms.items():
        mean, low, high = 100 * np.array([comparison.row(arm, f"pass@{k}").estimate for k in ks]).T
        axes.fill_between(ks, low, high, color=style.colour, alpha=_band_alpha(runs), lw=0)
        dashes = (0, style.dashes) if style.dashes else "-"
        axes.plot(ks, mean, color=style.colour, lw=style.width, ls=dashes, marker="o", ms=3.5)
        ends[arm] = float(mean[-1])
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    _label_ends(axes, ends, of_arms)
    axes.set(title="pass@k, macro-average", xlabel="k", ylabel="per cent")
    _plain(axes)
    return figure


def operator_share_figure(comparison: Comparison, runs: Sequence[Run]) -> Figure:
    """Of the steps' time, the mean over runs."""
    figure = Figure(figsize=(7.5, 1.4 + 0.34 * len(comparison.arms)), layout="constrained")
    axes = figure.subplots()
    for y, (arm, style) in enumerate(styles(comparison.arms).items()):
        share = 100 * comparison.row(arm, "operator share").estimate.mean
        seconds = np.mean([run.log["operator_seconds"].mean() for run in runs if run.arm == arm])
        axes.barh(y, share, color=style.colour, height=0.62)
        axes.annotate(
            f"{share:.1f} %, {_seconds(seconds)} a step",
            (share, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=9,
        )
    axes.set_yticks(range(len(comparison.arms)), comparison.arms)
    axes.set_ylim(len(comparison.arms) - 0.5, -0.5)
    axes.set_xlim(0, 1.45 * axes.get_xlim()[1])
    axes.set(title="Time in the operator, forward and backward", xlabel="per cent of a step's time")
    _plain(axes, "x")
    return figure


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _band_alpha(runs: Sequence[Run]) -> float:
    return 0.18 if len({run.arm for run in runs}) <= 4 else 0.08  # many bands lie on each other


def _plain(axes: Axes, grid: Literal["both", "x"] = "both") -> None:
    axes.grid(axis=grid, color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
