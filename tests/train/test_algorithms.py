"""Every algorithm of `--algo`: exact over micro-batches and ranks, its metrics, its state, and bad input."""

import dataclasses
import io
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks_once
from torch.utils._python_dispatch import TorchDispatchMode
from train.steps import OPTIONS, PIECES, Outcome, make_answers, run_step, started

from paec_kernels import reference
from paec_kernels.losses.paec import PAEC
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.policy import grpo_loss
from paec_kernels.losses.rivals import AERConfig
from paec_kernels.train.algorithms import (
    ALGORITHMS,
    HARD_TAU_M,
    UNIFORM_TAU_M,
    AEROptions,
    Algorithm,
    GRPOOptions,
    MicroBatch,
    OracleOptions,
    PAECHardMaskOptions,
    PAECNoMaskOptions,
    PAECNoPenaltyOptions,
    PAECOptions,
    SIRENOptions,
)
from paec_kernels.train.models.policy import Rollout
from paec_kernels.train.tasks.task import FORK, FREE, ROLES
from paec_kernels.types import TokenStats

each_algorithm = pytest.mark.parametrize("options", OPTIONS, ids=ALGORITHMS)
PAEC_OPTIONS = PAECOptions(paec=PAECConfig(beta=0.03, lam=0.7))
SELECTING = (PAECOptions, PAECNoPenaltyOptions, PAECHardMaskOptions)  # by PAEC's mask, and measured by their own


# Exactness


def assert_same(outcome: Outcome, whole: Outcome) -> None:
    """Loss, metrics, plan and gradients of all micro-batches against those of the whole step."""
    torch.testing.assert_close(outcome.loss, whole.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outcome.metrics, whole.metrics, rtol=1e-6, atol=1e-9)  # counts are float32
    torch.testing.assert_close(outcome.plan_metrics, whole.plan_metrics, rtol=1e-10, atol=1e-12, equal_nan=True)
    for (first, last), grad in zip(PIECES, outcome.grads, strict=True):
        expected = whole.grads[0][first:last]
        torch.testing.assert_close(grad, expected[:, : grad.shape[1]], rtol=1e-10, atol=1e-12)
        assert (expected[:, grad.shape[1] :] == 0).all()


@each_algorithm
def test_micro_batches_add_up_to_the_whole_step(options):
    answers = make_answers()
    whole = run_step(started(options), [answers])
    assert whole.loss != 0
    assert whole.grads[0][answers.valid].abs().amax(-1).count_nonzero() > 40
    assert_same(run_step(started(options), [answers.piece(*piece) for piece in PIECES]), whole)


@pytest.mark.parametrize(
    "name",
    ["paec", "paec-no-mask", "paec-no-penalty", "paec-hard-mask", "oracle", "clip-cov", "kl-cov", "siren"],
)
def test_that_check_rejects_a_plan_per_micro_batch(name):
    answers = make_answers()
    options = dict(zip(ALGORITHMS, OPTIONS, strict=True))[name]
    (true_grad,) = run_step(started(options), [answers]).grads
    grad = torch.zeros_like(true_grad)
    for first, last in PIECES:
        piece = answers.piece(first, last)
        (alone,) = run_step(started(options), [piece]).grads
        grad[first:last, : alone.shape[1]] = piece.valid.sum() / answers.valid.sum() * alone
    assert (grad - true_grad).norm() > 0.02 * true_grad.norm()


def outcomes_of_rank(rank: int) -> list[tuple]:
    """Take each algorithm's step on this rank's micro-batches."""
    dist.init_process_group("gloo")
    answers = make_answers()
    pieces = [answers.piece(*piece) for piece in (PIECES[:3], PIECES[3:])[rank]]
    return [tuple(run_step(started(options), pieces)) for options in OPTIONS]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[list[Outcome]]:
    """What each of two processes made of its micro-batches, for every algorithm."""
    outcomes = on_ranks_once(2, outcomes_of_rank, tmp_path_factory)
    return [[Outcome(*outcome) for outcome in of_rank] for of_rank in outcomes]


