"""What no implementation can beat, measured in the same turns: moving the logits, or the four bare products.

On logits      forward reads them once; backward reads them once and writes their gradient once, as a copy does.
Linear form    logits = H W^T forward; again backward, then d_H = G W and d_W = G^T H: 2 N V D operations each.
"""

import torch
from torch import Tensor

from benchmarks.rows import Row
from benchmarks.workload import Case, Inputs

ON_LOGITS, LINEAR = "read, copy", "four products"


def name_of(case: Case | Row) -> str:
    return LINEAR if case.d else ON_LOGITS


def forward(inputs: Inputs) -> Tensor:
    rows = inputs.rows
    if inputs.head is not None:
        return rows @ inputs.head.T
    even = rows.numel() * rows.dtype.itemsize % 4 == 0
    # 16-bit values in pairs: the sum means nothing, and no time goes into converting them.
    return rows.view(-1).view(torch.float32).sum() if even else rows.sum()


def backward(inputs: Inputs, spare: Tensor) -> Tensor:
    """Write into a spare tensor shaped like the rows."""
    if inputs.head is None:
        return spare.copy_(inputs.rows)
    logits = forward(inputs)
    torch.mm(logits, inputs.head, out=spare)
    return torch.mm(logits.T, inputs.rows)


def bytes_moved(case: Case, passes: str) -> int | None:
    """Count the bytes: one read forward, one read and one write backward. None for the linear form."""
    times = {"forward": 1, "backward": 2, "both": 3}[passes]
    return None if case.d else times * case.n * case.v * case.dtype.itemsize


def operations(case: Case, passes: str) -> int | None:
    """Count the floating-point operations of the linear form's products; None on logits."""
    times = {"forward": 1, "backward": 3, "both": 4}[passes]
    return times * 2 * case.n * case.v * case.d or None
