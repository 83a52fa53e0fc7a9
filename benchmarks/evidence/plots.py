"""A family's runs as pictures: where entropy goes, who finds what when, and maj@k; and all families side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.evidence import plan
from benchmarks.evidence.outcomes import Family
from paec_kernels.saved_state import whole_file
from paec_kernels.train.report.evaluate import pass_ks
from paec_kernels.train.report.plots import STYLES, Style, mean_with_band, smooth, styles
from paec_kernels.train.report.statistics import CONFIDENCE, PairedComparison
from paec_kernels.train.tasks.long_families import LONG_FAMILIES
from paec_kernels.train.tasks.task import FORK, FREE, STEP

LEGIBLE = 8  # arms of a panel
PANELS = {FORK: "At forks", STEP: "At steps (logarithmic)", FREE: "At harmless choices"}
# Arms that are one of ALGORITHMS with other options.
OWN: dict[str, Style] = {
    "paec-positions": {"color": "#1f9e89", "lw": 2.6, "ls": "-"},
    "paec-scores": {"color": "#1f9e89", "lw": 1.4, "ls": (0, (3, 1.5))},
    "paec-integral": {"color": "#8a5a2b", "lw": 1.4, "ls": "-"},
    "paec-sharp-mask": {"color": "#b58ad6", "lw": 1.4, "ls": "-"},
    "paec-proportional": {"color": "#8a5a2b", "lw": 1.4, "ls": (0, (3, 1.5))},
    "paec-relative": {"color": "#8a5a2b", "lw": 1.4, "ls": (0, (1, 1))},
    "paec-batch-anchor": {"color": "#c2528b", "lw": 1.4, "ls": (0, (3, 1.5))},
}


def groups_of(arms: Sequence[str]) -> list[list[str]]:
    """Return the arms of each picture: those of the planned comparisons first, and the baseline in all."""
    others = [arm for arm in dict.fromkeys([*plan.PLANNED_ARMS, *arms]) if arm in arms and arm != plan.BASELINE]
    return [[plan.BASELINE, *others[i : i + LEGIBLE - 1]] for i in range(0, max(1, len(others)), LEGIBLE - 1)]


def entropy(family: Family, arms: Sequence[str]) -> Figure:
    """Draw the entropy at the places of each role over the batches."""
    roles = [role for role in PANELS if role in LONG_FAMILIES[family.name].roles]
    figure, panels = panels_of(4.3 * len(roles) + 2.2, len(roles))
    window = max(1, family.batches // 40)
    for axes, role in zip(panels, roles, strict=True):
        means = []
        for arm, style in _styles(arms).items():
            columns = [smooth(run.curves[role], window) for run in family.runs[arm].values()]
            mean, low, high = mean_with_band(columns)
            batches = np.arange(1, len(mean) + 1)
            if arm in plan.PLANNED_ARMS:  # more bands would hide each other
                axes.fill_between(batches, low, high, color=style["color"], alpha=0.1, lw=0)
            axes.plot(batches, mean, label=arm, **style)
            means.append(mean)
        axes.set(title=PANELS[role], xlabel=f"batch (running mean of {window})", ylim=(0, 1.1 * np.nanmax(means)))
        if role == STEP:  # there a policy that breaks down has a hundred times the entropy of one that does not
            axes.set(yscale="log", ylim=(0.8 * np.nanmin(means), 1.2 * np.nanmax(means)))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.minorticks_off()
        axes.margins(x=0)
    panels[0].set_ylabel("entropy, nats")
    legend_of(
        figure,
        f"{family.name}: entropy, mean over {len(family.seeds)} seeds; of planned arms with {100 * CONFIDENCE:g} % t "
        "intervals",
    )
    return figure


def outcomes(family: Family, arms: Sequence[str]) -> Figure:
    """Draw the share of runs that have discovered by a batch, and the majority vote against its number of votes."""
    figure, (found, votes) = panels_of(11, 2)
    ks = pass_ks(family.samples)
    batches = np.arange(1, family.batches + 1)
    for arm, style in _styles(arms).items():
        runs = [run.scores for run in family.runs[arm].values()]
        by_batch = np.array([run["discovery"] for run in runs])[:, None] <= batches
        found.step(batches, 100 * by_batch.mean(0), where="post", label=arm, **style)
        votes.plot(ks, [100 * np.mean([run[f"maj@{k}"] for run in runs]) for k in ks], marker="o", ms=3.5, **style)
    found.set(title="Runs that have discovered", xlabel="batch", ylabel="per cent of the seeds", ylim=(-3, 103))
    found.margins(x=0)
    votes.set_xscale("log", base=2)
    votes.set_xticks(ks, [str(k) for k in ks])
    votes.minorticks_off()
    votes.set(title="Majority vote after training", xlabel="votes k", ylabel="maj@k, per cent")
    legend_of(figure, f"{family.name}: means over {len(family.seeds)} seeds")
    return figure


def summary(families: Sequence[Family], pooled: Sequence[PairedComparison]) -> Figure:
    """Draw each arm's difference from the baseline in the primary outcome: of each family, and of all together."""
    rows = [row for row in pooled if row.outcome == plan.PRIMARY and row.baseline == plan.BASELINE]
    figure, (axes,) = panels_of(8.5, 1, 1.5 + 0.8 * len(rows))
    style = STYLES | OWN | styles([row.arm for row in rows if row.arm not in STYLES | OWN])
    for y, row in enumerate(rows):
        color = style[row.arm]["color"]
        for place, family in enumerate(families):
            base = family.scores[plan.BASELINE]
            own = family.scores[row.arm]
            difference = np.mean([own[seed][plan.PRIMARY] - base[seed][plan.PRIMARY] for seed in own])
            lower = y + 0.15 + 0.55 * place / len(families)
            axes.plot(100 * difference, lower, "o", color=color, alpha=0.5, ms=4, mew=0)
            axes.annotate(
                family.name, (100 * difference, lower), (4, -2), textcoords="offset points", size=5, color=color
            )
        mean, low, high = (100 * value for value in row.difference)
        axes.plot([low, high], [y, y], color=color, lw=2)
        axes.plot(mean, y, "o", color=color, ms=8, mec="white")
        axes.annotate(f"{mean:+.1f}", (mean, y), (0, 6), textcoords="offset points", ha="center", size=8, color=color)
    axes.axvline(0, color="#1a1a1a", lw=1)
    axes.set_yticks(range(len(rows)), [row.arm for row in rows])
    axes.set_ylim(len(rows) - 0.2, -0.6)
    axes.set_xlabel("percentage points; small: single families")
    axes.set_title(f"{plan.PRIMARY}: difference from {plan.BASELINE}, paired by seed", loc="left", size=11)
    return figure


def _styles(arms: Sequence[str]) -> dict[str, Style]:
    return {arm: OWN.get(arm) or style for arm, style in styles(arms).items()}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all, without what would make two of the same rows differ."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})


def panels_of(width: float, count: int, height: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False).flat)
    for axes in panels:
        axes.grid(color="#e4e4e8", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def legend_of(figure: Figure, title: str) -> None:
    """Write the title, and the arms to the right of the axes."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=3)
