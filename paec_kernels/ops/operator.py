"""`token_stats`: argument checks, the choice of a backend, and the one differentiable operator.

The operator is a pair of `torch.library` ops over a table of statistics (see `layout`), so that autograd sums
whatever gradients arrive for logp, H and H_p before a single backward pass, and `torch.compile` sees one node.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paec_kernels import checks, reference
from paec_kernels.ops import layout, torch_backend
from paec_kernels.ops.layout import Rows
from paec_kernels.types import IGNORE_INDEX, TokenStats

BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
# Parsed as Triton parses it, at import, so that torch.compile never traces os.environ.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def resolve_backend(backend: str, device: torch.device) -> str:
    """Return the backend that ``"auto"`` stands for: Triton on a GPU where it is installed, torch anywhere else."""
    checks.one_of("backend", backend, BACKENDS)
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton' needs the triton package, which is not installed")
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            "backend='triton' needs tensors on a GPU, or Triton's interpreter (TRITON_INTERPRET=1 before paec_kernels "
            f"is imported), got tensors on {device}"
        )
    if backend == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    return backend


class Passes(NamedTuple):
    """The two passes of a backend; `torch_backend` documents their arguments."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., None]


def passes_of(backend: str) -> Passes:
    """Return the passes of ``"triton"``, which only now is imported, or of ``"torch"``."""
    if backend == "triton":
        from paec_kernels.ops.backward import backward
        from paec_kernels.ops.forward import forward

        return Passes(forward, backward)
    return Passes(torch_backend.forward, torch_backend.backward)


class Scaling(NamedTuple):
    """The options that say what distribution the logits stand for, checked, numbers as Python's."""

    top_p: float
    temperature: float | Tensor
    softcap: float | None
    vocab_size: int | None


def check_options(
    top_p: float, temperature: float | Tensor, softcap: float | None, vocab_size: int | None, n_cols: int | None = None
) -> Scaling:
    """Return the options, or raise TypeError or ValueError if they are out of range whatever the rows hold.

    Args:
        n_cols: how many columns the logits have, where they are known.
    """
    top_p = checks.number("top_p", top_p, above=0, most=1)
    if isinstance(temperature, Tensor):
        checks.tensor("temperature", temperature, kind="floating")
    else:
        temperature = checks.number("temperature", temperature, above=0)
    if softcap is not None:
        softcap = checks.number("softcap", softcap, above=0)
    if vocab_size is not None:
        vocab_size = checks.integer("vocab_size", vocab_size, least=1, most=n_cols)
    return Scaling(top_p, temperature, softcap, vocab_size)


def check_dtype(name: str, value: Tensor, backend: str) -> None:
    """Raise TypeError for logits, or hidden states, of a type that the backend does not compute with."""
    if value.dtype not in DTYPES and not (backend == "reference" and value.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16 (with backend='reference' float64 too), got {value.dtype}"
        )


def flat_rows(
    name: str, like: Tensor, token_ids: Tensor | None, valid: Tensor | None, temperature: float | Tensor
) -> Rows:
    """Check the arguments of the rows and return them as the ops take them.

    Args:
        name, like: a tensor ``[...]`` of the shape and on the device that they must have.
    Raises:
        TypeError, ValueError: by name. It takes values to tell more; see `check_values`.
    """
    if token_ids is not None:
        checks.tensor("token_ids", token_ids, kind="integer", like=(name, like))
        token_ids = token_ids.long().reshape(-1).contiguous()
    if valid is not None:
        checks.tensor("valid", valid, kind="bool", like=(name, like))
        valid = valid.reshape(-1).contiguous()
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().expand(like.shape) if temperature.dim() == 0 else temperature.detach()
        checks.tensor("temperature", temperature, like=(name, like))
        temperature = temperature.float().reshape(-1).contiguous()
    else:
        temperature = torch.full((1,), temperature, dtype=torch.float32, device=like.device)
    return Rows(token_ids, valid, temperature)


def check_values(rows: Rows, vocab_size: int, backend: str) -> None:
    """Check what only values tell: token ids in range, temperatures positive, in rows that are valid.

    On a CPU this raises ValueError. On a GPU, which must not wait for the host, a wrong value stops the device
    with an assertion, as an index out of range does in PyTorch's own cross-entropy. There Triton's kernel looks
    itself, in the launch that it makes anyway.
    """
    token_ids, valid, temperature = rows
    on_cpu = temperature.device.type == "cpu"
    if backend == "triton" and not on_cpu:
        return
    if token_ids is not None:
        wrong = (token_ids != IGNORE_INDEX) & ((token_ids < 0) | (token_ids >= vocab_size))
        _refuse(token_ids, wrong, valid, f"token_ids must be {IGNORE_INDEX} or in [0, {vocab_size})")
    if on_cpu or temperature.numel() > 1:
        wrong = ~((temperature > 0) & (temperature < math.inf))
        _refuse(temperature, wrong, valid, "temperature must be > 0 and finite")


