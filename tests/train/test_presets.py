"""The presets' tasks; for the paper's, small samples in the formats of its files stand for them."""

import inspect
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.train import presets
from paec_kernels.train.presets import PRESETS
from paec_kernels.train.tasks.by_name import load_tasks

SAMPLES = Path(__file__).parents[1] / "data" / "math"


def test_each_preset_knows_its_name() -> None:
    assert [config.preset for config in PRESETS.values()] == list(PRESETS)


def test_the_papers_preset_names_every_constant() -> None:
    """So that each has its source beside it."""
    source = inspect.getsource(presets)
    listed = source.partition("paec=PAECConfig(")[2].partition("\n        ),")[0]
    names = re.findall(r"^ {12}(\w+)=.*  # \[(?:reported|ours)\]", listed, re.MULTILINE)
    assert sorted(names) == sorted(field.name for field in fields(PAECConfig))


def test_smollm2s_tasks_have_problems_enough() -> None:
    tasks, _ = load_tasks(PRESETS["smollm2"].tasks)
    assert len(tasks) == 5
    for task in tasks:
        assert len({task.train_problem(index).prompt for index in range(200)}) > 80
        assert len(task.eval_problems(64)) == 64


def test_the_papers_files_load_and_grade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLES, presets.DATA)
    paper = PRESETS["paper"]
    train, evaluation = load_tasks(paper.tasks, paper.eval_tasks)
    assert [task.name for task in train] == ["dapo-math-17k"]
    assert [task.name for task in evaluation] == ["aime24", "aime25", "aime26", "math500", "amc23"]
    for task in evaluation:
        for problem in task.eval_problems(paper.evaluate.problems):
            assert task.reward(problem, rf"\boxed{{{problem.answer}}}") == 1.0
    problem = train[0].train_problem(10**9)
    assert train[0].reward(problem, f"Answer: {problem.answer}") == 1.0
