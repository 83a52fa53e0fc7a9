"""The entropy regularisers that PAEC is compared with, each against a case worked out by hand."""

import io
import math

import pytest
import torch
from torch import Tensor

from paec_kernels import reference
from paec_kernels.losses.entropy_term import EntropyTerm
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

REGULARISERS = {
    "global": lambda: GlobalEntropy(GlobalEntropyConfig(coef=0.3)),
    "aer": lambda: AER(AERConfig(initial_coef=0.3)),
    "siren": lambda: with_anchor(SIREN(SIRENConfig(coef=0.3, rho=0.6)), 2.0),
}
each_regulariser = pytest.mark.parametrize("name", REGULARISERS)
ACCURACY = torch.tensor([[0.25], [1.0], [0.0]], dtype=torch.float64)


def with_anchor(regulariser, anchor: float):
    regulariser.anchor_sum.fill_(anchor)
    regulariser.anchor_count.fill_(1)
    return regulariser


def stats_of(entropy: Tensor, nucleus_entropy: Tensor | None = None) -> TokenStats:
    """Statistics of which only the entropies matter."""
    zero = torch.zeros_like(entropy)
    return TokenStats(zero, entropy, zero if nucleus_entropy is None else nucleus_entropy, zero, zero, zero.int())


def leaf(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def term(regulariser: EntropyTerm, stats: TokenStats, valid: Tensor, plan, accuracy: Tensor = ACCURACY) -> Tensor:
    return regulariser.term(stats, valid, plan, accuracy[: valid.shape[0]])


def whole_step(regulariser: EntropyTerm, stats: TokenStats, valid: Tensor) -> Tensor:
    regulariser.observe(stats, valid)
    return term(regulariser, stats, valid, regulariser.plan())


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


# What they share


def make_logits(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width = 0.1 + 4 * torch.rand(*shape, 1, dtype=torch.float64, generator=generator)
    logits = width * torch.randn(*shape, 12, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), torch.rand(shape, generator=generator) < 0.7


@each_regulariser
def test_gradients(name):
    logits, valid = make_logits(3, 7)

    def loss(z: Tensor) -> Tensor:
        return whole_step(REGULARISERS[name](), reference.token_stats(z, valid=valid), valid)

    assert torch.autograd.gradcheck(loss, logits)


@each_regulariser
def test_micro_batches_add_up_to_the_whole_step(name):
    logits, valid = make_logits(3, 40)
    whole = whole_step(REGULARISERS[name](), reference.token_stats(logits, valid=valid), valid)
    (true_grad,) = torch.autograd.grad(whole, logits)
    regulariser, rows = REGULARISERS[name](), (slice(0, 1), slice(1, 3), slice(3, 3))
    stats = [reference.token_stats(logits[r], valid=valid[r]) for r in rows]
    for s, r in zip(stats, rows, strict=True):
        regulariser.observe(s, valid[r])
    plan = regulariser.plan()
    total = sum(term(regulariser, s, valid[r], plan, ACCURACY[r]) for s, r in zip(stats, rows, strict=True))
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, logits)[0], true_grad, rtol=1e-10, atol=1e-15)


@each_regulariser
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_invalid_positions_reach_nothing(name, poison):
    logits, valid = make_logits(3, 40)
    stats = reference.token_stats(logits.detach(), valid=valid)
    clean = whole_step(REGULARISERS[name](), stats, valid)
    entropies = [torch.where(valid, x, poison).requires_grad_() for x in (stats.entropy, stats.nucleus_entropy)]
    loss = whole_step(REGULARISERS[name](), stats_of(*entropies), valid)
    assert torch.equal(loss, clean)
    for grad in torch.autograd.grad(loss, entropies, allow_unused=True):
        assert grad is None or (grad[~valid] == 0).all()


@each_regulariser
def test_a_nan_shows_in_the_loss_and_enters_no_state(name):
    stats = stats_of(torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, math.nan]]))
    regulariser = REGULARISERS[name]()
    before = str(regulariser.state_dict())
    assert whole_step(regulariser, stats, torch.ones(1, 2, dtype=torch.bool)).isnan()
    regulariser.step()
    assert str(regulariser.state_dict()) == before


@each_regulariser
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 7)])
def test_no_valid_token_is_exactly_nothing(name, shape):
    logits, valid = make_logits(*shape)
    regulariser = REGULARISERS[name]()
    before = str(regulariser.state_dict())
    loss = whole_step(regulariser, reference.token_stats(logits), torch.zeros_like(valid))
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()
    regulariser.step()
    assert str(regulariser.state_dict()) == before


@each_regulariser
def test_float32(name):
    logits, valid = make_logits(3, 40)
    true_loss = whole_step(REGULARISERS[name](), reference.token_stats(logits, valid=valid), valid)
    stats = reference.token_stats(logits.float(), valid=valid)
    regulariser = REGULARISERS[name]()
    regulariser.observe(stats, valid)
    loss = term(regulariser, stats, valid, regulariser.plan(), ACCURACY.float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, true_loss.float(), rtol=1e-5, atol=1e-7)


