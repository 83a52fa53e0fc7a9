"""The quantile of the valid scores, against numpy's and torch's."""

import math

import numpy
import torch
from fuzz.properties import holds
from fuzz.strategies import evenly, mostly, seeds, sizes
from hypothesis import strategies as st

from paec_kernels.losses.quantile import as_fraction, quantile

finite = evenly(st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0]))
some = evenly(
    st.lists(finite, min_size=2, max_size=60), st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=2, max_size=200)
)
scores = mostly(some, st.lists(finite, min_size=1, max_size=1))
# As they are written; an arbitrary double is one within 2^-30.
shares = st.sampled_from([0.0, 1.0, 0.8, 0.2, 1 / 3, 0.999]) | st.decimals(0, 1, places=4).map(float)


@holds(tests=20, fuzz=2500, values=mostly(scores, st.just([])), q=shares, invalid=sizes(0, 20), seed=seeds)
def test_equals_numpys_and_torchs(values, q, invalid, seed):
    score = torch.tensor(values + [math.inf] * invalid, dtype=torch.float64)
    score = score[torch.randperm(len(score), generator=torch.Generator().manual_seed(seed))]
    got = quantile(score, as_fraction(q))
    if not values:
        assert got.isnan()
        return False
    near = {"rtol": 1e-12, "atol": 1e-12 * max(1.0, *map(abs, values))}
    torch.testing.assert_close(got, torch.tensor(numpy.quantile(values, q), dtype=torch.float64), **near)
    torch.testing.assert_close(got, torch.quantile(score[score < math.inf], q), **near)
    single = quantile(score.float(), as_fraction(q))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), got, rtol=1e-6, atol=1e-6 * max(1.0, *map(abs, values)))
    return len(set(values)) > 1


@holds(tests=20, fuzz=1500, values=scores, q=shares, invalid=sizes(0, 20), seed=seeds)
def test_neither_order_nor_invalid_scores_matter_to_the_bit(values, q, invalid, seed):
    score = torch.tensor(values)
    other = torch.cat([score, torch.full((invalid,), math.inf)])
    other = other[torch.randperm(len(other), generator=torch.Generator().manual_seed(seed))]
    got = quantile(score, as_fraction(q))
    assert quantile(other, as_fraction(q)) == got
    assert score.min() <= got <= score.max()
    return len(set(values)) > 1


@holds(tests=20, fuzz=1500, values=scores, q=shares, other=shares)
def test_it_grows_with_the_share(values, q, other):
    score = torch.tensor(values, dtype=torch.float64)
    smaller, larger = (quantile(score, as_fraction(share)) for share in sorted([q, other]))
    assert smaller <= larger + 1e-9
    return bool(smaller < larger)


@holds(tests=20, fuzz=1000, values=mostly(scores, st.just([])), q=shares, place=seeds)
def test_a_nan_shows(values, q, place):
    values = [*values[: place % (len(values) + 1)], math.nan, *values[place % (len(values) + 1) :]]
    assert quantile(torch.tensor(values), as_fraction(q)).isnan()
    return len(values) > 1
