"""Every implementation that is measured: ours, and what one would use instead, a file for each project."""

from benchmarks.implementations import Implementation
from benchmarks.rivals import cut_cross_entropy, eager, flashinfer, liger, ours, quack, trl, verl


def all_implementations() -> dict[str, Implementation]:
    """Return them by name, those on logits first, in the order in which they take turns."""
    rooms = (ours, eager, trl, verl, liger, cut_cross_entropy, quack, flashinfer)
    found = [implementation for room in rooms for implementation in room.IMPLEMENTATIONS]
    return {i.name: i for linear in (False, True) for i in found if i.linear is linear}
