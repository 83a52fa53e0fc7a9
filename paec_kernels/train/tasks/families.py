"""Five families of small problems with two routes to an answer, for the tiny model.

The quick route is short and right on easy problems only; the careful one is longer and right on all. Whether a problem
is easy can be read off its prompt, but the worked solutions that the model first learns from do not look: they take
the quick route most of the time, on easy and hard problems alike, and slip now and then. So reward has two things to
teach: to slip less, and to take the rare route where it is needed.

    family   prompt     quick    careful                what is quick             what is careful
    add      a47+38:    q=75.    c7+8=15;4+3+1=8=85.    digits without carry      digit by digit, with carry
    sub      s52-38:    q=26.    c12-8=4;4-3=1=14.      the digits' distances     digit by digit, with borrow
    parity   p0110100:  q=0.     c00111000110101=1.     parity of three bits      bit by bit, the parity so far
    sort     o3142:     q=1324.  c1324;1234=1234.       one pass of bubble sort   pass after pass
    count    nabcaab:   q=1.     c111233=3.             a's of the first half     running count of a's
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from paec_kernels.train.tasks.task import Problem

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz+-=;:"
END = "."
HARD_SHARE = 0.5  # of the problems
EVAL_SHARE = 4  # one prompt in so many is for evaluation, by its checksum


class Work(NamedTuple):
    quick: str  # the quick route's answer
    steps: list[str]  # the careful route's steps
    answer: str  # its answer, the right one


@dataclass(frozen=True)
class Habits:
    """How the worked solutions are written that the model first learns from."""

    careful: float = 0.001
    """Share of solutions that take the careful route: so rare that a policy which narrows early never tries it."""
    slip: float = 0.15
    """Share of solutions with one digit replaced by a random one."""
    step_slip: float = 0.004
    """In the long families, share of computed values replaced by another."""


def add(prompt: str) -> Work:
    (a1, a0), (b1, b0) = (map(int, number) for number in prompt[1:-1].split("+"))
    ones = a0 + b0
    tens = a1 + b1 + ones // 10
    steps = [f"{a0}+{b0}={ones}", f"{a1}+{b1}+{ones // 10}={tens}"]
    return Work(f"{a1 + b1}{ones % 10}", steps, f"{tens}{ones % 10}")


def sub(prompt: str) -> Work:
    (a1, a0), (b1, b0) = (map(int, number) for number in prompt[1:-1].split("-"))
    borrow = int(a0 < b0)
    ones = a0 + 10 * borrow - b0
    tens = a1 - borrow - b1
    steps = [f"{a0 + 10 * borrow}-{b0}={ones}", f"{a1 - borrow}-{b1}={tens}"]
    return Work(f"{abs(a1 - b1)}{abs(a0 - b0)}", steps, f"{tens}{ones}")


def parity(prompt: str) -> Work:
    bits = prompt[1:-1]
    running = [str(bits[: i + 1].count("1") % 2) for i in range(len(bits))]
    steps = "".join(bit + so_far for bit, so_far in zip(bits, running, strict=True))
    return Work(running[len(bits) // 2 - 1], [steps], running[-1])


def sort(prompt: str) -> Work:
    passes = [_bubble(prompt[1:-1])]
    while _bubble(passes[-1]) != passes[-1]:
        passes.append(_bubble(passes[-1]))
    return Work(passes[0], passes, passes[-1])


def count(prompt: str) -> Work:
    letters = prompt[1:-1]
    running = "".join(str(letters[: i + 1].count("a")) for i in range(len(letters)))
    return Work(running[len(letters) // 2 - 1], [running], running[-1])


def _bubble(digits: str) -> str:
    row = list(digits)
    for i in range(len(row) - 1):
        row[i : i + 2] = sorted(row[i : i + 2])
    return "".join(row)


def _draw_add(rng: random.Random) -> str:
    a1 = rng.randrange(1, 8)
    b1 = rng.randrange(1, 9 - a1)  # tens below 10 even with a carry
    return f"a{a1}{rng.randrange(10)}+{b1}{rng.randrange(10)}:"


def _draw_sub(rng: random.Random) -> str:
    b1 = rng.randrange(1, 9)
    a1 = rng.randrange(b1 + 1, 10)  # not negative even with a borrow
    return f"s{a1}{rng.randrange(10)}-{b1}{rng.randrange(10)}:"


def _draw_letters(sign: str, letters: str, n: int, rng: random.Random) -> str:
    return sign + "".join(rng.choices(letters, k=n)) + ":"


@dataclass(frozen=True)
class OfLetters:
    """What the tiny model's families share of a ``Task``. Problem ``index`` is drawn by a generator seeded with it."""

    name: str

    def train_problem(self, index: int) -> Problem:
        return self._problem(f"train {self.name} {index}", held_out=False)

    def eval_problems(self, count: int) -> list[Problem]:
        problems: dict[str, Problem] = {}
        for index in range(20 * count):  # draws of a small family repeat themselves
            problem = self._problem(f"eval {self.name} {index}", held_out=True)
            problems.setdefault(problem.prompt, problem)
            if len(problems) == count:
                break
        return list(problems.values())

    def extract(self, text: str) -> str | None:
        _, found, answer = text.rpartition("=")
        return answer if found else None

    def reward(self, problem: Problem, text: str) -> float:
        return float(self.extract(text) == problem.answer)

    def same(self, one: str, other: str) -> bool:
        return one == other

    def _problem(self, seed: str, held_out: bool) -> Problem:
        """Draw a problem of the evaluation, or one that is left to training."""
        raise NotImplementedError


@dataclass(frozen=True)
class Family(OfLetters):
    """A ``Task`` with a quick and a careful route."""

    draw: Callable[[random.Random], str]
    work: Callable[[str], Work]
    roles: tuple[str, ...] = ()

    def solution(self, problem: Problem, habits: Habits, rng: random.Random, *, skill: bool = False) -> str:
        """Return a worked solution as the model first learns them, without its end token.

        Args:
            skill: as many are careful as quick, so that both are learned at all.
        """
        work = self.work(problem.prompt)
        if rng.random() < (0.5 if skill else habits.careful):
            text = f"c{';'.join(work.steps)}={work.answer}"
        else:
            text = f"q={work.quick}"
        if rng.random() < habits.slip:
            place = rng.choice([i for i, letter in enumerate(text) if letter.isdigit()])
            text = text[:place] + rng.choice("0123456789") + text[place + 1 :]
        return text

    def _problem(self, seed: str, held_out: bool) -> Problem:
        rng = random.Random(seed)
        hard = rng.random() < HARD_SHARE
        while True:
            prompt = self.draw(rng)
            work = self.work(prompt)
            if (work.quick != work.answer) == hard and (zlib.crc32(prompt.encode()) % EVAL_SHARE == 0) == held_out:
                return Problem(self.name, prompt, work.answer)


_ALL = (
    Family("add", _draw_add, add),
    Family("sub", _draw_sub, sub),
    Family("parity", partial(_draw_letters, "p", "01", 7), parity),
    Family("sort", partial(_draw_letters, "o", "0123456789", 4), sort),
    Family("count", partial(_draw_letters, "n", "aabc", 6), count),
)
FAMILIES = {family.name: family for family in _ALL}
