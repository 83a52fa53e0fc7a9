"""What only a GPU shows: wide rows and grids, no wait for the host, CUDA graphs, streams, memory, a second device.

The values and gradients of every other test run there too, by the fixtures `backend` and `device`.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from ops.rows import check_gradient, check_values, flat

import paec_kernels as pk
from paec_kernels import reference

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _on_the_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32_000, 128_256, 151_936, 262_144])
def test_wide_rows(width, dtype):
    logits, token_ids = flat(4, width).to(dtype), torch.tensor([0, width // 2, width - 1, 0])
    check_values("auto", logits, token_ids)
    check_gradient("triton", logits, token_ids, torch.randn(3, 4))


@pytest.mark.parametrize("inplace", [False, True])
def test_more_rows_than_a_grid_axis_and_more_elements_than_an_int32(inplace):
    n, width = 70_000, 32_768
    logits = torch.zeros(n, width, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        logits[-1, -1] = 9.0
    token_ids = torch.full((n,), width - 1)
    stats = pk.token_stats(logits * 1.0 if inplace else logits, token_ids, inplace_backward=inplace)
    expected = reference.token_stats(logits[-1:].detach().double(), token_ids[-1:])
    assert stats.logp[-1].item() == pytest.approx(expected.logp.item(), abs=1e-5)
    assert stats.logp[0].item() == pytest.approx(-torch.tensor(float(width)).log().item(), abs=1e-5)
    stats.logp.sum().backward()
    assert logits.grad[-1, -1].item() == pytest.approx(1 - expected.logp.exp().item(), rel=1e-2)


def captured(step):
    """What a replay of the step's CUDA graph gives, after a run in which nothing may wait for the host."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    torch.cuda.synchronize()
    return results


def test_no_host_sync_and_capture_in_a_cuda_graph(real_logits):
    logits = real_logits.logits.requires_grad_()
    token_ids, valid = real_logits.token_ids, torch.ones(32, dtype=torch.bool)

    def step():
        stats = pk.token_stats(logits, token_ids, valid=valid)
        (gradient,) = torch.autograd.grad((stats.logp - stats.entropy + stats.nucleus_entropy).sum(), logits)
        return stats, gradient

    stats, gradient = captured(step)
    expected_stats, expected_gradient = step()
    assert torch.equal(stats.entropy, expected_stats.entropy)
    assert torch.equal(gradient, expected_gradient)


def test_no_host_sync_and_capture_of_a_step_with_paec(real_logits):
    logits = real_logits.logits.requires_grad_()
    token_ids, valid = real_logits.token_ids, torch.arange(32) % 5 > 0
    paec = pk.PAEC(pk.PAECConfig(anchor_steps=1, rho_min=1.5))
    paec(pk.token_stats(logits, valid=valid), valid)
    paec.step()  # the anchor is set, below its floor: the penalty is active

    def step():
        stats = pk.token_stats(logits, token_ids, valid=valid)
        out = paec(stats, valid)
        (gradient,) = torch.autograd.grad(out.loss - stats.logp.sum(), logits)
        paec.step()
        return out.loss, out.mask, gradient

    for value, expected in zip(captured(step), step(), strict=True):
        assert torch.equal(value, expected)
    assert paec.anchor_count == 1