def _refuse(values: Tensor, wrong: Tensor, valid: Tensor | None, expected: str) -> None:
    """Raise ValueError, or stop a GPU, if a value is wrong in a row that is valid."""
    wrong = wrong if valid is None else wrong & valid
    if values.device.type != "cpu":
        torch._assert_async(~wrong.any(), expected)
    elif bool(wrong.any()):
        raise ValueError(f"{expected}, got {values.expand_as(wrong)[wrong][0].item()}")


def as_rows(logits: Tensor) -> Tensor:
    """Return ``[..., V]`` as a ``[outer, inner, V]`` view, or a copy where more than two strides would be needed."""
    dims = [(n, stride) for n, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if n != 1]
    split = 0
    for i in range(len(dims) - 1):
        if dims[i][1] != dims[i + 1][1] * dims[i + 1][0]:
            split = i + 1
    outer, inner = math.prod(n for n, _ in dims[:split]), math.prod(n for n, _ in dims[split:])
    return logits.reshape(outer, inner, logits.shape[-1])


@torch.library.custom_op("paec::token_stats_forward", mutates_args=())
def token_stats_forward(
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    top_p: float,
    softcap: float,
    vocab_size: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the table of logits ``[..., V]``: stats and rest as in `layout`, and the nucleus sizes int32 ``[N]``.

    token_ids, valid and temperature are those of `layout.Rows`; softcap 0 is none. Only stats is differentiable.
    """
    rows = Rows(token_ids, valid, temperature)
    check_values(rows, vocab_size, backend)
    return passes_of(backend).forward(as_rows(logits), rows, top_p, softcap, vocab_size)


@token_stats_forward.register_fake
def _(logits, *_):
    return layout.new_table(logits.new_empty, math.prod(logits.shape[:-1]), logits.device)


@torch.library.custom_op("paec::token_stats_backward", mutates_args=("out",))
def token_stats_backward(
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    logits: Tensor | None,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    backend: str,
    out: Tensor,
) -> None:
    """Write the gradient of logits into out, from that of stats. Without logits, out holds them.

    They are not named twice, since a compiler that finds them read and written makes a copy to write to.
    """
    rows = Rows(token_ids, valid, temperature)
    write_gradient(passes_of(backend).backward, d_stats, stats, rest, logits, rows, softcap, vocab_size, out)


def write_gradient(
    backward: Callable[..., None],
    d_stats: Tensor,
    stats: Tensor,
    rest: Tensor,
    logits: Tensor | None,
    rows: Rows,
    softcap: float,
    n_cols: int,
    out: Tensor,
    first_column: int = 0,
) -> None:
    """Let a backend's pass write the gradient of ``[..., V]`` into out, which without logits holds them."""
    z = as_rows(out if logits is None else logits)
    d_z = z if logits is None else out.reshape(z.shape)
    backward(d_stats, stats, rest, z, rows, softcap, n_cols, d_z, first_column)
    if d_z.data_ptr() != out.data_ptr():
        out.copy_(d_z.view(out.shape))


def save_table(
    ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor, Tensor], *others: Tensor
) -> None:
    """Keep what a backward pass reads: the inputs and the table, of which stats alone has a gradient.

    Args:
        others: outputs beside the table, without a gradient.
    """
    stats, rest, sizes = output
    ctx.save_for_backward(*inputs, stats, rest)
    ctx.mark_non_differentiable(rest, sizes, *others)
    ctx.set_materialize_grads(False)  # of those two it would be zeros, launched for nothing


def forbid_second_derivative(name: str) -> None:
    """Raise RuntimeError in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: its backward pass was run with create_graph=True")


def forbid_forward_mode(name: str, *inputs: Tensor | None) -> None:
    """Raise RuntimeError for inputs with a tangent. An op without a forward mode drops it: the result's would be 0."""
    for value in inputs:
        if value is not None and torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(f"{name} has no forward-mode derivative (torch.func.jvp, dual numbers), only a backward")


def _setup_context(ctx, inputs, output):
    logits, token_ids, valid, temperature, _, *ctx.options, ctx.inplace_backward, ctx.backend = inputs
    save_table(ctx, (logits, token_ids, valid, temperature), output)


def _backward(ctx, d_stats, *_):
    if d_stats is None:  # whatever came after had no gradient to give
        return 9 * (None,)
    forbid_second_derivative("token_stats")
    logits, *rows, stats, rest = ctx.saved_tensors
    if ctx.inplace_backward:
        logits, out = None, logits
    else:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    token_stats_backward(d_stats.contiguous(), stats, rest, logits, *rows, *ctx.options, ctx.backend, out)
    return out, *(8 * (None,))


token_stats_forward.register_autograd(_backward, setup_context=_setup_context)


