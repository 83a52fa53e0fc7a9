"""A linear head's loss with its gradient made in the forward pass: three products in place of four.

That is exact for a loss that is a sum over tokens. PAEC's loss is such a sum only once the batch's coefficients are
known, and they are not before its last chunk. With the plan of the step before in their place it becomes an
approximation: stale threshold, mean and floor, by one optimiser step. [ours]
"""

from collections.abc import Callable

import torch
from torch import Tensor

from paec_kernels import checks
from paec_kernels.ops import operator
from paec_kernels.ops.chunks import add_product, choose_chunks, empty_logits, multiply, prepare, spans
from paec_kernels.ops.layout import Rows
from paec_kernels.types import TokenStats

ChunkLoss = Callable[[TokenStats, Tensor], Tensor]


class _OnePass(torch.autograd.Function):
    """(hidden, weight, bias, ...) -> the loss; its gradients are kept in the context."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows: Rows, options, chunk_loss, needs):
        top_p, softcap, chunk_rows, backend = options
        n_rows, n_cols = len(hidden), len(weight)
        operator.check_values(rows, n_cols, backend)
        passes = operator.passes_of(backend)
        needs_hidden, needs_weight, needs_bias = needs
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        d_bias = torch.zeros(n_cols, dtype=torch.float32, device=weight.device) if needs_bias else None

        device = hidden.device
        kept = torch.arange(n_rows, device=device) if rows.valid is None else rows.valid.nonzero().squeeze(1)
        chunks = choose_chunks(len(kept), n_cols, hidden.shape[1], hidden.dtype, rows.valid is not None, chunk_rows)
        buffer = empty_logits(min(chunks.rows, len(kept)), n_cols, hidden)
        loss = torch.zeros((), dtype=torch.float32, device=device)
        for block in spans(len(kept), chunks.rows):
            numbers = kept[block]
            z, hidden_rows, arguments = buffer[: len(numbers)], hidden[numbers], rows.take(numbers)
            multiply(hidden_rows, weight, bias, out=z)
            stats, rest, sizes = passes.forward(z[None], arguments, top_p, softcap, n_cols)
            with torch.enable_grad():
                leaf = stats.clone().requires_grad_()  # the loss may write over its rows
                has_tokens = rows.token_ids is not None
                chunk = chunk_loss(operator.as_token_stats((leaf, rest, sizes), numbers.shape, has_tokens), numbers)
            checks.tensor("the result of chunk_loss", chunk, kind="floating", like=("the loss", loss))
            loss += chunk.detach()
            if not any(needs) or not chunk.requires_grad:
                continue
            (d_stats,) = torch.autograd.grad(chunk, leaf)
            passes.backward(d_stats.contiguous(), stats, rest, z[None], arguments, softcap, n_cols, z[None])
            if d_hidden is not None:
                d_hidden[numbers] = z @ weight
            if d_weight is not None:
                add_product(d_weight, z.T, hidden_rows)
            if d_bias is not None:
                d_bias += z.sum(0, dtype=torch.float32)
        ctx.gradients = [
            None if gradient is None else gradient.to(hidden.dtype) for gradient in (d_hidden, d_weight, d_bias)
        ]
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        operator.forbid_second_derivative("one_pass_loss")
        if ctx.gradients is None:
            raise RuntimeError("one_pass_loss keeps its gradient for one backward pass, and it has been used")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(d_loss) for gradient in gradients)
        return *scaled, None, None, None, None


def one_pass_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor | None,
    chunk_loss: ChunkLoss,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    valid: Tensor | None = None,
    top_p: float = 0.95,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum ``chunk_loss`` over chunks of tokens, whose gradient is made at once, with three products.

    An approximation for PAEC, exact for losses that are sums over tokens. For PAEC ``chunk_loss`` returns
    ``paec.term(stats, valid_of_rows, plan)`` of the plan of the step *before*, and may ``paec.observe`` for the next::

        def chunk_loss(stats, rows):
            paec.observe(stats, valid[rows])
            policy, _ = grpo_loss(stats.logp, old[rows], advantages[rows], valid[rows], normalizer=n_tokens)
            return policy + paec.term(stats, valid[rows], last_plan)

        one_pass_loss(hidden, weight, ids, chunk_loss, valid=valid).backward()
        last_plan = paec.plan()

    The gradient is made before the loss is scaled: with float16 a GradScaler comes too late for what has underflowed.
    Multiply by its scale inside ``chunk_loss`` there, or use bfloat16.

    Args:
        chunk_loss: takes `TokenStats` of some rows ``[r]`` and their numbers, int64 ``[r]``, among the N flattened
            positions; returns a 0-d loss that depends on parameters through the statistics alone.
        Others as for `linear_token_stats`. 16-bit weights need a float32 sum of their size here.

    Returns:
        The loss, float32 and 0-d. Its gradient can be taken once; a second backward pass is a RuntimeError.

    Raises:
        TypeError, ValueError: as `linear_token_stats`.
    """
    hidden, weight, bias, rows, scaling = prepare(
        hidden, weight, bias, token_ids, valid, top_p, temperature, softcap, vocab_size, chunk_rows
    )
    if not callable(chunk_loss):
        raise TypeError(f"chunk_loss must be a function of statistics and rows, got {checks.shown(chunk_loss)}")
    backend = operator.resolve_backend(backend, hidden.device)
    if backend == "reference":
        raise ValueError("backend must be 'auto', 'triton' or 'torch' here, got 'reference'")
    operator.check_dtype("hidden", hidden, backend)
    operator.forbid_forward_mode("one_pass_loss", hidden, weight, bias)
    # Read before apply: inside a Function grad mode is always off.
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    options = (scaling.top_p, scaling.softcap or 0.0, chunk_rows or 0, backend)
    run = _OnePass.apply
    if torch.compiler.is_compiling():  # which would trace the passes' insides, and what it makes of them fails
        run = torch.compiler.disable(run, reason="one_pass_loss makes its gradient chunk by chunk")
    return run(hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows, options, chunk_loss, needs)
