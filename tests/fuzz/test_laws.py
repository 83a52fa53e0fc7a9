"""Laws that tie one call of `token_stats` to another, of both backends and of the reference itself."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fuzz.properties import fuzzing, holds
from fuzz.strategies import Logits, Options, mostly, narrow, options, seeds, sizes, some_logits
from hypothesis import strategies as st
from ops.rows import gradient_of, is_uncertain, truth_of
from torch import Tensor

import paec_kernels as pk
from paec_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: overflow
FINITE = ("none", "one", "some", "most", "all but one", "the first part")


class Statistics(NamedTuple):
    """A function as `token_stats`, and how far two of its results may be apart by rounding."""

    of: Callable[..., pk.TokenStats]
    tolerance: float
    dtype: torch.dtype = torch.float32


# make test holds Triton's kernels to float64 alone: in the interpreter a law takes a second or more.
BACKENDS = ["torch", *["triton"] * fuzzing()]
each_backend = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture(params=["reference", *BACKENDS])
def statistics(request: pytest.FixtureRequest) -> Statistics:
    """The reference in float64, and both backends."""
    if request.param == "reference":
        return Statistics(
            lambda z, *rest, **given: reference.token_stats(z.double(), *rest, **given), 1e-9, torch.float64
        )
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return Statistics(functools.partial(pk.token_stats, backend=request.param), 2e-5)


class Case(NamedTuple):
    """Float32 logits ``[N, V]`` that are whole 64ths below 64, so that they can be shifted and scaled exactly."""

    z: Tensor
    token_ids: Tensor | None
    options: dict[str, Any]
    weights: Tensor  # [3, N], of a gradient

    def run(self, statistics, **changes: Any) -> tuple[pk.TokenStats, Tensor]:
        """Statistics and gradient, of other arguments in place of some."""
        z, token_ids = changes.pop("z", self.z).to(statistics.dtype), changes.pop("token_ids", self.token_ids)
        weights = changes.pop("weights", self.weights)
        given = self.options | changes
        return (
            statistics.of(z, token_ids, **given),
            gradient_of(lambda x: statistics.of(x, token_ids, **given), z, weights),
        )


def case_of(logits: Logits, given: Options) -> tuple[Case, Tensor]:
    """The case, and its rows whose nucleus is decided by rounding: their weight of its entropy is 0."""
    z = (logits.make().float().clamp(-64, 64) * 64).round() / 64
    z = torch.where(logits.make() == -math.inf, -math.inf, z)
    token_ids, arguments = given.for_rows(z.shape[:-1], logits.width)
    weights = torch.randn(3, len(z), generator=torch.Generator().manual_seed(given.seed))
    ambiguous = truth_of(z, token_ids, **arguments).ambiguous
    weights[2, ambiguous] = 0
    return Case(z, token_ids, arguments, weights), ambiguous


def same(
    statistics: Statistics,
    result: tuple[pk.TokenStats, Tensor],
    expected: tuple[pk.TokenStats, Tensor],
    ambiguous: Tensor,
    but: tuple[str, ...] = (),
) -> None:
    """Equal up to rounding, relative and absolute, but for some fields."""
    for name, value, other in zip(pk.TokenStats._fields, result[0], expected[0], strict=True):
        if value is None or name in but:
            continue
        rows = ~ambiguous if name.startswith("nucleus") else torch.ones_like(ambiguous)
        assert_close(statistics, value[rows], other[rows], name)
    assert_close(statistics, result[1], expected[1], "gradient")


def assert_close(statistics: Statistics, value: Tensor, other: Tensor, name: str) -> None:
    value, other = value.double(), other.double()
    largest = float(other.nan_to_num(0, 0, 0).abs().max()) if name == "gradient" and other.numel() else 1.0
    torch.testing.assert_close(
        value, other, rtol=statistics.tolerance, atol=statistics.tolerance * max(1.0, largest), msg=lambda m: name + m
    )


rows = sizes(1, 4).map(lambda n: (n,))
shapes = mostly(st.sampled_from([(3,), (1,), (4,), (2, 2)]), st.sampled_from([(), (0,)]))
widths = mostly(narrow | sizes(2, 300), st.just(1))
whole_logits = some_logits(shape=rows, width=widths, mask=FINITE, view=["contiguous"]).map(
    lambda logits: Logits(**{**vars(logits), "dtype": torch.float32, "shift": 0.0, "scale": min(logits.scale, 20.0)})
)
drawn = {"logits": whole_logits, "given": options}
EXAMPLES = 120


@holds(fuzz=EXAMPLES, **drawn, shift=st.integers(-5000, 5000))
def test_a_shift_moves_lse_alone(statistics, logits, given, shift):
    case, ambiguous = case_of(logits, Options(**{**vars(given), "softcap": None}))
    expected = case.run(statistics)
    result = case.run(statistics, z=case.z + shift)
    same(statistics, result, expected, ambiguous, but=("lse",))
    moved = expected[0].lse.double() + shift / torch.as_tensor(case.options["temperature"]).double()
    valid = case.options.get("valid", torch.ones(len(case.z), dtype=torch.bool))
    torch.testing.assert_close(result[0].lse.double(), torch.where(valid, moved, 0.0), rtol=1e-6, atol=2e-5)
    return is_uncertain(expected[0])


@holds(fuzz=EXAMPLES, **drawn)
def test_columns_in_another_order(statistics, logits, given):
    case, ambiguous = case_of(logits, given)
    order = torch.randperm(logits.width, generator=torch.Generator().manual_seed(given.seed))
    token_ids = case.token_ids
    if token_ids is not None:
        inside = (token_ids >= 0) & (token_ids < logits.width)
        token_ids = torch.where(inside, order.argsort()[torch.where(inside, token_ids, 0)], token_ids)
    stats, gradient = case.run(statistics, z=case.z[:, order], token_ids=token_ids)
    expected = case.run(statistics)
    same(statistics, (stats, gradient[:, order.argsort()]), expected, ambiguous)
    return is_uncertain(expected[0])


@each_backend
@holds(fuzz=EXAMPLES, logits=some_logits(shape=shapes, width=widths), given=options, data=st.data())
def test_a_row_is_the_same_to_the_bit_in_any_call(backend, logits, given, data):
    """In any order, more than once, and in calls of their own: also twice in the same call's place."""
    z = logits.make()
    token_ids, arguments = given.for_rows(z.shape[:-1], logits.width)
    z, n = z.flatten(0, -2) if z.dim() > 1 else z[None], z[..., 0].numel()
    weights = torch.randn(3, n, generator=torch.Generator().manual_seed(given.seed))

    def run(rows: Tensor) -> list[Tensor]:
        by_row = {
            name: value.flatten()[rows] for name, value in (arguments | {"token_ids": token_ids}).items()
            if isinstance(value, Tensor)
        }  # fmt: skip
        stats = pk.token_stats(z[rows], backend=backend, **(arguments | by_row))
        call = lambda x: pk.token_stats(x, backend=backend, **(arguments | by_row))  # noqa: E731
        return [x for x in (*stats, gradient_of(call, z[rows], weights[:, rows])) if x is not None]

    together = run(torch.arange(n))
    for chosen in data.draw(st.lists(st.lists(sizes(0, n - 1), max_size=5), min_size=1, max_size=2)) if n else []:
        chosen = torch.tensor(chosen, dtype=torch.int64)
        for value, expected in zip(run(chosen), together, strict=True):
            assert torch.equal(value.nan_to_num(7.0), expected[chosen].nan_to_num(7.0))
    for value, expected in zip(run(torch.arange(n)), together, strict=True):
        assert torch.equal(value.nan_to_num(7.0), expected.nan_to_num(7.0))
    return bool((together[-1].nan_to_num() != 0).any())  # the gradient


