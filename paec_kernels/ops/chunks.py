"""The chunks in which a head's logits are made, and the products that make and use them."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paec_kernels import checks
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.operator import Scaling, check_options, flat_rows

# 5 % of the logits of 16,384 tokens of a vocabulary of 151,936 in bfloat16.
DEFAULT_CHUNK_BYTES = 224 << 20
ALIGNMENT = 128  # rows and columns of a chunk, where it has that many: a product's tile


def chunk_bytes() -> int:
    """Return the memory that logits may take at a time, in bytes: ``PAEC_CHUNK_BYTES`` or 224 MiB."""
    text = os.environ.get("PAEC_CHUNK_BYTES", str(DEFAULT_CHUNK_BYTES))
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"PAEC_CHUNK_BYTES must be a positive number of bytes, got {text!r}")
    return int(text)


class Chunks(NamedTuple):
    """How many rows of logits the forward pass holds at a time, and how many columns the backward pass."""

    rows: int
    columns: int


def choose_chunks(n_rows: int, n_cols: int, width: int, dtype: torch.dtype, dropped: bool, chunk_rows: int) -> Chunks:
    """Choose the largest chunks that fit the budget beside what else the backward pass holds of hidden's size.

    That is d_hidden's float32 sum ``[n_rows, width]``, and the valid rows' copy where some were dropped. An eighth of
    the budget is left to the logits in any case. ``chunk_rows`` other than 0 takes the budget's place.
    """
    n_rows = max(n_rows, 1)
    if chunk_rows:
        return Chunks(min(chunk_rows, n_rows), _aligned(chunk_rows * n_cols // n_rows, n_cols))
    budget = chunk_bytes()
    beside = 4 * (dtype.itemsize < 4 or dropped) + dtype.itemsize * dropped
    left = max(budget - n_rows * width * beside, budget // 8)
    return Chunks(
        _aligned(budget // (n_cols * dtype.itemsize), n_rows), _aligned(left // (n_rows * dtype.itemsize), n_cols)
    )


def _aligned(n: int, most: int) -> int:
    return max(1, min(most, n - n % ALIGNMENT if n >= ALIGNMENT else n))


def tiles(total: int, size: int, dtype: torch.dtype) -> Iterator[slice]:
    """Yield the pieces of a chunk's longer side that are multiplied at a time.

    Forward and backward must see the same logits, or a token at the nucleus' threshold drops out of its gradient. In
    float32, products of other shapes differ in the last bits of nearly every logit, so both passes make their chunks
    of the same rows x columns tiles. In 16 bits they differ in next to none (measured on a CPU), and one large product
    is faster.
    """
    return spans(total, size if dtype.itemsize == 4 else total)


def spans(total: int, size: int) -> Iterator[slice]:
    """Yield slices of at most size that cover total."""
    return (slice(start, min(start + size, total)) for start in range(0, total, max(size, 1)))


def empty_logits(n_rows: int, n_cols: int, like: Tensor) -> Tensor:
    """Allocate ``[n_rows, n_cols]`` of like's dtype, each row beginning at a multiple of 32 elements.

    With an odd vocabulary side by side, rows would be read two bytes at a time and multiplied by slower kernels. What
    fills them up is 0. A product of 16 bits reads 32 elements at a time on a CPU with AMX, and would take a NaN from
    there, or from where the next row begins.
    """
    whole = torch.empty(n_rows, -(-n_cols // 32) * 32, dtype=like.dtype, device=like.device)
    whole[:, n_cols:] = 0
    return whole[:, :n_cols]


def multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute out = hidden @ weight.T + bias; the numbers do not depend on the stride of out's rows."""
    # In float32, with several threads and few rows, MKL's would; `tiles` says what comes of it.
    few = out.dtype == torch.float32 and not out.is_cuda and len(out) < 16 and not out.is_contiguous()
    product = torch.empty_like(out, memory_format=torch.contiguous_format) if few else out
    if bias is None:
        torch.mm(hidden, weight.T, out=product)
    else:
        torch.addmm(bias, hidden, weight.T, out=product)
    if few:
        out.copy_(product)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute total += left @ right in total's float32, a slice of rows at a time where the factors are converted."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        right = right.float()
        for rows in spans(len(left), max(1, len(left) // 8)):
            total[rows].addmm_(left[rows].float(), right)


def select(value: Tensor | None, rows: slice) -> Tensor | None:
    """Return some rows of a tensor that may be None."""
    return None if value is None else value[rows]


def prepare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    top_p: float,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
    chunk_rows: int | None,
    fewest: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Rows, Scaling]:
    """Check the arguments of a linear head's statistics; gather what is sharded, cast under autocast, cut the padding.

    Args:
        fewest: rows that the weight must have; 0 where other ranks have others.
    Raises:
        TypeError, ValueError: by name.
    """
    checks.tensor("hidden", hidden, kind="floating")
    if hidden.is_meta:  # autocast knows no such device
        raise ValueError(f"hidden must be on a device that computes, got {hidden.device}")
    checks.tensor("weight", weight, kind="floating")
    if bias is not None:
        checks.tensor("bias", bias, kind="floating")
    fits = hidden.dim() > 0 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[1] > 0
    if not fits or len(weight) < fewest:
        raise ValueError(
            f"hidden must have shape [..., D] and weight [V, D], D {'and V ' if fewest else ''}at least 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V], ({weight.shape[0]},), got {tuple(bias.shape)}")
    scaling = check_options(top_p, temperature, softcap, vocab_size, len(weight))
    if chunk_rows is not None:
        checks.integer("chunk_rows", chunk_rows, least=1)
    weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {value.dtype}")
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {value.device}")
    rows = flat_rows("hidden[..., 0]", hidden[..., 0], token_ids, valid, scaling.temperature)
    if scaling.vocab_size not in (None, len(weight)):  # a slice's gradient is copied whole, even if it is all
        weight, bias = weight[: scaling.vocab_size], select(bias, slice(scaling.vocab_size))
    return hidden, weight, bias, rows, scaling


def _gathered(parameter: Tensor) -> Tensor:
    value: Any = parameter
    return value.full_tensor() if hasattr(parameter, "device_mesh") else parameter  # torch.compile denies full_tensor