@each_algorithm
def test_ranks_average_to_the_whole_step(ranks, options):
    first, second = (of_rank[OPTIONS.index(options)] for of_rank in ranks)
    averaged = Outcome(
        (first.loss + second.loss) / 2,
        [grad / 2 for grad in first.grads + second.grads],
        {name: (value + second.metrics[name]) / 2 for name, value in first.metrics.items()},
        first.plan_metrics,
    )
    assert_same(averaged, run_step(started(options), [make_answers()]))
    torch.testing.assert_close(first.plan_metrics, second.plan_metrics, rtol=0, atol=0, equal_nan=True)


# What each algorithm is


@each_algorithm
def test_the_policy_loss_is_grpo_or_its_rival(options):
    answers = make_answers()
    outcome = run_step(started(options), [answers])
    stats = answers.batch(0.95).stats
    grpo, _ = grpo_loss(stats.logp, answers.old_logp, answers.advantages, answers.valid)
    is_grpo = outcome.metrics["policy_loss"] == pytest.approx(float(grpo.detach()), rel=1e-12)
    assert is_grpo == (type(options).policy_loss is GRPOOptions.policy_loss)
    assert outcome.loss == pytest.approx(
        float(outcome.metrics["policy_loss"] + outcome.metrics["entropy_loss"]), rel=1e-12
    )


