"""What is compiled anew for a new shape, counted here and as it is recorded (see benchmarks/recompiles)."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "bench_results" / "trust" / "recompiles.json"
FIRST_TWO = 2  # the first shape is taken as constants, the second makes Dynamo take it as variables


@pytest.fixture(scope="module")
def recorded():
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Two entry points that once failed, and all kernels."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = tmp_path_factory.mktemp("recompiles") / "found.json"
    names = ["one_pass_loss", "SIREN"]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.recompiles", "--out", path, "--entries", *names],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


@pytest.fixture(params=["recorded", "counted"])
def result(request):
    return request.getfixturevalue(request.param)


def test_no_graph_for_a_new_number_of_rows_or_length(result):
    """Two graphs serve every shape from 2 on; 0 and 1 have one each, which is Dynamo's own rule."""
    for row in result["graphs"]:
        in_parts = row["entry"] == "one_pass_loss"
        assert row["graph_breaks"] == in_parts, row
        each = 2 if in_parts else 1  # before and after what runs as it is
        shapes = result["shapes"][row["shapes"]]
        new = FIRST_TWO if min(shapes[0]) > 1 else 3
        assert row["forward"] == [each] * new + [0] * (len(shapes) - new), row
        assert row["backward"] == ([0 if in_parts else 1] * new + [0] * (len(shapes) - new)), row


def test_one_variant_of_each_kernel_serves_every_shape(result):
    """But where rows of a vocabulary that is no multiple of 16 are sliced: other lengths are other alignments then."""
    for row in result["variants"]:
        assert len(row["kernels"]) == 5, row
        aligned = row["vocabulary"] % 16 == 0 or not row["sliced"]
        for kernel, n in row["kernels"].items():
            reads_logits = kernel in ("forward_kernel", "backward_kernel")
            assert n <= (4 if reads_logits and not aligned else 1), (kernel, row)
    for kernels in result["linear_variants"].values():
        assert kernels["forward_kernel"] <= 2, kernels  # with and without valid rows to drop
        assert kernels["backward_kernel"] <= 3, kernels


def test_rows_are_on_the_first_axis_of_a_grid(result):
    """The others end at 65,535."""
    assert len(result["grids"]) == 5
    for kernel, grid in result["grids"].items():
        assert len(grid) == 1, kernel


def test_the_record_is_of_every_entry_point(recorded):
    import paec_kernels as pk

    entries = {row["entry"].split(",")[0] for row in recorded["graphs"]}
    others = {"PAECConfig", "AERConfig", "GlobalEntropyConfig", "SIRENConfig", "TokenStats", "reference"}
    not_compiled = {"clip_cov_selection", "kl_cov_selection"}  # once a step, on the whole batch: they read it
    assert entries == set(pk.__all__) - others - not_compiled


def test_the_record_is_what_is_counted(recorded, counted):
    for name in ("torch", "triton"):
        if recorded["provenance"][name] != version(name):
            pytest.skip(f"recorded with {name} {recorded['provenance'][name]}, this is {version(name)}")
    assert counted["variants"] == recorded["variants"]
    assert counted["linear_variants"] == recorded["linear_variants"]
    assert counted["grids"] == recorded["grids"]
    assert counted["graphs"]
    for row in counted["graphs"]:
        assert row in recorded["graphs"]
