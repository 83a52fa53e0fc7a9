"""TRL's own tests of GRPOTrainer pass with PAECGRPOTrainer wherever they pass with the stock trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")

from integrations import trl_own_tests

TESTS = Path(__file__).parents[1]
REPOSITORY = os.environ.get("TRL_REPOSITORY", "")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not REPOSITORY, reason="no copy of TRL's repository at hand, which TRL_REPOSITORY would name")
def test_what_passes_with_the_stock_trainer_passes_with_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "integrations.trl_own_tests", str(Path(REPOSITORY).resolve())],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_that_shows_too_little_fails() -> None:
    found = {
        "models_not_made": {}, "pytest_status": {"stock": 1, "ours": 0}, "tests": 8, "passed_by_stock": 3,
        "passed_by_stock_alone": {}, "skipped": {"a": "", "b": ""},
    }  # fmt: skip
    assert trl_own_tests.shortcomings(found) == []
    for worse, text in (
        ({"pytest_status": {"stock": 0, "ours": 5}}, "pytest ended with status 5 with the trainer ours"),
        ({"passed_by_stock": 2}, "the stock trainer passed 2 of the 6 tests that were not skipped"),
        ({"tests": 2, "passed_by_stock": 0}, "the stock trainer passed 0 of the 0 tests that were not skipped"),
        ({"models_not_made": {"gemma": "OSError"}}, "1 models were not made"),
        ({"passed_by_stock_alone": {"c": "ValueError"}}, "1 tests passed with the stock trainer alone"),
    ):
        assert trl_own_tests.shortcomings(found | worse) == [text]
