"""TRL's own tests of GRPOTrainer pass with PAECGRPOTrainer wherever they pass with the stock trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")

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
    assert done.returncode == 0, done.stdout
