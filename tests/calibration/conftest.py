"""Tests here run where Triton's kernels do: interpreted on the CPU, or with TRITON_INTERPRET=0 on the GPU."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    compiled = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    with torch.device("cuda" if compiled else "cpu"):
        yield
