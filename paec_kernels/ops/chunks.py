"""The chunks in which a head's logits are made, and the products that make and use them."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from paec_kernels.ops.operator import check_positive_int

# 5 % of the logits of 16,384 tokens of a vocabulary of 151,936 in bfloat16.
DEFAULT_CHUNK_BYTES = 224 << 20
ALIGNMENT = 128  # rows and columns of a chunk, where it has that many: a product's tile


def chunk_bytes() -> int:
    """The memory that logits may take at a time, in bytes: ``PAEC_CHUNK_BYTES`` or 224 MiB."""
    text = os.environ.get("PAEC_CHUNK_BYTES", str(DEFAULT_CHUNK_BYTES))
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"PAEC_CHUNK_BYTES must be a positive number of bytes, got {text!r}")
    return int(text)


class Chunks(NamedTuple):
    """How many rows of logits the forward pass holds at a time, and how many columns the backward pass."""

    rows: int
    columns: int


def choose_chunks(n_rows: int, n_cols: int, width: int, dtype: torch.dtype, dropped: bool, chunk_rows: int) -> Chunks:
    """As many as the budget allows beside what else the backward pass holds of the size of hidden ``[n_rows, width]``.

    That is d_hidden's float32 sum, and the valid rows' copy where some were dropped. An eighth of the budget is left
    to the logits in any case. ``chunk_rows`` other than 0 takes the budget's place.
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
    """The pieces of a chunk's longer side that are multiplied at a time.

    Forward and backward must see the same logits, or a token at the nucleus' threshold drops out of its gradient. In
    float32, products of other shapes differ in the last bits of nearly every logit, so both passes make their chunks
    of the same rows x columns tiles. In 16 bits they differ in next to none (measured on a CPU), and one large product
    is faster.
    """
    return blocks(total, size if dtype.itemsize == 4 else total)


def blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, max(size, 1)))


def empty_logits(n_rows: int, n_cols: int, like: Tensor) -> Tensor:
    """``[n_rows, n_cols]`` of like's dtype, each row beginning at a multiple of 16 elements.

    With an odd vocabulary side by side, rows would be read two bytes at a time and multiplied by slower kernels.
    """
    return torch.empty(n_rows, -(-n_cols // 16) * 16, dtype=like.dtype, device=like.device)[:, :n_cols]


def multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias."""
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right in total's float32, a slice of rows at a time where the factors must be converted."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        right = right.float()
        for rows in blocks(len(left), max(1, len(left) // 8)):
            total[rows].addmm_(left[rows].float(), right)


def without_padding(value: Tensor | None, vocab_size: int | None) -> Tensor | None:
    """The first vocab_size rows; the value itself where that is all, since a slice's gradient is copied whole."""
    return value if value is None or vocab_size in (None, len(value)) else value[:vocab_size]


def select(value: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    return None if value is None else value[rows]


def prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inputs checked, gathered if sharded, and cast if autocast is on."""
    check_positive_int("chunk_rows", chunk_rows)
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(
            "hidden must have shape [..., D] and weight [V, D], D and V at least 1, "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [V], ({weight.shape[0]},), got {tuple(bias.shape)}")
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    bias = bias.full_tensor() if bias is not None and hasattr(bias, "full_tensor") else bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {value.dtype}")
        if value is not None and value.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {value.device}")
    return hidden, weight, bias
