"""The forward kernel: one program a row, one pass over its logits, and the nucleus from what that pass keeps.

With d = (f(z) - r) log2(e) / T for a fixed reference logit r in place of a running maximum:

    Z = sum 2^d    S = sum d 2^d    lse = r / T + ln 2 log2 Z    H = ln 2 (log2 Z - S / Z)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from paec_kernels.ops import layout
from paec_kernels.ops.nucleus import GATHERED_LANES, find_nucleus
from paec_kernels.ops.rows import (
    IGNORE,
    LN2,
    LOG2E,
    ONE_A_ROW,
    SIZES,
    Row,
    Units,
    capped,
    insert_top_two,
    load_last,
    log2_weight,
    row_offset,
    strides_of,
    token_of,
)
from paec_kernels.types import IGNORE_INDEX

# Powers of two between the reference and the row's maximum. Up to here log2 Z and S / Z, which cancel in H,
# keep an error below 5e-6; beyond, the row is read once more with its maximum as the reference.
REFERENCE_RANGE = tl.constexpr(40.0)


@triton.jit
def accumulate(sums, z, units):
    """Add a block of columns to the sums of `read_row`."""
    total, weighted, first, second = sums
    d = log2_weight(z, units)
    e = tl.exp2(d)
    first, second = insert_top_two(first, second, z)
    return total + e, weighted + e * d, first, second


@triton.jit
def read_row(
    row, units, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Read the row once: Z, S and the two largest logits of each lane, four [LANES] tensors."""
    zeros = tl.zeros([LANES], tl.float32)
    nothing = tl.full([LANES], -float("inf"), tl.float32)
    sums = zeros, zeros, nothing, nothing
    first_ptrs = row.ptr + tl.arange(0, LANES).to(tl.int64) * row.stride
    block = LANES if ALIGNED else LANES * tl.cast(row.stride, tl.int64)
    n_full = row.n_cols // (2 * LANES) * (2 * LANES)
    # A round's two blocks are loaded two rounds ahead: fewer bytes in flight do not cover the latency of memory. Loads
    # of less than 16 bytes would only cost registers that way.
    for start in tl.range(0, n_full, 2 * LANES, num_stages=3 if ALIGNED else 1):
        pointers = first_ptrs + tl.cast(start, tl.int64) * row.stride
        z0 = tl.load(pointers).to(tl.float32)
        z1 = tl.load(pointers + block).to(tl.float32)
        sums = accumulate(sums, z0, units)
        sums = accumulate(sums, z1, units)
    for start in range(n_full, row.n_cols, LANES):
        z = load_last(row, start, LANES)
        sums = accumulate(sums, z, units)
    return sums


@triton.jit
def sum_row(row, scale, softcap, LANES: tl.constexpr, ALIGNED: tl.constexpr):
    """Sum the row relative to a logit of it that is near enough to the largest.

    Returns:
        the reference f(r), Z, S; the two largest logits of each lane; the largest of all.
    """
    head = load_last(row, 0, LANES)
    reference = capped(tl.max(head), softcap)
    reference = tl.where(tl.abs(reference) < float("inf"), reference, 0.0)
    total, weighted, first, second = read_row(row, Units(reference, scale, softcap), LANES, ALIGNED)
    top_logit = tl.max(first)
    top = capped(top_logit, softcap)
    distance = tl.abs(top - reference) * scale
    if (distance > REFERENCE_RANGE) & (tl.abs(top) < float("inf")):
        reference = top
        total, weighted, first, second = read_row(row, Units(reference, scale, softcap), LANES, ALIGNED)
    return reference, tl.sum(total), tl.sum(weighted), first, second, top_logit


@triton.jit
def second_largest(first, second, top_logit):
    """Return the row's second largest logit, of those of each lane."""
    is_top = first == top_logit
    n_top = tl.sum(is_top.to(tl.int32))
    return tl.where(n_top > 1, top_logit, tl.max(tl.where(is_top, second, first)))


@triton.jit
def store_everywhere(stats_ptr, rest_ptr, size_ptr, n_rows, row, value):
    """Store the statistics of a row that has none: value in the table, and a nucleus of size 0."""
    every = tl.arange(0, 8)  # a power of two
    tl.store(stats_ptr + every * n_rows + row, value, mask=every < layout.N_STATS)
    tl.store(rest_ptr + every * n_rows + row, value, mask=every < layout.N_REST)
    tl.store(size_ptr + row, 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=ONE_A_ROW)
