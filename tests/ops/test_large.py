"""Offsets beyond 2^31 and more rows than 65,535, in little memory: far apart, not valid or made a chunk at a time."""

import math

import numpy as np
import pytest
import torch
from ops.rows import flat

import paec_kernels as pk

FAR = 2**31


@pytest.fixture
def pages() -> torch.Tensor:
    """A little more than 2^31 zeros in float16, 4.3 GB of which only the pages that are written to take memory.

    Not bfloat16, whose gradient Triton's interpreter makes in a dense copy.
    """
    try:
        return torch.from_numpy(np.zeros(FAR + 2**17, np.float16))
    except MemoryError:
        pytest.skip("4.3 GB of addresses are not granted")


# Shapes and strides of logits whose last element lies beyond 2^31.
PLACES = {
    "rows": ((3, 300), (2**30 + 64, 1)),
    "a stride of more than an int32": ((2, 300), (FAR + 64, 1)),
    "two strides of rows": ((2, 3, 70), (FAR - 4096, 4096, 1)),
    "columns": ((2, 5), (7, 2**29 + 1)),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("place", PLACES)
def test_logits_far_apart(request, pages, place, backend):
    """Of a GPU see test_gpu.py."""
    if backend == "triton":
        request.getfixturevalue("interpreter")
    shape, strides = PLACES[place]
    rows = math.prod(shape[:-1])
    dense = flat(rows, shape[-1]).half().view(shape)
    numbers = torch.arange(rows).view(shape[:-1])
    token_ids, valid = numbers % shape[-1], numbers > 0
    far = pages.as_strided(shape, strides)
    assert sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) >= FAR

    def statistics_and_gradient(leaf, inplace):
        logits = leaf.view_as(leaf)
        stats = pk.token_stats(logits, token_ids, valid=valid, inplace_backward=inplace, backend=backend)
        (gradient,) = torch.autograd.grad((stats.logp - stats.entropy + stats.nucleus_entropy).sum(), logits)
        return *stats, gradient

    expected = statistics_and_gradient(dense.clone().requires_grad_(), False)
    for inplace in (False, True):
        far.copy_(dense)
        found = statistics_and_gradient(far.detach().requires_grad_(), inplace)
        for value, other in zip(found, expected, strict=True):
            assert torch.equal(value, other)
        assert torch.equal(far, expected[-1] if inplace else dense)


N, V = 70_000, 32_768


def test_many_rows():
    logits = flat(1, 24).expand(N, 24)
    token_ids, weights = torch.arange(N) % 24, torch.randn(N)
    leaf = logits.clone().requires_grad_()
    stats = pk.token_stats(leaf, token_ids.int(), backend="torch")
    first = pk.token_stats(logits[:24], token_ids[:24], backend="torch")
    for value, other in zip(stats, first, strict=True):
        assert torch.equal(value, other[token_ids])
    (weights * (stats.logp + stats.nucleus_entropy)).sum().backward()
    few = logits[:24].clone().requires_grad_()
    stats = pk.token_stats(few, token_ids[:24], backend="torch")
    (stats.logp + stats.nucleus_entropy).sum().backward()
    torch.testing.assert_close(leaf.grad, weights[:, None] * few.grad[token_ids], rtol=1e-5, atol=1e-7)


def test_more_elements_than_an_int32(pages):
    """Of one piece of memory, with rows that differ on both sides of its element 2^31."""
    n = FAR // V + 3
    logits, valid = pages[: n * V].view(n, V), torch.zeros(n, dtype=torch.bool)
    rows = [0, 1, n - 4, n - 3, n - 2, n - 1]
    valid[rows] = True
    logits[rows] = flat(len(rows), V).half()
    token_ids = torch.arange(n).index_fill(0, torch.tensor([n - 1]), V - 1) % V
    stats = pk.token_stats(logits, token_ids, valid=valid, backend="torch")
    expected = pk.token_stats(logits[rows], token_ids[rows], backend="torch")
    for value, other in zip(stats, expected, strict=True):
        assert torch.equal(value[rows], other)
        assert (value[~valid] == 0).all()
    assert len(expected.entropy.unique()) == len(rows)


