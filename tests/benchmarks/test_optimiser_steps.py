"""Whole optimiser steps are checked before they are timed; that of the reference loop is the loop's own."""

from dataclasses import replace

import pytest
import torch

import paec_kernels as pk
from benchmarks import loop_step
from benchmarks.harness import Run
from benchmarks.step_turns import Way, rows_in_turns
from benchmarks.workload import Case
from paec_kernels.train.models.tiny import TinyModel, TinyPolicy

RUN = Run("loop", "python -m benchmarks.sweep", with_memory=False, turns=3)
CASE = Case(9, 43, torch.float32, "tiny model", "cpu")


@pytest.fixture
def untrained(monkeypatch):
    """In place of the warm start, which takes a minute."""
    torch.manual_seed(0)
    monkeypatch.setattr(loop_step, "CONFIG", replace(loop_step.CONFIG, prompts=2, answers=4, micro_batch=3))
    monkeypatch.setattr(loop_step, "starting_policy", lambda config, device: TinyPolicy(TinyModel()))


def test_each_way_takes_the_loops_step(untrained):
    rows = list(loop_step.loop_rows(RUN, "cpu"))
    assert [row.implementation for row in rows] == list(loop_step.SOURCES)
    assert all(row.status == "ok" and row.turns == 3 and row.value_error < 1e-4 for row in rows)
    assert rows[0].relative == 1
    assert {row.anchor for row in rows} == {"GRPO"}


def test_a_step_changes_no_parameter(untrained):
    run = loop_step.make_run("cpu")
    before = {name: value.clone() for name, value in run.policy.module.state_dict().items()}
    loop_step.take_step(run, loop_step.sample_step(run))
    assert all(torch.equal(value, before[name]) for name, value in run.policy.module.state_dict().items())


def test_a_wrong_loss_is_not_timed(untrained, monkeypatch):
    right = pk.grpo_loss
    monkeypatch.setattr(pk, "grpo_loss", lambda *tokens, **options: (1.001 * right(*tokens, **options)[0], {}))
    alone, with_paec, known = loop_step.loop_rows(RUN, "cpu")
    assert (with_paec.status, with_paec.anchor) == ("ok", "GRPO + PAEC")
    for row in (alone, known):
        assert (row.status, row.p50) == ("wrong", None)
        assert "its loss is off by 1.0e-03" in row.reason


def test_each_way_comes_first_in_its_turn():
    taken = []
    ways = {name: Way("", 0.0, lambda name=name: taken.append(name)) for name in "abc"}
    rows = list(rows_in_turns(RUN, CASE, ways, print))
    assert "".join(taken) == "abc" + "bca" + "cab" + "abc"
    assert [row.turns for row in rows] == [3, 3, 3]  # the first turn warms up


def test_no_way_is_right():
    rows = list(rows_in_turns(RUN, CASE, {"a": Way("", 1.0, lambda: None)}, print))
    assert [row.status for row in rows] == ["wrong"]
