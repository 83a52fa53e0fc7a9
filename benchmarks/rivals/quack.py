"""quack's cross-entropy in CuTe: log-probabilities alone."""

from collections.abc import Callable

import torch

from benchmarks.implementations import Implementation, Outputs
from benchmarks.workload import Case, Inputs


def cross_entropy() -> Callable[[Inputs], Outputs]:
    from quack.cross_entropy import cross_entropy

    return lambda inputs: {"logp": -cross_entropy(inputs.rows, inputs.token_ids, reduction="none")}


def _hopper(case: Case) -> str | None:
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 9 else f"needs compute capability 9.0 or newer, this device has {major}.{minor}"


IMPLEMENTATIONS = (
    Implementation(
        "quack, cross_entropy",
        "quack.cross_entropy.cross_entropy",
        cross_entropy,
        ("logp",),
        ("logp",),
        package=("quack-kernels", "quack"),
        on=("cuda",),
        refuses=_hopper,
    ),
)
