"""Statistics of rows whose columns lie on several ranks. Each reads its own, and none sends a logit.

With top the largest logit of all ranks, d = (f(z) - f(top)) / T and e = exp(d):

    Z = sum of e    S = sum of e d    lse = f(top) / T + log Z    H = log Z - S / Z

The nucleus is {z >= tau} for the largest tau with G(tau) >= top_p Z, where G(t) is the sum of e over z >= t. All ranks
hold the same bracket [low, high) of keys, integers in the order of the logits' values, with G(low) >= top_p Z >
G(high). A round cuts it in four: the ranks add up their masses from three thresholds on, and the quarter in which G
passes the target is the next bracket. That is two bits a round, at most 16 rounds in float32 and 8 in 16 bits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels.checks import LARGEST
from paec_kernels.ops import layout
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.torch_backend import LOWEST
from paec_kernels.ops.torch_nucleus import Nucleus
from paec_kernels.ops.vocab_group import Shard
from paec_kernels.types import IGNORE_INDEX

CUTS = layout.N_CUTS  # of a bracket in a round


class ShardPasses(NamedTuple):
    """What a backend reads of a shard; `torch_shard` documents them."""

    sums: Callable[..., Tensor]
    masses: Callable[..., Tensor]
    members: Callable[..., Tensor]


class SplitRows:
    """Rows of which this rank has some columns: what all ranks together add to their sums."""

    def __init__(
        self, passes: ShardPasses, logits: Tensor, rows: Rows, softcap: float, shard: Shard, group: dist.ProcessGroup
    ) -> None:
        self.passes, self.logits, self.softcap, self.shard, self.group = passes, logits, softcap, shard, group
        self.rows = rows._replace(temperature=rows.temperature.expand(logits.shape[0] * logits.shape[1]).contiguous())
        self.own = self.rows._replace(token_ids=own_columns(rows.token_ids, shard))

    def relative(self, z: Tensor, top: Tensor) -> Tensor:
        """Return d = (f(z) - top) / T of a logit of each row, where it is not 0 in float32's exponential."""
        x = torch.where(z == -math.inf, z, self.softcap * torch.tanh(z / self.softcap)) if self.softcap else z
        return ((x - top) / self.rows.temperature).clamp(min=LOWEST)  # 0 * -inf would be NaN

    def add(self, x: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """Take the largest of all ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def sums(self) -> Tensor:
        return self._read(self.passes.sums, layout.N_SUMS, slice(layout.TOP_LOGIT, layout.OWN_SECOND + 1))

    def masses(self, top_logit: Tensor, thresholds: Tensor) -> Tensor:
        return self._read(self.passes.masses, layout.N_CUTS, slice(0), top_logit, thresholds)

    def members(self, top_logit: Tensor, bracket: Tensor) -> Tensor:
        return self._read(self.passes.members, layout.N_MEMBERS, slice(layout.LARGEST_BELOW, None), top_logit, bracket)

    def _read(self, work: Callable[..., Tensor], n: int, logits: slice, *arguments: Tensor) -> Tensor:
        """Return what a pass makes of this rank's columns, ``[n, N]``; of no column 0, and -inf where it is a logit."""
        if self.shard.n_cols:
            return work(self.logits, self.own, self.softcap, self.shard.n_cols, *arguments)
        nothing = torch.zeros(n, len(self.rows.temperature), device=self.logits.device)
        nothing[logits] = -math.inf
        return nothing


def own_columns(token_ids: Tensor | None, shard: Shard) -> Tensor | None:
    """Return token ids as columns of this rank, -100 where they are on another."""
    if token_ids is None:
        return None
    column = token_ids - shard.first_column
    return torch.where((column >= 0) & (column < shard.n_cols), column, IGNORE_INDEX)


def forward(split: SplitRows, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows' table, as the forward pass of a backend; the same on every rank, to the bit."""
    own = split.sums()
    own_top = own[layout.OWN_TOP]
    top_logit, top = split.largest(own[: layout.OWN_TOP + 1].clone())
    broken = ~top_logit.isfinite()
    top_logit, top = top_logit.masked_fill(broken, 0.0), top.masked_fill(broken, 0.0)

    d = ((own_top - top) / split.rows.temperature).clamp(min=LOWEST)
    e, has_top = d.exp(), own_top == top
    total = own[layout.TOTAL] * e
    moment = own[layout.MOMENT] * e + total * d
    d_token = torch.zeros_like(total)
    if split.own.token_ids is not None:
        there = (own[layout.TOKEN] - top) / split.rows.temperature
        d_token = torch.where(split.own.token_ids < 0, d_token, there)
    total, moment, d_token, n_top = split.add(torch.stack((total, moment, d_token, has_top.float())))
    # Of a rank with the largest logit its second, which is the largest too where two of its own tie.
    second = split.largest(torch.where(has_top, own[layout.OWN_SECOND], own_top))
    second = torch.where(n_top > 1, top, second)
    broken |= total.isnan()

    log_total = total.log()
    entropy = log_total - moment / total
    if top_p < 1:
        nucleus = find_nucleus(split, top_logit, top, total.masked_fill(broken, 0.0), top_p)
    else:
        nucleus = whole_vocabulary(split, top_logit, total, moment)
    log_mass = nucleus.mass.log()

    stats, rest, sizes = layout.new_table(torch.zeros, len(top), top.device)
    if split.rows.token_ids is not None:
        stats[layout.LOGP] = torch.where(split.rows.token_ids == IGNORE_INDEX, 0.0, d_token - log_total)
    stats[layout.ENTROPY] = entropy.clamp(min=0)
    stats[layout.NUCLEUS_ENTROPY] = (log_mass - nucleus.moment / nucleus.mass).clamp(min=0)
    rest[layout.MARGIN] = (top - second) / split.rows.temperature
    rest[layout.LSE] = top / split.rows.temperature + log_total
    rest[layout.TOP] = top
    rest[layout.LOG_TOTAL] = log_total
    rest[layout.THRESHOLD] = nucleus.threshold
    rest[layout.TIE_WEIGHT] = nucleus.tie_weight
    rest[layout.LOG_MASS] = log_mass - log_total
    sizes[:] = nucleus.size
    stats.masked_fill_(broken, math.nan)
    rest.masked_fill_(broken, math.nan)
    sizes.masked_fill_(broken, 0)
    if split.rows.valid is not None:
        for values in (stats, rest, sizes):
            values.masked_fill_(~split.rows.valid, 0)
    return stats, rest, sizes


def whole_vocabulary(split: SplitRows, top_logit: Tensor, total: Tensor, moment: Tensor) -> Nucleus:
    """Return the nucleus at top_p = 1: every finite logit, each above the threshold -inf."""
    own = split.members(top_logit, torch.full((2, len(total)), -LARGEST, device=total.device))
    count, nothing = split.add(own[layout.N_ABOVE]), torch.zeros_like(total)
    return Nucleus(count, nothing - math.inf, nothing, total, moment)


def find_nucleus(split: SplitRows, top_logit: Tensor, top: Tensor, total: Tensor, top_p: float) -> Nucleus:
    """Find the nucleus of rows with the largest logit ``top_logit``, f of it ``top``, and Z ``total``, 0 for none."""
    target = top_p * total
    low = lowest_keys(split, top_logit, total, top_p)
    high = key_of(top_logit + 0.0, split.logits.dtype) + 1  # -0.0 + 0.0 is 0.0
    mass_low, mass_high = torch.full_like(total, LARGEST), torch.zeros_like(total)
    while bool((may_hold_more(split, top, low, high, mass_low, mass_high) & (total > 0)).any()):
        cuts = torch.stack([low + (high - low) * i // (CUTS + 1) for i in range(1, CUTS + 1)])
        masses = split.add(split.masses(top_logit, value_of(cuts, split.logits.dtype)))
        enough = ((masses >= target) | (cuts == low)).long().cumprod(0).sum(0)[None]
        ends = torch.cat((low[None], cuts, high[None]))
        masses = torch.cat((mass_low[None], masses, mass_high[None]))
        low, high = (ends.gather(0, enough + i)[0] for i in (0, 1))
        mass_low, mass_high = (masses.gather(0, enough + i)[0] for i in (0, 1))

    own = split.members(top_logit, value_of(torch.stack((low, high)), split.logits.dtype))
    threshold = split.largest(own[layout.LARGEST_BELOW])
    mass, moment, n_above, n_tied = split.add(own[: layout.LARGEST_BELOW])
    # k = min(n, max(1, ceil((target - M>) / e))) of the n tied at the threshold belong, each with weight k / n  [ours]
    d = split.relative(threshold, top)
    e = d.exp()
    k = torch.minimum(((target - mass) / e.clamp(min=1e-37)).ceil().clamp(min=1), n_tied)
    return Nucleus(n_above + k, threshold, k / n_tied.clamp(min=1), mass + k * e, moment + k * e * d)


def may_hold_more(
    split: SplitRows, top: Tensor, low: Tensor, high: Tensor, mass_low: Tensor, mass_high: Tensor
) -> Tensor:
    """Tell which brackets may still hold tokens of more than one value. Each weighs at least what one at low does."""
    lightest = split.relative(value_of(low, split.logits.dtype), top).exp()
    rounding = 1e-6 * mass_low
    return (low + 1 < high) & (mass_low - mass_high > 1.5 * lightest - rounding)


def lowest_keys(split: SplitRows, top_logit: Tensor, total: Tensor, top_p: float) -> Tensor:
    """Return keys below any nucleus: tokens with e < (1 - top_p) Z / V weigh at most (1 - top_p) Z together."""
    least = torch.finfo(split.logits.dtype).min
    lowest = torch.full_like(top_logit, least)
    if not split.softcap:
        # Lowered by far more than rounding errors, and by far less than a round is worth.
        negligible = (1 - top_p) * total / split.shard.vocab_size
        lowest = top_logit + split.rows.temperature * (negligible.log() - 1e-3) - 1e-6 * top_logit.abs()
    # One key lower, as 16 bits may have rounded it up.
    return torch.maximum(
        key_of(lowest, split.logits.dtype) - 1, key_of(torch.full_like(top_logit, least), split.logits.dtype)
    )


def key_of(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Map z to int64 in the order of its values in the logits' dtype."""
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    bits = z.to(dtype).view(integer)
    return torch.where(bits < 0, bits ^ torch.iinfo(integer).max, bits).long()


def value_of(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Invert `key_of`, to float32."""
    integer = torch.int32 if dtype.itemsize == 4 else torch.int16
    bits = torch.where(key < 0, key ^ torch.iinfo(integer).max, key)
    return bits.to(integer).view(dtype).float()
