"""Token statistics in chunked PyTorch: the path for CPUs and for devices without Triton.

No sum here spans more than one row, and on a CPU none is split, so that a row's result does not depend, to the bit,
on the batch it sits in. Entropies are in nats; z are logits, x = z / T (or softcap * tanh(z / softcap) / T),
d = x - max(x), so that nothing cancels where logits are large, e = exp(d), Z = sum e.
"""

import math

import torch
from torch import Tensor

from paec_kernels.ops import layout
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.torch_nucleus import SHORT_LIST, select_nucleus, top_columns, whole_vocabulary
from paec_kernels.ops.torch_rows import Scratch, blocks, for_each_chunk
from paec_kernels.types import IGNORE_INDEX

LOWEST = -150.0  # of d: exp(-150) is 0 in float32, and 0 * -150 is 0 where 0 * -inf is NaN


def forward(logits: Tensor, rows: Rows, top_p: float, softcap: float, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the statistics of every row.

    Args:
        logits: ``[B, L, V]`` float32, bfloat16 or float16, any strides.
        rows: their own arguments, N = B * L; a row that is not valid has statistics 0, whatever it holds.
        top_p: nucleus mass in (0, 1]; 1 takes every token with a finite logit.
        softcap: 0.0 for none.
        vocab_size: columns from here on are padding, not read.
    Returns:
        The table's stats float32 ``[3, N]`` and rest ``[7, N]`` (see `layout`), and nucleus sizes int32 ``[N]``.
    """
    n_rows = logits.shape[0] * logits.shape[1]
    table = layout.new_table(torch.zeros, n_rows, logits.device)
    rows = rows._replace(temperature=rows.temperature.expand(n_rows))

    def fill(numbers: Tensor, index: tuple, chunk: Scratch) -> None:
        for whole, part in zip(table, chunk_statistics(chunk, rows.take(numbers), top_p, softcap), strict=True):
            whole[..., numbers] = part

    for_each_chunk(fill, logits[..., :vocab_size], rows.valid)
    return table


def backward(
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    logits: Tensor,
    rows: Rows,
    softcap: float,
    vocab_size: int,
    out: Tensor,
    first_column: int = 0,
) -> None:
    """Write the logits' gradient into ``out``, which may be ``logits`` itself.

    Args:
        d_stats: float32 ``[3, N]``, contiguous, the gradients of logp, entropy and nucleus_entropy.
        stats, rest: the table from ``forward``.
        out: ``[B, L, V]`` of the logits' dtype; 0 in invalid rows and from column ``vocab_size`` on.
        first_column: where the logits' columns begin in a wider vocabulary, whose table and token ids these are.
        Others as for ``forward``.
    """
    out[..., vocab_size:] = 0
    if rows.valid is not None:
        out[~rows.valid.view(out.shape[:2])] = 0
    out, rows = out[..., :vocab_size], rows._replace(temperature=rows.temperature.expand(stats.shape[1]))

    def write(numbers: Tensor, index: tuple, chunk: Scratch) -> None:
        table = d_stats[:, numbers], stats[:, numbers], rest[:, numbers]
        gradient = chunk_gradient(chunk, *table, rows.take(numbers), softcap, first_column)
        out[index] = gradient[:, :vocab_size].to(out.dtype)

    for_each_chunk(write, logits[..., :vocab_size], rows.valid)


def chunk_statistics(chunk: Scratch, rows: Rows, top_p: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table of one chunk, columns of ``forward``'s.

    H = log Z - sum e d / Z  [paper];  H_p = log M - sum w e d / M, M = sum w e  [reported].
    """
    z, d, e = chunk
    best = top_columns(z, SHORT_LIST)
    x = soft_capped(z, softcap, out=e) if softcap else z
    top, second = x.gather(1, best[:, :2]).unbind(1)
    if rows.token_ids is not None:
        d_token = (x.gather(1, rows.token_ids.clamp(min=0)[:, None]).squeeze(1) - top) / rows.temperature
    shifted_exp(x, top, rows.temperature, d, e)
    total = e.sum(-1)
    log_total = total.log()

    nucleus = select_nucleus(chunk, best, total, top_p) if top_p < 1 else whole_vocabulary(z, total)
    entropy = log_total - d.mul_(e).sum(-1) / total
    log_mass = nucleus.mass.log()

    stats, rest = z.new_zeros(layout.N_STATS, len(z)), z.new_empty(layout.N_REST, len(z))
    if rows.token_ids is not None:
        stats[layout.LOGP] = torch.where(rows.token_ids == IGNORE_INDEX, 0.0, d_token - log_total)
    stats[layout.ENTROPY] = entropy
    stats[layout.NUCLEUS_ENTROPY] = log_mass - nucleus.moment / nucleus.mass if top_p < 1 else entropy
    rest[layout.MARGIN] = (top - second) / rows.temperature
    rest[layout.LSE] = top / rows.temperature + log_total
    rest[layout.TOP] = top
    rest[layout.LOG_TOTAL] = log_total
    rest[layout.THRESHOLD] = nucleus.threshold
    rest[layout.TIE_WEIGHT] = nucleus.tie_weight
    rest[layout.LOG_MASS] = log_mass - log_total
    broken = ~z.gather(1, best[:, :1]).squeeze(1).isfinite()
    stats.masked_fill_(broken, math.nan)
    rest.masked_fill_(broken, math.nan)
    return stats, rest, nucleus.size.masked_fill(broken, 0).int()


def chunk_gradient(
    chunk: Scratch, d_stats: Tensor, stats: Tensor, rest: Tensor, rows: Rows, softcap: float, first_column: int
) -> Tensor:
    """Return the gradient dL/dz ``[r, W]`` of one chunk, in the scratch.

    With a, b, c = dL/dlogp, dL/dH, dL/dH_p, p = e / Z and log p = d - log Z:
    T dL/dx = a (onehot - p) - b p (log p + H) - c w q (log q + H_p)
            = a onehot + e (A + B d) - c w q (log q + H_p),   A = (b (log Z - H) - a) / Z,   B = -b / Z.
    """
    z, d, e = chunk
    a, b, c = d_stats / rows.temperature
    log_total = rest[layout.LOG_TOTAL]
    total = log_total.exp()
    token_ids = rows.token_ids
    if token_ids is None:
        token_ids = torch.full_like(a, IGNORE_INDEX, dtype=torch.int64)
    a = torch.where(token_ids == IGNORE_INDEX, 0.0, a)
    whole = rest[layout.THRESHOLD] == -math.inf
    b, c = torch.where(whole, b + c, b), torch.where(whole, 0.0, c)

    x = soft_capped(z, softcap, out=e) if softcap else z
    shifted_exp(x, rest[layout.TOP], rows.temperature, d, e)
    row, block, nucleus_term = nucleus_gradient(chunk, c, stats, rest)
    constant = (b * (log_total - stats[layout.ENTROPY]) - a) / total
    grad = d.mul_((-b / total)[:, None]).add_(constant[:, None]).mul_(e)
    column = token_ids - first_column
    here = (column >= 0) & (column < z.shape[1])
    grad.scatter_add_(1, torch.where(here, column, 0)[:, None], torch.where(here, a, 0.0)[:, None])
    blocks(grad)[row, block] += nucleus_term
    if softcap:
        grad.mul_(torch.div(z, softcap, out=e).tanh_().square_().neg_().add_(1))
    return grad


def nucleus_gradient(chunk: Scratch, c: Tensor, stats: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return -c w q (log q + H_p), q = e / M, in the blocks that hold a member of a row with c != 0.

    Returns:
        Those blocks' row ``[m]``, their number in the row ``[m]``, and the values ``[m, BLOCK]``.
    """
    holds_member = blocks(chunk.z).amax(-1) >= rest[layout.THRESHOLD, :, None]
    row, block = (holds_member & (c != 0)[:, None]).nonzero().unbind(1)
    z, d, e = (blocks(values)[row, block] for values in chunk)
    c, stats, rest = c[row, None], stats[:, row, None], rest[:, row, None]
    threshold, log_mass = rest[layout.THRESHOLD], rest[layout.LOG_TOTAL] + rest[layout.LOG_MASS]
    weight = (z > threshold) + (z == threshold) * rest[layout.TIE_WEIGHT]
    log_q = d - log_mass
    return row, block, -c / log_mass.exp() * weight * e * (log_q + stats[layout.NUCLEUS_ENTROPY])


def soft_capped(z: Tensor, softcap: float, out: Tensor) -> Tensor:
    """Return softcap * tanh(z / softcap), where a masked token stays masked."""
    torch.div(z, softcap, out=out)
    return out.tanh_().mul_(softcap).masked_fill_(z == -math.inf, -math.inf)


def shifted_exp(x: Tensor, top: Tensor, temperature: Tensor, d: Tensor, e: Tensor) -> None:
    """Compute d = max((x - top) / T, LOWEST) and e = exp(d) into the buffers.

    Not ``torch.softmax``, whose exp is a coarser one: Z is off by 2e-5 at V = 49,152.
    """
    torch.sub(x, top[:, None], out=d).mul_(1 / temperature[:, None]).clamp_(min=LOWEST)
    torch.exp(d, out=e)
