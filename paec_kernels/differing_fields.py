"""Which fields of a checkpoint's configuration are not as they are here."""

from collections.abc import Mapping
from typing import Any

ABSENT = "absent"


def differing_fields(saved: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``field: checkpoint VALUE, here VALUE`` for each that differs; nested fields by their dotted names."""
    found = []
    for name in {**ours, **saved}:
        theirs, own = saved.get(name, ABSENT), ours.get(name, ABSENT)
        if isinstance(theirs, Mapping) and isinstance(own, Mapping):
            found += differing_fields(theirs, own, f"{prefix}{name}.")
        elif theirs != own:
            found.append(f"{prefix}{name}: checkpoint {theirs!r}, here {own!r}")
    return found
