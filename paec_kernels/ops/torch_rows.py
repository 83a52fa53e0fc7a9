"""How the torch backend goes over rows: a chunk at a time, in float32 scratch, on a CPU in threads of its own."""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # columns in a block, of which a row of scratch is a whole number
CHUNK_BYTES_PER_THREAD = 2 << 20  # of one scratch buffer: small for the cache, large against a call's price
CHUNK_BYTES_OFF_CPU = 1 << 26  # other devices prefer few, large launches


class Scratch(NamedTuple):
    """Float32 buffers ``[R, W]``; W is the vocabulary rounded up to whole blocks. From there on z is -inf."""

    z: Tensor
    d: Tensor
    e: Tensor


def blocks(rows: Tensor) -> Tensor:
    """View ``[r, W]`` as ``[r, W / BLOCK, BLOCK]``."""
    return rows.view(len(rows), -1, BLOCK)


def for_each_chunk(work: Callable[[Tensor, tuple, Scratch], None], logits: Tensor, valid: Tensor | None) -> None:
    """Call ``work(rows, index, chunk)`` for every chunk of valid rows, on a CPU in as many threads as PyTorch has.

    Args:
        work: is given the rows' numbers ``[r]``, what picks them from ``[B, L]``, and their logits in ``chunk.z``.
        logits: ``[B, L, V]``, read chunk by chunk.
    """
    batch, length, vocab_size = logits.shape
    on_cpu = logits.device.type == "cpu"
    n_threads = torch.get_num_threads() if on_cpu else 1
    width = BLOCK * math.ceil(vocab_size / BLOCK)
    chunk_bytes = CHUNK_BYTES_PER_THREAD if on_cpu else CHUNK_BYTES_OFF_CPU
    chunk_rows = max(1, min(math.ceil(batch * length / n_threads), chunk_bytes // (4 * width)))
    chunks = list(row_chunks(logits, valid, chunk_rows))
    inference = torch.is_inference_mode_enabled()
    remaining = iter(chunks)  # shared: whichever thread is free takes the next chunk

    def worker() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # a thread starts with modes of its own
            scratch = Scratch(*(logits.new_full((chunk_rows, width), -math.inf, dtype=torch.float32) for _ in range(3)))
            for rows, index in remaining:
                chunk = Scratch(*(buffer[: len(rows)] for buffer in scratch))
                chunk.z[:, :vocab_size] = logits[index]
                work(rows, index, chunk)

    if n_threads == 1:
        worker()
    else:
        pool = serial_threads(n_threads, os.getpid())
        futures = [pool.submit(worker) for _ in chunks[:n_threads]]
        wait(futures)
        for future in futures:
            future.result()


@functools.cache
def serial_threads(n_threads: int, process_id: int) -> ThreadPoolExecutor:
    """Start threads in which PyTorch runs every operation serially; a forked process needs its own, hence its id.

    Threads that share an operation wait for each other at its end, and here operations are short and many: with
    two cores shared by four other programs that took 3.4 s where serial operations on separate chunks take 0.15 s.
    And as none is split, rounding does not depend on the number of threads.
    """

    def start() -> None:
        torch.get_num_threads()  # PyTorch initialises a thread's number at the first look, which must not come later
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(n_threads, "paec-torch", start)
    started = threading.Barrier(n_threads)
    wait([pool.submit(started.wait) for _ in range(n_threads)])
    torch.set_num_threads(n_threads)  # for threads that start from now on, as ``start`` changed their default too
    return pool


def row_chunks(logits: Tensor, valid: Tensor | None, chunk_rows: int) -> Iterator[tuple[Tensor, tuple]]:
    """Yield the numbers of some valid rows at a time, and what picks them from ``[B, L, V]``: a view if they adjoin."""
    batch, length, _ = logits.shape
    rows = torch.arange(batch * length, device=logits.device) if valid is None else valid.nonzero().squeeze(1)
    for start in range(0, len(rows), chunk_rows):
        chunk = rows[start : start + chunk_rows]
        first, last = int(chunk[0]), int(chunk[-1])
        if last - first + 1 == len(chunk) and first // length == last // length:
            yield chunk, (first // length, slice(first % length, last % length + 1))
        else:
            yield chunk, (chunk // length, chunk % length)
