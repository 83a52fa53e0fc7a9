"""The cost model's arithmetic by hand, and that the predictions written down are those of the counts beside them."""

import json
import math
from dataclasses import replace

import pytest

from benchmarks import cost_model
from benchmarks.cost_model import Counts, Device, predict
from benchmarks.rows import RESULTS

# 4 programs of 4 warps an SM by registers; a row of 8,192 columns is 2 rounds.
COUNTS = Counts("forward", "bf16", 128, 127, 16 << 10, None, 32, round=350, outside=1000, search=0, in_flight=64,
                ahead=False)  # fmt: skip
DEVICE = Device("ours", 10, 1e9, 1e12)


def test_the_committed_predictions_are_those_of_the_committed_counts():
    """`python -m benchmarks.compiled_code --model --out bench_results/predictions.json` writes both."""
    written = (RESULTS / "predictions.json").read_text()
    found = json.loads(written)
    counts = [Counts(**c) for c in found["counts"]]
    assert {(c.kernel, c.dtype) for c in counts} == {(k, d) for k in cost_model.MEASURED_AS for d in cost_model.SIZES}
    assert cost_model.text(cost_model.record(counts, found["provenance"])) == written


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(128, 128, 0, 4), (121, 128, 0, 4), (120, 128, 0, 4), (96, 128, 0, 5), (60, 256, 0, 4), (75, 256, 0, 3),
     (32, 32, 0, 32), (32, 256, 0, 8), (32, 128, 32 << 10, 6)],
)  # fmt: skip
def test_programs_an_sm_holds(registers, threads, shared, blocks):
    assert replace(COUNTS, registers=registers, threads=threads, shared=shared).blocks == blocks


def test_limits_by_hand():
    """Two full waves of 40 programs and one of 15, whose busiest SM has 2."""
    found = predict(COUNTS, DEVICE, 95, 8192)
    of_a_wave = {
        "bytes": 40 * 16_384 / 1e12,
        "issue": 4 * 4 * 1700 / (0.9 * 4 * 1e9),
        "ex2": 4 * 8192 / (16 * 1e9),
        "in flight": (3 * 800 + 2 * 1000 + 2 * (800 + 2 * 350)) / 1e9,
    }
    for name, seconds in of_a_wave.items():
        assert found[name] == pytest.approx(95 / 40 * seconds, rel=0.01)
    assert found["limit"] == "issue"
    assert found["tail"] == pytest.approx(of_a_wave["in flight"] - 15 / 40 * of_a_wave["issue"], rel=0.01)
    working = 2 * of_a_wave["issue"] + of_a_wave["in flight"]
    assert found["seconds"] == pytest.approx(working + 4 * cost_model.LAUNCH, rel=0.01)
    assert found["share"] == pytest.approx(found["bytes"] / found["seconds"], rel=0.02)


def test_few_rows_take_what_one_takes_alone():
    """Little's law: with few programs few bytes are in flight."""
    few, fewer = (predict(COUNTS, DEVICE, n, 8192) for n in (10, 5))
    assert few["in flight"] == max(few[name] for name in ("bytes", "issue", "ex2", "in flight"))
    assert few["limit"] == "launch"  # takes longer still
    assert few["seconds"] == fewer["seconds"]
    assert few["share"] == pytest.approx(2 * fewer["share"], abs=2e-3)
    assert few["tail"] == 0


def test_loads_ahead_hide_the_latency():
    ahead = replace(COUNTS, in_flight=128, ahead=True)
    saved = predict(COUNTS, DEVICE, 1, 8192)["in flight"] - predict(ahead, DEVICE, 1, 8192)["in flight"]
    assert saved == pytest.approx(2 * (800 + 700 - max(400, 700)) / 1e9, rel=0.02)


def test_backward_reads_and_writes_by_programs_of_a_part_of_a_row():
    """Ten columns more than two programs have need a third one, and a round more."""
    counts = replace(COUNTS, kernel="backward, no nucleus", columns=8192)
    found, more = (predict(counts, DEVICE, 1, v) for v in (16_384, 16_394))
    assert found["bytes"] == pytest.approx(2 * 16_384 * 2 / 1e12, rel=0.01)
    assert more["ex2"] == pytest.approx(5 / 6 * found["ex2"], rel=0.01)  # 5 rounds by 3 SMs, 4 by 2
    assert math.isclose(found["launch"], cost_model.LAUNCHES["backward"] * cost_model.LAUNCH)
