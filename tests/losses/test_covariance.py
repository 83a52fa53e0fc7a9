"""What Clip-Cov and KL-Cov select over an optimiser step, and the losses of that by hand."""

import math

import pytest
import torch

from paec_kernels.losses.covariance import clip_cov_selection, kl_cov_selection
from paec_kernels.losses.policy import clip_cov_loss, kl_cov_loss

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
        grads.append((5 * torch.autograd.grad(loss, leaf)[0]).tolist())
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
        grads.extend((-5 * torch.autograd.grad(loss, leaf)[0]).flatten().tolist())
        if i == 0:
            assert metrics["selected_fraction"] == pytest.approx(2 / 3)
            assert metrics["ratio_max"] == pytest.approx(2.0)
    assert sum(losses) == pytest.approx(-(3 - 0.6931472) / 5, abs=1e-8)
    assert grads == pytest.approx([3.5, 0.0, -0.5, -1.0, 0.0, 1.0, 0.0], abs=1e-6)


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
        (lambda p, o, a, v: kl_cov_selection(p, [a[0][:, 0]], v), ValueError, r"advantages must have .* got \(40,\)"),
        (lambda p, o, a, v: kl_cov_selection(p, a, v, fraction=2), ValueError, r"fraction must be in \[0, 1\], got 2"),
        (lambda p, o, a, v: kl_cov_selection([], [], []), ValueError, "at least one, got {'logp': 0"),
        (lambda p, o, a, v: kl_cov_selection(p, a, v * 2), ValueError, "'advantages': 1, 'valid': 2"),
        (
            lambda p, o, a, v: clip_cov_selection(p, [o[0][1:]], a, v, seed=0),
            ValueError,
            "old_logp must have the shape",
        ),
        (
            lambda *step: clip_cov_selection(*step, seed=0, fraction="a"),
            TypeError,
            "fraction must be a number, got 'a'",
        ),
        (
            lambda *step: clip_cov_selection(*step, seed=0, clip_low=2),
            ValueError,
            r"clip_low must be in \[0, 1\], got 2",
        ),
        (lambda *step: clip_cov_selection(*step, seed=0, cov_low="a"), TypeError, "cov_low must be a number, got 'a'"),
        (lambda *step: clip_cov_selection(*step, seed=0, cov_high=math.nan), ValueError, "cov_high must be .* got nan"),
        (
            lambda *step: clip_cov_selection(*step, seed=0, cov_low=6),
            ValueError,
            "cov_low must be <= cov_high = 5.0, got 6",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*make_step())
