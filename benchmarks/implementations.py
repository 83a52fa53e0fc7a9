"""What an implementation is to the harness."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from torch import Tensor

from benchmarks.workload import Case, Inputs

# What a call returns, by name: the statistics of `paec_kernels.TokenStats`, float ``[N]`` (nucleus_size: integer),
# "policy_loss", GRPO's loss of each token ``[N]``, and "mean_policy_loss", its mean over valid tokens, 0-d.
Outputs = dict[str, Tensor]
STATISTICS = ("logp", "entropy", "nucleus_entropy", "nucleus_size", "margin")


@dataclass(frozen=True)
class Implementation:
    """One way to statistics or losses of tokens.

    Attributes:
        prepare: imports what it needs and returns the function that is timed: inputs, whose rows (and head) are
            leaves that take a gradient, to outputs.
        computes: of STATISTICS, what a user gets from it, by its own definition.
        gradients: the outputs through which its gradient flows.
        package: the distribution and the module that it brings, without which it is missing.
        on: device types it runs on.
        exact: held to the error of the float32 definition, with no allowance of its own.
        overwrites: it writes over its logits, so that each run needs fresh ones.
        gradient_in_forward: the gradient is made in the forward pass; the two cannot be told apart.
        compiled: by `torch.compile`, for one shape.
        note: what a reader of its figures must know.
        keeps: the most tokens that its nucleus can hold.
        refuses: why it cannot run a case on that device, or None.
    """

    name: str
    source: str
    prepare: Callable[[], Callable[[Inputs], Outputs]]
    computes: tuple[str, ...] = STATISTICS
    gradients: tuple[str, ...] = ("logp", "entropy", "nucleus_entropy")
    linear: bool = False
    package: tuple[str, str] | None = None
    on: tuple[str, ...] = ("cpu", "cuda")
    exact: bool = False
    overwrites: bool = False
    gradient_in_forward: bool = False
    compiled: bool = False
    note: str = ""
    keeps: float = math.inf
    refuses: Callable[[Case], str | None] = lambda case: None

    def why_not(self, case: Case) -> tuple[str, str] | None:
        """Give the status and the reason of a case that cannot be run here, before anything is imported."""
        if self.package is not None and find_spec(self.package[1]) is None:
            return "missing", f"{self.package[0]} is not installed"
        if case.device not in self.on:
            return "skipped", f"needs {' or '.join(self.on)}, this is {case.device}"
        reason = self.refuses(case)
        return None if reason is None else ("skipped", reason)

    def versions(self) -> dict[str, str]:
        """Return the version of its own package, where that is an installed distribution."""
        if self.package is None:
            return {}
        try:
            return {self.package[0]: version(self.package[0])}
        except PackageNotFoundError:
            return {}
