"""Three families of long answers with forks, for the tiny model: here it matters where entropy is spent.

At a fork the policy picks a route, a letter; the steps after it follow the route and have one right letter each. One
noisy step spoils the answer, so entropy at the steps costs reward; a route that is no longer tried is never found to be
the right one, so entropy at the forks is worth something. Which routes a problem needs can be read off a letter close
before the fork, and some of the worked solutions that the model learns from at the very first do so. Those that it
learns from last do not look: they take the common route most of the time, whatever the problem needs. Half of the
problems need the common one everywhere.

    family   prompt          answer                           at a fork
    chain    y3214654651:    ya3325164362yc5341655011=21.     2: the operation of a running value; the last one counts
    scan     y35121433:      yc3313133556264136=6.            1: the order in which the digits are read
    carry    n24323+22211:   p3140p2130p3201c4221c2201=43020. 5: whether one is carried into the column

``chain+``, ``scan+`` and ``carry+`` are the same with harmless choices, of which the solutions make all alike: a word
before each fork and separators between steps, which change nothing. A problem where other routes would give the right
answer too is left out.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

from paec_kernels.train.tasks.families import EVAL_SHARE, HARD_SHARE, Habits, OfLetters
from paec_kernels.train.tasks.task import FORK, FREE, STEP, Problem

MODULUS = 7  # of running values
WORDS = "stuv"
SEPARATORS, SEPARATOR_WEIGHTS = ";-", (0.85, 0.15)
EASY, HARD = "e", "xyz"  # the letters that tell chain and scan what a problem needs


class Pen:
    """Writes one solution, letter by letter, and remembers the role of each."""

    def __init__(self, rng: random.Random, *, slip: float, free: bool) -> None:
        self.rng, self.slip, self.free = rng, slip, free
        self.letters: list[str] = []
        self.roles: list[str] = []

    def fork(self, route: str) -> None:
        self._write(route, FORK)

    def step(self, letter: str) -> None:
        self._write(letter, STEP)

    def value(self, value: int, modulus: int) -> int:
        """Write a computed value, or by a slip another one; return what was written."""
        if self.rng.random() < self.slip:
            value = (value + self.rng.randrange(1, modulus)) % modulus
        self._write(str(value), STEP)
        return value

    def word(self) -> None:
        if self.free:
            self._write(self.rng.choice(WORDS), FREE)

    def separator(self) -> None:
        if self.free:
            self._write(self.rng.choices(SEPARATORS, SEPARATOR_WEIGHTS)[0], FREE)

    def _write(self, letter: str, role: str) -> None:
        self.letters.append(letter)
        self.roles.append(role)


CHAIN_FORKS, CHAIN_STEPS = 2, 5
CHAIN: dict[str, Callable[[int, int], int]] = {
    "a": lambda r, d: r + d,
    "b": lambda r, d: r - d,
    "c": lambda r, d: d - r,
    "d": lambda r, d: r + d + 3,
}


def chain(prompt: str, routes: Sequence[str], pen: Pen) -> None:
    """Run through the digits; each segment's route says how a digit changes the running value."""
    digits, value, ends = prompt[1:-1], 0, ""
    for fork, route in enumerate(routes):
        pen.word()
        pen.step(prompt[0])
        pen.fork(route)
        for place in range(CHAIN_STEPS):
            digit = digits[fork * CHAIN_STEPS + place]
            pen.step(digit)
            value = pen.value(CHAIN[route](value, int(digit)) % MODULUS, MODULUS)
            if place % 2:
                pen.separator()
        ends += str(value)
    pen.step("=")
    for end in ends:
        pen.step(end)


