"""Faults that fused entropy and log-prob kernels are known for, looked for in each backend and in the linear form."""

import math
from collections.abc import Callable

import pytest
import torch
from ops.rows import check_against, flat, truth_of
from torch import Tensor

import paec_kernels as pk
from paec_kernels import reference

N, V = 4, 130
Statistics = Callable[..., pk.TokenStats]


@pytest.fixture(params=["logits", "linear"])
def statistics(request: pytest.FixtureRequest, backend: str) -> Statistics:
    """Statistics of logits: by themselves, or as hidden states of a head that is the identity."""
    if request.param == "logits":
        return lambda z, ids=None, **options: pk.token_stats(z, ids, backend=backend, **options)

    def through_a_head(z: Tensor, ids: Tensor | None = None, **options) -> pk.TokenStats:
        head = torch.eye(z.shape[-1], dtype=z.dtype)
        return pk.linear_token_stats(z, head, ids, chunk_rows=4, backend=backend, **options)

    return through_a_head


def gradients(stats: pk.TokenStats, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(stats.logp.sum() - stats.entropy.sum() + 2 * stats.nucleus_entropy.sum(), leaves)


def token_ids() -> Tensor:
    return torch.tensor([0, -100, 129, 77])


def check(statistics: Statistics, logits: Tensor, ids: Tensor, **options) -> None:
    """Values and gradients are the float64 reference's, gradients by the temperature that divides them."""
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    stats, expected = statistics(leaf, ids, **options), reference.token_stats(exact, ids, **options)
    check_against(stats, truth_of(logits, ids, **options))
    found, wanted = (
        x.double() * options.get("temperature", 1.0) for x in (*gradients(stats, leaf), *gradients(expected, exact))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [-5000.0, -1e4, -1e30])
def test_no_maximum_begins_at_0(statistics, level):
    noise = flat(N, V) * max(1.0, abs(level) * 1e-5)
    check(statistics, noise + level, token_ids(), temperature=max(1.0, abs(level) * 1e-5))


@pytest.mark.parametrize("masked", [slice(0, 1), slice(0, 100), slice(0, 127), slice(100, None)])
def test_masked_columns_are_no_0_times_infinity(backend, masked):
    ids, bias = (
        torch.full((N,), 128 if masked.stop else 3),
        torch.zeros(V).index_fill(0, torch.arange(V)[masked], -math.inf),
    )
    logits = flat(N, V)
    check(lambda z, ids, **options: pk.token_stats(z, ids, backend=backend, **options), logits + bias, ids)
    hidden, weight = (x.clone().requires_grad_() for x in (logits, torch.eye(V)))
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    stats = pk.linear_token_stats(hidden, weight, ids, bias=bias, chunk_rows=4, backend=backend)
    expected = reference.linear_token_stats(exact_hidden, exact_weight, ids, bias=bias.double())
    check_against(stats, truth_of(logits + bias, ids))
    for value, other in zip(
        gradients(stats, hidden, weight), gradients(expected, exact_hidden, exact_weight), strict=True
    ):
        torch.testing.assert_close(value.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "garbage"), [(V + 1, 1e4), (V + 1, math.nan), (192, math.inf)])
def test_columns_of_padding_do_not_count(backend, width, garbage):
    ids, logits = token_ids(), flat(N, V)
    expected = pk.token_stats(logits, ids, backend=backend)
    padded = torch.cat([logits, torch.full((N, width - V), garbage)], dim=1).requires_grad_()
    stats = pk.token_stats(padded, ids, vocab_size=V, backend=backend)
    (gradient,) = gradients(stats, padded)
    assert (gradient[:, V:] == 0).all()
    assert (gradient[:, :V] != 0).any(1).all()
    head = torch.cat([torch.eye(V), torch.full((width - V, V), garbage)]).requires_grad_()
    bias = torch.cat([torch.zeros(V), torch.full((width - V,), garbage)]).requires_grad_()
    linear = pk.linear_token_stats(logits, head, ids, bias=bias, vocab_size=V, backend=backend)
    for value in gradients(linear, head, bias):
        assert (value[V:] == 0).all()
        assert value.isfinite().all()
    for found in (stats, linear):
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value.detach(), other, rtol=1e-6, atol=1e-6)


