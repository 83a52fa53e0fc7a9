"""A vocabulary cut anywhere, each part on a rank, against the reference in float64; ranks differ in no bit."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from fuzz.fake_ranks import on_threads
from fuzz.heads import close, exact_and_eager, gradients, heads, make
from fuzz.properties import holds
from fuzz.strategies import Logits, Options, options, some_logits
from hypothesis import strategies as st
from ops.rows import (
    check_against,
    check_against_gradient,
    check_same_bits,
    expected_gradient,
    gradient_of,
    is_uncertain,
    truth_of,
)
from torch import Tensor

import paec_kernels as pk
from paec_kernels.ops import split_linear, split_rows, vocab_group

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: overflow

MODULES = (split_linear, split_rows, vocab_group)
# Where the columns are cut, as shares of the vocabulary. Between two cuts at one place a rank has nothing.
cuts = st.lists(st.sampled_from([0.0, 1.0]) | st.floats(0, 1), min_size=1, max_size=3).map(sorted)


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, dist.ProcessGroup]]:
    """By size, groups of ranks that are not there: threads stand for them."""
    dist.init_process_group("fake", rank=0, world_size=4)
    yield {n: dist.new_group(range(n)) for n in (2, 3, 4)}
    dist.destroy_process_group()


def parts(x: Tensor | None, cuts: list[float], dim: int) -> tuple[Tensor | None, ...]:
    if x is None:
        return (None,) * (len(cuts) + 1)
    return x.tensor_split([round(share * x.shape[dim]) for share in cuts], dim)


def check_logits(groups, backend: str, logits: Logits, given: Options, cuts: list[float]) -> bool:
    z = logits.padded(given.padding)
    token_ids, arguments = given.for_rows(z.shape[:-1], logits.width)
    if given.padding:
        arguments["vocab_size"] = logits.width
    shards = parts(z, cuts, -1)
    weights = torch.randn(3, z[..., 0].numel(), generator=torch.Generator().manual_seed(given.seed))

    def of_rank(rank: int) -> tuple[pk.TokenStats, Tensor]:
        kept: list[pk.TokenStats] = []

        def statistics(shard: Tensor) -> pk.TokenStats:
            options = {"vocab_group": groups[len(shards)], "backend": backend, **arguments}
            kept.append(pk.token_stats(shard, token_ids, **options))
            return kept[0]

        gradient = gradient_of(statistics, shards[rank].clone(), weights)
        return kept[0], gradient

    kept, found = zip(*on_threads(len(shards), of_rank, MODULES), strict=True)
    truth = truth_of(z, token_ids, **arguments)
    check_against(kept[0], truth)
    for stats in kept[1:]:
        check_same_bits(stats, kept[0])
    check_against_gradient(torch.cat(found, dim=-1), expected_gradient(z, token_ids, weights, **arguments))
    return is_uncertain(truth.exact)


any_split = {"logits": some_logits(view=["contiguous"]), "given": options, "cuts": cuts}


@holds(tests=25, fuzz=2500, **any_split)
def test_any_cut_in_torch(groups, logits, given, cuts):
    return check_logits(groups, "torch", logits, given, cuts)


@pytest.mark.usefixtures("interpreter")
@holds(tests=2, fuzz=400, **any_split)
def test_any_cut_in_triton(groups, logits, given, cuts):
    return check_logits(groups, "triton", logits, given, cuts)


@holds(tests=5, fuzz=500, sizes=heads, given=options, cuts=cuts)
def test_any_cut_of_a_head(groups, sizes, given, cuts):
    case, truth = make(sizes, given)
    hidden, weight, bias = case.tensors
    weights, biases = parts(weight, cuts, 0), parts(bias, cuts, 0)
    options = {"chunk_rows": sizes.chunk_rows, "vocab_group": groups[len(weights)], **case.options}

    def of_rank(rank: int) -> tuple[pk.TokenStats, list[Tensor]]:
        return gradients(
            lambda hidden, weight, bias: pk.linear_token_stats(hidden, weight, case.token_ids, bias=bias, **options),
            [hidden, weights[rank], biases[rank]],
            case.coefficients,
        )

    kept, found = zip(*on_threads(len(weights), of_rank, MODULES), strict=True)
    check_against(kept[0], truth)
    for stats in kept[1:]:
        check_same_bits(stats, kept[0])
    d_hidden, *d_parameters = zip(*found, strict=True)
    assert all(torch.equal(each, d_hidden[0]) for each in d_hidden)
    got = d_hidden[0], *map(torch.cat, d_parameters)
    for gradient, exact, eager in zip(got, *exact_and_eager(case), strict=True):
        close(gradient, exact, eager)
    return is_uncertain(truth.exact)
