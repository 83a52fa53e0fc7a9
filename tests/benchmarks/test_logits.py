"""Rows called real have the nuclei that were met in answers, in every batch."""

import json

import pytest
import torch

from benchmarks import logits
from benchmarks.workload import checked_rows
from paec_kernels import reference

FOUND = json.loads(logits.SHARES.read_text())
SIZES, SHARES = torch.tensor(FOUND["row_nuclei"]), torch.tensor(FOUND["row_shares"], dtype=torch.float64)


def test_shares_are_of_these_rows():
    rows = torch.load(logits.REAL_LOGITS, weights_only=True)["logits"].float()
    sizes = reference.token_stats(rows).nucleus_size
    assert ((sizes - SIZES).abs() <= 0.01 * SIZES).all()
    assert SHARES.sum().item() == pytest.approx(1)
    assert FOUND["positions"] > 1000


@pytest.mark.parametrize("start", [0, 64, 1000])
@pytest.mark.parametrize("n", [64, 192, 4096, 65_536])
def test_every_batch_has_the_right_mix(n, start):
    counts = torch.bincount(logits.by_share(range(start, start + n)), minlength=32)
    assert (counts - n * SHARES).abs().max() < 4


@pytest.mark.parametrize("n", [64, 192, 256, 4096, 8192, 65_536])
def test_the_rows_that_are_checked_have_it_too(n):
    sizes = SIZES[logits.by_share(range(n))][checked_rows(n, "cpu")]
    assert (sizes < 64).double().mean().item() == pytest.approx(FOUND["share_below_64"], abs=0.08)


def test_one_row_is_the_median():
    (row,) = logits.by_share(range(1))
    assert (SHARES * (SIZES[row] >= SIZES)).sum() >= 0.5
    assert (SHARES * (SIZES[row] > SIZES)).sum() <= 0.5


def test_wide_rows_take_turns():
    generator = torch.Generator().manual_seed(0)
    fixture = torch.load(logits.REAL_LOGITS, weights_only=True)["logits"].float()
    made = logits.wide(range(30, 34), 49_152, generator)
    assert (made - fixture[[30, 31, 0, 1]]).abs().max() < 7 * logits.JITTER


@pytest.mark.parametrize("width", [32_000, 60_000])
def test_real_logits_keep_their_nuclei_at_other_widths(width):
    generator = torch.Generator().manual_seed(0)
    sizes = [reference.token_stats(logits.wide(range(32), w, generator)).nucleus_size.double() for w in (49_152, width)]
    assert (sizes[1] / sizes[0] - 1).abs().max() < 0.05
