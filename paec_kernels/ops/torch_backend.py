"""Token statistics in chunked PyTorch: the path for CPUs and for devices without Triton.

Rows are taken a few at a time, so that a chunk stays in cache, into float32 scratch that a thread's chunks reuse.
No sum here spans more than one row, and on a CPU none is split, so that a row's result does not depend, to the bit,
on the batch it sits in. Entropies are in nats; z are logits, x = z / T (or softcap * tanh(z / softcap) / T),
d = x - max(x), so that nothing cancels where logits are large, e = exp(d), Z = sum e.
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import torch
from torch import Tensor

from paec_kernels.ops import layout
from paec_kernels.types import IGNORE_INDEX

BLOCK = 64  # columns in a block; the best k tokens lie in the k blocks with the largest maxima
SHORT_LIST = 128  # tokens in the first, cheap attempt at a nucleus
CHUNK_BYTES_PER_THREAD = 2 << 20  # of one scratch buffer: small for the cache, large against a call's price
CHUNK_BYTES_OFF_CPU = 1 << 26  # other devices prefer few, large launches
LOWEST = -150.0  # of d: exp(-150) is 0 in float32, and 0 * -150 is 0 where 0 * -inf is NaN


class Scratch(NamedTuple):
    """Float32 buffers ``[R, W]``; W is the vocabulary rounded up to whole blocks. From there on z is -inf."""

    z: Tensor
    d: Tensor
    e: Tensor


class Nucleus(NamedTuple):
    """The nucleus of each row, tensors ``[r]``.

    ``size`` int64; ``threshold`` the smallest member's raw logit; ``tie_weight`` the weight k / n of the tokens
    tied there; ``mass`` M = sum w e; ``moment`` sum w e d.
    """

    size: Tensor
    threshold: Tensor
    tie_weight: Tensor
    mass: Tensor
    moment: Tensor


def forward(
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    top_p: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Statistics of every row.

    Args:
        logits: ``[B, L, V]`` float32, bfloat16 or float16, any strides.
        token_ids: int64 ``[B * L]``, where -100 gives logp 0, or None.
        valid: bool ``[B * L]`` or None; an invalid row has statistics 0, whatever it holds.
        temperature: float32 ``[B * L]`` or ``[1]``.
        top_p: nucleus mass in (0, 1]; 1 takes every token with a finite logit.
        softcap: 0.0 for none.
        vocab_size: columns from here on are padding, not read.
    Returns:
        The table float32 ``[layout.N_ROWS, B * L]``, and nucleus_size int32 ``[B * L]``.
    """
    n_rows = logits.shape[0] * logits.shape[1]
    table = torch.zeros(layout.N_ROWS, n_rows, dtype=torch.float32, device=logits.device)
    nucleus_size = torch.zeros(n_rows, dtype=torch.int32, device=logits.device)
    temperature = temperature.expand(n_rows)

    def fill(rows: Tensor, index: tuple, chunk: Scratch) -> None:
        ids = None if token_ids is None else token_ids[rows]
        table[:, rows], nucleus_size[rows] = chunk_statistics(chunk, ids, temperature[rows], top_p, softcap)

    for_each_chunk(fill, logits[..., :vocab_size], valid)
    return table, nucleus_size


def backward(
    d_stats: Tensor,
    table: Tensor,
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    out: Tensor,
    first_column: int = 0,
) -> None:
    """Writes the logits' gradient into ``out``, which may be ``logits`` itself.

    Args:
        d_stats: float32 ``[3, B * L]``, the gradients of logp, entropy and nucleus_entropy.
        table: float32 ``[layout.N_ROWS, B * L]`` from ``forward``.
        out: ``[B, L, V]`` of the logits' dtype; 0 in invalid rows and from column ``vocab_size`` on.
        first_column: where the logits' columns begin in a wider vocabulary, whose table and token ids these are.
        Others as for ``forward``.
    """
    n_rows = logits.shape[0] * logits.shape[1]
    out[..., vocab_size:] = 0
    if valid is not None:
        out[~valid.view(out.shape[:2])] = 0
    out, temperature = out[..., :vocab_size], temperature.expand(n_rows)

    def write(rows: Tensor, index: tuple, chunk: Scratch) -> None:
        ids = None if token_ids is None else token_ids[rows]
        grad = chunk_gradient(chunk, d_stats[:, rows], table[:, rows], ids, temperature[rows], softcap, first_column)
        out[index] = grad[:, :vocab_size].to(out.dtype)

    for_each_chunk(write, logits[..., :vocab_size], valid)


