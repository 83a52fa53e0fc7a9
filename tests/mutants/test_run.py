"""What a run of pytest comes to where one of its processes dies."""

import sys

import pytest
from mutants.run import run_pytest


@pytest.mark.parametrize(
    ("where", "signal", "verdict"),
    [
        ("'PYTEST_XDIST_WORKER' in os.environ", "SIGKILL", "void"),  # as memory runs out, which it need not do again
        ("True", "SIGKILL", "void"),
        ("True", "SIGSEGV", "crashes"),
    ],
    ids=["killed once", "killed each time", "crashes"],
)
def test_a_worker_that_dies(tmp_path, monkeypatch, where, signal, verdict):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of the run that this test is in
    code = f"import os, signal\n\ndef test_it():\n    if {where}:\n        os.kill(os.getpid(), signal.{signal})\n"
    (tmp_path / "test_dies.py").write_text(code)
    outcome = run_pytest(tmp_path, sys.prefix, "-n", "1", "test_dies.py")
    assert (outcome.verdict, outcome.test) == (verdict, "test_dies.py::test_it"), outcome.output
