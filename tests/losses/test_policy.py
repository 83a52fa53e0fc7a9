import math

import pytest
import torch

from paec_kernels import reference
from paec_kernels.losses.policy import cispo_loss, clip_cov_loss, group_advantages, grpo_loss, kl_cov_loss

SHAPE = (4, 25)


def make_arguments(seed: int = 0, p_valid: float = 0.7, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(SHAPE, dtype=dtype, generator=generator) * 3
    old_logp = logp + 0.3 * torch.randn(SHAPE, dtype=dtype, generator=generator)
    advantages = torch.randn(SHAPE[0], 1, dtype=dtype, generator=generator)
    valid = torch.rand(SHAPE, generator=generator) < p_valid
    return logp.requires_grad_(), old_logp, advantages, valid


def gradient(loss: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logp)[0]


def losses_of(selected: torch.Tensor) -> dict:
    """Every loss as a function of logp, old_logp, advantages and valid; GRPO with its penalty, too."""
    return {
        "grpo": lambda p, old, *rest, **options: grpo_loss(p, old, *rest, ref_logp=old, kl_coef=0.1, **options),
        "cispo": cispo_loss,
        "clip-cov": lambda *args, **options: clip_cov_loss(*args, selected, **options),
        "kl-cov": lambda *args, **options: kl_cov_loss(*args, selected, **options),
    }


SELECTED = (torch.arange(100) % 3 == 0).reshape(SHAPE)
each_loss = pytest.mark.parametrize("name", losses_of(SELECTED))


# Each by its definition


def test_by_hand():
    # Ratios 2, 0.5, 2, 0.5, 1 with advantages 1, 1, -1, -1, 3; clipped to [0.8, 1.28] where that is lower:
    # 1.28, 0.5, -2, -0.8, 3: mean 1.98 / 5.
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 3.0], dtype=torch.float64)
    old_logp = torch.full((5,), -1.0, dtype=torch.float64)
    logp = (old_logp + ratios.log()).requires_grad_()
    loss, metrics = grpo_loss(logp, old_logp, advantages, torch.ones(5, dtype=torch.bool))
    torch.testing.assert_close(loss, torch.tensor(-1.98 / 5, dtype=torch.float64))
    # d(r A) / d logp = r A where it is not clipped.
    expected = -torch.tensor([0.0, 0.5, -2.0, 0.0, 3.0], dtype=torch.float64) / 5
    torch.testing.assert_close(gradient(loss, logp), expected)
    k3 = ratios - 1 - ratios.log()
    assert {name: pytest.approx(float(value)) for name, value in metrics.items()} == {
        "clip_fraction": 2 / 5,
        "clip_fraction_low": 1 / 5,
        "clip_fraction_high": 1 / 5,
        "approx_kl": float(k3.mean()),
        "ratio_mean": 6 / 5,
        "ratio_max": 2.0,
    }


@pytest.mark.parametrize("with_ref", [False, True])
def test_equals_the_definition(with_ref):
    logp, old_logp, advantages, valid = make_arguments()
    options = {"clip_low": 0.1, "clip_high": 0.3}
    if with_ref:
        options |= {"ref_logp": old_logp + 0.1 * torch.randn(SHAPE, dtype=torch.float64), "kl_coef": 0.3}
    expected = reference.grpo_loss(logp, old_logp, advantages, valid, **options)
    loss, metrics = grpo_loss(logp, old_logp, advantages, valid, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(loss, logp), gradient(expected, logp), rtol=1e-12, atol=1e-15)
    assert not any(value.requires_grad for value in metrics.values())
    if with_ref:
        log_ratio = (options["ref_logp"] - logp.detach())[valid]
        torch.testing.assert_close(metrics["ref_kl"], (log_ratio.exp() - log_ratio - 1).mean())


def test_cispo_by_hand():
    # Weights 2, 0.5, 2, 0.5, 1 bounded to at most 1.28, times A logp with logp = log r - 1:
    # 1.28 (log 2 - 1) (1 - 2) + 0.5 (-log 2 - 1) (1 - 1) + 3 (-1) = 1.28 * 0.3068528 - 3 = -2.6072284.
    ratios = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, -2.0, -1.0, 3.0], dtype=torch.float64)
    old_logp = torch.full((5,), -1.0, dtype=torch.float64)
    logp = (old_logp + ratios.log()).requires_grad_()
    loss, metrics = cispo_loss(logp, old_logp, advantages, torch.ones(5, dtype=torch.bool))
    assert float(loss.detach()) == pytest.approx(2.6072284 / 5, abs=1e-8)
    assert (-5 * gradient(loss, logp)).tolist() == pytest.approx([1.28, 0.5, -2.56, -0.5, 3.0])
    assert metrics["clip_fraction"] == metrics["clip_fraction_high"] == pytest.approx(2 / 5)
    assert metrics["clip_fraction_low"] == 0
    loss, metrics = cispo_loss(logp, old_logp, advantages, torch.ones(5, dtype=torch.bool), clip_low=0.2)
    assert (-5 * gradient(loss, logp)).tolist() == pytest.approx([1.28, 0.8, -2.56, -0.8, 3.0])
    assert metrics["clip_fraction_low"] == pytest.approx(2 / 5)


