import json

import pytest

from paec_kernels.train.tasks.by_name import load_tasks
from paec_kernels.train.tasks.families import FAMILIES


def write(path, questions):
    path.write_text(
        "".join(json.dumps({"problem": f"What is {q} + 1?", "answer": str(q + 1)}) + "\n" for q in questions)
    )
    return str(path)


def test_families_by_name_in_order():
    train, evaluation = load_tasks(["sort", "add"])
    assert train == evaluation == [FAMILIES["sort"], FAMILIES["add"]]


def test_other_tasks_for_the_evaluation():
    train, evaluation = load_tasks(["sort"], ["add", "sort"])
    assert [task.name for task in train] == ["sort"]
    assert [task.name for task in evaluation] == ["add", "sort"]


def test_a_gym_dataset():
    (task,), _ = load_tasks(["gym:basic_arithmetic"])
    problem = task.train_problem(0)
    assert task.reward(problem, f"<answer>{problem.answer}</answer>") == 1.0


def test_a_gym_dataset_of_another_difficulty():
    name = "gym:chain_sum,max_terms=2,max_digits=1,allow_negation=True"
    (easy, usual), _ = load_tasks([name, "gym:chain_sum"])
    assert (easy.name, usual.name) == (name, "gym:chain_sum")  # an evaluation has both
    assert easy.train_problem(0).task == name
    terms = [problem.entry["metadata"]["num_terms"] for problem in easy.eval_problems(20)]
    assert set(terms) == {2}
    (text,), _ = load_tasks(["gym:basic_arithmetic,format_style=natural"])
    assert not all(problem.prompt.startswith("Calculate") for problem in text.eval_problems(20))


def test_one_file_is_split(tmp_path):
    path = write(tmp_path / "all.jsonl", range(100))
    (train,), (evaluation,) = load_tasks([path])
    held_out = {p.prompt for p in evaluation.eval_problems(100)}
    assert held_out
    assert not held_out & {train.train_problem(i).prompt for i in range(200)}


def test_training_alone_takes_the_whole_file(tmp_path):
    (task,), none = load_tasks([write(tmp_path / "all.jsonl", range(2))], ())
    assert none == []
    assert len({task.train_problem(i).prompt for i in range(2)}) == 2


def test_two_files_are_whole_and_mix_with_families(tmp_path):
    a, b = write(tmp_path / "a.jsonl", range(20)), write(tmp_path / "b.jsonl", range(20, 50))
    train, evaluation = load_tasks([a, "sort"], [b, "add"])
    assert [task.name for task in train] == ["a", "sort"]
    assert [task.name for task in evaluation] == ["b", "add"]
    assert len({train[0].train_problem(i).prompt for i in range(20)}) == 20
    assert len(evaluation[0].eval_problems(100)) == 30


def test_a_file_to_train_on_and_a_family_to_evaluate(tmp_path):
    train, evaluation = load_tasks([write(tmp_path / "a.jsonl", range(100))], ["add"])
    assert [task.name for task in (*train, *evaluation)] == ["a", "add"]


def test_evaluation_alone_takes_the_whole_file(tmp_path):
    _, (task,) = load_tasks((), [write(tmp_path / "a.jsonl", range(40))])
    assert len(task.eval_problems(100)) == 40


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "'nonsense'"),
        ("gym:nonsense", "'nonsense'"),
        ("nowhere.jsonl", "nowhere.jsonl"),
        ("gym:chain_sum,max_terms", r"gym:NAME,FIELD=VALUE.*, got 'gym:chain_sum,max_terms'"),
        ("gym:chain_sum,colour=3", r"reasoning-gym's chain_sum takes, got \{'colour': 3\}"),
    ],
)
def test_a_name_of_none_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_tasks([name])
