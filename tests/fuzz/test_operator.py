"""Values and gradients of `token_stats` for any logits and options, against the reference in float64."""

import pytest
import torch
from fuzz.properties import holds
from fuzz.strategies import VIEWS, Logits, Options, evenly, float32s, mostly, options, sizes, some_logits
from hypothesis import strategies as st
from ops.rows import check_gradient, check_same_bits, check_values, is_uncertain

import paec_kernels as pk

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: overflow


def check(backend: str, z: torch.Tensor, given: Options, width: int, weights: torch.Tensor, inplace: bool) -> bool:
    token_ids, arguments = given.for_rows(z.shape[:-1], width)
    if width < z.shape[-1]:
        arguments["vocab_size"] = width
    truth = check_values(backend, z, token_ids, **arguments)
    check_gradient(backend, z, token_ids, weights, inplace=inplace, **arguments)
    return is_uncertain(truth.exact)


def check_logits(backend: str, logits: Logits, given: Options, inplace: bool) -> bool:
    z = logits.padded(given.padding) if given.padding else logits.make()
    weights = torch.randn(3, z[..., 0].numel(), generator=torch.Generator().manual_seed(given.seed))
    own_memory = logits.view != "one row for all" or given.padding > 0
    return check(backend, z, given, logits.width, weights, inplace and own_memory)


any_logits = {"logits": some_logits(), "given": options, "inplace": st.booleans()}


@holds(tests=60, fuzz=4000, **any_logits)
def test_any_logits_in_torch(logits, given, inplace):
    return check_logits("torch", logits, given, inplace)


@pytest.mark.usefixtures("interpreter")
@holds(tests=4, fuzz=1200, **any_logits)
def test_any_logits_in_triton(logits, given, inplace):
    return check_logits("triton", logits, given, inplace)


def check_floats(backend: str, row: list[float], dtype: torch.dtype, given: Options) -> bool:
    z = torch.tensor([row]).to(dtype)
    return check(backend, z, given, len(row), torch.tensor([[1.0], [-0.7], [1.3]]), inplace=False)


every_float = st.floats(width=32, allow_nan=False, allow_infinity=False)  # subnormal ones included
# Of every float two are rarely near each other, so most rows are of near ones.
near = mostly(float32s(-30, 30), every_float | st.just(-float("inf")))
row_of = [st.lists(logit, min_size=2, max_size=9) for logit in (near, near, near, every_float)]
any_floats = {
    "row": mostly(evenly(*row_of), st.lists(every_float, min_size=1, max_size=1)),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    "given": options,
}


@holds(tests=40, fuzz=3000, **any_floats)
def test_any_floats_in_torch(row, dtype, given):
    return check_floats("torch", row, dtype, given)


@pytest.mark.usefixtures("interpreter")
@holds(tests=6, fuzz=1000, **any_floats)
def test_any_floats_in_triton(row, dtype, given):
    return check_floats("triton", row, dtype, given)


@holds(tests=3, fuzz=200, logits=some_logits(view=["contiguous"], width=sizes(1, 40)), given=options, data=st.data())
def test_views_of_the_same_numbers_are_the_same_to_the_bit(backend, logits, given, data):
    z = logits.make()
    view = VIEWS[data.draw(st.sampled_from([name for name in VIEWS if name != "one row for all"]), "view")](z)
    token_ids, arguments = given.for_rows(z.shape[:-1], logits.width)
    stats, expected = (pk.token_stats(x, token_ids, backend=backend, **arguments) for x in (view, z))
    check_same_bits(stats, expected)
    return is_uncertain(expected)
