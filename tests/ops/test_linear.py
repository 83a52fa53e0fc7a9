"""The chunked front door: against float64 and eager, its chunks, its memory, and the settings it must work in."""

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ops.heads import head, logits_seen, run
from ops.rows import check_against, gradient_of, truth_of
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

import paec_kernels as pk
from benchmarks import peak_memory
from paec_kernels import reference
from paec_kernels.ops import linear as module
from paec_kernels.ops.chunks import choose_chunks, empty_logits


def check(case, backend, **options):
    """Errors against float64 at most those of the eager path in the same dtype, + 1e-5."""
    chunked = {name: options.pop(name) for name in ("chunk_rows",) if name in options}
    stats, gradients = run(pk.linear_token_stats, case, backend=backend, **chunked, **options)
    double = SimpleNamespace(**{
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in vars(case).items()
    })  # fmt: skip
    exact_stats, exact = run(reference.linear_token_stats, double, **options)
    eager_stats, eager = run(reference.linear_token_stats, case, **options)
    for name in ("logp", "entropy", "nucleus_entropy", "margin", "lse"):
        value, truth, other = (getattr(s, name) for s in (stats, exact_stats, eager_stats))
        assert (value - truth).abs().max() <= 1.2 * (other - truth).abs().max() + 1e-5, name
    for value, truth, other in zip(gradients, exact, eager, strict=True):
        assert value.dtype == other.dtype
        # 1.2: a largest error over thousands of elements is itself a random number.
        assert (value - truth).abs().max() <= 1.2 * (other - truth).abs().max() + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 5, 1000])
def test_values_and_gradients(backend, dtype, bias, chunk_rows):
    check(head(dtype=dtype, bias=bias), backend, chunk_rows=chunk_rows)


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"softcap": 8.0}, {"top_p": 0.5}, {"vocab_size": 333}])
def test_options(backend, options):
    case = head()
    case.token_ids = torch.where(case.token_ids < 0, case.token_ids, case.token_ids % 333)
    check(case, backend, chunk_rows=9, **options)


def test_temperature_per_row_and_rows_that_are_not_valid(backend):
    case = head()
    temperature = 0.5 + torch.rand(37)
    check(case, backend, chunk_rows=9, temperature=temperature, valid=case.valid)
    case.hidden[~case.valid] = math.nan
    case.token_ids[~case.valid] = 10**6
    stats, (d_hidden, d_weight) = run(pk.linear_token_stats, case, valid=case.valid, backend=backend)
    assert all((value[~case.valid] == 0).all() for value in stats)
    assert (d_hidden[~case.valid] == 0).all()
    assert d_hidden.isfinite().all()
    assert d_weight.isfinite().all()


