"""Outputs and gradients held against the float64 definition. What fails here is never timed."""

from dataclasses import dataclass

import torch
from torch import Tensor

import paec_kernels as pk
from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import TOP_P, Case, Inputs, only, policy_loss, take

# An exact implementation errs by no more than the definition in float32 does, times SLACK, + 1e-5 (nats, or of the
# largest gradient). Others may err by that, or by what rounding to the logits' dtype explains.
SLACK, EXTRA = 1.2, 1e-5
VALUE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
# Rounding may move the tokens at a nucleus' edge across it: by a few tokens, and for an exact implementation in few
# rows. Those rows' other results are not compared.
SIZE_TOLERANCE, OTHER_SIZES = 0.02, 1 / 16


class WrongResult(Exception):
    """An implementation that does not compute what it says."""


@dataclass(frozen=True)
class Errors:
    values: float
    gradient: float


class Truth:
    """Float64 outputs of the checked rows, and gradients of weighted sums of them.

    Of the linear form the logits are those of a product in the inputs' own dtype, and only what follows is float64.
    ``in_float32`` is the same definition in float32, whose errors are rounding's.
    """

    def __init__(self, inputs: Inputs, rows: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.in_float32 = self if dtype == torch.float32 else Truth(inputs, rows, torch.float32)
        self.rows = rows
        self.some = take(only(inputs, rows), rows)
        with torch.no_grad():
            logits = self.some.rows if inputs.head is None else self.some.rows @ inputs.head.T
        self._leaf = logits.to(dtype).requires_grad_()
        stats = pk.reference.token_stats(self._leaf, self.some.token_ids, top_p=TOP_P)
        loss = policy_loss(stats.logp, self.some.old_logp.to(dtype))
        self.outputs: Outputs = stats._asdict() | {"policy_loss": loss, "mean_policy_loss": loss.mean()}
        with torch.no_grad():
            weights, _ = pk.reference.nucleus_weights(self._leaf, self._leaf.softmax(-1), TOP_P)
        self.tied = (weights > 0) & (weights < 1)  # a sort gives these tokens another gradient, in its own order

    def gradients(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Compute the gradient of the rows, ``[n, V]`` or ``[n, D]``, and of the head where there is one."""
        loss = weighted_sum({name: self.outputs[name] for name in names}, self.some.weights)
        (d_logits,) = torch.autograd.grad(loss, self._leaf, retain_graph=True)
        if self.some.head is None:
            return (d_logits,)
        return d_logits @ self.some.head.to(d_logits.dtype), d_logits.T @ self.some.rows.to(d_logits.dtype)


def weighted_sum(outputs: Outputs, weights: dict[str, Tensor]) -> Tensor:
    """Add up what is differentiated; an output that is a mean has weight 1, one for fewer rows than N takes theirs."""
    return sum(
        output if output.dim() == 0 else (weights[name][: len(output)] * output).sum()
        for name, output in outputs.items()
    )


def backward(outputs: Outputs, names: tuple[str, ...], weights: dict[str, Tensor]) -> None:
    """Run the backward pass of `weighted_sum`, whose gradients are the weights: the sum itself launches nothing."""
    torch.autograd.backward(
        [outputs[name] for name in names],
        [None if outputs[name].dim() == 0 else _weight_of(outputs[name], weights[name]) for name in names],
    )


def _weight_of(output: Tensor, weight: Tensor) -> Tensor:
    return weight[: len(output)].to(output.dtype)


def leaves(inputs: Inputs) -> Inputs:
    head = None if inputs.head is None else inputs.head.detach().requires_grad_()
    return inputs._replace(rows=inputs.rows.detach().requires_grad_(), head=head)


def check(implementation: Implementation, case: Case, inputs: Inputs, found: Outputs, truth: Truth) -> Errors:
    """Hold a run on `only(inputs, truth.rows)` against the truth of those rows.

    Args:
        inputs: the run's leaves, with their gradients.
        found: what it returned.
    Raises:
        WrongResult: with what is wrong.
    """
    for name in implementation.computes:
        if name not in found:
            raise WrongResult(f"returns no {name}")
    # Where the logits are a 16-bit product, another order of summation rounds some of them otherwise.
    strict = implementation.exact and not (case.d and case.dtype.itemsize < 4)
    same = _same_sizes(found, truth, strict, implementation.keeps)

    values = 0.0
    for name, output in found.items():
        if name == "nucleus_size":
            continue
        picked, kept = (output, ...) if output.dim() == 0 else (output[truth.rows], same)
        error = _largest(picked, truth.outputs[name], kept)
        rounding = _largest(truth.in_float32.outputs[name], truth.outputs[name], kept)
        allowed = _allowed(rounding, VALUE_TOLERANCE[case.dtype], strict)
        if not error <= allowed:
            raise WrongResult(f"{name} is off by {error:.1e}, allowed {allowed:.1e}")
        values = max(values, error)

    gradient = 0.0
    if implementation.gradients:
        gradient = _gradient_error(implementation, case, inputs, truth, strict, same)
    return Errors(values, gradient)


def _allowed(rounding: float, tolerance: float, strict: bool) -> float:
    """Bound an error; ``rounding`` is that of the definition in float32."""
    bound = SLACK * rounding + EXTRA
    return bound if strict else max(bound, tolerance)


def _same_sizes(found: Outputs, truth: Truth, strict: bool, most: int | None) -> Tensor:
    """Find the rows, bool ``[n]``, whose nucleus has the true size. An implementation may keep ``most`` tokens."""
    if "nucleus_size" not in found:
        return torch.ones(len(truth.rows), dtype=torch.bool, device=truth.rows.device)
    true = truth.outputs["nucleus_size"].long()
    difference = (found["nucleus_size"][truth.rows].long() - true).abs()
    cut = torch.zeros_like(difference, dtype=torch.bool) if most is None else true > most
    if bool(cut.all()):
        raise WrongResult(f"every nucleus that was checked is larger than the {most} tokens it keeps")
    far = (difference > (SIZE_TOLERANCE * true).clamp(min=1)) & ~cut
    if bool(far.any()):
        raise WrongResult(f"another nucleus size in {int(far.sum())} of {len(far)} rows, by more than rounding")
    if strict and (difference > 0).float().mean().item() > OTHER_SIZES:
        raise WrongResult(f"another nucleus size in {int((difference > 0).sum())} of {len(far)} rows")
    return difference == 0


def _gradient_error(
    implementation: Implementation, case: Case, inputs: Inputs, truth: Truth, strict: bool, same: Tensor
) -> float:
    """Return the error relative to the largest entry; a gradient of a row without weight is an error, too."""
    grad = inputs.rows.grad
    if grad is None:
        raise WrongResult("gives no gradient")
    largest = torch.linalg.vector_norm(grad, ord=torch.inf, dim=1)
    largest[truth.rows] = 0
    if not bool((largest == 0).all()):
        raise WrongResult("gives a gradient to rows without weight")

    true = truth.gradients(implementation.gradients)
    ours = (grad[truth.rows], *(() if inputs.head is None else (inputs.head.grad,)))
    eager = truth.in_float32.gradients(implementation.gradients)
    worst = 0.0
    for i, (found, expected) in enumerate(zip(ours, true, strict=True)):
        kept = same if i == 0 else ...  # the head's gradient is a sum over rows
        if inputs.head is None and not implementation.exact:
            expected, found = (tensor.masked_fill(truth.tied, 0) for tensor in (expected, found))
        scale = max(expected.abs().max().item(), 1e-30)
        error = _largest(found, expected, kept) / scale
        rounding = _largest(eager[i].to(found.dtype), expected, kept) / scale
        allowed = _allowed(rounding, GRADIENT_TOLERANCE[case.dtype], strict)
        if not error <= allowed:
            raise WrongResult(f"its gradient is off by {error:.1e} of the largest entry, allowed {allowed:.1e}")
        worst = max(worst, error)
    return worst


def _largest(found: Tensor, expected: Tensor, kept) -> float:
    """Return the largest difference where kept; infinite where a result is not finite."""
    difference = (found.double() - expected.double()).abs()[kept]
    return torch.nan_to_num(difference, nan=torch.inf).max().item() if difference.numel() else 0.0
