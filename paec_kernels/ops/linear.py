"""`linear_token_stats`: the statistics of hidden @ weight.T, whose logits exist only a chunk at a time.

    forward   for rows R:      logits[R] = hidden[R] @ weight.T;  the operator's forward on them     1 product
    backward  for columns C:   logits[:, C] = hidden @ weight[C].T, overwritten by their gradient    1 product
                               d_weight[C] = d_logits[:, C].T @ hidden                               1 product
                               d_hidden += d_logits[:, C] @ weight[C]                                1 product

The nucleus needs whole rows, so forward goes by rows. Backward has every row's statistics, so it may go by columns:
each block of d_weight is then one product over all rows, accumulated in float32 by the product itself, and the only
float32 sum kept for 16-bit weights is d_hidden's, N x D and not V x D.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from paec_kernels import checks, reference
from paec_kernels.ops import layout, operator
from paec_kernels.ops.chunks import (
    add_product,
    choose_chunks,
    empty_logits,
    multiply,
    prepare,
    select,
    spans,
    tiles,
)
from paec_kernels.ops.layout import Rows
from paec_kernels.types import TokenStats


@torch.library.custom_op("paec::linear_token_stats_forward", mutates_args=())
def linear_token_stats_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    top_p: float,
    softcap: float,
    chunk_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `operator.token_stats_forward` does, of hidden ``[N, D]`` and weight ``[V, D]``.

    chunk_rows 0: the budget decides.
    """
    rows = Rows(token_ids, valid, temperature)
    operator.check_values(rows, len(weight), backend)
    forward = operator.passes_of(backend).forward

    def statistics(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        return forward(logits[None], rows, top_p, softcap, logits.shape[1])

    return table_by_rows(statistics, hidden, weight, bias, rows, chunk_rows, len(weight))


def table_by_rows(
    statistics: Callable[[Tensor, Rows], tuple[Tensor, Tensor, Tensor]],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arguments: Rows,
    chunk_rows: int,
    widest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Let ``statistics`` make the table of all valid rows from the logits of some rows at a time.

    Args:
        widest: as many rows at a time as a head of so many columns allows.
    """
    n_rows, n_cols = len(hidden), len(weight)
    table = layout.new_table(torch.zeros, n_rows, hidden.device)
    kept = None if arguments.valid is None else arguments.valid.nonzero().squeeze(1)
    n_kept = n_rows if kept is None else len(kept)
    chunks = choose_chunks(n_kept, widest, hidden.shape[1], hidden.dtype, kept is not None, chunk_rows)
    buffer = empty_logits(min(chunks.rows, n_kept), n_cols, hidden)
    for block in spans(n_kept, chunks.rows):
        rows = block if kept is None else kept[block]
        logits, hidden_rows = buffer[: block.stop - block.start], hidden[rows]
        for columns in tiles(n_cols, chunks.columns, hidden.dtype):
            multiply(hidden_rows, weight[columns], select(bias, columns), out=logits[:, columns])
        part = statistics(logits, arguments.take(rows))
        for whole, values in zip(table, part, strict=True):
            whole[..., rows] = values
    return table


@linear_token_stats_forward.register_fake
def _(hidden, *_):
    return layout.new_table(hidden.new_empty, hidden.shape[0], hidden.device)


@torch.library.custom_op("paec::linear_token_stats_backward", mutates_args=())
def linear_token_stats_backward(
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    chunk_rows: int,
    backend: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute d_hidden, d_weight, d_bias; empty tensors where not needed, whose products are not computed."""
    rows = Rows(token_ids, valid, temperature)
    needs = needs_hidden, needs_weight, needs_bias
    backward = operator.passes_of(backend).backward
    return gradients_by_columns(
        backward, d_stats, stats, rest, hidden, weight, bias, rows, softcap, chunk_rows, needs, len(weight)
    )


def gradients_by_columns(
    backward: Callable[..., None],
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    softcap: float,
    chunk_rows: int,
    needs: tuple[bool, bool, bool],
    n_cols: int,
    first_column: int = 0,
    widest: int = 0,
    sum_hidden: Callable[[Tensor], Callable[[], None]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute d_hidden, d_weight and d_bias, of the logits of some columns at a time.

    Args:
        n_cols: rows of the weight from here on are padding, gradient 0.
        first_column, widest: of the weight's rows in a wider vocabulary, and what `table_by_rows` was given.
        sum_hidden: begins to add up d_hidden over ranks, in place, and returns what waits for it.
    """
    n_rows = len(hidden)
    needs_hidden, needs_weight, needs_bias = needs
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else weight.new_empty(0)
    d_bias = weight.new_empty(len(weight) if needs_bias else 0)
    d_weight[n_cols:], d_bias[n_cols:] = 0, 0
    kept = None
    if rows.valid is not None:
        kept = rows.valid.nonzero().squeeze(1)
        hidden, rows = hidden[kept], rows.take(kept)
        d_stats, stats, rest = (values[:, kept].contiguous() for values in (d_stats, stats, rest))
    total = torch.zeros(hidden.shape if needs_hidden else 0, dtype=torch.float32, device=hidden.device)
    chunks = choose_chunks(len(hidden), widest or n_cols, hidden.shape[1], hidden.dtype, kept is not None, chunk_rows)
    buffer = empty_logits(len(hidden), min(chunks.columns, n_cols), hidden)
    logits = wait = None
    for columns in spans(n_cols, chunks.columns):
        n_columns = columns.stop - columns.start
        logits = buffer[:, :n_columns]
        for tile in tiles(len(hidden), chunks.rows, hidden.dtype):
            multiply(hidden[tile], weight[columns], select(bias, columns), out=logits[tile])
        first = first_column + columns.start
        backward(d_stats, stats, rest, logits[None], rows, softcap, n_columns, logits[None], first)
        if needs_hidden:
            add_product(total, logits, weight[columns])
            if sum_hidden is not None and columns.stop == n_cols:  # while the last products are made
                wait = sum_hidden(total)
        if needs_weight:
            torch.mm(logits.T, hidden, out=d_weight[columns])
        if needs_bias:
            torch.sum(logits, 0, out=d_bias[columns])
    if sum_hidden is not None and needs_hidden:
        (wait or sum_hidden(total))()
    del buffer, logits  # before the copies below, which are not in the budget beside them
    d_hidden = total.to(hidden.dtype)
    del total
    if kept is not None and needs_hidden:
        d_hidden = hidden.new_zeros(n_rows, hidden.shape[1]).index_copy_(0, kept, d_hidden)
    return d_hidden, d_weight, d_bias


def empty_gradients(hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Make d_hidden, d_weight and d_bias as the backward operators do, for a compiler."""
    needs_hidden, needs_weight, needs_bias = needs
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        weight.new_empty(weight.shape if needs_weight else 0),
        weight.new_empty(weight.shape[0] if needs_bias else 0),
    )


@linear_token_stats_backward.register_fake
def _(d_stats, stats, rest, hidden, weight, *others):
    return empty_gradients(hidden, weight, others[-3:])


def _setup_context(ctx, inputs, output):
    *tensors, _, ctx.softcap, ctx.chunk_rows, ctx.backend = inputs
    operator.save_table(ctx, tensors, output)


def _backward(ctx, d_stats, *_):
    if d_stats is None:
        return 10 * (None,)
    operator.forbid_second_derivative("linear_token_stats")
    *inputs, stats, rest = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = linear_token_stats_backward(
        d_stats.contiguous(), stats, rest, *inputs, ctx.softcap, ctx.chunk_rows, ctx.backend, *needs
    )
    wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
    return *wanted, *(7 * (None,))


linear_token_stats_forward.register_autograd(_backward, setup_context=_setup_context)


def backward_node(stats: TokenStats) -> Node | None:
    """Return the node of autograd's graph that makes the logits again, for hooks around it.

    Args:
        stats: from `linear_token_stats`.
    Returns:
        None where nothing needs a gradient, and inside a compiled graph.
    """
    node = stats.entropy.grad_fn
    while node is not None and "linear_token_stats" not in node.name():
        node = node.next_functions[0][0] if node.next_functions else None
    return node


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    valid: Tensor | None = None,
    top_p: float = 0.95,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_group: Any = None,
    backend: str = "auto",
) -> TokenStats:
    """Compute `token_stats` of ``hidden @ weight.T + bias``, whose logits exist only a chunk at a time.

    Differentiable in ``hidden``, ``weight`` and ``bias``; a frozen one costs no product. Four products in all, two of
    the logits and one for each gradient, since the gradient's coefficients may depend on the whole batch.

    Memory beyond the inputs and their gradients: ``PAEC_CHUNK_BYTES`` (bytes; 224 MiB unless set) for a chunk of
    logits and what stands beside it, the float32 sum of d_hidden for 16-bit hidden states and a copy of the valid
    ones where some are not; at least an eighth of it is left to the logits. Rows that are not valid are dropped
    before the products; on a GPU counting them waits for the device once, and ``valid=None`` does not.

    Under autocast the inputs are cast as a linear layer's; the 16-bit copy of the weight is made in every call. A
    sharded FSDP2 weight is gathered (``full_tensor()``); under DeepSpeed ZeRO-3 call this, and backward, inside
    ``deepspeed.zero.GatheredParameters([weight])``.

    Args:
        hidden: ``[..., D]``, float32, bfloat16 or float16.
        weight: ``[V, D]`` of the same dtype.
        token_ids, valid, top_p, temperature, softcap, backend: as for `token_stats`, of shape ``hidden.shape[:-1]``.
        bias: ``[V]`` of the same dtype, or None.
        chunk_rows: rows of logits at a time in the forward pass (as many elements in the backward pass), in place of
            the memory budget. One value gives one result, to the bit; others differ in rounding.
        vocab_size: rows of ``weight`` from here on are padding: not multiplied, gradient 0.
        vocab_group: the ``ProcessGroup`` over whose ranks ``weight`` and ``bias`` are split by rows, as `token_stats`
            has it, none on some if need be; ``hidden`` is the same on all, and its gradient, summed over them, too.

    Returns:
        `TokenStats`, its tensors shaped ``hidden.shape[:-1]``.

    Raises:
        TypeError, ValueError: as `token_stats`, and for hidden, weight, bias or chunk_rows that do not fit.
    """
    own_vocab_size, fewest = vocab_size, 1
    if vocab_group is not None:
        from paec_kernels.ops.split_linear import split_linear_token_stats_forward
        from paec_kernels.ops.vocab_group import group_of, own_rows

        vocab_group = group_of(vocab_group)
    if vocab_group is not None:
        fewest = 0
        checks.tensor("weight", weight, kind="floating")
        weight, bias = own_rows(weight, vocab_group), None if bias is None else own_rows(bias, vocab_group)
        if vocab_size is not None:
            vocab_size = checks.integer("vocab_size", vocab_size, least=1)
            own_vocab_size = None  # no rank knows yet which of its own rows are padding
    hidden, weight, bias, rows, (top_p, temperature, softcap, _) = prepare(
        hidden, weight, bias, token_ids, valid, top_p, temperature, softcap, own_vocab_size, chunk_rows, fewest
    )
    backend = operator.resolve_backend(backend, hidden.device)
    operator.check_dtype("hidden", hidden, backend)
    if backend == "reference":
        if vocab_group is not None:
            raise ValueError("backend must be 'auto', 'triton' or 'torch' with a vocab_group, got 'reference'")
        operator.check_values(rows, len(weight), backend)
        return reference.linear_token_stats(
            hidden, weight, token_ids, bias=bias, valid=valid, top_p=top_p, temperature=temperature, softcap=softcap
        )
    operator.forbid_forward_mode("linear_token_stats", hidden, weight, bias)
    inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, *rows, top_p, softcap or 0.0)
    if vocab_group is None:
        table = linear_token_stats_forward(*inputs, chunk_rows or 0, backend)
    else:
        *table, _ = split_linear_token_stats_forward(
            *inputs,
            vocab_size or 0,
            chunk_rows or 0,
            torch.is_grad_enabled() and hidden.requires_grad,
            backend,
            vocab_group.group_name,
        )
    return operator.as_token_stats(table, hidden.shape[:-1], token_ids is not None)
