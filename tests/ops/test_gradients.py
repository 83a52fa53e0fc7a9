"""Gradients of both backends, and of the kernels on a GPU, against float64 autograd, by sign, and in place."""

import math

import pytest
import torch
from ops.rows import (
    STRIDED,
    WIDTHS,
    broken_rows,
    check_gradient,
    flat,
    gradient_of,
    hard_rows,
    rows_with_a_hidden_tie,
)

import paec_kernels as pk
from paec_kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("only", [None, 0, 1, 2])
def test_real_rows(backend, real_logits, dtype, only):
    logits, token_ids = real_logits.logits[::4].to(dtype), real_logits.token_ids[::4]
    weights = torch.randn(3, len(logits))
    if only is not None:
        weights[[i for i in range(3) if i != only]] = 0
    check_gradient(backend, logits, token_ids, weights)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"softcap": 20.0, "temperature": 1.3},
        {"vocab_size": 30_000},  # programs of the kernel that write padding alone
        {"top_p": 0.5},
        {"top_p": 1.0},
    ],
)
def test_options(backend, real_logits, options):
    logits, token_ids = real_logits.logits[::8].float(), real_logits.token_ids[::8] % 30_000
    check_gradient(backend, logits, token_ids, torch.randn(3, len(logits)), **options)


@pytest.mark.parametrize("name", hard_rows())
def test_hard_rows(backend, name):
    logits = hard_rows()[name][None]
    check_gradient(backend, logits, torch.tensor([4321]), torch.tensor([[1.0], [-0.7], [1.3]]))


