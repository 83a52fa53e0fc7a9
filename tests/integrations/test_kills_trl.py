"""PAECGRPOTrainer is killed while it writes checkpoints, and goes on as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_kills() -> None:
    """In a process of its own, which may fork."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "integrations.kills_trl", "--kills", "2", "--seed", "0"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout[done.stdout.rindex("\n{\n") :])
    assert record["kills"] == record["kills_while_a_checkpoint_was_written"] == record["resumes_equal_to_the_bit"] == 2
    assert record["steps_said_saved"] > 0
    assert record["steps_lost_that_were_said_saved"] == 0
