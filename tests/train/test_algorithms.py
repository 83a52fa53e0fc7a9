"""Every algorithm of `--algo`: exact over micro-batches and ranks, its metrics, its state, and bad input."""

import dataclasses

import pytest
import torch
from train.steps import OPTIONS, PIECES, Outcome, make_answers, run_step, started

from paec_kernels.train.algorithms import ALGORITHMS

each_algorithm = pytest.mark.parametrize("options", OPTIONS, ids=ALGORITHMS)


def assert_same(outcome: Outcome, whole: Outcome) -> None:
    """Loss, metrics and gradients of micro-batches against those of the whole step."""
    torch.testing.assert_close(outcome.loss, whole.loss, rtol=1e-10, atol=1e-12)
    for name, expected in whole.metrics.items():
        torch.testing.assert_close(outcome.metrics[name], expected, rtol=1e-6, atol=1e-9)  # counts are float32
    for name, expected in whole.plan_metrics.items():
        torch.testing.assert_close(outcome.plan_metrics[name], expected, rtol=1e-10, atol=1e-12, equal_nan=True)
    for (first, last), grad in zip(PIECES, outcome.grads, strict=True):
        expected = whole.grads[0][first:last]
        torch.testing.assert_close(grad, expected[:, : grad.shape[1]], rtol=1e-10, atol=1e-12)
        assert (expected[:, grad.shape[1] :] == 0).all()


@each_algorithm
def test_micro_batches_add_up_to_the_whole_step(options):
    answers = make_answers()
    whole = run_step(started(options), [answers])
    assert whole.loss != 0
    assert_same(run_step(started(options), [answers.piece(*piece) for piece in PIECES]), whole)


def test_the_options_above_are_of_every_algorithm():
    assert [type(options) for options in OPTIONS] == list(ALGORITHMS.values())
    for options in OPTIONS:
        assert dataclasses.is_dataclass(options)
