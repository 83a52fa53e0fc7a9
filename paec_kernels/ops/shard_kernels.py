"""The kernels of a row whose columns lie on several ranks: what one rank's columns add to the row's sums.

Each reads the shard once. What they return is reduced over the ranks, and put together, in `split_rows`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from paec_kernels.ops import layout
from paec_kernels.ops.forward import (
    FORWARD_WARPS,
    LANES,
    SOFTCAP_WARPS,
    is_aligned,
    second_largest,
    sum_row,
)
from paec_kernels.ops.nucleus_readings import read_below, read_masses
from paec_kernels.ops.rows import LN2, LOG2E, ONE_A_ROW, SIZES, Row, Units, capped, row_offset, strides_of, token_of

READING_LANES = LANES // 4  # as the whole row's nucleus is read


@triton.jit
def row_of(logits_ptr, row, n_inner, stride_outer, stride_inner, stride_col, n_cols):
    """Find a row of logits [outer, inner, V] by its flat number."""
    return Row(logits_ptr + row_offset(row, n_inner, stride_outer, stride_inner), stride_col, n_cols)


@triton.jit
def store_nothing(ptr, n_rows, row, count):
    """Store a column of zeros of [count, n_rows], for a row that is not valid."""
    every = tl.arange(0, 8)  # a power of two
    tl.store(ptr + every * n_rows + row, 0.0, mask=every < count)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ONE_A_ROW)
def sums_kernel(
    logits_ptr, stride_outer, stride_inner, stride_col,
    token_ids_ptr, valid_ptr, temperature_ptr, temperature_stride,
    sums_ptr, n_rows, n_inner, n_cols, softcap,
    LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Compute one row's column of sums [6, n_rows], as `torch_shard.sums`; other arguments as `forward_kernel`'s."""
    row = tl.program_id(0)
    if valid_ptr is not None and tl.load(valid_ptr + row) == 0:
        store_nothing(sums_ptr, n_rows, row, layout.N_SUMS)
        return
    shard = row_of(logits_ptr, row, n_inner, stride_outer, stride_inner, stride_col, n_cols)
    scale = 1.0 / tl.load(temperature_ptr + row * temperature_stride) * LOG2E
    token = token_of(token_ids_ptr, row)
    token_logit = tl.load(shard.ptr + token * stride_col, mask=token >= 0, other=0.0).to(tl.float32)

    reference, total, weighted, first, second, top_logit = sum_row(shard, scale, softcap, LANES, ALIGNED)
    top = capped(top_logit, softcap)
    # Without a finite logit the sums are relative to 0, and are 0, or NaN where the row holds one.
    distance = tl.where(tl.abs(top_logit) < float("inf"), top - reference, 0.0) * scale
    total *= tl.exp2(-distance)
    weighted = weighted * tl.exp2(-distance) - distance * total
    second_best = second_largest(first, second, top_logit)
    tl.store(sums_ptr + layout.TOP_LOGIT * n_rows + row, top_logit)
    tl.store(sums_ptr + layout.OWN_TOP * n_rows + row, top)
    tl.store(sums_ptr + layout.OWN_SECOND * n_rows + row, capped(second_best, softcap))
    tl.store(sums_ptr + layout.TOTAL * n_rows + row, total)
    tl.store(sums_ptr + layout.MOMENT * n_rows + row, weighted * LN2)
    tl.store(sums_ptr + layout.TOKEN * n_rows + row, tl.where(token >= 0, capped(token_logit, softcap), 0.0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ONE_A_ROW)
def masses_kernel(
    logits_ptr, stride_outer, stride_inner, stride_col,
    valid_ptr, temperature_ptr, temperature_stride, top_logit_ptr, thresholds_ptr,
    masses_ptr, n_rows, n_inner, n_cols, softcap,
    LANES: tl.constexpr,
):  # fmt: skip
    """Compute one row's masses [3, n_rows] from each of thresholds [3, n_rows] on, as `torch_shard.masses`."""
    row = tl.program_id(0)
    if valid_ptr is not None and tl.load(valid_ptr + row) == 0:
        store_nothing(masses_ptr, n_rows, row, layout.N_CUTS)
        return
    shard = row_of(logits_ptr, row, n_inner, stride_outer, stride_inner, stride_col, n_cols)
    scale = 1.0 / tl.load(temperature_ptr + row * temperature_stride) * LOG2E
    t1 = tl.load(thresholds_ptr + row)
    t2 = tl.load(thresholds_ptr + n_rows + row)
    t3 = tl.load(thresholds_ptr + 2 * n_rows + row)
    units = Units(capped(tl.load(top_logit_ptr + row), softcap), scale, softcap)
    m1, m2, m3, _, _ = read_masses(shard, t1, t1, t1, t2, t3, units, LANES)
    tl.store(masses_ptr + row, m1)
    tl.store(masses_ptr + n_rows + row, m2)
    tl.store(masses_ptr + 2 * n_rows + row, m3)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ONE_A_ROW)
