"""The backward kernel: one read and one write of the logits for any mix of the three gradients.

With a, b, b_p the incoming gradients of logp, H and H_p, q = p / M the nucleus' distribution and w its weights:

    dz = f'(z) / T * ( a (1[i = y] - p)  -  b p (log p + H)  -  b_p w q (log q + H_p) )

so inside a region where w is constant (above, at, below the threshold) dz is p times a line in log2 p, and each
program only selects the line's two coefficients.
"""

import triton
import triton.language as tl

from paec_kernels.token_stats.rows import LN2, LOG2E, log2_weight, row_offset, tanh


@triton.jit(do_not_specialize=["n_rows", "n_inner", "first_column"])
def backward_kernel(
    d_logits_ptr, d_stride_outer, d_stride_inner, d_stride_col,
    logits_ptr, stride_outer, stride_inner, stride_col,
    token_ids_ptr, token_stride, valid_ptr, valid_stride, temperature_ptr, temperature_stride,
    stats_ptr, d_stats_ptr,
    n_rows, n_inner, n_cols, width, softcap, first_column,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK columns of one row; d_logits may be logits itself.

    Columns from n_cols to width are padding and get 0, as every column of a row that is not valid does. stats and
    d_stats: [10, n_rows] float32, of which the first three rows of d_stats are read. The columns may be those from
    first_column on of a wider vocabulary.
    """
    n_blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // n_blocks
    columns = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)
    out_ptr = d_logits_ptr + row_offset(row, n_inner, d_stride_outer, d_stride_inner)
    out_ptrs = out_ptr + columns.to(tl.int64) * d_stride_col
    if tl.load(valid_ptr + row * valid_stride) == 0:
        tl.store(out_ptrs, tl.zeros([BLOCK], d_logits_ptr.dtype.element_ty), mask=columns < width)
        return
    row_ptr = logits_ptr + row_offset(row, n_inner, stride_outer, stride_inner)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * temperature_stride)
    scale = inverse_temperature * LOG2E
    token = tl.load(token_ids_ptr + row * token_stride)

    entropy = tl.load(stats_ptr + n_rows + row)
    nucleus_entropy = tl.load(stats_ptr + 2 * n_rows + row)
    top = tl.load(stats_ptr + 5 * n_rows + row)
    log_total = tl.load(stats_ptr + 6 * n_rows + row)
    threshold = tl.load(stats_ptr + 7 * n_rows + row)
    tie_weight = tl.load(stats_ptr + 8 * n_rows + row)
    log_mass = tl.load(stats_ptr + 9 * n_rows + row)

    a = tl.where(token >= 0, tl.load(d_stats_ptr + row), 0.0) * inverse_temperature
    b = tl.load(d_stats_ptr + n_rows + row) * inverse_temperature
    b_nucleus = tl.load(d_stats_ptr + 2 * n_rows + row) * inverse_temperature * tl.exp2(-log_mass * LOG2E)
    # dz = p (offset + slope log2 p), plus the nucleus' own line at weight w, plus a at the target.
    offset = -a - b * entropy
    slope = -b * LN2
    nucleus_offset = -b_nucleus * (nucleus_entropy - log_mass)
    nucleus_slope = -b_nucleus * LN2

    z = tl.load(row_ptr + columns.to(tl.int64) * stride_col, mask=columns < n_cols, other=-float("inf")).to(tl.float32)
    log2_p = log2_weight(z, top, scale, softcap, HAS_SOFTCAP) - log_total * LOG2E
    p = tl.exp2(log2_p)
    w = tl.where(z > threshold, 1.0, tl.where(z == threshold, tie_weight, 0.0))
    dz = p * ((offset + w * nucleus_offset) + (slope + w * nucleus_slope) * log2_p)
    dz += tl.where(columns + first_column == token, a, 0.0)
    if HAS_SOFTCAP:
        u = tanh(z / softcap)
        dz *= 1.0 - u * u
    dz = tl.where(columns < n_cols, dz, 0.0)
    tl.store(out_ptrs, dz.to(d_logits_ptr.dtype.element_ty), mask=columns < width)