def test_a_gradient_of_stride_0_is_read_as_any_other(statistics):
    """`sum` gives one number expanded over the rows, and a mask of one answer one row expanded over them."""
    ids, logits = token_ids().view(2, 2), flat(N, V).view(2, 2, V)
    found = []
    for weights in (torch.ones(2, 2), torch.ones(()).expand(2, 2), torch.ones(2, 1).expand(2, 2)):
        leaf = logits.clone().requires_grad_()
        stats = statistics(leaf, ids)
        found += [torch.autograd.grad(stats[:3], leaf, [weights] * 3)[0]]
    leaf = logits.clone().requires_grad_()
    stats = statistics(leaf, ids)
    found += [torch.autograd.grad(sum(x.sum() for x in stats[:3]), leaf)[0]]
    assert (found[0] != 0).any(-1).all()
    for gradient in found[1:]:
        assert torch.equal(gradient, found[0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows expanded": lambda z: z[:1].expand(N, V),
    "columns first": lambda z: z.T.contiguous().T,
    "columns apart": lambda z: z.repeat_interleave(2, dim=1)[:, ::2],
    "an odd offset": lambda z: torch.cat([z.new_zeros(3), z.flatten()])[3:].view(N, V),
    "rows and columns apart": lambda z: z.repeat_interleave(3, 0).repeat_interleave(2, 1)[::3, ::2],
    "columns expanded": lambda z: z[:, :1].expand(N, V),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_strides_have_the_gradient_of_their_copy(statistics, name):
    base = flat(N, V)
    found = []
    for copy in (False, True):
        leaf = base.clone().requires_grad_()
        view = LAYOUTS[name](leaf)
        assert copy or not view.is_contiguous() or view.storage_offset()
        stats = statistics(view.contiguous().clone() if copy else view, token_ids())
        found.append((*(x.detach() for x in stats), *gradients(stats, leaf)))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert (found[0][-1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_unaligned_ids(statistics, dtype):
    ids = torch.tensor([0, 64, 129, 5])
    logits, results = flat(N, V), []
    spread = torch.full((2 * N + 1,), 99, dtype=dtype)
    spread[1::2] = ids.to(dtype)
    offset = torch.cat([torch.zeros(1), ids]).to(dtype)[1:]
    for given in (ids, spread[1::2], offset):
        leaf = logits.clone().requires_grad_()
        stats = statistics(leaf, given)
        results.append((stats.logp.detach(), *gradients(stats, leaf)))
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("poison", [0.0, math.nan])
def test_a_batch_without_a_valid_token_gives_zeros_not_none(statistics, poison):
    leaf = torch.full((N, V), poison).requires_grad_()
    valid = torch.zeros(N, dtype=torch.bool)
    stats = statistics(leaf, torch.full((N,), 10**6), valid=valid)
    assert all((value == 0).all() for value in stats)
    paec = pk.PAEC(pk.PAECConfig(anchor_steps=1))
    out = paec(stats, valid)
    zeros = torch.zeros(N)
    policy_loss, metrics = pk.grpo_loss(stats.logp, zeros, zeros, valid)
    loss = policy_loss + out.loss
    assert loss == 0
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert (gradient == 0).all()
    before = paec.state_dict()
    paec.step()
    assert str(paec.state_dict()) == str(before)
    assert all(value == 0 for value in metrics.values())
    undefined = {name for name, value in out.metrics.items() if value.isnan()}
    of_no_token = {"mean_mask", "mask_on_certain", "floor_ratio", "bonus_per_token", "penalty_per_token"}
    assert undefined == {"threshold", "anchor", *of_no_token}
    assert all(value.isfinite() for name, value in out.metrics.items() if name not in undefined)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_16_bit_logits_are_float32(statistics, dtype):
    logits = flat(N, V).to(dtype)
    stats = statistics(logits, token_ids())
    assert [x.dtype for x in stats] == [torch.float32] * 5 + [torch.int32]
    check_against(stats, truth_of(logits, token_ids()))
    rounded = stats.entropy.to(dtype).float()
    assert (stats.entropy != rounded).any()


def test_a_threshold_is_of_the_whole_step(statistics):
    """A plan of each micro-batch by itself is another loss: PAEC's thresholds differ, and so do the gradients."""
    logits = torch.cat([0.2 * flat(2, V), 6 * flat(2, V)])
    valid, halves = torch.ones(N, dtype=torch.bool), (slice(0, 2), slice(2, 4))

    def step(groups: list[list[slice]]) -> tuple[Tensor, list[float]]:
        """The gradient of a step in which each group of micro-batches has a plan of its own."""
        leaf, thresholds = logits.clone().requires_grad_(), []
        for group in groups:
            paec = pk.PAEC(pk.PAECConfig(beta=1.0))
            for rows in group:
                paec.observe(statistics(leaf[rows].detach()), valid[rows])
            plan = paec.plan()
            thresholds.append(plan.threshold.item())
            for rows in group:
                paec.term(statistics(leaf[rows]), valid[rows], plan).backward()
        return leaf.grad, thresholds

    whole, (threshold,) = step([[slice(0, 4)]])
    accumulated, (same,) = step([list(halves)])
    apart, thresholds = step([[rows] for rows in halves])
    assert same == pytest.approx(threshold, rel=1e-6)
    torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)
    assert min(abs(each - threshold) for each in thresholds) > 1e-3
    assert (apart - whole).norm() > 0.1 * whole.norm()
