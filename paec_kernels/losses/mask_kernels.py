"""Triton kernels over vectors of N token positions. Import only where Triton is installed.

Each launcher is a ``torch.library`` operator, opaque to ``torch.compile``. Triton launches on the current device, which
need not be the tensors': hence ``device_of``.

Sums are deterministic: each program writes the partial sum of its block, and the partials are added in a
fixed order; no atomics. Vectors are contiguous float32; ``valid`` is bool, ``nucleus_size`` an integer.
"""
# mypy: allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # fixed: it decides the order of the sums
NUM_WARPS = 4
# Statistics are rows of one table [3, N]: where they begin depends on N, for which no kernel shall be compiled anew.
VECTORS = ("nucleus_entropy_ptr", "nucleus_size_ptr", "margin_ptr", "valid_ptr", "score_ptr", "entropy_ptr", "mask_ptr")


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=VECTORS)
def _position_score_kernel(
    score_ptr, nucleus_entropy_ptr, nucleus_size_ptr, margin_ptr, valid_ptr,
    alpha, tau_c, h_scale, n, LOG_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    valid = tl.load(valid_ptr + offsets, mask=inside, other=0) != 0
    h = tl.load(nucleus_entropy_ptr + offsets, mask=valid, other=0.0)
    if LOG_SIZE:
        size = tl.load(nucleus_size_ptr + offsets, mask=valid, other=1)
        h = tl.where(size == 1, 0.0, h / tl.log(tl.maximum(size, 2).to(tl.float32)))
    else:
        h = h * h_scale
    competition = tl.exp(-tl.load(margin_ptr + offsets, mask=valid, other=0.0) / tau_c)
    score = alpha * h + (1 - alpha) * competition
    tl.store(score_ptr + offsets, tl.where(valid, score, float("inf")), mask=inside)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=VECTORS)
def _soft_mask_kernel(mask_ptr, partial_ptr, score_ptr, entropy_ptr, threshold_ptr, tau_m, n, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    score = tl.load(score_ptr + offsets, mask=inside, other=float("inf"))
    valid = score != float("inf")
    mask = tl.where(valid, tl.sigmoid((score - tl.load(threshold_ptr)) / tau_m), 0.0)
    entropy = tl.load(entropy_ptr + offsets, mask=valid, other=0.0)
    tl.store(mask_ptr + offsets, mask, mask=inside)
    tl.store(partial_ptr + block, tl.sum(mask))
    tl.store(partial_ptr + tl.num_programs(0) + block, tl.sum(mask * entropy))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=VECTORS)
def _penalty_coefficients_kernel(coefficient_ptr, mask_ptr, mask_sum_ptr, slope_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    scale = tl.load(slope_ptr) / tl.load(mask_sum_ptr)
    mask = tl.load(mask_ptr + offsets, mask=inside, other=0.0)
    tl.store(coefficient_ptr + offsets, tl.where(mask == 0, 0.0, scale * mask), mask=inside)


@torch.library.custom_op("paec::position_score", mutates_args=())
def position_score(
    nucleus_entropy: Tensor,
    nucleus_size: Tensor,
    margin: Tensor,
    valid: Tensor,
    alpha: float,
    tau_c: float,
    h_scale: float,
    log_size: bool,
) -> Tensor:
    """s = alpha * h + (1 - alpha) * exp(-margin / tau_c), +inf where invalid; float32 ``[N]``."""
    n = margin.numel()
    score = torch.empty_like(margin)
    with torch.cuda.device_of(margin):
        _position_score_kernel[(triton.cdiv(n, BLOCK),)](
            score, nucleus_entropy, nucleus_size, margin, valid,
            alpha, tau_c, h_scale, n, LOG_SIZE=log_size, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return score


@position_score.register_fake
def _(nucleus_entropy, nucleus_size, margin, valid, alpha, tau_c, h_scale, log_size):
    return torch.empty_like(margin)


@torch.library.custom_op("paec::soft_mask", mutates_args=())
def soft_mask(score: Tensor, entropy: Tensor, threshold: Tensor, tau_m: float) -> tuple[Tensor, Tensor]:
    """Return the mask ``[N]`` and ``[2]``: sum(mask), sum(mask * entropy)."""
    n = score.numel()
    n_blocks = triton.cdiv(n, BLOCK)
    mask = torch.empty_like(score)
    partial = score.new_empty(2, n_blocks)
    with torch.cuda.device_of(score):
        _soft_mask_kernel[(n_blocks,)](
            mask, partial, score, entropy, threshold,
            tau_m, n, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return mask, partial.sum(dim=1)


@soft_mask.register_fake
def _(score, entropy, threshold, tau_m):
    return torch.empty_like(score), score.new_empty(2)


@torch.library.custom_op("paec::penalty_coefficients", mutates_args=())
def penalty_coefficients(mask: Tensor, mask_sum: Tensor, slope: Tensor) -> Tensor:
    """b_t = slope * m_t / mask_sum; float32 ``[N]``."""
    n = mask.numel()
    coefficient = torch.empty_like(mask)
    with torch.cuda.device_of(mask):
        _penalty_coefficients_kernel[(triton.cdiv(n, BLOCK),)](
            coefficient, mask, mask_sum, slope, n, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True
        )
    return coefficient


@penalty_coefficients.register_fake
def _(mask, mask_sum, slope):
    return torch.empty_like(mask)
