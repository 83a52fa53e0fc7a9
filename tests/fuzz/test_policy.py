"""The policy losses, token by token in Python's floats; cuts into micro-batches; what must not matter."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from fuzz.fake_ranks import on_threads
from fuzz.properties import holds
from fuzz.strategies import mostly, seeds, sizes
from hypothesis import strategies as st
from torch import Tensor

from paec_kernels.losses.covariance import clip_cov_selection, kl_cov_selection
from paec_kernels.losses.policy import (
    MAX_LOG_RATIO,
    cispo_loss,
    clip_cov_loss,
    group_advantages,
    grpo_loss,
    kl_cov_loss,
)


class Batch(NamedTuple):
    """Float64 log-probs and what belongs to them, ``[B, T]``; advantages ``[B, 1]`` or ``[B, T]``."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    valid: Tensor
    ref_logp: Tensor
    selected: Tensor

    def rows(self, index: Tensor) -> "Batch":
        return Batch(*(x[index] for x in self))

    def leaf(self) -> "Batch":
        return self._replace(logp=self.logp.detach().clone().requires_grad_())

    def numbers(self, i: int, j: int) -> tuple[float, float, float, float]:
        """One token's log-prob, old log-prob, advantage and reference's log-prob."""
        logp, old, a, ref, _ = (x.expand(self.logp.shape)[i, j].item() for x in (*self[:3], *self[4:]))
        return logp, old, a, ref

    def poisoned(self, bad: float) -> "Batch":
        """With that at every position that is not valid."""
        advantages = self.advantages.expand(self.logp.shape)
        old = (self.logp, self.old_logp, advantages, self.ref_logp)
        logp, old_logp, advantages, ref_logp = (torch.where(self.valid, x, bad) for x in old)
        return Batch(logp, old_logp, advantages, self.valid, ref_logp, self.selected | ~self.valid)