@pytest.mark.parametrize(
    ("options", "config"),
    [
        (PAEC_OPTIONS, PAEC_OPTIONS.paec),
        (PAECNoPenaltyOptions(paec=PAEC_OPTIONS.paec), dataclasses.replace(PAEC_OPTIONS.paec, lam=0.0)),
        (PAECHardMaskOptions(paec=PAEC_OPTIONS.paec), dataclasses.replace(PAEC_OPTIONS.paec, tau_m=HARD_TAU_M)),
    ],
)
def test_paec_no_penalty_and_hard_mask(options, config):
    answers = make_answers()
    expected, _, metrics = reference.paec_loss(answers.batch(0.95).stats, answers.valid, config, anchor=4.0)
    outcome = run_step(started(options), [answers])
    torch.testing.assert_close(outcome.metrics["entropy_loss"], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(outcome.plan_metrics["selected_entropy"], metrics["mean_entropy"], rtol=1e-12, atol=0)


def test_no_mask_is_about_the_plain_mean():
    # L = -beta H + lam max(0, 0.8 * 4 - H)^2, H the mean entropy of all tokens.
    answers = make_answers()
    entropy = answers.batch(0.95).stats.entropy[answers.valid].mean()
    expected = -0.03 * entropy + 0.7 * (3.2 - entropy) ** 2
    outcome = run_step(started(PAECNoMaskOptions(paec=PAEC_OPTIONS.paec)), [answers])
    torch.testing.assert_close(outcome.metrics["entropy_loss"], expected.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(outcome.plan_metrics["term/mean_entropy"], entropy.detach(), rtol=1e-14, atol=0)
    assert outcome.plan_metrics["selected_entropy"] > 1.2 * entropy


def entropy_gradient(options) -> torch.Tensor:
    """What the entropy term adds to GRPO's gradient."""
    (whole,), (policy,) = (run_step(started(each), [make_answers()]).grads for each in (options, GRPOOptions()))
    return whole - policy


def test_the_oracle_is_about_the_mean_of_the_forks():
    # As without a mask, H the mean entropy of the forks.
    answers = make_answers()
    forks = answers.valid & (answers.roles == ROLES.index(FORK))
    assert 10 < forks.sum() < answers.valid.sum() / 2
    entropy = answers.batch(0.95).stats.entropy[forks].mean()
    expected = -0.03 * entropy + 0.7 * (3.2 - entropy) ** 2
    options = OracleOptions(paec=PAEC_OPTIONS.paec)
    outcome = run_step(started(options), [answers])
    torch.testing.assert_close(outcome.metrics["entropy_loss"], expected.detach(), rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(expected, answers.logits)
    found = entropy_gradient(options)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)
    assert (found[~forks] == 0).all()
    assert (found[forks].abs().amax(-1) > 1e-4).all()

    paec = PAEC(dataclasses.replace(PAEC_OPTIONS.paec, tau_m=UNIFORM_TAU_M))
    paec.load_state_dict(started(PAECNoMaskOptions(paec=PAEC_OPTIONS.paec)).term.state_dict())
    (gradient,) = torch.autograd.grad(paec(answers.batch(0.95).stats, forks).loss, answers.logits)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)


def test_without_a_fork_the_oracle_is_grpo_and_its_anchor_waits():
    answers = make_answers()
    answers = answers._replace(roles=torch.where(answers.roles == ROLES.index(FORK), -1, answers.roles))
    oracle = Algorithm(OracleOptions())
    outcome = run_step(oracle, [answers])
    assert torch.equal(outcome.grads[0], run_step(Algorithm(GRPOOptions()), [answers]).grads[0])
    assert outcome.metrics["entropy_loss"] == 0
    oracle.step()
    assert oracle.term.anchor_count == 0
    assert oracle.monitor.anchor_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("certain", [False, True])
def test_a_hard_mask_is_zero_or_one(dtype, certain):
    """But for the token whose score is the threshold, also where all scores are next to 0, as those of steps are."""
    n = 66  # the .8-quantile is the 53rd, not between two
    margin = torch.linspace(20, 21, n, dtype=dtype) if certain else torch.linspace(0, 3, n, dtype=dtype)
    margin = margin[torch.randperm(n)][None]
    ones = torch.ones_like(margin)
    stats = TokenStats(-ones, ones, ones, margin, ones, ones.int())
    valid = torch.ones(1, n, dtype=torch.bool)
    rollout = Rollout(valid.long(), valid.long(), 0, valid)
    batch = MicroBatch(rollout, ones[:, :1], 0 * ones[:, :1], stats, -ones)
    masks = {}
    for kind in (PAECHardMaskOptions, PAECNoMaskOptions):
        algorithm = Algorithm(kind())
        _, plan = algorithm.plan([batch], seed=0)
        masks[kind] = algorithm.term.mask(stats, valid, plan.term)[0]
    ranks = margin[0].argsort(descending=True).argsort()
    expected = torch.where(ranks < 52, 0.0, torch.where(ranks == 52, 0.5, 1.0)).to(dtype)
    assert torch.equal(masks[PAECHardMaskOptions], expected)
    assert (masks[PAECNoMaskOptions] == 0.5).all()


# Roles


def measuring(options) -> PAECConfig:
    """The config of the mask that the method is measured by."""
    algorithm = Algorithm(options)
    measures_itself = type(options) in SELECTING
    return algorithm.term.config if measures_itself else dataclasses.replace(PAECConfig(), top_p=algorithm.top_p)


@each_algorithm
def test_entropy_and_mask_are_told_by_role(options):
    """Over all micro-batches and ranks too, by the tests of exactness."""
    answers = make_answers()
    algorithm = started(options)
    with torch.no_grad():
        stats = answers.batch(algorithm.top_p).stats
    _, mask, _ = reference.paec_loss(stats, answers.valid, measuring(options))
    metrics = run_step(algorithm, [answers]).plan_metrics
    for number, role in enumerate(ROLES):
        places = [(b, t) for b, t in answers.valid.nonzero().tolist() if answers.roles[b, t] == number]
        assert len(places) > 8
        for name, values in (("entropy", stats.entropy), ("mask", mask)):
            expected = math.fsum(values[place].item() for place in places) / len(places)
            assert metrics[f"{name}/{role}"].item() == pytest.approx(expected, rel=1e-12), (name, role)


def test_a_role_that_no_token_has_is_nan():
    answers = make_answers()
    answers = answers._replace(roles=torch.where(answers.roles == ROLES.index(FREE), -1, answers.roles))
    metrics = run_step(started(PAEC_OPTIONS), [answers.piece(*piece) for piece in PIECES]).plan_metrics
    by_role = {name: value for name, value in metrics.items() if "/" in name and not name.startswith("term/")}
    assert by_role.keys() == {f"{name}/{role}" for name in ("entropy", "mask") for role in ROLES}
    assert {name for name, value in by_role.items() if value.isnan()} == {"entropy/free", "mask/free"}


def test_nothing_is_told_by_role_where_none_is_known():
    answers = make_answers()
    known = run_step(started(PAEC_OPTIONS), [answers]).plan_metrics
    unknown = run_step(started(PAEC_OPTIONS), [answers._replace(roles=None)]).plan_metrics
    assert known.keys() - unknown.keys() == {f"{name}/{role}" for name in ("entropy", "mask") for role in ROLES}
    for name, value in unknown.items():
        torch.testing.assert_close(value, known[name], rtol=0, atol=0, equal_nan=True)


def test_without_a_monitor_entropy_alone_is_told_by_role():
    metrics = run_step(Algorithm(GRPOOptions(), monitored=False), [make_answers()]).plan_metrics
    assert {name for name in metrics if "/" in name} == {f"entropy/{role}" for role in ROLES}


# Monitoring


@each_algorithm
def test_every_algorithm_is_measured_alike(options):
    answers = make_answers()
    algorithm = started(options)
    with torch.no_grad():
        stats = answers.batch(algorithm.top_p).stats
    _, _, selected = reference.paec_loss(stats, answers.valid, measuring(options))
    metrics = run_step(algorithm, [answers]).plan_metrics
    expected = {
        "entropy": stats.entropy[answers.valid].mean(),
        "nucleus_size": stats.nucleus_size[answers.valid].double().mean(),
        "selected_entropy": selected["mean_entropy"],
        "floor": 0.8 * 4.0,
        "anchor": 4.0,
        **{name: selected[name] for name in ("threshold", "mean_mask", "mask_on_certain")},
    }
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-6
    )
    assert not any(value.requires_grad for value in metrics.values())


