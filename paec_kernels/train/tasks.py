"""Tasks by name."""

from collections.abc import Sequence

from paec_kernels.train.families import FAMILIES
from paec_kernels.train.problem import Task


def load_tasks(names: Sequence[str]) -> list[Task]:
    """A family of the tiny model by its name, ``gym:NAME`` for a reasoning-gym dataset, or a .jsonl file.

    Raises:
        ValueError: a name of none of them.
    """
    return [_load(name) for name in names]


def _load(name: str) -> Task:
    if name in FAMILIES:
        return FAMILIES[name]
    raise ValueError(f"tasks must be among {', '.join(FAMILIES)}, gym:NAME or a .jsonl file, got {name!r}")
