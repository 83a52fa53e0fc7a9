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


BAD = {
    "logits not a tensor": (TypeError, "logits must be a tensor, got \\[1.0\\]", lambda z, y: ([1.0], None, {})),
    "logits integer": (TypeError, "logits must be float32.*got torch.int64", lambda z, y: (z.long(), None, {})),
    "logits float64": (TypeError, "logits must be float32.*got torch.float64", lambda z, y: (z.double(), None, {})),
    "logits a scalar": (ValueError, r"logits must have shape .*got \(\)", lambda z, y: (z.sum(), None, {})),
    "no columns": (ValueError, r"logits must have shape .*got \(2, 3, 0\)", lambda z, y: (z[..., :0], None, {})),
    "token_ids of another shape": (ValueError, r"token_ids .*\(2, 3\), got \(2, 2\)", lambda z, y: (z, y[:, :2], {})),
    "token_ids float": (TypeError, "token_ids must be an integer.*float32", lambda z, y: (z, y.float(), {})),
    "token_ids bool": (TypeError, "token_ids must be an integer.*bool", lambda z, y: (z, y > 3, {})),
    "token_ids on another device": (ValueError, "token_ids must be on .*meta", lambda z, y: (z, y.to("meta"), {})),
    "token id too large": (
        ValueError,
        r"token_ids must be -100 or in \[0, 40\), got 40",
        lambda z, y: (z, 0 * y + 40, {}),
    ),
    "token id negative": (ValueError, "token_ids must be .*got -1", lambda z, y: (z, 0 * y - 1, {})),
    "token id in the padding": (
        ValueError,
        r"token_ids must be .*\[0, 30\), got 35",
        lambda z, y: (z, 0 * y + 35, {"vocab_size": 30}),
    ),
    "valid not bool": (TypeError, "valid must be a bool tensor.*int64", lambda z, y: (z, y, {"valid": y})),
    "valid of another shape": (ValueError, "valid must have", lambda z, y: (z, y, {"valid": (y > 0)[:1]})),
    "top_p 0": (ValueError, r"top_p must be in \(0, 1\], got 0", lambda z, y: (z, y, {"top_p": 0})),
    "top_p above 1": (ValueError, "top_p .*got 1.5", lambda z, y: (z, y, {"top_p": 1.5})),
    "top_p NaN": (ValueError, "top_p .*got nan", lambda z, y: (z, y, {"top_p": float("nan")})),
    "temperature 0": (ValueError, "temperature must be > 0 and finite, got 0", lambda z, y: (z, y, {"temperature": 0})),
    "temperature negative": (ValueError, "temperature .*got -1", lambda z, y: (z, y, {"temperature": -1.0})),
    "a temperature of 0 among rows": (
        ValueError,
        "temperature must be > 0 and finite, got 0.0",
        lambda z, y: (z, y, {"temperature": torch.tensor([[1.0, 1, 1], [1, 0, 1]])}),
    ),
    "temperature of another shape": (
        ValueError,
        "temperature must have",
        lambda z, y: (z, y, {"temperature": torch.ones(2)}),
    ),
    "temperature of integers": (TypeError, "temperature .*int64", lambda z, y: (z, y, {"temperature": y + 1})),
    "top_p a string": (TypeError, "top_p must be a number, got 'x'", lambda z, y: (z, y, {"top_p": "x"})),
    "temperature None": (TypeError, "temperature must be a number", lambda z, y: (z, y, {"temperature": None})),
    "vocab_size a float": (TypeError, "vocab_size must be an int, got 3.5", lambda z, y: (z, y, {"vocab_size": 3.5})),
    "temperature on another device": (
        ValueError,
        "temperature must be on .*meta",
        lambda z, y: (z, y, {"temperature": torch.tensor(0.7, device="meta")}),
    ),
    "vocab_size a bool": (TypeError, "vocab_size must be an int, got True", lambda z, y: (z, y, {"vocab_size": True})),
    "reference, integer logits": (
        TypeError,
        "logits must be float32.*float64 too.*got torch.int64",
        lambda z, y: (z.long(), y, {"backend": "reference"}),
    ),
    "reference, complex logits": (
        TypeError,
        "logits must be float32.*got torch.complex64",
        lambda z, y: (z.to(torch.complex64), y, {"backend": "reference"}),
    ),
    "reference, float8 logits": (
        TypeError,
        "logits must be float32.*got torch.float8",
        lambda z, y: (z.to(torch.float8_e5m2), y, {"backend": "reference"}),
    ),
    "softcap 0": (ValueError, "softcap must be > 0 and finite, got 0.0", lambda z, y: (z, y, {"softcap": 0.0})),
    "vocab_size too large": (
        ValueError,
        "vocab_size must be .*got 41",
        lambda z, y: (z, y, {"vocab_size": 41}),
    ),
    "vocab_size 0": (ValueError, "vocab_size .*got 0", lambda z, y: (z, y, {"vocab_size": 0})),
    "another backend": (ValueError, "backend must be one of .*got 'cuda'", lambda z, y: (z, y, {"backend": "cuda"})),
    "an expanded tensor in place": (
        ValueError,
        "inplace_backward needs .*expanded",
        lambda z, y: (z[:, :1].expand(2, 3, 40), y, {"inplace_backward": True}),
    ),
    "a leaf in place": (
        ValueError,
        "inplace_backward needs logits that were computed, got a leaf",
        lambda z, y: (z.requires_grad_(), y, {"inplace_backward": True}),
    ),
    "inplace_backward a word": (
        TypeError,
        "inplace_backward must be a bool, got 'yes'",
        lambda z, y: (z, y, {"inplace_backward": "yes"}),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_anything_changes(name):
    error, message, make = BAD[name]
    logits, token_ids = logits_and_ids()
    arguments = make(logits, token_ids)
    before = logits.clone()
    with pytest.raises(error, match=message):
        pk.token_stats(arguments[0], arguments[1], **arguments[2])
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


def operator_arguments(backend):
    logits = torch.randn(2, 4, 90)[:, :-1].requires_grad_()
    token_ids, valid = torch.randint(0, 80, (6,)), torch.rand(6) > 0.2
    return logits, token_ids, valid, torch.ones(1), 0.95, 0.0, 80, False, backend


def test_opcheck(backend):
    arguments = operator_arguments(backend)
    opcheck(operator.token_stats_forward, arguments)
    logits, *rows = (None if value is None else value.detach() for value in arguments[:4])
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
def test_inductor_compiles_a_loss_on_the_operator():
    """What `torch.compile` does by default, in a process of its own, since inductor imports triton."""
    code = """
import torch, paec_kernels as pk
def loss(z, y):
    stats = pk.token_stats(z, y)
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
