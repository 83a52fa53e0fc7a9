"""Tasks from JSONL files of questions and answers, as DAPO-Math-17K, AIME, MATH500 and AMC23 come.

Each line is an object, in UTF-8 and of at most LINE bytes; blank ones are passed over. Names are read in any case, and
the first of these that a line has counts:

- the question: ``problem``, ``question`` or ``prompt``; a string, or a chat as DAPO's, whose texts are joined: a list
  of objects with ``content``, a string or a list of parts of ``type`` text, and with the ``role`` system or user, which
  is user where it is left out. A chat is taken as it is, as it brings its own instruction; a string gets one.
- the answer: ``answer`` or ``reward_model.ground_truth``; a number, which counts as it is written, or a string in
  LaTeX; of at most `grader.LENGTH` characters.
"""

import hashlib
import itertools
import json
import os
import random
import stat
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from paec_kernels import checks
from paec_kernels.train.tasks import math_answers
from paec_kernels.train.tasks.grader import LENGTH
from paec_kernels.train.tasks.task import Problem

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
QUESTION_FIELDS = ("problem", "question", "prompt")
ANSWER_FIELDS = ("answer", "reward_model.ground_truth")
ROLES = ("system", "user")  # of a chat's turns, which become one text
LINE = 2**20  # bytes
HELD_OUT = 10  # a file for both uses keeps every tenth question, by its hash, for evaluation
SPECIFIC = 30  # characters of a question that is long enough to be told inside another


class _Line(NamedTuple):
    number: int
    key: str  # the question without differences of spacing
    problem: Problem


class JsonlTask:
    """`Task` on a file; ``name`` is the file's without its suffix.

    A question that stands there more than once, as each of DAPO's does a hundred times, counts once, with its first
    answer. Training goes through the problems in a new order each time round.

    Args:
        use: ``train``, ``eval`` or ``both``, which splits the file by a hash of the question, so that the parts do
            not change with the order of lines or with what is added.
    Raises:
        ValueError: the file, a line or a field is not as the module says; the message names them.
    """

    roles: tuple[str, ...] = ()

    def __init__(self, path: str | Path, use: Literal["train", "eval", "both"]) -> None:
        checks.one_of("use", use, ("train", "eval", "both"))
        self.path, self.use = Path(path), use
        self.name = self.path.stem
        lines = list(_read(self.path, self.name))
        self._train = [line for line in lines if use == "train" or (use == "both" and not _is_held_out(line.key))]
        self._eval = [line for line in lines if use == "eval" or (use == "both" and _is_held_out(line.key))]
        for part, lines in (("train", self._train), ("eval", self._eval)):
            if use in (part, "both") and not lines:
                raise ValueError(f"{self.path} must hold problems for use {use!r}, got none to {part}")
        self._order = lru_cache(maxsize=2)(self._shuffled)
        math_answers.GRADER.start()  # a library that is missing is found before anything is made

    def train_problem(self, index: int) -> Problem:
        if not self._train:
            raise ValueError(f"{self.path} is for evaluation: its use is {self.use!r}")
        checks.integer("index", index, least=0)
        epoch, place = divmod(index, len(self._train))
        return self._train[self._order(epoch)[place]].problem

    def eval_problems(self, count: int) -> list[Problem]:
        if not self._eval:
            raise ValueError(f"{self.path} is for training: its use is {self.use!r}")
        return [line.problem for line in self._eval[:count]]

    def extract(self, text: str) -> str | None:
        return math_answers.final_answer(text)

    def reward(self, problem: Problem, text: str) -> float:
        return float(math_answers.is_right(problem.answer, text))

    def same(self, one: str, other: str) -> bool | None:
        return math_answers.same(one, other)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._train)))
        random.Random(epoch).shuffle(order)
        return order


def load(train: Sequence[str | Path], evaluation: Sequence[str | Path]) -> tuple[list[JsonlTask], list[JsonlTask]]:
    """Return the tasks of a training run and of its evaluation; a file that is in both is split.

    Raises:
        ValueError: as JsonlTask; or a question is in a training and in an evaluation file.
    """
    trained, evaluated = ([os.path.realpath(path) for path in paths] for paths in (train, evaluation))
    paths = dict(zip((*trained, *evaluated), (*train, *evaluation), strict=True))
    tasks = {
        file: JsonlTask(path, "train" if file not in evaluated else "eval" if file not in trained else "both")
        for file, path in paths.items()
    }
    to_train, to_evaluate = ([tasks[file] for file in files] for files in (trained, evaluated))
    refuse_overlap(to_train, to_evaluate)
    return to_train, to_evaluate


def refuse_overlap(train: Sequence[JsonlTask], evaluation: Sequence[JsonlTask]) -> None:
    """Raise ValueError if a question that is evaluated is trained on too, spacing aside; names both lines.

    A question of SPECIFIC characters or more is also found inside a longer one, such as a chat with its instruction.
    """
    trained = {line.key: (task.path, line.number) for task in train for line in task._train}
    everything = "\n".join(trained)  # keys have no line breaks
    for task in evaluation:
        for line in task._eval:
            if line.key in trained or (len(line.key) >= SPECIFIC and line.key in everything):
                path, number = trained.get(line.key) or next(at for key, at in trained.items() if line.key in key)
                raise ValueError(
                    f"a problem must not be both trained on and evaluated: {path}, line {number} holds "
                    f"{task.path}, line {line.number}; leave it out of one of the files"
                )