@each_algorithm
def test_the_monitor_is_no_part_of_the_loss(options):
    answers = make_answers()
    low, high = started(options), started(options)
    if high.monitor is None:
        assert type(options) in SELECTING
        return
    high.monitor.anchor_sum.fill_(100.0)
    outcomes = [run_step(algorithm, [answers]) for algorithm in (low, high)]
    assert outcomes[0].plan_metrics["floor"] < outcomes[1].plan_metrics["floor"]
    assert torch.equal(outcomes[0].grads[0], outcomes[1].grads[0])


@each_algorithm
def test_without_a_monitor_the_loss_is_the_same(options):
    answers, alone = make_answers(), Algorithm(options, monitored=False)
    outcomes = [run_step(algorithm, [answers]) for algorithm in (alone, Algorithm(options))]
    assert torch.equal(outcomes[0].grads[0], outcomes[1].grads[0])
    measured = {"nucleus_size", "selected_entropy", "floor", "anchor", "threshold", "mean_mask", "mask_on_certain"}
    measured &= outcomes[0].plan_metrics.keys()
    assert len(measured) == (7 if type(options) in SELECTING else 0)


@each_algorithm
def test_a_method_that_selects_by_a_mask_warns_where_it_does_not(options):
    row = {"threshold": 0.1}  # < 3 * 0.05, of the options that select softly and of the monitor
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        Algorithm(options).warn_unless_selective(row)
        Algorithm(options).warn_unless_selective(row | {"threshold": 0.2})
    assert len(found) == (type(options) in (PAECOptions, PAECNoPenaltyOptions))


def test_paec_counts_the_steps_of_a_rollout_batch():
    options = PAECOptions(paec=PAECConfig(anchor_unit="rollout_batch", anchor_steps=2))
    assert Algorithm(options, steps_per_batch=3).term.anchor_steps == 6
    with pytest.raises(ValueError, match="steps_per_batch is None"):
        Algorithm(options)


def test_grpo_alone_pays_for_no_nucleus():
    alone = Algorithm(GRPOOptions(), monitored=False)
    assert make_answers().batch(alone.top_p).stats.nucleus_size.max() == 1
    assert Algorithm(GRPOOptions()).top_p == PAECConfig().top_p