@holds(fuzz=EXAMPLES, **drawn, n=sizes(1, 70), seed=seeds)
def test_masked_columns_add_nothing(statistics, logits, given, n, seed):
    case, ambiguous = case_of(logits, given)
    order = torch.randperm(logits.width + n, generator=torch.Generator().manual_seed(seed))
    wide = torch.cat([case.z, torch.full((len(case.z), n), -math.inf)], dim=1)
    stats, gradient = case.run(statistics, z=wide)
    expected = case.run(statistics)
    assert (gradient[:, logits.width :] == 0).all()
    same(statistics, (stats, gradient[:, : logits.width]), expected, ambiguous)
    if case.token_ids is None:
        stats, gradient = case.run(statistics, z=wide[:, order])
        same(statistics, (stats, gradient[:, order.argsort()][:, : logits.width]), expected, ambiguous)
    return is_uncertain(expected[0])


@each_backend
@holds(fuzz=EXAMPLES, **drawn, n=sizes(1, 70), rubbish=st.sampled_from([math.nan, math.inf, -math.inf, 1e4]))
def test_columns_behind_vocab_size_are_as_if_not_there(backend, logits, given, n, rubbish):
    statistics = Statistics(functools.partial(pk.token_stats, backend=backend), 0.0)
    case, _ = case_of(logits, given)
    wide = torch.cat([case.z, torch.full((len(case.z), n), rubbish)], dim=1)
    stats, gradient = case.run(statistics, z=wide, vocab_size=logits.width)
    expected_stats, expected = case.run(statistics)
    for value, other in zip(stats, expected_stats, strict=True):
        assert value is other is None or torch.equal(value, other)
    assert torch.equal(gradient[:, : logits.width], expected)
    assert (gradient[:, logits.width :] == 0).all()
    return is_uncertain(stats)


