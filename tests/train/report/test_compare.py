"""Runs with known scores: what the comparison makes of them, what it writes, and what it refuses."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from train import made_runs
from train.made_runs import evaluation, write_run

from paec_kernels.train.report.compare import Comparison, compare, sort_arms
from paec_kernels.train.report.runs import Run, find_runs, read_run
from paec_kernels.train.report.tables import format_comparison, save, to_markdown


def many_seeds(folder: Path) -> list[Run]:
    """Five of each arm. mean@4: PAEC 0.625, 0.625, 0.5, 0.5, 0; GRPO 0.375 in each."""
    for seed, right in enumerate([(0.75, 0.5), (0.75, 0.5), (0.5, 0.5), (0.5, 0.5), (0.0, 0.0)]):
        write_run(folder / f"p{seed}", "paec", seed, right=right)
        write_run(folder / f"g{seed}", "grpo", seed, right=(0.5, 0.25))
    return [read_run(found) for found in find_runs([folder])]


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """mean@4: PAEC 0.625 and 0.625, GRPO 0.375 and 0.5; a third seed of PAEC has no GRPO beside it."""
    write_run(tmp_path / "p0", "paec", 0, right=(0.75, 0.5))
    write_run(tmp_path / "p1", "paec", 1, right=(0.75, 0.5))
    write_run(tmp_path / "p2", "paec", 2, right=(0.0, 0.0))
    write_run(tmp_path / "g1", "grpo", 1, right=(0.5, 0.5))
    write_run(tmp_path / "g0", "grpo", 0, right=(0.5, 0.25), entropy=[0.5] * 18 + [0.2, 0.1])
    return [read_run(folder) for folder in find_runs([tmp_path])]


def test_means_and_paired_differences(runs: list[Run]) -> None:
    found = compare(runs)
    assert found.arms == ["grpo", "paec"]
    assert found.metrics == [
        *("greedy", "mean@4", "maj@4", "pass@1", "pass@2", "pass@4", "distinct", "length"),
        *("training reward", "final entropy"),
    ]
    grpo, paec = found.row("grpo", "mean@4"), found.row("paec", "mean@4")
    assert (grpo.seeds, paec.seeds) == (2, 3)
    assert grpo.estimate.mean == pytest.approx(0.4375)
    assert paec.estimate.mean == pytest.approx((0.625 + 0.625 + 0) / 3)
    assert grpo.difference is None
    assert paec.difference is not None
    assert paec.difference == pytest.approx((0.1875, math.nan, math.nan), nan_ok=True)  # two seeds, no interval
    assert math.isnan(paec.p_value)
    assert [scores["mean@4"] for scores in found.differences("paec").values()] == pytest.approx([0.25, 0.125])


def test_intervals(tmp_path: Path) -> None:
    found = compare(many_seeds(tmp_path))
    paec = found.row("paec", "mean@4")
    # 0.25, 0.25, 0.125, 0.125, -0.375: mean 0.075, s / sqrt(5) = 0.11592, t of 0.975 at four degrees of freedom 2.776.
    assert paec.difference == pytest.approx((0.075, 0.075 - 2.776 * 0.11592, 0.075 + 2.776 * 0.11592), rel=1e-3)
    assert paec.p_value == 22 / 32  # sums of eighths below 3 are 1 and -1, five sign patterns each
    assert math.isnan(found.row("grpo", "mean@4").p_value)


def test_what_the_log_gives(runs: list[Run]) -> None:
    found = compare(runs)
    assert found.row("grpo", "final entropy").estimate.mean == pytest.approx((0.3 + (0.2 + 0.1) / 2) / 2)
    assert found.row("grpo", "training reward").estimate.mean == pytest.approx(0.5 + 0.01 * (1.5 + 10.5) / 2)


def test_without_the_baseline_there_are_no_differences(runs: list[Run]) -> None:
    found = compare([run for run in runs if run.arm == "paec"])
    assert [row.difference for row in found.rows] == [None] * len(found.rows)
    assert "Differences" not in to_markdown(found)
    assert len(format_comparison(found)) == 1


def test_arms_by_more_fields(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "paec", 0, method={"lam": 0.3})
    write_run(tmp_path / "b", "paec", 0, method={"lam": 1.0})
    fields = ("algo", "method.lam")
    runs = [read_run(tmp_path / name, arm_fields=fields) for name in "ab"]
    assert [run.arm for run in runs] == ["paec, method.lam=0.3", "paec, method.lam=1.0"]
    assert compare(runs, arm_fields=fields).differing == {}


def test_differing_configs_are_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "paec", 0, steps=200, method={"lam": 0.3})
    write_run(tmp_path / "b", "paec", 1, steps=200, method={"lam": 1.0})
    write_run(tmp_path / "c", "grpo", 0, steps=400, method={"clip_high": 0.28}, device="cuda")
    found = compare([read_run(tmp_path / name) for name in "abc"])
    assert found.differing == {"steps": [200, 400], "method.lam": [0.3, 1.0, None]}
    assert "The runs also differ in `method.lam` (0.3, 1.0, None); `steps` (200, 400)." in to_markdown(found)


def test_the_order_of_arms() -> None:
    arms = ["siren", "zeta", "paec", "grpo", "paec-no-mask", "paec", "alpha"]
    assert sort_arms(arms) == ["grpo", "paec", "paec-no-mask", "siren", "alpha", "zeta"]


def test_files(runs: list[Run], tmp_path: Path) -> None:
    found = compare(runs)
    names = ["comparison.json", "comparison.md", "comparison.csv", "runs.csv"]
    assert save(found, runs, tmp_path / "out") == [tmp_path / "out" / name for name in names]

    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (row,) = [r for r in document["rows"] if (r["arm"], r["metric"]) == ("paec", "mean@4")]
    assert row["difference"]["mean"] == pytest.approx(0.1875)
    assert {run["folder"] for run in document["runs"]} == {str(tmp_path / n) for n in ("g0", "g1", "p0", "p1", "p2")}

    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = {(line["arm"], line["metric"]): line for line in csv.DictReader(file)}
    assert float(rows["paec", "mean@4"]["difference_mean"]) == pytest.approx(0.1875)
    assert rows["grpo", "mean@4"]["difference_mean"] == rows["paec", "mean@4"]["p_value"] == ""
    assert rows["paec", "mean@4"]["seeds"] == "3"

    with (tmp_path / "out" / "runs.csv").open() as file:
        raw = {(r["arm"], r["seed"], r["task"], r["metric"]): float(r["value"]) for r in csv.DictReader(file)}
    assert raw["grpo", "0", "task0", "mean@4"] == 0.5
    assert raw["grpo", "0", "task1", "mean@4"] == 0.25
    assert raw["grpo", "0", "macro", "mean@4"] == pytest.approx(0.375)
    assert raw["grpo", "0", "", "final entropy"] == pytest.approx(0.15)


def test_one_seed_is_written_without_intervals(runs: list[Run], tmp_path: Path) -> None:
    found = compare([run for run in runs if run.seed == 0])
    assert math.isnan(found.row("paec", "mean@4").estimate.low)
    save(found, runs, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "comparison.json").read_text())
    (row,) = [r for r in document["rows"] if (r["arm"], r["metric"]) == ("paec", "mean@4")]
    assert row["estimate"] == {"mean": 0.625, "low": None, "high": None}
    assert "nan" not in (tmp_path / "out" / "comparison.csv").read_text()
    assert "| paec (1) | 70.0 | 62.5 |" in (tmp_path / "out" / "comparison.md").read_text()


def test_tables(runs: list[Run]) -> None:
    lines = to_markdown(compare(runs)).splitlines()
    header = "| arm (seeds) | greedy | mean@4 | maj@4 | pass@4 | distinct | length | training reward | final entropy |"
    assert lines[2] == header
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")] == [
        *("| arm (seeds)", "| ---", "| grpo (2)", "| · seed 0", "| · seed 1"),
        *("| paec (3)", "| · seed 0", "| · seed 1", "| · seed 2"),
        *("| arm", "| ---", "| paec", "| · seed 0", "| · seed 1"),  # the third seed of PAEC has no GRPO beside it
    ]
    of_seed_1 = [line for line in lines if line.startswith("| · seed 1 |")]
    assert [line.split(" | ")[2] for line in of_seed_1] == ["50.0", "62.5", "+12.5"]
    assert "±" not in "".join(lines)


def test_tables_of_enough_seeds(tmp_path: Path) -> None:
    text = to_markdown(compare(many_seeds(tmp_path)))
    paec = next(line for line in text.splitlines() if line.startswith("| paec (5) |"))
    assert "| 45.0 ± 32.2 |" in paec  # 2.776 * 0.2592 / sqrt(5)
    assert "| +7.5 ± 32.2, p 0.69 |" in text
    assert "seed 0" not in text


@pytest.mark.parametrize("width", [80, 60, 30])
@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_every_number_fits(tmp_path: Path, width: int, seeds: int) -> None:
    for seed in range(seeds):
        write_run(tmp_path / f"g{seed}", "grpo", seed, evaluated=evaluation((1.0, 1.0), samples=16), entropy=[0.5])
        write_run(tmp_path / f"p{seed}", "paec-no-penalty", seed, evaluated=evaluation((seed % 2, 0), samples=16))
    found = compare([read_run(folder) for folder in find_runs([tmp_path])])
    console = Console(width=width)
    with console.capture() as capture:
        console.print(*format_comparison(found))
    printed = capture.get()
    assert all(len(line) <= width for line in printed.splitlines())
    assert "…" not in printed
    cells = [
        cell.replace(",", "").split()
        for line in to_markdown(found).splitlines()
        for cell in line.strip("| ").split(" | ")[1:]
    ]
    numbers = [number for cell in cells for number in cell if number[-1:].isdigit() and "@" not in number]
    lines = {1: 3, 2: 6 + 3, 5: 3}[seeds]  # of arms and seeds; five seeds have intervals and p, further numbers
    assert len([number for number in numbers if number in printed.split()]) == len(numbers) >= 8 * lines


def test_runs_that_cannot_be_compared(tmp_path: Path, runs: list[Run]) -> None:
    with pytest.raises(ValueError, match="runs must be at least one"):
        compare([])
    with pytest.raises(ValueError, match=r"arm 'paec' must have one run with seed 0, got .*p0 and .*p0"):
        compare([*runs, read_run(tmp_path / "p0")])

    made = made_runs.evaluation((0.5, 0.25))
    results = made.tasks["task1"]
    for evaluated, message in (
        (made_runs.evaluation((0.5,)), r"alike: tasks is \['task0', 'task1'\] in .*, \['task0'\] in .*other"),
        (made_runs.evaluation((0.5, 0.25), samples=8), "alike: samples is 4 in .*, 8 in .*other"),
        (
            replace(made, tasks=made.tasks | {"task1": [replace(results[0], prompt="2?"), *results[1:]]}),
            "same problems: 'task1' has others in .* than in .*other",
        ),
    ):
        run = replace(runs[0], arm="cispo", folder=tmp_path / "other", seed=0, evaluation=evaluated)
        with pytest.raises(ValueError, match=message):
            compare([*runs, run])


def test_evaluations_may_be_seeded_as_their_runs_are(runs: list[Run]) -> None:
    assert {run.evaluation.settings.seed for run in runs} == {0, 1, 2}
    assert isinstance(compare(runs), Comparison)
