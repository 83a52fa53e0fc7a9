"""Rows of logits that are hard in a known way, and how close a result must come to the float64 truth."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from paec_kernels import TokenStats, reference, token_stats

INF = math.inf
# Odd widths on both sides of the Triton kernels' 2,048 lanes, and the widths at which there is no second token.
WIDTHS = (1, 2, 3, 7, 130, 2047, 2049, 5003)


def flat(n: int, width: int, scale: float = 3.0) -> Tensor:
    """Returns N(0, scale) rows ``[n, width]`` on the default device, the same numbers on each."""
    generator = torch.Generator("cpu").manual_seed(width)
    rows = torch.randn(n, width, generator=generator, device="cpu") * scale
    return rows.to(torch.get_default_device())


def hard_rows() -> dict[str, Tensor]:
    """Float32 ``[V]`` rows by name, each with a finite result."""
    width = 5003
    noise = flat(1, width, 1.0)[0]
    return {
        "flat": 3 * noise,
        "around zero": noise,
        "nearly equal": 1e-3 * noise,
        "all equal": torch.full((width,), 1.5),
        "tied at three values": (3 * noise).round().clamp(-1, 1),
        "two equal maxima": torch.cat([torch.tensor([9.0, 9.0]), noise[2:]]),
        # The same lane of 2,048 three times over.
        "three equal maxima in a lane": noise.index_fill(0, torch.tensor([5, 2053, 4101]), 6.0),
        "one hot": torch.zeros(width).index_fill(0, torch.tensor([4000]), 100.0),
        "maximum far behind the first block": noise.index_fill(0, torch.tensor([4500]), 60.0),
        "first block masked": torch.cat([torch.full((2100,), -INF), noise[2100:]]),
        "all but one masked": torch.full((width,), -INF).index_fill(0, torch.tensor([3000]), 2.0),
        "masked with the lowest float": torch.cat([torch.full((2100,), torch.finfo(torch.float32).min), noise[2100:]]),
        "one at the largest float": noise.index_fill(0, torch.tensor([4500]), 3e38),
        "all at the lowest float": torch.full((width,), torch.finfo(torch.float32).min),
        "all at the largest float": torch.full((width,), torch.finfo(torch.float32).max),
        "as far apart as floats can be": torch.full((width,), -1.6e38).index_fill(0, torch.arange(2050, 2080), 1.6e38),
        "all minus zero": torch.full((width,), -0.0),
        "zeros of both signs on top": (-noise.abs())
        .index_fill(0, torch.arange(0, 900, 2), 0.0)
        .index_fill(0, torch.arange(1, 901, 2), -0.0),
        "near 5,000": 5000 + noise,
        "near -5,000": -5000 + noise,
        "spread over 10,000": 3000 * noise,
        "lanes full": noise.index_fill(0, torch.arange(0, width, 2048), 8.0).index_add_(
            0, torch.arange(64, 192), torch.full((128,), 5.0)
        ),
        "descending": torch.linspace(20, -20, width),
        "power of the lane": -torch.arange(width).float() / 700,
    }


def rows_with_a_hidden_tie() -> dict[str, tuple[Tensor, float]]:
    """Rows and top_p whose nucleus ends inside three tied logits, of which a place that keeps two drops the third."""
    base = torch.full((40_000,), -20.0).index_fill(0, torch.tensor([5]), 3.0)
    crowded = torch.full((5003,), -20.0)
    full_lanes = torch.arange(100, 228).repeat(3) + 2048 * torch.arange(3).repeat_interleave(128)
    crowded[full_lanes] = 3.0 + 0.01 * flat(1, 384, 1.0)[0]
    crowded[400:410] = 2.0 + 0.03 * (torch.arange(10) - 4.7)  # other values in the bracket that is read last
    return {
        "in a lane": (base[:5003].index_fill(0, torch.tensor([7, 2055, 4103]), 2.0), 0.7),
        "in a place of gathered lanes": (base.index_fill(0, torch.tensor([7, 16_391, 32_775]), 2.0), 0.7),
        "in a lane of a reading": (crowded.index_fill(0, torch.tensor([300, 812, 1324]), 2.0), 0.9935),
    }


def broken_rows() -> dict[str, Tensor]:
    """Rows whose statistics and gradient are NaN."""
    noise = flat(1, 5003, 1.0)[0]
    return {
        "NaN": noise.index_fill(0, torch.tensor([4000]), math.nan),
        "NaN first": noise.index_fill(0, torch.tensor([0]), math.nan),
        "+inf": noise.index_fill(0, torch.tensor([4000]), INF),
        "+inf first": noise.index_fill(0, torch.tensor([0]), INF),
        "nothing finite": torch.full((5003,), -INF),
        "NaN among masked": torch.full((5003,), -INF).index_fill(0, torch.tensor([100]), math.nan),
    }


# Views of logits ``[3, 8, 130]``; all but the last need no more than two strides for their rows.
STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted slice": lambda t: t[:, 1:],
    "every other row": lambda t: t[:, ::2],
    "transposed rows": lambda t: t.transpose(0, 1),
    "columns apart": lambda t: t[..., ::2],
    "one step of a sequence": lambda t: t[:, 3],
    "three strides": lambda t: t.view(3, 2, 4, -1)[:, :, :3].transpose(0, 2),
}


TANH_ROUNDINGS = 3  # of float32, by which the kernels' tanh may be off: see test_the_kernels_tanh


class Truth(NamedTuple):
    """The reference in float64 and in float32, and what rounding leaves open."""

    exact: TokenStats
    eager: TokenStats
    ambiguous: Tensor  # bool, where the nucleus is decided by rounding
    rounding: Tensor | float  # of the largest softcap * tanh(z / softcap) / T of each row; 0 without a softcap


def truth_of(logits: Tensor, token_ids: Tensor | None, top_p: float = 0.95, **options) -> Truth:
    exact = reference.token_stats(logits.double(), token_ids, top_p=top_p, **options)
    eager = reference.token_stats(logits.float(), token_ids, top_p=top_p, **options)
    wider = reference.token_stats(logits.double(), token_ids, top_p=min(1.0, top_p * (1 + 2e-6)), **options)
    narrower = reference.token_stats(logits.double(), token_ids, top_p=top_p * (1 - 2e-6), **options)
    # At top_p = 1 every finite token belongs, and nothing is left to rounding.
    ambiguous = (wider.nucleus_size != narrower.nucleus_size) & (top_p < 1)
    return Truth(exact, eager, ambiguous, capped_rounding(logits, **options))


def capped_rounding(
    logits: Tensor,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    valid: Tensor | None = None,
) -> Tensor | float:
    if softcap is None:
        return 0.0
    z = logits.detach()[..., :vocab_size].double()
    largest = torch.where(z.isfinite(), softcap * (z / softcap).tanh(), 0.0).abs().amax(-1)
    return TANH_ROUNDINGS * torch.finfo(torch.float32).eps * largest / temperature


def check_against(stats: TokenStats, truth: Truth) -> None:
    """Errors at most eager's + 1e-5, NaN and inf in the same places, sizes equal but where rounding decides."""
    for name in ("logp", "entropy", "nucleus_entropy", "margin", "lse"):
        value, exact, eager = (getattr(s, name) for s in (stats, truth.exact, truth.eager))
        if exact is None:
            assert value is None
            continue
        assert value.dtype == torch.float32
        assert torch.equal(value.isnan(), exact.isnan()), name
        assert torch.equal(value.isinf(), exact.float().isinf()), name
        finite = exact.float().isfinite()
        if name == "nucleus_entropy":
            finite = finite & ~truth.ambiguous
        error = (value.double() - exact)[finite].abs()
        eager_error = (eager.double() - exact)[finite].abs()
        rounding = torch.finfo(torch.float32).eps * exact.abs() + truth.rounding
        assert (error <= torch.maximum(eager_error, rounding[finite]) + 1e-5).all(), (
            f"{name}: {error.max():.2e}, eager {eager_error.max():.2e}"
        )
    assert stats.nucleus_size.dtype == torch.int32
    wrong = (stats.nucleus_size != truth.exact.nucleus_size) & ~truth.ambiguous
    assert not wrong.any(), f"sizes {stats.nucleus_size[wrong].tolist()} for {truth.exact.nucleus_size[wrong].tolist()}"


