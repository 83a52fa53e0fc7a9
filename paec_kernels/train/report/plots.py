"""The comparison's pictures: what happened over the steps, and what came of it."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from paec_kernels.extras import extra
from paec_kernels.saved_state import whole_file
from paec_kernels.train.report.compare import Comparison, run_scores, sort_arms
from paec_kernels.train.report.evaluate import pass_ks
from paec_kernels.train.report.runs import Run
from paec_kernels.train.report.statistics import ENOUGH, Estimate, t_interval

with extra("train"):
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

Style = dict[str, Any]  # matplotlib's options of a line


def _style(color: str, *dashes: float, lw: float = 1.4) -> Style:
    return {"color": color, "lw": lw, "ls": (0, dashes) if dashes else "-"}


# The arms that the question is about stand out; PAEC's ablations share its hue, and dashes tell them apart.
STYLES = {
    "grpo": _style("#1a1a1a", lw=2.2),
    "global": _style("#7f7f7f", 4, 1.5),
    "paec": _style("#d1410c", lw=2.6),
    "paec-no-mask": _style("#ef8a3c", 5, 1.5),
    "paec-no-penalty": _style("#b8860b", 2, 1),
    "paec-hard-mask": _style("#a3542b", 1, 1),
    "oracle": _style("#3d3d8f", 6, 1.5),
    "cispo": _style("#1f77b4"),
    "clip-cov": _style("#2a9d8f"),
    "kl-cov": _style("#6aa84f", 6, 1.5),
    "aer": _style("#8e44ad"),
    "siren": _style("#d672b0", 6, 1.5),
}
OTHERS = ("#3b5b92", "#9c6b4e", "#5f9ea0", "#a0a03c", "#c06080")  # in turn, for arms without a style


def save_plots(comparison: Comparison, runs: Sequence[Run], out: Path) -> list[Path]:
    """Draw entropy.png, reward.png, majority_vote.png and pass_at_k.png in ``out``.

    Lines are means over seeds; bands, and the bars of points, 95 % t intervals. With fewer than ENOUGH seeds there are
    none, and each seed has a thin line or a small point of its own. No axis goes beyond what its quantity can be.
    """
    figures = {
        "entropy": entropy_figure(runs),
        "reward": reward_figure(runs),
        "majority_vote": majority_vote_figure(comparison, runs),
        "pass_at_k": pass_at_k_figure(comparison, runs),
    }
    for name, figure in figures.items():
        with whole_file(out / f"{name}.png") as partial:
            figure.savefig(partial, dpi=130, format="png")
    return [out / f"{name}.png" for name in figures]


def styles(arms: Sequence[str]) -> dict[str, Style]:
    """Return each arm's own style, whichever arms are beside it; arms without one get the other colours in turn."""
    others = cycle(OTHERS)
    return {arm: STYLES.get(arm) or _style(next(others)) for arm in arms}