def _read(path: Path, task: str) -> Iterator[_Line]:
    seen = set()
    for number, line in _lines(path):
        if not line:
            continue
        where = f"{path}, line {number}"
        row = _object(line, where)
        prompt, answer = _question(row, where), _answer(row, where)
        try:
            (prompt + answer).encode()
        except UnicodeEncodeError as error:  # half a character of UTF-16, which JSON can write
            raise ValueError(f"{where}: must be of whole characters: {error}") from error
        key = " ".join(prompt.removesuffix(INSTRUCTION).split())
        if key not in seen:
            seen.add(key)
            yield _Line(number, key, Problem(task, prompt, answer))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield a file's lines with their numbers, without byte order marks and spaces around them."""
    with _open(path) as file:
        for number in itertools.count(1):
            where = f"{path}, line {number}"
            try:
                line = file.readline(LINE + 1)
                if not line:
                    return
                if len(line) > LINE:
                    raise ValueError(f"{where}: must be of at most {LINE:,} bytes, got {line[:60]!r} and more")
                if b"\0" in line:
                    raise ValueError(f"{where}: must be in UTF-8, got UTF-16 or no text: {line[:60]!r}")
                yield number, line.decode("utf-8").removeprefix("\ufeff").strip()
            except OSError as error:
                raise ValueError(f"{where}: cannot be read: {error}") from error
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: must be in UTF-8: {error}") from error


def _open(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for ever
            raise ValueError("a folder" if path.is_dir() else "no regular file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise ValueError(f"path must be a JSONL file in UTF-8, got {path}: {error}") from error


def _object(line: str, where: str) -> dict[str, Any]:
    """Return a line's object. Its numbers are exact and of any size: decimals, but for ints that Python can write."""
    try:
        row = json.loads(line, parse_float=Decimal, parse_int=_integer, parse_constant=_refuse_constant)
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{where}: must be a JSON object, got {line[:60]!r}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object, got {line[:60]!r}")
    return row


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) < 1000 else Decimal(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _question(row: dict[str, Any], where: str) -> str:
    name, value = _first(row, QUESTION_FIELDS, "question", where)
    if isinstance(value, str) and value.strip():
        return f"{value.strip()}\n\n{INSTRUCTION}"
    try:
        if not isinstance(value, list) or not value:
            raise ValueError("a chat has at least one turn" if value == [] else "it is neither")
        return "\n\n".join(_turn(turn, f"{name}[{place}]") for place, turn in enumerate(value))
    except ValueError as why:
        raise ValueError(
            f"{where}: {name} must be a text or a list of turns with content, got {_shown(value)}: {why}"
        ) from why


def _turn(turn: Any, where: str) -> str:
    """Return the text of a chat's turn. Whatever else it holds would be lost without a word, so it is refused."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where} must be an object, got {_shown(turn)}")
    if turn.get("role", "user") not in ROLES:
        raise ValueError(f"{where}.role must be {' or '.join(ROLES)}, got {_shown(turn['role'])}")
    if calls := [name for name in ("tool_calls", "function_call") if turn.get(name)]:
        raise ValueError(f"{where}.{calls[0]} must not be there")
    content = turn.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise ValueError(f"{where}.content must be a text or a list of parts, got {_shown(content)}")
    for place, part in enumerate(parts):
        is_text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not is_text:
            raise ValueError(f"{where}.content[{place}] must be a part of type text with a text, got {_shown(part)}")
    text = "".join(part["text"] for part in parts).strip()
    if not text:
        raise ValueError(f"{where}.content must hold a text, got {_shown(content)}")
    return text


def _answer(row: dict[str, Any], where: str) -> str:
    name, value = _first(row, ANSWER_FIELDS, "answer", where)
    if isinstance(value, Decimal | int) and not isinstance(value, bool):
        value = Decimal(value)
        answer = _number(value) if abs(value.adjusted()) < LENGTH else str(value)
        if len(answer) > LENGTH or "E" in answer:
            raise ValueError(f"{where}: {name} must have at most {LENGTH:,} digits, got {answer[:60]}")
        return answer
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a text or a number, got {_shown(value)}")
    answer = value.strip()
    if len(answer) > LENGTH:
        raise ValueError(f"{where}: {name} must have at most {LENGTH:,} characters, got {len(answer):,}")
    if not math_answers.is_readable(answer):
        raise ValueError(f"{where}: {name} must be an answer that math-verify can read, got {answer[:60]!r}")
    return answer


def _number(value: Decimal) -> str:
    """Write a number without an exponent, in whose place math-verify reads Euler's e; a whole one without a point."""
    digits = f"{value:f}"
    if value == value.to_integral_value():  # AMC23 writes 27.0
        digits = digits.split(".")[0]
    return digits.removeprefix("-") if value.is_zero() else digits


def _shown(value: Any) -> str:
    return repr(str(value)[:60])


def _first(row: dict[str, Any], names: Sequence[str], what: str, where: str) -> tuple[str, Any]:
    for name in names:
        value: Any = row
        for part in name.split("."):
            by_name = {key.lower(): item for key, item in value.items()} if isinstance(value, dict) else {}
            value = by_name.get(part)
        if value is not None:
            return name, value
    raise ValueError(f"{where}: the {what} must be in one of {', '.join(names)}, got {', '.join(row) or 'no fields'}")


def _is_held_out(key: str) -> bool:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % HELD_OUT == 0
