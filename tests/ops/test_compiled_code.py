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
from benchmarks import cost_model, logits

ROOT = Path(__file__).parents[2]
V = 49_152


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("triton", reason="the triton package is not installed")
    if platform.machine() != "x86_64":
        pytest.skip(f"triton's disassembler is an x86-64 program, this is {platform.machine()}")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = tmp_path_factory.mktemp("compiled") / "code.json"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled_code", "--out", path],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


def test_no_spills_and_no_local_memory(report):
    for row in report["rows"]:
        # Unaligned rows are read two or four bytes at a time, and cost more than that. With a softcap the sums of a
        # shard spill 16 bytes on one target with triton 3.6, and none with 3.9.
        allowed = 16 if row["kernel"] == "sums" and row["softcap"] else 0
        assert row["spills"] <= (allowed if row["aligned"] else 64), row
        assert row["local"] == 0, row
    assert {row["target"] for row in report["rows"]} == {"sm_90", "sm_80", "gfx942"}


def test_main_loop_budget(report, capsys):
    loop = report["main_loop"]
    with capsys.disabled():
        print(
            f"\nmain loop, sm_90, bfloat16: {loop['instructions']:.2f} instructions and {loop['ex2']:g} ex2 an element"
        )
    assert loop["instructions"] <= 12
    assert loop["ex2"] == 1


def test_ways_through_machine_code():
    """Predicated branches and exits may go on, others do not; a branch back is a loop."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    from benchmarks.compiled_code import Code, _following

    listing = ["S2R R0", "@P0 BRA `(.L_x_1)", "BAR.SYNC", "@!P1 EXIT", "BRA P2, `(.L_x_0)", "BRA `(.L_x_1)", "EXIT"]
    code = Code(listing, [_following(line, i, {".L_x_0": 2, ".L_x_1": 6}) for i, line in enumerate(listing)])
    assert code.following == [[1], [6, 2], [3], [4], [2, 5], [6], []]
    assert code.loops == [(2, 4)]
    assert code.way(0, [6]) == [0, 1, 6]
    assert code.way(2, [6]) == [2, 3, 4, 5, 6]
    assert set(code.reached(0, closed=code.where("BAR"))) == {1, 6}
    amd = [_following(line, 0, {".LBB0_2": 7}) for line in ("s_cbranch_scc1 .LBB0_2", "s_branch .LBB0_2", "s_endpgm")]
    assert amd == [[7, 1], [7], []]


def test_lanes_are_passed_by_a_store_a_barrier_and_a_load(report):
    """Between threads, through memory: a load that comes before the barrier, or from a cache, reads another row's."""
    assert set(report["scratch_order"]) == {"sm_90", "sm_80", "gfx942"}
    for target, found in report["scratch_order"].items():
        assert set(found["loads"]) <= {"LDG.E", "global_load_dword", "buffer_load_dword"}, (target, found)
        assert found["loads"], target
        assert found["in_order"], target
        assert found["behind_barrier"], target
        assert found["one_unit"], target


def test_nothing_else_is_passed_between_threads(report):
    """In every variant, by Triton's own dialect. The machine code above is of a kernel that does this alone."""
    for row in report["rows"]:
        assert row["passed"] == ({"scratch_ptr": True} if row["kernel"] == "forward" else {}), row


def test_a_thread_overwrites_what_itself_has_read(report):
    """The gradient in place: a tile's load and store with the same layout, in which no element is held twice."""
    for row in report["rows"]:
        if row["kernel"] in ("forward", "backward"):  # others have nothing to write over the logits
            assert row["one_owner"] == (row["kernel"] == "backward"), row


def test_offsets_into_the_logits_have_64_bits(report):
    """From strides of 32 bits too."""
    for row in report["rows"]:
        assert row["narrow_offsets"] == [], row


