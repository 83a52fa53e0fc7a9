"""On a real GPU: the compiled kernels against float64, launches without a host sync, CUDA graphs, wide grids."""

import pytest
import torch
from token_stats.rows import broken_rows, check_against, flat, gradient_of, hard_rows, truth_of

import paec_kernels as pk
from paec_kernels import reference

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_cpu(stats):
    return pk.TokenStats(*(None if value is None else value.cpu() for value in stats))


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_rows(real_logits, dtype):
    logits, token_ids = real_logits.logits.to(dtype), real_logits.token_ids
    stats = pk.token_stats(logits.cuda(), token_ids.cuda())
    check_against(on_cpu(stats), truth_of(logits, token_ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", hard_rows())
def test_hard_rows(name, dtype):
    logits, token_ids = hard_rows()[name].to(dtype)[None], torch.tensor([4321])
    for top_p in (0.95, 0.5, 1.0):
        stats = pk.token_stats(logits.cuda(), token_ids.cuda(), top_p=top_p)
        check_against(on_cpu(stats), truth_of(logits, token_ids, top_p=top_p))


@pytest.mark.parametrize("name", broken_rows())
def test_broken_rows(name):
    logits = torch.stack([flat(1, 5003)[0], broken_rows()[name]]).cuda()
    stats = pk.token_stats(logits)
    assert all(value[1].isnan() and value[0].isfinite() for value in stats[1:5])


@pytest.mark.parametrize("width", [1, 3, 2049, 32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(width, dtype):
    logits, token_ids = flat(4, width).to(dtype), torch.tensor([0, width // 2, width - 1, 0])
    check_against(on_cpu(pk.token_stats(logits.cuda(), token_ids.cuda())), truth_of(logits, token_ids))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "temperature": 1.3}, {"top_p": 1.0}])
def test_gradients(real_logits, dtype, options):
    logits, token_ids = real_logits.logits[::4].to(dtype), real_logits.token_ids[::4]
    weights = torch.randn(3, len(logits))
    got = gradient_of(lambda z: pk.token_stats(z, token_ids.cuda(), **options), logits.cuda(), weights.cuda()).cpu()
    exact = gradient_of(lambda z: reference.token_stats(z, token_ids, **options), logits.double(), weights.double())
    eager = gradient_of(lambda z: reference.token_stats(z, token_ids, **options), logits, weights)
    error = (got.double() - exact).abs().amax(-1)
    allowed = (eager.double() - exact).abs().amax(-1) + 1e-5
    assert (error <= allowed)[~truth_of(logits, token_ids, **options).ambiguous].all()


def test_a_row_is_the_same_to_the_bit_whatever_batch_it_is_in(real_logits):
    logits = real_logits.logits.cuda()
    together = pk.token_stats(logits)
    for rows in ([3], [31, 0, 7], list(range(31, -1, -1))):
        for value, expected in zip(pk.token_stats(logits[rows])[1:], together[1:], strict=True):
            assert torch.equal(value, expected[rows])


@pytest.mark.parametrize("inplace", [False, True])
def test_more_rows_than_a_grid_axis_and_more_elements_than_an_int32(inplace):
    n, width = 70_000, 32_768
    logits = torch.zeros(n, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with torch.no_grad():
        logits[-1, -1] = 9.0
    token_ids = torch.full((n,), width - 1, device="cuda")
    stats = pk.token_stats(logits * 1.0 if inplace else logits, token_ids, inplace_backward=inplace)
    expected = reference.token_stats(logits[-1:].detach().double(), token_ids[-1:])
    assert stats.logp[-1].item() == pytest.approx(expected.logp.item(), abs=1e-5)
    assert stats.logp[0].item() == pytest.approx(-torch.tensor(float(width)).log().item(), abs=1e-5)
    stats.logp.sum().backward()
    assert logits.grad[-1, -1].item() == pytest.approx(1 - expected.logp.exp().item(), rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_writes_the_same_gradient_over_the_logits(real_logits, dtype):
    leaf, token_ids = real_logits.logits.to("cuda", dtype).requires_grad_(), real_logits.token_ids.cuda()
    gradients = []
    for inplace in (False, True):
        logits = leaf * 1.0
        stats = pk.token_stats(logits, token_ids, inplace_backward=inplace)
        (gradient,) = torch.autograd.grad((stats.logp - stats.entropy + stats.nucleus_entropy).sum(), logits)
        assert (gradient.data_ptr() == logits.data_ptr()) == inplace
        gradients.append(gradient)
    assert torch.equal(*gradients)


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
    logits = real_logits.logits.cuda().requires_grad_()
    token_ids, valid = real_logits.token_ids.cuda(), torch.ones(32, dtype=torch.bool, device="cuda")

    def step():
        stats = pk.token_stats(logits, token_ids, valid=valid)
        (gradient,) = torch.autograd.grad((stats.logp - stats.entropy + stats.nucleus_entropy).sum(), logits)
        return stats, gradient

    stats, gradient = captured(step)
    expected_stats, expected_gradient = step()
    assert torch.equal(stats.entropy, expected_stats.entropy)
    assert torch.equal(gradient, expected_gradient)


def test_no_host_sync_and_capture_of_a_step_with_paec(real_logits):
    logits = real_logits.logits.cuda().requires_grad_()
    token_ids, valid = real_logits.token_ids.cuda(), torch.arange(32, device="cuda") % 5 > 0
    paec = pk.PAEC(pk.PAECConfig(anchor_steps=1, rho_min=1.5)).cuda()
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
    logits = torch.randn(512, 151_936, device="cuda", dtype=torch.bfloat16).requires_grad_()
    size = logits.numel() * logits.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stats = pk.token_stats(logits * 1.0, inplace_backward=True)
    (stats.entropy + stats.nucleus_entropy).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    # The product logits * 1.0 and, once that is overwritten with the gradient, its product with 1.0.
    assert extra < 2.01 * size