def check_same_bits(stats: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    for value, other in zip(stats, expected, strict=True):
        assert value is other is None or torch.equal(value.nan_to_num(7.0), other.nan_to_num(7.0))


def check_values(backend: str, logits: Tensor, token_ids: Tensor | None, **options) -> Truth:
    truth = truth_of(logits, token_ids, **options)
    check_against(token_stats(logits, token_ids, backend=backend, **options), truth)
    return truth


def is_uncertain(stats: TokenStats) -> bool:
    """Tell whether a row's distribution is finite and not one-hot, so that its statistics and gradient are not 0."""
    return bool((stats.entropy > 1e-6).any())


def gradient_of(statistics: Callable[[Tensor], TokenStats], logits: Tensor, weights: Tensor) -> Tensor:
    """d/dlogits, as they lie in memory, of the sum of weights ``[3, N]`` times (logp, entropy, nucleus_entropy)."""
    leaf = logits.detach().requires_grad_()
    stats = statistics(leaf)
    rows = (stats.logp, stats.entropy, stats.nucleus_entropy)
    loss = sum((w * row.flatten()).sum() for w, row in zip(weights, rows, strict=True) if row is not None)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def check_gradient(
    backend: str, logits: Tensor, token_ids: Tensor | None, weights: Tensor, inplace: bool = False, **options
) -> None:
    """Error at most that of same-dtype eager autograd, in the same logits, + 1e-5; NaN in the same places.

    In place it is written over the logits.
    """
    expected = expected_gradient(logits, token_ids, weights, **options)
    got = gradient_of(
        # A leaf may not be written over, so in place it goes by another name.
        lambda z: token_stats(
            z.view_as(z) if inplace else z, token_ids, backend=backend, inplace_backward=inplace, **options
        ),
        logits,
        weights,
    )
    check_against_gradient(got, expected)


class ExpectedGradient(NamedTuple):
    """The reference's gradient in float64 and in the logits' dtype, what rounding leaves open, and in which rows."""

    exact: Tensor
    eager: Tensor
    rounding: Tensor
    ambiguous: Tensor


def expected_gradient(logits: Tensor, token_ids: Tensor | None, weights: Tensor, **options) -> ExpectedGradient:
    exact = gradient_of(lambda z: reference.token_stats(z, token_ids, **options), logits.double(), weights.double())
    eager = gradient_of(lambda z: reference.token_stats(z, token_ids, **options), logits, weights)
    truth = truth_of(logits, token_ids, **options)
    # One float32 rounding of the row's largest entry, where a small temperature makes that large; and what the
    # roundings of x = softcap * tanh(z / softcap) / T make of the gradient, whose own slope in x is at most 1 or so.
    rounding = torch.finfo(torch.float32).eps * exact.nan_to_num().abs().amax(-1)
    rounding += truth.rounding * (weights.abs().sum(0).view_as(rounding) / options.get("temperature", 1.0))
    return ExpectedGradient(exact, eager, rounding, truth.ambiguous)


def check_against_gradient(got: Tensor, expected: ExpectedGradient) -> None:
    exact, eager, rounding, ambiguous = expected
    assert got.dtype == eager.dtype
    assert torch.equal(got.isnan(), exact.isnan())
    error = (got.double() - exact).nan_to_num().abs().amax(-1)[~ambiguous]
    eager_error = (eager.double() - exact).nan_to_num().abs().amax(-1)[~ambiguous]
    assert (error <= torch.maximum(eager_error, rounding[~ambiguous]) + 1e-5).all(), (
        f"{error.max():.2e}, eager {eager_error.max():.2e}"
    )
