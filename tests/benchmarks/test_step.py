"""Whole optimiser steps, the loop's own, are checked before they are timed."""

from dataclasses import replace

import pytest
import torch

from benchmarks import step
from benchmarks.parts import Part
from benchmarks.workload import Case
from paec_kernels.train import algorithms
from paec_kernels.train.models.tiny import TinyModel, TinyPolicy

PART = Part("step", Case(0, 43, torch.float32, "tiny model", "cpu"), 3)


@pytest.fixture
def policy(monkeypatch) -> TinyPolicy:
    """In place of SmolLM2."""
    torch.manual_seed(0)
    policy = TinyPolicy(TinyModel())
    monkeypatch.setattr(step, "CONFIG", replace(step.CONFIG, tasks=("parity",), micro_batch=3, max_new_tokens=16))
    monkeypatch.setattr(step, "ANSWERS", {"cpu": 4})
    monkeypatch.setattr(step.smollm2, "policy", lambda device: policy)
    return policy


def test_each_way_takes_the_loops_step_and_changes_no_parameter(policy):
    before = {name: value.clone() for name, value in policy.module.state_dict().items()}
    rows = list(step.step_rows(PART))
    assert [row.implementation for row in rows] == list(step.WAYS)
    assert all(row.status == "ok" and row.turns == 3 and row.value_error < 1e-4 for row in rows)
    assert rows[0].relative == 1
    assert {row.anchor for row in rows} == {"GRPO, log_softmax"}
    assert all(torch.equal(value, before[name]) for name, value in policy.module.state_dict().items())


def test_a_wrong_loss_is_not_timed(policy, monkeypatch):
    right = algorithms.PAEC.term
    monkeypatch.setattr(algorithms.PAEC, "term", lambda *arguments, **options: 1.1 * right(*arguments, **options))
    rows = {row.implementation: row for row in step.step_rows(PART)}
    assert rows["GRPO"].status == "ok"
    for name in ("GRPO + PAEC", "GRPO + PAEC, sort"):
        assert (rows[name].status, rows[name].p50) == ("wrong", None)
        assert "its loss is off by" in rows[name].reason


def test_each_way_comes_first_in_its_turn():
    taken = []
    steps = {name: step.Step("", lambda name=name: taken.append(name), 0.0) for name in "abc"}
    rows = list(step.rows_in_turns(PART, steps, 1e-4, print))
    assert "".join(taken) == "abc" + "bca" + "cab" + "abc"
    assert [row.turns for row in rows] == [3, 3, 3]  # the first turn warms up
    wrong = {name: way._replace(error=1.0) for name, way in steps.items()}
    assert [row.status for row in step.rows_in_turns(PART, wrong, 1e-4, print)] == ["wrong"] * 3