def members_kernel(
    logits_ptr, stride_outer, stride_inner, stride_col,
    valid_ptr, temperature_ptr, temperature_stride, top_logit_ptr, bracket_ptr,
    members_ptr, n_rows, n_inner, n_cols, softcap,
    LANES: tl.constexpr,
):  # fmt: skip
    """Compute one row's column of members [5, n_rows] for its bracket [2, n_rows], as `torch_shard.members`."""
    row = tl.program_id(0)
    if valid_ptr is not None and tl.load(valid_ptr + row) == 0:
        store_nothing(members_ptr, n_rows, row, layout.N_MEMBERS)
        return
    shard = row_of(logits_ptr, row, n_inner, stride_outer, stride_inner, stride_col, n_cols)
    scale = 1.0 / tl.load(temperature_ptr + row * temperature_stride) * LOG2E
    low, high = tl.load(bracket_ptr + row), tl.load(bracket_ptr + n_rows + row)
    units = Units(capped(tl.load(top_logit_ptr + row), softcap), scale, softcap)
    mass, weighted, n_above, n_member, first, _ = read_below(shard, low, high, units, LANES)
    tl.store(members_ptr + layout.MASS * n_rows + row, mass)
    tl.store(members_ptr + layout.MASS_MOMENT * n_rows + row, weighted * LN2)
    tl.store(members_ptr + layout.N_ABOVE * n_rows + row, n_above)
    tl.store(members_ptr + layout.N_TIED * n_rows + row, n_member - n_above)
    tl.store(members_ptr + layout.LARGEST_BELOW * n_rows + row, tl.max(first))


def sums(logits: Tensor, rows: layout.Rows, softcap: float, n_cols: int) -> Tensor:
    """Launch the kernel on a shard ``[B, L, V]``; see `torch_shard.sums`."""
    out = _new(layout.N_SUMS, logits)
    _launch(
        sums_kernel, logits, rows, (rows.token_ids,), (), out, softcap, n_cols, LANES=LANES, ALIGNED=is_aligned(logits)
    )
    return out


def masses(
    logits: Tensor, rows: layout.Rows, softcap: float, n_cols: int, top_logit: Tensor, thresholds: Tensor
) -> Tensor:
    """Launch the kernel on a shard ``[B, L, V]``; see `torch_shard.masses`."""
    out = _new(layout.N_CUTS, logits)
    _launch(masses_kernel, logits, rows, (), (top_logit, thresholds), out, softcap, n_cols, LANES=READING_LANES)
    return out


def members(
    logits: Tensor, rows: layout.Rows, softcap: float, n_cols: int, top_logit: Tensor, bracket: Tensor
) -> Tensor:
    """Launch the kernel on a shard ``[B, L, V]``; see `torch_shard.members`."""
    out = _new(layout.N_MEMBERS, logits)
    _launch(members_kernel, logits, rows, (), (top_logit, bracket), out, softcap, n_cols, LANES=READING_LANES)
    return out


def _new(n: int, logits: Tensor) -> Tensor:
    return torch.empty(n, logits.shape[0] * logits.shape[1], dtype=torch.float32, device=logits.device)


def _launch(kernel, logits, rows, ids, others, out, softcap, n_cols, **constants) -> None:
    n_rows = out.shape[1]
    with torch.cuda.device_of(logits):
        kernel[(n_rows,)](
            logits,
            *strides_of(logits),
            *ids,
            rows.valid,
            rows.temperature,
            int(rows.temperature.numel() > 1),
            *others,
            out,
            n_rows,
            logits.shape[1],
            n_cols,
            softcap or None,
            **constants,
            num_warps=SOFTCAP_WARPS if softcap else FORWARD_WARPS,
            enable_fp_fusion=True,
        )
