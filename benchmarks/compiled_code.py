"""What the kernels compile to, read from the machine code, with no GPU: registers, spills, instructions.

    python -m benchmarks.compiled_code               # a table
    python -m benchmarks.compiled_code --model       # the time to expect on a GPU: benchmarks/cost_model.py
    python -m benchmarks.compiled_code --out FILE    # either as JSON

Needs triton with its own cuobjdump and nvdisasm (Linux), and TRITON_INTERPRET unset.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import cost_model, exchanges
from benchmarks.provenance import provenance
from paec_kernels.ops import backward, forward, shard_kernels
from paec_kernels.ops.nucleus import gather_lanes
from paec_kernels.ops.nucleus_search import search_values
from paec_kernels.ops.rows import Row, Units

TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of the kernels' arguments by name; every other one is int32 unless it is a constant or a stride.
TYPES = {
    "token_ids_ptr": "*i64",
    "valid_ptr": "*i1",
    "flags_ptr": "*i8",
    "sum_ptr": "*bf16",
    "size_ptr": "*i32",
    "scratch_ptr": "*i32",
    "fits_ptr": "*i32",
} | dict.fromkeys(("top_p", "softcap", "target", "top", "scale"), "fp32")
PREDICATE = r"^@!?U?P\w+\s+"  # in front of an instruction


@triton.jit
def candidate_search_kernel(
    first_ptr, second_ptr, out_ptr, low, high, target, top, scale,
    SHIFT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Do all that the nucleus costs a row that needs no rescan: the search and the look for suspect lanes."""
    lanes = tl.arange(0, LANES)
    first, second = tl.load(first_ptr + lanes), tl.load(second_ptr + lanes)
    reached, found, nucleus = search_values(
        (first, second), None, low, high, (0.0, 0.0, 0.0), target, Units(top, scale, None), SHIFT
    )
    n_suspect = tl.sum((second >= nucleus.tau).to(tl.int32))
    every = nucleus.tau + nucleus.weight + nucleus.mass + nucleus.weighted + nucleus.size
    tl.store(out_ptr, every + n_suspect + found + reached)


@triton.jit
def gather_kernel(logits_ptr, flags_ptr, scratch_ptr, sum_ptr, n_cols, LANES: tl.constexpr):
    """Pass lanes between threads through memory. Nothing but the scratch is stored or loaded by 32 bits."""
    suspect = tl.load(flags_ptr + tl.arange(0, LANES)) != 0
    n_suspect = tl.sum(suspect.to(tl.int32))
    best, next_best, dropped = gather_lanes(Row(logits_ptr, 1, n_cols), suspect, n_suspect, scratch_ptr, LANES)
    tl.store(sum_ptr, tl.sum(best + next_best) + dropped)


OF_SHARDS = {
    "sums": shard_kernels.sums_kernel,
    "masses": shard_kernels.masses_kernel,
    "members": shard_kernels.members_kernel,
}
KERNELS = OF_SHARDS | {
    "forward": forward.forward_kernel,
    "backward": backward.backward_kernel,
    "search": candidate_search_kernel,
    "gather": gather_kernel,
}


def _type(name: str, dtype: str, stride: str) -> str:
    if name in TYPES:
        return TYPES[name]
    if name.endswith("logits_ptr"):
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return "*fp32"
    return stride if "stride_" in name else "i32"


