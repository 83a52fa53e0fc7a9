"""The Triton kernels and their PyTorch forms against the definitions, in float64."""

import dataclasses
import math

import pytest
import torch
from losses.batches import CONFIG, make_batch

from paec_kernels import reference
from paec_kernels.losses.mask import penalty_coefficients, position_score, soft_mask
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.train.algorithms import UNIFORM_TAU_M
from paec_kernels.types import TokenStats

pytestmark = pytest.mark.usefixtures("device")
SIZES = [1, 1024, 2500]
CONFIGS = {
    "log_size": CONFIG,
    "log_vocab": dataclasses.replace(CONFIG, nucleus_norm="log_vocab", alpha=0.3, tau_c=0.5),
    "none": dataclasses.replace(CONFIG, nucleus_norm="none", alpha=1.0),
}


def as_float32(stats: TokenStats) -> TokenStats:
    return TokenStats(None, *(x.detach().float() for x in stats[1:5]), stats.nucleus_size)


@pytest.mark.parametrize("norm", CONFIGS)
@pytest.mark.parametrize("n", SIZES)
def test_score(n, norm, backend):
    batch = make_batch(n)
    truth = reference.position_score(batch.stats, CONFIGS[norm])
    score = position_score(as_float32(batch.stats), batch.valid, CONFIGS[norm], backend)
    torch.testing.assert_close(score[batch.valid], truth[batch.valid].float(), rtol=2e-6, atol=1e-6)
    assert (score[~batch.valid] == math.inf).all()


def test_score_of_single_token_nuclei_and_other_integer_types(backend):
    stats = TokenStats(
        None,
        torch.tensor([0.0, 1e-3, 0.5]),
        torch.tensor([0.0, 1e-3, 0.5]),
        torch.tensor([math.inf, 30.0, 0.0]),
        torch.zeros(3),
        torch.tensor([1, 1, 2]),
    )
    score = position_score(stats, torch.ones(3, dtype=torch.bool), PAECConfig(), backend)
    torch.testing.assert_close(score, torch.tensor([0.0, 0.0, 0.5 * 0.5 / math.log(2) + 0.5]))


@pytest.mark.parametrize("index", [(slice(None), slice(None, -1)), (slice(None), 3)])
def test_score_of_strided_statistics(index, backend):
    batch = make_batch(6, 50)
    stats = as_float32(batch.stats)
    whole = position_score(stats, batch.valid, CONFIG, backend).view(6, 50)
    part = position_score(TokenStats(None, *(x[index] for x in stats[1:])), batch.valid[index], CONFIG, backend)
    assert torch.equal(part, whole[index].reshape(-1))


@pytest.mark.parametrize("n", SIZES)
def test_mask_and_its_sums(n, backend):
    batch = make_batch(n)
    stats = batch.stats
    truth, threshold = reference.soft_mask(reference.position_score(stats, CONFIG), batch.valid, CONFIG)
    score = position_score(as_float32(stats), batch.valid, CONFIG, backend)
    # Entropies at invalid positions must not be read.
    entropy = torch.where(batch.valid, stats.entropy.detach(), math.nan).float()
    mask, sums = soft_mask(score, entropy, threshold.float(), CONFIG.tau_m, backend)
    torch.testing.assert_close(mask, truth.float(), rtol=1e-5, atol=1e-5)
    assert (mask[~batch.valid] == 0).all()
    expected = torch.stack([truth.sum(), (truth * stats.entropy).sum()]).detach().float()
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("floor", [0.0, 5.0])
def test_coefficients_are_the_gradient_of_the_loss(n, floor, backend):
    mask = torch.rand(n, dtype=torch.float64)
    entropy = torch.rand(n, dtype=torch.float64, requires_grad=True)
    mean = (mask * entropy).sum() / mask.sum()
    loss = -CONFIG.beta * mean + CONFIG.lam * (floor - mean).clamp(min=0) ** 2
    slope, truth = torch.autograd.grad(loss, [mean, entropy])
    coefficient = penalty_coefficients(mask.float(), mask.sum().float(), slope.float(), backend)
    torch.testing.assert_close(coefficient, truth.float(), rtol=1e-5, atol=0)


