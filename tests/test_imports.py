"""Imports point down: a room imports itself and those that stand before it here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import paec_kernels

ORDER = {
    "paec_kernels": "types checks extras saved_state reference ops losses __init__ integrations|train cli",
    "paec_kernels.train": (
        "tasks models algorithms config presets|run_folder|out_folder|progress report policies loop inspect commands"
    ),
}
RANKS = {
    package: {room: rank for rank, rooms in enumerate(order.split()) for room in rooms.split("|")}
    for package, order in ORDER.items()
}
PACKAGE = Path(paec_kernels.__file__).parent


def imported(path: Path) -> Iterator[str]:
    """Dotted names, those of names that a module gives included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def points_up(module: str, name: str, package: str = "paec_kernels") -> bool:
    if name.split(".")[0] in ("benchmarks", "tests"):
        return True
    if package not in RANKS or not name.startswith(f"{package}."):
        return False
    own, other = (dotted.removeprefix(f"{package}.").split(".")[0] for dotted in (module, name))
    other = other if other in RANKS[package] else "__init__"  # a name of the package itself
    if own == other:
        return points_up(module, name, f"{package}.{own}")
    return RANKS[package][other] >= RANKS[package][own]


def test_imports_point_down():
    upward = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        upward += [f"{module} imports {name}" for name in imported(path) if points_up(module, name)]
    assert not upward
    assert points_up("paec_kernels.ops.linear", "paec_kernels.losses.paec.PAEC")
    assert points_up("paec_kernels.train.models.tiny", "paec_kernels.train.loop")
