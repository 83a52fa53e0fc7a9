"""What is measured: the cases of each section, by which implementations, in how many turns."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cost_model import ROWS, VOCABULARIES
from benchmarks.logits import KINDS
from benchmarks.provenance import device_name, provenance
from benchmarks.rivals import all_implementations
from benchmarks.rows import PASSES, Row
from benchmarks.workload import PLANTED, SMOLLM2, Case

F32, BF16 = torch.float32, torch.bfloat16
IN_AND_OUT_OF_PLACE = ("token_stats", "token_stats in place")
WITH_AND_WITHOUT_NUCLEUS = ("token_stats", "token_stats, no nucleus")
OURS = (*IN_AND_OUT_OF_PLACE, "token_stats, no nucleus")
EAGER = "eager, sort"


@dataclass(frozen=True)
class Part:
    """One case of a section.

    Attributes:
        turns: that are timed.
        names: implementations in the order of their turns, of which the first that is right is the anchor of the
            ratios. Empty for a whole optimiser step, which makes its own, and counts its tokens itself.
    """

    section: str
    case: Case
    turns: int
    names: tuple[str, ...] = ()
    with_memory: bool = False

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES if self.names else ("step",)

    @property
    def label(self) -> str:
        c = self.case
        rows = f"{c.n:,} x " if c.n else ""
        return f"{self.section}: {rows}{c.v:,} {str(c.dtype).removeprefix('torch.')} {c.kind}"

    def row(self, implementation: str, source: str, passes: str, **found: Any) -> Row:
        c, versions = self.case, provenance()
        return Row(
            section=self.section, implementation=implementation, source=source, passes=passes,
            n=c.n, v=c.v, d=c.d, dtype=str(c.dtype).removeprefix("torch."), logits=c.kind,
            device=device_name(c.device), command=versions.pop("command"),
            commit=versions.pop("commit"), date=versions.pop("date"), versions=versions, **found,
        )  # fmt: skip


def names_of(linear: bool) -> tuple[str, ...]:
    return tuple(name for name, i in all_implementations().items() if i.linear is linear)


def parts_on_cpu() -> Iterator[Part]:
    """Yield the smallest useful set first: against everything else at one size, then the linear form, then the sweeps.

    Turns go where medians are compared most. What eager takes, and what it holds, is shown once for each vocabulary.
    """
    cpu = "cpu"
    yield Part("rivals", Case(192, 49_152, F32, "real", cpu), 12, names_of(linear=False), with_memory=True)
    yield Part("linear", Case(256, 49_152, F32, SMOLLM2, cpu, d=576), 8, names_of(linear=True), with_memory=True)
    yield Part("step", Case(0, 49_152, F32, "SmolLM2-135M", cpu), 10)
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(32, v, F32, "real", cpu), 3, (*IN_AND_OUT_OF_PLACE, EAGER), with_memory=True)
    for n in (1, 8, 64, 256):
        yield Part("rows", Case(n, 49_152, F32, "real", cpu), 4, (*IN_AND_OUT_OF_PLACE, EAGER))
    for kind in KINDS:
        yield Part("kinds", Case(64, 49_152, F32, kind, cpu), 4, (*WITH_AND_WITHOUT_NUCLEUS, EAGER))
    for kind in KINDS:
        yield Part("kinds", Case(64, 49_152, BF16, kind, cpu), 6, WITH_AND_WITHOUT_NUCLEUS)
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(32, v, BF16, "real", cpu), 6, IN_AND_OUT_OF_PLACE)
    yield Part("trl", Case(0, 49_152, F32, "SmolLM2-135M", cpu), 4)


def parts_on_gpu() -> Iterator[Part]:
    """Yield the same as on the CPU, at sizes that a GPU is bought for."""
    gpu = "cuda"
    fast = (*OURS, "TRL, fused", "Liger, GRPO loss", "quack, cross_entropy")
    yield Part("rivals", Case(4096, 151_936, BF16, "real", gpu), 20, names_of(linear=False))
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(4096, v, BF16, "real", gpu), 20, fast)
    yield Part("linear", Case(16_384, 151_936, BF16, PLANTED, gpu, d=2048), 20, names_of(linear=True))
    for dtype in (BF16, F32):
        for kind in KINDS:
            yield Part("kinds", Case(4096, 151_936, dtype, kind, gpu), 12, (*WITH_AND_WITHOUT_NUCLEUS, EAGER))
    for n in (1, *ROWS):
        yield Part("rows", Case(n, 151_936, BF16, "real", gpu), 20, (*IN_AND_OUT_OF_PLACE, "TRL, fused"))
    yield Part("step", Case(0, 49_152, F32, "SmolLM2-135M", gpu), 20)
    yield Part("trl", Case(0, 49_152, BF16, "SmolLM2-135M", gpu), 20)
    for v in VOCABULARIES:
        yield Part("vocabulary", Case(4096, v, F32, "real", gpu), 20, fast)
