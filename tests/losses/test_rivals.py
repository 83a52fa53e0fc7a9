"""The entropy regularisers that PAEC is compared with, each against a case worked out by hand."""

import math

import pytest
import torch
from losses.batches import accuracy_of, make_batch, whole_step, with_anchor
from torch import Tensor

from paec_kernels.losses.rivals import (
    AER,
    SIREN,
    AERConfig,
    GlobalEntropy,
    GlobalEntropyConfig,
    SIRENConfig,
    peak_positions,
)
from paec_kernels.types import TokenStats


def stats_of(entropy: Tensor, nucleus_entropy: Tensor | None = None) -> TokenStats:
    """Statistics of which only the entropies matter."""
    zero = torch.zeros_like(entropy)
    return TokenStats(zero, entropy, zero if nucleus_entropy is None else nucleus_entropy, zero, zero, zero.int())


def leaf(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


# By hand


def test_global_by_hand():
    # H = 1, 2 | 4 at valid tokens, mean 7 / 3; bonus 0.3 * 7 / 3 = 0.7, 0.1 for each nat.
    entropy = leaf([[1.0, 2.0], [4.0, 9.0]])
    valid = torch.tensor([[True, True], [True, False]])
    regulariser = GlobalEntropy(GlobalEntropyConfig(coef=0.3))
    loss = whole_step(regulariser, stats_of(entropy), valid)
    assert float(loss.detach()) == pytest.approx(-0.7)
    (grad,) = torch.autograd.grad(loss, entropy)
    assert grad.flatten().tolist() == pytest.approx([-0.1, -0.1, -0.1, 0.0])


def test_aer_by_hand():
    # Three answers of accuracy 1/4, 1, 0; N = 4 tokens; alpha = 0.4:
    # -0.4 / 4 * (3/4 (1 + 2) + 0 * 5 + 1 * 4) = -0.625.
    entropy = leaf([[1.0, 2.0], [5.0, 9.0], [4.0, 9.0]])
    valid = torch.tensor([[True, True], [True, False], [True, False]])
    regulariser = AER(AERConfig(initial_coef=0.4, target_ratio=0.5, coef_step=0.1))
    loss = whole_step(regulariser, stats_of(entropy), valid)
    assert float(loss.detach()) == pytest.approx(-0.625)
    (grad,) = torch.autograd.grad(loss, entropy)
    assert grad.flatten().tolist() == pytest.approx([-0.075, -0.075, 0.0, 0.0, -0.1, 0.0])


def test_aer_follows_its_target():
    # Mean entropies 3, 2, 1, 0.5, 1.5, 9; the target is half the first, 1.5; alpha moves by 0.1 a nat:
    # 0.4 -> 0.25 -> 0.2 -> 0.25 -> 0.35 -> 0.35 -> max(0, 0.35 - 0.75) = 0.
    regulariser = AER(AERConfig(initial_coef=0.4, target_ratio=0.5, coef_step=0.1))
    valid = torch.ones(1, 2, dtype=torch.bool)
    used, targets = [], []
    for mean in (3.0, 2.0, 1.0, 0.5, 1.5, 9.0, 1.0):
        regulariser.observe(stats_of(torch.tensor([[mean - 0.5, mean + 0.5]], dtype=torch.float64)), valid)
        plan = regulariser.plan()
        used.append(float(plan.coefficient))
        targets.append(float(plan.target))
        regulariser.step()
    assert used == pytest.approx([0.4, 0.25, 0.2, 0.25, 0.35, 0.35, 0.0])
    assert math.isnan(targets[0])
    assert targets[1:] == pytest.approx([1.5] * 6)


def test_siren_by_hand():
    # rho = 1/2. First answer: 0, 1, 2, 3, 4, median 2, peaks 3 and 4, mean 3.5. Second: 1, 5 (7 is not valid), median
    # 3, peak 5. Third: all equal, no peak, 0. H_bar = (3.5 + 5 + 0) / 3 = 17/6. The fourth has no token, so it is none.
    # From an anchor of 2: loss 0.6 (5/6)^2, slope 0.6 * 2 * 5/6 = 1, by position 1/3 * 1/2 and 1/3.
    nucleus_entropy = leaf([[0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 7.0, 5.0, 7.0, 7.0], [2.0] * 5, [9.0] * 5])
    valid = torch.ones(4, 5, dtype=torch.bool)
    valid[1, [1, 3, 4]] = False
    valid[3] = False
    regulariser = with_anchor(SIREN(SIRENConfig(coef=0.6, rho=0.5)), 2.0)
    loss = whole_step(regulariser, stats_of(torch.zeros(4, 5), nucleus_entropy), valid)
    assert float(loss.detach()) == pytest.approx(0.6 * 25 / 36)
    (grad,) = torch.autograd.grad(loss, nucleus_entropy)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    expected[0, 3] = expected[0, 4] = 1 / 6
    expected[1, 2] = 1 / 3
    torch.testing.assert_close(grad, expected)


def test_siren_takes_its_anchor_from_the_first_step():
    regulariser = SIREN(SIRENConfig(coef=1.0, rho=0.0))
    valid = torch.ones(1, 2, dtype=torch.bool)
    for peak, expected in ((3.0, 0.0), (5.0, 4.0), (1.0, 4.0)):  # (peak - 3)^2
        nucleus_entropy = leaf([[0.0, peak]])
        loss = whole_step(regulariser, stats_of(torch.zeros(1, 2), nucleus_entropy), valid)
        assert loss == expected
        assert torch.autograd.grad(loss, nucleus_entropy)[0].tolist() == [[0.0, 2 * (peak - 3.0)]]
        regulariser.step()


def test_peaks_are_the_top_fifth_of_each_answer():
    entropy = torch.rand(6, 200, dtype=torch.float64)
    valid = torch.rand(6, 200) < 0.7
    peaks = peak_positions(entropy, valid, 0.8)
    for row, ok, peak in zip(entropy, valid, peaks, strict=True):
        assert torch.equal(peak[ok], row[ok] > row[ok].quantile(0.8))
        assert not peak[~ok].any()


# Misuse


def test_accuracy_must_fit():
    batch, regulariser = make_batch(3, 7), AER()
    stats, valid = batch.stats, batch.valid
    regulariser.observe(stats, valid)
    plan = regulariser.plan()
    with pytest.raises(ValueError, match=r"accuracy must have the shape of stats.entropy, .* got \(3,\)"):
        regulariser.term(stats, valid, plan, accuracy_of(stats)[:, 0])
    with pytest.raises(TypeError, match=r"accuracy must be a tensor, got 0\.5"):
        regulariser.term(stats, valid, plan, 0.5)
    with pytest.raises(TypeError, match="accuracy must be a tensor, got None"):
        regulariser.term(stats, valid, plan)


def test_siren_needs_answers():
    with pytest.raises(ValueError, match=r"valid must be \[B, T\], a row for each answer, got shape \(4,\)"):
        SIREN().observe(stats_of(torch.zeros(4)), torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GlobalEntropyConfig(coef=-1), ValueError, "GlobalEntropyConfig.coef must be >= 0 and finite, got -1"),
        (lambda: AERConfig(coef_step=math.nan), ValueError, "AERConfig.coef_step must be >= 0 and finite, got nan"),
        (lambda: AERConfig(initial_coef=-1), ValueError, "AERConfig.initial_coef must be >= 0 and finite, got -1"),
        (lambda: AERConfig(target_ratio="1"), TypeError, "AERConfig.target_ratio must be a number, got '1'"),
        (lambda: SIRENConfig(rho=1.1), ValueError, r"SIRENConfig.rho must be in \[0, 1\], got 1.1"),
        (lambda: SIRENConfig(top_p=0), ValueError, r"SIRENConfig.top_p must be in \(0, 1\], got 0"),
        (lambda: SIRENConfig(coef=math.inf), ValueError, "SIRENConfig.coef must be >= 0 and finite, got inf"),
    ],
)
def test_bad_config_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
