"""The tables in bench_results/rlvr and in the README are those of the runs that are published with them."""

import tarfile
from pathlib import Path

import pytest

from paec_kernels.train.report import tables
from paec_kernels.train.report.compare import compare
from paec_kernels.train.run_folder import find_runs, read_run

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "bench_results" / "rlvr"


@pytest.fixture(scope="module")
def made_again(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    with tarfile.open(PUBLISHED / "runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    runs = [read_run(run) for run in find_runs([folder / "runs"])]
    tables.save(compare(runs), runs, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", ["comparison.md", "comparison.csv", "runs.csv"])
def test_the_tables_are_those_of_the_runs(made_again, name):
    assert (made_again / name).read_text() == (PUBLISHED / name).read_text()


def test_the_readme_holds_the_same_tables():
    tables = [line for line in (PUBLISHED / "comparison.md").read_text().splitlines() if line.startswith("|")]
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(tables) == 2 * 2 + 10 + 9
    assert [line for line in tables if line not in readme] == []