@pytest.mark.slow
def test_a_gradient_of_more_elements_than_an_int32(pages):
    """In place, over 4.3 GB of which nearly all are rows that are not valid and get 0."""
    n = FAR // V + 3
    logits, valid = pages[: n * V].view(n, V), torch.zeros(n, dtype=torch.bool)
    rows = [0, 1, n - 1]
    valid[rows] = True
    logits[rows] = flat(3, V).half()
    logits[-2] = 7.0
    dense = logits[rows].clone().requires_grad_()
    leaf = logits.detach().requires_grad_()
    stats = pk.token_stats(leaf.view_as(leaf), valid=valid, inplace_backward=True, backend="torch")
    stats.entropy.sum().backward()
    pk.token_stats(dense, backend="torch").entropy.sum().backward()
    assert torch.equal(logits[rows], dense.grad)
    assert (logits[-2] == 0).all()


@pytest.mark.slow
def test_the_linear_form_of_more_logits_than_an_int32():
    """All of them made, of eleven tokens again and again, each time with another weight in the loss."""
    n = FAR // V + 3
    kind, weights = torch.arange(n) % 11, torch.rand(n)
    weights[[0, -3, -2, -1]] = 1e3  # so that none of these is lost in the weight's gradient
    hidden, weight = torch.randn(11, 4), torch.randn(V, 4, requires_grad=True)
    token_ids = torch.linspace(0, V - 1, 11).long()

    def statistics_and_gradients(hidden, token_ids, weights):
        leaf = hidden.requires_grad_()
        stats = pk.linear_token_stats(leaf, weight, token_ids, top_p=1.0, backend="torch")
        loss = (weights * (stats.logp - stats.entropy)).sum()
        return stats, *torch.autograd.grad(loss, (leaf, weight))

    stats, d_hidden, d_weight = statistics_and_gradients(hidden[kind], token_ids[kind], weights)
    expected, d_each, _ = statistics_and_gradients(hidden, token_ids, torch.ones(11))
    for value, other in zip(stats, expected, strict=True):
        torch.testing.assert_close(value, other[kind], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_hidden, weights[:, None] * d_each[kind], rtol=1e-4, atol=1e-5)
    totals = torch.zeros(11).index_add_(0, kind, weights)
    _, _, expected_d_weight = statistics_and_gradients(hidden, token_ids, totals)
    torch.testing.assert_close(d_weight, expected_d_weight, rtol=1e-3, atol=1e-3)


def test_a_policy_loss_of_many_tokens():
    """Of 2^24 + 5, which float32 cannot count one by one."""
    n = 2**24 + 5
    logp = torch.full((n,), -1.5, requires_grad=True)
    loss, metrics = pk.grpo_loss(logp, logp.detach(), torch.ones(1).expand(n), torch.ones(n, dtype=torch.bool))
    assert loss.item() == pytest.approx(-1, rel=1e-6)
    assert metrics["ratio_mean"].item() == pytest.approx(1, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient[-1].item() == gradient[0].item() == pytest.approx(-1 / n, rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_paec_of_many_tokens(request, backend):
    if backend == "triton":
        request.getfixturevalue("interpreter")
    entropy = torch.full((N,), 2.0)
    stats = pk.TokenStats(None, entropy, entropy, torch.zeros(N), entropy, torch.full((N,), 9, dtype=torch.int32))
    out = pk.PAEC(pk.PAECConfig(), backend=backend)(stats, torch.ones(N, dtype=torch.bool))
    assert out.metrics["mean_entropy"].item() == pytest.approx(2, rel=1e-6)
    assert out.metrics["mask_sum"].item() == pytest.approx(N / 2, rel=1e-6)
    assert (out.mask == 0.5).all()
