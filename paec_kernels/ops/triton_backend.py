"""Launches of the Triton kernels: shapes and strides in, statistics out."""

import torch
import triton
from torch import Tensor

from paec_kernels.ops import layout
from paec_kernels.ops.backward import TILES, backward_kernel
from paec_kernels.ops.forward import forward_kernel
from paec_kernels.ops.nucleus import GATHERED_LANES
from paec_kernels.types import IGNORE_INDEX

# Fixed for every shape, so that a row's sums have one order whatever batch it sits in.
LANES = 2048
FORWARD_WARPS = 4
SOFTCAP_WARPS = 8  # the registers that tanh takes do not fit beside 16 lanes a thread
BACKWARD_BLOCK = 4096
BACKWARD_WARPS = 8
# Bits of a logit's float32 form that its own dtype leaves at zero.
KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


def _strides(logits: Tensor) -> tuple[int, int, int]:
    """The strides of ``[outer, inner, V]``; 0 for the only outer row, since Triton compiles anew by a stride's size."""
    outer, inner, column = logits.stride()
    return 0 if len(logits) == 1 else outer, inner, column


def _aligned(logits: Tensor) -> bool:
    """Tell whether every row begins at a multiple of 16 bytes and its columns adjoin."""
    outer, inner, column = _strides(logits)
    starts = (logits.data_ptr(), outer * logits.itemsize, inner * logits.itemsize)
    return column == 1 and all(start % 16 == 0 for start in starts)


def forward(
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    top_p: float,
    softcap: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor]:
    """Statistics of logits ``[B, L, V]``. See `paec_kernels.ops.layout` for what is returned.

    A token id or a temperature out of range stops the device with an assertion: asking for its value would wait.
    """
    n_outer, n_inner, _ = logits.shape
    n_rows = n_outer * n_inner
    stats = torch.empty(layout.N_ROWS, n_rows, dtype=torch.float32, device=logits.device)
    size = torch.empty(n_rows, dtype=torch.int32, device=logits.device)
    if n_rows == 0:
        return stats, size
    scratch = torch.empty(n_rows, GATHERED_LANES.value, dtype=torch.int32, device=logits.device)
    fits = torch.ones(1, dtype=torch.int32, device=logits.device)
    launch = forward_kernel[(n_rows,)]
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        launch(
            logits,
            *_strides(logits),
            token_ids,
            valid,
            temperature,
            int(temperature.numel() > 1),
            stats,
            size,
            scratch,
            fits,
            n_rows,
            n_inner,
            vocab_size,
            top_p,
            softcap,
            SHIFT=KEY_SHIFT[logits.dtype],
            HAS_SOFTCAP=softcap > 0,
            LANES=LANES,
            ALIGNED=_aligned(logits),
            num_warps=SOFTCAP_WARPS if softcap > 0 else FORWARD_WARPS,
            enable_fp_fusion=True,
        )
    torch._assert_async(
        fits, f"token_ids must be {IGNORE_INDEX} or in [0, {vocab_size}), temperature positive and finite"
    )
    return stats, size


def backward(
    d_stats: Tensor,
    stats: Tensor,
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    out: Tensor,
    first_column: int = 0,
) -> None:
    """Write the gradient of logits ``[B, L, V]`` into ``out``, which may be ``logits``.

    The logits may be the columns from ``first_column`` on of a wider vocabulary, whose table and token ids these are.
    """
    n_outer, n_inner, width = logits.shape
    n_rows = n_outer * n_inner
    if n_rows == 0:
        return
    if triton.knobs.runtime.interpret and out.dtype == torch.bfloat16:
        # Triton's interpreter truncates to bfloat16 where a GPU rounds: let torch round.
        exact = torch.empty(out.shape, dtype=torch.float32)
        arguments = (token_ids, valid, temperature, softcap, vocab_size, exact, first_column)
        backward(d_stats, stats, logits.float(), *arguments)
        out.copy_(exact)
        return
    launch = backward_kernel[(n_rows * triton.cdiv(width, TILES.value * BACKWARD_BLOCK),)]
    with torch.cuda.device_of(logits):
        launch(
            out,
            *_strides(out),
            logits,
            *_strides(logits),
            token_ids,
            valid,
            temperature,
            int(temperature.numel() > 1),
            stats,
            d_stats,
            n_rows,
            n_inner,
            vocab_size,
            width,
            softcap,
            first_column,
            HAS_SOFTCAP=softcap > 0,
            BLOCK=BACKWARD_BLOCK,
            num_warps=BACKWARD_WARPS,
            enable_fp_fusion=True,
        )
