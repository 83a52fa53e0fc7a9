"""What crosses the data-parallel ranks."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return this process' rank in the group, None being all ranks, and how many there are.

    They are 0 and 1 where torch.distributed is not initialised.
    """
    initialized = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(group), dist.get_world_size(group)) if initialized else (0, 1)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Count the ranks, as `rank_and_world`."""
    return rank_and_world(group)[1]


def gather_columns(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Lay every rank's ``[K, N_rank]`` side by side, in rank order, padded with +inf: ``[K, W * max N_rank]``.

    Ranks may differ in N_rank, 0 included, not in K or dtype. Reading the largest N_rank is a host sync;
    a single rank needs none.
    """
    if world_size(group) == 1:
        return x
    longest = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    padded = torch.nn.functional.pad(x, (0, int(longest) - x.shape[1]), value=math.inf)
    parts = [torch.empty_like(padded) for _ in range(world_size(group))]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts, dim=1)


def mean_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the mean of every rank's x; x itself on a single rank."""
    if world_size(group) == 1:
        return x
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total / world_size(group)
