"""The backward kernel: one read and one write of the logits for any mix of the three gradients.

With a, b, b_p the incoming gradients of logp, H and H_p, q = p / M the nucleus' distribution and w its weights:

    dz = f'(z) / T * ( a (1[i = y] - p)  -  b p (log p + H)  -  b_p w q (log q + H_p) )

so inside a region where w is constant (above, at, below the threshold) dz is p times a line in log2 p, and each
program only selects the line's two coefficients.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from paec_kernels.ops import layout
from paec_kernels.ops.rows import (
    LN2,
    LOG2E,
    ONE_A_ROW,
    SIZES,
    UNDERFLOW,
    Row,
    Units,
    capped,
    row_offset,
    strides_of,
    tanh,
    token_of,
)

TILES = tl.constexpr(4)  # of BLOCK columns in a program, which loads and prepares the row's scalars once for them


class Line(NamedTuple):
    """A row's gradient: p (offset + slope log2 p), plus a at the target.

    In the nucleus the second line is added at weight w, which is tie_weight at the threshold and 1 above it.
    """

    units: Units  # relative to the row's largest weight
    log2_total: tl.tensor
    offset: tl.tensor
    slope: tl.tensor
    nucleus_offset: tl.tensor
    nucleus_slope: tl.tensor
    threshold: tl.tensor
    tie_weight: tl.tensor
    a: tl.tensor
    target: tl.tensor  # the token's column


@triton.jit
def write_tile(
    out, row, start, line, MASKED: tl.constexpr, WITH_NUCLEUS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK columns of the gradient; with MASKED those behind the row's last get 0 as far as out goes."""
    columns = start + tl.arange(0, BLOCK)
    pointers = row.ptr + columns.to(tl.int64) * row.stride
    if MASKED:
        z = tl.load(pointers, mask=columns < row.n_cols, other=-float("inf")).to(tl.float32)
    else:
        z = tl.load(pointers).to(tl.float32)

    softcap = line.units.softcap
    log2_p = (capped(z, softcap) - line.units.reference) * line.units.scale - line.log2_total
    log2_p = tl.maximum(log2_p, UNDERFLOW, propagate_nan=tl.PropagateNan.ALL)  # -inf times p = 0 would be NaN
    offset, slope = line.offset, line.slope
    if WITH_NUCLEUS:
        w = tl.where(z > line.threshold, 1.0, tl.where(z == line.threshold, line.tie_weight, 0.0))
        offset += w * line.nucleus_offset
        slope += w * line.nucleus_slope
    dz = tl.exp2(log2_p) * (offset + slope * log2_p)
    if (line.target >= start) & (line.target < start + BLOCK):
        dz += tl.where(columns == line.target, line.a, 0.0)
    if softcap is not None:
        u = tanh(z / softcap)
        dz *= 1.0 - u * u

    pointers = out.ptr + columns.to(tl.int64) * out.stride
    if MASKED:
        dz = tl.where(columns < row.n_cols, dz, 0.0)
        tl.store(pointers, dz.to(out.ptr.dtype.element_ty), mask=columns < out.n_cols)
    else:
        tl.store(pointers, dz.to(out.ptr.dtype.element_ty))


