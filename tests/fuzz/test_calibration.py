"""One optimiser step however it is cut into micro-batches and ranks: one loss, gradient, plan and anchor."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from fuzz.fake_ranks import on_threads
from fuzz.properties import fuzzing, holds
from fuzz.strategies import mostly, seeds, sizes
from helpers import on_ranks
from hypothesis import strategies as st
from losses.batches import CONFIG, VOCAB, make_batch, with_anchor
from losses.test_entropy_term import TERMS
from torch import Tensor

from paec_kernels import reference
from paec_kernels.losses.entropy_term import EntropyTerm
from paec_kernels.losses.paec import PAEC
from paec_kernels.losses.paec_config import ENTROPY_SUPPORTS, NUCLEUS_NORMS, PENALTIES, PAECConfig
from paec_kernels.types import TokenStats

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter: 1 / 0


class Step(NamedTuple):
    """An optimiser step of answers ``[B, T]``, and how it is cut."""

    answers: int
    tokens: int
    p_valid: float
    seed: int
    single: bool  # float32 statistics
    poison: float  # at positions that are not valid
    ranks: tuple[int, ...]  # of each answer
    pieces: tuple[int, ...]  # how many answers each micro-batch of a rank takes, the last what is left

    def tensors(self) -> tuple[TokenStats, TokenStats, Tensor, Tensor]:
        """Statistics of leaves, the same with poison, ``valid``, and ``accuracy [B, 1]``."""
        batch = make_batch(self.answers, self.tokens, seed=self.seed, p_valid=self.p_valid)
        dtype = torch.float32 if self.single else torch.float64
        with torch.no_grad():
            stats = TokenStats(None, *(x.to(dtype) if x.is_floating_point() else x for x in batch.stats[1:]))
        accuracy = torch.rand(self.answers, 1, dtype=dtype, generator=torch.Generator().manual_seed(self.seed))

        def leaves(bad: float) -> TokenStats:
            floats = [torch.where(batch.valid, x, bad) if x.is_floating_point() else x for x in stats[1:]]
            return TokenStats(None, *(x.requires_grad_() if x.is_floating_point() else x for x in floats))

        return leaves(0.0), leaves(self.poison), batch.valid, accuracy

    def micro_batches(self, rank: int) -> list[Tensor]:
        """The numbers of the answers in each micro-batch of a rank, none of them in some."""
        mine = torch.tensor([i for i, r in enumerate(self.ranks) if r == rank], dtype=torch.int64)
        cut = []
        for size in self.pieces:
            cut.append(mine[:size])
            mine = mine[size:]
        return [*cut, mine]


@st.composite
def steps(draw: st.DrawFn, max_ranks: int = 4) -> Step:
    answers = draw(mostly(sizes(2, 6), sizes(0, 1)))
    n_ranks = draw(sizes(1, max_ranks))
    return Step(
        answers,
        draw(mostly(sizes(2, 12), sizes(0, 1))),
        draw(mostly(st.sampled_from([0.7, 1.0, 0.3]), st.sampled_from([0.05, 0.0]))),
        draw(seeds),
        draw(st.booleans()),
        draw(st.sampled_from([math.nan, math.inf, -math.inf])),
        tuple(draw(st.lists(sizes(0, n_ranks - 1), min_size=answers, max_size=answers))),
        tuple(draw(st.lists(mostly(sizes(1, 3), st.just(0)), min_size=1, max_size=4))),
    )


def part(stats: TokenStats, rows: Tensor) -> TokenStats:
    return TokenStats(None, *(x[rows] for x in stats[1:]))


def gradients(loss: Tensor, stats: TokenStats) -> list[Tensor]:
    leaves = [stats.entropy, stats.nucleus_entropy]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, found, strict=True)]


def of_rank(term: EntropyTerm, micro_batches: list[Tensor], stats: TokenStats, valid: Tensor, accuracy: Tensor):
    """A rank's plan, loss, gradients and state after the step."""
    for rows in micro_batches:
        term.observe(part(stats, rows), valid[rows])
    plan = term.plan()
    losses = [term.term(part(stats, rows), valid[rows], plan, accuracy[rows]) for rows in micro_batches]
    grads = gradients(sum(losses), stats)
    term.step()
    return plan._asdict(), sum(losses).detach(), grads, {name: x.clone() for name, x in term.named_buffers()}


def close(step: Step, value: Tensor, expected: Tensor) -> None:
    rtol, atol = (1e-4, 2e-6) if step.single else (1e-9, 1e-13)
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, equal_nan=True)


def check_cut(step: Step, made: list, whole: tuple) -> None:
    """What ranks made of a step's cut is what one rank made of it whole."""
    plan, loss, grads, state = whole
    n = len(made)
    close(step, torch.stack([x[1] for x in made]).mean(), loss)
    for i, expected in enumerate(grads):
        close(step, torch.stack([x[2][i] for x in made]).mean(0), expected)
    for name, value in made[0][0].items():
        # Items of a mean are divided by the ranks, as the gradients' average multiplies them.
        close(step, value * n if name == "items" else value, plan[name])
    for name, value in made[0][3].items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6, equal_nan=True)
    for other in made[1:]:
        for mine, theirs in ((made[0][0], other[0]), (made[0][3], other[3])):
            assert all(torch.equal(x.nan_to_num(7.0), theirs[name].nan_to_num(7.0)) for name, x in mine.items())