KERNEL = """
  tt.func public @kernel(%a_ptr: !tt.ptr<i32> {tt.divisibility = 16 : i32} loc("a_ptr"(#loc)), %n: i32) {
    %p = tt.splat %a_ptr : !tt.ptr<i32> -> tensor<64x!tt.ptr<i32>, #blocked> loc(#loc1)
    %q = tt.addptr %p, %i : tensor<64x!tt.ptr<i32>, #blocked>, tensor<64xi32, #blocked> loc(#loc2)
    cf.cond_br %d, ^bb1, ^bb2 loc(#loc2)
  ^bb1:  // pred: ^bb0
    tt.return
  ^bb2:  // pred: ^bb0
    scf.if %c {
      tt.store %q, %v, %m : tensor<64x!tt.ptr<i32>, #blocked> loc(#loc3)
      BARRIER
      %w = tt.load %q : tensor<64x!tt.ptr<i32>, #blocked> loc(#loc4)
    }
    tt.return
  }
"""


@pytest.mark.parametrize(
    ("change", "in_order"),
    [
        (("BARRIER", "gpu.barrier"), True),
        (("BARRIER", "ttg.barrier all"), True),
        (("BARRIER", "ttg.barrier local"), False),
        (("BARRIER", ""), False),
        (("BARRIER", "} else {\ngpu.barrier"), False),
        (("BARRIER", "^bb3:\ngpu.barrier"), False),
        (("BARRIER", "gpu.barrier\ntt.store %q, %v : tensor<64x!tt.ptr<i32>, #blocked>"), False),
    ],
)
def test_exchanges_are_found(change, in_order):
    from benchmarks import exchanges

    ir = KERNEL.replace(*change)
    found = exchanges.accesses(ir)
    assert exchanges.is_in_order(exchanges.passed_through(found)["a_ptr"]) == in_order
    assert len(exchanges.narrow_offsets(ir, {"a_ptr"})) == 1
    layout = "#blocked = #ttg.blocked<{sizePerThread = [1], threadsPerWarp = [32], warpsPerCTA = [2], order = [0]}>\n"
    assert exchanges.have_one_owner(found, layout + ir, {"a_ptr"}, 64)
    assert not exchanges.have_one_owner(found, layout + ir, {"a_ptr"}, 32)
    other = exchanges.accesses(ir.replace("%w = tt.load %q : tensor<64x!tt.ptr<i32>, #blocked>", "%w = tt.load %a_ptr"))
    assert not exchanges.have_one_owner(other, layout + ir, {"a_ptr"}, 64)


def test_counts_of_the_cost_model(report):
    """The loops that are counted are the budget's; every thread has 16 bytes in flight or more."""
    counts = {(c["kernel"], c["dtype"]): c for c in report["counts"]}
    forward = counts["forward", "bf16"]
    assert forward["round"] / forward["elements"] == report["main_loop"]["instructions"]
    assert forward["threads"] == report["threads"]
    for dtype in ("bf16", "fp32"):
        assert counts["backward, no nucleus", dtype]["round"] < counts["backward", dtype]["round"]
    assert all(c["in_flight"] >= 16 for c in counts.values())


@pytest.fixture
def rounds_without_rescan(interpreter, calls):
    """Rounds of the search that rows take, of those that need no rescan, as the interpreter runs them."""
    from paec_kernels.ops import nucleus, nucleus_readings, nucleus_search

    called = calls((nucleus_search, "middle_of"), (nucleus, "gather_lanes"), (nucleus_readings, "read_below"))

    def rounds(rows):
        found = []
        for row in rows:
            called.clear()
            pk.token_stats(row, backend="triton")
            if set(called) <= {"middle_of"}:
                found.append(len(called))
        return torch.tensor(found)

    return rounds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounds_that_the_cost_model_assumes(rounds_without_rescan, dtype):
    rows, _ = logits.make("real", 32, V, dtype, torch.Generator().manual_seed(0))
    rounds = rounds_without_rescan(rows).float()
    assumed = cost_model.SEARCH_ROUNDS[{torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]]
    assert rounds.mean().item() == pytest.approx(assumed, abs=1)


def test_what_the_nucleus_adds(report, real_logits, rounds_without_rescan, capsys):
    search, threads = report["nucleus_search"], report["threads"]
    rounds = rounds_without_rescan(real_logits.logits)
    assert len(rounds) > 10
    added = (search["outside"] + search["round"] * rounds) * threads / V
    with capsys.disabled():
        print(
            f"\nnucleus, sm_90, bfloat16, V = {V}: {added.median():.2f} instructions an element at the median, "
            f"{added.max():.2f} at most ({rounds.max()} rounds) over {len(added)} real rows "
            "that need no rescan"
        )
    assert added.max() <= 6