SCAN_STEPS = 8
SCAN: dict[str, Callable[[str], str]] = {
    "a": lambda digits: digits,
    "b": lambda digits: digits[::-1],
    "c": lambda digits: digits[::2] + digits[1::2],
    "d": lambda digits: digits[SCAN_STEPS // 2 :] + digits[: SCAN_STEPS // 2],
}


def scan(prompt: str, routes: Sequence[str], pen: Pen) -> None:
    """Read the digits in the order of the route, as the digits of one number modulo 7 in base 3."""
    (route,) = routes
    value = 0
    pen.word()
    pen.step(prompt[0])
    pen.fork(route)
    for place, digit in enumerate(SCAN[route](prompt[1:-1])):
        pen.step(digit)
        value = pen.value((3 * value + int(digit)) % MODULUS, MODULUS)
        if place % 2:
            pen.separator()
    pen.step("=")
    pen.step(str(value))


COLUMNS, BASE = 5, 5


def carry(prompt: str, routes: Sequence[str], pen: Pen) -> None:
    """Add two numbers column by column; the route says whether one is carried in."""
    sums = ""
    for column, (one, other) in enumerate(_columns(prompt)):
        pen.word()
        pen.fork(routes[column])
        pen.step(one)
        pen.step(other)
        total = int(one) + int(other) + (routes[column] == "c")
        sums += str(pen.value(total % BASE, BASE))
        pen.step("1" if total >= BASE else "0")
        if column % 2:
            pen.separator()
    pen.step("=")
    for digit in sums:
        pen.step(digit)


def _columns(prompt: str) -> list[tuple[str, str]]:
    one, other = prompt[1:-1].split("+")
    return list(zip(one[::-1], other[::-1], strict=True))


def _draw_marked(n_digits: int, rng: random.Random, hard: bool) -> str:
    marker = rng.choice(HARD) if hard else EASY
    return marker + "".join(str(rng.randrange(MODULUS)) for _ in range(n_digits)) + ":"


def _draw_sum(rng: random.Random, hard: bool) -> str:
    """Draw two numbers of which one or two columns before the last carry, or none."""
    while True:
        one, other = ("".join(str(rng.randrange(BASE)) for _ in range(COLUMNS)) for _ in range(2))
        prompt = f"n{one}+{other}:"
        if _carries_in(prompt).count("c") in ((1, 2) if hard else (0,)):
            return prompt


def _marked(prompt: str, forks: int) -> str:
    """Return the common route for all forks but the last, at which the prompt's first letter tells what is needed."""
    return "a" * (forks - 1) + {EASY: "a", "x": "b", "y": "c", "z": "d"}[prompt[0]]


def _carries_in(prompt: str) -> str:
    routes = "p"
    for one, other in _columns(prompt)[:-1]:
        routes += "c" if int(one) + int(other) + (routes[-1] == "c") >= BASE else "p"
    return routes


@dataclass(frozen=True)
class LongFamily(OfLetters):
    """A ``Task`` with forks, whose answers' places have known roles."""

    forks: int
    routes: str  # the common one first
    rare: float  # share of the forks at which solutions take one of the others, for each of them
    draw: Callable[[random.Random, bool], str]  # a prompt, of a hard problem or an easy one
    needed: Callable[[str], str]  # the route that is needed at each of a prompt's forks
    script: Callable[[str, Sequence[str], Pen], None]
    hint: float = 0.5  # share of the solutions of the skill phase that take the routes that are needed
    free: bool = False  # whether there are harmless choices

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The role of each place of an answer, its end token's too, as the solutions are written."""
        pen = Pen(random.Random(0), slip=0.0, free=self.free)
        self.script(self.train_problem(0).prompt, self.routes[0] * self.forks, pen)
        return (*pen.roles, STEP)

    def solution(self, problem: Problem, habits: Habits, rng: random.Random, *, skill: bool = False) -> str:
        """Return a worked solution as the model first learns them, without its end token.

        Args:
            skill: some take the routes that the problem needs, the others all routes alike, and none slips.
        """
        rare = 1 / len(self.routes) if skill else self.rare
        shares = [1 - rare * (len(self.routes) - 1)] + [rare] * (len(self.routes) - 1)
        routes = "".join(rng.choices(self.routes, shares, k=self.forks))
        if skill and rng.random() < self.hint:
            routes = self.needed(problem.prompt)
        pen = Pen(rng, slip=0.0 if skill else habits.step_slip, free=self.free)
        self.script(problem.prompt, routes, pen)
        return "".join(pen.letters)

    def _answer(self, prompt: str, routes: Sequence[str]) -> str:
        pen = Pen(random.Random(0), slip=0.0, free=self.free)
        self.script(prompt, routes, pen)
        return "".join(pen.letters).rpartition("=")[2]

    def _problem(self, seed: str, held_out: bool) -> Problem:
        rng = random.Random(seed)
        hard = rng.random() < HARD_SHARE
        while True:
            prompt = self.draw(rng, hard)
            if (zlib.crc32(prompt.encode()) % EVAL_SHARE == 0) != held_out:
                continue
            needed = self.needed(prompt)
            answer = self._answer(prompt, needed)
            if all(self._answer(prompt, other) != answer for other in self._all_routes if other != needed):
                return Problem(self.name, prompt, answer)

    @property
    def _all_routes(self) -> Iterator[str]:
        return map("".join, product(self.routes, repeat=self.forks))


_PLAIN = (
    LongFamily(
        name="chain",
        forks=CHAIN_FORKS,
        routes="abcd",
        rare=0.03,
        hint=0.1,
        draw=partial(_draw_marked, CHAIN_FORKS * CHAIN_STEPS),
        needed=partial(_marked, forks=CHAIN_FORKS),
        script=chain,
    ),
    LongFamily(
        name="scan",
        forks=1,
        routes="abcd",
        rare=0.03,
        hint=0.1,
        draw=partial(_draw_marked, SCAN_STEPS),
        needed=partial(_marked, forks=1),
        script=scan,
    ),
    LongFamily(name="carry", forks=COLUMNS, routes="pc", rare=0.05, draw=_draw_sum, needed=_carries_in, script=carry),
)
LONG_FAMILIES = {
    family.name: family for plain in _PLAIN for family in (plain, replace(plain, name=f"{plain.name}+", free=True))
}
