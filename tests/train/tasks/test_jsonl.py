"""Files of questions and answers in the formats of the data sets, on a few problems of our own."""

import codecs
import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.train.tasks import math_answers
from paec_kernels.train.tasks.grader import Grader
from paec_kernels.train.tasks.jsonl import INSTRUCTION, LINE, JsonlTask, load, refuse_overlap

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


def test_a_missing_library_is_found_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('no math-verify here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(math_answers, "GRADER", Grader("math"))
    with pytest.raises(ImportError, match="no math-verify here"):
        JsonlTask(numbered(tmp_path / "a.jsonl", range(2)), "eval")


def read_answer(path: Path, line: str) -> str:
    (problem,) = JsonlTask(write(path, line), "eval").eval_problems(2)
    return problem.answer


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("0.00002", "0.00002"),
        ("2e-05", "0.00002"),
        ("2.50", "2.50"),
        ("27.0", "27"),
        ("-27.000", "-27"),
        ("1E2", "100"),
        ("1.5e+3", "1500"),
        ("-0.0", "0"),
        ("-0", "0"),
        ("0", "0"),
        ("-7", "-7"),
        ("0.1234567890123456789012345678901234567890", "0.1234567890123456789012345678901234567890"),
        ("5e-324", "0." + "0" * 323 + "5"),
        ("1e400", "1" + "0" * 400),
        ("1e-400", "0." + "0" * 399 + "1"),
        ("123456789" * 40, "123456789" * 40),
        ("7" * 6000, "7" * 6000),
        ("123456789.0", "123456789"),
    ],
)
def test_a_number_is_the_one_that_is_written(tmp_path: Path, number: str, answer: str) -> None:
    assert read_answer(tmp_path / "a.jsonl", f'{{"problem": "?", "answer": {number}}}') == answer


def test_a_small_number_is_graded_as_such(tmp_path: Path) -> None:
    task = JsonlTask(write(tmp_path / "a.jsonl", '{"problem": "?", "answer": 0.00002}'), "eval")
    (problem,) = task.eval_problems(1)
    verdicts = {text: task.reward(problem, rf"\boxed{{{text}}}") for text in ("0.00002", "2e-05", "0.43656", "0")}
    assert verdicts == {"0.00002": 1.0, "2e-05": 1.0, "0.43656": 0.0, "0": 0.0}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("NaN", "must be a JSON object, got .*: NaN is no JSON"),
        ("-Infinity", "must be a JSON object, got .*: -Infinity is no JSON"),
        ("1e10000", "answer must have at most 10,000 digits, got 1E[+]10000"),
        ("1e-999999", "answer must have at most 10,000 digits, got 1E-999999"),
        ("1e" + "9" * 30, "must be a JSON object"),
        ("9" * 10_001, "answer must have at most 10,000 digits, got 999"),
        (json.dumps("9" * 10_001), "answer must have at most 10,000 characters, got 10,001"),
        (json.dumps("10^{10^{10}}"), "answer must be an answer that math-verify can read, got '10"),
        ("[" * 100_000, "must be a JSON object"),
        (r'"\ud800"', "must be of whole characters"),
    ],
)
def test_answers_out_of_bounds_are_refused(tmp_path: Path, monkeypatch, answer: str, message: str) -> None:
    monkeypatch.setattr(math_answers, "GRADER", Grader("math", 0.5) if "^" in answer else math_answers.GRADER)
    with pytest.raises(ValueError, match=f"a.jsonl, line 1: {message}"):
        read_answer(tmp_path / "a.jsonl", f'{{"problem": "?", "answer": {answer}}}')


def text(*parts: str) -> list[dict]:
    return [{"type": "text", "text": part} for part in parts]


