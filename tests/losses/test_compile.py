"""The kernels compile for each target, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# A process of its own: where TRITON_INTERPRET=1, `triton.jit` makes nothing that can be compiled.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import exchanges
from paec_kernels.losses import mask_kernels

TARGETS = [GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)]
TYPES = {"nucleus_size_ptr": "*i32", "valid_ptr": "*i1", "n": "i32"}
TYPES |= dict.fromkeys(["alpha", "tau_c", "h_scale", "tau_m", "beta", "lam"], "fp32")
VARIANTS = [
    (mask_kernels._position_score_kernel, {"LOG_SIZE": True}),
    (mask_kernels._position_score_kernel, {"LOG_SIZE": False}),
    (mask_kernels._soft_mask_kernel, {}),
    (mask_kernels._penalty_coefficients_kernel, {}),
]
for kernel, constexprs in VARIANTS:
    constexprs = {**constexprs, "BLOCK": mask_kernels.BLOCK}
    signature = {name: "constexpr" if name in constexprs else TYPES.get(name, "*fp32")
                 for name in kernel.arg_names}
    for target in TARGETS:
        source = ASTSource(kernel, signature=signature, constexprs=constexprs)
        options = {"num_warps": mask_kernels.NUM_WARPS, "enable_fp_fusion": True}
        binary = triton.compile(source, target=target, options=options).asm
        text = binary.get("ptx") or binary["amdgcn"]
        assert "atom" not in text, "atomics add in any order"
        assert not exchanges.passed_through(exchanges.accesses(binary["ttgir"])), "threads pass nothing on"
        print(kernel.__name__, target.arch)
"""


def test_kernels_compile_for_each_target(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 4 * 3
