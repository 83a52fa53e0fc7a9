"""Two ways to the same statistics on the same input, side by side: errors first, then time and peak memory."""

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import paec_kernels as pk
from paec_kernels.demo import peak_memory

Stats = tuple[Tensor, Tensor, Tensor, Tensor]  # logp, entropy, nucleus entropy, margin: [N] each, in nats
CHECKED_ROWS = 96  # held against float64, whose own run would otherwise take the most memory


class Job(NamedTuple):
    """Statistics of N rows, and the gradient of sum(logp * logp_weight + entropy * entropy_weight)."""

    rows: Tensor  # [N, V] logits, or [N, D] hidden states where there is a head
    token_ids: Tensor  # int64 [N]
    top_p: float
    logp_weight: Tensor  # [N]
    entropy_weight: Tensor  # [N]
    head: Tensor | None = None  # [V, D]
    temperature: float = 1.0
    chunk_rows: int = 0


Way = Callable[[Job, Tensor], Stats]


@dataclass(frozen=True)
class Side:
    seconds: float  # forward and backward together, median
    peak_bytes: int  # held at once beyond the rows (and the head); the rows' gradient is part of it
    stats_error: float  # largest, against float64, nats
    gradient_error: float  # largest, against float64, relative to the largest gradient


@dataclass(frozen=True)
class Comparison:
    rows: int
    vocab_size: int
    dtype: str
    repeats: int
    operator: Side
    eager: Side  # or whatever the operator is compared with

    @property
    def speedup(self) -> float:
        return self.eager.seconds / self.operator.seconds

    @property
    def memory_ratio(self) -> float:
        return self.operator.peak_bytes / self.eager.peak_bytes


def by_operator(job: Job, logits: Tensor) -> Stats:
    return _as_tuple(pk.token_stats(logits, job.token_ids, top_p=job.top_p))