def test_a_plan_has_no_gradient_and_keeps_no_graph():
    logits, valid = make_logits(3, 7)
    regulariser = AER()
    regulariser.observe(reference.token_stats(logits), valid)
    assert not any(x.requires_grad for x in regulariser._observed)
    assert not any(x.requires_grad for x in regulariser.plan())


# State


def trained(regulariser: EntropyTerm, seeds=range(3)) -> EntropyTerm:
    for seed in seeds:
        logits, valid = make_logits(3, 40, seed=seed)
        whole_step(regulariser, reference.token_stats(logits.detach()), valid)
        regulariser.step()
    return regulariser


@pytest.mark.parametrize("kind", [GlobalEntropy, AER, SIREN])
def test_state_dict_round_trip_through_a_file(kind):
    regulariser, file = trained(kind()), io.BytesIO()
    torch.save(regulariser.state_dict(), file)
    file.seek(0)
    restored = kind()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.anchor.isfinite()
    assert restored.anchor == regulariser.anchor
    states = [str(trained(r, [7]).state_dict()) for r in (regulariser, restored)]
    assert states[0] == states[1]


def test_a_checkpoint_of_another_config_is_refused_and_changes_nothing():
    state = trained(AER()).state_dict()
    other = AER(AERConfig(target_ratio=0.5, coef_step=0.1, initial_coef=0.25))
    for strict in (True, False):
        with pytest.raises(RuntimeError) as error:
            other.load_state_dict(state, strict=strict)
        assert "another AERConfig (target_ratio: checkpoint 0.4, here 0.5; " in str(error.value)
        assert "coef_step: checkpoint 0.005, here 0.1" in str(error.value)
        assert other.anchor.isnan()
        assert other.coef == 0.25
    with pytest.raises(RuntimeError, match=r"top_p: checkpoint 'absent', here 0\.8"):
        SIREN().load_state_dict({name: value for name, value in state.items() if name != "coef"})


def test_a_checkpoint_without_a_whole_state_is_refused_and_changes_nothing():
    config = AERConfig(initial_coef=0.25)
    state = trained(AER(config)).state_dict()
    assert state["coef"] != 0.25
    regulariser = AER(config)
    with pytest.raises(RuntimeError, match=r"Missing key.*coef"):
        regulariser.load_state_dict({name: value for name, value in state.items() if name != "coef"})
    with pytest.raises(RuntimeError, match=r"coef must be a finite 0-d tensor >= 0, got tensor\(nan\)"):
        regulariser.load_state_dict(state | {"coef": torch.tensor(math.nan)})
    assert regulariser.anchor.isnan()
    assert regulariser.coef == 0.25


def test_the_coefficient_stays_float32_in_a_module_that_is_cast():
    regulariser = AER(AERConfig(initial_coef=1 / 3)).half()
    assert regulariser.coef.dtype == torch.float32
    assert regulariser.coef == torch.tensor(1 / 3)


# Misuse


@each_regulariser
def test_misuse_of_the_life_cycle(name):
    regulariser = REGULARISERS[name]()
    with pytest.raises(RuntimeError, match=r"call forward\(\) or plan\(\) before it"):
        regulariser.step()
    logits, valid = make_logits(3, 7)
    stats = reference.token_stats(logits)
    with pytest.raises(TypeError, match=r"plan must be the EntropyPlan .* got None"):
        term(regulariser, stats, valid, None)
    whole_step(regulariser, stats, valid)
    with pytest.raises(RuntimeError, match=r"plan\(\) was already made"):
        regulariser.plan()
    regulariser.step()
    with pytest.raises(RuntimeError, match=r"call forward\(\) or plan\(\) before it"):
        regulariser.step()


@each_regulariser
def test_bad_input_is_named_and_changes_nothing(name):
    logits, valid = make_logits(3, 7)
    stats, regulariser = reference.token_stats(logits), REGULARISERS[name]()
    with pytest.raises(ValueError, match=r"valid must have the shape of stats.entropy, \(3, 7\), got \(3, 6\)"):
        regulariser.observe(stats, valid[:, 1:])
    assert not regulariser._observed


def test_accuracy_must_fit():
    logits, valid = make_logits(3, 7)
    stats, regulariser = reference.token_stats(logits), AER()
    regulariser.observe(stats, valid)
    plan = regulariser.plan()
    with pytest.raises(ValueError, match=r"accuracy must have the shape of stats.entropy, .* got \(3,\)"):
        regulariser.term(stats, valid, plan, ACCURACY[:, 0])
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
        (lambda: AER(SIRENConfig()), TypeError, "config must be of type AERConfig, got SIRENConfig"),
    ],
)
def test_bad_config_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
