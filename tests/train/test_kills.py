"""A run that is killed at random moments loses nothing that it said was saved, and goes on to the bit."""

import subprocess
import sys
from pathlib import Path


def test_two_kills():
    command = [sys.executable, "-m", "tests.train.kills", "--kills", "2"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert '"resumes_equal_to_the_bit": 2' in ended.stdout
