"""What the kernels compile to, read from the machine code, with no GPU: registers, spills, instructions.

    python -m benchmarks.compiled_code            # a table
    python -m benchmarks.compiled_code --json     # the same rows as JSON

Needs triton with its own cuobjdump and nvdisasm (Linux), and TRITON_INTERPRET unset.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.provenance import provenance
from paec_kernels.token_stats import triton_backend
from paec_kernels.token_stats.backward_kernel import backward_kernel
from paec_kernels.token_stats.forward_kernel import forward_kernel
from paec_kernels.token_stats.nucleus import search_values

TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
SHIFTS = {"fp32": 0, "fp16": 13, "bf16": 16}
ROW_ARGUMENTS = {
    "token_ids_ptr": "*i64",
    "valid_ptr": "*i1",
    "temperature_ptr": "*fp32",
    "temperature_stride": "i32",
}
WARP = 32


@triton.jit
def candidate_search_kernel(
    first_ptr, second_ptr, out_ptr, low, high, target, top, scale,
    SHIFT: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """All that the nucleus costs a row that needs no rescan: the search and the look for suspect lanes."""
    lanes = tl.arange(0, LANES)
    first, second = tl.load(first_ptr + lanes), tl.load(second_ptr + lanes)
    reached, found, tau, weight, mass, weighted, size = search_values(
        tl.join(first, second), None, low, high, 0.0, 0.0, 0.0, target, top, scale, 0.0, SHIFT, False
    )
    n_suspect = tl.sum((second >= tau).to(tl.int32))
    tl.store(out_ptr, tau + weight + mass + weighted + size + n_suspect + found + reached)


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _constants(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "constexpr")


def _signature(kernel: str, dtype: str) -> dict[str, str]:
    logits = {"logits_ptr": f"*{dtype}", "stride_outer": "i64", "stride_inner": "i64", "stride_col": "constexpr"}
    if kernel == "forward":
        return (
            logits
            | ROW_ARGUMENTS
            | {"stats_ptr": "*fp32", "size_ptr": "*i32", "scratch_ptr": "*i32", "fits_ptr": "*i32"}
            | _integers("n_rows", "n_inner", "n_cols")
            | {"top_p": "fp32", "softcap": "fp32"}
            | _constants("SHIFT", "HAS_SOFTCAP", "LANES")
        )
    if kernel == "backward":
        return (
            {f"d_{name}": annotation for name, annotation in logits.items()}
            | logits
            | ROW_ARGUMENTS
            | {"stats_ptr": "*fp32", "d_stats_ptr": "*fp32"}
            | _integers("n_rows", "n_inner", "n_cols", "width")
            | {"softcap": "fp32", "first_column": "i32"}
            | _constants("HAS_SOFTCAP", "BLOCK")
        )
    return (
        {"first_ptr": "*fp32", "second_ptr": "*fp32", "out_ptr": "*fp32"}
        | _integers("low", "high")
        | {"target": "fp32", "top": "fp32", "scale": "fp32"}
        | _constants("SHIFT", "LANES")
    )


def compile_kernel(kernel: str, target: str = "sm_90", dtype: str = "bf16", softcap: bool = False) -> Any:
    """Compile "forward", "backward" or "search" as a launch on aligned, contiguous logits would."""
    function = {"forward": forward_kernel, "backward": backward_kernel, "search": candidate_search_kernel}[kernel]
    forward_warps = triton_backend.SOFTCAP_WARPS if softcap else triton_backend.FORWARD_WARPS
    warps = triton_backend.BACKWARD_WARPS if kernel == "backward" else forward_warps
    constants = {
        "stride_col": 1,
        "d_stride_col": 1,
        "SHIFT": SHIFTS[dtype],
        "HAS_SOFTCAP": softcap,
        "LANES": triton_backend.LANES,
        "BLOCK": triton_backend.BACKWARD_BLOCK,
    }
    signature = _signature(kernel, dtype)
    names = list(signature)
    aligned = [n for n in names if n.endswith("_ptr") or "stride_" in n or n in ("n_cols", "width")]
    source = ASTSource(
        function,
        signature,
        {(names.index(n),): value for n, value in constants.items() if n in names},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, and bytes of spills (stack) and local memory."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
        return {
            "registers": int(found["vgpr_count"]),
            "spills": int(found["vgpr_spill_count"]),
            "local": int(found["private_segment_fixed_size"]),
        }
    text = _cuda_tool("cuobjdump", ["-res-usage"], compiled)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]), "local": int(found["LOCAL"])}


def _cuda_tool(tool: str, arguments: list[str], compiled: Any) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        return subprocess.run([path, *arguments, cubin.name], check=True, capture_output=True, text=True).stdout


def instructions(compiled: Any) -> tuple[list[str], list[tuple[int, int]]]:
    """The SASS instructions in order, and the loops among them as (first, last) positions."""
    listing: list[str] = []
    labels: dict[str, int] = {}
    for line in _cuda_tool("nvdisasm", ["-c"], compiled).splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = len(listing)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            listing.append(instruction.group(1))
    loops = []
    for position, instruction in enumerate(listing):
        branch = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        # A branch to itself is the padding behind the kernel's last instruction.
        if branch and labels[branch.group(1)] < position:
            loops.append((labels[branch.group(1)], position))
    return listing, loops


def opcodes(listing: list[str]) -> Counter:
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0] for line in listing)


def main_loop(dtype: str = "bf16") -> dict[str, float]:
    """Instructions and ex2 an element in the forward kernel's main loop on sm_90.

    It is the first loop of the kernel, and each thread takes 2 LANES / threads elements in one round of it.
    """
    listing, loops = instructions(compile_kernel("forward", dtype=dtype))
    first, last = loops[0]
    body = listing[first : last + 1]
    elements = 2 * triton_backend.LANES / (WARP * triton_backend.FORWARD_WARPS)
    return {"instructions": len(body) / elements, "ex2": opcodes(body)["MUFU"] / elements}


def nucleus_search(dtype: str = "bf16") -> dict[str, int]:
    """Instructions a thread of the nucleus search on sm_90: outside its loop (loads included), and in one round."""
    listing, loops = instructions(compile_kernel("search", dtype=dtype))
    ((first, last),) = loops
    end = next(i for i, line in enumerate(listing) if "EXIT" in line and not line.startswith("@"))
    return {"outside": end + 1 - (last + 1 - first), "round": last + 1 - first}


def report() -> dict[str, Any]:
    rows = [
        {"kernel": kernel, "target": target, "dtype": dtype, "softcap": softcap}
        | resources(compile_kernel(kernel, target, dtype, softcap))
        for kernel in ("forward", "backward")
        for target in TARGETS
        for dtype in SHIFTS
        for softcap in (False, True)
    ]
    return {
        "provenance": provenance(),
        "rows": rows,
        "main_loop": main_loop(),
        "nucleus_search": nucleus_search(),
        "threads": WARP * triton_backend.FORWARD_WARPS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    result = report()
    text = json.dumps(result, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    if arguments.json:
        print(text)
        return
    for row in result["rows"]:
        print(*(f"{name}={value}" for name, value in row.items()))
    for name in ("main_loop", "nucleus_search"):
        print(name, *(f"{key}={value:g}" for key, value in result[name].items()))


if __name__ == "__main__":
    main()
