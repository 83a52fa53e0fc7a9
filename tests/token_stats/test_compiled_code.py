"""The machine code of the kernels, with no GPU: no spills, and an instruction budget (see benchmarks/compiled_code)."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paec_kernels as pk

ROOT = Path(__file__).parents[2]
V = 49_152


@pytest.fixture(scope="module")
def report():
    pytest.importorskip("triton", reason="the triton package is not installed")
    if platform.machine() != "x86_64":
        pytest.skip(f"triton's disassembler is an x86-64 program, this is {platform.machine()}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_code", "--json"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_no_spills_and_no_local_memory(report):
    for row in report["rows"]:
        assert row["spills"] == row["local"] == 0, row
    assert {row["target"] for row in report["rows"]} == {"sm_90", "sm_80", "gfx942"}


def test_main_loop_budget(report, capsys):
    loop = report["main_loop"]
    with capsys.disabled():
        print(
            f"\nmain loop, sm_90, bfloat16: {loop['instructions']:.2f} instructions and {loop['ex2']:g} ex2 an element"
        )
    assert loop["instructions"] <= 12
    assert loop["ex2"] == 1


@pytest.fixture
def rounds_without_rescan(real_logits, monkeypatch):
    """Rounds of the search that the fixture's rows take, of those that need no rescan, as the interpreter runs them."""
    from paec_kernels.token_stats import nucleus

    calls = {}

    def counting(name):
        function = getattr(nucleus, name)

        def count(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return count

    names = ("middle_of", "gather_lanes", "read_below")
    for name in names:
        monkeypatch.setattr(nucleus, name, counting(name))
    rounds = []
    for row in real_logits.logits:
        calls.update(dict.fromkeys(names, 0))
        pk.token_stats(row, backend="triton")
        if not calls["gather_lanes"] and not calls["read_below"]:
            rounds.append(calls["middle_of"])
    return torch.tensor(rounds)


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts the rounds of the search in Triton's interpreter"
)
def test_what_the_nucleus_adds(report, rounds_without_rescan, capsys):
    search, threads = report["nucleus_search"], report["threads"]
    assert len(rounds_without_rescan) > 10
    added = (search["outside"] + search["round"] * rounds_without_rescan) * threads / V
    with capsys.disabled():
        print(
            f"\nnucleus, sm_90, bfloat16, V = {V}: {added.median():.2f} instructions an element at the median, "
            f"{added.max():.2f} at most ({rounds_without_rescan.max()} rounds) over {len(added)} real rows "
            "that need no rescan"
        )
    assert added.max() <= 6