@pytest.mark.parametrize("name", ["clip-cov", "kl-cov"])
def test_gradients(name):
    logp, old_logp, advantages, valid = make_arguments()
    loss_fn = losses_of(SELECTED)[name]
    assert torch.autograd.gradcheck(lambda x: loss_fn(x, old_logp, advantages, valid)[0], logp)


def test_the_weight_of_cispo_is_a_constant_of_the_gradient():
    logp, old_logp, advantages, valid = make_arguments()
    weight = (logp - old_logp).detach().exp().clamp(max=1.28)
    expected = -(weight * advantages) / valid.sum() * valid
    torch.testing.assert_close(gradient(cispo_loss(logp, old_logp, advantages, valid)[0], logp), expected)


# What they share


@each_loss
def test_micro_batches_with_a_normalizer_add_up(name):
    arguments = make_arguments()
    logp, valid = arguments[0], arguments[-1]
    whole, metrics = losses_of(SELECTED)[name](*arguments)
    assert not any(value.requires_grad for value in metrics.values())
    true_gradient = gradient(whole, logp)
    for total in (valid.sum(), int(valid.sum())):
        parts = [
            losses_of(SELECTED[rows])[name](*(x[rows] for x in arguments), normalizer=total)[0]
            for rows in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(sum(parts), logp), true_gradient, rtol=1e-12, atol=0)


@each_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_invalid_positions_reach_nothing(name, poison):
    logp, old_logp, advantages, valid = make_arguments()
    loss_fn = losses_of(SELECTED)[name]
    clean, clean_metrics = loss_fn(logp, old_logp, advantages, valid)
    bad_logp = torch.where(valid, logp.detach(), poison).requires_grad_()
    bad_advantages = torch.where(valid, advantages.expand(SHAPE), poison)
    loss, metrics = loss_fn(bad_logp, torch.where(valid, old_logp, -poison), bad_advantages, valid)
    assert torch.equal(loss, clean)
    assert torch.equal(gradient(loss, bad_logp), gradient(clean, logp))
    assert metrics == clean_metrics


@each_loss
def test_no_valid_token(name):
    logp, old_logp, advantages, valid = make_arguments(p_valid=0)
    for normalizer in (None, 0, 7, torch.tensor(0), torch.tensor(0.0)):
        loss, metrics = losses_of(SELECTED)[name](logp, old_logp, advantages, valid, normalizer=normalizer)
        assert loss == 0
        assert torch.equal(gradient(loss, logp), torch.zeros(SHAPE, dtype=torch.float64))
        assert all(value == 0 for value in metrics.values())


def test_no_token():
    empty = torch.empty(0, 5)
    loss, metrics = grpo_loss(empty, empty, torch.empty(0, 1), empty.bool())
    assert loss == 0
    assert metrics["ratio_max"] == 0


@each_loss
def test_only_logp_receives_a_gradient(name):
    logp, old_logp, advantages, valid = make_arguments()
    others = [x.requires_grad_() for x in (old_logp, advantages)]
    loss, _ = losses_of(SELECTED)[name](logp, *others, valid)
    assert torch.autograd.grad(loss, others, allow_unused=True) == (None, None)


@each_loss
def test_compiles_into_one_graph(name):
    arguments, loss_fn = make_arguments(), losses_of(SELECTED)[name]
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments)[0], loss_fn(*arguments)[0])