def test_nothing_in_gives_nothing_out(backend):
    batch = make_batch(0)
    score = position_score(as_float32(batch.stats), batch.valid, CONFIG, backend)
    mask, sums = soft_mask(score, torch.empty(0), torch.tensor(math.nan), CONFIG.tau_m, backend)
    coefficient = penalty_coefficients(mask, sums[0], sums[1], backend)
    assert score.shape == mask.shape == coefficient.shape == (0,)
    assert torch.equal(sums, torch.zeros(2))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: 1 / 0
def test_no_valid_token_gives_zeros(backend):
    mask, sums = soft_mask(
        torch.full((5,), math.inf), torch.full((5,), math.nan), torch.tensor(math.nan), 0.05, backend
    )
    coefficient = penalty_coefficients(mask, sums[0], torch.tensor(-3.0), backend)
    assert torch.equal(mask, torch.zeros(5))
    assert torch.equal(sums, torch.zeros(2))
    assert torch.equal(coefficient, torch.zeros(5))


def test_a_uniform_mask_is_one_half_to_the_bit(backend):
    """What "paec-no-mask" is made of."""
    batch = make_batch(4, 50)
    score = position_score(as_float32(batch.stats), batch.valid, CONFIG, backend)
    for s in (score, score.double()):
        mask, _ = soft_mask(s, torch.ones_like(s), s.min(), UNIFORM_TAU_M, backend)
        assert (mask == torch.where(batch.valid.flatten(), 0.5, 0.0)).all()


def test_nan_is_not_hidden(backend):
    stats = as_float32(make_batch(4).stats)
    stats.margin[1] = math.nan
    valid = torch.tensor([True, True, True, False])
    score = position_score(stats, valid, CONFIG, backend)
    assert score.isnan().tolist() == [False, True, False, False]
    mask, sums = soft_mask(score, torch.ones(4), torch.tensor(math.nan), 0.05, backend)
    assert mask.isnan().tolist() == [True, True, True, False]
    assert sums.isnan().all()
    ones = torch.ones(3)
    for scalars in ((3.0, math.nan), (math.nan, -1.0)):
        assert penalty_coefficients(ones, *map(torch.tensor, scalars), backend).isnan().all()


def test_same_bits_in_every_run(backend):
    batch = make_batch(5000, dtype=torch.float32, p_valid=0.9)
    stats = batch.stats

    def run():
        score = position_score(stats, batch.valid, CONFIG, backend)
        mask, sums = soft_mask(score, stats.entropy, torch.tensor(0.6), CONFIG.tau_m, backend)
        return score, mask, sums, penalty_coefficients(mask, *sums, backend)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_float64_statistics_are_not_rounded_by_the_kernels():
    pytest.importorskip("triton", reason="the triton package is not installed")
    batch = make_batch(100)
    truth = reference.position_score(batch.stats, CONFIG)
    score = position_score(batch.stats, batch.valid, CONFIG, "triton")
    assert torch.equal(score[batch.valid], truth[batch.valid])


def test_operators_are_well_registered():
    pytest.importorskip("triton", reason="the triton package is not installed")
    batch = make_batch(1500, dtype=torch.float32)
    stats = as_float32(batch.stats)
    score = position_score(stats, batch.valid, CONFIG, "triton")
    threshold, slope = torch.tensor(0.6), torch.tensor(-1.0)
    mask, _ = soft_mask(score, stats.entropy, threshold, CONFIG.tau_m, "triton")
    torch.library.opcheck(
        torch.ops.paec.position_score.default,
        (stats.nucleus_entropy, stats.nucleus_size, stats.margin, batch.valid, 0.5, 1.0, 1.0, True),
    )
    torch.library.opcheck(torch.ops.paec.soft_mask.default, (score, stats.entropy, threshold, CONFIG.tau_m))
    torch.library.opcheck(torch.ops.paec.penalty_coefficients.default, (mask, mask.sum(), slope))