def test_no_rows_and_no_valid_row(backend):
    for case in (head(n=3), head(n=3, bias=True)):
        case.token_ids = torch.tensor([1, 2, 3])
        stats, gradients = run(pk.linear_token_stats, case, valid=torch.zeros(3, dtype=torch.bool), backend=backend)
        assert all((value == 0).all() for value in (*stats, *gradients))
    hidden, weight = torch.empty(0, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    stats = pk.linear_token_stats(hidden, weight, torch.empty(0, dtype=torch.long), backend=backend)
    assert stats.logp.shape == (0,)
    stats.entropy.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert (weight.grad == 0).all()


def test_any_leading_shape_and_stride(backend):
    hidden, weight = torch.randn(3, 5, 8), torch.randn(60, 8)
    expected = pk.token_stats(linear(hidden[:, 1:], weight), backend=backend)
    stats = pk.linear_token_stats(hidden[:, 1:], weight, backend=backend)
    assert stats.entropy.shape == (3, 4)
    assert stats.logp is None
    assert torch.allclose(stats.nucleus_entropy, expected.nucleus_entropy, atol=1e-5)


@pytest.mark.parametrize("sizes", [(37, 24, 530), (300, 64, 5003), (129, 576, 4096)])
@pytest.mark.parametrize("threads", [1, 2])
def test_backward_sees_the_logits_that_forward_saw(sizes, threads):
    """To the bit, in float32: else the token at the nucleus' threshold drops out of the gradient."""
    case, before = head(*sizes), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for chunk_rows in (None, 7, 64):
            seen = logits_seen(case, chunk_rows)
            assert torch.equal(seen["forward"], seen["backward"])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("n_cols", [1, 32, 33, 50_257])
def test_rows_of_logits_begin_at_multiples_of_32_elements(n_cols):
    logits = empty_logits(3, n_cols, torch.empty(1, dtype=torch.bfloat16))
    assert logits.shape == (3, n_cols)
    assert logits.dtype == torch.bfloat16
    assert logits.stride() == (32 * math.ceil(n_cols / 32), 1)


@pytest.mark.parametrize("n_cols", [577, 592, 600])
def test_a_nan_row_and_what_lay_in_memory_reach_no_other_row(monkeypatch, n_cols):
    """With rows enough for the kernels that a CPU with AMX has for 16 bits, which read past a row's end."""

    def poisoned(*sizes, was=torch.empty, **options):
        made = was(*sizes, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    case = head(n=200, n_cols=n_cols, dtype=torch.bfloat16)
    case.hidden[40] = math.nan
    every_row = torch.arange(200)
    monkeypatch.setattr(torch, "empty", poisoned)
    stats, (d_hidden, _) = run(pk.linear_token_stats, case)
    assert every_row[stats.entropy.isnan()].tolist() == [40]
    assert every_row[d_hidden.isnan().any(1)].tolist() == [40]

    hidden = case.hidden.clone().requires_grad_()
    pk.one_pass_loss(hidden, case.weight, case.token_ids, lambda stats, rows: stats.entropy.sum()).backward()
    assert every_row[hidden.grad.isnan().any(1)].tolist() == [40]


def test_one_chunk_size_gives_one_result_and_others_round_differently(device):
    case = head(n=64, width=96)
    first = run(pk.linear_token_stats, case, chunk_rows=16)
    again = run(pk.linear_token_stats, case, chunk_rows=16)
    for value, other in zip((*first[0], *first[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(value, other)
    for chunk_rows in (7, 64):
        stats, gradients = run(pk.linear_token_stats, case, chunk_rows=chunk_rows)
        for value, other in zip((*first[0][:3], *first[1]), (*stats[:3], *gradients), strict=True):
            assert torch.allclose(value, other, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_d_hidden_is_summed_in_float32(device, dtype):
    """From one block of columns and from 64, whose products are added up: equal but for the last rounding."""
    case = head(n=64, width=32, n_cols=4096, dtype=dtype)
    gradients = []
    for chunk_rows in (64, 1):
        hidden = case.hidden.clone().requires_grad_()
        pk.linear_token_stats(hidden, case.weight, chunk_rows=chunk_rows).entropy.sum().backward()
        gradients.append(hidden.grad.double())
    one, many = gradients
    assert (many - one).norm() < 0.25 * torch.finfo(dtype).eps * one.norm()


def test_the_budget_decides_the_chunk(monkeypatch):
    monkeypatch.setenv("PAEC_CHUNK_BYTES", str(1 << 20))
    assert choose_chunks(4096, 1000, 64, torch.float32, False, 0) == (256, 64)
    # Beside the float32 sum of 4096 x 64 nothing is left of 1 MiB: an eighth of it.
    assert choose_chunks(4096, 1000, 64, torch.bfloat16, False, 0) == (512, 16)
    assert choose_chunks(10, 1000, 64, torch.float32, False, 0) == (10, 1000)
    assert choose_chunks(0, 1000, 64, torch.float32, False, 0).rows == 1
    monkeypatch.setenv("PAEC_CHUNK_BYTES", "1")
    assert choose_chunks(4096, 1000, 64, torch.float32, False, 0) == (1, 1)


@pytest.mark.parametrize("dropped", [False, True])
def test_default_chunk_is_under_5_percent_of_the_logits(dropped):
    n, width, n_cols = 16_384, 2_048, 151_936
    chunks = choose_chunks(n, n_cols, width, torch.bfloat16, dropped, 0)
    logits = 2 * n * n_cols
    assert 2 * chunks.rows * n_cols < 0.05 * logits
    assert 2 * chunks.columns * n + (4 + 2 * dropped) * n * width < 0.05 * logits


@pytest.mark.parametrize("text", ["0", "1.5"])
def test_a_wrong_budget_is_named(monkeypatch, text):
    monkeypatch.setenv("PAEC_CHUNK_BYTES", text)
    with pytest.raises(ValueError, match=f"PAEC_CHUNK_BYTES must be a positive number of bytes, got '{text}'"):
        pk.linear_token_stats(torch.randn(2, 4), torch.randn(5, 4))


N, WIDTH, V = 256, 256, 80_000
BUDGET = 4 << 20


def growth_in_new_process(dtype, with_valid):
    """Rise of the resident memory of forward and backward beyond the gradients, in bytes."""
    torch.set_num_threads(1)
    os.environ["PAEC_CHUNK_BYTES"] = str(BUDGET)
    case = head(N, WIDTH, V, dtype)
    case.weight *= 4  # peaked rows, as a trained model's: flat ones take more of the torch backend's scratch
    leaves = case.hidden.requires_grad_(), case.weight.requires_grad_()
    options = {"valid": case.valid} if with_valid else {}

    def statistics(hidden, weight, n):
        rows = {name: value[:n] for name, value in options.items()}
        stats = pk.linear_token_stats(hidden, weight, case.token_ids[:n], **rows)
        (stats.logp - stats.entropy + stats.nucleus_entropy).sum().backward()

    # Code is loaded, and the pool's threads with their scratch are there.
    statistics(leaves[0][:3].detach().requires_grad_(), leaves[1].detach(), 3)
    growth = peak_memory.growth(lambda: statistics(*leaves, N))
    return growth - sum(leaf.nbytes for leaf in leaves)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resident high-water mark")
@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_a_chunk(monkeypatch, dtype, with_valid):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(1 << 16))  # glibc gives freed buffers back at once
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        growth = process.submit(growth_in_new_process, dtype, with_valid).result()
    # Buffers and temporaries of the torch backend, about 8 MB as seen; they do not grow with N.
    backend_scratch = 16 << 20
    # A second d_weight would be 41 or 82 MB more, and so would the whole logits.
    assert growth < BUDGET + backend_scratch


@pytest.mark.gpu
@pytest.mark.parametrize("with_valid", [False, True])
def test_peak_memory_on_a_gpu_is_under_5_percent_of_the_logits(with_valid):
    n, width, n_cols = 16_384, 2_048, 151_936
    with torch.device("cuda"):
        hidden = torch.randn(n, width, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(n_cols, width, dtype=torch.bfloat16).mul_(3 / math.sqrt(width)).requires_grad_()
        token_ids = torch.randint(0, n_cols, (n,))
        valid = torch.rand(n) > 0.1 if with_valid else None

    def forward(n):
        rows = {"valid": None if valid is None else valid[:n]}
        stats = pk.linear_token_stats(hidden[:n], weight, token_ids[:n], **rows)
        return (stats.logp - stats.entropy + stats.nucleus_entropy).sum()

    def growth(function):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        return result, torch.cuda.max_memory_allocated() - before

    torch.autograd.grad(forward(64), (hidden, weight))  # kernels are compiled, and cuBLAS has its workspaces
    loss, in_forward = growth(lambda: forward(n))
    gradients, in_backward = growth(lambda: torch.autograd.grad(loss, (hidden, weight)))
    logits = 2 * n * n_cols
    assert in_forward < 0.05 * logits
    assert in_backward - sum(gradient.nbytes for gradient in gradients) < 0.05 * logits
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_scoring_keeps_nothing(monkeypatch, calls):
    monkeypatch.setenv("PAEC_CHUNK_BYTES", str(1 << 20))
    case = head(512, 32, 20_000)
    products = calls((module, "multiply"))
    with torch.no_grad():
        stats = pk.linear_token_stats(case.hidden, case.weight.requires_grad_(), case.token_ids)
    assert not stats.entropy.requires_grad
    tiles = math.ceil(512 / 13) * math.ceil(20_000 / choose_chunks(512, 20_000, 32, torch.float32, False, 0).columns)
    assert len(products) == tiles


def test_a_frozen_head_costs_no_product(monkeypatch, device):
    case = head()
    monkeypatch.setattr(torch, "mm", lambda *a, out, mm=torch.mm: _not_into(case.weight.shape, mm, a, out))
    hidden = case.hidden.clone().requires_grad_()
    pk.linear_token_stats(hidden, case.weight).entropy.sum().backward()
    exact = case.hidden.double().requires_grad_()
    reference.linear_token_stats(exact, case.weight.double()).entropy.sum().backward()
    assert torch.allclose(hidden.grad.double(), exact.grad, atol=1e-5)


def _not_into(shape, mm, arguments, out):
    assert out.shape[1] != shape[1], "a product of the weight's width: d_weight"
    return mm(*arguments, out=out)


def test_frozen_body_trains_the_head_alone(device):
    case = head()
    weight = case.weight.clone().requires_grad_()
    pk.linear_token_stats(case.hidden, weight).entropy.sum().backward()
    exact = case.weight.double().requires_grad_()
    reference.linear_token_stats(case.hidden.double(), exact).entropy.sum().backward()
    assert torch.allclose(weight.grad.double(), exact.grad, atol=1e-5)


def test_autocast(device):
    case = head()
    with torch.autocast(device, dtype=torch.bfloat16):
        stats, (d_hidden, d_weight) = run(pk.linear_token_stats, case)
    low = head()
    low.__dict__.update({k: v for k, v in vars(case).items() if k not in ("hidden", "weight")})
    low.hidden, low.weight = case.hidden.bfloat16(), case.weight.bfloat16()
    expected, (low_hidden, low_weight) = run(pk.linear_token_stats, low)
    assert torch.equal(stats.entropy, expected.entropy)
    assert d_hidden.dtype == d_weight.dtype == torch.float32
    assert torch.equal(d_hidden, low_hidden.float())
    assert torch.equal(d_weight, low_weight.float())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_around_it(use_reentrant):
    case = head()

    def entropy(hidden):
        return pk.linear_token_stats(torch.tanh(hidden), case.weight).entropy

    gradients = []
    for around in (False, True):
        hidden = case.hidden.clone().requires_grad_()
        out = checkpoint(entropy, hidden, use_reentrant=use_reentrant) if around else entropy(hidden)
        out.sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


def test_compile_without_graph_breaks():
    case = head(bias=True)

    def loss(hidden, weight, bias):
        stats = pk.linear_token_stats(hidden, weight, case.token_ids, bias=bias, valid=case.valid)
        return (stats.logp - stats.entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
        function(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for value, other in zip(*gradients, strict=True):
        assert torch.equal(value, other)


def test_opcheck():
    case = head(n=5, bias=True)
    rows = (case.token_ids, case.valid, torch.ones(1))
    forward = (case.hidden, case.weight, case.bias, *rows, 0.95, 0.0, 2, "torch")
    torch.library.opcheck(module.linear_token_stats_forward, forward)
    stats, rest, _ = module.linear_token_stats_forward(*forward)
    for needs in ((True, True, True), (False, True, False)):
        backward = (torch.randn_like(stats), stats, rest, *forward[:6], 0.0, 2, "torch", *needs)
        torch.library.opcheck(module.linear_token_stats_backward, backward)


BAD = [
    (TypeError, r"hidden must be a tensor, got \[1.0\]", lambda h, w: {"hidden": [1.0]}),
    (ValueError, r"hidden must have shape .*\(4, 8\) and \(20, 7\)", lambda h, w: {"weight": w[:, :7]}),
    (ValueError, r"weight \[V, D\]", lambda h, w: {"weight": w[None]}),
    (
        ValueError,
        r"D and V at least 1, got \(4, 0\) and \(20, 0\)",
        lambda h, w: {"hidden": h[:, :0], "weight": w[:, :0]},
    ),
    (ValueError, r"D and V at least 1, got \(4, 8\) and \(0, 8\)", lambda h, w: {"weight": w[:0]}),
    (ValueError, r"bias must have .*\(20,\), got \(19,\)", lambda h, w: {"bias": w[1:, 0]}),
    (TypeError, "bias must be a tensor, got 1.0", lambda h, w: {"bias": 1.0}),
    (TypeError, "weight must have the dtype of hidden.*float64", lambda h, w: {"weight": w.double()}),
    (TypeError, "hidden must be float32.*float64", lambda h, w: {"hidden": h.double(), "weight": w.double()}),
    (ValueError, "weight must be on .*meta", lambda h, w: {"weight": w.to("meta")}),
    (ValueError, "chunk_rows must be >= 1, got 0", lambda h, w: {"chunk_rows": 0}),
    (TypeError, "chunk_rows must be an int, got True", lambda h, w: {"chunk_rows": True}),
    (
        ValueError,
        r"token_ids must have the shape of hidden\[..., 0\]",
        lambda h, w: {"token_ids": torch.zeros(3).long()},
    ),
    (ValueError, r"token_ids must be .*\[0, 20\), got 20", lambda h, w: {"token_ids": torch.full((4,), 20)}),
    (
        ValueError,
        "token_ids must be .*got 20",
        lambda h, w: {"token_ids": torch.full((4,), 20), "backend": "reference"},
    ),
    (ValueError, r"top_p must be in \(0, 1\], got 2", lambda h, w: {"top_p": 2}),
    (ValueError, r"vocab_size must be in \[1, 20\], got 21", lambda h, w: {"vocab_size": 21}),
]


@pytest.mark.parametrize(("error", "message", "make"), BAD)
def test_bad_input_is_named(error, message, make):
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    with pytest.raises(error, match=message):
        pk.linear_token_stats(**({"hidden": hidden, "weight": weight} | make(hidden, weight)))


def test_hooks_around_the_node_that_makes_the_logits_again(calls):
    case = head()
    stats = pk.linear_token_stats(case.hidden.requires_grad_(), case.weight, case.token_ids)
    node = module.backward_node(stats)
    happened = calls((module, "multiply"))
    node.register_prehook(lambda gradients: happened.append("before"))
    node.register_hook(lambda inputs, outputs: happened.append("after"))
    stats.logp.sum().backward()
    assert happened == ["before", "multiply", "after"]
    with torch.no_grad():
        assert module.backward_node(pk.linear_token_stats(case.hidden, case.weight)) is None
    assert module.backward_node(pk.token_stats(case.hidden)) is None


def test_real_rows_as_the_logits_of_an_identity_head(real_logits):
    """Hidden states chosen so that the product gives real logits: the statistics are those of token_stats."""
    logits = real_logits.logits[:6].float()
    stats = pk.linear_token_stats(torch.eye(6), logits.T.contiguous(), real_logits.token_ids[:6])
    check_against(stats, truth_of(logits, real_logits.token_ids[:6]))
    got = gradient_of(lambda w: pk.linear_token_stats(torch.eye(6), w.T, None), logits, torch.ones(3, 6))
    exact = gradient_of(lambda z: reference.token_stats(z), logits.double(), torch.ones(3, 6).double())
    assert torch.allclose(got.double(), exact, atol=1e-5)
