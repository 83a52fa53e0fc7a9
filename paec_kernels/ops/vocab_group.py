"""What the ranks that share a vocabulary tell each other, and the check that all mean the same rows."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from paec_kernels import checks
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.operator import DTYPES

Setting = float | torch.dtype


class Shard(NamedTuple):
    """This rank's columns in the whole vocabulary, and what that is."""

    first_column: int
    n_cols: int  # from there on, without padding; may be 0
    vocab_size: int  # of all ranks together, without padding
    widest: int  # columns of the widest shard, with padding


def group_of(value: Any) -> dist.ProcessGroup | None:
    """Return a ``vocab_group``, or None where this rank has the whole vocabulary.

    Raises:
        TypeError: neither a group nor None. What ``new_group`` returns on a rank outside of it is no group.
    """
    if value is not None:
        checks.instance("vocab_group", value, dist.ProcessGroup)
    return None if value is None or value.size() == 1 else value


def group_named(name: Any) -> dist.ProcessGroup:
    """Return the group of that ``group_name``: an operator's arguments are tensors, numbers and texts."""
    return _resolve_process_group(name)


def own_rows(parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's rows of a parameter; of a DTensor those that the ranks of the group share, gathered otherwise.

    Raises:
        ValueError: a DTensor that those ranks have, but not by rows.
    """
    if not hasattr(parameter, "device_mesh"):
        return parameter
    from torch.distributed.tensor import Replicate, Shard

    value: Any = parameter
    ranks, placements = dist.get_process_group_ranks(group), []
    for i, placement in enumerate(value.placements):
        shared = dist.get_process_group_ranks(value.device_mesh.get_group(i)) == ranks
        if shared and placement != Shard(0):
            raise ValueError(f"a weight that is a DTensor must be sharded by rows over vocab_group, got {placement!r}")
        placements.append(placement if shared else Replicate())
    return value.redistribute(placements=placements).to_local()


def agree(width: int, settings: dict[str, Setting], rows: Rows, group: dist.ProcessGroup) -> Shard:
    """Return where this rank's columns lie, once every rank has told that it means the same rows and options.

    This waits for the host: an error must come before a rank waits for numbers that another never sends.

    Args:
        width: how many columns this rank has.
        settings: what must be the same on all ranks, by name. Of the ``"vocab_size"`` columns of all ranks those from
            there on are padding; 0 where none is.
    Raises:
        ValueError: ranks differ; ``vocab_size`` is more than they have; or they have none. On every rank alike.
        RuntimeError: a CUDA graph is being captured, which cannot hold a question to the ranks.
    """
    device = rows.temperature.device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("statistics with a vocab_group wait for the host, which a CUDA graph cannot hold")
    own = torch.tensor([width, *map(_as_number, settings.values())], dtype=torch.float64, device=device)
    own = torch.cat((own, torch.stack([_checksum(values, device) for values in rows])))
    told = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, own, group=group)
    widths, *others = torch.stack(told).T.tolist()
    for name, values in zip([*settings, *Rows._fields], others, strict=True):
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(_difference(name, settings, values[0], value, rank))
    whole, vocab_size = int(sum(widths)), int(others[list(settings).index("vocab_size")][0])
    if not 1 <= (vocab_size or whole) <= whole:
        raise ValueError(
            f"vocab_size must be in [1, {whole}], the columns of all ranks of vocab_group together, got {vocab_size}"
        )
    vocab_size, first = vocab_size or whole, int(sum(widths[: dist.get_rank(group)]))
    return Shard(first, max(0, min(width, vocab_size - first)), vocab_size, int(max(widths)))


def _as_number(value: Setting) -> float:
    return float(DTYPES.index(value) if isinstance(value, torch.dtype) else value)


def _checksum(values: Tensor | None, device: torch.device) -> Tensor:
    """Hash what the ranks must have alike, and where, to an integer that float64 holds; -1 for None."""
    if values is None:
        return torch.tensor(-1.0, dtype=torch.float64, device=device)
    bits = (values.view(torch.int32) if values.is_floating_point() else values).long()
    x = bits ^ (torch.arange(1, len(bits) + 1, device=device) * -0x61C8864680B583EB)
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # SplitMix64's
        x = (x ^ (x >> 30)) * multiplier
    return ((x ^ (x >> 31)).sum() % (1 << 52)).double()


def _difference(name: str, settings: dict[str, Setting], first: float, value: float, rank: int) -> str:
    if name not in settings:
        return f"{name} must be the same on all ranks of vocab_group, got others on rank {rank} than on rank 0"
    here, there = (DTYPES[int(x)] if name == "dtype" else str(int(x) if x.is_integer() else x) for x in (first, value))
    return f"{name} must be the same on all ranks of vocab_group, got {here} on rank 0 and {there} on rank {rank}"