def by_eager(job: Job, logits: Tensor) -> Stats:
    """What one writes without the operator; the nucleus only feeds the mask, so it has no gradient."""
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, job.token_ids[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    with torch.no_grad():
        log_p_sorted = log_p.sort(dim=-1, descending=True).values
        p_sorted = log_p_sorted.exp()
        in_nucleus = p_sorted.cumsum(-1) - p_sorted < job.top_p
        p_nucleus = torch.where(in_nucleus, p_sorted, 0.0)
        mass = p_nucleus.sum(-1)
        nucleus_entropy = mass.log() - (p_nucleus * log_p_sorted).sum(-1) / mass
        margin = log_p_sorted[:, 0] - log_p_sorted[:, 1]
    return logp, entropy, nucleus_entropy, margin


def by_reference(job: Job, logits: Tensor) -> Stats:
    return _as_tuple(pk.reference.token_stats(logits, job.token_ids, top_p=job.top_p))


def by_chunks(job: Job, hidden: Tensor) -> Stats:
    assert job.head is not None
    return _as_tuple(
        pk.linear_token_stats(
            hidden,
            job.head,
            job.token_ids,
            top_p=job.top_p,
            temperature=job.temperature,
            chunk_rows=job.chunk_rows,
        )
    )


def by_logits(job: Job, hidden: Tensor) -> Stats:
    assert job.head is not None
    logits = torch.nn.functional.linear(hidden, job.head)
    return _as_tuple(
        pk.token_stats(logits, job.token_ids, top_p=job.top_p, temperature=job.temperature, inplace_backward=True)
    )


def by_reference_head(job: Job, hidden: Tensor) -> Stats:
    assert job.head is not None
    head = job.head.to(hidden.dtype)
    return _as_tuple(
        pk.reference.linear_token_stats(hidden, head, job.token_ids, top_p=job.top_p, temperature=job.temperature)
    )


def _as_tuple(stats: pk.TokenStats) -> Stats:
    assert stats.logp is not None
    return stats.logp, stats.entropy, stats.nucleus_entropy, stats.margin


def against_eager(job: Job, repeats: int, on_run: Callable[[], None] = lambda: None) -> Comparison:
    """`token_stats` against eager PyTorch, on logits."""
    return compare(job, (by_operator, by_eager), by_reference, repeats, on_run)


def against_logits(job: Job, repeats: int, on_run: Callable[[], None] = lambda: None) -> Comparison:
    """`linear_token_stats` against a linear layer and `token_stats` in place, on hidden states."""
    return compare(job, (by_chunks, by_logits), by_reference_head, repeats, on_run)


def compare(job: Job, ways: tuple[Way, Way], truth: Way, repeats: int, on_run: Callable[[], None]) -> Comparison:
    """Runs the two in turn, so that a busy machine slows both alike.

    Args:
        ways: the operator's, and the other.
        truth: what both are held against, in float64.
        repeats: timed runs of each, at least 1.
        on_run: called ``runs(repeats)`` times.
    Raises:
        ValueError: the operator is further from float64 than the other; no time or memory is reported then.
    """
    errors = _errors(job, ways, truth)
    on_run()
    for ours, others in zip(*errors, strict=True):
        if not ours <= others + 1e-5:
            raise ValueError(f"errors against float64: operator {errors[0]}, the other {errors[1]}")
    peaks = []
    for way in ways:
        peaks.append(_peak_bytes(job, way))
        on_run()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for way, times in zip(ways, seconds, strict=True):
            times.append(_seconds(job, way))
            on_run()
    operator, eager = (
        Side(statistics.median(times), peak, *error) for times, peak, error in zip(seconds, peaks, errors, strict=True)
    )
    vocab_size = job.rows.shape[1] if job.head is None else job.head.shape[0]
    return Comparison(len(job.rows), vocab_size, str(job.rows.dtype).removeprefix("torch."), repeats, operator, eager)


def runs(repeats: int) -> int:
    return 3 + 2 * repeats


def _run(job: Job, way: Way) -> tuple[Stats, Tensor]:
    rows = job.rows.detach().requires_grad_()
    stats = way(job, rows)
    (stats[0] * job.logp_weight + stats[1] * job.entropy_weight).sum().backward()
    assert rows.grad is not None
    return stats, rows.grad


def _errors(job: Job, ways: tuple[Way, ...], truth: Way) -> list[tuple[float, float]]:
    """Largest error of the statistics, and of the gradient relative to its largest entry, for each way."""
    some = _first_rows(job, CHECKED_ROWS)
    true_stats, true_gradient = _run(some._replace(rows=some.rows.double()), truth)
    scale = true_gradient.abs().max()
    errors = []
    for way in ways:
        stats, gradient = _run(some, way)
        differences = [(a - b).abs().max().item() for a, b in zip(stats, true_stats, strict=True)]
        errors.append((max(differences), ((gradient - true_gradient).abs().max() / scale).item()))
    return errors


def _seconds(job: Job, way: Way) -> float:
    _synchronize(job.rows.device)
    start = time.perf_counter()
    _run(job, way)
    _synchronize(job.rows.device)
    return time.perf_counter() - start


def _peak_bytes(job: Job, way: Way) -> int:
    """The most that one run holds at once: of PyTorch's allocator on a GPU, of a new process on the CPU.

    On the CPU the profiler would miss what the operator's own threads allocate, and this process keeps freed
    memory that a run would use again unseen.
    """
    device = job.rows.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run(job, way)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.pt"
        torch.save(job._asdict(), path)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_peak_bytes_in_new_process, path, way, torch.get_num_threads()).result()


def _peak_bytes_in_new_process(path: Path, way: Way, n_threads: int) -> int:
    torch.set_num_threads(n_threads)
    job = Job(**torch.load(path, weights_only=True))
    _run(_first_rows(job, 2), way)  # loads code and starts threads
    return peak_memory.growth(lambda: _run(job, way))


def _first_rows(job: Job, n: int) -> Job:
    return job._replace(
        rows=job.rows[:n],
        token_ids=job.token_ids[:n],
        logp_weight=job.logp_weight[:n],
        entropy_weight=job.entropy_weight[:n],
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
