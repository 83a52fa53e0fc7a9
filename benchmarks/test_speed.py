"""pytest-benchmark cases: every implementation on a small case, after its check.

pytest benchmarks --benchmark-json speed.json
"""

import pytest
import torch

from benchmarks.check import Truth
from benchmarks.harness import Contender, admit, fresh, run_once
from benchmarks.rivals import all_implementations
from benchmarks.workload import PLANTED, Case, build, checked_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_LOGITS = Case(64, 49_152, torch.float32, "real", DEVICE)
LINEAR = Case(64, 49_152, torch.float32, PLANTED, DEVICE, d=256)


@pytest.mark.parametrize("name", all_implementations())
def test_forward_and_backward(name, benchmark):
    implementation = all_implementations()[name]
    case = LINEAR if implementation.linear else ON_LOGITS
    inputs = build(case)
    spare = torch.empty_like(inputs.rows)
    contender = admit(implementation, case, inputs, spare, Truth(inputs, checked_rows(case.n, DEVICE)))
    if not isinstance(contender, Contender):
        status, reason = contender
        assert status in ("missing", "skipped"), reason
        pytest.skip(reason)
    benchmark.group = "from hidden states" if implementation.linear else "from logits"

    def setup():
        return (contender, DEVICE, fresh(implementation, inputs, spare)), {}

    benchmark.pedantic(run_once, setup=setup, rounds=5, warmup_rounds=1)
