"""Which runs of pytest interpret the kernels and which compile them, on a machine with a GPU (a pretended one)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PRETEND = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "a pretended GPU"
"""
TESTS = """
import os
import pytest

def test_plain():
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""

@pytest.mark.gpu
def test_compiled():
    assert os.environ["TRITON_INTERPRET"] == "0"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
"""


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ((), "1 passed, 1 skipped"),
        (("-m", "not gpu"), "1 passed, 1 deselected"),
        (("-m", "gpu"), "1 passed, 1 deselected"),
    ],
)
def test_only_a_run_of_the_gpu_tests_compiles(tmp_path, options, outcome):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    shutil.copy(Path(__file__).parents[1] / "pyproject.toml", tmp_path)
    (tmp_path / "pretend.py").write_text(PRETEND)
    (tmp_path / "test_these.py").write_text(TESTS)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")}
    command = [sys.executable, "-m", "pytest", "-p", "pretend", "-p", "no:xdist", *options, "test_these.py"]
    environment["PYTHONPATH"] = str(tmp_path)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome in run.stdout, run.stdout + run.stderr