@holds(fuzz=EXAMPLES, **drawn, copies=sizes(2, 9))
def test_every_column_several_times(statistics, logits, given, copies):
    """p becomes p / k: entropies grow by log k, but a nucleus may end among the k copies of its last token.

    With tau the threshold, which stays, and n tokens tied there, m = ceil((top_p - sum of p above) / (p_tau / k)) of
    the n k copies belong.
    """
    case, ambiguous = case_of(logits, given)
    before, _ = case.run(statistics)
    wide = case.z.repeat(1, copies)
    after, _ = case.run(statistics, z=wide)
    valid = case.options.get("valid", torch.ones(len(case.z), dtype=torch.bool))
    grown = math.log(copies) * valid.double()
    targeted = torch.zeros(len(case.z)) if case.token_ids is None else (case.token_ids >= 0) & valid
    expected = before._replace(
        logp=None if before.logp is None else before.logp - grown * targeted,
        entropy=before.entropy + grown,
        margin=torch.zeros_like(before.margin),
        lse=before.lse + grown,
    )
    same(
        statistics,
        (after, torch.zeros(0)),
        (expected, torch.zeros(0)),
        ambiguous,
        but=("nucleus_entropy", "nucleus_size"),
    )

    x, softcap, top_p = case.z.double(), case.options["softcap"], case.options["top_p"]
    if softcap is not None:
        x = torch.where(x == -math.inf, x, softcap * (x / softcap).tanh())
    temperature = torch.as_tensor(case.options["temperature"]).double().expand(len(x))
    p = (x / temperature[:, None]).softmax(1)
    for i in (~truth_of(wide, None, **case.options).ambiguous & ~ambiguous & valid).nonzero().flatten().tolist():
        z, weight = case.z[i], p[i] / copies
        tau = z.sort(descending=True).values[before.nucleus_size[i] - 1]
        above, tied = z > tau, z == tau
        left = top_p - copies * weight[above].sum()
        n_tied = int(tied.sum()) * copies
        taken = (
            n_tied if top_p == 1 else min(n_tied, max(1, math.ceil(left / weight[tied][0]))) if weight[tied][0] else 1
        )
        q = torch.cat([weight[above].repeat(copies), weight[tied][:1].expand(taken)])
        mass = q.sum()
        assert after.nucleus_size[i] == copies * int(above.sum()) + taken
        entropy = mass.log() - torch.special.xlogy(q, q).sum() / mass
        assert after.nucleus_entropy[i].item() == pytest.approx(entropy.item(), abs=max(2e-5, statistics.tolerance))
    return is_uncertain(before)