def compile_kernel(
    kernel: str, target: str = "sm_90", dtype: str = "bf16", softcap: bool = False, aligned: bool = True
) -> Any:
    """Compile one of KERNELS as a launch would on logits whose columns adjoin.

    Aligned, rows begin at multiples of 16 and strides take int64, as only the largest do; else int32, as most do.
    """
    function, stride = KERNELS[kernel], "i64" if aligned else "i32"
    forward_warps = forward.SOFTCAP_WARPS if softcap else forward.FORWARD_WARPS
    warps = backward.BACKWARD_WARPS if kernel == "backward" else forward_warps
    constants = {
        "stride_col": 1,
        "d_stride_col": 1,
        "SHIFT": forward.KEY_SHIFT[DTYPES[dtype]],
        "LANES": shard_kernels.READING_LANES if kernel in ("masses", "members") else forward.LANES,
        "ALIGNED": aligned,
        "BLOCK": backward.BACKWARD_BLOCK,
    } | ({} if softcap else {"softcap": None})
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else _type(name, dtype, stride) for name in names}
    specialised = [p.name for p in function.params if not p.do_not_specialize_on_alignment]
    sizes = [n for n in specialised if "stride_" in n or n in ("n_cols", "width")] if aligned else []
    hinted = [*sizes, *(n for n in specialised if n.endswith("_ptr"))]
    source = ASTSource(
        function,
        signature,
        {(names.index(n),): value for n, value in constants.items() if n in names},
        {(names.index(n),): [["tt.divisibility", 16]] for n in hinted if n not in constants},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Read registers a thread, and bytes of spills (stack) and local memory."""
    if "amdgcn" in compiled.asm:
        text, names = compiled.asm["amdgcn"], (".vgpr_count", ".vgpr_spill_count", ".private_segment_fixed_size")
    else:
        text, names = _cuda_tool("cuobjdump", ["-res-usage"], compiled), ("REG", "STACK", "LOCAL")
    registers, spills, local = (int(re.search(rf"{re.escape(name)}:\s*(\d+)", text).group(1)) for name in names)
    return {"registers": registers, "spills": spills, "local": local}


def _cuda_tool(tool: str, arguments: list[str], compiled: Any) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([path, *arguments, cubin.name], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Code:
    """Machine code: the instructions in order, and the positions where each may go on."""

    listing: list[str]
    following: list[list[int]]

    @property
    def loops(self) -> list[tuple[int, int]]:
        """Find the loops as (first, last) positions, in order of the first."""
        # A branch to itself is the padding behind the kernel's last instruction.
        return sorted((to, i) for i, following in enumerate(self.following) for to in following if to < i)

    def where(self, pattern: str, first: int = 0, last: int | None = None) -> list[int]:
        """Find the positions from first to last of instructions that hold the pattern."""
        lines = enumerate(self.listing)
        return [i for i, line in lines if i >= first and (last is None or i <= last) and re.search(pattern, line)]

    def reached(self, start: int, closed: Iterable[int] = ()) -> dict[int, int]:
        """Map every position that is reached from start without passing one of closed to the one before it."""
        before: dict[int, int] = {}
        closed, waiting = set(closed), deque([start])
        while waiting:
            position = waiting.popleft()
            for to in self.following[position]:
                if to not in before and to not in closed:
                    before[to] = position
                    waiting.append(to)
        return before

    def way(self, start: int, ends: Iterable[int]) -> list[int]:
        """Find the shortest way from start to the nearest of ends, both included."""
        before = self.reached(start)
        position = next(i for i in before if i in set(ends))  # they are reached in the order of their distance
        way = [position]
        while way[-1] != start:
            way.append(before[way[-1]])
        return way[::-1]


def code(compiled: Any) -> Code:
    """Parse SASS, or AMD's assembly."""
    amd = "amdgcn" in compiled.asm
    text = compiled.asm["amdgcn"] if amd else _cuda_tool("nvdisasm", ["-c"], compiled)
    instruction = re.compile(r"\s+([a-z].*?)\s*(?:;.*)?$" if amd else r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;")
    listing: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label.group(1)] = len(listing)
        elif found := instruction.match(line):
            listing.append(found.group(1))
    return Code(listing, [_following(line, i, labels) for i, line in enumerate(listing)])


def _following(line: str, position: int, labels: dict[str, int]) -> list[int]:
    """Find where an instruction may go on. A predicate, in front or in BRA's arguments, makes it conditional."""
    jump = re.search(r"(?:BRA|s_c?branch).*?(\.L\w+)", line)
    targets = [labels[jump.group(1)]] if jump else []
    ends = re.match(r"BRA `|EXIT|s_branch|s_endpgm", line)
    return targets if ends else [*targets, position + 1]


def opcodes(listing: list[str]) -> Counter:
    return Counter(re.sub(PREDICATE, "", line).split()[0].split(".")[0] for line in listing)


def _bytes(lines: Iterable[str], opcode: str) -> int:
    """Add up what a thread moves by all instructions of a name; a width in bits stands at their end if it is not 32."""
    widths = (re.search(rf"\b{opcode}\.E(?:\.BYPASS)?(\.U?\d+)?\b", line) for line in lines)
    return sum(int((width.group(1) or ".32").strip(".U")) // 8 for width in widths if width)


def counts(kernel: str, dtype: str) -> list[cost_model.Counts]:
    """Count what the cost model asks of the "forward" or "backward" kernel on sm_90, by the shortest way through it.

    A kernel whose loops are not those that it is known for is refused.
    """
    compiled = compile_kernel(kernel, dtype=dtype)
    found = code(compiled)
    own = {loop: opcodes(found.listing[loop[0] : loop[1] + 1]) for loop in found.loops}
    reads = [loop for loop in own if own[loop]["MUFU"] and found.where(r"^LDG(STS)?\.E", *loop)]
    if kernel == "forward":
        names, loops, columns = ["forward"], reads[:1], None
        search = [loop for loop in own if own[loop]["BAR"] and not own[loop]["LDG"] + own[loop]["LDGSTS"]][:1]
        assert search, "forward: no loop of the search"
    else:
        # One loop for whole tiles where the nucleus has a gradient, which is the longer one, and one where it has none.
        names, loops = ["backward", "backward, no nucleus"], [loop for loop in reads if own[loop]["STG"]]
        loops.sort(key=lambda loop: loop[0] - loop[1])
        search, columns = [], backward.TILES.value * backward.BACKWARD_BLOCK
    assert len(loops) == len(names), f"{kernel}: {len(loops)} loops read whole blocks, not {len(names)}"
    return [
        cost_model.Counts(
            kernel=name,
            dtype=dtype,
            threads=cost_model.WARP * compiled.metadata.num_warps,
            registers=resources(compiled)["registers"],
            shared=compiled.metadata.shared,
            columns=columns,
            outside=_outside(found, [loop, *search]),
            search=sum(len(found.way(first, [last])) for first, last in search),
            **_round(found, loop, dtype),
        )
        for name, loop in zip(names, loops, strict=True)
    ]


def every_count() -> list[cost_model.Counts]:
    return [c for dtype in cost_model.SIZES for kernel in ("forward", "backward") for c in counts(kernel, dtype)]


def _outside(found: Code, loops: list[tuple[int, int]]) -> int:
    """Count instructions on the way from the kernel's start past these loops to an exit, without those of the loops."""
    starts = [0, *(last for _, last in loops)]
    ends = [*([first] for first, _ in loops), found.where("EXIT")]
    inside = 2 * len(loops)  # of each loop the ways hold the first and the last
    return sum(len(found.way(start, end)) for start, end in zip(starts, ends, strict=True)) - inside


def _round(found: Code, loop: tuple[int, int], dtype: str) -> dict[str, Any]:
    """Describe a loop that reads logits: a round's instructions and elements, and the loads that a thread waits for."""
    body = [found.listing[i] for i in found.way(loop[0], [loop[1]])]
    ahead = any("LDGSTS" in line for line in body)
    loaded = _bytes(body, "LDGSTS" if ahead else "LDG")
    elements = loaded // cost_model.SIZES[dtype]
    exponentials = [i for i, line in enumerate(body) if "MUFU.EX2" in line]
    assert len(exponentials) == elements, f"{loop}: {len(exponentials)} ex2 for {elements} elements of {dtype}"
    assert _bytes(body, "STG") in (0, loaded), f"{loop}: {loaded} bytes are read, {_bytes(body, 'STG')} written"
    if ahead:  # what is loaded before the first round
        in_flight = _bytes((found.listing[i] for i in found.way(0, [loop[0]])), "LDGSTS")
    else:  # before anything is computed
        in_flight = _bytes(body[: exponentials[0]], "LDG")
    assert in_flight, f"{loop}: nothing is loaded before the first exponential"
    return {"elements": elements, "round": len(body), "in_flight": in_flight, "ahead": ahead}


def main_loop() -> dict[str, float]:
    """Count instructions and ex2 an element in the forward kernel's main loop on sm_90, bfloat16.

    It is the first loop of the kernel, and each thread takes 2 LANES / threads elements in one round of it.
    """
    found = code(compile_kernel("forward"))
    first, last = found.loops[0]
    body = found.listing[first : last + 1]
    elements = 2 * forward.LANES / (cost_model.WARP * forward.FORWARD_WARPS)
    return {"instructions": len(body) / elements, "ex2": opcodes(body)["MUFU"] / elements}


def nucleus_search() -> dict[str, int]:
    """Count a thread's instructions in the nucleus search on sm_90: outside its loop (loads too), and in a round."""
    found = code(compile_kernel("search"))
    ((first, last),) = found.loops
    end = found.where("^EXIT")[0]
    return {"outside": end + 1 - (last + 1 - first), "round": last + 1 - first}


def scratch_order(target: str) -> dict[str, Any]:
    """Find how lanes are passed between threads through memory, in the code of `gather_kernel`.

    Returns:
        the loads; whether every store comes before every load; whether a barrier is on every way between two; and
        whether a program's threads share a unit and its cache. Where they do, AMD's memory operations keep their order
        past a barrier without a wait for the store (LLVM's user guide for AMDGPU, memory model of GFX942).
    """
    compiled = compile_kernel("gather", target)
    found = code(compiled)
    stores = found.where(r"STG\.E |(global|buffer)_store_dword ")
    loads = found.where(r"LDG\.E(\.CONSTANT|\.CI)? |(global|buffer)_load_dword ")
    barriers = found.where(r"BAR\.SYNC|s_barrier")
    assert stores, f"{target}: no store to the scratch"
    return {
        "loads": sorted({re.sub(PREDICATE, "", found.listing[i]).split()[0] for i in loads}),
        "in_order": all(set(loads) <= set(found.reached(i)) for i in stores),
        "behind_barrier": not any(set(loads) & set(found.reached(i, closed=barriers)) for i in stores),
        "one_unit": ".amdhsa_tg_split 0" in compiled.asm.get("amdgcn", ".amdhsa_tg_split 0"),
    }


def memory(compiled: Any, tile: int) -> dict[str, Any]:
    """Say what is passed between threads, and whether the logits may be overwritten in place; see `exchanges`.

    Args:
        tile: columns that are read and written at a time.
    """
    found, logits = exchanges.accesses(compiled.asm["ttgir"]), {"logits_ptr", "d_logits_ptr"}
    passed = exchanges.passed_through(found)
    return {
        "passed": {pointer: exchanges.is_in_order(accesses) for pointer, accesses in passed.items()},
        "one_owner": exchanges.have_one_owner(found, compiled.asm["ttgir"], logits, tile),
        "narrow_offsets": exchanges.narrow_offsets(compiled.asm["ttir"], logits),
    }


def report() -> dict[str, Any]:
    variants = [*itertools.product(DTYPES, (False, True), (True,)), ("bf16", False, False)]
    rows = []
    chosen = [(kernel, variant) for kernel in ("forward", "backward") for variant in variants]
    chosen += [(kernel, variant) for kernel in OF_SHARDS for variant in variants[::3]]  # each option either way
    for (kernel, (dtype, softcap, aligned)), target in itertools.product(chosen, TARGETS):
        compiled = compile_kernel(kernel, target, dtype, softcap, aligned)
        variant = {"kernel": kernel, "target": target, "dtype": dtype, "softcap": softcap, "aligned": aligned}
        rows.append(variant | resources(compiled) | memory(compiled, backward.BACKWARD_BLOCK))
    return {
        "provenance": provenance(),
        "rows": rows,
        "main_loop": main_loop(),
        "nucleus_search": nucleus_search(),
        "counts": [asdict(c) for c in every_count()],
        "scratch_order": {target: scratch_order(target) for target in TARGETS},
        "threads": cost_model.WARP * forward.FORWARD_WARPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="the time to expect on a GPU, by each of its limits")
    parser.add_argument("--out", type=Path, help="write JSON to this file in place of a table to the terminal")
    arguments = parser.parse_args()
    if arguments.model:
        result = cost_model.record(every_count(), provenance())
        as_json, as_table = cost_model.text, cost_model.table
    else:
        result = report()
        as_json, as_table = lambda result: json.dumps(result, indent=1) + "\n", table
    if arguments.out is not None:
        arguments.out.write_text(as_json(result))
    else:
        print(*as_table(result), sep="\n")


def table(result: dict[str, Any]) -> Iterator[str]:
    for row in result["rows"]:
        yield " ".join(f"{name}={value}" for name, value in row.items())
    for name in ("main_loop", "nucleus_search"):
        yield " ".join([name, *(f"{key}={value:g}" for key, value in result[name].items())])


if __name__ == "__main__":
    main()
