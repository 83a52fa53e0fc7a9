"""Tasks on reasoning-gym: which problems, which answers, and whose verdict."""

from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.train.tasks import gym
from paec_kernels.train.tasks.grader import LENGTH, TEXT, Grader
from paec_kernels.train.tasks.gym import EVAL_POOL, GymTask


def test_a_problem_is_the_librarys() -> None:
    task = GymTask("basic_arithmetic")
    problem = task.train_problem(7)
    assert task.name == problem.task == "gym:basic_arithmetic"
    assert problem.prompt.startswith("Calculate ")
    assert problem.prompt.endswith("between <answer> and </answer> tags.")
    assert int(problem.answer) == eval(problem.prompt.split("Calculate ")[1].split(".\n")[0].replace("/", "//"))


@pytest.mark.parametrize("dataset", ["basic_arithmetic", "coin_flip"])
def test_an_index_is_always_the_same_problem(dataset: str) -> None:
    indices = [0, 1, 1023, 1024, 8 * 10**9 + 5]
    task, other = GymTask(dataset), GymTask(dataset)
    problems = [task.train_problem(index) for index in indices]
    assert problems == [other.train_problem(index) for index in reversed(indices)][::-1]
    assert len({problem.prompt for problem in problems}) >= (2 if dataset == "coin_flip" else 5)


@pytest.mark.parametrize("dataset", ["basic_arithmetic", "coin_flip"])  # coin_flip makes few different problems
def test_training_and_evaluation_never_coincide(dataset: str) -> None:
    task = GymTask(dataset)
    evaluation = task.eval_problems(10**6)
    assert len({problem.prompt for problem in evaluation}) == len(evaluation) <= EVAL_POOL
    assert task.eval_problems(5) == evaluation[:5]
    training = [task.train_problem(index) for index in range(300)]
    assert not {problem.prompt for problem in training} & {problem.prompt for problem in evaluation}
    assert len({problem.prompt for problem in training}) > 50


def test_a_dataset_without_enough_problems_says_so() -> None:
    task = GymTask("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    seen = {task._problem(0, index).prompt for index in range(1000)}
    task.__dict__["_eval_pool"] = seen  # as if all that there is were kept
    with pytest.raises(ValueError, match=f"gym:chain_sum,.* makes too few different problems to keep {EVAL_POOL}"):
        task.train_problem(0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>12</answer>", "12"),
        ("First <answer>3</answer>, no: <answer> 12 </answer> it is, not 7", "12"),
        ("<answer>x = 1,200.00</answer>", "1200"),
        ("<answer>+3.50</answer>", "3.50"),
        ("so 15 - 3 = 12", "12"),
        ("20-15", "15"),
        ("it is -15.", "-15"),
        ("<answer>twelve</answer>", "twelve"),
        ("no number", None),
        ("", None),
    ],
)
def test_answers_that_are_numbers(text: str, answer: str | None) -> None:
    assert GymTask("chain_sum").extract(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1 2\n3 4</answer>", "1 2\n3 4"),
        ("<answer> </answer>", None),
        ("1 2\n3 4", None),
    ],
)
def test_other_answers_need_tags(text: str, answer: str | None) -> None:
    assert GymTask("rotate_matrix").extract(text) == answer


@pytest.mark.parametrize("dataset", ["basic_arithmetic", "rotate_matrix", "word_sorting", "syllogism"])
def test_the_generators_own_answers_are_right(dataset: str) -> None:
    task = GymTask(dataset)
    for problem in [*task.eval_problems(10), task.train_problem(3)]:
        assert task.reward(problem, f"Well. <answer>{problem.answer}</answer>") == 1.0
        assert task.reward(problem, "<answer>it depends</answer>") == 0.0
        assert task.reward(problem, "it depends") == 0.0


def test_the_librarys_scorer_judges() -> None:
    """More than one answer to a countdown is right, and a partial score is none."""
    task = GymTask("countdown")
    problem = task.eval_problems(1)[0]
    numbers, target = problem.entry["metadata"]["numbers"], problem.entry["metadata"]["target"]
    assert task.reward(problem, f"<answer>0 + {problem.answer}</answer>") == 0.0  # 0 is none of the numbers
    assert task.reward(problem, f"<answer>({problem.answer})</answer>") == 1.0
    wrong = " + ".join(map(str, numbers))
    assert sum(numbers) != target
    assert 0 < task._chunk(0).score_answer(wrong, problem.entry) < 1
    assert task.reward(problem, f"<answer>{wrong}</answer>") == 0.0


def test_bad_names_and_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset must be one of ab, .* got 'sums'"):
        GymTask("sums")
    for config in ({"min_terms": 0}, {"colour": 1}):
        with pytest.raises(ValueError, match=r"config must be one that reasoning-gym's chain_sum takes, got \{"):
            GymTask("chain_sum", **config)
    with pytest.raises(ValueError, match="index must be >= 0, got -1"):
        GymTask("chain_sum").train_problem(-1)


EVALUATED = ["countdown", "spiral_matrix", "n_queens", "polynomial_multiplication", "string_insertion"]


@pytest.mark.filterwarnings("ignore:answers that could not be graded")
@pytest.mark.parametrize("dataset", EVALUATED)
def test_what_a_scorer_evaluates_is_not_run_as_code(dataset: str, tmp_path: Path) -> None:
    task = GymTask(dataset)
    problem = task.eval_problems(1)[0]
    code = f"open('{tmp_path}/run', 'w')"
    for answer in (code, f"[{code}]", f"exec({code!r})", f"__import__('pathlib').Path('{tmp_path}/run').touch()"):
        assert task.reward(problem, f"<answer>{answer}</answer>") == 0.0
    assert not list(tmp_path.iterdir())


def test_a_hostile_answer_is_wrong_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    grader = Grader("gym", 0.5)
    monkeypatch.setattr(gym, "GRADER", grader)
    task = GymTask("countdown")
    problem = task.eval_problems(1)[0]
    with pytest.warns(UserWarning, match=r"could not be graded.*'9\*\*9\*\*9\*\*9': it takes more than 0.5 s"):
        assert task.reward(problem, "<answer>9**9**9**9</answer>") == 0.0
    with pytest.warns(UserWarning, match=f"could not be graded.*longer than {LENGTH:,} characters"):
        assert task.reward(problem, f"<answer>{'1+' * LENGTH}</answer>") == 0.0
    assert grader.given_up == 2
    assert task.reward(problem, f"<answer>{problem.answer}</answer>") == 1.0


def test_only_the_end_of_a_long_response_is_read() -> None:
    task = GymTask("chain_sum")
    problem = task.eval_problems(1)[0]
    assert task.reward(problem, "<answer>" * 1_000_000 + f"{problem.answer}</answer>") == 1.0
    assert task.reward(problem, f"<answer>{problem.answer}</answer>" + "<answer>" * TEXT) == 0.0
