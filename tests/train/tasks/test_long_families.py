import random
from dataclasses import replace
from itertools import product

import pytest

from paec_kernels.train.models.tiny import MAX_POSITIONS
from paec_kernels.train.tasks import long_families
from paec_kernels.train.tasks.families import ALPHABET, END, Habits
from paec_kernels.train.tasks.long_families import BASE, COLUMNS, LONG_FAMILIES, MODULUS, SEPARATORS, WORDS
from paec_kernels.train.tasks.task import FORK, FREE, STEP, Problem

EXACT = Habits(step_slip=0.0)


@pytest.fixture(params=LONG_FAMILIES.values(), ids=LONG_FAMILIES)
def family(request):
    return request.param


def problems(family) -> list[Problem]:
    return [family.train_problem(i) for i in range(200)] + family.eval_problems(50)


def is_easy(family, problem: Problem) -> bool:
    return family.needed(problem.prompt) == family.routes[0] * family.forks


def written(family, problem: Problem, routes: str, seed: int = 0) -> str:
    """Write a solution by these routes."""

    class Fixed(random.Random):
        def choices(self, population, *weights, k=1):
            return list(routes) if population == family.routes else super().choices(population, *weights, k=k)

    return family.solution(problem, EXACT, Fixed(seed))


def chain_by_hand(prompt: str) -> str:
    value, answer = 0, ""
    for half, marker in ((prompt[1:6], "e"), (prompt[6:11], prompt[0])):
        for digit in map(int, half):
            value = {"e": value + digit, "x": value - digit, "y": digit - value, "z": value + digit + 3}[marker]
        answer += str(value % MODULUS)
    return answer


def scan_by_hand(prompt: str) -> str:
    digits = prompt[1:9]
    order = {"e": "01234567", "x": "76543210", "y": "02461357", "z": "45670123"}[prompt[0]]
    return str(sum(int(digits[int(i)]) * 3 ** (7 - n) for n, i in enumerate(order)) % MODULUS)


def carry_by_hand(prompt: str) -> str:
    one, other = (int(number, BASE) for number in prompt[1:-1].split("+"))
    total = one + other
    return "".join(str(total // BASE**column % BASE) for column in range(COLUMNS))


BY_HAND = {"chain": chain_by_hand, "scan": scan_by_hand, "carry": carry_by_hand}


def test_the_answer_is_right(family):
    by_hand = BY_HAND[family.name.removesuffix("+")]
    assert [p.answer for p in problems(family)] == [by_hand(p.prompt) for p in problems(family)]


def test_half_of_the_problems_need_a_rare_route(family):
    assert 70 <= sum(is_easy(family, problem) for problem in problems(family)[:200]) <= 130


def test_only_the_routes_that_are_needed_give_the_answer(family):
    for problem in problems(family)[:60]:
        right = {
            routes
            for routes in map("".join, product(family.routes, repeat=family.forks))
            if family.reward(problem, written(family, problem, routes))
        }
        assert right == {family.needed(problem.prompt)}


def test_evaluation_problems_are_never_trained_on_and_differ(family):
    evaluated = [p.prompt for p in family.eval_problems(200)]
    assert len(set(evaluated)) == len(evaluated) == 200
    assert not set(evaluated) & {family.train_problem(i).prompt for i in range(1000)}
    assert family.train_problem(12345) == family.train_problem(12345)


def routes_of(family, text: str) -> str:
    return "".join(letter for letter, role in zip(text + END, family.roles, strict=True) if role == FORK)


@pytest.mark.parametrize("easy", [True, False])
def test_routes_are_taken_blindly(family, easy):
    """As often as the family says, whatever the problem needs."""
    rng = random.Random(0)
    chosen = [p for p in problems(family)[:200] if is_easy(family, p) == easy] * 25
    taken = "".join(routes_of(family, family.solution(p, Habits(), rng)) for p in chosen)
    for route in family.routes[1:]:
        assert taken.count(route) / len(taken) == pytest.approx(family.rare, rel=0.25)


@pytest.mark.parametrize("easy", [True, False])
def test_the_skill_is_what_is_needed_now_and_then(family, easy):
    """Else all routes alike; without a slip, whatever the habits are."""
    rng = random.Random(0)
    chosen = [p for p in problems(family)[:200] if is_easy(family, p) == easy] * 15
    routes = []
    for problem in chosen:
        text = family.solution(problem, Habits(step_slip=0.5), rng, skill=True)
        routes.append(routes_of(family, text))
        assert family.reward(problem, text) == (routes[-1] == family.needed(problem.prompt))
    ways = len(family.routes) ** family.forks
    fit = [taken == family.needed(p.prompt) for taken, p in zip(routes, chosen, strict=True)]
    assert sum(fit) / len(fit) == pytest.approx(family.hint + (1 - family.hint) / ways, abs=0.06)
    others = "".join(taken for taken, fits in zip(routes, fit, strict=True) if not fits)
    needed = "".join(family.needed(p.prompt) for p, fits in zip(chosen, fit, strict=True) if not fits)
    for route in family.routes:  # of all ways but the one that is needed
        expected = (ways / len(family.routes) - needed.count(route) / len(needed)) / (ways - 1)
        assert others.count(route) / len(others) == pytest.approx(expected, abs=0.08)


def test_roles_by_the_letters(family):
    """Forks hold routes, free places words and separators, and steps neither; a letter a role, on every solution."""
    for problem in problems(family)[:50]:
        text = family.solution(problem, Habits(), random.Random(problem.prompt)) + END
        assert len(text) == len(family.roles)
        for letter, role in zip(text, family.roles, strict=True):
            expected = FORK if letter in "abcdp" else FREE if letter in WORDS + SEPARATORS else STEP
            assert role == expected, (text, letter)
    assert family.roles.count(FORK) == family.forks
    assert (FREE in family.roles) == family.free


def test_harmless_choices_change_nothing(family):
    problem = family.train_problem(0)
    texts = {written(family, problem, family.needed(problem.prompt), seed) for seed in range(20)}
    assert len(texts) > 5 if family.free else len(texts) == 1
    assert all(family.reward(problem, text) for text in texts)


def test_a_slip_is_followed_and_is_seldom_right(family):
    family = replace(family, rare=0.0)
    right = slipped = 0
    for problem in problems(family):
        text = family.solution(problem, Habits(step_slip=0.1), random.Random(problem.prompt))
        clean = family.solution(problem, EXACT, random.Random(problem.prompt))
        if is_easy(family, problem) and [a for a in text if a not in WORDS] != [a for a in clean if a not in WORDS]:
            slipped += 1
            right += family.reward(problem, text)
    assert slipped >= 30
    assert right / slipped < 0.5


@pytest.mark.parametrize(
    ("name", "prompt", "text"),
    [
        ("chain", "y3214654651:", "ya3325164362yc5341655011=21"),
        ("scan", "y35121433:", "yc3313133556264136=6"),
        ("carry", "n24323+22211:", "p3140p2130p3201c4221c2201=43020"),
    ],
)
def test_solutions_of_the_docstring(name, prompt, text):
    family = LONG_FAMILIES[name]
    assert written(family, Problem(name, prompt, ""), family.needed(prompt)) == text
    assert f"{prompt} " in long_families.__doc__
    assert f" {text}." in long_families.__doc__


def test_texts_fit_the_model(family):
    for problem in problems(family)[:50]:
        text = problem.prompt + family.solution(problem, Habits(), random.Random(0)) + END
        assert len(text) <= MAX_POSITIONS
        assert set(text) <= set(ALPHABET + END)
