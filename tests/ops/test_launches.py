"""What a call launches beside its kernels, some microseconds each on a GPU, and what the kernels check themselves."""

import pytest
import torch
from ops.rows import flat
from torch.utils._python_dispatch import TorchDispatchMode

import paec_kernels as pk
from paec_kernels.ops.layout import Rows

pytestmark = pytest.mark.usefixtures("interpreter")
forward = pytest.importorskip("paec_kernels.ops.forward", reason="triton is not installed").forward


def launch(token_ids=(3, -100, 129), temperature=(1.0,), valid=None):
    return forward(flat(3, 130)[None], Rows(torch.tensor(token_ids), valid, torch.tensor(temperature)), 0.95, 0.0, 130)


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


@pytest.mark.parametrize("temperature", [-1e4, -1.0, -0.0039, 0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("row", [torch.full((4096,), 1.5), flat(1, 4096)[0]])
def test_no_temperature_keeps_the_kernel_from_its_end(row, temperature):
    """A search of the nucleus with its weights upside down need not end, and a GPU would hang."""
    with pytest.raises(RuntimeError, match="temperature positive and finite"):
        forward(row.bfloat16()[None, None], Rows(None, None, torch.tensor([temperature])), 0.95, 0.0, 4096)


def test_the_forward_kernel_does_not_see_what_is_not_valid():
    launch()
    launch(valid=torch.tensor([True, False, True]), token_ids=(3, 1000, 5), temperature=(1.0, -1.0, 1.0))


def test_the_stride_of_the_only_outer_row_compiles_nothing_anew():
    strides_of = pytest.importorskip("paec_kernels.ops.rows").strides_of
    rows = torch.empty(2, 5, 7)
    assert strides_of(rows) == (35, 7, 1)
    assert strides_of(rows[:1]) == (0, 7, 1)


def test_no_kernel_is_autotuned():
    """Trials would overwrite the logits of a gradient in place, and another choice would round otherwise."""
    from paec_kernels.losses import mask_kernels
    from paec_kernels.ops import backward, rows
    from paec_kernels.ops import forward as forward_module

    modules = forward_module, backward, mask_kernels
    kernels = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    assert len(kernels) == 5
    assert {type(kernel) for kernel in kernels} == {type(rows.tanh)}


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


@pytest.mark.parametrize("names", [("logp", "entropy", "nucleus_entropy"), ("logp", "entropy"), ("entropy",)])
@pytest.mark.parametrize("linear", [False, True])
def test_the_backward_pass_stacks_its_gradients_at_once(names, linear):
    leaf, head, token_ids = flat(3, 130).requires_grad_(), torch.randn(70, 130), torch.tensor([1, 2, 3])
    stats = pk.linear_token_stats(leaf, head, token_ids) if linear else pk.token_stats(leaf, token_ids)
    gradients = [torch.ones(3)] * len(names)
    with Launches() as found:
        torch.autograd.grad([getattr(stats, name) for name in names], leaf, gradients)
    before = found.names[: next(i for i, name in enumerate(found.names) if name.startswith("paec."))]
    assert before == ["aten.zeros.default"] * (3 - len(names)) + ["aten.stack.default"]
