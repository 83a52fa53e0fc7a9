"""`token_stats`: argument checks, the choice of a backend, and the one differentiable operator.

The operator is a pair of `torch.library` ops over a table of statistics (see `layout`), so that autograd sums
whatever gradients arrive for logp, H and H_p before a single backward pass, and `torch.compile` sees one node.
"""

import importlib.util
import math
import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from paec_kernels import reference
from paec_kernels.ops import layout, torch_backend
from paec_kernels.types import IGNORE_INDEX, TokenStats

BACKENDS = ("auto", "triton", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# As Triton reads it. Here and not in a function: torch.compile need not trace it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that ``"auto"`` stands for: Triton on a GPU where it is installed, torch anywhere else."""
    check_backend(backend)
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not has_triton:
        raise ValueError("backend='triton' needs the triton package, which is not installed")
    if backend == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            "backend='triton' needs tensors on a GPU, or Triton's interpreter (TRITON_INTERPRET=1 before paec_kernels "
            f"is imported), got tensors on {device}"
        )
    if backend == "auto":
        return "triton" if device.type == "cuda" and has_triton else "torch"
    return backend


def implementation(backend: str) -> Any:
    if backend == "triton":
        from paec_kernels.ops import triton_backend

        return triton_backend
    return torch_backend


def _check_rows(name: str, value: Tensor, logits: Tensor) -> None:
    if value.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of logits without its last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(value.shape)}"
        )
    if value.device != logits.device:
        raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {value.device}")


def check_arguments(
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    top_p: float,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
) -> None:
    """Everything that can be said without reading a tensor's values. Raises ValueError or TypeError."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {tuple(logits.shape)}")
    if token_ids is not None:
        if not isinstance(token_ids, Tensor) or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
            raise TypeError(f"token_ids must be an integer tensor, got {getattr(token_ids, 'dtype', token_ids)}")
        _check_rows("token_ids", token_ids, logits)
    if valid is not None:
        if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
            raise TypeError(f"valid must be a bool tensor, got {getattr(valid, 'dtype', valid)}")
        _check_rows("valid", valid, logits)
    check_options(top_p, temperature, softcap, vocab_size)
    if isinstance(temperature, Tensor):
        rows = temperature.expand(logits.shape[:-1]) if temperature.dim() == 0 else temperature
        _check_rows("temperature", rows, logits)
    if vocab_size is not None and vocab_size > logits.shape[-1]:
        raise ValueError(f"vocab_size must be in [1, {logits.shape[-1]}], the columns of logits, got {vocab_size}")


def check_options(top_p: float, temperature: float | Tensor, softcap: float | None, vocab_size: int | None) -> None:
    """What can be said of them without the logits. Raises ValueError or TypeError."""
    for name, number in (("top_p", top_p), ("temperature", temperature), ("softcap", softcap)):
        optional = (name == "temperature" and isinstance(number, Tensor)) or (name == "softcap" and number is None)
        if not optional and (isinstance(number, bool) or not isinstance(number, Real)):
            raise TypeError(f"{name} must be a number, got {number!r}")
    check_positive_int("vocab_size", vocab_size)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if isinstance(temperature, Tensor):
        if not temperature.is_floating_point():
            raise TypeError(f"temperature must be a float or a floating tensor, got {temperature.dtype}")
    elif not (0 < temperature < math.inf):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not (0 < softcap < math.inf):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")


def check_positive_int(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_inplace(inplace_backward: bool) -> None:
    if not isinstance(inplace_backward, bool):
        raise TypeError(f"inplace_backward must be a bool, got {inplace_backward!r}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    top_p: float,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_size: int | None,
) -> Tensor:
    """`check_arguments` for the logits of a linear head. Returns a stand-in of their shape that takes no memory."""
    logits = hidden[..., :1].expand(*hidden.shape[:-1], weight.shape[0])
    check_arguments(logits, token_ids, valid, top_p, temperature, softcap, vocab_size)
    return logits


def check_values(
    token_ids: Tensor | None, valid: Tensor | None, temperature: Tensor, vocab_size: int, backend: str
) -> None:
    """What only the values tell: token ids in range, temperatures positive, in rows that are valid.

    On a CPU this raises ValueError. On a GPU, which must not wait for the host, a wrong value stops the device
    with an assertion, as an index out of range does in PyTorch's own cross-entropy. There Triton's kernel looks
    itself, in the launch that it makes anyway.
    """
    if backend == "triton" and temperature.device.type != "cpu":
        return
    if token_ids is not None:
        wrong = (token_ids != IGNORE_INDEX) & ((token_ids < 0) | (token_ids >= vocab_size))
        wrong = wrong if valid is None else wrong & valid
        expected = f"token_ids must be {IGNORE_INDEX} or in [0, {vocab_size})"
        if token_ids.device.type != "cpu":
            torch._assert_async(~wrong.any(), expected)
        elif bool(wrong.any()):
            raise ValueError(f"{expected}, got {int(token_ids[wrong][0])}")
    on_cpu = temperature.device.type == "cpu"
    if on_cpu or temperature.numel() > 1:
        wrong = ~((temperature > 0) & (temperature < math.inf))
        wrong = wrong if valid is None or temperature.numel() == 1 else wrong & valid
        expected = "temperature must be positive and finite"
        if not on_cpu:
            torch._assert_async(~wrong.any(), expected)
        elif bool(wrong.any()):
            raise ValueError(f"{expected}, got {float(temperature[wrong][0])}")


def as_rows(logits: Tensor) -> Tensor:
    """``[..., V]`` as a ``[outer, inner, V]`` view, or a copy where more than two strides would be needed."""
    dims = [(n, stride) for n, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if n != 1]
    split = 0
    for i in range(len(dims) - 1):
        if dims[i][1] != dims[i + 1][1] * dims[i + 1][0]:
            split = i + 1
    outer, inner = math.prod(n for n, _ in dims[:split]), math.prod(n for n, _ in dims[split:])
    return logits.reshape(outer, inner, logits.shape[-1])


def check_dtype(name: str, value: Tensor, backend: str) -> None:
    if value.dtype not in DTYPES and not (backend == "reference" and value.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16 (with backend='reference' float64 too), got {value.dtype}"
        )


def flat_rows(
    token_ids: Tensor | None, valid: Tensor | None, temperature: float | Tensor, logits: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The per-row arguments as the ops take them: int64 and bool ``[N]`` or None, float32 ``[N]`` or ``[1]``."""
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().float().expand(logits.shape[:-1]).reshape(-1).contiguous()
    else:
        temperature = torch.full((1,), temperature, dtype=torch.float32, device=logits.device)
    return (
        None if token_ids is None else token_ids.long().reshape(-1).contiguous(),
        None if valid is None else valid.reshape(-1).contiguous(),
        temperature,
    )


