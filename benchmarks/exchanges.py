"""What a kernel passes between its threads through memory, read from Triton's GPU dialect, with no GPU.

Between threads a value goes through a pointer that is both stored to and loaded from. The compiler puts barriers around
its own uses of shared memory; around ours in global memory nothing does it, and no test of values on a CPU sees one
missing. In this dialect a tensor's layout says which thread holds an element.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

MEMORY = {
    r"tt\.load|buffer_load\w*|async_copy_global_to_local": "load",
    r"tt\.store|buffer_store\w*": "store",
    r"gpu\.barrier|ttg\.barrier (?:all|\S*global)": "barrier",  # one of shared memory alone does not count
    r"\w+\.atomic_\w+|\w+\.descriptor_\w+": "other",
}


class Access(NamedTuple):
    """An operation on memory: load, store, barrier or other; by which arguments' pointers; where; and the layout."""

    kind: str
    pointers: frozenset[str]
    block: int
    layout: str | None  # of the tensor that is moved; None of a scalar


class Line(NamedTuple):
    """An operation with its operands, its types, the arguments whose pointers it takes, and its block's number."""

    operation: str
    types: str
    pointers: frozenset[str]
    block: int


def followed(ir: str) -> Iterator[Line]:
    """Yield a kernel's operations in order. Values are followed by name, as the dialect is in SSA form."""
    lines = iter(ir.splitlines())
    signature = next(line for line in lines if "tt.func public" in line)
    roots = {name: frozenset({name[1:]}) for name in re.findall(r"(%\w+): !tt\.ptr", signature)}
    blocks, n_blocks = [0], 1
    for line in lines:
        line = re.sub(r"\s*loc\(.*$", "", line).strip()
        if line.startswith("}"):
            blocks.pop()
        if not blocks:
            return  # the kernel's end
        if line.startswith("^bb"):
            blocks.pop()
        if line.startswith("^bb") or line.endswith("{"):
            blocks.append(n_blocks)
            n_blocks += 1
        assert not re.search(r"tt\.call|scf\.yield.*!tt\.ptr|cf\.(cond_)?br.*!tt\.ptr", line), f"not followed: {line}"
        line, _, types = line.partition(" : ")
        for name, start in re.findall(r"(%\w+) = (%[\w#]+)[,)]", line):  # a loop's own
            roots[name] = roots.get(start, frozenset())
        result, _, operation = line.rpartition(" = ") if re.match(r"%[\w:]+ = [a-z]", line) else ("", "", line)
        used = re.findall(r"%\w+", operation)
        pointers = frozenset().union(*(roots.get(name, frozenset()) for name in used))
        yield Line(operation, types, pointers, blocks[-1])
        if result:
            roots[result.split(":")[0]] = pointers if "!tt.ptr" in types else frozenset()


def accesses(ir: str) -> list[Access]:
    """List a kernel's operations on memory, in order."""
    found = []
    for operation, types, pointers, block in followed(ir):
        for pattern, kind in MEMORY.items():
            if re.match(rf"(?:\w+\.)?(?:{pattern})\b", operation):
                layout = re.search(r"tensor<\d+x[^,]*, (.*)>", types)
                found.append(Access(kind, pointers, block, layout and layout.group(1)))
    return found


def narrow_offsets(ir: str, pointers: set[str]) -> list[str]:
    """List the steps from these arguments that are taken in fewer than 64 bits, but for those of a constant."""
    steps = (line for line in followed(ir) if line.operation.startswith("tt.addptr") and line.pointers & pointers)
    computed = (step for step in steps if not re.search(r", %c(st(_\d+)?|\d\w*)$", step.operation))
    return [f"{step.operation} : {step.types}" for step in computed if "i64" not in step.types]


def passed_through(found: list[Access]) -> dict[str, list[Access]]:
    """Find the pointers that are both stored to and loaded from, with what is done by them and the barriers."""
    kinds: dict[str, set[str]] = {}
    for access in found:
        for pointer in access.pointers:
            kinds.setdefault(pointer, set()).add(access.kind)
    return {
        pointer: [access for access in found if pointer in access.pointers or access.kind == "barrier"]
        for pointer, of_pointer in kinds.items()
        if len(of_pointer) > 1
    }


def is_in_order(passed: list[Access]) -> bool:
    """Tell whether all that is passed is a store, a barrier and a load, one after the other in one block."""
    return [access.kind for access in passed] == ["store", "barrier", "load"] and len({a.block for a in passed}) == 1


def have_one_owner(found: list[Access], ir: str, pointers: set[str], size: int) -> bool:
    """Tell whether each of size elements that these pointers move is loaded and stored by one and the same thread."""
    layouts = {access.layout for access in found if access.pointers & pointers}
    definition = re.search(rf"^{layouts.pop()} = #ttg\.blocked<\{{(.*?)\}}>", ir, re.MULTILINE)
    if layouts or definition is None:  # another one, or a scalar, which every thread loads
        return False
    each = re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[(\d+)\]", definition.group(1))
    return math.prod(map(int, each)) <= size  # where there are more places than elements, threads hold copies
