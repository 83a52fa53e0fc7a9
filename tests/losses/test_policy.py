import math

import pytest
import torch

from paec_kernels import reference
from paec_kernels.losses.covariance import clip_cov_selection, kl_cov_selection
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


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_with_a_normalizer_add_up(as_tensor):
    logp, old_logp, advantages, valid = make_arguments()
    whole, _ = grpo_loss(logp, old_logp, advantages, valid)
    total = valid.sum() if as_tensor else int(valid.sum())
    parts = [
        grpo_loss(logp[rows], old_logp[rows], advantages[rows], valid[rows], normalizer=total)[0]
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(sum(parts), logp), gradient(whole, logp), rtol=1e-12, atol=0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_invalid_positions_reach_nothing(poison):
    logp, old_logp, advantages, valid = make_arguments()
    clean, clean_metrics = grpo_loss(logp, old_logp, advantages, valid, ref_logp=old_logp, kl_coef=0.1)
    bad_logp = torch.where(valid, logp.detach(), poison).requires_grad_()
    bad = torch.where(valid, old_logp, -poison)
    bad_advantages = torch.where(valid, advantages.expand(SHAPE), poison)
    loss, metrics = grpo_loss(bad_logp, bad, bad_advantages, valid, ref_logp=bad, kl_coef=0.1)
    assert torch.equal(loss, clean)
    assert torch.equal(gradient(loss, bad_logp), gradient(clean, logp))
    assert metrics == clean_metrics


@pytest.mark.parametrize("normalizer", [None, 0, 7, torch.tensor(0), torch.tensor(0.0)])
def test_no_valid_token(normalizer):
    logp, old_logp, advantages, valid = make_arguments(p_valid=0)
    loss, metrics = grpo_loss(logp, old_logp, advantages, valid, normalizer=normalizer)
    assert loss == 0
    assert torch.equal(gradient(loss, logp), torch.zeros(SHAPE, dtype=torch.float64))
    assert all(value == 0 for value in metrics.values())


def test_no_token():
    empty = torch.empty(0, 5)
    loss, metrics = grpo_loss(empty, empty, torch.empty(0, 1), empty.bool())
    assert loss == 0
    assert metrics["ratio_max"] == 0


def test_only_logp_receives_a_gradient():
    logp, old_logp, advantages, valid = make_arguments()
    others = [x.requires_grad_() for x in (old_logp, advantages)]
    loss, _ = grpo_loss(logp, *others, valid, ref_logp=(ref := torch.zeros_like(logp, requires_grad=True)))
    assert torch.autograd.grad(loss, [*others, ref], allow_unused=True) == (None, None, None)


def test_compiles_into_one_graph():
    logp, old_logp, advantages, valid = make_arguments()
    compiled = torch.compile(grpo_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    loss, _ = compiled(logp, old_logp, advantages, valid)
    torch.testing.assert_close(loss, grpo_loss(logp, old_logp, advantages, valid)[0])


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
        ({"clip_low": "a"}, TypeError, "clip_low must be a number, got 'a'"),
        ({"clip_high": None}, TypeError, "clip_high must be a number, got None"),
        ({"kl_coef": True}, TypeError, "kl_coef must be a number, got True"),
        ({"normalizer": "a"}, TypeError, "normalizer must be a number, got 'a'"),
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


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    advantages = group_advantages(rewards)
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    torch.testing.assert_close(advantages, torch.tensor([[a, -a, -a, a], [0.0, 0.0, 0.0, 0.0]]))
    assert torch.equal(group_advantages(torch.tensor([[3.0]])), torch.zeros(1, 1))


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


# Rivals


def rival_losses(valid: torch.Tensor) -> dict:
    """Every rival as a function of grpo_loss's arguments; a third of the tokens is selected."""
    selected = (torch.arange(valid.numel()) % 3 == 0).reshape(valid.shape)
    return {
        "cispo": cispo_loss,
        "clip-cov": lambda *args, **options: clip_cov_loss(*args, selected, **options),
        "kl-cov": lambda *args, **options: kl_cov_loss(*args, selected, **options),
    }


each_rival = pytest.mark.parametrize("name", ["cispo", "clip-cov", "kl-cov"])


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


# A step of five valid tokens in two micro-batches: logp has mean -3, A has mean 0,
# cov = 2 * 2, 1 * 0, -3 * -2 | 2 * -1, -2 * 1 = 4, 0, 6 | -2, -2.
LOGP = [torch.tensor([[-1.0, -2.0, -6.0]]), torch.tensor([[-1.0, -9.0], [-5.0, 7.0]])]
ADVANTAGES = [torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([[-1.0], [1.0]])]
VALID = [torch.tensor([[True, True, True]]), torch.tensor([[True, False], [True, False]])]


def test_clip_cov_by_hand():
    # Of 4, 0, 6, -2, -2 only the first is between 1 and 5. Ratios are 1, so the loss is
    # -(0 + 0 - 2 - 1 + 1) / 5, the first token removed.
    removed = clip_cov_selection(LOGP, LOGP, ADVANTAGES, VALID, seed=0)
    assert [mask.tolist() for mask in removed] == [[[True, False, False]], [[False, False], [False, False]]]
    losses, grads, fractions = [], [], []
    for logp, advantages, valid, mask in zip(LOGP, ADVANTAGES, VALID, removed, strict=True):
        leaf = logp.double().requires_grad_()
        loss, metrics = clip_cov_loss(leaf, logp.double(), advantages.double(), valid, mask, normalizer=5)
        losses.append(float(loss.detach()))
        grads.append((5 * gradient(loss, leaf)).tolist())
        fractions.append(float(metrics["selected_fraction"]))
    assert sum(losses) == pytest.approx(0.4)
    assert grads == [[[0.0, 0.0, 2.0]], [[1.0, 0.0], [-1.0, 0.0]]]
    assert fractions == pytest.approx([1 / 3, 0])


def test_kl_cov_by_hand():
    # The two highest of 4, 0, 6, -2, -2 are the first and the third. With ratios 2 and 1/2 there, 1 elsewhere:
    # -(2 * 2 + 0 - 2 / 2 - 1 + 1 - 0.5 * (log 2 + log 2)) / 5 = -(3 - 0.6931472) / 5.
    # Gradients of r A - 0.5 |log r|: 4 - 0.5, 0, -1 + 0.5 | -1, 1.
    penalised = kl_cov_selection(LOGP, ADVANTAGES, VALID, fraction=0.4)
    assert [mask.tolist() for mask in penalised] == [[[True, False, True]], [[False, False], [False, False]]]
    log_ratios = [torch.tensor([[2.0, 1.0, 0.5]]).log(), torch.zeros(2, 2)]
    losses, grads = [], []
    for i, mask in enumerate(penalised):
        leaf = LOGP[i].double().requires_grad_()
        old_logp = LOGP[i].double() - log_ratios[i].double()
        loss, metrics = kl_cov_loss(
            leaf, old_logp, ADVANTAGES[i].double(), VALID[i], mask, kl_coef=0.5, normalizer=torch.tensor(5)
        )
        losses.append(float(loss.detach()))
        grads.extend((-5 * gradient(loss, leaf)).flatten().tolist())
        if i == 0:
            assert metrics["selected_fraction"] == pytest.approx(2 / 3)
            assert metrics["ratio_max"] == pytest.approx(2.0)
    assert sum(losses) == pytest.approx(-(3 - 0.6931472) / 5, abs=1e-8)
    assert grads == pytest.approx([3.5, 0.0, -0.5, -1.0, 0.0, 1.0, 0.0], abs=1e-6)


@each_rival
def test_gradients_of_rivals(name):
    logp, old_logp, advantages, valid = make_arguments()
    loss_fn = rival_losses(valid)[name]
    if name == "cispo":  # its weight is a constant of the gradient
        weight = (logp - old_logp).detach().exp().clamp(max=1.28)
        expected = -(weight * advantages) / valid.sum() * valid
        torch.testing.assert_close(gradient(loss_fn(logp, old_logp, advantages, valid)[0], logp), expected)
    else:
        assert torch.autograd.gradcheck(lambda x: loss_fn(x, old_logp, advantages, valid)[0], logp)


@each_rival
def test_micro_batches_of_rivals_add_up(name):
    logp, old_logp, advantages, valid = make_arguments()
    whole, metrics = rival_losses(valid)[name](logp, old_logp, advantages, valid)
    assert not any(value.requires_grad for value in metrics.values())
    selected = (torch.arange(valid.numel()) % 3 == 0).reshape(SHAPE)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = [x[rows] for x in (logp, old_logp, advantages, valid)]
        loss_fn = {"cispo": cispo_loss, "clip-cov": clip_cov_loss, "kl-cov": kl_cov_loss}[name]
        extra = [] if name == "cispo" else [selected[rows]]
        parts.append(loss_fn(*part, *extra, normalizer=valid.sum())[0])
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(sum(parts), logp), gradient(whole, logp), rtol=1e-12, atol=0)


@each_rival
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_invalid_positions_reach_no_rival(name, poison):
    logp, old_logp, advantages, valid = make_arguments()
    loss_fn = rival_losses(valid)[name]
    clean, clean_metrics = loss_fn(logp, old_logp, advantages, valid)
    bad_logp = torch.where(valid, logp.detach(), poison).requires_grad_()
    bad_advantages = torch.where(valid, advantages.expand(SHAPE), poison)
    loss, metrics = loss_fn(bad_logp, torch.where(valid, old_logp, -poison), bad_advantages, valid)
    assert torch.equal(loss, clean)
    assert torch.equal(gradient(loss, bad_logp), gradient(clean, logp))
    assert metrics == clean_metrics


@each_rival
@pytest.mark.parametrize("normalizer", [None, 0])
def test_no_valid_token_for_a_rival(name, normalizer):
    logp, old_logp, advantages, valid = make_arguments(p_valid=0)
    loss, metrics = rival_losses(valid)[name](logp, old_logp, advantages, valid, normalizer=normalizer)
    assert loss == 0
    assert torch.equal(gradient(loss, logp), torch.zeros(SHAPE, dtype=torch.float64))
    assert all(value == 0 for value in metrics.values())


@each_rival
def test_rivals_compile_into_one_graph(name):
    logp, old_logp, advantages, valid = make_arguments()
    loss_fn = rival_losses(valid)[name]
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    loss, _ = compiled(logp, old_logp, advantages, valid)
    torch.testing.assert_close(loss, loss_fn(logp, old_logp, advantages, valid)[0])


# Selection


def make_step(n_rows: int = 40) -> tuple[list[torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(1)
    logp = -3 * torch.rand(n_rows, 25, generator=generator)
    old_logp = logp + 0.3 * torch.randn(n_rows, 25, generator=generator)
    advantages = 2 * torch.randn(n_rows, 1, generator=generator)
    valid = torch.rand(n_rows, 25, generator=generator) < 0.7
    return [logp], [old_logp], [advantages], [valid]


def in_pieces(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [piece for x in tensors for piece in (x[:7], x[7:7], x[7:30], x[30:])]


def covariance(logp: torch.Tensor, advantages: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    a = advantages.expand(logp.shape)
    return (logp - logp[valid].mean()) * (a - a[valid].mean())


def test_clip_cov_picks_at_random_among_the_candidates():
    step = make_step()
    (logp,), (old_logp,), (advantages,), (valid,) = step
    ratio = (logp - old_logp).exp()
    silenced = ((ratio > 1.28) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    cov = covariance(logp, advantages, valid)
    candidates = valid & ~silenced & (cov > 1) & (cov < 5)
    assert 20 < candidates.sum() < (valid & (cov > 1)).sum()
    clipping = {"clip_low": 0.2, "clip_high": 0.28}
    masks = [clip_cov_selection(*step, seed=seed, fraction=0.02, **clipping)[0] for seed in range(200)]
    assert all(int(mask.sum()) == int(0.02 * valid.sum()) for mask in masks)
    assert not any((mask & ~candidates).any() for mask in masks)
    often = torch.stack(masks).sum(0)[candidates]
    assert often.min() > 0.2 * often.float().mean()
    assert often.max() < 2 * often.float().mean()
    assert torch.equal(masks[3], clip_cov_selection(*step, seed=3, fraction=0.02, **clipping)[0])
    everything = clip_cov_selection(*step, seed=0, fraction=1.0, **clipping)[0]
    assert torch.equal(everything, candidates)


def test_kl_cov_takes_the_highest():
    (logp,), _, (advantages,), (valid,) = make_step()
    (mask,) = kl_cov_selection([logp], [advantages], [valid], fraction=0.05)
    cov = covariance(logp, advantages, valid)
    assert int(mask.sum()) == int(0.05 * valid.sum())
    assert cov[mask].min() > cov[valid & ~mask].max()
    assert not (mask & ~valid).any()


def test_selection_does_not_depend_on_the_micro_batches():
    logp, old_logp, advantages, valid = make_step()
    pieces = [in_pieces(x) for x in (logp, old_logp, advantages, valid)]
    whole = clip_cov_selection(logp, old_logp, advantages, valid, seed=5, fraction=0.02)
    assert torch.equal(torch.cat(clip_cov_selection(*pieces, seed=5, fraction=0.02)), whole[0])
    whole = kl_cov_selection(logp, advantages, valid, fraction=0.02)
    assert torch.equal(torch.cat(kl_cov_selection(pieces[0], pieces[2], pieces[3], fraction=0.02)), whole[0])


def test_at_least_one_token_is_selected_and_the_first_of_equals():
    logp, advantages, valid = (
        torch.zeros(1, 6),
        torch.zeros(1, 1),
        torch.tensor([[False, True, True, True, True, True]]),
    )
    (mask,) = kl_cov_selection([logp], [advantages], [valid], fraction=0.0)
    assert mask.tolist() == [[False, True, False, False, False, False]]


def test_selection_of_nothing():
    logp, old_logp, advantages, valid = make_step()
    none = [torch.zeros_like(valid[0])]
    assert not clip_cov_selection(logp, old_logp, advantages, none, seed=0)[0].any()
    assert not kl_cov_selection(logp, advantages, none)[0].any()
    assert not clip_cov_selection(logp, old_logp, advantages, valid, seed=0, cov_low=1e3, cov_high=2e3)[0].any()
    empty = [x[0][:0] for x in (logp, old_logp, advantages, valid)]
    assert clip_cov_selection(*[[x] for x in empty], seed=0)[0].shape == (0, 25)


def test_invalid_positions_do_not_change_the_selection():
    logp, old_logp, advantages, valid = make_step()
    bad = [torch.where(valid[0], logp[0], math.nan)]
    for call in (
        lambda x: clip_cov_selection(x, old_logp, advantages, valid, seed=0, fraction=0.02),
        lambda x: kl_cov_selection(x, advantages, valid, fraction=0.02),
    ):
        assert torch.equal(call(bad)[0], call(logp)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, o, a, v: cispo_loss(p, o[:2], a, v), ValueError, r"old_logp must have the shape of logp, \(4, 25\)"),
        (lambda p, o, a, v: cispo_loss(p, o, a, v, clip_low=2), ValueError, r"clip_low must be in \[0, 1\], got 2"),
        (lambda p, o, a, v: clip_cov_loss(p, o, a, v, v.int()), TypeError, "removed must be a bool tensor"),
        (lambda p, o, a, v: clip_cov_loss(p, o, a, v, v[:, 1:]), ValueError, r"removed must have .* got \(4, 24\)"),
        (lambda p, o, a, v: kl_cov_loss(p, o, a, v, None), TypeError, "penalised must be a tensor, got None"),
        (lambda p, o, a, v: kl_cov_loss(p, o, a, v, v, kl_coef=-1), ValueError, "kl_coef must be >= 0, got -1"),
        (lambda p, o, a, v: kl_cov_loss(p, o, a, v, v, normalizer=-1), ValueError, "normalizer must be >= 0, got -1"),
        (lambda p, o, a, v: kl_cov_selection([p], [a[:, 0]], [v]), ValueError, r"advantages must have .* got \(4,\)"),
        (lambda p, o, a, v: kl_cov_selection([p], [a], [v], fraction=2), ValueError, r"fraction must be in \[0, 1\]"),
        (lambda p, o, a, v: kl_cov_selection([p], [a], [v], fraction="a"), TypeError, "fraction must be a number"),
        (
            lambda p, o, a, v: clip_cov_selection([p], [o], [a], [v], seed=0, cov_low="a"),
            TypeError,
            "cov_low must be a number, got 'a'",
        ),
        (lambda p, o, a, v: kl_cov_selection([], [], []), ValueError, "at least one, got {'logp': 0"),
        (lambda p, o, a, v: kl_cov_selection([p], [a], [v, v]), ValueError, "'advantages': 1, 'valid': 2"),
        (
            lambda p, o, a, v: clip_cov_selection([p], [o], [a], [v], seed=0, cov_low=6),
            ValueError,
            "cov_low must be <= cov_high = 5.0, got 6",
        ),
    ],
)
def test_bad_input_of_rivals_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*make_arguments(dtype=torch.float32))
