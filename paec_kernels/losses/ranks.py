"""What crosses the data-parallel ranks."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels import checks


def check_group(group: dist.ProcessGroup | None) -> None:
    """Raise TypeError for a ``process_group`` that is neither a group that this rank is in nor None."""
    if group is not None:
        checks.instance("process_group", group, dist.ProcessGroup)


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return this process' rank in the group, None being all ranks, and how many there are.

    They are 0 and 1 where torch.distributed is not initialised.
    """
    initialized = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(group), dist.get_world_size(group)) if initialized else (0, 1)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Count the ranks, as `rank_and_world`."""
    return rank_and_world(group)[1]


def gather_columns(x: Tensor, group: dist.ProcessGroup | None, fill: float = math.inf) -> Tensor:
    """Lay every rank's ``[K, N_rank]`` side by side, in rank order, padded with fill: ``[K, W * max N_rank]``.

    Ranks may differ in N_rank, not in K. One without a column takes the dtype and the type of device of the others.
    Asking the ranks for these is a host sync; a single rank needs none.

    Raises:
        TypeError: dtypes or types of device differ; on every rank, before any waits for numbers of another size.
    """
    if world_size(group) == 1:
        return x
    shapes: list[Any] = [None] * world_size(group)
    dist.all_gather_object(shapes, (x.shape[1], x.dtype, x.device.type), group=group)
    kinds = {(dtype, device): f"{dtype} on {device} on rank {i}" for i, (n, dtype, device) in enumerate(shapes) if n}
    if not kinds:
        return x
    if len(kinds) > 1:
        raise TypeError(
            f"all ranks must have tensors of one dtype on one type of device, got {', '.join(kinds.values())}"
        )
    ((dtype, device),) = kinds
    longest = max(n for n, _, _ in shapes)
    padded = torch.nn.functional.pad(x if x.shape[1] else x.to(device, dtype), (0, longest - x.shape[1]), value=fill)
    parts = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts, dim=1)


def mean_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the mean of every rank's x, in its own dtype (integers: in the default one); x itself on a single rank.

    Dtypes may differ, since all are added in float64.
    """
    if world_size(group) == 1:
        return x
    total = x.to(torch.float64, copy=True)
    dist.all_reduce(total, group=group)
    return (total / world_size(group)).to(x.dtype if x.is_floating_point() else torch.get_default_dtype())
