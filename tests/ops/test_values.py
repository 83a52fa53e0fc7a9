"""Statistics of both backends, and of the kernels on a GPU, against the float64 reference: real rows and hard ones."""

import math

import pytest
import torch
from ops.rows import (
    STRIDED,
    TANH_ROUNDINGS,
    WIDTHS,
    broken_rows,
    check_against,
    check_gradient,
    check_values,
    flat,
    hard_rows,
    truth_of,
)

import paec_kernels as pk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_rows(backend, real_logits, dtype):
    check_values(backend, real_logits.logits.to(dtype), real_logits.token_ids)


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"softcap": 30.0}, {"softcap": 20.0, "temperature": 1.7}])
def test_real_rows_with(backend, real_logits, options):
    check_values(backend, real_logits.logits[::4], real_logits.token_ids[::4], **options)


@pytest.mark.parametrize("top_p", [1e-4, 0.3, 0.8, 0.999, 0.9999999, 1.0])
def test_top_p(backend, real_logits, top_p):
    check_values(backend, real_logits.logits[::4].float(), real_logits.token_ids[::4], top_p=top_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hard_rows())
def test_hard_rows(backend, name, dtype):
    logits = hard_rows()[name].to(dtype)[None]
    for top_p in (0.95, 0.5, 1.0):
        check_values(backend, logits, torch.tensor([4321]), top_p=top_p)


@pytest.mark.parametrize("name", ["flat", "around zero", "first block masked", "near 5,000", "spread over 10,000"])
def test_hard_rows_with_softcap(backend, name):
    check_values(backend, hard_rows()[name][None], torch.tensor([4321]), softcap=15.0, temperature=0.8)


@pytest.mark.parametrize("softcap", [100.0, 1e4])
def test_a_wide_softcap_keeps_the_digits(backend, softcap):
    check_values(backend, flat(2, 700), torch.tensor([1, 2]), softcap=softcap)


def test_the_kernels_tanh(backend):
    """The softcap of a logit that is alone in its row, which is then lse, to the roundings that other tests allow."""
    z = torch.linspace(-4, 4, 801)[:, None]
    lse = pk.token_stats(z, softcap=1.0, backend=backend).lse
    exact = z.double().tanh().flatten()
    assert ((lse - exact).abs() <= TANH_ROUNDINGS * torch.finfo(torch.float32).eps * exact.abs()).all()


