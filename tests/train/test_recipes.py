"""The paper's recipe starts as it is where its files are; here they are small samples in the same formats."""

import inspect
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.train import recipes
from paec_kernels.train.config import TrainConfig
from paec_kernels.train.tasks import jsonl

SAMPLES = Path(__file__).parents[1] / "data" / "math"


def test_the_recipe_is_a_configuration() -> None:
    config = TrainConfig(**recipes.PAPER)
    assert config.model == "Qwen/Qwen2.5-Math-1.5B"
    assert config.prompts * config.answers // config.updates == 512


def test_its_files_load_and_grade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAMPLES, recipes.DATA)
    train, evaluation = jsonl.load(recipes.PAPER["tasks"], recipes.PAPER["eval_tasks"])
    assert [task.name for task in train] == ["dapo-math-17k"]
    assert [task.name for task in evaluation] == ["aime24", "aime25", "aime26", "math500", "amc23"]
    for task in evaluation:
        for problem in task.eval_problems(recipes.PAPER["evaluate"].problems):
            assert task.reward(problem, rf"\boxed{{{problem.answer}}}") == 1.0
    problem = train[0].train_problem(10**9)
    assert train[0].reward(problem, f"Answer: {problem.answer}") == 1.0


def test_every_value_says_where_it_comes_from() -> None:
    lines = inspect.getsource(recipes).split("PAPER: dict")[1].splitlines()
    values = [line for line in lines if re.match(r"\s+(\"\w+\": |\w+=)(?!PAECOptions|PAECConfig|EvalOptions)", line)]
    assert len(values) > 25
    for line in values:
        assert re.search(r"# \[(reported|DAPO|ours)\]", line), line