class Reads(TorchDispatchMode):
    """Counts how often the host waits for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@each_algorithm
def test_the_host_does_not_wait_for_each_micro_batch(options):
    counts = []
    for pieces in ([(0, 8)], PIECES):
        algorithm, answers = started(options), make_answers()
        batches = [answers.piece(*piece).batch(algorithm.top_p) for piece in pieces]
        with Reads() as reads:
            batches, plan = algorithm.plan(batches, seed=0)
            for batch in batches:
                algorithm.loss(batch, plan)
            algorithm.step()
        counts.append(reads.count)
    assert counts[0] == counts[1]
    assert counts[0] == 1 or algorithm.name.endswith("-cov")  # which read how many tokens there are


@each_algorithm
def test_anchors_are_set_by_steps(options):
    algorithm = Algorithm(options)
    answers = make_answers()
    for _ in range(4):
        outcome = run_step(algorithm, [answers])
        assert outcome.plan_metrics["anchor"].isnan()
        algorithm.step()
    outcome = run_step(algorithm, [answers])
    torch.testing.assert_close(
        outcome.plan_metrics["anchor"], outcome.plan_metrics["selected_entropy"], rtol=1e-6, atol=0
    )


@each_algorithm
def test_no_valid_token_at_all(options):
    answers = make_answers()
    answers = answers._replace(valid=torch.zeros_like(answers.valid))
    algorithm = started(options)
    outcome = run_step(algorithm, [answers, answers])
    assert outcome.loss == 0
    assert all((grad == 0).all() for grad in outcome.grads)
    assert outcome.plan_metrics["entropy"] == outcome.plan_metrics["nucleus_size"] == 0
    algorithm.step()


# State


def test_a_resumed_algorithm_goes_on_to_the_bit():
    answers = make_answers()
    for options in OPTIONS:
        algorithm = Algorithm(options)
        for _ in range(3):
            run_step(algorithm, [answers])
            algorithm.step()
        file = io.BytesIO()
        torch.save(algorithm.state_dict(), file)
        file.seek(0)
        resumed = Algorithm(options)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(3):
            outcomes = [run_step(a, [answers]) for a in (algorithm, resumed)]
            for a in (algorithm, resumed):
                a.step()
        assert torch.equal(outcomes[0].grads[0], outcomes[1].grads[0])
        assert outcomes[0].plan_metrics["anchor"] == outcomes[1].plan_metrics["anchor"]


def test_a_checkpoint_of_other_options_is_refused_and_changes_nothing():
    state = started(AEROptions()).state_dict()
    algorithm = Algorithm(AEROptions(clip_low=0.1, aer=AERConfig(target_ratio=0.5)))
    with pytest.raises(RuntimeError) as error:
        algorithm.load_state_dict(state)
    assert "clip_low: checkpoint 0.2, here 0.1" in str(error.value)
    assert "aer.target_ratio: checkpoint 0.4, here 0.5" in str(error.value)
    assert "clip_high" not in str(error.value)
    assert "coef_step" not in str(error.value)
    assert algorithm.term.anchor.isnan()
    assert algorithm.monitor.anchor_count == 0


@pytest.mark.parametrize("name", ["_extra_state", "term.coef", "monitor.anchor_sum"])
def test_an_incomplete_checkpoint_is_refused_and_changes_nothing(name):
    state = started(AEROptions()).state_dict()
    del state[name]
    algorithm = Algorithm(AEROptions())
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=f"{name}( must be a dict of the algorithm's options, got None|, got _extra_state)"
        ):
            algorithm.load_state_dict(state, strict=strict)
    assert algorithm.term.anchor.isnan()
    assert algorithm.monitor.anchor.isnan()


@pytest.mark.parametrize("name", ["term.coef", "monitor.anchor_sum"])
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(name):
    state = started(AEROptions()).state_dict() | {name: torch.tensor(torch.nan)}
    algorithm = Algorithm(AEROptions())
    with pytest.raises(RuntimeError, match=f"{name} must be a finite 0-d tensor >= 0, got"):
        algorithm.load_state_dict(state)
    assert algorithm.term.anchor.isnan()
    assert algorithm.monitor.anchor.isnan()


def test_a_checkpoint_of_another_algorithm_is_refused():
    with pytest.raises(RuntimeError, match="algo: checkpoint 'grpo', here 'aer'"):
        Algorithm(AEROptions()).load_state_dict(Algorithm(GRPOOptions()).state_dict())


# Bad input


def test_options_are_of_an_algorithm():
    with pytest.raises(TypeError, match="options must be of a type in ALGORITHMS, got None"):
        Algorithm(None)


def with_valid(batch: MicroBatch, valid: torch.Tensor) -> MicroBatch:
    return batch._replace(rollout=batch.rollout._replace(valid=valid))


def with_roles(batch: MicroBatch, roles: torch.Tensor | None) -> MicroBatch:
    return batch._replace(rollout=batch.rollout._replace(roles=roles))


def without_rows(batch: MicroBatch) -> MicroBatch:
    """Its first answer's tokens, ``[T]``."""
    stats = type(batch.stats)(*(x[0] for x in batch.stats))
    rest = {name: getattr(batch, name)[0] for name in ("advantages", "accuracy", "old_logp")}
    return with_valid(batch._replace(stats=stats, **rest), batch.valid[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: tuple(b), TypeError, "micro_batches must be MicroBatches"),
        (lambda b: b._replace(stats=None), TypeError, "stats must be a TokenStats, got NoneType"),
        (lambda b: b._replace(stats=b.stats._replace(logp=None)), TypeError, "logp must be a tensor, got None"),
        (lambda b: b._replace(stats=b.stats._replace(margin=None)), TypeError, "stats.margin must be a tensor"),
        (lambda b: b._replace(old_logp=b.old_logp[:, 1:]), ValueError, r"old_logp must .* of logp, \(8, 20\)"),
        (lambda b: b._replace(advantages=b.advantages[:, 0]), ValueError, r"advantages must .* got \(8,\)"),
        (lambda b: b._replace(accuracy=b.accuracy[:4]), ValueError, r"accuracy must .* got \(4, 1\)"),
        (lambda b: b._replace(accuracy=b.accuracy + 1), ValueError, r"accuracy must be in \[0, 1\], got \[.*1\."),
        (lambda b: b._replace(accuracy=b.accuracy * math.nan), ValueError, r"accuracy must be in \[0, 1\]"),
        (lambda b: with_valid(b, b.valid.int()), TypeError, "valid must be a bool tensor, got torch.int32"),
        (lambda b: with_roles(b, None), ValueError, "roles must be of all micro-batches or of none, got None"),
        (lambda b: with_roles(b, b.rollout.roles[:, 1:]), ValueError, r"roles must .* of valid, \(8, 20\)"),
        (lambda b: with_roles(b, b.rollout.roles.double()), TypeError, "roles must be an integer tensor"),
        (without_rows, ValueError, r"valid must be \[B, T\], a row for each answer, got shape \(20,\)"),
    ],
)
def test_bad_batches_are_named_before_anything_is_observed(change, error, message):
    with torch.no_grad():
        batch = make_answers().batch(0.8)
    algorithm, fresh = (started(SIRENOptions()) for _ in range(2))  # a term of its own and a monitor
    with pytest.raises(error, match=message):
        algorithm.plan([batch, change(batch)], seed=0)
    metrics, expected = (each.plan([batch], seed=0)[1].metrics for each in (algorithm, fresh))
    assert metrics == expected


def test_the_oracle_needs_roles():
    with torch.no_grad():
        batch = make_answers().batch(0.95)
    algorithm, fresh = (started(OracleOptions()) for _ in range(2))
    with pytest.raises(ValueError, match="the oracle needs tasks whose forks are known"):
        algorithm.plan([with_roles(batch, None)] * 2, seed=0)
    metrics, expected = (each.plan([batch], seed=0)[1].metrics for each in (algorithm, fresh))
    assert metrics == expected


def test_a_plan_needs_micro_batches():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        Algorithm(GRPOOptions()).plan([], seed=0)