@st.composite
def batches(draw: st.DrawFn, most: int = 5) -> Batch:
    shape = (draw(mostly(sizes(2, most), sizes(0, 1))), draw(mostly(sizes(2, 8), sizes(0, 1))))
    generator = torch.Generator().manual_seed(draw(seeds))
    spread = draw(mostly(st.sampled_from([0.3, 3.0, 40.0]), st.just(0.0)))
    p_valid = draw(mostly(st.sampled_from([0.7, 1.0, 0.3]), st.just(0.0)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    logp = -3 * torch.rand(shape, dtype=torch.float64, generator=generator) - draw(st.sampled_from([0.0, 100.0]))
    advantages = normal(shape[0], 1 if draw(st.booleans()) else shape[1]).mul(2)
    if draw(st.booleans()):
        advantages = advantages.round()
    return Batch(
        logp,
        logp + spread * normal(*shape),
        advantages,
        torch.rand(shape, generator=generator) < p_valid,
        logp + spread * normal(*shape),
        torch.rand(shape, generator=generator) < 0.3,
    )


def ratio_of(logp: float, old: float) -> float:
    return math.exp(min(logp - old, MAX_LOG_RATIO))


# Each token's part of the objective, by the formula in the loss' docstring.
def grpo_token(logp, old, a, ref, selected, low, high, kl):
    r = ratio_of(logp, old)
    d = min(ref - logp, MAX_LOG_RATIO)
    return min(r * a, min(max(r, 1 - low), 1 + high) * a) - kl * (math.exp(d) - d - 1)


def cispo_token(logp, old, a, ref, selected, low, high, kl):
    return min(max(ratio_of(logp, old), 1 - low), 1 + high) * a * logp


def clip_cov_token(logp, old, a, ref, selected, low, high, kl):
    return 0.0 if selected else grpo_token(logp, old, a, ref, selected, low, high, 0.0)


def kl_cov_token(logp, old, a, ref, selected, low, high, kl):
    return ratio_of(logp, old) * a - kl * (abs(min(logp - old, MAX_LOG_RATIO)) if selected else 0.0)


def grpo(b: Batch, low, high, kl, **options):
    return grpo_loss(*b[:4], clip_low=low, clip_high=high, ref_logp=b.ref_logp, kl_coef=kl, **options)


def cispo(b: Batch, low, high, kl, **options):
    return cispo_loss(*b[:4], clip_low=low, clip_high=high, **options)


def clip_cov(b: Batch, low, high, kl, **options):
    return clip_cov_loss(*b[:4], b.selected, clip_low=low, clip_high=high, **options)


def kl_cov(b: Batch, low, high, kl, **options):
    return kl_cov_loss(*b[:4], b.selected, kl_coef=kl, **options)


LOSSES: dict[str, tuple[Callable, Callable]] = {
    "grpo": (grpo, grpo_token),
    "cispo": (cispo, cispo_token),
    "clip-cov": (clip_cov, clip_cov_token),
    "kl-cov": (kl_cov, kl_cov_token),
}
each_loss = pytest.mark.parametrize("name", LOSSES)
clippings = st.tuples(st.floats(0, 1), st.floats(0, 3) | st.just(math.inf), st.sampled_from([0.1, 0.0, 2.0]))
# How many rows each micro-batch takes, the last what is left; none at all in some.
cuts = st.lists(mostly(sizes(1, 3), st.just(0)), min_size=1, max_size=4)


def objective(name: str, b: Batch, clipping: tuple, nudge: float = 0.0, only: tuple[int, int] | None = None) -> float:
    """The sum over valid tokens; ``only`` one of them, its log-prob nudged."""
    total = 0.0
    for i, j in b.valid.nonzero().tolist() if only is None else [only]:
        logp, old, a, ref = b.numbers(i, j)
        total += LOSSES[name][1](logp + nudge, old, a, ref, bool(b.selected[i, j]), *clipping)
    return total


@each_loss
@holds(tests=10, fuzz=700, batch=batches(), clipping=clippings)
def test_token_by_token(name, batch, clipping):
    loss, metrics = LOSSES[name][0](batch, *clipping)
    total = objective(name, batch, clipping)
    assert loss.item() == pytest.approx(-total / max(1, int(batch.valid.sum())), rel=1e-9, abs=1e-9)
    if batch.valid.any():
        pairs = zip(batch.logp[batch.valid].tolist(), batch.old_logp[batch.valid].tolist(), strict=True)
        ratios = [ratio_of(*pair) for pair in pairs]
        assert metrics["ratio_max"].item() == pytest.approx(max(ratios))
        assert metrics["ratio_mean"].item() == pytest.approx(sum(ratios) / len(ratios))
    return total != 0


@each_loss
@holds(tests=10, fuzz=300, batch=batches(most=2), clipping=clippings)
def test_the_gradient_is_the_formulas_slope(name, batch, clipping):
    """Between the kinks of clipping and of the bound; CISPO's is by definition that of its weight times logp."""
    leaf = batch.leaf()
    (gradient,) = torch.autograd.grad(LOSSES[name][0](leaf, *clipping, normalizer=1)[0], leaf.logp)
    assert (gradient[~batch.valid] == 0).all()
    low, high, _ = clipping
    for i, j in batch.valid.nonzero().tolist():
        logp, old, a, ref = batch.numbers(i, j)
        kinks = (MAX_LOG_RATIO, math.log(1 + high), math.log(1 - low) if low < 1 else -math.inf, 0.0)
        if min(abs(logp - old - kink) for kink in kinks) < 1e-4 or abs(ref - logp - MAX_LOG_RATIO) < 1e-4:
            continue
        if name == "cispo":
            slope = min(max(ratio_of(logp, old), 1 - low), 1 + high) * a
        else:
            step = 1e-6
            up, down = (objective(name, batch, clipping, nudge, (i, j)) for nudge in (step, -step))
            slope = (up - down) / (2 * step)
        # A difference of numbers this large, over twice the step.
        noise = 1e-9 * (1 + abs(objective(name, batch, clipping, 0.0, (i, j))))
        assert gradient[i, j].item() == pytest.approx(-slope, rel=1e-4, abs=1e-6 + noise)
    return bool((gradient != 0).any())


@each_loss
@holds(
    tests=10,
    fuzz=500,
    batch=batches(),
    clipping=clippings,
    cuts=cuts,
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    order=seeds,
)
def test_cuts_orders_and_invalid_positions_do_not_matter(name, batch, clipping, cuts, bad, order):
    whole = batch.leaf()
    loss, _ = LOSSES[name][0](whole, *clipping)
    (expected,) = torch.autograd.grad(loss, whole.logp)
    other = batch.poisoned(bad).leaf()
    mixed = torch.randperm(len(batch.logp), generator=torch.Generator().manual_seed(order))
    total, losses, n_valid = batch.valid.sum(), [], []
    for size in (*cuts, len(mixed)):
        rows, mixed = mixed[:size], mixed[size:]
        n_valid.append(int(batch.valid[rows].sum()))
        losses.append(LOSSES[name][0](other.rows(rows), *clipping, normalizer=total)[0])
    torch.testing.assert_close(sum(losses), loss, rtol=1e-10, atol=1e-12)
    (gradient,) = torch.autograd.grad(sum(losses), other.logp)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    return sum(n > 0 for n in n_valid) > 1 and bool((expected != 0).any())


@each_loss
@holds(tests=10, fuzz=300, batch=batches(), power=sizes(-8, 8), shift=st.floats(-5, 5))
def test_advantages_set_the_unit_and_only_ratios_count(name, batch, power, shift):
    clipping = (0.2, 0.28, 0.0)
    loss, _ = LOSSES[name][0](batch, *clipping)
    scaled, _ = LOSSES[name][0](batch._replace(advantages=batch.advantages * 2.0**power), *clipping)
    assert torch.equal(scaled, loss * 2.0**power)
    if name != "cispo":  # whose weight multiplies logp itself
        moved, _ = LOSSES[name][0](batch._replace(logp=batch.logp + shift, old_logp=batch.old_logp + shift), *clipping)
        # Ratios may pass a bound of the clipping by rounding, which moves nothing by more than that.
        torch.testing.assert_close(moved, loss, rtol=1e-9, atol=1e-9)
    return bool(loss != 0)


@holds(
    tests=10,
    fuzz=700,
    batch=batches(most=8),
    fraction=st.floats(0, 1),
    bounds=st.tuples(st.floats(-3, 3), st.floats(-3, 3)).map(sorted),
    cuts=cuts,
    ranks=sizes(1, 3),
    bad=st.sampled_from([math.nan, math.inf]),
    seed=seeds,
)
def test_a_selection_is_the_same_however_the_step_is_cut(batch, fraction, bounds, cuts, ranks, bad, seed):
    """Sums depend on how they are cut, but in float64 by less than any two covariances here differ."""
    pieces, first = [], 0
    for size in (*cuts, len(batch.logp)):
        size = min(size, len(batch.logp) - first)
        pieces.append((first, first + size))
        first += size
    shares = [pieces[len(pieces) * r // ranks : len(pieces) * (r + 1) // ranks] for r in range(ranks)]
    shares = [share or [(0, 0)] for share in shares]  # a rank has a micro-batch at least
    dirty = batch.poisoned(bad)

    def columns(b: Batch, pieces: list[tuple[int, int]]) -> list[list[Tensor]]:
        return [[x[slice(*piece)] for piece in pieces] for x in (b.logp, b.old_logp, b.advantages, b.valid)]

    def select(logp, old_logp, advantages, valid) -> list[Tensor]:
        options = {"seed": seed, "cov_low": bounds[0], "cov_high": bounds[1], "clip_low": 0.2, "clip_high": 0.28}
        clip = clip_cov_selection(logp, old_logp, advantages, valid, fraction=fraction, **options)
        kl = kl_cov_selection(logp, advantages, valid, fraction=fraction)
        return [torch.cat(clip), torch.cat(kl)]

    whole = select(*columns(batch, [(0, len(batch.logp))]))
    parts = on_threads(ranks, lambda r: select(*columns(dirty, shares[r])))
    n_valid = int(batch.valid.sum())
    for i, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[i] for part in parts]), expected)
        assert not (expected & ~batch.valid).any()
        assert int(expected.sum()) <= min(n_valid, max(1, int(fraction * n_valid)))
    assert int(whole[1].sum()) == min(n_valid, max(1, int(fraction * n_valid)))
    cut = sum(bool(batch.valid[slice(*piece)].any()) for piece in pieces) > 1
    return cut and 0 < int(whole[1].sum()) < n_valid


@holds(
    tests=10,
    fuzz=700,
    groups=mostly(sizes(1, 4), st.just(0)),
    samples=mostly(sizes(2, 9), st.just(1)),
    level=st.floats(-1e6, 1e6, width=32),
    scale=mostly(st.sampled_from([1e-3, 1.0, 1e5]), st.just(0.0)),
    seed=seeds,
)
def test_group_advantages(groups, samples, level, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = level + scale * torch.randn(groups, samples, generator=generator).double()
    advantages = group_advantages(rewards)
    assert advantages.shape == rewards.shape
    assert (advantages.sum(1).abs() <= 1e-6).all()
    if scale == 0 or samples == 1:
        assert (advantages == 0).all()
    elif groups:
        std = rewards.std(1, keepdim=True)
        torch.testing.assert_close(
            advantages, (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4), rtol=1e-5, atol=1e-5
        )
    order = torch.randperm(samples, generator=generator)
    torch.testing.assert_close(group_advantages(rewards[:, order]), advantages[:, order], rtol=1e-7, atol=1e-7)
    return bool((advantages != 0).any())
