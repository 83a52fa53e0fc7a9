"""verl's entropy and log-probabilities from logits, and its fused linear_cross_entropy."""

from collections.abc import Callable

from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import Case, Inputs

PACKAGE = ("verl", "verl")


def from_logits() -> Callable[[Inputs], Outputs]:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    def run(inputs: Inputs) -> Outputs:
        # Its default writes the gradient over the logits where flash-attn is installed; entropy still needs them.
        logp = logprobs_from_logits(inputs.rows, inputs.token_ids, inplace_backward=False)
        return {"logp": logp, "entropy": entropy_from_logits(inputs.rows)}

    return run


def linear() -> Callable[[Inputs], Outputs]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def run(inputs: Inputs) -> Outputs:
        logp, entropy = linear_cross_entropy(inputs.rows, inputs.head, inputs.token_ids, 1.0, "none", None)
        return {"logp": logp, "entropy": entropy}

    return run


def _width(case: Case) -> str | None:
    return None if case.d % 128 == 0 else f"takes widths that are multiples of 128, got {case.d}"


COMPUTES = ("logp", "entropy")

IMPLEMENTATIONS = (
    Implementation(
        "verl",
        "verl.utils.torch_functional: logprobs_from_logits, entropy_from_logits",
        from_logits,
        COMPUTES,
        COMPUTES,
        package=PACKAGE,
        note="in the logits' own dtype",
    ),
    Implementation(
        "verl, linear_cross_entropy",
        "verl.utils.kernel.linear_cross_entropy",
        linear,
        COMPUTES,
        COMPUTES,
        linear=True,
        package=PACKAGE,
        on=("cuda",),
        refuses=_width,
    ),
)