def mean_with_band(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, low and high at each step, [steps] each, of runs' columns [steps]; few runs have NaN for a band."""
    mean, low, high = np.array([t_interval(values) for values in np.array(columns).T]).T
    return mean, low, high


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of up to ``window`` values up to and with each; NaN is left out, and stays where all are NaN."""
    known = ~np.isnan(values)
    totals, counts = (np.convolve(x, np.ones(window))[: len(values)] for x in (np.where(known, values, 0.0), known))
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def entropy_figure(runs: Sequence[Run]) -> Figure:
    """Draw the entropy of all tokens, and that of the selected positions with each arm's floor, over the steps."""
    figure = Figure(figsize=(12.5, 5), layout="constrained")
    all_tokens, selected = figure.subplots(1, 2)
    _over_steps(all_tokens, runs, "entropy")
    _over_steps(selected, runs, "selected_entropy")
    all_tokens.set(title="All tokens, mean entropy", ylabel="nats")
    for axes in (all_tokens, selected):
        _within(axes, "y", 0, np.inf)
    title = "Selected positions, mean entropy"
    for arm, style in styles(sort_arms(run.arm for run in runs)).items():
        steps, floors = _aligned([run for run in runs if run.arm == arm], "floor")
        floors[floors == 0] = np.nan  # not set yet
        if not np.isnan(floors).all():
            selected.plot(steps, floors.mean(axis=0), color=style["color"], lw=1.3, ls=":")
            title = "Selected positions, mean entropy (dotted: its floor)"
    selected.set(title=title)
    _legend(figure)
    return figure


def reward_figure(runs: Sequence[Run]) -> Figure:
    """Draw the training's reward over the steps."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    _over_steps(axes, runs, "reward")
    axes.set(title="Reward in training", ylabel="share of sampled answers that are right")
    _within(axes, "y", 0, 1)
    _legend(figure)
    return figure


def majority_vote_figure(comparison: Comparison, runs: Sequence[Run]) -> Figure:
    """Draw each arm's majority vote with its single runs, and the differences from the baseline if there are any."""
    (metric,) = [name for name in comparison.metrics if name.startswith("maj@")]
    has_differences = any(row.difference for row in comparison.rows)
    figure = Figure(figsize=(12.5 if has_differences else 7, 1.4 + 0.4 * len(comparison.arms)), layout="constrained")
    panels = figure.subplots(1, 1 + has_differences, sharey=True, squeeze=False)[0]
    for y, (arm, style) in enumerate(styles(comparison.arms).items()):
        single = [100 * run_scores(run)[metric] for run in runs if run.arm == arm]
        _small_points(panels[0], single, y, style)
    _points(panels[0], comparison.arms, lambda arm: comparison.row(arm, metric).estimate)
    panels[0].set(title=f"{metric}, macro-average; small: single runs", xlabel="per cent")
    _within(panels[0], "x", 0, 100)
    if has_differences:
        for y, (arm, style) in enumerate(styles(comparison.arms).items()):
            single = [100 * scores[metric] for scores in comparison.differences(arm).values()]
            if arm != comparison.baseline and len(single) < ENOUGH:
                _small_points(panels[1], single, y, style)
        _points(panels[1], comparison.arms, lambda arm: comparison.row(arm, metric).difference)
        panels[1].axvline(0, color=STYLES["grpo"]["color"], lw=1)
        _within(panels[1], "x", -100, 100)
        panels[1].set(title=f"Difference from {comparison.baseline}, paired by seed", xlabel="percentage points")
    return figure


def pass_at_k_figure(comparison: Comparison, runs: Sequence[Run]) -> Figure:
    """Draw pass@k against k."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    ks = pass_ks(runs[0].evaluation.settings.samples)
    for arm, style in styles(comparison.arms).items():
        mean, low, high = 100 * np.array([comparison.row(arm, f"pass@{k}").estimate for k in ks]).T
        axes.fill_between(ks, low, high, color=style["color"], alpha=_band_alpha(runs), lw=0)
        _thin_lines(axes, ks, [[100 * s[f"pass@{k}"] for k in ks] for s in comparison.scores[arm].values()], style)
        axes.plot(ks, mean, label=arm, marker="o", ms=3.5, clip_on=False, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set(title="pass@k, macro-average", xlabel="k", ylabel="per cent")
    _within(axes, "y", 0, 100)
    _plain(axes)
    _legend(figure)
    return figure


def _over_steps(axes: Axes, runs: Sequence[Run], column: str) -> None:
    """Draw a line with its band for each arm that has such a column."""
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
        axes.fill_between(steps, low, high, color=style["color"], alpha=_band_alpha(runs), lw=0)
        _thin_lines(axes, steps, smoothed, style)
        axes.plot(steps, mean, label=arm, **style)
    if seen:
        # The axis spans the runs, however wide the bands are.
        bottom, top = np.nanmin(seen), np.nanmax(seen)
        margin = 0.05 * (top - bottom) or 0.05
        axes.set_ylim(bottom - margin, top + margin)
    axes.margins(x=0)
    axes.set_xlabel("step" if window == 1 else f"step (running mean of {window})")
    _plain(axes)


def _small_points(axes: Axes, values: Sequence[float], y: int, style: Style) -> None:
    """Draw single seeds below their arm's row."""
    axes.plot(values, [y + 0.2] * len(values), "o", color=style["color"], alpha=0.45, ms=4, mew=0, clip_on=False)


def _thin_lines(axes: Axes, x: ArrayLike, rows: Sequence[ArrayLike], style: Style) -> None:
    """Draw a line for each of several seeds that are too few for a band."""
    if 1 < len(rows) < ENOUGH:
        lines = [np.column_stack([x, row]) for row in rows]
        axes.add_collection(LineCollection(lines, colors=style["color"], linewidths=0.8, alpha=0.5))
        axes.autoscale_view()


def _within(axes: Axes, axis: str, low: float, high: float) -> None:
    """Cut the axis at the least and the largest value that what it shows can have."""
    bottom, top = getattr(axes, f"get_{axis}lim")()
    getattr(axes, f"set_{axis}lim")(max(bottom, low), min(top, high))


def _aligned(runs: Sequence[Run], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that all runs have, [steps], and the runs' values there, [runs, steps]."""
    n_steps = min(len(run.log["step"]) for run in runs)
    return runs[0].log["step"][:n_steps], np.array([run.log[column][:n_steps] for run in runs])


def _points(axes: Axes, arms: Sequence[str], estimate_of: Callable[[str], Estimate | None]) -> None:
    """Draw an arm a row: the mean with its interval, in per cent."""
    for y, (arm, style) in enumerate(styles(arms).items()):
        estimate = estimate_of(arm)
        if estimate is None:
            continue
        color = style["color"]
        mean, low, high = (100 * value for value in estimate)
        axes.plot([low, high], [y, y], color=color, lw=2)
        axes.plot([mean], [y], "o", color=color, ms=8, mec="white", clip_on=False)
        axes.annotate(f"{mean:.1f}", (mean, y), (0, 6), textcoords="offset points", ha="center", size=8, color=color)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.6)
    _plain(axes)


def _legend(figure: Figure) -> None:
    """Name the arms to the right of the axes."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, handlelength=3)


def _band_alpha(runs: Sequence[Run]) -> float:
    return 0.18 if len({run.arm for run in runs}) <= 4 else 0.08  # many bands lie on each other


def _plain(axes: Axes) -> None:
    axes.grid(color="#e4e4e8", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