def same_step_cut_or_whole(
    step: Step, make: Callable[[], EntropyTerm], anchored: bool, n_ranks: int, keeps_empty: bool
) -> bool:
    stats, poisoned, valid, accuracy = step.tensors()
    term = with_anchor(make()) if anchored else make()
    whole = of_rank(copy.deepcopy(term), [torch.arange(step.answers)], stats, valid, accuracy)
    terms = [copy.deepcopy(term) for _ in range(n_ranks)]
    # An answer without a valid token may as well not be there.
    cut = [[rows[valid[rows].any(1) | keeps_empty] for rows in step.micro_batches(r)] for r in range(n_ranks)]
    made = on_threads(n_ranks, lambda r: of_rank(terms[r], cut[r], poisoned, valid, accuracy))
    check_cut(step, made, whole)
    return sum(bool(valid[rows].any()) for pieces in cut for rows in pieces) > 1


@pytest.mark.parametrize("name", TERMS)
@holds(tests=10, fuzz=700, step=steps(), anchored=st.booleans(), more_ranks=sizes(0, 1), keeps_empty=st.booleans())
def test_a_step_is_the_same_however_it_is_cut(name, step, anchored, more_ranks, keeps_empty, request):
    if "Triton" in name:
        request.getfixturevalue("interpreter")
    n_ranks = max(step.ranks, default=0) + 1 + more_ranks  # a rank may have no answer at all
    return same_step_cut_or_whole(step, TERMS[name], anchored, n_ranks, keeps_empty)


configs = st.builds(
    PAECConfig,
    nucleus_norm=st.sampled_from(NUCLEUS_NORMS),
    entropy_support=st.sampled_from(ENTROPY_SUPPORTS),
    alpha=st.floats(0, 1),
    tau_c=st.floats(0.01, 10),
    rho=st.floats(0, 1),
    tau_m=st.floats(0.01, 1e6),
    beta=st.floats(0, 10),
    lam=st.floats(0, 10),
    rho_min=st.floats(0, 2),
    vocab_size=st.just(VOCAB),
    penalty=st.sampled_from(PENALTIES),
)


@holds(tests=20, fuzz=2000, step=steps(), config=configs, anchored=st.booleans())
def test_paec_is_its_definition_for_any_constants(step, config, anchored):
    batch = make_batch(step.answers, step.tokens, seed=step.seed, p_valid=step.p_valid)
    term = PAEC(config)
    anchor = None
    if anchored:
        anchor = float(with_anchor(term).anchor)
    out = term(batch.stats, batch.valid)
    loss, mask, metrics = reference.paec_loss(batch.stats, batch.valid, config, anchor)
    torch.testing.assert_close(out.loss, loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(out.mask, mask, rtol=1e-6, atol=1e-9)
    grads = [torch.autograd.grad(x, batch.logits)[0] for x in (out.loss, loss)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
    for name, value in metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-9, atol=1e-11, equal_nan=True)
    return bool(out.mask.any())


@holds(
    tests=10,
    fuzz=700,
    step=steps(),
    cuts=st.lists(sizes(1, 15), min_size=1, max_size=5),
    penalty=st.sampled_from(PENALTIES),
)
def test_paec_may_cut_answers_too(step, cuts, penalty):
    config = dataclasses.replace(CONFIG, penalty=penalty)
    stats, poisoned, valid, _ = step.tensors()
    flat = [TokenStats(None, *(x.reshape(-1) for x in s[1:])) for s in (stats, poisoned)]
    whole = with_anchor(PAEC(config))
    out = whole(flat[0], valid.reshape(-1))
    edges = [0, *sorted(cut * valid.numel() // 16 for cut in cuts), valid.numel()]
    pieces = [torch.arange(first, last) for first, last in itertools.pairwise(edges)]
    plan, loss, grads, _ = of_rank(with_anchor(PAEC(config)), pieces, flat[1], valid.reshape(-1), valid.reshape(-1))
    close(step, loss, out.loss.detach())
    for gradient, expected in zip(grads, gradients(out.loss, flat[0]), strict=True):
        close(step, gradient.reshape(-1), expected.reshape(-1))
    for name, value in plan.items():
        close(step, value, out.metrics[name])
    return sum(bool(valid.reshape(-1)[rows].any()) for rows in pieces) > 1


def work(rank: int, cut: list[tuple]) -> list:
    dist.init_process_group("gloo")
    made = []
    for fields in cut:
        step = Step(*fields)
        _, poisoned, valid, accuracy = step.tensors()
        for make in TERMS.values():
            term = with_anchor(make())
            plan, loss, grads, state = of_rank(term, step.micro_batches(rank), poisoned, valid, accuracy)
            made.append((plan, loss, grads, state))
    return made


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.skipif(not fuzzing(), reason="make fuzz runs it; losses/test_ranks.py has fixed steps in processes")
@holds(fuzz=4, drawn=st.lists(steps(max_ranks=2), min_size=3, max_size=6))
def test_two_processes_are_one(drawn, tmp_path_factory):
    ranks = on_ranks(2, work, tmp_path_factory.mktemp("ranks"), [tuple(step) for step in drawn])
    made = zip(*ranks, strict=True)
    for step in drawn:
        stats, _, valid, accuracy = step.tensors()
        for make in TERMS.values():
            whole = of_rank(with_anchor(make()), [torch.arange(step.answers)], stats, valid, accuracy)
            check_cut(step, list(next(made)), whole)
    return any(bool(step.tensors()[2].any()) for step in drawn)
