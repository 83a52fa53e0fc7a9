"""The torch backend beside eager PyTorch on a CPU: errors first, then time and peak memory.

    python -m benchmarks.cpu_vs_eager                      # 288 real rows, V = 49,152, float32, two threads
    python -m benchmarks.cpu_vs_eager --dtype bfloat16 --out cpu_vs_eager.json

The rows are the tests' 32 real ones, repeated with a small jitter so that no two are alike. Each way computes
logp, entropy, nucleus entropy, margin, lse and nucleus size, and the gradient of a weighted sum of the first three.
The ways take turns in one process, so that a busy machine slows all alike; a ratio is the median over the turns.
Peak memory is how far a run raises the high-water mark of a fresh process's resident memory beyond the logits:
PyTorch's profiler would miss what the backend's own threads allocate.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import paec_kernels as pk
from benchmarks.provenance import provenance
from paec_kernels.demo import peak_memory

REAL_LOGITS = Path(__file__).parents[1] / "tests" / "data" / "real_logits.pt"
TOP_P = 0.95
JITTER = 0.02  # far below the spread of a row's logits, enough to break its ties
CHECKED_ROWS = 64  # held against float64


class Rows(NamedTuple):
    """Float32, bfloat16 or float16 logits ``[N, V]``, token_ids int64 ``[N]``, gradient weights ``[3, N]``."""

    logits: Tensor
    token_ids: Tensor
    weights: Tensor


class Result(NamedTuple):
    """logp, entropy and nucleus entropy ``[3, N]``, nucleus size ``[N]``, and the gradient of the logits."""

    values: Tensor
    size: Tensor
    gradient: Tensor


Way = Callable[[Tensor, Tensor], pk.TokenStats]  # of logits and token_ids


def operator(logits: Tensor, token_ids: Tensor) -> pk.TokenStats:
    return pk.token_stats(logits, token_ids, top_p=TOP_P, backend="torch")


def operator_in_place(logits: Tensor, token_ids: Tensor) -> pk.TokenStats:
    # A view, as a leaf cannot be overwritten: in a model the logits are no leaf.
    logits = logits.view_as(logits)
    return pk.token_stats(logits, token_ids, top_p=TOP_P, backend="torch", inplace_backward=True)


def eager_by_definition(logits: Tensor, token_ids: Tensor) -> pk.TokenStats:
    return pk.reference.token_stats(logits, token_ids, top_p=TOP_P)


def lean_eager(logits: Tensor, token_ids: Tensor) -> pk.TokenStats:
    """The shortest correct eager form we know: the sorted log-probabilities serve the nucleus and the margin."""
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    log_p_sorted = log_p.sort(dim=-1, descending=True).values
    p_sorted = log_p_sorted.exp()
    in_nucleus = p_sorted.cumsum(-1) - p_sorted < TOP_P
    p_nucleus = p_sorted * in_nucleus
    mass = p_nucleus.sum(-1)
    return pk.TokenStats(
        logp=log_p.gather(-1, token_ids[:, None]).squeeze(-1),
        entropy=entropy,
        nucleus_entropy=mass.log() - (p_nucleus * log_p_sorted).sum(-1) / mass,
        margin=log_p_sorted[:, 0].detach() - log_p_sorted[:, 1].detach(),
        lse=logits[:, 0].detach() - log_p[:, 0].detach(),
        nucleus_size=in_nucleus.sum(-1).int(),
    )


WAYS: dict[str, Way] = {
    "operator": operator,
    "operator in place": operator_in_place,
    "lean eager": lean_eager,
    "eager by definition": eager_by_definition,
}


def real_rows(n_rows: int, dtype: torch.dtype) -> Rows:
    data = torch.load(REAL_LOGITS, weights_only=True)
    pick = torch.arange(n_rows) % len(data["logits"])
    generator = torch.Generator().manual_seed(0)
    logits = torch.empty(n_rows, data["logits"].shape[1], dtype=dtype)
    for row, source in zip(logits, pick.tolist(), strict=True):  # one by one, which leaves no high-water mark
        row.copy_(data["logits"][source].float() + JITTER * torch.randn(row.shape, generator=generator))
    return Rows(logits, data["token_ids"][pick], torch.randn(3, n_rows, generator=generator))


def run(way: Way, rows: Rows) -> Result:
    leaf = rows.logits.detach().requires_grad_()
    stats = way(leaf, rows.token_ids)
    assert stats.logp is not None
    values = torch.stack((stats.logp, stats.entropy, stats.nucleus_entropy))
    (values * rows.weights).sum().backward()
    assert leaf.grad is not None
    return Result(values.detach(), stats.nucleus_size, leaf.grad)


def fresh(rows: Rows) -> Rows:
    """The same rows in memory of their own, as one way overwrites its logits."""
    return rows._replace(logits=rows.logits.clone())


def check_errors(rows: Rows) -> dict[str, dict[str, float]]:
    """Largest errors of each way against float64, where it finds the exact nucleus size.

    Rounding may move the token at a nucleus' edge across it, in any of the ways; such rows are counted apart.

    Raises:
        SystemExit: the operator errs by more than the definition in eager PyTorch + 1e-5.
    """
    some = Rows(rows.logits[:CHECKED_ROWS], rows.token_ids[:CHECKED_ROWS], rows.weights[:, :CHECKED_ROWS])
    exact = run(eager_by_definition, some._replace(logits=some.logits.double(), weights=some.weights.double()))
    errors: dict[str, dict[str, float]] = {}
    for name, way in WAYS.items():
        result = run(way, fresh(some))
        same = result.size == exact.size
        errors[name] = {
            "values": (result.values - exact.values)[:, same].abs().max().item(),
            "gradient": (result.gradient - exact.gradient)[same].abs().max().item(),
            "rows with another nucleus size": int((~same).sum()),
        }
    allowed = errors["eager by definition"]
    for name in ("operator", "operator in place"):
        for what in ("values", "gradient"):
            if not errors[name][what] <= allowed[what] + 1e-5:
                raise SystemExit(f"{name}: error of the {what} {errors[name][what]:.2e}, eager's {allowed[what]:.2e}")
    return errors


def seconds(way: Way, rows: Rows) -> float:
    rows = fresh(rows)
    start = time.perf_counter()
    run(way, rows)
    return time.perf_counter() - start


def peak_bytes(name: str, n_rows: int, dtype: torch.dtype, n_threads: int) -> int:
    """The most that a run of the way holds beyond its rows, measured in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(growth_of_high_water, name, n_rows, dtype, n_threads).result()


