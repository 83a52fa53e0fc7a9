"""What a call launches beside its kernels, some microseconds each on a GPU, and what the kernels check themselves."""

import os

import pytest
import torch
from token_stats.rows import flat
from torch.utils._python_dispatch import TorchDispatchMode

import paec_kernels as pk

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="launches on CPU tensors, in Triton's interpreter"
)
triton_backend = pytest.importorskip("paec_kernels.token_stats.triton_backend", reason="triton is not installed")


def launch(token_ids=(3, -100, 129), temperature=(1.0,), valid=None):
    return triton_backend.forward(
        flat(3, 130)[None], torch.tensor(token_ids), valid, torch.tensor(temperature), 0.95, 0.0, 130
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_ids": (3, 130, 5)},
        {"token_ids": (3, -1, 5)},
        {"temperature": (0.0,)},
        {"temperature": (1.0, 2.0, float("inf"))},
        {"temperature": (1.0, -2.0, 1.0)},
        {"temperature": (1.0, 1.0, float("nan"))},
    ],
)
def test_the_forward_kernel_sees_what_is_out_of_range(wrong):
    """As on a GPU, where the operator does not look before it launches."""
    with pytest.raises(RuntimeError, match=r"token_ids must be -100 or in \[0, 130\), temperature positive and finite"):
        launch(**wrong)


def test_the_forward_kernel_does_not_see_what_is_not_valid():
    launch()
    launch(valid=torch.tensor([True, False, True]), token_ids=(3, 1000, 5), temperature=(1.0, -1.0, 1.0))


class Launches(TorchDispatchMode):
    """The operators that do work: all but views and what only allocates."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if not func.is_view and "empty" not in name and "detach" not in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_the_backward_pass_stacks_its_three_gradients_at_once():
    leaf = flat(3, 130).requires_grad_()
    stats = pk.token_stats(leaf, torch.tensor([1, 2, 3]))
    loss = (stats.logp - stats.entropy + stats.nucleus_entropy).sum()
    with Launches() as found:
        torch.autograd.grad(loss, leaf)
    # The rest is of the loss itself: ones, their expansion and a sign.
    assert found.names.count("aten.stack.default") == 1
    assert not [name for name in found.names if "select" in name or "copy" in name or "add" in name]
