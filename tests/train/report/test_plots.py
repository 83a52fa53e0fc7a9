"""What the pictures draw; how they look was looked at."""

import math
from pathlib import Path

import numpy as np
import pytest
from train.made_runs import write_run

from paec_kernels.train.report import plots
from paec_kernels.train.report.compare import compare
from paec_kernels.train.run_folder import Run, read_run

NAN = math.nan


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    folders = [
        write_run(tmp_path / "g0", "grpo", 0, entropy=(0.5, 0.2, 0.1)),
        write_run(tmp_path / "g1", "grpo", 1, entropy=(0.5, 0.4, 0.3, 0.2)),  # one step further
        write_run(tmp_path / "p0", "paec", 0, entropy=(0.5, 0.5, 0.4), floor=1.2),
        write_run(tmp_path / "p1", "paec", 1, entropy=(0.5, 0.5, 0.6), floor=1.4, right=(1.0, 0.5)),
    ]
    return [read_run(folder) for folder in folders]


def drawn(axes, colour: str) -> list[tuple[list[float], list[float]]]:
    """x and y of each line inside the axes in that colour."""
    lines = [line for line in axes.lines if line.get_color() == colour and line.get_transform() != axes.transAxes]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in lines]


def test_entropy_over_the_steps_that_all_seeds_have(runs: list[Run]) -> None:
    all_tokens, selected = plots.entropy_figure(runs).axes
    (line,) = drawn(all_tokens, plots.STYLES["grpo"].colour)
    assert line == ([1, 2, 3], pytest.approx([0.5, 0.3, 0.2]))
    line, floor = drawn(selected, plots.STYLES["paec"].colour)
    assert line == ([1, 2, 3], pytest.approx([1.5, 1.5, 1.5]))
    assert floor == ([1, 2, 3], pytest.approx([NAN, 1.3, 1.3], nan_ok=True))
    assert "floor" in selected.get_title()
    assert {text.get_text() for text in selected.texts} == {"grpo", "paec"}


def test_arms_that_select_nothing_are_left_out(runs: list[Run]) -> None:
    for run in runs:
        if run.arm == "grpo":
            run.log["selected_entropy"][:] = NAN
        run.log["floor"][:] = NAN
    _, selected = plots.entropy_figure(runs).axes
    assert [text.get_text() for text in selected.texts] == ["paec"]
    assert "floor" not in selected.get_title()


def test_the_axis_spans_the_runs_however_wide_the_bands(runs: list[Run]) -> None:
    all_tokens, _ = plots.entropy_figure(runs).axes
    assert all_tokens.get_ylim() == pytest.approx((0.1 - 0.025, 0.6 + 0.025))


def test_bands_are_t_intervals() -> None:
    mean, low, high = plots.mean_with_band([np.array([1.0, 2.0]), np.array([3.0, 2.0])])
    assert mean.tolist() == [2.0, 2.0]
    assert (high - low).tolist() == pytest.approx([2 * 12.706, 0.0], rel=1e-4)
    assert np.isnan(plots.mean_with_band([np.array([1.0, 2.0])])[1]).all()


def test_the_vote_is_that_of_the_comparison(runs: list[Run]) -> None:
    votes, differences = plots.majority_vote_figure(compare(runs), runs).axes
    single, interval, mean = drawn(votes, plots.STYLES["paec"].colour)
    found = compare(runs).row("paec", "maj@4")
    assert mean[0] == [pytest.approx(100 * found.estimate.mean)]
    assert interval[0] == pytest.approx([100 * found.estimate.low, 100 * found.estimate.high])
    assert np.mean(single[0]) == pytest.approx(mean[0][0])
    assert drawn(differences, plots.STYLES["paec"].colour)[-1][0] == [pytest.approx(100 * found.difference.mean)]
    assert len(plots.majority_vote_figure(compare(runs[2:]), runs[2:]).axes) == 1  # no baseline, no differences


def test_pass_at_k_and_the_operators_share(runs: list[Run]) -> None:
    found = compare(runs)
    (axes,) = plots.pass_at_k_figure(found, runs).axes
    (line,) = drawn(axes, plots.STYLES["grpo"].colour)
    assert line == ([1, 2, 4], [pytest.approx(100 * found.row("grpo", f"pass@{k}").estimate.mean) for k in (1, 2, 4)])
    (axes,) = plots.operator_share_figure(found, runs).axes
    assert [patch.get_width() for patch in axes.patches] == [25.0, 25.0]
    assert axes.texts[0].get_text() == "25.0 %, 500.0 ms a step"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 4])
def test_files(runs: list[Run], tmp_path: Path, n: int) -> None:
    paths = plots.save_plots(compare(runs[-n:]), runs[-n:], tmp_path / "out")
    names = ["entropy.png", "reward.png", "majority_vote.png", "pass_at_k.png", "operator_share.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_arms_keep_their_colours() -> None:
    assert plots.styles(["grpo", "paec"])["paec"] == plots.styles(["paec"])["paec"] == plots.STYLES["paec"]
    new = plots.styles([f"paec, lam={i}" for i in range(5)])
    assert len({style.colour for style in new.values()}) == 5
    assert len({style.colour for style in plots.STYLES.values()}) == len(plots.STYLES)


@pytest.mark.parametrize(
    ("values", "window", "expected"),
    [
        ([1.0, 2.0, 3.0, 7.0], 1, [1.0, 2.0, 3.0, 7.0]),
        ([1.0, 2.0, 3.0, 7.0], 2, [1.0, 1.5, 2.5, 5.0]),
        ([NAN, NAN, 3.0, 7.0, 9.0], 2, [NAN, NAN, 3.0, 5.0, 8.0]),
    ],
)
def test_smooth(values: list[float], window: int, expected: list[float]) -> None:
    np.testing.assert_allclose(plots.smooth(np.array(values), window), expected)


@pytest.mark.parametrize(
    ("wanted", "gap", "expected"),
    [
        ([0.5, 0.1], 0.1, [0.5, 0.1]),  # room enough
        ([0.5, 0.5, 0.5], 0.1, [0.4, 0.5, 0.6]),
        ([0.5, 0.52, 0.9], 0.1, [0.46, 0.56, 0.9]),
        ([0.0, 0.0, 1.0], 0.1, [0.0, 0.1, 1.0]),
        ([1.2, 1.1], 0.1, [1.0, 0.9]),
        ([0.0] * 5, 0.5, [0.0, 0.25, 0.5, 0.75, 1.0]),  # too little room: the gap shrinks
        ([], 0.1, []),
    ],
)
def test_spread(wanted: list[float], gap: float, expected: list[float]) -> None:
    assert plots.spread(wanted, gap, 0.0, 1.0) == pytest.approx(expected)