# Bad input, and group_advantages


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"old_logp": [0.0]}, TypeError, r"old_logp must be a tensor, got \[0.0\]"),
        ({"logp": torch.zeros(SHAPE).long()}, TypeError, "logp must be a floating tensor, got torch.int64"),
        ({"valid": torch.ones(SHAPE)}, TypeError, "valid must be a bool tensor, got torch.float32"),
        ({"old_logp": torch.zeros(4)}, ValueError, r"old_logp must have the shape of logp, \(4, 25\), got \(4,\)"),
        ({"valid": torch.ones(SHAPE, device="meta").bool()}, ValueError, "valid must be on the device of logp"),
        ({"advantages": torch.zeros(4)}, ValueError, r"advantages must have .* \(4, 25\), .* got \(4,\)"),
        ({"advantages": torch.zeros(4, 5)}, ValueError, r"advantages must have .* got \(4, 5\)"),
        ({"ref_logp": torch.zeros(4, 1)}, ValueError, r"ref_logp must have .* got \(4, 1\)"),
        ({"clip_low": 1.5}, ValueError, r"clip_low must be in \[0, 1\], got 1.5"),
        ({"clip_high": math.nan}, ValueError, "clip_high must be >= 0, got nan"),
        ({"kl_coef": -1.0}, ValueError, "kl_coef must be >= 0, got -1.0"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef = 0.1 needs ref_logp, got None"),
        ({"normalizer": -3}, ValueError, "normalizer must be >= 0, got -3"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer must be a number or 0-d, got shape \(2,\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    names = ("logp", "old_logp", "advantages", "valid")
    arguments = dict(zip(names, make_arguments(dtype=torch.float32), strict=True)) | change
    with pytest.raises(error, match=message):
        grpo_loss(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, o, a, v: cispo_loss(p, o[:2], a, v), ValueError, r"old_logp must have the shape of logp, \(4, 25\)"),
        (lambda p, o, a, v: cispo_loss(p, o, a, v, clip_low=2), ValueError, r"clip_low must be in \[0, 1\], got 2"),
        (lambda p, o, a, v: clip_cov_loss(p, o, a, v, v.int()), TypeError, "removed must be a bool tensor"),
        (lambda p, o, a, v: clip_cov_loss(p, o, a, v, v[:, 1:]), ValueError, r"removed must have .* got \(4, 24\)"),
        (lambda p, o, a, v: clip_cov_loss(p, o, a, v, v, clip_high=-1), ValueError, "clip_high must be >= 0, got -1"),
        (lambda p, o, a, v: kl_cov_loss(p, o, a, v, None), TypeError, "penalised must be a tensor, got None"),
        (lambda p, o, a, v: kl_cov_loss(p, o, a, v, v, kl_coef=-1), ValueError, "kl_coef must be >= 0, got -1"),
        (lambda p, o, a, v: kl_cov_loss(p, o, a, v, v, normalizer=-1), ValueError, "normalizer must be >= 0, got -1"),
    ],
)
def test_bad_input_of_rivals_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*make_arguments(dtype=torch.float32))


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    advantages = group_advantages(rewards)
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[a, -a, -a, a], [0.0, 0.0, 0.0, 0.0]]))
    assert torch.equal(group_advantages(torch.tensor([[3.0]])), torch.zeros(1, 1))


EQUAL = (0.1, 1000.1, -3.3, 1 / 3, 1e-3, 6e4, 1e30, 1e-40, 5e-324, 1e300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_group_of_equal_rewards_has_advantage_exactly_0(dtype):
    values = torch.tensor(EQUAL, dtype=torch.float64).to(dtype)
    for n_samples in (1, 2, 3, 5, 7, 8, 9, 13, 64, 100, 257):
        rewards = values[values.isfinite()][:, None].expand(-1, n_samples)
        advantages = group_advantages(rewards)
        assert advantages.dtype == dtype
        assert (advantages == 0).all()


@pytest.mark.parametrize("level", [0.0, 1000.1, -1e6, 1e30])
def test_nearly_equal_rewards_are_told_apart_to_the_last_bit(level):
    """One reward of each group is the next float: its advantage is that of one right answer among wrong ones."""
    for n_samples in (2, 7, 8, 13):
        rewards = torch.full((1, n_samples), level, dtype=torch.float32)
        rewards[0, -1] = torch.nextafter(rewards[0, -1], torch.tensor(torch.inf))
        exact = rewards.double()
        centred = exact - exact.mean()
        expected = centred / (exact.std() + 1e-4)
        torch.testing.assert_close(group_advantages(rewards), expected.float(), rtol=1e-4, atol=1e-12)


def test_rewards_of_any_size():
    pattern = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    unscaled = (pattern - pattern.mean()) / pattern.std()
    for size in (1e37, 1e30, 1e10, 1.0, 1e-3, 1e-20, 1e-40):
        expected = unscaled * pattern.std() / (pattern.std() + 1e-4 / size)
        advantages = group_advantages((pattern * size).float())
        torch.testing.assert_close(advantages, expected.float(), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_shows_in_its_group_alone(bad):
    advantages = group_advantages(torch.tensor([[1.0, bad, 0.0], [bad, bad, bad], [1.0, 0.0, 0.0]]))
    assert advantages[:2].isnan().all()
    assert advantages[2].isfinite().all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_no_reward(shape):
    assert group_advantages(torch.zeros(shape)).shape == shape


def test_group_advantages_of_bad_input():
    with pytest.raises(ValueError, match=r"rewards must be \[groups, samples\], got shape \(3,\)"):
        group_advantages(torch.zeros(3))
    with pytest.raises(TypeError, match=r"rewards must be a tensor, got \[\[1.0, 2.0\]\]"):
        group_advantages([[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"rewards must be a floating tensor, got torch\.int64"):
        group_advantages(torch.zeros(3, 2, dtype=torch.int64))


def test_terms_of_weight_zero_are_zero_where_they_would_overflow():
    logp = torch.tensor([100.0, -1.0], requires_grad=True)
    old_logp, valid = torch.tensor([-200.0, -1.0]), torch.tensor([True, True])
    loss, _ = grpo_loss(
        logp, old_logp, torch.tensor([0.0, 1.0]), valid, ref_logp=torch.tensor([400.0, -1.0]), kl_coef=0.0
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.5)
    assert logp.grad.tolist() == pytest.approx([0.0, -0.5])