@holds(fuzz=EXAMPLES, **drawn)
def test_the_whole_vocabulary_is_the_nucleus_of_mass_1(statistics, logits, given):
    case, _ = case_of(logits, given)
    stats, _ = case.run(statistics, top_p=1.0)
    valid = case.options.get("valid", torch.ones(len(case.z), dtype=torch.bool))
    assert_close(statistics, stats.nucleus_entropy, stats.entropy, "entropy")
    assert torch.equal(stats.nucleus_size, torch.where(valid, (case.z > -math.inf).sum(1), 0).int())
    weights = torch.randn(3, len(case.z), generator=torch.Generator().manual_seed(given.seed))
    gradients = [case.run(statistics, top_p=1.0, weights=weights[[0, i, j]] * mask)[1] for i, j, mask in (
        (1, 1, torch.tensor([[1.0], [1.0], [0.0]])), (1, 1, torch.tensor([[1.0], [0.0], [1.0]])))]  # fmt: skip
    assert_close(statistics, *gradients, "gradient")
    # And a mass just below 1 leaves out next to nothing.
    near, _ = case.run(statistics, top_p=1 - 1e-7)
    torch.testing.assert_close(near.nucleus_entropy.double(), stats.entropy.double(), rtol=1e-5, atol=3e-5)
    return is_uncertain(stats)


@holds(
    fuzz=EXAMPLES, logits=some_logits(shape=rows, width=widths, mask=(*FINITE, "with the lowest float")), given=options
)
def test_bounds(statistics, logits, given):
    z = logits.make()
    token_ids, arguments = given.for_rows(z.shape[:-1], logits.width)
    stats = statistics.of(z, token_ids, **arguments)
    valid = arguments.get("valid", torch.ones(z.shape[:-1], dtype=torch.bool))
    n_finite = torch.where(valid, (z > -math.inf).sum(-1), 0)
    stats = pk.TokenStats(*(None if x is None else x[valid].double() for x in stats))
    n_finite, epsilon = n_finite[valid].double(), statistics.tolerance
    assert (stats.entropy >= -epsilon).all()
    assert (stats.entropy <= n_finite.log() + epsilon).all()
    assert (stats.nucleus_size >= 1).all()
    assert (stats.nucleus_size <= n_finite).all()
    assert (stats.nucleus_entropy >= -epsilon).all()
    assert (stats.nucleus_entropy <= stats.nucleus_size.log() + epsilon).all()
    assert (stats.margin >= 0).all()
    assert stats.logp is None or (stats.logp <= epsilon).all()
    return is_uncertain(stats)


@holds(fuzz=EXAMPLES, **drawn, other=st.floats(1e-9, 1.0))
def test_a_larger_mass_has_a_larger_nucleus(statistics, logits, given, other):
    case, _ = case_of(logits, given)
    smaller, larger = (
        statistics.of(case.z, case.token_ids, **(case.options | {"top_p": top_p}))
        for top_p in sorted([other, given.top_p])
    )
    assert (smaller.nucleus_size <= larger.nucleus_size).all()
    return is_uncertain(larger)


@holds(fuzz=EXAMPLES, **drawn, only=sizes(0, 2))
def test_a_rows_gradient_sums_to_zero(statistics, logits, given, only):
    case, _ = case_of(logits, Options(**{**vars(given), "softcap": None}))
    stats, gradient = case.run(statistics, weights=case.weights * (torch.arange(3) == only)[:, None])
    gradient = gradient.double()
    assert (gradient.sum(1).abs() <= statistics.tolerance * (gradient.abs().sum(1) + 1)).all()
    return is_uncertain(stats)


@holds(fuzz=EXAMPLES, **drawn, power=sizes(-5, 5))
def test_logits_temperature_and_softcap_in_another_unit(statistics, logits, given, power):
    case, ambiguous = case_of(logits, given)
    unit = 2.0**power
    softcap, temperature = case.options["softcap"], case.options["temperature"]
    changes = {"softcap": None if softcap is None else softcap * unit, "temperature": temperature * unit}
    stats, gradient = case.run(statistics, z=case.z * unit, **changes)
    expected = case.run(statistics)
    same(statistics, (stats, gradient * unit), expected, ambiguous)
    return is_uncertain(expected[0])