def forward_kernel(
    logits_ptr, stride_outer, stride_inner, stride_col,
    token_ids_ptr, valid_ptr, temperature_ptr, temperature_stride,
    stats_ptr, rest_ptr, size_ptr, scratch_ptr, fits_ptr,
    n_rows, n_inner, n_cols, top_p, softcap,
    SHIFT: tl.constexpr, LANES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Compute one row's column of the table, stats [3, n_rows] and rest [7, n_rows], and its size [n_rows] int32.

    logits: [outer, inner, V] by strides, of which n_cols columns are read; ALIGNED says that rows begin at multiples
    of 16 bytes and columns adjoin. token_ids and valid: [n_rows] or None. temperature: [n_rows], or one element with
    stride 0. scratch: [n_rows, GATHERED_LANES] int32. fits: one int32, set to 0 where a token id or a temperature is
    out of range; the row's statistics are then NaN.
    """
    row = tl.program_id(0)
    if valid_ptr is not None and tl.load(valid_ptr + row) == 0:
        store_everywhere(stats_ptr, rest_ptr, size_ptr, n_rows, row, 0.0)
        return
    row_ptr = logits_ptr + row_offset(row, n_inner, stride_outer, stride_inner)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    scale = 1.0 / temperature * LOG2E
    fits = (temperature > 0) & (temperature < float("inf"))
    # Before the row's loop, which hides the latency of these two loads.
    token = token_of(token_ids_ptr, row)
    has_token = (token >= 0) & (token < n_cols)
    token_logit = tl.load(row_ptr + token * stride_col, mask=has_token, other=0.0).to(tl.float32)
    if (fits & (has_token | (token == IGNORE))) == 0:
        tl.store(fits_ptr, 0)
        store_everywhere(stats_ptr, rest_ptr, size_ptr, n_rows, row, float("nan"))
        return  # the nucleus' search need not end at a temperature below 0

    logits_row = Row(row_ptr, stride_col, n_cols)
    reference, z_total, z_weighted, first, second, top_logit = sum_row(logits_row, scale, softcap, LANES, ALIGNED)
    top = capped(top_logit, softcap)

    if (z_total > 0) & (z_total < float("inf")) & (top_logit < float("inf")):
        # Each is stored as soon as it is known: the search of the nucleus needs the registers.
        top_distance = (top - reference) * scale
        log2_total = tl.log2(z_total) - top_distance
        lse = top / temperature + log2_total * LN2
        entropy = tl.maximum((tl.log2(z_total) - z_weighted / z_total) * LN2, 0.0)
        logp = (capped(token_logit, softcap) - top) / temperature - log2_total * LN2
        tl.store(stats_ptr + layout.LOGP * n_rows + row, tl.where(has_token, logp, 0.0))
        tl.store(stats_ptr + layout.ENTROPY * n_rows + row, entropy)
        tl.store(rest_ptr + layout.LSE * n_rows + row, lse)
        tl.store(rest_ptr + layout.TOP * n_rows + row, top)
        tl.store(rest_ptr + layout.LOG_TOTAL * n_rows + row, log2_total * LN2)

        second_best = second_largest(first, second, top_logit)
        margin = (top - capped(second_best, softcap)) / temperature
        tl.store(rest_ptr + layout.MARGIN * n_rows + row, margin)

        nucleus = find_nucleus(
            logits_row, first, second, second_best, z_total * tl.exp2(-top_distance), top_logit, top_p,
            Units(top, scale, softcap), scratch_ptr + row.to(tl.int64) * GATHERED_LANES, SHIFT, LANES,
        )  # fmt: skip
        log2_mass = tl.log2(nucleus.mass)
        nucleus_entropy = tl.maximum((log2_mass - nucleus.weighted / nucleus.mass) * LN2, 0.0)
        tl.store(stats_ptr + layout.NUCLEUS_ENTROPY * n_rows + row, nucleus_entropy)
        tl.store(rest_ptr + layout.THRESHOLD * n_rows + row, nucleus.tau)
        tl.store(rest_ptr + layout.TIE_WEIGHT * n_rows + row, nucleus.weight)
        tl.store(rest_ptr + layout.LOG_MASS * n_rows + row, (log2_mass - log2_total) * LN2)
        tl.store(size_ptr + row, nucleus.size.to(tl.int32))
    else:
        store_everywhere(stats_ptr, rest_ptr, size_ptr, n_rows, row, float("nan"))


# Fixed for every shape, so that a row's sums have one order whatever batch it sits in.
LANES = 2048
FORWARD_WARPS = 4
SOFTCAP_WARPS = 8  # the registers that tanh takes do not fit beside 16 lanes a thread
# Bits of a logit's float32 form that its own dtype leaves at zero.
KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def forward(
    logits: Tensor, rows: layout.Rows, top_p: float, softcap: float, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the kernel on logits ``[B, L, V]``; see `torch_backend.forward` for the arguments and the result.

    A token id or a temperature out of range stops the device with an assertion: asking for its value would wait.
    """
    n_rows = logits.shape[0] * logits.shape[1]
    stats, rest, size = layout.new_table(torch.empty, n_rows, logits.device)
    if n_rows == 0:
        return stats, rest, size
    scratch = torch.empty(n_rows, GATHERED_LANES.value, dtype=torch.int32, device=logits.device)
    fits = torch.ones(1, dtype=torch.int32, device=logits.device)
    launch = forward_kernel[(n_rows,)]
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        launch(
            logits,
            *strides_of(logits),
            rows.token_ids,
            rows.valid,
            rows.temperature,
            int(rows.temperature.numel() > 1),
            stats,
            rest,
            size,
            scratch,
            fits,
            n_rows,
            logits.shape[1],
            vocab_size,
            top_p,
            softcap or None,
            SHIFT=KEY_SHIFT[logits.dtype],
            LANES=LANES,
            ALIGNED=is_aligned(logits),
            num_warps=SOFTCAP_WARPS if softcap else FORWARD_WARPS,
            enable_fp_fusion=True,
        )
    torch._assert_async(
        fits, f"token_ids must be {IGNORE_INDEX} or in [0, {vocab_size}), temperature positive and finite"
    )
    return stats, rest, size


def is_aligned(logits: Tensor) -> bool:
    """Tell whether every row begins at a multiple of 16 bytes and its columns adjoin."""
    outer, inner, column = strides_of(logits)
    starts = (logits.data_ptr(), outer * logits.itemsize, inner * logits.itemsize)
    return column == 1 and all(start % 16 == 0 for start in starts)
