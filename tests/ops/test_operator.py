"""The operator around the kernels: bad input, the choice of a backend, torch.compile and opcheck."""

import os
import subprocess
import sys

import pytest
import torch
from ops.rows import STRIDED, flat
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import paec_kernels as pk
from paec_kernels.ops import operator


def logits_and_ids():
    return torch.randn(2, 3, 40), torch.randint(0, 40, (2, 3))


LIKE = r"must have the shape of logits\[..., 0\], \(2, 3\), got"
# The message's beginning, then what takes the place of good arguments z, a leaf of [2, 3, 40], and y.
BAD = [
    (TypeError, r"logits must be a tensor, got \[1.0\]", lambda z, y: {"logits": [1.0]}),
    (TypeError, "logits must be float32.*got torch.int64", lambda z, y: {"logits": z.long()}),
    (TypeError, "logits must be float32.*got torch.float64", lambda z, y: {"logits": z.double()}),
    (
        TypeError,
        "logits must be float32.*float64 too.*got torch.float8",
        lambda z, y: {"logits": z.to(torch.float8_e5m2), "backend": "reference"},
    ),
    (ValueError, r"logits must have shape \[..., V\] with V >= 1, got \(\)", lambda z, y: {"logits": z.sum()}),
    (ValueError, r"logits must have shape .*got \(2, 3, 0\)", lambda z, y: {"logits": z[..., :0]}),
    (ValueError, rf"token_ids {LIKE} \(2, 2\)", lambda z, y: {"token_ids": y[:, :2]}),
    (TypeError, "token_ids must be an integer tensor, got torch.bool", lambda z, y: {"token_ids": y > 3}),
    (ValueError, "token_ids must be on .*meta", lambda z, y: {"token_ids": y.to("meta")}),
    (ValueError, r"token_ids must be -100 or in \[0, 40\), got 40", lambda z, y: {"token_ids": 0 * y + 40}),
    (ValueError, "token_ids must be .*got -1", lambda z, y: {"token_ids": 0 * y - 1}),
    (ValueError, r"token_ids must be .*\[0, 30\), got 35", lambda z, y: {"token_ids": 0 * y + 35, "vocab_size": 30}),
    (ValueError, "token_ids must be .*got 40", lambda z, y: {"token_ids": 0 * y + 40, "backend": "reference"}),
    (TypeError, "valid must be a bool tensor, got torch.int64", lambda z, y: {"valid": y}),
    (ValueError, rf"valid {LIKE} \(1, 3\)", lambda z, y: {"valid": (y > 0)[:1]}),
    (ValueError, r"top_p must be in \(0, 1\], got 0", lambda z, y: {"top_p": 0}),
    (TypeError, "top_p must be a number, got 'x'", lambda z, y: {"top_p": "x"}),
    (ValueError, "temperature must be > 0 and finite, got 0", lambda z, y: {"temperature": 0}),
    (ValueError, "temperature must be > 0 and finite, got 0.0", lambda z, y: {"temperature": y.clamp(max=0).float()}),
    (TypeError, "temperature must be a number, got None", lambda z, y: {"temperature": None}),
    (TypeError, "temperature must be a floating tensor, got torch.int64", lambda z, y: {"temperature": y + 1}),
    (ValueError, rf"temperature {LIKE} \(2,\)", lambda z, y: {"temperature": torch.ones(2)}),
    (ValueError, "temperature must be on .*meta", lambda z, y: {"temperature": torch.tensor(0.7, device="meta")}),
    (ValueError, "softcap must be > 0 and finite, got 0.0", lambda z, y: {"softcap": 0.0}),
    (TypeError, "vocab_size must be an int, got 3.5", lambda z, y: {"vocab_size": 3.5}),
    (ValueError, r"vocab_size must be in \[1, 40\], got 41", lambda z, y: {"vocab_size": 41}),
    (ValueError, "backend must be one of .*got 'cuda'", lambda z, y: {"backend": "cuda"}),
    (TypeError, "inplace_backward must be a bool, got 'yes'", lambda z, y: {"inplace_backward": "yes"}),
    (
        ValueError,
        "inplace_backward needs logits that were computed, got a leaf",
        lambda z, y: {"inplace_backward": True},
    ),
    (
        ValueError,
        "inplace_backward needs .*expanded",
        lambda z, y: {"logits": z[:, :1].expand(2, 3, 40), "inplace_backward": True},
    ),
]


@pytest.mark.parametrize(("error", "message", "make"), BAD)
def test_bad_input_is_named_before_anything_changes(error, message, make):
    logits, token_ids = logits_and_ids()
    arguments = {"logits": logits.requires_grad_(), "token_ids": token_ids} | make(logits, token_ids)
    before = logits.detach().clone()
    with pytest.raises(error, match=message):
        pk.token_stats(**arguments)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", STRIDED)