def test_the_parts_of_a_turn_are_joined(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": text("Add.")}, {"content": text("What is ", "1 + 1?")}]
    (problem,) = JsonlTask(write(tmp_path / "a.jsonl", {"prompt": chat, "answer": 2}), "eval").eval_problems(1)
    assert problem.prompt == "Add.\n\nWhat is 1 + 1?"


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "a.png"}]}, r"prompt\[1\].content\[0\] must be a part"),
        ({"role": "user", "content": [*text("a"), {"type": "image_url"}]}, r"prompt\[1\].content\[1\] must be a part"),
        (
            {"role": "user", "content": [{"type": "text", "text": 1}]},
            r"content\[0\] must be a part of type text with a t",
        ),
        ({"role": "user", "content": [{"text": "a"}]}, r"content\[0\] must be a part of type text"),
        ({"role": "user", "content": ["a"]}, r"content\[0\] must be a part of type text .* got 'a'"),
        ({"role": "user", "content": [text("a")]}, r"content\[0\] must be a part of type text"),
        ({"role": "user", "content": []}, r"prompt\[1\].content must hold a text, got '\[\]'"),
        ({"role": "user", "content": " "}, r"prompt\[1\].content must hold a text, got ' '"),
        ({"role": "user", "content": text("", " ")}, r"prompt\[1\].content must hold a text"),
        ({"role": "user", "content": None}, r"prompt\[1\].content must be a text or a list of parts, got 'None'"),
        ({"role": "user", "content": {"text": "a"}}, r"prompt\[1\].content must be a text or a list of parts"),
        ({"role": "user", "content": 5}, r"prompt\[1\].content must be a text or a list of parts, got '5'"),
        ({"role": "user"}, r"prompt\[1\].content must be a text or a list of parts, got 'None'"),
        ({"role": None, "content": "a"}, r"prompt\[1\].role must be system or user, got 'None'"),
        ({"role": "assistant", "content": "a"}, r"prompt\[1\].role must be system or user, got 'assistant'"),
        ({"role": "tool", "content": "a"}, r"prompt\[1\].role must be system or user, got 'tool'"),
        ({"role": ["user"], "content": "a"}, r"prompt\[1\].role must be system or user"),
        ({"role": "user", "content": "a", "tool_calls": [{}]}, r"prompt\[1\].tool_calls must not be there"),
        ("a", r"prompt\[1\] must be an object, got 'a'"),
        ([{"role": "user", "content": "a"}], r"prompt\[1\] must be an object"),
        (None, r"prompt\[1\] must be an object, got 'None'"),
    ],
)
def test_what_is_no_text_of_a_chat_is_refused(tmp_path: Path, turn: object, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": [{"role": "user", "content": "?"}, turn], "answer": 2})
    with pytest.raises(ValueError, match=rf"a.jsonl, line 1: prompt must be a text or a list of turns.*: .*{message}"):
        JsonlTask(path, "eval")


def test_a_chat_without_turns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1: prompt must be .* got '\[\]': a chat has at least one turn"):
        JsonlTask(write(tmp_path / "a.jsonl", {"prompt": [], "answer": 2}), "eval")


LINES = [json.dumps({"problem": f"{i} + 1? \u00e9", "answer": i + 1}, ensure_ascii=False) for i in range(3)]


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + "\n".join(LINES).encode(),
        "\r\n".join(LINES).encode() + b"\r\n",
        b"\n \n\t\r\n" + "\n\n".join(LINES).encode(),
        b"\n".join(codecs.BOM_UTF8 + line.encode() for line in LINES),  # files put one after another
    ],
    ids=["byte order mark", "CRLF", "blank lines", "byte order marks"],
)
def test_what_editors_make_of_a_file_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    problems = JsonlTask(path, "eval").eval_problems(5)
    assert [problem.prompt.split("\n")[0] for problem in problems] == [f"{i} + 1? \u00e9" for i in range(3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n".join(LINES).encode("utf-16"), "line 1: must be in UTF-8, got UTF-16 or no text: "),
        ("\n".join(LINES).encode("utf-16-be"), "line 1: must be in UTF-8, got UTF-16 or no text: "),
        (
            f"{LINES[0]}\n{LINES[1]}\n".encode() + LINES[2].encode("latin-1"),
            "line 3: must be in UTF-8: ",
        ),
        (LINES[0].encode() + b"\n\0\0\0\n", "line 2: must be in UTF-8, got UTF-16 or no text: "),
        (LINES[0].encode() + b"\n" + LINES[1].encode()[:-9], "line 2: must be a JSON object"),
        (LINES[0].encode() + b"\n" + b" " * (LINE + 1), "line 2: must be of at most 1,048,576 bytes, got b'   "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.jsonl, {message}") as raised:
        JsonlTask(path, "eval")
    assert "\n" not in str(raised.value)


def test_the_longest_line_is_read(tmp_path: Path) -> None:
    line = LINES[0].encode()
    (tmp_path / "a.jsonl").write_bytes(b" " * (LINE - len(line) - 1) + line + b"\n")
    assert len(JsonlTask(tmp_path / "a.jsonl", "eval").eval_problems(2)) == 1


@pytest.mark.parametrize("kind", ["folder", "missing", "loop", "fifo", "device", "long"])
def test_a_path_of_no_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "long":
        path = tmp_path / ("a" * 300 + ".jsonl")
    for read in (lambda: JsonlTask(path, "eval"), lambda: load([path], [path])):
        with pytest.raises(
            ValueError, match=rf"path must be a JSONL file in UTF-8, got {re.escape(str(path))}: ."
        ) as e:
            read()
        assert "\n" not in str(e.value)
