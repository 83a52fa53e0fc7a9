"""`token_stats` of logits whose columns lie on several ranks: the arguments, and the operator.

The forward pass asks the ranks whether they mean the same rows, and reads the shard some times over (see `split_rows`).
The backward pass is the one of whole rows, on this rank's columns: it has the table, and needs no other rank.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels.ops import layout, operator, split_rows, torch_shard
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.split_rows import ShardPasses, SplitRows
from paec_kernels.ops.vocab_group import Setting, agree, group_named, group_of


def shard_passes_of(backend: str) -> ShardPasses:
    """Return the passes of ``"triton"``, which only now is imported, or of ``"torch"``."""
    if backend == "triton":
        from paec_kernels.ops import shard_kernels

        return ShardPasses(shard_kernels.sums, shard_kernels.masses, shard_kernels.members)
    return ShardPasses(torch_shard.sums, torch_shard.masses, torch_shard.members)


def own_shard(
    logits: Any, token_ids: Any, valid: Any, temperature: Any, group: Any, inplace: bool
) -> tuple[Tensor, Any, Any, Any, dist.ProcessGroup | None]:
    """Return this rank's part of what may be DTensors, and the ranks that have the other columns; None if it has all.

    Raises:
        TypeError, ValueError: what is no group, or one beside a DTensor; a DTensor that is neither whole nor sharded
            once, or whose gradient is to be written over it: autograd would not notice that it was.
    """
    if hasattr(logits, "device_mesh"):
        if group is not None:
            raise ValueError("vocab_group must be None for logits that are a DTensor, whose mesh says it, got a group")
        if inplace:
            raise ValueError("inplace_backward must be False for logits that are a DTensor, got True")
        last = logits.dim() - 1
        of_columns = [i for i, each in enumerate(logits.placements) if each.is_shard(last) or each.is_shard(-1)]
        if len(of_columns) > 1 or not all(each.is_replicate() or each.is_shard() for each in logits.placements):
            raise ValueError(
                "logits that are a DTensor must be replicated or sharded, on their last dimension by one dimension of "
                f"the mesh at most, got placements {logits.placements}"
            )
        group = logits.device_mesh.get_group(of_columns[0]) if of_columns else None
        logits, token_ids, valid, temperature = map(_to_local, (logits, token_ids, valid, temperature))
    return logits, token_ids, valid, temperature, group_of(group)


def _to_local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "device_mesh") else value


@torch.library.custom_op("paec::split_token_stats_forward", mutates_args=())
def split_token_stats_forward(
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    top_p: float,
    softcap: float,
    vocab_size: int,
    inplace_backward: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `operator.token_stats_forward` does, and where this rank's columns lie.

    Args:
        vocab_size: of the whole vocabulary, 0 where no column is padding.
        group: the group's name.
    Returns:
        the table, and on the CPU int64 ``[2]``: the number of the shard's first column, and how many are no padding.
    """
    ranks = group_named(group)
    rows = Rows(token_ids, valid, temperature)
    settings: dict[str, Setting] = {"number of rows": logits.shape[:-1].numel(), "dtype": logits.dtype}
    settings |= {"vocab_size": vocab_size, "top_p": top_p, "softcap": softcap}
    shard = agree(logits.shape[-1], settings, rows, ranks)
    operator.check_values(rows, shard.vocab_size, "torch")  # whose message names the value; no kernel looks here
    split = SplitRows(shard_passes_of(backend), operator.as_rows(logits), rows, softcap, shard, ranks)
    return *split_rows.forward(split, top_p), torch.tensor([shard.first_column, shard.n_cols])


@split_token_stats_forward.register_fake
def _(logits, *_):
    table = layout.new_table(logits.new_empty, math.prod(logits.shape[:-1]), logits.device)
    return *table, torch.empty(2, dtype=torch.int64)


@torch.library.custom_op("paec::split_token_stats_backward", mutates_args=("out",))
def split_token_stats_backward(
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    place: Tensor,
    logits: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    backend: str,
    out: Tensor,
) -> None:
    """Write the gradient of this rank's logits into out, as `operator.token_stats_backward`."""
    first_column, n_cols = place.tolist()
    if not n_cols:
        out.zero_()
        return
    backward, rows = operator.passes_of(backend).backward, Rows(token_ids, valid, temperature)
    operator.write_gradient(backward, d_stats, stats, rest, logits, rows, softcap, n_cols, out, first_column)


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.softcap, _, ctx.inplace_backward, ctx.backend, _ = inputs
    *table, place = output
    operator.save_table(ctx, (*tensors, place), tuple(table), place)


def _backward(ctx, d_stats, *_):
    if d_stats is None:
        return 10 * (None,)
    operator.forbid_second_derivative("token_stats")
    logits, *rows, place, stats, rest = ctx.saved_tensors
    if ctx.inplace_backward:
        logits, out = None, logits
    else:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    split_token_stats_backward(d_stats.contiguous(), stats, rest, place, logits, *rows, ctx.softcap, ctx.backend, out)
    return out, *(9 * (None,))


split_token_stats_forward.register_autograd(_backward, setup_context=_setup_context)
