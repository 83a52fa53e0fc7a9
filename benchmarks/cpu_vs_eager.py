"""Peak memory by an older name, for the one test that asks for it here; `benchmarks.harness.peak_bytes` measures it."""

import torch

from benchmarks import harness
from benchmarks.workload import Case, build

NAMES = {"operator": "token_stats", "operator in place": "token_stats in place", "lean eager": "eager, sort"}


def peak_bytes(name: str, n_rows: int, dtype: torch.dtype, n_threads: int) -> int:
    torch.set_num_threads(n_threads)
    case = Case(n_rows, 49_152, dtype, "real", "cpu")
    return harness.peak_bytes([NAMES[name]], case, build(case))[NAMES[name]]
