"""FlashInfer's top-p renormalisation, made for sampling: the nucleus without a sort, with no gradient."""

from collections.abc import Callable

import torch

from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import TOP_P, Inputs


def top_p_renorm() -> Callable[[Inputs], Outputs]:
    from flashinfer.sampling import top_p_renorm_probs

    @torch.no_grad()
    def run(inputs: Inputs) -> Outputs:
        q = top_p_renorm_probs(inputs.rows.float().softmax(-1), TOP_P)
        return {"nucleus_entropy": torch.special.entr(q).sum(-1)}

    return run


IMPLEMENTATIONS = (
    Implementation(
        "FlashInfer, top-p renorm",
        "flashinfer.sampling.top_p_renorm_probs, then the entropy of what is left",
        top_p_renorm,
        ("nucleus_entropy",),
        (),
        package=("flashinfer-python", "flashinfer"),
        on=("cuda",),
        note="approximate: takes every token tied at the threshold",
    ),
)
