"""`linear_token_stats` of a head whose rows lie on several ranks: the products of `linear`, on this rank's rows.

Forward makes the logits of some rows at a time, and all ranks find the statistics of these together (see `split_rows`),
so that all take the same rows at a time. Backward needs the others once: d_hidden is the sum of what each rank's rows
of the weight give, which is added up while the last of the weight's own gradient is computed.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from paec_kernels.ops import layout, operator, split_rows
from paec_kernels.ops.chunks import chunk_bytes, select
from paec_kernels.ops.layout import Rows
from paec_kernels.ops.linear import empty_gradients, gradients_by_columns, table_by_rows
from paec_kernels.ops.split_operator import shard_passes_of
from paec_kernels.ops.split_rows import SplitRows
from paec_kernels.ops.vocab_group import Setting, agree, group_named


@torch.library.custom_op("paec::split_linear_token_stats_forward", mutates_args=())
def split_linear_token_stats_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    top_p: float,
    softcap: float,
    vocab_size: int,
    chunk_rows: int,
    needs_hidden: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what `linear.linear_token_stats_forward` does, and where this rank's rows of the weight lie.

    Args:
        vocab_size: of the whole vocabulary, 0 where no row is padding.
        needs_hidden: whether there is a backward pass that adds up d_hidden, in which all ranks must take part.
        group: the group's name.
    Returns:
        the table, and on the CPU int64 ``[3]``: the number of the weight's first row, how many are no padding, and how
        many the longest weight has.
    """
    ranks = group_named(group)
    rows = Rows(token_ids, valid, temperature)
    settings: dict[str, Setting] = {"number of rows": len(hidden), "size of hidden": hidden.shape[1]}
    settings |= {"dtype": hidden.dtype, "vocab_size": vocab_size, "top_p": top_p, "softcap": softcap}
    settings |= {"chunk_rows": chunk_rows, "PAEC_CHUNK_BYTES": chunk_bytes()}
    settings |= {"number of biases": int(bias is not None), "hidden.requires_grad": needs_hidden}
    shard = agree(len(weight), settings, rows, ranks)
    operator.check_values(rows, shard.vocab_size, "torch")
    own, own_bias = weight[: shard.n_cols], select(bias, slice(shard.n_cols))
    passes = shard_passes_of(backend)

    def statistics(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        return split_rows.forward(SplitRows(passes, logits[None], rows, softcap, shard, ranks), top_p)

    table = table_by_rows(statistics, hidden, own, own_bias, rows, chunk_rows, shard.widest)
    return *table, torch.tensor([shard.first_column, shard.n_cols, shard.widest])


@split_linear_token_stats_forward.register_fake
def _(hidden, *_):
    return *layout.new_table(hidden.new_empty, hidden.shape[0], hidden.device), torch.empty(3, dtype=torch.int64)


@torch.library.custom_op("paec::split_linear_token_stats_backward", mutates_args=())
def split_linear_token_stats_backward(
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    place: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    chunk_rows: int,
    backend: str,
    group: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute d_hidden of all ranks, and this rank's d_weight and d_bias; empty tensors where not needed."""
    first_row, n_own, longest = place.tolist()
    ranks = group_named(group)

    def sum_hidden(d_hidden: Tensor) -> Callable[[], None]:
        return dist.all_reduce(d_hidden, group=ranks, async_op=True).wait

    return gradients_by_columns(
        operator.passes_of(backend).backward,
        d_stats,
        stats,
        rest,
        hidden,
        weight,
        bias,
        Rows(token_ids, valid, temperature),
        softcap,
        chunk_rows,
        (needs_hidden, needs_weight, needs_bias),
        n_own,
        first_row,
        longest,
        sum_hidden,
    )


@split_linear_token_stats_backward.register_fake
def _(d_stats, stats, rest, place, hidden, weight, *others):
    return empty_gradients(hidden, weight, others[-3:])


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.softcap, _, ctx.chunk_rows, _, ctx.backend, ctx.group = inputs
    *table, place = output
    operator.save_table(ctx, (*tensors, place), tuple(table), place)


def _backward(ctx, d_stats, *_):
    if d_stats is None:
        return 13 * (None,)
    operator.forbid_second_derivative("linear_token_stats")
    *inputs, place, stats, rest = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = split_linear_token_stats_backward(
        d_stats.contiguous(), stats, rest, place, *inputs, ctx.softcap, ctx.chunk_rows, ctx.backend, ctx.group, *needs
    )
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return *wanted, *(10 * (None,))


split_linear_token_stats_forward.register_autograd(_backward, setup_context=_setup_context)
