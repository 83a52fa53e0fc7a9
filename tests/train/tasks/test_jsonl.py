"""Files of questions and answers in the formats of the data sets, on a few problems of our own."""

import json
from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.train.tasks.jsonl import INSTRUCTION, JsonlTask, load, refuse_overlap

SAMPLES = Path(__file__).parents[2] / "data" / "math"


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def numbered(path: Path, numbers: range) -> Path:
    return write(path, *({"question": f"What is {i} + 1?", "answer": i + 1} for i in numbers))


def test_dapos_format() -> None:
    task = JsonlTask(SAMPLES / "dapo-math-17k.jsonl", "train")
    problems = [task.train_problem(index) for index in range(12)]
    assert task.name == "dapo-math-17k"
    assert len(set(problems)) == 12  # the thirteenth line repeats the first
    (problem,) = [problem for problem in problems if "tulips" in problem.prompt]
    assert problem.task == "dapo-math-17k"
    assert problem.prompt.startswith("Solve the following math problem step by step.")
    assert problem.prompt.endswith('on its own line after "Answer:".')  # it brings its own instruction
    assert problem.answer == "75"
    assert task.reward(problem, "There are 84 tulips, and 84 - 9 = 75.\n\nAnswer: 75") == 1.0
    assert task.reward(problem, "There are 84 tulips.\n\nAnswer: 84") == 0.0
    assert task.extract("There are 84 tulips.\n\nAnswer: $84$") == "84"


@pytest.mark.parametrize(
    ("name", "count", "answers"),
    [
        ("aime24", 2, ["015", "000"]),
        ("aime25", 2, ["2", "225"]),
        ("aime26", 2, ["62", "10"]),
        ("math500", 4, ["-2", r"\frac{\sqrt{3}}{2}", "(-3,3)", r"\text{Cy}"]),
        ("amc23", 2, ["1", "19"]),
    ],
)
def test_the_benchmarks_formats(name: str, count: int, answers: list[str]) -> None:
    task = JsonlTask(SAMPLES / f"{name}.jsonl", "eval")
    problems = task.eval_problems(100)
    assert [problem.answer for problem in problems] == answers
    assert task.eval_problems(1) == problems[:1]
    for problem in problems:
        assert problem.prompt.endswith(f"\n\n{INSTRUCTION}")
        assert task.reward(problem, rf"So it is $\boxed{{{problem.answer}}}$.") == 1.0
        assert task.reward(problem, r"So it is $\boxed{77}$.") == 0.0


@pytest.mark.parametrize(
    "row",
    [
        {"Problem": "1 + 1?", "Answer": "2"},
        {"QUESTION": "1 + 1?", "answer": 2},
        {"prompt": "1 + 1?", "reward_model": {"ground_truth": "2"}, "answer": None},
        {"problem": "1 + 1?", "question": "2 + 2?", "answer": 2.0},
        {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": " 1 + 1?"}], "answer": "2"},
    ],
)
def test_names_of_fields(tmp_path: Path, row: dict) -> None:
    task = JsonlTask(write(tmp_path / "a.jsonl", row), "eval")
    (problem,) = task.eval_problems(5)
    assert problem.prompt in (f"1 + 1?\n\n{INSTRUCTION}", "Add.\n\n1 + 1?")
    assert task.reward(problem, r"\boxed{2}") == 1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"must be a JSON object, got '\{'"),
        ("[1]", r"must be a JSON object, got '\[1\]'"),
        ({"text": "?", "answer": 1}, "the question must be in one of problem, question, prompt, got text, answer"),
        ({"problem": "?"}, "the answer must be in one of answer, reward_model.ground_truth, got problem"),
        ({"problem": " ", "answer": 1}, "problem must be a text or a list of turns with content, got ' '"),
        (
            {"prompt": [{"role": "user"}], "answer": 1},
            r"prompt must be a text or a list of turns with content, got .\[",
        ),
        ({"prompt": [{"content": "?"}, {}], "answer": 1}, "prompt must be a text or a list of turns with content"),
        ({"prompt": ["?"], "answer": 1}, "prompt must be a text or a list of turns with content"),
        ({"problem": "?", "answer": [1]}, r"answer must be a text or a number, got '\[1\]'"),
        ({"problem": "?", "answer": True}, "answer must be a text or a number, got 'True'"),
        ({"problem": "?", "answer": " "}, "answer must be an answer that math-verify can read, got ''"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, line, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"problem": "1 + 1?", "answer": "2"}, "", line)
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {message}"):
        JsonlTask(path, "train")


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be a JSONL file in UTF-8, got .*none.jsonl"):
        JsonlTask(tmp_path / "none.jsonl", "train")
    path = numbered(tmp_path / "a.jsonl", range(2))
    with pytest.raises(ValueError, match="use must be one of train, eval, both, got 'test'"):
        JsonlTask(path, "test")
    with pytest.raises(ValueError, match="index must be >= 0, got -1"):
        JsonlTask(path, "train").train_problem(-1)
    with pytest.raises(ValueError, match=r"a\.jsonl is for training"):
        JsonlTask(path, "train").eval_problems(1)
    with pytest.raises(ValueError, match=r"a\.jsonl is for evaluation"):
        JsonlTask(path, "eval").train_problem(0)
    for use in ("train", "eval"):
        with pytest.raises(ValueError, match=f"must hold problems for use '{use}', got none to {use}"):
            JsonlTask(write(tmp_path / "empty.jsonl"), use)


