"""What Triton's kernels read of a shard, against the torch backend's passes over it."""

import pytest
import torch
from ops.rows import INF, flat
from torch import Tensor

from paec_kernels.ops import layout, torch_shard
from paec_kernels.ops.layout import Rows

pytest.importorskip("triton", reason="the triton package is not installed")
from paec_kernels.ops import shard_kernels

N, V = 6, 2500


def arguments(dtype: torch.dtype, softcap: float) -> tuple[Tensor, Rows, float, int]:
    logits = flat(N, V).to(dtype)
    logits[1, 100:] = -INF
    logits[2] = logits[2].round()
    token_ids = torch.tensor([0, 5, 99, -100, V - 51, 7])
    valid = torch.tensor([True, True, True, True, True, False])
    return logits[None], Rows(token_ids, valid, torch.linspace(0.5, 2, N)), softcap, V - 50


@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_read_what_torch_reads(device, dtype, softcap):
    given = arguments(dtype, softcap)
    sums = shard_kernels.sums(*given)
    close(sums, torch_shard.sums(*given))
    top = sums[layout.TOP_LOGIT] + 1  # as if another rank had the largest
    thresholds = torch.stack([top - 9, top - 5, top - 2])
    close(shard_kernels.masses(*given, top, thresholds), torch_shard.masses(*given, top, thresholds))
    bracket = thresholds[:2]
    close(shard_kernels.members(*given, top, bracket), torch_shard.members(*given, top, bracket))


def close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got[:, -1] == 0).all()  # the row that is not valid
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_a_row_without_a_finite_logit_and_one_with_nan(device):
    logits = torch.full((1, 2, V), -INF)
    logits[0, 1, 7] = torch.nan
    given = logits, Rows(None, None, torch.ones(1)), 0.0, V
    for sums in (shard_kernels.sums(*given), torch_shard.sums(*given)):
        assert sums[layout.TOP_LOGIT, 0] == -INF
        assert sums[layout.TOTAL, 0] == sums[layout.MOMENT, 0] == 0
        assert sums[layout.TOTAL, 1].isnan()
