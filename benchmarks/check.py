"""Outputs and gradients held against the float64 definition. What fails here is never timed."""

import torch
from torch import Tensor

import paec_kernels as pk
from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import TOP_P, Case, Inputs, policy_loss, take

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


class Truth:
    """Float64 outputs of the checked rows, and gradients of weighted sums of them.

    Of the linear form the logits are those of a product in the inputs' own dtype, and only what follows is float64.
    ``in_float32`` is the same definition in float32, whose errors are rounding's.
    """

    def __init__(self, inputs: Inputs, rows: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.in_float32 = self if dtype == torch.float32 else Truth(inputs, rows, torch.float32)
        self.rows = rows
        self.some = take(inputs, rows)
        logits = (self.some.rows if inputs.head is None else self.some.rows @ inputs.head.T).detach().to(dtype)
        weights, _ = pk.reference.nucleus_weights(logits, logits.softmax(-1), TOP_P)
        self.tied = (weights > 0) & (weights < 1)  # a sort gives these tokens another gradient, in its own order
        self._leaf = logits.requires_grad_()
        stats = pk.reference.token_stats(self._leaf, self.some.token_ids, top_p=TOP_P)
        loss = policy_loss(stats.logp, self.some.old_logp.to(dtype))
        self.outputs: Outputs = stats._asdict() | {"policy_loss": loss, "mean_policy_loss": loss.mean()}

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
    if not names:
        return
    found = {name: outputs[name] for name in names}
    seeds = [None if value.dim() == 0 else weights[name][: len(value)].to(value.dtype) for name, value in found.items()]
    torch.autograd.backward(list(found.values()), seeds)


def leaves(inputs: Inputs) -> Inputs:
    head = None if inputs.head is None else inputs.head.detach().requires_grad_()
    return inputs._replace(rows=inputs.rows.detach().requires_grad_(), head=head)


def check(implementation: Implementation, case: Case, inputs: Inputs, found: Outputs, truth: Truth) -> dict[str, float]:
    """Hold a run on `only(inputs, truth.rows)` against the truth of those rows.

    Args:
        inputs: the run's leaves, with their gradients.
        found: what it returned.
    Returns:
        the errors, by the names of a row's fields.
    Raises:
        WrongResult: with what is wrong.
    """
    for name in implementation.computes:
        if name not in found:
            raise WrongResult(f"returns no {name}")
    # Where the logits are a 16-bit product, another order of summation rounds some of them otherwise.
    strict = implementation.exact and not (case.d and case.dtype.itemsize < 4)
    same = _same_sizes(found, truth, strict, implementation.keeps)

    value_error, tolerance = 0.0, 0.0 if strict else VALUE_TOLERANCE[case.dtype]
    for name, output in found.items():
        if name == "nucleus_size":
            continue
        picked, kept = (output, ...) if output.dim() == 0 else (output[truth.rows], same)
        error = _largest(picked, truth.outputs[name], kept)
        rounding = _largest(truth.in_float32.outputs[name], truth.outputs[name], kept)
        value_error = max(value_error, _allowed(error, rounding, tolerance, name))

    gradient_error = 0.0
    if implementation.gradients:
        tolerance = 0.0 if strict else GRADIENT_TOLERANCE[case.dtype]
        gradient_error = _gradient_error(implementation, inputs, truth, tolerance, same)
    return {"value_error": value_error, "gradient_error": gradient_error}


def _allowed(error: float, rounding: float, tolerance: float, what: str, unit: str = "") -> float:
    """Return the error if it is within its bound; ``rounding`` is the error of the definition in float32."""
    allowed = max(SLACK * rounding + EXTRA, tolerance)
    if not error <= allowed:
        raise WrongResult(f"{what} is off by {error:.1e}{unit}, allowed {allowed:.1e}")
    return error


def _same_sizes(found: Outputs, truth: Truth, strict: bool, most: float) -> Tensor:
    """Find the rows, bool ``[n]``, whose nucleus has the true size. An implementation may keep ``most`` tokens."""
    if "nucleus_size" not in found:
        return torch.ones_like(truth.rows, dtype=torch.bool)
    true = truth.outputs["nucleus_size"].long()
    difference = (found["nucleus_size"][truth.rows].long() - true).abs()
    cut = true > most
    if bool(cut.all()):
        raise WrongResult(f"every nucleus that was checked is larger than the {most} tokens it keeps")
    far = (difference > (SIZE_TOLERANCE * true).clamp(min=1)) & ~cut
    if bool(far.any()):
        raise WrongResult(f"another nucleus size in {int(far.sum())} of {len(far)} rows, by more than rounding")
    if strict and (difference > 0).float().mean().item() > OTHER_SIZES:
        raise WrongResult(f"another nucleus size in {int((difference > 0).sum())} of {len(far)} rows")
    return difference == 0


def _gradient_error(
    implementation: Implementation, inputs: Inputs, truth: Truth, tolerance: float, same: Tensor
) -> float:
    """Return the error relative to the largest entry; a gradient of a row without weight is an error, too."""
    grad = inputs.rows.grad
    if grad is None:
        raise WrongResult("gives no gradient")
    largest = torch.linalg.vector_norm(grad, ord=torch.inf, dim=1)
    largest[truth.rows] = 0
    if not bool((largest == 0).all()):
        raise WrongResult("gives a gradient to rows without weight")

    true, eager = (one.gradients(implementation.gradients) for one in (truth, truth.in_float32))
    ours = [grad[truth.rows]] if inputs.head is None else [grad[truth.rows], inputs.head.grad]
    worst, kept = 0.0, same
    for found, expected, rounded in zip(ours, true, eager, strict=True):
        if inputs.head is None and not implementation.exact:
            expected, found = (tensor.masked_fill(truth.tied, 0) for tensor in (expected, found))
        scale = max(expected.abs().max().item(), 1e-30)
        error = _largest(found, expected, kept) / scale
        rounding = _largest(rounded.to(found.dtype), expected, kept) / scale
        worst = max(worst, _allowed(error, rounding, tolerance, "its gradient", " of the largest entry"))
        kept = ...  # of all rows: the head's gradient is a sum over them
    return worst


def _largest(found: Tensor, expected: Tensor, kept) -> float:
    """Return the largest difference where kept; infinite where a result is not finite."""
    difference = (found.double() - expected.double()).abs()[kept]
    return torch.nan_to_num(difference, nan=torch.inf).max().item() if difference.numel() else 0.0
