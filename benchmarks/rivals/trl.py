"""TRL's log-probabilities and entropies: chunked PyTorch, and the Triton kernel that it takes on a GPU."""

from collections.abc import Callable

from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import Inputs

PACKAGE = ("trl", "trl")


def chunked() -> Callable[[Inputs], Outputs]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def run(inputs: Inputs) -> Outputs:
        # Four dimensions, which its kernel does not take: on a GPU too this is the PyTorch form.
        logits, token_ids = inputs.rows[None, None], inputs.token_ids[None, None]
        return {
            "logp": selective_log_softmax(logits, token_ids).flatten(),
            "entropy": entropy_from_logits(logits).flatten(),
        }

    return run


def fused() -> Callable[[Inputs], Outputs]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def run(inputs: Inputs) -> Outputs:
        logp, entropy = selective_log_softmax_and_entropy(inputs.rows[None], inputs.token_ids[None])
        return {"logp": logp[0], "entropy": entropy[0]}

    return run


COMPUTES = ("logp", "entropy")

IMPLEMENTATIONS = (
    Implementation(
        "TRL, chunked",
        "trl.trainer.utils: entropy_from_logits, selective_log_softmax",
        chunked,
        COMPUTES,
        COMPUTES,
        package=PACKAGE,
        note="in the logits' own dtype",
    ),
    Implementation(
        "TRL, fused",
        "trl.trainer.utils.selective_log_softmax_and_entropy",
        fused,
        COMPUTES,
        COMPUTES,
        package=PACKAGE,
        on=("cuda",),
    ),
)