def test_training_takes_every_problem_once_in_each_round(tmp_path: Path) -> None:
    path = numbered(tmp_path / "a.jsonl", range(20))
    task, other = JsonlTask(path, "train"), JsonlTask(path, "train")
    rounds = [[task.train_problem(20 * number + place) for place in range(20)] for number in range(3)]
    assert [len(set(problems)) for problems in rounds] == [20, 20, 20]
    assert rounds[0] != rounds[1] != rounds[2]
    assert [other.train_problem(index) for index in reversed(range(60))][::-1] == [*rounds[0], *rounds[1], *rounds[2]]


def test_a_split_file(tmp_path: Path) -> None:
    task = JsonlTask(numbered(tmp_path / "a.jsonl", range(300)), "both")
    held_out = task.eval_problems(300)
    training = {task.train_problem(index) for index in range(300)}
    assert 15 <= len(held_out) <= 50
    assert len(training) + len(held_out) == 300
    assert not training & set(held_out)
    # Another order of lines, and other lines beside them, move no problem.
    rows = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in reversed(range(100, 400))]
    moved = JsonlTask(write(tmp_path / "b.jsonl", *rows), "both").eval_problems(400)
    prompts = {problem.prompt for problem in moved}
    assert all((problem.prompt in prompts) == (int(problem.answer) > 100) for problem in held_out)


def test_files_for_training_and_for_evaluation(tmp_path: Path) -> None:
    a, b, c = (
        numbered(tmp_path / f"{name}.jsonl", r)
        for name, r in (("a", range(50)), ("b", range(50, 150)), ("c", range(200, 210)))
    )
    train, evaluation = load([a, b], [str(c), b])
    assert [(task.name, task.use) for task in train] == [("a", "train"), ("b", "both")]
    assert [(task.name, task.use) for task in evaluation] == [("c", "eval"), ("b", "both")]
    assert train[1] is evaluation[1]
    train, evaluation = load([b], [])  # what else is evaluated is no file
    assert [task.use for task in (*train, *evaluation)] == ["train"]
    train, evaluation = load([b], [b])
    assert [task.use for task in (*train, *evaluation)] == ["both", "both"]


def test_overlap_is_refused(tmp_path: Path) -> None:
    a = numbered(tmp_path / "a.jsonl", range(10))
    b = write(
        tmp_path / "b.jsonl",
        {"question": "What is 77 + 1?", "answer": 78},
        {"problem": "What is  3 +\n1?", "answer": 4},
    )
    with pytest.raises(ValueError, match=r"both trained on and evaluated: .*a.jsonl, line 4 holds .*b.jsonl, line 2;"):
        load([a], [b])
    refuse_overlap([JsonlTask(b, "train")], [JsonlTask(numbered(tmp_path / "c.jsonl", range(20, 30)), "eval")])


@pytest.mark.parametrize(
    ("question", "is_found"),
    [
        ("How many diagonals does a convex polygon with 11 sides have?", True),
        ("How many  diagonals does a convex polygon with 11 sides", True),
        ("How many diagonals does a convex polygon with 12 sides have?", False),
        ("How many diagonals", False),  # too short to tell
    ],
)
def test_questions_are_found_inside_chats_with_instructions(tmp_path: Path, question: str, is_found: bool) -> None:
    train = [JsonlTask(SAMPLES / "dapo-math-17k.jsonl", "train")]
    evaluation = [JsonlTask(write(tmp_path / "b.jsonl", {"problem": question, "answer": 44}), "eval")]
    if is_found:
        with pytest.raises(ValueError, match=r"dapo-math-17k.jsonl, line 9 holds .*b.jsonl, line 1;"):
            refuse_overlap(train, evaluation)
    else:
        refuse_overlap(train, evaluation)
