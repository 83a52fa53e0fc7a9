"""What only a GPU shows: wide rows and grids, no wait for the host, CUDA graphs, memory, a second device.

The values and gradients of every other test run there too, by the fixtures `backend` and `device`.
"""

from collections.abc import Iterator

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