def growth_of_high_water(name: str, n_rows: int, dtype: torch.dtype, n_threads: int) -> int:
    torch.set_num_threads(n_threads)
    rows = real_rows(n_rows, dtype)
    run(WAYS[name], fresh(Rows(rows.logits[:2], rows.token_ids[:2], rows.weights[:, :2])))  # code and threads
    return peak_memory.growth(lambda: run(WAYS[name], rows))


def measure(rows: Rows, repeats: int) -> dict[str, dict[str, float]]:
    """Of each way: median seconds, how many times the operator's they are (median over the turns), peak bytes."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(repeats + 1):
        for name, way in WAYS.items():
            elapsed = seconds(way, rows)
            if turn > 0:  # the first turn warms up
                times[name].append(elapsed)
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "times the operator": statistics.median(
                own / operators for own, operators in zip(times[name], times["operator"], strict=True)
            ),
            "peak_bytes": peak_bytes(name, len(rows.logits), rows.logits.dtype, torch.get_num_threads()),
        }
        for name in WAYS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=288)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    rows = real_rows(arguments.rows, getattr(torch, arguments.dtype))
    errors = check_errors(rows)
    figures = measure(rows, arguments.repeats)

    setting = {
        "rows": len(rows.logits),
        "vocab_size": rows.logits.shape[1],
        "logits_bytes": rows.logits.numel() * rows.logits.element_size(),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
    } | provenance()
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    print(f"{'forward and backward':20} {'ms':>8} {'ratio':>7} {'peak MB':>8} {'error':>9} {'of gradient':>12}")
    for name, figure in figures.items():
        print(
            f"{name:20} {1e3 * figure['seconds']:8.1f} {figure['times the operator']:7.2f} "
            f"{figure['peak_bytes'] / 1e6:8.1f} {errors[name]['values']:9.1e} {errors[name]['gradient']:12.1e}"
        )
    if arguments.out is not None:
        ways = {name: figures[name] | {"errors": errors[name]} for name in WAYS}
        arguments.out.write_text(json.dumps({"setting": setting, "ways": ways}, indent=2) + "\n")


if __name__ == "__main__":
    main()
