"""The nucleus of a row, exactly, without a sort: a search over candidates that the forward pass keeps anyway.

The forward pass splits the columns into LANES residue classes ("lanes") and keeps the two largest logits of each.
The nucleus is {z >= tau} for the largest tau with G(tau) >= target, where G(t) = sum of exp(x) over z >= t and
target = top_p * Z. The candidates' G is at most the row's, so their tau is at most the true one, and what they miss
matters only in a lane whose second best is >= tau, a "suspect":

1. no suspect: the candidates' answer is exact;
2. a few: read those lanes again (V / LANES columns each) and search the union, which misses nothing;
3. many: read the row once more, for the sums over everything from a pivot on and for the candidates below it. With
   the pivot a little above tau hardly a lane holds two tokens between them, and 1 ends the search. The candidates tell
   how far above: a lane's chance to hide a third token follows from how many lanes have a first;
4. a pivot at or below tau, or candidates that fall short of the target: narrow the bracket around tau by reading the
   masses of three thresholds at a time, until it holds few tokens, and go on with 3.

1 and 2 are here, 3 and 4 in `nucleus_readings`. Weights are relative to the row's largest, which is 1.
"""

import triton
import triton.language as tl

from paec_kernels.ops.nucleus_readings import from_readings, pivot_above, read_below
from paec_kernels.ops.nucleus_search import (
    LARGEST,
    Nucleus,
    highest_key_of,
    lowest_key,
    search_values,
    the_top_alone,
)
from paec_kernels.ops.rows import insert_top_two

GATHERED_LANES = tl.constexpr(64)
GATHERED_COLUMNS = tl.constexpr(8)


@triton.jit
def gather_lanes(row, suspect, n_suspect, scratch_ptr, LANES: tl.constexpr):
    """Read the suspect lanes' columns, and keep the two best of each of GATHERED_LANES x GATHERED_COLUMNS places.

    Returns:
        the best and the second best of each place, and the best that a place may have dropped.
    """
    place = tl.cumsum(suspect.to(tl.int32), 0) - 1
    tl.store(scratch_ptr + place, tl.arange(0, LANES), mask=suspect)
    tl.debug_barrier()
    index = tl.arange(0, GATHERED_LANES)
    lane = tl.load(scratch_ptr + index, mask=index < n_suspect, other=row.n_cols)
    offsets = lane[:, None] + LANES * tl.arange(0, GATHERED_COLUMNS)[None, :]
    first = tl.full([GATHERED_LANES, GATHERED_COLUMNS], -float("inf"), tl.float32)
    second = first
    dropped = first
    for start in range(0, row.n_cols, LANES * GATHERED_COLUMNS):
        columns = start + offsets
        inside = (columns < row.n_cols) & (lane[:, None] < row.n_cols)
        z = tl.load(row.ptr + columns.to(tl.int64) * row.stride, mask=inside, other=-float("inf")).to(tl.float32)
        dropped = tl.maximum(dropped, tl.minimum(second, z))
        first, second = insert_top_two(first, second, z)
    return first, second, tl.max(dropped)


@triton.jit
def from_candidates(
    row, first, second, low, high, target, units, scratch_ptr, SHIFT: tl.constexpr, LANES: tl.constexpr
):
    """Find the nucleus from the two largest logits of each lane, and from all of a few lanes that may hold more.

    Returns:
        whether it is exact; low, raised where the candidates reach the target; a pivot for the next reading, or high;
        the nucleus.
    """
    reached, low_found, nucleus = search_values((first, second), None, low, high, (0.0, 0.0, 0.0), target, units, SHIFT)
    suspect = second >= nucleus.tau
    n_suspect = tl.sum(suspect.to(tl.int32))
    exact = reached & (n_suspect == 0)
    pivot = high
    if reached:
        low = low_found
        if (n_suspect > GATHERED_LANES) & (low + 1 < high):
            pivot = pivot_above(first, second, low, high, row.n_cols, units, SHIFT, LANES)
        elif (n_suspect > 0) & (n_suspect <= GATHERED_LANES):
            best, next_best, dropped = gather_lanes(row, suspect, n_suspect, scratch_ptr, LANES)
            first = tl.where(suspect, -float("inf"), first)
            second = tl.where(suspect, -float("inf"), second)
            # The union reaches the target at low, since the candidates alone do.
            _, low, nucleus = search_values(
                (first, second), (best, next_best), low, high, (0.0, 0.0, 0.0), target, units, SHIFT
            )
            exact = dropped < nucleus.tau
    return exact, low, pivot, nucleus


@triton.jit
def find_nucleus(
    row,
    first,
    second,
    second_best,
    total,
    top_logit,
    top_p,
    units,
    scratch_ptr,
    SHIFT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Find the nucleus of a row of finite total weight.

    Args:
        first, second: [LANES], the two largest logits of each lane; second_best: the row's second largest logit.
        total: Z relative to the row's largest weight; top_logit: the largest logit.
        units: with the reference f(top_logit).
        scratch_ptr: GATHERED_LANES int32 of this row's own.
    """
    target = top_p * total
    nucleus = the_top_alone(top_logit)
    if top_p >= 1.0:
        # Every token of non-zero probability: from the smallest finite value on.
        mass, weighted, size, _, _, _ = read_below(row, -LARGEST, -LARGEST, units, LANES // 4)
        nucleus = Nucleus(tl.full([], -float("inf"), tl.float32), tl.full([], 0.0, tl.float32), mass, weighted, size)
    elif (target > 1.0) | (second_best == top_logit):
        low = lowest_key((1.0 - top_p) * total / row.n_cols, units, SHIFT)
        high = highest_key_of(top_logit, SHIFT) + 1
        exact, low, pivot, nucleus = from_candidates(
            row, first, second, low, high, target, units, scratch_ptr, SHIFT, LANES
        )
        if exact == 0:
            nucleus = from_readings(row, low, high, pivot, target, units, SHIFT, LANES)
    return nucleus
