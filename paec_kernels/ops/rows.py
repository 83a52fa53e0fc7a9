"""One row of logits as the kernels see it, and the device functions that read it.

Units: z is a raw logit; f(z) is z, or softcap * tanh(z / softcap); x = f(z) / T; scale = log2(e) / T. A softmax
weight relative to a reference logit r is 2^((f(z) - r) scale). The difference is taken before the product, so
that logits near +-5,000 keep the digits in which they differ.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from paec_kernels.types import IGNORE_INDEX

IGNORE = tl.constexpr(IGNORE_INDEX)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 of this is 0 in float32, and it times 0 is 0: a finite stand-in for -inf in products.
UNDERFLOW = tl.constexpr(-150.0)

# What differs from batch to batch, so that no kernel is compiled for one of its values: sizes; and whether values, one
# a row, begin at a multiple of 16 bytes, as `ids[:, 1:]` does for two answers (it is copied) and not for one (a view).
SIZES = ("temperature_stride", "n_rows", "n_inner")
ONE_A_ROW = ("token_ids_ptr", "valid_ptr", "temperature_ptr", "d_stats_ptr")


def strides_of(logits: Tensor) -> tuple[int, int, int]:
    """Return the strides of ``[outer, inner, V]``; 0 for the only outer row, whose size would make Triton recompile."""
    outer, inner, column = logits.stride()
    return 0 if len(logits) == 1 else outer, inner, column


class Row(NamedTuple):
    """One row of logits, or of their gradient, of which the first n_cols columns are meant."""

    ptr: tl.tensor
    stride: tl.tensor
    n_cols: tl.tensor


class Units(NamedTuple):
    """What makes the weight 2^((f(z) - reference) scale) of a logit z; softcap None makes f the identity."""

    reference: tl.tensor
    scale: tl.tensor
    softcap: tl.tensor | None


@triton.jit
def row_offset(row, n_inner, stride_outer, stride_inner):
    """Return the element offset of a flat row index in a [outer, inner, V] view, in int64: N * V passes 2^31."""
    row = row.to(tl.int64)
    return (row // n_inner) * stride_outer + (row % n_inner) * stride_inner


@triton.jit
def token_of(token_ids_ptr, row):
    """Load the row's token id; IGNORE where there are no ids."""
    if token_ids_ptr is None:
        return tl.full([], IGNORE, tl.int64)
    else:
        return tl.load(token_ids_ptr + row)


@triton.jit
def load_last(row, start, LANES: tl.constexpr):
    """Load LANES columns, those from n_cols on as -inf."""
    columns = start + tl.arange(0, LANES)
    z = tl.load(row.ptr + columns.to(tl.int64) * row.stride, mask=columns < row.n_cols, other=-float("inf"))
    return z.to(tl.float32)


@triton.jit
def tanh(u):
    """Compute tanh to within three roundings of float32, near 0 too."""
    t = tl.exp2(tl.abs(u) * -2.8853900817779268)  # exp(-2 |u|)
    magnitude = (1.0 - t) / (1.0 + t)
    # 1 - t cancels for small u: the Taylor series up to u^9 is exact to float32 there.
    s = u * u
    series = u * (1.0 - s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835)))))
    return tl.where(s < 0.04, series, tl.where(u < 0, -magnitude, magnitude))


@triton.jit
def capped(z, softcap):
    """Compute f(z); a masked token (-inf) stays masked."""
    if softcap is None:
        return z
    else:
        return tl.where(z == -float("inf"), z, softcap * tanh(z / softcap))


@triton.jit
def log2_weight(z, units):
    """Compute (f(z) - reference) * scale, at least UNDERFLOW, NaN where z is NaN."""
    d = (capped(z, units.softcap) - units.reference) * units.scale
    return tl.maximum(d, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def insert_top_two(first, second, z):
    """Keep the two largest values that each lane has seen."""
    return tl.maximum(first, z), tl.maximum(second, tl.minimum(first, z))
