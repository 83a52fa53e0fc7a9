"""The files in bench_results/rlvr are made from the runs published with them, and its page says what the files say."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from paec_kernels.train.report.compare import Comparison, compare, run_scores
from paec_kernels.train.report.runs import Run, find_runs, read_run
from paec_kernels.train.report.statistics import (
    batches_to_discovery,
    holm,
    paired_differences,
    sign_flip_test,
    t_interval,
)
from paec_kernels.train.report.tables import _cell, difference_cell, save

PUBLISHED = Path(__file__).parents[2] / "bench_results" / "rlvr"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(PUBLISHED / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return [read_run(run) for run in find_runs([Path("runs")])]


@pytest.fixture(scope="module")
def comparison(runs: list[Run]) -> Comparison:
    return compare(runs)


def test_the_files_are_those_of_the_runs(folder: Path, comparison: Comparison, runs: list[Run]) -> None:
    for path in save(comparison, runs, folder / "out"):
        assert path.read_text() == (PUBLISHED / path.name).read_text(), path.name


def claims(comparison: Comparison, runs: list[Run]) -> Iterator[str]:
    """Yield the page's phrases with figures, one space between words, made from the runs."""
    config = runs[0].config
    assert {(run.config["steps"], run.config["updates"], run.config["temperature"]) for run in runs} == {(200, 2, 1.0)}
    assert runs[0].evaluation.settings.temperature == 1.0
    seeds = {comparison.row(arm, "greedy").seeds for arm in comparison.arms}
    assert (len(comparison.arms), seeds, len(config["tasks"])) == (10, {8}, 5)  # in words on the page
    batch = f"{config['steps']} batches of {config['prompts']} prompts with {config['answers']} answers each"
    yield f"{batch}, {config['updates']} optimiser steps a batch."
    yield f"{config['steps']} batches is about when"
    yield f"shortly before batch {config['steps']}"
    yield "Reward is 1 for a right answer, else 0."
    settings = runs[0].evaluation.settings
    yield f"{settings.problems} problems of each task that training never sees, each with a greedy answer and "
    yield f"{settings.samples} samples at temperature {settings.temperature:g}."
    yield "95 % t interval"  # the comparison's own
    yield f"of the {2 ** max(seeds)} ways"

    routeless = [run for run in runs if run_scores(run)["length"] < 10]
    by_arm = {arm: sum(run.arm == arm for run in routeless) for arm in comparison.arms}
    counts = ", ".join(f"{arm} {count}" for arm, count in by_arm.items() if count)
    yield f"shorter than 10 tokens on average): {counts}, of {seeds.pop()} each."

    for level in (0.7, 0.8):
        sooner = {}
        for arm in ("grpo", "paec", "paec-no-mask", "paec-no-penalty"):
            rewards = {run.seed: run.log["reward"] for run in runs if run.arm == arm}
            sooner[arm] = {seed: batches_to_discovery(values, level, 10) for seed, values in rewards.items()}
        told = []
        for arm in list(sooner)[1:]:
            batches = paired_differences(sooner[arm], sooner["grpo"])
            told.append(f"`{arm}` {batches.mean():.1f}, p {sign_flip_test(batches):.2g}")
        yield f"At {level}: {'; '.join(told)}."

    shown = [name for name in comparison.metrics if name not in ("pass@1", "pass@2", "pass@4", "pass@8")]
    found: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.metric in shown and row.p_value <= 0.05:
            found.setdefault(row.arm, []).append(f"{row.metric} {difference_cell(row)}")
    n_differences = len(shown) * (len(comparison.arms) - 1)
    yield f"p of 0.05 at most, {sum(map(len, found.values()))} of the {n_differences} in the table: "
    yield " ".join(f"- `{arm}`: {'; '.join(cells)}" for arm, cells in found.items()) + " ##"
    yield f"of {n_differences} that hold nothing but noise a few would have p of 0.05 at most."
    for name in shown:  # "nine" on the page is one fewer than the arms
        adjusted = holm({row.arm: row.p_value for row in comparison.rows if row.metric == name and row.difference})
        assert min(adjusted.values()) > 0.05
    yield "no p is 0.05 or less"

    difference = comparison.row("paec", "maj@16").difference
    assert difference.low < 0 < difference.high
    yield f"The interval includes 0, and p is {comparison.row('paec', 'maj@16').p_value:.2g}."
    votes = {arm: {run.seed: run_scores(run)["maj@16"] for run in runs if run.arm == arm} for arm in ("paec", "grpo")}
    differences = {seed: votes["paec"][seed] - votes["grpo"][seed] for seed in votes["grpo"]}
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] > 0.5 * sum(differences.values())
    assert ("grpo", worst) in {(run.arm, run.seed) for run in routeless}
    del votes["paec"][worst]
    without = t_interval(paired_differences(votes["paec"], votes["grpo"]))
    assert without.high - without.low < 0.5 * (difference.high - difference.low)
    yield f"without seed {worst} it is {_cell('maj@16', without, signed=True)}."


def test_the_page_says_what_the_files_say(comparison: Comparison, runs: list[Run]) -> None:
    page = (PUBLISHED / "README.md").read_text()
    tables = [line for line in (PUBLISHED / "comparison.md").read_text().splitlines() if line.startswith("|")]
    assert len(tables) == 2 * 2 + 10 + 9
    assert [line for line in page.splitlines() if line.startswith("|")] == tables

    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    prose = " ".join(line for line in prose.splitlines() if not line.startswith("|"))
    prose = " ".join(prose.split())
    prose = prose.replace("Commit 23f862a, 2026-11-24, torch 2.13.0 on a CPU.", "")  # known to no file
    for claim in claims(comparison, runs):
        assert claim in prose
        prose = prose.replace(claim, "")
    assert re.findall(r"\d\S*", prose) == []  # no figure is typed by hand
