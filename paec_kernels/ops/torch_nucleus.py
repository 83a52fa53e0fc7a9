"""The torch backend's nucleus of each row: from a short list of its best tokens, or else from a sieve of all.

As everywhere in this backend d = x - max(x), e = exp(d) and Z = sum e.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from paec_kernels.ops.torch_rows import BLOCK, Scratch, blocks

SHORT_LIST = 128  # tokens in the first, cheap attempt at a nucleus


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


def top_columns(z: Tensor, k: int) -> Tensor:
    """Return the columns of each row's k largest logits (all, if there are fewer), largest first, ``[r, k]``.

    They lie in the k blocks with the largest maxima.
    """
    n_rows, width = z.shape
    n_blocks = width // BLOCK
    best_blocks = blocks(z).amax(-1).topk(min(k, n_blocks), sorted=False).indices
    flat_blocks = best_blocks + n_blocks * torch.arange(n_rows, device=z.device)[:, None]
    members = z.view(-1, BLOCK).index_select(0, flat_blocks.flatten()).view(n_rows, -1)
    place = members.topk(min(k, members.shape[1])).indices
    return best_blocks.gather(1, place // BLOCK) * BLOCK + place % BLOCK


def select_nucleus(chunk: Scratch, best: Tensor, total: Tensor, top_p: float) -> Nucleus:
    """Select the smallest set with mass >= top_p Z: from the best tokens, or where those fall short, from all."""
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
    """Return the columns of a superset of each row's nucleus, ``[r, C]`` in any order, and which are not padding.

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
    """Drop tokens with e < spare / n; return the others' columns, which are not padding, and what is left of spare."""
    keep = e >= (0.99 * spare / n)[:, None]  # 0.99: the sums below round
    return *compact(keep), spare - (e * ~keep).sum(-1)


def compact(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the columns where ``keep [r, W]`` is true, padded with 0 to the longest row, and which are no padding."""
    count = keep.sum(-1)
    listed = torch.arange(int(count.max()), device=keep.device) < count[:, None]
    flat = keep.flatten().nonzero().squeeze(1)
    return torch.zeros_like(listed, dtype=torch.int64).masked_scatter_(listed, flat) % keep.shape[1], listed


def nucleus_of_sorted(z: Tensor, d: Tensor, e: Tensor, target: Tensor) -> Nucleus:
    """Return the nucleus of tokens ``[r, C]`` sorted by descending logit, -inf last, where every tie is listed."""
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
    """Return the nucleus at top_p = 1: every finite logit, each above the threshold -inf."""
    zero = torch.zeros_like(total)
    return Nucleus((z > -math.inf).sum(-1), zero - math.inf, zero, total, zero)