def as_token_stats(table: Sequence[Tensor], shape: torch.Size, has_tokens: bool) -> TokenStats:
    """Return the public rows of a table."""
    stats, rest, sizes = table
    # All three at once: their gradients are then stacked, in one launch, where those of rows taken one by one would
    # each be padded with zeros and added up. Without gradients the rows may be written over, as any tensor's.
    rows = stats.unbind() if stats.requires_grad else tuple(stats[i] for i in range(layout.N_STATS))
    logp, entropy, nucleus_entropy, margin, lse, nucleus_size = (
        row.view(shape) for row in (*rows, rest[layout.MARGIN], rest[layout.LSE], sizes)
    )
    log_probs: Any = logp if has_tokens else None
    return TokenStats(log_probs, entropy, nucleus_entropy, margin, lse, nucleus_size)


def token_stats(
    logits: Tensor,
    token_ids: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    top_p: float = 0.95,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    vocab_group: Any = None,
    backend: str = "auto",
) -> TokenStats:
    """Compute log-prob, entropy, nucleus entropy and size, and top-two margin of every token in one pass.

    Differentiable in ``logits`` through ``logp``, ``entropy`` and ``nucleus_entropy``; the backward pass reads the
    logits once and writes their gradient once, and no softmax is ever stored.

    Args:
        logits: ``[..., V]``, float32, bfloat16 or float16, any strides.
        token_ids: integer ``[...]``, the sampled tokens; -100 gives logp 0 and no gradient from it.
        valid: bool ``[...]``; a row that is not valid is not read, its statistics and gradient are 0.
        top_p: nucleus mass in (0, 1]; 1 takes every token of non-zero probability.
        temperature: float, or a floating tensor ``[...]`` with one for each row; no gradient flows to it.
        softcap: x = softcap * tanh(z / softcap) / temperature, or None.
        vocab_size: columns from here on are padding: not read, gradient 0.
        inplace_backward: write the gradient over ``logits`` instead of a new tensor. Whoever saved the logits for
            their own backward pass then gets autograd's "modified by an inplace operation" error, not wrong numbers.
            A leaf, such as a parameter, is refused.
        vocab_group: the ``ProcessGroup`` over whose ranks, in their order, the columns are split: ``logits`` are this
            rank's, all else is the whole vocabulary's, and the same on every rank, as the result is. Shards may differ
            in width, and need no column. A DTensor sharded on its last dimension says so itself. See
            docs/vocabulary_split.md.
        backend: "auto", "triton" (a GPU, or Triton's interpreter), "torch" or "reference" (plain; float64 too).

    Returns:
        `TokenStats`, its tensors shaped ``logits.shape[:-1]``, entropies in nats. A row that holds NaN or +inf, or
        no finite logit, gives NaN in that row alone.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name. A token id out of
            range raises on a CPU and stops a GPU with a device assertion.
    """
    checks.tensor("logits", logits)
    if vocab_group is not None or hasattr(logits, "device_mesh"):  # a DTensor
        from paec_kernels.ops.split_operator import own_shard, split_token_stats_forward

        logits, token_ids, valid, temperature, vocab_group = own_shard(
            logits, token_ids, valid, temperature, vocab_group, inplace_backward
        )
    if logits.dim() == 0 or (logits.shape[-1] == 0 and vocab_group is None):
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    backend = resolve_backend(backend, logits.device)
    check_dtype("logits", logits, backend)
    n_cols = logits.shape[-1] if vocab_group is None else None
    top_p, temperature, softcap, vocab_size = check_options(top_p, temperature, softcap, vocab_size, n_cols)
    checks.boolean("inplace_backward", inplace_backward)
    one_a_row = logits[..., 0] if logits.shape[-1] else logits.new_empty(logits.shape[:-1])
    rows = flat_rows("logits[..., 0]", one_a_row, token_ids, valid, temperature)
    n_cols = vocab_size or n_cols or 0
    if backend == "reference":
        if vocab_group is not None:
            raise ValueError("backend must be 'auto', 'triton' or 'torch' with a vocab_group, got 'reference'")
        check_values(rows, n_cols, backend)
        return reference.token_stats(
            logits, token_ids, valid=valid, top_p=top_p, temperature=temperature, softcap=softcap, vocab_size=n_cols
        )
    forbid_forward_mode("token_stats", logits)
    if inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("inplace_backward needs logits of their own memory, got an expanded tensor (stride 0)")
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad and _is_leaf(logits):
        raise ValueError("inplace_backward needs logits that were computed, got a leaf, whose values would be lost")
    options = (top_p, softcap or 0.0, n_cols, inplace_backward, backend)
    if vocab_group is None:
        table = token_stats_forward(logits, *rows, *options)
    else:
        *table, _ = split_token_stats_forward(logits, *rows, *options, vocab_group.group_name)
    return as_token_stats(table, logits.shape[:-1], token_ids is not None)


def _is_leaf(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.is_leaf  # torch.compile cannot say
