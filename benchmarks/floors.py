"""What no implementation can beat, measured in the same turns: moving the logits, or the four bare products.

On logits      forward reads them once; backward reads them once and writes their gradient once, as a copy does.
Linear form    logits = H W^T forward; again backward, then d_H = G W and d_W = G^T H: 2 N V D operations each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.rows import Row
from benchmarks.workload import Case, Inputs


@dataclass(frozen=True)
class Floor:
    """The two passes; backward may write into a spare tensor shaped like the rows."""

    name: str
    forward: Callable[[Inputs], object]
    backward: Callable[[Inputs, Tensor], object]


def read(inputs: Inputs) -> Tensor:
    rows = inputs.rows
    even = rows.numel() * rows.dtype.itemsize % 4 == 0
    # 16-bit values in pairs: the sum means nothing, and no time goes into converting them.
    return rows.view(-1).view(torch.float32).sum() if even else rows.sum()


def copy(inputs: Inputs, spare: Tensor) -> Tensor:
    return spare.copy_(inputs.rows)


def first_product(inputs: Inputs) -> Tensor:
    return inputs.rows @ inputs.head.T


def three_products(inputs: Inputs, spare: Tensor) -> Tensor:
    logits = first_product(inputs)
    torch.mm(logits, inputs.head, out=spare)
    return torch.mm(logits.T, inputs.rows)


ON_LOGITS = Floor("read, copy", read, copy)
LINEAR = Floor("four products", first_product, three_products)


def floor_of(case: Case | Row) -> Floor:
    return LINEAR if case.d else ON_LOGITS


def bytes_moved(case: Case, passes: str) -> int | None:
    """Count the bytes: one read forward, one read and one write backward. None for the linear form."""
    times = {"forward": 1, "backward": 2, "both": 3}[passes]
    return None if case.d else times * case.n * case.v * case.dtype.itemsize


def operations(case: Case, passes: str) -> int | None:
    """Count the floating-point operations of the linear form's products; None on logits."""
    times = {"forward": 1, "backward": 3, "both": 4}[passes]
    return times * 2 * case.n * case.v * case.d or None