@pytest.mark.parametrize("width", WIDTHS)
def test_widths(backend, width):
    token_ids = torch.tensor([0, width // 2, width - 1])
    check_gradient(backend, flat(3, width), token_ids, torch.randn(3, 3))
    check_gradient(backend, flat(3, width), token_ids, torch.randn(3, 3), inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_not_valid_ignored_tokens_and_padding_get_zero(backend, inplace):
    logits = flat(4, 200)
    logits[1] = math.nan
    valid = torch.tensor([True, False, True, True])
    options = {"valid": valid, "vocab_size": 150, "inplace_backward": inplace, "backend": backend}
    only_logp = torch.tensor([[1.0] * 4, [0.0] * 4, [0.0] * 4])
    gradient = gradient_of(
        lambda z: pk.token_stats(z * 1.0, torch.tensor([5, 10**6, -100, 7]), **options), logits, only_logp
    )
    assert (gradient[[1, 2]] == 0).all()
    assert (gradient[:, 150:] == 0).all()
    assert (gradient[[0, 3], :150] != 0).all()


@pytest.mark.parametrize("name", broken_rows())
def test_a_broken_row_has_nan_alone(backend, name):
    logits = torch.stack([flat(1, 5003)[0], broken_rows()[name], flat(1, 5003)[0]])
    gradient = gradient_of(
        lambda z: pk.token_stats(z, torch.tensor([1, 1, 1]), backend=backend), logits, torch.ones(3, 3)
    )
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


@pytest.mark.parametrize("place", rows_with_a_hidden_tie())
def test_a_tie_is_counted_whole(backend, place):
    """Sizes and entropies of these rows are right even where a tied token is missed; their gradients are not."""
    row, top_p = rows_with_a_hidden_tie()[place]
    check_gradient(backend, row[None], None, torch.tensor([[0.0], [0.0], [1.0]]), top_p=top_p)


def test_tied_tokens_share_a_gradient(backend):
    # Of the four tied tokens the nucleus takes two: whichever a sort would take, all get the same.
    logits = torch.tensor([[0.5, 0.125, 0.125, 0.125, 0.125]]).log()
    gradient = gradient_of(
        lambda z: pk.token_stats(z, top_p=0.7, backend=backend), logits, torch.tensor([[0.0], [0.0], [1.0]])
    )
    assert (gradient[0, 1:] == gradient[0, 1]).all()
    assert gradient[0, 1] > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_share_no_gradient(backend, dtype):
    """Four tokens a rounding above four others: the nucleus takes the four, and two of the others."""
    logits = torch.tensor([[3.0, *4 * [1.5 + torch.finfo(dtype).eps], *4 * [1.5]]]).to(dtype)
    check_gradient(backend, logits, None, torch.tensor([[0.0], [0.0], [1.0]]), top_p=0.82)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_equals_out_of_place_and_writes_over_the_logits(backend, real_logits, dtype):
    leaf = real_logits.logits[:6].to(dtype).requires_grad_()
    gradients = []
    for inplace in (False, True):
        logits = leaf * 1.0
        stats = pk.token_stats(logits, real_logits.token_ids[:6], inplace_backward=inplace, backend=backend)
        before = logits.detach().clone()
        (gradient,) = torch.autograd.grad((stats.logp - stats.entropy + stats.nucleus_entropy).sum(), logits)
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace
        assert torch.equal(logits.detach(), before) != inplace
        gradients.append(gradient)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", STRIDED)
def test_strided_logits(backend, name, inplace):
    """A view's gradient is that of its contiguous copy; around it the gradient is 0 and the memory as it was."""
    logits = flat(24, 130).view(3, 8, 130)
    view = STRIDED[name](logits)
    token_ids = torch.randint(view.shape[-1], view.shape[:-1])
    options = {"valid": torch.rand(token_ids.shape) < 0.7, "temperature": 0.5 + torch.rand(token_ids.shape)}
    weights = torch.randn(3, token_ids.numel())
    made = []

    def statistics(z, inplace=False):
        return pk.token_stats(z, token_ids, inplace_backward=inplace, backend=backend, **options)

    def statistics_of_the_view(leaf):
        made.append(leaf * 1.0)
        return statistics(STRIDED[name](made[0]), inplace)

    gradient = gradient_of(statistics_of_the_view, logits, weights)
    expected = torch.zeros_like(logits)
    STRIDED[name](expected).copy_(gradient_of(statistics, view.contiguous(), weights))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    if inplace:
        view.copy_(STRIDED[name](gradient))
    assert torch.equal(made[0].detach(), logits)


def test_in_place_over_what_another_function_saved_is_an_error(backend):
    leaf = torch.randn(3, 60, requires_grad=True)
    logits = leaf * 1.0
    square = logits.square().sum()  # saves logits, and its backward pass runs after the operator's
    stats = pk.token_stats(logits, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + stats.entropy.sum()).backward()


def test_in_place_twice_is_an_error(backend):
    logits = torch.randn(3, 60, requires_grad=True) * 1.0
    entropy = pk.token_stats(logits, inplace_backward=True, backend=backend).entropy.sum()
    entropy.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_second_derivative_is_an_error(backend, inplace):
    leaf = torch.randn(3, 60, requires_grad=True)
    entropy = pk.token_stats(leaf * 1.0, inplace_backward=inplace, backend=backend).entropy.sum()
    with pytest.raises(RuntimeError, match="token_stats has no second derivative"):
        torch.autograd.grad(entropy, leaf, create_graph=True)


def test_logits_changed_before_backward_are_an_error(backend):
    logits = torch.randn(3, 60, requires_grad=True) * 1.0
    entropy = pk.token_stats(logits, backend=backend).entropy.sum()
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        entropy.backward()


class WithoutGradient(torch.autograd.Function):
    """Passes its input on and gives no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("more", [(), (torch.ones(70, 60),)])
def test_no_gradient_arrives(backend, more):
    leaf = torch.randn(3, 60, requires_grad=True)
    function = pk.linear_token_stats if more else pk.token_stats
    stats = function(leaf, *(weight.to(leaf.device) for weight in more), backend=backend)
    (WithoutGradient.apply(stats.entropy).sum() + leaf.sum()).backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_statistics_without_a_gradient_may_be_written_over(backend):
    stats = pk.token_stats(torch.randn(3, 60), torch.tensor([1, 2, 3]), backend=backend)
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    expected = stats.entropy.clone()
    stats.entropy.mul_(weight)
    assert torch.equal(stats.entropy, expected * weight)


def test_margin_lse_and_size_carry_no_gradient(backend):
    stats = pk.token_stats(torch.randn(3, 60, requires_grad=True), torch.tensor([1, 2, 3]), backend=backend)
    assert [value.requires_grad for value in stats] == [True, True, True, False, False, False]


def test_two_losses_share_one_backward(backend):
    logits, token_ids = flat(3, 60), torch.tensor([1, 2, 3])
    leaf = logits.clone().requires_grad_()
    stats = pk.token_stats(leaf, token_ids, backend=backend)
    (stats.logp.sum() + (stats.logp * stats.entropy).sum()).backward()
    expected = logits.double().requires_grad_()
    stats = reference.token_stats(expected, token_ids)
    (stats.logp.sum() + (stats.logp * stats.entropy).sum()).backward()
    assert torch.allclose(leaf.grad.double(), expected.grad, atol=1e-5)
