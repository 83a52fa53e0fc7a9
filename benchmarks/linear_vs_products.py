"""linear_token_stats on a CPU beside its floor, four bare products, and beside the path through whole logits.

    python -m benchmarks.linear_vs_products                # 1,024 real hidden states, V = 49,152, D = 576, float32
    python -m benchmarks.linear_vs_products --chunk-mb 32 --out linear.json

The head and the hidden states are SmolLM2-135M's (the demo's packages), over answers that it samples itself.
Both ways compute the statistics and the gradients of hidden states and head; they are held against float64 before
anything is timed, and take turns in one process with the products. A ratio is the median over the turns. Peak memory
is the rise of a new process's resident memory beyond inputs and their gradients.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import paec_kernels as pk
from benchmarks.provenance import provenance
from paec_kernels.demo import model, peak_memory, rollout
from paec_kernels.demo.questions import QUESTIONS, messages

CHECKED_ROWS = 64


class Case(NamedTuple):
    """Hidden states ``[N, D]``, head ``[V, D]``, token_ids ``[N]``, gradient weights ``[3, N]``."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor
    weights: Tensor

    def first(self, n: int) -> "Case":
        return Case(self.hidden[:n], self.weight, self.token_ids[:n], self.weights[:, :n])


def by_chunks(case: Case) -> pk.TokenStats:
    return pk.linear_token_stats(case.hidden, case.weight, case.token_ids)


def by_logits(case: Case) -> pk.TokenStats:
    return pk.token_stats(linear(case.hidden, case.weight), case.token_ids, inplace_backward=True)


def by_reference(case: Case) -> pk.TokenStats:
    return pk.reference.linear_token_stats(case.hidden, case.weight, case.token_ids)


Way = Callable[[Case], pk.TokenStats]
WAYS: dict[str, Way] = {"linear_token_stats": by_chunks, "whole logits": by_logits}


def run(way: Way, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The three statistics ``[3, N]``, d_hidden and d_weight."""
    leaves = case._replace(hidden=case.hidden.detach().requires_grad_(), weight=case.weight.detach().requires_grad_())
    stats = way(leaves)
    assert stats.logp is not None
    values = torch.stack((stats.logp, stats.entropy, stats.nucleus_entropy))
    (values * case.weights).sum().backward()
    assert leaves.hidden.grad is not None
    assert leaves.weight.grad is not None
    return values.detach(), leaves.hidden.grad, leaves.weight.grad


def four_products(case: Case) -> None:
    """What no such method can do without: logits twice, d_hidden, d_weight."""
    logits = linear(case.hidden, case.weight)
    torch.mm(case.hidden, case.weight.T, out=logits)
    torch.mm(logits, case.weight)
    torch.mm(logits.T, case.hidden)


def real_case(n_rows: int) -> Case:
    torch.manual_seed(0)
    policy, tokenizer = model.load(torch.device("cpu"))
    chats = [messages(question) for question in QUESTIONS]
    answers = rollout.sample(policy, tokenizer, chats, answers=12, max_new_tokens=48, temperature=1.0)
    with torch.no_grad():
        hidden = rollout.answer_hidden(policy, answers)[answers.valid]
    if len(hidden) < n_rows:
        raise SystemExit(f"--rows must be at most {len(hidden)}, the tokens that were sampled, got {n_rows}")
    weights = torch.randn(3, n_rows) / n_rows
    return Case(hidden[:n_rows], policy.lm_head.weight.detach(), answers.token_ids[answers.valid][:n_rows], weights)


def check_errors(case: Case) -> dict[str, list[float]]:
    """Largest errors of the statistics, d_hidden and d_weight against float64; exits where ours exceed the other's."""
    some = case.first(CHECKED_ROWS)
    exact = run(by_reference, Case(some.hidden.double(), some.weight.double(), some.token_ids, some.weights.double()))
    errors = {
        name: [(a - b).abs().max().item() for a, b in zip(run(way, some), exact, strict=True)]
        for name, way in WAYS.items()
    }
    for ours, others in zip(errors["linear_token_stats"], errors["whole logits"], strict=True):
        if not ours <= 1.2 * others + 1e-5:
            raise SystemExit(f"errors against float64: {errors}")
    return errors


def seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    jobs: dict[str, Callable[[], object]] = {"four bare products": lambda: four_products(case)}
    jobs |= {name: (lambda way=way: run(way, case)) for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            elapsed = seconds(job)
            if turn > 0:  # the first turn warms up
                times[name].append(elapsed)
    floor = times["four bare products"]
    return {
        name: {
            "seconds": statistics.median(own),
            "times the products": statistics.median(a / b for a, b in zip(own, floor, strict=True)),
        }
        for name, own in times.items()
    }


def peak_bytes(case: Case, name: str) -> int:
    """Beyond the inputs, of which the process holds one copy, and their gradients."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        torch.save(tuple(case), path)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            growth = process.submit(growth_in_new_process, path, name, torch.get_num_threads()).result()
    return growth - case.hidden.nbytes - case.weight.nbytes


def growth_in_new_process(path: Path, name: str, n_threads: int) -> int:
    torch.set_num_threads(n_threads)
    case = Case(*torch.load(path, weights_only=True))
    run(WAYS[name], Case(case.hidden[:2], case.weight[:64], case.token_ids[:2] % 64, case.weights[:, :2]))
    return peak_memory.growth(lambda: run(WAYS[name], case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--chunk-mb", type=int, help="PAEC_CHUNK_BYTES in MiB, in place of its default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    if arguments.chunk_mb is not None:
        os.environ["PAEC_CHUNK_BYTES"] = str(arguments.chunk_mb << 20)

    torch.set_num_threads(arguments.threads)
    case = real_case(arguments.rows)
    errors = check_errors(case)
    figures = measure(case, arguments.repeats)
    for name in WAYS:
        figures[name]["peak_bytes"] = peak_bytes(case, name)
    setting = {
        "rows": len(case.hidden),
        "width": case.hidden.shape[1],
        "vocab_size": len(case.weight),
        "logits_bytes": 4 * len(case.hidden) * len(case.weight),
        "chunk_bytes": os.environ.get("PAEC_CHUNK_BYTES", "default"),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
    } | provenance()
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    heading = f"{'forward and backward':20} {'ms':>8} {'x products':>10} {'peak MB':>8}"
    print(heading + "  errors: statistics, d_hidden, d_weight")
    for name, figure in figures.items():
        peak = f"{figure['peak_bytes'] / 1e6:8.1f}" if "peak_bytes" in figure else " " * 8
        shown = "  ".join(f"{error:.1e}" for error in errors.get(name, []))
        print(f"{name:20} {1e3 * figure['seconds']:8.1f} {figure['times the products']:10.2f} {peak}  {shown}")
    if arguments.out is not None:
        ways = {name: figure | {"errors": errors.get(name)} for name, figure in figures.items()}
        arguments.out.write_text(json.dumps({"setting": setting, "ways": ways}, indent=2) + "\n")


if __name__ == "__main__":
    main()
