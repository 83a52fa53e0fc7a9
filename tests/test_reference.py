"""The definition itself: against hand-computed cases, a sort written out in Python, and gradcheck."""

import math

import pytest
import torch

from paec_kernels import PAECConfig, reference

FLOATS = (torch.float32, torch.float64)


def test_hand_computed():
    # p = (1/2, 1/4, 1/8, 1/8)
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0]], dtype=torch.float64) * math.log(2)
    stats = reference.token_stats(logits, torch.tensor([1]), top_p=0.75)
    assert stats.logp.item() == pytest.approx(-2 * math.log(2))
    assert stats.entropy.item() == pytest.approx(1.75 * math.log(2))
    assert stats.nucleus_size.item() == 2
    # q = (2/3, 1/3)
    assert stats.nucleus_entropy.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    assert stats.margin.item() == pytest.approx(math.log(2))
    assert stats.lse.item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.95, 1.0])
def test_nucleus_against_a_loop(top_p):
    logits = torch.randn(20, 30, dtype=torch.float64)
    logits[10:] = logits[10:].round()  # many ties
    stats = reference.token_stats(logits, top_p=top_p)
    for row, size, entropy in zip(logits, stats.nucleus_size, stats.nucleus_entropy, strict=True):
        p = sorted(row.softmax(0).tolist(), reverse=True)
        n, mass = 0, 0.0
        while n < len(p) and mass < top_p - 1e-12:
            mass += p[n]
            n += 1
        q = [value / sum(p[:n]) for value in p[:n]]
        assert size == n
        assert entropy.item() == pytest.approx(-sum(value * math.log(value) for value in q), abs=1e-12)


def test_tied_tokens_have_equal_weights_whatever_their_order():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 4, 1, 0, 3]):
        weights, size = reference.nucleus_weights(logits[:, order], logits[:, order].softmax(-1), 0.85)
        assert size.item() == 3
        assert weights[0].tolist() == pytest.approx([[0, 2 / 3, 2 / 3, 2 / 3, 1][i] for i in order])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck(softcap):
    logits = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    token_ids = torch.tensor([0, -100, 7])

    def differentiable(z):
        return reference.token_stats(z, token_ids, temperature=0.7, softcap=softcap)[:3]

    assert torch.autograd.gradcheck(differentiable, logits)


def test_a_masked_token_has_the_slope_of_a_softcap_far_below():
    """1 - tanh^2, which is 0 there: the sampled token's share of dlogp/dz goes through it as all else does."""
    gradients = []
    for lowest in (-1e6, -math.inf):
        logits = torch.tensor([[1.0, 2.0, lowest]], dtype=torch.float64, requires_grad=True)
        stats = reference.token_stats(logits, torch.tensor([2]), softcap=5.0)
        gradients.append(torch.autograd.grad(stats.logp.sum(), logits)[0][0, 2].item())
    assert gradients == [0.0, 0.0]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("row", [[-math.inf, -math.inf], [-math.inf, math.nan], [math.inf, 1.0]])
