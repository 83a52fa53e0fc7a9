"""Apple's cut-cross-entropy: log-probabilities from hidden states, logits never in memory."""

from collections.abc import Callable

import torch

from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import Case, Inputs


def linear() -> Callable[[Inputs], Outputs]:
    from cut_cross_entropy import linear_cross_entropy

    def run(inputs: Inputs) -> Outputs:
        return {"logp": -linear_cross_entropy(inputs.rows, inputs.head, inputs.token_ids, reduction="none")}

    return run


def _dtype(case: Case) -> str | None:
    return None if case.dtype != torch.float32 else "its kernels are made for 16-bit inputs"


IMPLEMENTATIONS = (
    Implementation(
        "cut-cross-entropy",
        "cut_cross_entropy.linear_cross_entropy",
        linear,
        ("logp",),
        ("logp",),
        linear=True,
        package=("cut-cross-entropy", "cut_cross_entropy"),
        on=("cuda",),
        note="approximate: its default leaves out gradients below eps / 32",
        refuses=_dtype,
    ),
)