def for_each_chunk(work: Callable[[Tensor, tuple, Scratch], None], logits: Tensor, valid: Tensor | None) -> None:
    """Calls ``work(rows, index, chunk)`` for every chunk of valid rows, on a CPU in as many threads as PyTorch has.

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
    """Threads in which PyTorch runs every operation serially; a forked process needs its own, hence its id.

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
    """Numbers of the valid rows, some at a time, and what picks them from ``[B, L, V]``: a view if they adjoin."""
    batch, length, _ = logits.shape
    rows = torch.arange(batch * length, device=logits.device) if valid is None else valid.nonzero().squeeze(1)
    for start in range(0, len(rows), chunk_rows):
        chunk = rows[start : start + chunk_rows]
        first, last = int(chunk[0]), int(chunk[-1])
        if last - first + 1 == len(chunk) and first // length == last // length:
            yield chunk, (first // length, slice(first % length, last % length + 1))
        else:
            yield chunk, (chunk // length, chunk % length)


def chunk_statistics(
    chunk: Scratch, token_ids: Tensor | None, temperature: Tensor, top_p: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """``forward`` of one chunk: the table's columns and nucleus_size ``[r]``.

    H = log Z - sum e d / Z  [paper];  H_p = log M - sum w e d / M, M = sum w e  [reported].
    """
    z, d, e = chunk
    best = top_columns(z, SHORT_LIST)
    x = soft_capped(z, softcap, out=e) if softcap else z
    top, second = x.gather(1, best[:, :2]).unbind(1)
    if token_ids is not None:
        d_token = (x.gather(1, token_ids.clamp(min=0)[:, None]).squeeze(1) - top) / temperature
    shifted_exp(x, top, temperature, d, e)
    total = e.sum(-1)
    log_total = total.log()

    nucleus = select_nucleus(chunk, best, total, top_p) if top_p < 1 else whole_vocabulary(z, total)
    entropy = log_total - d.mul_(e).sum(-1) / total
    log_mass = nucleus.mass.log()

    stats = z.new_zeros(layout.N_ROWS, len(z))
    if token_ids is not None:
        stats[layout.LOGP] = torch.where(token_ids == IGNORE_INDEX, 0.0, d_token - log_total)
    stats[layout.ENTROPY] = entropy
    stats[layout.NUCLEUS_ENTROPY] = log_mass - nucleus.moment / nucleus.mass if top_p < 1 else entropy
    stats[layout.MARGIN] = (top - second) / temperature
    stats[layout.LSE] = top / temperature + log_total
    stats[layout.TOP] = top
    stats[layout.LOG_TOTAL] = log_total
    stats[layout.THRESHOLD] = nucleus.threshold
    stats[layout.TIE_WEIGHT] = nucleus.tie_weight
    stats[layout.LOG_MASS] = log_mass - log_total
    broken = ~z.gather(1, best[:, :1]).squeeze(1).isfinite()
    return stats.masked_fill_(broken, math.nan), nucleus.size.masked_fill(broken, 0).int()


def chunk_gradient(
    chunk: Scratch,
    d_stats: Tensor,
    stats: Tensor,
    token_ids: Tensor | None,
    temperature: Tensor,
    softcap: float,
    first_column: int,
) -> Tensor:
    """``backward`` of one chunk: dL/dz ``[r, W]``, in the scratch.

    With a, b, c = dL/dlogp, dL/dH, dL/dH_p (METHOD.md, section 4), p = e / Z and log p = d - log Z:
    T dL/dx = a (onehot - p) - b p (log p + H) - c w q (log q + H_p)
            = a onehot + e (A + B d) - c w q (log q + H_p),   A = (b (log Z - H) - a) / Z,   B = -b / Z.
    """
    z, d, e = chunk
    a, b, c = d_stats / temperature
    log_total = stats[layout.LOG_TOTAL]
    total = log_total.exp()
    if token_ids is None:
        token_ids = torch.full_like(a, IGNORE_INDEX, dtype=torch.int64)
    a = torch.where(token_ids == IGNORE_INDEX, 0.0, a)
    whole = stats[layout.THRESHOLD] == -math.inf
    b, c = torch.where(whole, b + c, b), torch.where(whole, 0.0, c)

    x = soft_capped(z, softcap, out=e) if softcap else z
    shifted_exp(x, stats[layout.TOP], temperature, d, e)
    row, block, nucleus_term = nucleus_gradient(chunk, c, stats)
    constant = (b * (log_total - stats[layout.ENTROPY]) - a) / total
    grad = d.mul_((-b / total)[:, None]).add_(constant[:, None]).mul_(e)
    column = token_ids - first_column
    here = (column >= 0) & (column < z.shape[1])
    grad.scatter_add_(1, torch.where(here, column, 0)[:, None], torch.where(here, a, 0.0)[:, None])
    blocks(grad)[row, block] += nucleus_term
    if softcap:
        grad.mul_(torch.div(z, softcap, out=e).tanh_().square_().neg_().add_(1))
    return grad


def nucleus_gradient(chunk: Scratch, c: Tensor, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-c w q (log q + H_p), q = e / M, log q = d - log M, in the blocks that hold a member of a row with c != 0.

    Returns:
        Those blocks' row ``[m]``, their number in the row ``[m]``, and the values ``[m, BLOCK]``.
    """
    holds_member = blocks(chunk.z).amax(-1) >= stats[layout.THRESHOLD, :, None]
    row, block = (holds_member & (c != 0)[:, None]).nonzero().unbind(1)
    z, d, e = (blocks(values)[row, block] for values in chunk)
    c, stats = c[row, None], stats[:, row, None]
    threshold, log_mass = stats[layout.THRESHOLD], stats[layout.LOG_TOTAL] + stats[layout.LOG_MASS]
    weight = (z > threshold) + (z == threshold) * stats[layout.TIE_WEIGHT]
    log_q = d - log_mass
    return row, block, -c / log_mass.exp() * weight * e * (log_q + stats[layout.NUCLEUS_ENTROPY])


def blocks(rows: Tensor) -> Tensor:
    """``[r, W]`` as ``[r, W / BLOCK, BLOCK]``."""
    return rows.view(len(rows), -1, BLOCK)


def top_columns(z: Tensor, k: int) -> Tensor:
    """Columns of each row's k largest logits (all, if there are fewer), largest first, ``[r, k]``."""
    n_rows, width = z.shape
    n_blocks = width // BLOCK
    best_blocks = blocks(z).amax(-1).topk(min(k, n_blocks), sorted=False).indices
    flat_blocks = best_blocks + n_blocks * torch.arange(n_rows, device=z.device)[:, None]
    members = z.view(-1, BLOCK).index_select(0, flat_blocks.flatten()).view(n_rows, -1)
    place = members.topk(min(k, members.shape[1])).indices
    return best_blocks.gather(1, place // BLOCK) * BLOCK + place % BLOCK


def soft_capped(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """softcap * tanh(z / softcap), where a masked token stays masked."""
    torch.div(z, softcap, out=out)
    return out.tanh_().mul_(softcap).masked_fill_(z == -math.inf, -math.inf)


def shifted_exp(x: Tensor, top: Tensor, temperature: Tensor, d: Tensor, e: Tensor) -> None:
    """d = max((x - top) / T, LOWEST) and e = exp(d), into the buffers.

    Not ``torch.softmax``, whose exp is a coarser one: Z is off by 2e-5 at V = 49,152.
    """
    torch.sub(x, top[:, None], out=d).mul_(1 / temperature[:, None]).clamp_(min=LOWEST)
    torch.exp(d, out=e)


def select_nucleus(chunk: Scratch, best: Tensor, total: Tensor, top_p: float) -> Nucleus:
    """The smallest set of tokens with mass >= top_p Z: from the best tokens, or where those fall short, from all."""
    target = top_p * total
    z, d, e = (values.gather(1, best) for values in chunk)
    nucleus = nucleus_of_sorted(z, d, e, target)
    # A threshold equal to the list's last logit may be tied with tokens outside the list.
    settled = (e.sum(-1) >= target) & (nucleus.threshold > z[:, -1]) | target.isnan()
    rest = (~settled).nonzero().squeeze(1)
    step = math.ceil(len(target) / 4)  # a quarter of a chunk at a time, as a flat row lists every column
    for start in range(0, len(rest), step):
        rows = rest[start : start + step]
        columns, listed = possible_members(chunk.e[rows], (1 - top_p) * total[rows])
        z, order = chunk.z[rows[:, None], columns].masked_fill_(~listed, -math.inf).sort(dim=-1, descending=True)
        columns = columns.gather(1, order)
        d, e = chunk.d[rows[:, None], columns], chunk.e[rows[:, None], columns].masked_fill_(z == -math.inf, 0)
        for values, better in zip(nucleus, nucleus_of_sorted(z, d, e, target[rows]), strict=True):
            values[rows] = better
    return nucleus


def possible_members(e: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of a superset of each row's nucleus, ``[r, C]`` in any order, and which of them are not padding.

    The nucleus leaves out a mass of at most ``spare``. Of n tokens, those with e < spare / n cannot use it up, so
    none of them is a member; sieving the few that remain has a smaller n and cuts higher.
    """
    columns, listed, spare = sieve(e, torch.full_like(spare, e.shape[1]), spare)
    for _ in range(2):  # each costs less than sorting what it drops; a fourth sieve would drop little
        listed_e = e.gather(1, columns).masked_fill_(~listed, 0)
        kept, listed, spare = sieve(listed_e, listed.sum(-1), spare)
        columns = columns.gather(1, kept)
    return columns, listed


def sieve(e: Tensor, n: Tensor, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drops tokens with e < spare / n: the others' columns, which are not padding, and what is left of spare."""
    keep = e >= (0.99 * spare / n)[:, None]  # 0.99: the sums below round
    return *compact(keep), spare - (e * ~keep).sum(-1)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Columns where ``keep`` ``[r, W]`` is true, padded with 0 to the longest row, and which are not padding."""
    count = keep.sum(-1)
    listed = torch.arange(int(count.max()), device=keep.device) < count[:, None]
    flat = keep.flatten().nonzero().squeeze(1)
    return torch.zeros_like(listed, dtype=torch.int64).masked_scatter_(listed, flat) % keep.shape[1], listed


def nucleus_of_sorted(z: Tensor, d: Tensor, e: Tensor, target: Tensor) -> Nucleus:
    """The nucleus of tokens ``[r, C]`` sorted by descending logit, -inf last, where every tie is listed."""
    cumulative = e.cumsum(-1)
    size = torch.minimum((cumulative < target[:, None]).sum(-1) + 1, (z > -math.inf).sum(-1)).clamp(min=1)
    last = size[:, None] - 1
    threshold = z.gather(1, last)
    n_above, n_tied = (z > threshold).sum(-1), (z == threshold).sum(-1)
    return Nucleus(
        size,
        threshold.squeeze(1),
        (size - n_above).to(z.dtype) / n_tied,
        cumulative.gather(1, last).squeeze(1),
        (e * d).cumsum(-1).gather(1, last).squeeze(1),
    )


def whole_vocabulary(z: Tensor, total: Tensor) -> Nucleus:
    """The nucleus at top_p = 1: every finite logit, each above the threshold -inf."""
    zero = torch.zeros_like(total)
    return Nucleus((z > -math.inf).sum(-1), zero - math.inf, zero, total, zero)