def as_token_stats(outputs: tuple[Tensor, Tensor, Tensor], shape: torch.Size, has_tokens: bool) -> TokenStats:
    """The public rows of what `mark_differentiable` returns; those of the whole table carry no gradient."""
    differentiable, table, sizes = outputs
    # All three at once: their gradients are then stacked, in one launch, where those of rows taken one by one would
    # each be padded with zeros and added up. Without gradients the rows may be written over, as any tensor's.
    rows = differentiable.unbind() if differentiable.requires_grad else table
    logp, entropy, nucleus_entropy = (rows[i].view(shape) for i in range(layout.N_DIFFERENTIABLE))
    margin, lse = table[layout.MARGIN].view(shape), table[layout.LSE].view(shape)
    return TokenStats(logp if has_tokens else None, entropy, nucleus_entropy, margin, lse, sizes.view(shape))


@torch.library.custom_op("paec::token_stats_forward", mutates_args=())
def token_stats_forward(
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    top_p: float,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The table ``[10, N]`` float32 of `layout` and the nucleus sizes ``[N]`` int32 of logits ``[..., V]``.

    token_ids int64 ``[N]``, valid bool ``[N]``, temperature float32 ``[N]`` or ``[1]``; softcap 0 is none.
    """
    check_values(token_ids, valid, temperature, vocab_size, backend)
    return implementation(backend).forward(as_rows(logits), token_ids, valid, temperature, top_p, softcap, vocab_size)


@token_stats_forward.register_fake
def _(logits, token_ids, valid, temperature, top_p, softcap, vocab_size, backend):
    n_rows = math.prod(logits.shape[:-1])
    table = logits.new_empty(layout.N_ROWS, n_rows, dtype=torch.float32)
    return table, logits.new_empty(n_rows, dtype=torch.int32)


@torch.library.custom_op("paec::token_stats_backward", mutates_args=())
def token_stats_backward(
    d_stats: Tensor,
    table: Tensor,
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> Tensor:
    """The gradient of logits, contiguous, of their shape and dtype, from d_stats, that of the table's first rows."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = as_rows(logits)
    implementation(backend).backward(
        d_stats, table, rows, token_ids, valid, temperature, softcap, vocab_size, out.view(rows.shape)
    )
    return out


@token_stats_backward.register_fake
def _(d_stats, table, logits, token_ids, valid, temperature, softcap, vocab_size, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op("paec::token_stats_backward_", mutates_args=("logits",))
def token_stats_backward_(
    d_stats: Tensor,
    table: Tensor,
    logits: Tensor,
    token_ids: Tensor | None,
    valid: Tensor | None,
    temperature: Tensor,
    softcap: float,
    vocab_size: int,
    backend: str,
) -> None:
    """The gradient of logits, written over them."""
    rows = as_rows(logits)
    implementation(backend).backward(d_stats, table, rows, token_ids, valid, temperature, softcap, vocab_size, rows)
    if rows.data_ptr() != logits.data_ptr():
        logits.copy_(rows.view(logits.shape))


@token_stats_backward_.register_fake
def _(d_stats, table, logits, token_ids, valid, temperature, softcap, vocab_size, backend):
    return None


def forbid_second_derivative(name: str) -> None:
    """To be called in a backward pass. Raises RuntimeError where the pass is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: its backward pass was run with create_graph=True")


def mark_differentiable(ctx: Any, table: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give a Function's outputs: the table's first rows, which alone carry a gradient, the table and the sizes."""
    ctx.mark_non_differentiable(table, sizes)
    ctx.set_materialize_grads(False)  # of those two it would be zeros, launched for nothing
    return table[: layout.N_DIFFERENTIABLE], table, sizes


class _TokenStats(torch.autograd.Function):
    """(logits, ...) -> (the table's first three rows, table, sizes). Only the first carries a gradient."""

    @staticmethod
    def forward(ctx, logits, token_ids, valid, temperature, top_p, softcap, vocab_size, inplace_backward, backend):
        table, sizes = token_stats_forward(logits, token_ids, valid, temperature, top_p, softcap, vocab_size, backend)
        ctx.save_for_backward(logits, token_ids, valid, temperature, table)
        ctx.options = (softcap, vocab_size, backend)
        ctx.inplace_backward = inplace_backward
        return mark_differentiable(ctx, table, sizes)

    @staticmethod
    def backward(ctx, d_stats, *_):
        if d_stats is None:  # whatever came after had no gradient to give
            return 9 * (None,)
        forbid_second_derivative("token_stats")
        logits, token_ids, valid, temperature, table = ctx.saved_tensors
        arguments = (d_stats.contiguous(), table, logits, token_ids, valid, temperature, *ctx.options)
        if ctx.inplace_backward:
            token_stats_backward_(*arguments)
            d_logits = logits
        else:
            d_logits = token_stats_backward(*arguments)
        return d_logits, None, None, None, None, None, None, None, None


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
    backend: str = "auto",
) -> TokenStats:
    """Log-prob, entropy, nucleus entropy and size, and top-two margin of every token, in one pass over the logits.

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
        backend: "auto", "triton" (a GPU, or Triton's interpreter), "torch" or "reference" (plain; float64 too).

    Returns:
        `TokenStats`, its tensors shaped ``logits.shape[:-1]``, entropies in nats. A row that holds NaN or +inf, or
        no finite logit, gives NaN in that row alone.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range, by name. A token id out of
            range raises on a CPU and stops a GPU with a device assertion.
    """
    check_arguments(logits, token_ids, valid, top_p, temperature, softcap, vocab_size)
    backend = resolve_backend(backend, logits.device)
    check_dtype("logits", logits, backend)
    check_inplace(inplace_backward)
    n_cols = logits.shape[-1] if vocab_size is None else vocab_size
    if backend == "reference":
        return _by_reference(logits, token_ids, valid, top_p, temperature, softcap, n_cols)
    if inplace_backward and any(n > 1 and s == 0 for n, s in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("inplace_backward needs logits of their own memory, got an expanded tensor (stride 0)")
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad and _is_leaf(logits):
        raise ValueError("inplace_backward needs logits that were computed, got a leaf, whose values would be lost")

    outputs = _TokenStats.apply(
        logits,
        *flat_rows(token_ids, valid, temperature, logits),
        float(top_p),
        float(softcap or 0.0),
        n_cols,
        inplace_backward,
        backend,
    )
    return as_token_stats(outputs, logits.shape[:-1], token_ids is not None)


def _is_leaf(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.is_leaf  # torch.compile cannot say


def _by_reference(logits, token_ids, valid, top_p, temperature, softcap, n_cols) -> TokenStats:
    check_values(*flat_rows(token_ids, valid, temperature, logits), n_cols, "reference")
    if isinstance(temperature, Tensor):
        temperature = temperature.expand(logits.shape[:-1])
    return reference.token_stats(
        logits,
        token_ids,
        valid=valid,
        top_p=top_p,
        temperature=temperature,
        softcap=softcap,
        vocab_size=n_cols,
    )