def steps_to_capture() -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """Of every other entry point that waits for nothing: its loss and its gradient."""
    logits, hidden, weight = flat(12, 500), flat(12, 32), flat(500, 32)
    token_ids, valid = torch.arange(12).view(3, 4) * 40, torch.arange(12).view(3, 4) % 5 > 0
    accuracy, advantages = torch.tensor([[0.5], [1.0], [0.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    old_logp, chosen = -3 - torch.rand(3, 4), torch.rand(3, 4) < 0.3
    leaf, inner, head = (x.clone().requires_grad_() for x in (logits.view(3, 4, 500), hidden.view(3, 4, 32), weight))
    loss_fn = pk.PAECLoss(pk.PAECConfig(), inplace_backward=True)

    def drop_in():
        loss = loss_fn(1.0 * leaf, token_ids, advantages, valid, old_logp).loss
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    def linear():
        stats = pk.linear_token_stats(inner, head, token_ids)
        loss = (stats.logp - stats.entropy + stats.nucleus_entropy).sum()
        return loss.detach(), *torch.autograd.grad(loss, (inner, head))

    def one_pass():
        loss = pk.one_pass_loss(inner, head, token_ids, lambda stats, _: (stats.logp - stats.entropy).sum())
        return loss.detach(), *torch.autograd.grad(loss, (inner, head))

    def policy(loss_of, *more):
        def step():
            stats = pk.token_stats(leaf, token_ids, valid=valid)
            loss, metrics = loss_of(stats.logp, old_logp, advantages, valid, *more)
            return loss.detach(), *metrics.values(), *torch.autograd.grad(loss, leaf)

        return step

    def entropy_term(term):
        def step():
            stats = pk.token_stats(leaf, token_ids, valid=valid)
            term.observe(stats, valid)
            plan = term.plan()
            loss = term.term(stats, valid, plan, accuracy)
            return loss.detach(), *plan, *torch.autograd.grad(loss, leaf)

        return step

    return {
        "PAECLoss, in place": drop_in,
        "linear_token_stats": linear,
        "one_pass_loss": one_pass,
        "grpo_loss": policy(pk.grpo_loss),
        "cispo_loss": policy(pk.cispo_loss),
        "clip_cov_loss": policy(pk.clip_cov_loss, chosen),
        "kl_cov_loss": policy(pk.kl_cov_loss, chosen),
        "PAEC, in four calls": entropy_term(pk.PAEC(pk.PAECConfig())),
        "integral PAEC": entropy_term(pk.PAEC(pk.PAECConfig(penalty="integral"))),
        "GlobalEntropy": entropy_term(pk.GlobalEntropy()),
        "AER": entropy_term(pk.AER(pk.AERConfig(initial_coef=0.01))),
        "SIREN": entropy_term(pk.SIREN()),
    }


CAPTURED = (
    "PAECLoss, in place", "linear_token_stats", "one_pass_loss", "grpo_loss", "cispo_loss", "clip_cov_loss",
    "kl_cov_loss", "PAEC, in four calls", "integral PAEC", "GlobalEntropy", "AER", "SIREN",
)  # fmt: skip


@pytest.mark.parametrize("name", CAPTURED)
def test_no_host_sync_and_capture_of_every_entry_point(name):
    steps = steps_to_capture()
    assert tuple(steps) == CAPTURED
    for value, expected in zip(captured(steps[name]), steps[name](), strict=True):
        assert torch.equal(value.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


def test_streams_at_once_get_the_bits_of_one_alone():
    def run(logits):
        leaf = logits.clone().requires_grad_()
        stats = pk.token_stats(leaf, torch.arange(64))
        (stats.logp - stats.entropy + stats.nucleus_entropy).sum().backward()
        return *(value.detach() for value in stats), leaf.grad

    inputs = [flat(64, 50_000 + i).bfloat16() for i in range(4)]
    expected = [run(logits) for logits in inputs]
    streams, found = [torch.cuda.Stream() for _ in inputs], []
    for stream, logits in zip(streams, inputs, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(run(logits))
    torch.cuda.synchronize()
    for values, others in zip(found, expected, strict=True):
        assert all(map(torch.equal, values, others))


@pytest.mark.parametrize("inplace", [False, True])
def test_rows_far_apart(inplace):
    """Offsets beyond 2^31 by strides of rows and of columns."""
    pages = torch.empty(2**31 + 2**17, dtype=torch.bfloat16)
    for shape, strides in (((3, 300), (2**30 + 64, 1)), ((2, 300), (2**31 + 64, 1)), ((2, 5), (7, 2**29 + 1))):
        far, dense = pages.as_strided(shape, strides), flat(*shape).bfloat16()
        far.copy_(dense)
        gradients = []
        for leaf in (far.detach().requires_grad_(), dense.clone().requires_grad_()):
            logits = leaf.view_as(leaf)
            stats = pk.token_stats(logits, torch.arange(shape[0]), inplace_backward=inplace)
            gradients += torch.autograd.grad((stats.logp - stats.entropy + stats.nucleus_entropy).sum(), logits)
        assert torch.equal(*gradients)
        assert torch.equal(far, gradients[0] if inplace else dense)


def test_peak_memory_in_place_is_the_logits():
    logits = torch.randn(512, 151_936, dtype=torch.bfloat16).requires_grad_()
    size = logits.numel() * logits.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stats = pk.token_stats(logits * 1.0, inplace_backward=True)
    (stats.entropy + stats.nucleus_entropy).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    # The product logits * 1.0 and, once that is overwritten with the gradient, its product with 1.0.
    assert extra < 2.01 * size


def test_a_launch_on_a_second_device(real_logits):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, there is one")
    on_both = []
    for device in ("cuda:0", "cuda:1"):
        logits = real_logits.logits.to(device).requires_grad_()
        stats = pk.token_stats(logits, real_logits.token_ids.to(device))
        (stats.logp - stats.entropy + stats.nucleus_entropy).sum().backward()
        on_both.append([value.detach().cpu() for value in (*stats, logits.grad)])
    for first, second in zip(*on_both, strict=True):
        assert torch.equal(first, second)