@triton.jit
def write_columns(out, row, begin, line, WITH_NUCLEUS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the gradient of out's columns from begin on: whole tiles, then what is left and the padding."""
    whole = begin + tl.maximum(tl.minimum(out.n_cols, row.n_cols) - begin, 0) // BLOCK * BLOCK
    for start in range(begin, whole, BLOCK):
        write_tile(out, row, start, line, False, WITH_NUCLEUS, BLOCK)
    for start in range(whole, out.n_cols, BLOCK):
        write_tile(out, row, start, line, True, WITH_NUCLEUS, BLOCK)


@triton.jit(do_not_specialize=[*SIZES, "first_column"], do_not_specialize_on_alignment=ONE_A_ROW)
def backward_kernel(
    d_logits_ptr, d_stride_outer, d_stride_inner, d_stride_col,
    logits_ptr, stride_outer, stride_inner, stride_col,
    token_ids_ptr, valid_ptr, temperature_ptr, temperature_stride,
    stats_ptr, rest_ptr, d_stats_ptr,
    n_rows, n_inner, n_cols, width, softcap, first_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of TILES * BLOCK columns of one row; d_logits may be logits itself.

    Columns from n_cols to width are padding and get 0, as every column of a row that is not valid does. The
    table is as in `layout`; d_stats: [3, n_rows] float32, the gradient of its stats; token_ids, valid: [n_rows] or
    None. The columns may be those from first_column on of a wider vocabulary.
    """
    n_programs = tl.cdiv(width, TILES * BLOCK)  # of a row
    row = tl.program_id(0) // n_programs
    begin = tl.program_id(0) % n_programs * (TILES * BLOCK)
    end = tl.minimum(begin + TILES * BLOCK, width)
    out_ptr = d_logits_ptr + row_offset(row, n_inner, d_stride_outer, d_stride_inner)
    if valid_ptr is not None and tl.load(valid_ptr + row) == 0:
        for start in range(begin, end, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], d_logits_ptr.dtype.element_ty)
            tl.store(out_ptr + columns.to(tl.int64) * d_stride_col, zeros, mask=columns < width)
        return
    row_ptr = logits_ptr + row_offset(row, n_inner, stride_outer, stride_inner)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row * temperature_stride)
    token = token_of(token_ids_ptr, row)

    entropy = tl.load(stats_ptr + layout.ENTROPY * n_rows + row)
    nucleus_entropy = tl.load(stats_ptr + layout.NUCLEUS_ENTROPY * n_rows + row)
    log_total = tl.load(rest_ptr + layout.LOG_TOTAL * n_rows + row)
    log_mass = tl.load(rest_ptr + layout.LOG_MASS * n_rows + row)
    a = tl.where(token >= 0, tl.load(d_stats_ptr + layout.LOGP * n_rows + row), 0.0) * inverse_temperature
    b = tl.load(d_stats_ptr + layout.ENTROPY * n_rows + row) * inverse_temperature
    b_nucleus = tl.load(d_stats_ptr + layout.NUCLEUS_ENTROPY * n_rows + row) * inverse_temperature
    b_nucleus *= tl.exp2(-log_mass * LOG2E)
    line = Line(
        units=Units(tl.load(rest_ptr + layout.TOP * n_rows + row), inverse_temperature * LOG2E, softcap),
        log2_total=log_total * LOG2E,
        offset=-a - b * entropy,
        slope=-b * LN2,
        nucleus_offset=-b_nucleus * (nucleus_entropy - log_mass),
        nucleus_slope=-b_nucleus * LN2,
        threshold=tl.load(rest_ptr + layout.THRESHOLD * n_rows + row),
        tie_weight=tl.load(rest_ptr + layout.TIE_WEIGHT * n_rows + row),
        a=a,
        target=(token - first_column).to(tl.int32),  # in no tile where it is ignored or elsewhere
    )
    if b_nucleus != 0:
        write_columns(Row(out_ptr, d_stride_col, end), Row(row_ptr, stride_col, n_cols), begin, line, True, BLOCK)
    else:
        write_columns(Row(out_ptr, d_stride_col, end), Row(row_ptr, stride_col, n_cols), begin, line, False, BLOCK)


BACKWARD_BLOCK = 4096
BACKWARD_WARPS = 8


def backward(
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    logits: Tensor,
    rows: layout.Rows,
    softcap: float,
    vocab_size: int,
    out: Tensor,
    first_column: int = 0,
) -> None:
    """Launch the kernel on logits ``[B, L, V]``; see `torch_backend.backward` for the arguments."""
    n_outer, n_inner, width = logits.shape
    n_rows = n_outer * n_inner
    if n_rows == 0:
        return
    if triton.knobs.runtime.interpret and out.dtype == torch.bfloat16:
        # Triton's interpreter truncates to bfloat16 where a GPU rounds: let torch round.
        exact = torch.empty(out.shape, dtype=torch.float32)
        backward(d_stats, stats, rest, logits.float(), rows, softcap, vocab_size, exact, first_column)
        out.copy_(exact)
        return
    launch = backward_kernel[(n_rows * triton.cdiv(width, TILES.value * BACKWARD_BLOCK),)]
    with torch.cuda.device_of(logits):
        launch(
            out,
            *strides_of(out),
            logits,
            *strides_of(logits),
            rows.token_ids,
            rows.valid,
            rows.temperature,
            int(rows.temperature.numel() > 1),
            stats,
            rest,
            d_stats,
            n_rows,
            n_inner,
            vocab_size,
            width,
            softcap or None,
            first_column,
            BLOCK=BACKWARD_BLOCK,
            num_warps=BACKWARD_WARPS,
            enable_fp_fusion=True,
        )
