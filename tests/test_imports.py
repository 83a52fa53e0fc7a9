"""Imports point down: a room of the package imports itself and those that stand before it here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import paec_kernels

ROOMS = "types checks saved_state reference ops losses __init__ integrations train cli".split()
PACKAGE = Path(paec_kernels.__file__).parent


def imported(path: Path) -> Iterator[str]:
    """Dotted names, those of names that a module gives included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_imports_point_down():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        own = ROOMS.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        for name in imported(path):
            package, _, room = name.partition(".")
            room = room.split(".")[0]
            room = room if room in ROOMS else "__init__"  # a name of the package itself
            if package in ("benchmarks", "tests") or (package == "paec_kernels" and ROOMS.index(room) > own):
                upward.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not upward