def test_a_row_without_a_distribution_has_nan_as_its_gradient(row, softcap):
    logits = torch.tensor([row, [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    for value in reference.token_stats(logits, torch.tensor([0, 0]), softcap=softcap)[:3]:
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert gradient.isnan().tolist() == [[True, True], [False, False]]


def test_gradient_formulas():
    """METHOD's closed forms for dlogp/dz, dH/dz and dH_p/dz against autograd."""
    logits = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    temperature, token = 0.7, 3
    stats = reference.token_stats(logits, torch.tensor([token]), temperature=temperature, top_p=0.8)
    p = (logits / temperature).softmax(-1).detach()
    weights, _ = reference.nucleus_weights(logits.detach(), p, 0.8)
    q = p / (weights * p).sum()
    expected = {
        "logp": (torch.eye(12, dtype=p.dtype)[token] - p) / temperature,
        "entropy": -p * (p.log() + stats.entropy.detach()) / temperature,
        "nucleus_entropy": -weights * q * (q.log() + stats.nucleus_entropy.detach()) / temperature,
    }
    for name, gradient in expected.items():
        (got,) = torch.autograd.grad(getattr(stats, name).sum(), logits, retain_graph=True)
        assert torch.allclose(got, gradient, atol=1e-12), name


LEVELS = [(dtype, getattr(torch.finfo(torch.float32), end)) for dtype in FLOATS for end in ("min", "max")]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1e-6, torch.tensor([0.5])])
@pytest.mark.parametrize(("dtype", "level"), [*LEVELS, (torch.float64, 1e300), (torch.float64, -1e308)])
def test_equal_logits_are_uniform_at_any_level(dtype, level, temperature):
    logits = torch.full((1, 7), level, dtype=dtype).requires_grad_()
    token_ids = torch.tensor([3])
    stats = reference.token_stats(logits, token_ids, top_p=0.5, temperature=temperature)
    (gradient,) = torch.autograd.grad((stats.logp + stats.entropy + stats.nucleus_entropy).sum(), logits)
    assert stats.logp.item() == pytest.approx(-math.log(7))
    assert stats.entropy.item() == pytest.approx(math.log(7))
    assert stats.nucleus_entropy.item() == pytest.approx(math.log(4))
    assert stats.margin == 0
    assert stats.nucleus_size == 4
    temperature = float(temperature)
    expected = (torch.eye(7)[3] - 1 / 7) / temperature
    torch.testing.assert_close(gradient[0], expected.to(dtype), rtol=1e-5, atol=1e-5 / temperature)


def test_logits_beyond_float32_keep_their_digits():
    near = torch.randn(4, 30, dtype=torch.float64).requires_grad_()
    far = (near.detach() * 2.0**1000).requires_grad_()
    results = []
    for logits, temperature in ((near, 1.0), (far, 2.0**1000)):
        stats = reference.token_stats(logits, torch.arange(4), temperature=temperature)
        loss = (stats.logp + stats.entropy * stats.nucleus_entropy).sum()
        results.append((*(x.detach() for x in stats), torch.autograd.grad(loss, logits)[0] * temperature))
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_linear_is_token_stats_of_the_product():
    hidden, weight, bias = torch.randn(4, 8).double(), torch.randn(20, 8).double(), torch.randn(20).double()
    got = reference.linear_token_stats(hidden, weight, torch.arange(4), bias=bias, top_p=0.9)
    expected = reference.token_stats(hidden @ weight.T + bias, torch.arange(4), top_p=0.9)
    for value, other in zip(got, expected, strict=True):
        assert torch.allclose(value, other)


def test_score_and_mask_by_hand():
    config = PAECConfig(alpha=0.25, tau_c=2.0, rho=0.5, tau_m=0.1)
    stats = reference.TokenStats(
        None,
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([0.5, 0.0, 1.0]),
        torch.tensor([1.0, 4.0, 0.2]),
        torch.zeros(3),
        torch.tensor([4, 1, 8], dtype=torch.int32),
    )
    score = reference.position_score(stats, config)
    expected = [
        0.25 * 0.5 / math.log(4) + 0.75 * math.exp(-0.5),
        0.75 * math.exp(-2.0),
        0.25 * 1.0 / math.log(8) + 0.75 * math.exp(-0.1),
    ]
    assert score.tolist() == pytest.approx(expected)
    mask, threshold = reference.soft_mask(score, torch.tensor([True, True, False]), config)
    assert threshold.item() == pytest.approx((expected[0] + expected[1]) / 2)
    assert mask.tolist() == pytest.approx(
        [1 / (1 + math.exp(-(expected[0] - threshold.item()) / 0.1)), mask[1].item(), 0]
    )
    assert mask[0] + mask[1] == pytest.approx(1)


def test_penalty_is_one_sided():
    config = PAECConfig(beta=0.0, lam=2.0, rho_min=0.5, alpha=0.0)
    stats = reference.token_stats(torch.randn(6, 30).double())
    valid = torch.ones(6, dtype=torch.bool)
    loss, mask, metrics = reference.paec_loss(stats, valid, config)
    assert loss == 0
    mean = (mask * stats.entropy).sum() / mask.sum()
    assert metrics["mean_entropy"] == pytest.approx(mean.item())
    assert reference.paec_loss(stats, valid, config, anchor=2 * mean.item() - 0.1)[0] == 0
    low = reference.paec_loss(stats, valid, config, anchor=2 * mean.item() + 0.2)[0]
    assert low.item() == pytest.approx(2.0 * 0.1**2)
