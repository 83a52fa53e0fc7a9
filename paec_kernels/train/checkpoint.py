"""Checkpoints that are either whole or absent, and belong to one configuration."""

import os
from pathlib import Path
from typing import Any

import torch

from paec_kernels.saved_state import differing_fields, whole_file


class OtherConfigError(ValueError):
    """The checkpoint was made with another configuration."""


def save(state: dict[str, Any], path: Path) -> None:
    """Replace ``path`` in one step: whoever is killed meanwhile leaves the old file."""
    with whole_file(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Any]:
    """The state saved at ``path``, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``read``, if it belongs to ``config``.

    Raises:
        OtherConfigError: its ``config`` differs from ``config``; the message names each field and both values.
    """
    state = read(path)
    if differing := differing_fields(state["config"], config):
        raise OtherConfigError(
            f"{path} was made with another configuration: {'; '.join(differing)}. "
            "Use those values again, or another --out."
        )
    return state
