"""What one rank's columns add to the sums of a row that lies on several ranks, in chunked PyTorch.

z are the shard's logits, d = (f(z) - f(top)) / T and e = exp(d), with f the softcap or the identity.
"""

import math

import torch
from torch import Tensor

from paec_kernels.ops import layout
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.torch_backend import shifted_exp, soft_capped
from paec_kernels.ops.torch_rows import Scratch, for_each_chunk


def sums(logits: Tensor, rows: Rows, softcap: float, n_cols: int) -> Tensor:
    """Compute what the shard adds to each row's sums, relative to the shard's own largest logit.

    Args:
        logits: ``[B, L, V]``, the shard.
        rows: N = B * L; their token ids are columns of the shard, or -100 where the token is on another rank.
        softcap: 0.0 for none.
        n_cols: how many of the V columns are of the vocabulary.
    Returns:
        float32 ``[6, N]``, rows as in `layout`: the largest logit z, f(z) of it and of the second largest, Z = sum e,
        sum e d, and f(z) of the token or 0. Without a finite logit Z = sum e d = 0; NaN makes them NaN.
    """

    def compute(part: Rows, chunk: Scratch) -> Tensor:
        z, d, e = chunk
        best = z.topk(2).indices
        x = soft_capped(z, softcap, out=e) if softcap else z
        top, second = x.gather(1, best).unbind(1)
        top_logit = z.gather(1, best[:, :1]).squeeze(1)
        top_logit = torch.where(top_logit.isnan(), math.inf, top_logit)  # NaN is the largest to topk
        token = z.new_zeros(len(z))
        if part.token_ids is not None:
            there = x.gather(1, part.token_ids.clamp(min=0)[:, None]).squeeze(1)
            token = torch.where(part.token_ids < 0, token, there)
        shifted_exp(x, torch.where(top_logit.isfinite(), top, 0.0), part.temperature, d, e)
        return torch.stack((top_logit, top, second, e.sum(-1), d.mul_(e).sum(-1), token))

    return _of_rows(compute, layout.N_SUMS, logits, rows, n_cols)


def masses(logits: Tensor, rows: Rows, softcap: float, n_cols: int, top_logit: Tensor, thresholds: Tensor) -> Tensor:
    """Sum e over the shard's logits from each threshold on.

    Args:
        top_logit: float32 ``[N]``, the whole row's largest logit.
        thresholds: float32 ``[3, N]``.
        Others as for `sums`.
    Returns:
        float32 ``[3, N]``.
    """

    def compute(part: Rows, chunk: Scratch, top_logit: Tensor, thresholds: Tensor) -> Tensor:
        e = _weights(chunk, part, softcap, top_logit)
        return torch.stack([torch.where(chunk.z >= each[:, None], e, 0.0).sum(-1) for each in thresholds])

    return _of_rows(compute, layout.N_CUTS, logits, rows, n_cols, top_logit, thresholds)


def members(logits: Tensor, rows: Rows, softcap: float, n_cols: int, top_logit: Tensor, bracket: Tensor) -> Tensor:
    """Sum over the shard's logits from the bracket's end on, and look at those inside it.

    Args:
        bracket: float32 ``[2, N]``, low and high.
        Others as for `masses`.
    Returns:
        float32 ``[5, N]``, rows as in `layout`: over z >= high sum e, sum e d and how many; how many are in
        [low, high); the largest z < high, or -inf.
    """

    def compute(part: Rows, chunk: Scratch, top_logit: Tensor, bracket: Tensor) -> Tensor:
        e = _weights(chunk, part, softcap, top_logit)
        z, d = chunk.z, chunk.d
        low, high = bracket[..., None]
        above = z >= high
        e = torch.where(above, e, 0.0)
        tied = ((z >= low) & ~above).sum(-1)
        largest = torch.where(above, -math.inf, z).amax(-1)
        return torch.stack((e.sum(-1), d.mul_(e).sum(-1), above.sum(-1), tied, largest))

    return _of_rows(compute, layout.N_MEMBERS, logits, rows, n_cols, top_logit, bracket)


def _weights(chunk: Scratch, rows: Rows, softcap: float, top_logit: Tensor) -> Tensor:
    z, d, e = chunk
    top = softcap * torch.tanh(top_logit / softcap) if softcap else top_logit
    shifted_exp(soft_capped(z, softcap, out=e) if softcap else z, top, rows.temperature, d, e)
    return e


def _of_rows(compute, n_out: int, logits: Tensor, rows: Rows, n_cols: int, *of_rows: Tensor) -> Tensor:
    """Return ``[n_out, N]``, made chunk by chunk; 0 in rows that are not valid."""
    n_rows = logits.shape[0] * logits.shape[1]
    out = torch.zeros(n_out, n_rows, device=logits.device)
    rows = rows._replace(temperature=rows.temperature.expand(n_rows))

    def fill(numbers: Tensor, index: tuple, chunk: Scratch) -> None:
        out[:, numbers] = compute(rows.take(numbers), chunk, *(values[..., numbers] for values in of_rows))

    for_each_chunk(fill, logits[..., :n_cols], rows.valid)
    return out
