"""The forward kernel: one program a row, one pass over its logits, and the nucleus from what that pass keeps.

With d = (f(z) - r) log2(e) / T for a fixed reference logit r in place of a running maximum:

    Z = sum 2^d    S = sum d 2^d    lse = r / T + ln 2 log2 Z    H = ln 2 (log2 Z - S / Z)
"""

import triton
import triton.language as tl

from paec_kernels.token_stats.nucleus import GATHERED_LANES, find_nucleus
from paec_kernels.token_stats.rows import LN2, LOG2E, capped, insert_top_two, log2_weight, row_offset

# Powers of two between the reference and the row's maximum. Up to here log2 Z and S / Z, which cancel in H,
# keep an error below 5e-6; beyond, the row is read once more with its maximum as the reference.
REFERENCE_RANGE = tl.constexpr(40.0)


@triton.jit
def accumulate(z, total, weighted, first, second, reference, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    d = log2_weight(z, reference, scale, softcap, HAS_SOFTCAP)
    e = tl.exp2(d)
    first, second = insert_top_two(first, second, z)
    return total + e, weighted + e * d, first, second


@triton.jit
def read_row(row_ptr, stride, n_cols, reference, scale, softcap, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr):
    """Z, S and the two largest logits of each lane: four [LANES] tensors."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    first = tl.full([LANES], -float("inf"), tl.float32)
    second = tl.full([LANES], -float("inf"), tl.float32)
    n_full = n_cols // (2 * LANES) * (2 * LANES)
    # Two blocks in flight: one alone is too few bytes a thread to cover the latency of memory.
    for start in range(0, n_full, 2 * LANES):
        columns = (start + lanes).to(tl.int64)
        z0 = tl.load(row_ptr + columns * stride).to(tl.float32)
        z1 = tl.load(row_ptr + (columns + LANES) * stride).to(tl.float32)
        total, weighted, first, second = accumulate(
            z0, total, weighted, first, second, reference, scale, softcap, HAS_SOFTCAP
        )
        total, weighted, first, second = accumulate(
            z1, total, weighted, first, second, reference, scale, softcap, HAS_SOFTCAP
        )
    for start in range(n_full, n_cols, LANES):
        columns = (start + lanes).to(tl.int64)
        z = tl.load(row_ptr + columns * stride, mask=columns < n_cols, other=-float("inf")).to(tl.float32)
        total, weighted, first, second = accumulate(
            z, total, weighted, first, second, reference, scale, softcap, HAS_SOFTCAP
        )
    return total, weighted, first, second


@triton.jit
def store_stats(
    stats_ptr, n_rows, row, logp, entropy, nucleus_entropy, margin, lse, top, log_total, threshold, tie_weight, log_mass
):  # fmt: skip
    """One column of the [10, n_rows] table; the order is that of `layout`."""
    tl.store(stats_ptr + row, logp)
    tl.store(stats_ptr + n_rows + row, entropy)
    tl.store(stats_ptr + 2 * n_rows + row, nucleus_entropy)
    tl.store(stats_ptr + 3 * n_rows + row, margin)
    tl.store(stats_ptr + 4 * n_rows + row, lse)
    tl.store(stats_ptr + 5 * n_rows + row, top)
    tl.store(stats_ptr + 6 * n_rows + row, log_total)
    tl.store(stats_ptr + 7 * n_rows + row, threshold)
    tl.store(stats_ptr + 8 * n_rows + row, tie_weight)
    tl.store(stats_ptr + 9 * n_rows + row, log_mass)


@triton.jit(do_not_specialize=["n_rows", "n_inner"])
def forward_kernel(
    logits_ptr, stride_outer, stride_inner, stride_col,
    token_ids_ptr, token_stride, valid_ptr, valid_stride, temperature_ptr, temperature_stride,
    stats_ptr, size_ptr, scratch_ptr,
    n_rows, n_inner, n_cols, top_p, softcap,
    SHIFT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Statistics of one row into stats [10, n_rows] float32 and size [n_rows] int32.

    logits: [outer, inner, V] by strides, of which n_cols columns are read. token_ids, valid and temperature:
    [n_rows], or one element with stride 0. scratch: [n_rows, GATHERED_LANES] int32.
    """
    row = tl.program_id(0)
    if tl.load(valid_ptr + row * valid_stride) == 0:
        store_stats(stats_ptr, n_rows, row, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        tl.store(size_ptr + row, 0)
        return
    row_ptr = logits_ptr + row_offset(row, n_inner, stride_outer, stride_inner)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    scale = 1.0 / temperature * LOG2E

    lanes = tl.arange(0, LANES)
    head = tl.load(row_ptr + lanes.to(tl.int64) * stride_col, mask=lanes < n_cols, other=-float("inf"))
    reference = capped(tl.max(head.to(tl.float32)), softcap, HAS_SOFTCAP)
    reference = tl.where(tl.abs(reference) < float("inf"), reference, 0.0)
    total, weighted, first, second = read_row(
        row_ptr, stride_col, n_cols, reference, scale, softcap, HAS_SOFTCAP, LANES
    )
    top_logit = tl.max(first)
    top = capped(top_logit, softcap, HAS_SOFTCAP)
    distance = tl.abs(top - reference) * scale
    if (distance > REFERENCE_RANGE) & (tl.abs(top) < float("inf")):
        reference = top
        total, weighted, first, second = read_row(
            row_ptr, stride_col, n_cols, reference, scale, softcap, HAS_SOFTCAP, LANES
        )
    z_total = tl.sum(total)
    z_weighted = tl.sum(weighted)

    if (z_total > 0) & (z_total < float("inf")) & (top_logit < float("inf")):
        top_distance = (top - reference) * scale
        log2_total = tl.log2(z_total) - top_distance
        lse = top / temperature + log2_total * LN2
        entropy = tl.maximum((tl.log2(z_total) - z_weighted / z_total) * LN2, 0.0)

        is_top = first == top_logit
        n_top = tl.sum(is_top.to(tl.int32))
        second_best = tl.where(n_top > 1, top_logit, tl.max(tl.where(is_top, second, first)))
        margin = (top - capped(second_best, softcap, HAS_SOFTCAP)) / temperature

        threshold, tie_weight, mass, nucleus_weighted, size = find_nucleus(
            row_ptr, stride_col, n_cols, first, second, second_best, z_total * tl.exp2(-top_distance),
            top_logit, top_p, top, scale, softcap, scratch_ptr + row.to(tl.int64) * GATHERED_LANES,
            SHIFT, HAS_SOFTCAP, LANES,
        )  # fmt: skip
        log2_mass = tl.log2(mass)
        nucleus_entropy = tl.maximum((log2_mass - nucleus_weighted / mass) * LN2, 0.0)

        token = tl.load(token_ids_ptr + row * token_stride)
        logp = 0.0
        if token >= 0:
            z = tl.load(row_ptr + token.to(tl.int64) * stride_col).to(tl.float32)
            logp = (capped(z, softcap, HAS_SOFTCAP) - top) / temperature - log2_total * LN2
        store_stats(
            stats_ptr, n_rows, row, logp, entropy, nucleus_entropy, margin, lse,
            top, log2_total * LN2, threshold, tie_weight, (log2_mass - log2_total) * LN2,
        )  # fmt: skip
        tl.store(size_ptr + row, size.to(tl.int32))
    else:
        nan = float("nan")
        store_stats(stats_ptr, n_rows, row, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan)
        tl.store(size_ptr + row, 0)
