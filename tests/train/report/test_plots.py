"""What the pictures draw; how they look was looked at."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from train.made_runs import write_run

from paec_kernels.train.report import plots
from paec_kernels.train.report.compare import compare, run_scores
from paec_kernels.train.report.runs import Run, read_run

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


def drawn(axes, arm: str) -> list[tuple[list[float], list[float]]]:
    """Return x and y of each line in the arm's colour."""
    lines = [line for line in axes.lines if line.get_color() == plots.STYLES[arm]["color"]]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in lines]


def test_entropy_over_the_steps_that_all_seeds_have(runs: list[Run]) -> None:
    figure = plots.entropy_figure(runs)
    all_tokens, selected = figure.axes
    (line,) = drawn(all_tokens, "grpo")
    assert line == ([1, 2, 3], pytest.approx([0.5, 0.3, 0.2]))
    line, floor = drawn(selected, "paec")
    assert line == ([1, 2, 3], pytest.approx([1.5, 1.5, 1.5]))
    assert floor == ([1, 2, 3], pytest.approx([NAN, 1.3, 1.3], nan_ok=True))
    assert "floor" in selected.get_title()
    assert [text.get_text() for text in figure.legends[0].texts] == ["grpo", "paec"]


def test_arms_that_select_nothing_are_left_out(runs: list[Run]) -> None:
    for run in runs:
        if run.arm == "grpo":
            run.log["selected_entropy"][:] = NAN
        run.log["floor"][:] = NAN
    _, selected = plots.entropy_figure(runs).axes
    assert (len(drawn(selected, "grpo")), len(drawn(selected, "paec"))) == (0, 1)
    assert "floor" not in selected.get_title()


def test_the_axis_spans_the_runs_however_wide_the_bands(runs: list[Run]) -> None:
    all_tokens, _ = plots.entropy_figure(runs).axes
    assert all_tokens.get_ylim() == pytest.approx((0.1 - 0.025, 0.6 + 0.025))


def test_bands_are_t_intervals() -> None:
    mean, low, high = plots.mean_with_band([np.array([x, 2.0]) for x in (0.0, 1.0, 2.0, 3.0, 4.0)])
    assert mean.tolist() == [2.0, 2.0]
    assert (high - low).tolist() == pytest.approx([2 * 2.776 / math.sqrt(2), 0.0], rel=1e-3)
    assert np.isnan(plots.mean_with_band([np.array([1.0, 2.0])] * 4)[1]).all()


def thin(axes, arm: str) -> list[list[list[float]]]:
    """Return the points of each seed's line in the arm's colour."""
    color = to_rgb(plots.STYLES[arm]["color"])
    of_arm = [
        found
        for found in axes.collections
        if isinstance(found, LineCollection) and to_rgb(found.get_color()[0]) == color
    ]
    return [segment.tolist() for found in of_arm for segment in found.get_segments()]


def test_few_seeds_are_each_shown(runs: list[Run]) -> None:
    found = compare(runs)
    all_tokens, _ = plots.entropy_figure(runs).axes
    assert thin(all_tokens, "grpo") == [[[1, 0.5], [2, 0.2], [3, 0.1]], [[1, 0.5], [2, 0.4], [3, 0.3]]]
    (reward,) = plots.reward_figure(runs).axes
    assert len(thin(reward, "paec")) == 2
    (passes,) = plots.pass_at_k_figure(found, runs).axes
    for line, run in zip(thin(passes, "paec"), runs[2:], strict=True):
        assert [y for _, y in line] == [pytest.approx(100 * run_scores(run)[f"pass@{k}"]) for k in (1, 2, 4)]
    _, differences = plots.majority_vote_figure(found, runs).axes
    single, _, mean = drawn(differences, "paec")
    assert len(single[0]) == 2
    assert np.mean(single[0]) == pytest.approx(mean[0][0])
    assert not thin(plots.reward_figure(runs[:1]).axes[0], "grpo")  # one seed is its own mean


def test_enough_seeds_have_bands_instead(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / str(seed), "paec", seed)) for seed in range(5)]
    for figure in (plots.entropy_figure(runs), plots.reward_figure(runs), plots.pass_at_k_figure(compare(runs), runs)):
        assert not thin(figure.axes[0], "paec")
        assert figure.axes[0].collections


def test_axes_stay_within_what_can_be(tmp_path: Path) -> None:
    """Scores near both ends, with few seeds and with wide intervals."""
    runs = []
    for seed in range(6):
        for arm, right in (("grpo", (0.0, 0.0)), ("paec", (1.0, float(seed > 0)))):
            runs.append(read_run(write_run(tmp_path / f"{arm}{seed}", arm, seed, right=right, entropy=(0.0, 0.01))))
            runs[-1].log["reward"][:] = right
    for chosen in (runs[:4], runs):
        found = compare(chosen)
        for figure in (
            plots.entropy_figure(chosen),
            plots.reward_figure(chosen),
            plots.pass_at_k_figure(found, chosen),
        ):
            top = {"nats": math.inf, "per cent": 100.0}.get(figure.axes[0].get_ylabel(), 1.0)
            for axes in figure.axes:
                bottom_of_axes, top_of_axes = axes.get_ylim()
                assert 0 <= bottom_of_axes < top_of_axes <= top
        votes, differences = plots.majority_vote_figure(found, chosen).axes
        assert votes.get_xlim()[0] >= 0
        assert votes.get_xlim()[1] <= 100
        assert differences.get_xlim()[0] >= -100
        assert differences.get_xlim()[1] <= 100


def test_the_vote_is_that_of_the_comparison(runs: list[Run]) -> None:
    votes, differences = plots.majority_vote_figure(compare(runs), runs).axes
    single, interval, mean = drawn(votes, "paec")
    found = compare(runs).row("paec", "maj@4")
    assert mean[0] == [pytest.approx(100 * found.estimate.mean)]
    assert np.isnan(interval[0]).all()
    assert np.mean(single[0]) == pytest.approx(mean[0][0])
    assert drawn(differences, "paec")[-1][0] == [pytest.approx(100 * found.difference.mean)]
    assert len(plots.majority_vote_figure(compare(runs[2:]), runs[2:]).axes) == 1  # no baseline, no differences


def test_pass_at_k(runs: list[Run]) -> None:
    found = compare(runs)
    (axes,) = plots.pass_at_k_figure(found, runs).axes
    (line,) = drawn(axes, "grpo")
    assert line == ([1, 2, 4], [pytest.approx(100 * found.row("grpo", f"pass@{k}").estimate.mean) for k in (1, 2, 4)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 4])
def test_files(runs: list[Run], tmp_path: Path, n: int) -> None:
    paths = plots.save_plots(compare(runs[-n:]), runs[-n:], tmp_path / "out")
    names = ["entropy.png", "reward.png", "majority_vote.png", "pass_at_k.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_arms_keep_their_colours() -> None:
    assert plots.styles(["grpo", "paec"])["paec"] == plots.styles(["paec"])["paec"] == plots.STYLES["paec"]
    new = plots.styles([f"paec, lam={i}" for i in range(5)])
    assert len({style["color"] for style in new.values()}) == 5
    assert len({style["color"] for style in plots.STYLES.values()}) == len(plots.STYLES)


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
