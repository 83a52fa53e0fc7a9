"""How often a row is read again for its nucleus: a handful of times, whatever it holds."""

import pytest
import torch
from ops.rows import check_against, flat, hard_rows, truth_of

import paec_kernels as pk

WIDTH = 5003
BELOW_ZERO, ABOVE_ZERO = -flat(1, WIDTH)[0].abs(), flat(1, WIDTH)[0].abs()
FIRST_4000 = torch.arange(4000)
TIED = {
    "all zero": torch.zeros(WIDTH),
    "all minus zero": torch.full((WIDTH,), -0.0),
    "all equal": torch.full((WIDTH,), 1.5),
    "zeros on top": BELOW_ZERO.index_fill(0, FIRST_4000, 0.0),
    "zeros below": (0.03 * ABOVE_ZERO).index_fill(0, FIRST_4000, 0.0),
    "zeros of both signs below": (0.03 * ABOVE_ZERO)
    .index_fill(0, FIRST_4000[::2], 0.0)
    .index_fill(0, FIRST_4000[1::2], -0.0),
    "tied far from zero": (0.03 * ABOVE_ZERO - 700).index_fill(0, FIRST_4000, -700.0),
}


@pytest.fixture
def readings(interpreter, calls, monkeypatch):
    """A list that grows by an entry for each time a row is read again."""
    from paec_kernels.ops import nucleus, nucleus_readings

    found = calls((nucleus_readings, "read_masses"), (nucleus_readings, "read_below"))
    monkeypatch.setattr(nucleus, "read_below", nucleus_readings.read_below)  # for all tokens, top_p = 1
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TIED)
def test_tied_rows(readings, name, dtype):
    logits, token_ids = TIED[name].to(dtype)[None], torch.tensor([7])
    stats = pk.token_stats(logits, token_ids, backend="triton")
    assert 1 <= len(readings) <= 6
    check_against(stats, truth_of(logits, token_ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [0.02, 1.0, 3.0])
def test_wide_flat_rows(readings, scale, dtype):
    pk.token_stats(flat(1, 50_000, scale).to(dtype), backend="triton")
    assert 1 <= len(readings) <= 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", hard_rows())
def test_hard_rows(readings, name, dtype):
    pk.token_stats(hard_rows()[name].to(dtype), backend="triton")
    assert len(readings) <= 8