def test_a_large_softcap_rounds_margins_and_gradients(backend):
    """Logits near 900 have 6e-5 between them, so that their margins and gradients are no more exact."""
    z = 945.75 + 0.3 * torch.randn(6, 9)
    check_values(backend, z, torch.arange(6), softcap=945.75)
    check_gradient(backend, z, torch.arange(6), torch.randn(3, 6), softcap=945.75, temperature=0.5)


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(backend, width):
    for dtype in DTYPES:
        check_values(backend, flat(3, width).to(dtype), torch.tensor([0, width // 2, width - 1]))


def test_one_token_has_no_rival(backend):
    stats = pk.token_stats(torch.tensor([[3.0]]), torch.tensor([0]), backend=backend)
    assert stats.logp.item() == stats.entropy.item() == stats.nucleus_entropy.item() == 0
    assert stats.margin.item() == math.inf
    assert stats.nucleus_size.item() == 1


def test_wide_flat_rows_overflow_every_candidate_buffer(backend):
    for dtype in (torch.float32, torch.bfloat16):
        check_values(backend, flat(2, 32_000).to(dtype), torch.tensor([1, 31_999]))


def test_tie_weight_of_a_sort(backend):
    # p = (0.5, 0.125 x 4): 0.95 needs all but a fraction of the last, 0.7 needs two of the four.
    logits = torch.tensor([[0.5, 0.125, 0.125, 0.125, 0.125]]).log()
    stats = pk.token_stats(logits, top_p=0.7, backend=backend)
    q = torch.tensor([0.5, 0.125, 0.125]) / 0.75
    assert stats.nucleus_size.item() == 3
    assert stats.nucleus_entropy.item() == pytest.approx(-(q * q.log()).sum().item(), abs=1e-6)
    # A mass of exactly top_p is enough.
    assert pk.token_stats(torch.zeros(1, 4), top_p=0.5, backend=backend).nucleus_size.item() == 2


@pytest.mark.parametrize("softcap", [None, 15.0])  # which makes infinity a number
@pytest.mark.parametrize("name", broken_rows())
def test_broken_rows_are_nan_alone(backend, name, softcap):
    good = flat(1, 5003)[0]
    logits = torch.stack([good, broken_rows()[name], good])
    stats = pk.token_stats(logits, torch.tensor([7, 8, 7]), softcap=softcap, backend=backend)
    for value in stats[:5]:
        assert value[1].isnan()
        assert value[[0, 2]].isfinite().all()
        assert value[0] == value[2]
    assert stats.nucleus_size.tolist()[1] == 0


def test_rows_that_are_not_valid_are_not_read(backend):
    logits = torch.stack([broken_rows()["NaN"], flat(1, 5003)[0], broken_rows()["NaN"]])
    valid = torch.tensor([False, True, False])
    # The id of a row that is not valid may be anything.
    token_ids = torch.tensor([10**6, 3, -7])
    stats = pk.token_stats(logits, token_ids, valid=valid, backend=backend)
    for value in stats:
        assert value[0] == value[2] == 0
        assert value[1] != 0


def test_ignored_and_missing_token_ids(backend):
    logits = flat(2, 130)
    stats = pk.token_stats(logits, torch.tensor([-100, 5]), backend=backend)
    assert stats.logp[0] == 0
    assert stats.logp[1] < 0
    assert pk.token_stats(logits, backend=backend).logp is None


def test_integer_types_of_token_ids(backend):
    logits = flat(2, 130)
    expected = pk.token_stats(logits, torch.tensor([129, 5]), backend=backend).logp
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(pk.token_stats(logits, torch.tensor([129, 5], dtype=dtype), backend=backend).logp, expected)


def test_temperature_per_row(backend):
    check_values(backend, flat(3, 700), torch.tensor([1, 2, 3]), temperature=torch.tensor([0.5, 1.0, 2.0]))


def test_columns_of_padding_are_not_read(backend):
    logits = flat(2, 704)  # rows aligned alike with and without padding: a GPU sums them in one order
    padded = torch.cat([logits, torch.full((2, 64), math.nan)], dim=1)
    token_ids = torch.tensor([1, 703])
    stats = pk.token_stats(padded, token_ids, vocab_size=704, backend=backend)
    for value, expected in zip(stats, pk.token_stats(logits, token_ids, backend=backend), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows(backend, shape):
    logits = torch.empty(shape, requires_grad=True)
    stats = pk.token_stats(logits, torch.empty(shape[:-1], dtype=torch.long), backend=backend)
    assert all(value.shape == shape[:-1] for value in stats)
    stats.entropy.sum().backward()
    assert logits.grad.shape == shape


def test_any_leading_shape(backend):
    logits = flat(12, 130)
    expected = pk.token_stats(logits, backend=backend)
    for shape in [(12,), (3, 4), (2, 3, 2)]:
        stats = pk.token_stats(logits.view(*shape, 130), backend=backend)
        assert torch.equal(stats.entropy, expected.entropy.view(shape))
    assert pk.token_stats(logits[0], backend=backend).entropy.shape == ()


@pytest.mark.parametrize("name", STRIDED)
def test_strides(backend, name):
    logits = STRIDED[name](flat(24, 130).view(3, 8, 130))
    assert not logits.is_contiguous()
    token_ids = torch.randint(logits.shape[-1], logits.shape[:-1])
    temperature = 0.5 + torch.rand(token_ids.shape)

    def statistics(z):
        return pk.token_stats(z, token_ids, temperature=temperature, backend=backend)

    stats = statistics(logits)
    check_against(stats, truth_of(logits, token_ids, temperature=temperature))
    if logits.is_cpu:  # on a GPU the order of a row's sums depends on the alignment of its address
        for value, expected in zip(stats, statistics(logits.contiguous()), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_whatever_batch_it_is_in(backend, real_logits, dtype):
    logits = real_logits.logits[:12].to(dtype)
    together = pk.token_stats(logits, backend=backend)
    for rows in ([0], [5], [11, 3], list(range(11, -1, -1)), [7, 7, 7, 2, 7]):
        apart = pk.token_stats(logits[rows], backend=backend)
        for value, expected in zip(apart[1:], together[1:], strict=True):
            assert torch.equal(value, expected[rows])


@pytest.mark.parametrize(
    ("width", "apart", "value"),
    [(4100, 1_500_016, None), (4100, 1_500_016, 1.5), (8200, 2**19 + 16, None)],
    ids=["blocks", "readings", "rounds of two blocks"],
)
def test_columns_far_apart(backend, monkeypatch, width, apart, value):
    """Offsets of a few thousand columns pass 2^31, in the row's pass and in the readings of tied rows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # as below
    near = flat(2, width).bfloat16() if value is None else torch.full((2, width), value, dtype=torch.bfloat16)
    logits = torch.empty(width * apart, dtype=torch.bfloat16).as_strided(near.shape, (1, apart)).copy_(near)
    token_ids = torch.tensor([3, width - 1])
    check_against(pk.token_stats(logits, token_ids, backend=backend), truth_of(near, token_ids))


@pytest.mark.parametrize(("n", "apart"), [(2, 2**31 + 64), (3, 2**30 + 64)])
def test_offsets_beyond_two_to_the_31(backend, monkeypatch, n, apart):
    """By a stride that no int32 holds, and by one that does, times the number of a row."""
    # Only the pages that are written exist on a CPU: 4.3 GB of addresses, a few kilobytes of memory.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    storage = torch.empty((n - 1) * apart + 256, dtype=torch.bfloat16)
    near = flat(n, 208).bfloat16()
    logits = storage.as_strided(near.shape, (apart, 1)).copy_(near)
    token_ids = torch.tensor([3, 207, 0])[:n]
    stats = pk.token_stats(logits, token_ids, backend=backend)
    for value, expected in zip(stats, pk.token_stats(near, token_ids, backend=backend), strict=True):
        assert torch.equal(value, expected)