def test_rows_of_any_strides(name):
    """In order, and without a copy where two strides are enough."""
    view = STRIDED[name](torch.randn(3, 8, 130))
    rows = operator.as_rows(view)
    assert torch.equal(rows.flatten(0, 1), view.flatten(0, -2))
    assert (rows.data_ptr() == view.data_ptr()) == (name != "three strides")


def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu():
    assert operator.resolve_backend("auto", torch.device("cpu")) == "torch"
    assert operator.resolve_backend("auto", torch.device("mps")) == "torch"
    assert operator.resolve_backend("auto", torch.device("cuda")) == "triton"


def test_a_leaf_in_place_is_scored_where_nothing_is_overwritten():
    logits, token_ids = logits_and_ids()
    with torch.no_grad():
        stats = pk.token_stats(logits.requires_grad_(), token_ids, inplace_backward=True)
    assert not stats.logp.requires_grad


def test_compiled_triton_takes_no_cpu_tensors(monkeypatch):
    monkeypatch.setattr(operator, "INTERPRETED", False)
    logits, token_ids = logits_and_ids()
    stats, valid = pk.token_stats(logits, token_ids), torch.ones(2, 3, dtype=torch.bool)
    for call in (
        lambda: pk.token_stats(logits, token_ids, backend="triton"),
        lambda: pk.linear_token_stats(logits, torch.randn(50, 40), token_ids, backend="triton"),
        lambda: pk.PAEC(pk.PAECConfig(), backend="triton")(stats, valid),
    ):
        with pytest.raises(ValueError, match=r"backend='triton' needs .* got tensors on cpu"):
            call()


def test_reference_backend_takes_float64():
    logits, token_ids = logits_and_ids()
    stats = pk.token_stats(logits.double(), token_ids, temperature=0.7, backend="reference")
    assert stats.entropy.dtype == torch.float64
    assert torch.allclose(stats.entropy.float(), pk.token_stats(logits, token_ids, temperature=0.7).entropy, atol=1e-5)


def test_without_triton_everything_else_works():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
importlib.util.find_spec = lambda name, package=None: None
import torch, paec_kernels as pk
z = torch.randn(3, 50, requires_grad=True)
stats = pk.token_stats(z, torch.tensor([1, 2, 3]))
out = pk.PAEC(pk.PAECConfig())(stats, torch.ones(3, dtype=torch.bool))
(stats.logp.sum() + out.loss).backward()
try:
    pk.token_stats(z, backend="triton")
except ValueError as error:
    assert "not installed" in str(error), error
    print("fine")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr


def test_opcheck(backend):
    logits = torch.randn(2, 4, 90)[:, :-1].requires_grad_()
    token_ids, valid = torch.randint(0, 80, (6,)), torch.rand(6) > 0.2
    arguments = (logits, token_ids, valid, torch.ones(1), 0.95, 0.0, 80, False, backend)
    opcheck(operator.token_stats_forward, arguments)
    logits, *rows = (value.detach() for value in arguments[:4])
    stats, rest, _ = operator.token_stats_forward(logits, *arguments[1:])
    for given, out in ((logits, torch.empty(logits.shape)), (None, logits)):
        backward = (torch.randn_like(stats), stats, rest, given, *rows, 0.0, 80, backend, out)
        opcheck(operator.token_stats_backward, backward)


@pytest.mark.parametrize("inplace", [False, True])
def test_compile_without_graph_breaks_or_recompiles_for_a_new_length(backend, inplace):
    def loss(logits, token_ids):
        stats = pk.token_stats(logits * 1.0, token_ids, temperature=0.8, inplace_backward=inplace, backend=backend)
        return (stats.logp - stats.entropy * stats.nucleus_entropy).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for n in (5, 8, 13):
        gradients = []
        for function in (loss, compiled):
            logits = flat(n, 70).requires_grad_()
            function(logits, torch.arange(n)).backward()
            gradients.append(logits.grad)
        assert torch.equal(*gradients)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True])
def test_inductor_compiles_a_loss_on_the_operator(inplace):
    """What `torch.compile` does by default, in a process of its own, since inductor imports triton."""
    code = f"""
import torch, paec_kernels as pk
def loss(z, y):
    stats = pk.token_stats(2.0 * z, y, inplace_backward={inplace})
    return (stats.logp - stats.entropy).sum()
compiled = torch.compile(loss, fullgraph=True, dynamic=True)
for n in (4, 6):
    z, y = torch.randn(n, 70, requires_grad=True), torch.arange(n)
    compiled(z, y).backward()
    w = z.detach().clone().requires_grad_()
    loss(w, y).backward()
    torch.testing.assert_close(z.grad, w.grad)
print("fine")
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout == "fine\n", result.stderr
