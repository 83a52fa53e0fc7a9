"""The report as a picture: some answers with their tokens on the soft mask's colours, and the figures."""

from pathlib import Path

from matplotlib import ft2font
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.patches import Rectangle

from paec_kernels.demo.report import Answer, Report
from paec_kernels.saved_state import whole_file

COLUMNS = 120  # characters in a line of answer text
MAX_LINES = 14
MASK_COLOURS = LinearSegmentedColormap.from_list("mask", ["#f1f1f4", "#ffd08a", "#ff8c00"])
MONOSPACE = "DejaVu Sans Mono"  # comes with matplotlib
OPERATOR, EAGER = "#2f6f9f", "#b8b8c0"


def save_png(report: Report, path: Path) -> None:
    """Whole or not at all, as the JSON file."""
    figure = Figure(figsize=(13, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1), squeeze=False).flat
    _answers(report, top.subplots())
    scatter, entropy, seconds, memory = bottom.subplots(1, 4, width_ratios=(1.5, 1, 1, 1))
    _scatter(report, scatter)
    _entropy(report, entropy)
    c = report.comparison
    size = f"{c.rows} x {c.vocab_size:,}, {c.dtype}"
    _bars(seconds, f"forward + backward\n{size}", "ms", 1e3 * c.eager.seconds, 1e3 * c.operator.seconds)
    _bars(
        memory,
        f"peak beyond the logits\n{size}",
        "MiB",
        c.eager.peak_bytes / 2**20,
        c.operator.peak_bytes / 2**20,
    )
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _answers(report: Report, axes: Axes) -> None:
    figure_width = axes.figure.get_figure(root=True).get_size_inches()[0]
    size = 0.93 * figure_width * 72 / COLUMNS / 0.602  # a character of the monospace font is 0.602 em wide
    row = 0
    for question, answer in _chosen(report):
        lines = _wrapped(answer)
        if row + 1 + len(lines) > MAX_LINES:
            continue
        verdict = "right" if answer.reward > 0 else "wrong"
        heading = f"{question}   {verdict}, advantage {answer.advantage:+.2f}"
        axes.text(0, row + 0.5, heading, size=size, weight="bold", va="center", parse_math=False)
        for y, line in enumerate(lines, start=row + 1):
            x = 0
            for token, mask in line:
                box = Rectangle((x, y + 0.06), len(token) - 0.1, 0.88, color=MASK_COLOURS(mask), lw=0)
                axes.add_patch(box)
                axes.text(x, y + 0.5, token, size=size, family=MONOSPACE, va="center", parse_math=False)
                x += len(token)
        row += 1 + len(lines)
    axes.set(xlim=(0, COLUMNS), ylim=(MAX_LINES, 0))
    axes.set_axis_off()
    axes.set_title(f"{report.model}: sampled tokens on their soft mask (pale 0, orange 1)", loc="left")


def _chosen(report: Report) -> list[tuple[str, Answer]]:
    """A right and a wrong answer to each question in turn, where there are both."""
    chosen = []
    for group in report.groups:
        for is_right in (True, False):
            found = [answer for answer in group.answers if (answer.reward > 0) == is_right]
            if found:
                chosen.append((group.question, max(found, key=lambda answer: len(answer.tokens))))
    return chosen


def _wrapped(answer: Answer) -> list[list[tuple[str, float]]]:
    """Lines of tokens with their masks."""
    lines: list[list[tuple[str, float]]] = [[]]
    column = 0
    for token, mask in zip(answer.tokens, answer.mask, strict=True):
        shown = _drawable(token.replace("\n", "↵").replace("<|im_end|>", "■"))
        if column + len(shown) > COLUMNS and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((shown, mask))
        column += len(shown)
    return lines


def _drawable(text: str) -> str:
    """Characters that the font lacks, as a box."""
    font = ft2font.FT2Font(findfont(FontProperties(family=MONOSPACE)))
    return "".join(c if font.get_char_index(ord(c)) else "□" for c in text)


def _scatter(report: Report, axes: Axes) -> None:
    answers = [answer for group in report.groups for answer in group.answers]
    points = axes.scatter(
        [v for a in answers for v in a.entropy],
        [v for a in answers for v in a.margin],
        c=[v for a in answers for v in a.mask],
        cmap=MASK_COLOURS,
        vmin=0,
        vmax=1,
        s=14,
        edgecolors="#80808a",
        linewidths=0.3,
    )
    axes.set(xlabel="entropy, nats", ylabel="top-two margin, nats", title=f"{report.batch.n_tokens} tokens")
    axes.figure.colorbar(points, ax=axes, label="soft mask")


def _entropy(report: Report, axes: Axes) -> None:
    before, after = report.batch.mean_entropy, report.batch_after.mean_entropy
    bars = axes.bar(["before", "after"], [before, after], color=OPERATOR, width=0.6)
    axes.bar_label(bars, fmt="%.3f")
    if report.batch_after.floor is not None:
        axes.axhline(report.batch_after.floor, color="#c03030", ls="--", lw=1.2)
        axes.text(0.5, report.batch_after.floor, "floor", color="#c03030", ha="center", va="bottom")
    axes.set(title="masked mean entropy", ylabel="nats", ylim=(0, 1.18 * max(before, after)))


def _bars(axes: Axes, title: str, unit: str, eager: float, operator: float) -> None:
    bars = axes.bar(["eager", "token_stats"], [eager, operator], color=[EAGER, OPERATOR], width=0.6)
    axes.bar_label(bars, fmt="%.0f")
    axes.set(title=title, ylabel=unit, ylim=(0, 1.12 * max(eager, operator)))
