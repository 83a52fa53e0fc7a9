import math

import pytest
import torch

from paec_kernels.losses.quantile import as_fraction, quantile

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 101, 4096])
def test_equals_torch_quantile_of_the_valid_scores(n):
    score = torch.rand(2 * n, dtype=torch.float64)
    valid = torch.randperm(2 * n) < n
    for q in (0.0, 0.2, 0.25, 1 / 3, 0.8, 0.999, 1.0):
        expected = torch.quantile(score[valid], q)
        actual = quantile(torch.where(valid, score, math.inf), as_fraction(q))
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


def test_rows_have_each_their_own():
    score = torch.rand(3, 4, 50, dtype=torch.float64)
    score[torch.rand(3, 4, 50) < 0.3] = math.inf
    score[1, 2] = math.inf
    score[2, 3, 4] = math.nan
    found = quantile(score, as_fraction(0.8))
    expected = torch.stack([quantile(row, as_fraction(0.8)) for row in score.flatten(0, 1)]).view(3, 4)
    assert found.isnan().sum() == 2
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_ties_and_a_position_on_an_element():
    assert quantile(torch.tensor([0.5, 0.25, 0.25, 0.25, 0.5, 1.0]), as_fraction(0.8)) == 0.5


def test_exact_beyond_two_to_the_24():
    # float32 cannot hold this position, and torch.quantile refuses the size. The fraction shows: scores
    # that step by 1 from one rank to the next, from -n / 2 so that float32 holds those near the quantile.
    n, q = 2**24 + 3, 0.5625
    position = as_fraction(q) * (n - 1)
    assert position == 9437185 + as_fraction(0.125)
    score = (torch.arange(n) - 9437185).float().roll(12345)
    assert quantile(score, as_fraction(q)) == 0.125


def test_no_valid_score_gives_nan():
    assert quantile(torch.full((7,), math.inf), as_fraction(0.8)).isnan()
    assert quantile(torch.empty(0), as_fraction(0.8)).isnan()


@pytest.mark.parametrize("q", [0.0, 0.25, 1.0])
def test_a_nan_score_gives_nan_as_torch_does(q):
    score = torch.tensor([0.1, math.nan, 0.3, math.inf])
    assert torch.quantile(score[:3], q).isnan()
    assert quantile(score, as_fraction(q)).isnan()


def test_result_has_the_scores_dtype():
    assert quantile(torch.rand(5), as_fraction(0.8)).dtype == torch.float32
