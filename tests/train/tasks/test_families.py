import random

import pytest

from paec_kernels.train.models.tiny import MAX_POSITIONS
from paec_kernels.train.tasks.families import ALPHABET, END, FAMILIES, Habits
from paec_kernels.train.tasks.task import Problem

TRUTH = {
    "add": lambda prompt: str(sum(map(int, prompt[1:-1].split("+")))),
    "sub": lambda prompt: f"{int(prompt[1:3]) - int(prompt[4:6]):02d}",
    "parity": lambda prompt: str(prompt.count("1") % 2),
    "sort": lambda prompt: "".join(sorted(prompt[1:-1])),
    "count": lambda prompt: str(prompt[1:].count("a")),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def problems(family) -> list[Problem]:
    return [family.train_problem(i) for i in range(300)] + family.eval_problems(100)


def test_the_answer_is_right(family):
    assert [p.answer for p in problems(family)] == [TRUTH[family.name](p.prompt) for p in problems(family)]


def test_half_of_the_problems_are_hard(family):
    easy = sum(family.work(p.prompt).quick == p.answer for p in problems(family)[:300])
    assert 120 <= easy <= 180


def test_evaluation_problems_are_never_trained_on(family):
    evaluated = {p.prompt for p in family.eval_problems(1000)}
    assert evaluated
    assert not evaluated & {family.train_problem(i).prompt for i in range(2000)}


def test_evaluation_problems_differ(family):
    prompts = [p.prompt for p in family.eval_problems(64)]
    assert len(set(prompts)) == len(prompts) >= 32


def test_an_index_is_always_the_same_problem(family):
    assert family.train_problem(12345) == family.train_problem(12345)


@pytest.mark.parametrize(("careful", "first"), [(0.0, "q"), (1.0, "c")])
def test_solutions_without_slips(family, careful, first):
    rng = random.Random(0)
    for problem in problems(family):
        text = family.solution(problem, Habits(careful, slip=0.0), rng)
        work = family.work(problem.prompt)
        answer = work.answer if careful else work.quick
        assert text[0] == first
        assert family.extract(text) == answer
        assert family.reward(problem, text) == float(answer == problem.answer)


def test_a_slip_changes_at_most_one_digit(family):
    changed = 0
    for problem in problems(family):
        right = family.solution(problem, Habits(1.0, slip=0.0), random.Random(1))
        slipped = family.solution(problem, Habits(1.0, slip=1.0), random.Random(1))
        places = [i for i, (a, b) in enumerate(zip(right, slipped, strict=True)) if a != b]
        assert len(places) <= 1
        assert all(right[i].isdigit() and slipped[i].isdigit() for i in places)
        changed += len(places)
    assert changed > 150  # the digit drawn may be the one that was there


def test_texts_fit_the_model(family):
    for problem in problems(family):
        text = problem.prompt + family.solution(problem, Habits(1.0, 0.0), random.Random(0)) + END
        assert len(text) <= MAX_POSITIONS
        assert set(text) <= set(ALPHABET + END)


def test_extract_takes_what_follows_the_last_equals_sign():
    add = FAMILIES["add"]
    assert add.extract("c7+8=15;4+3+1=8=85") == "85"
    assert add.extract("q75") is None
    assert add.reward(Problem("add", "a47+38:", "85"), "q=85") == 1.0
    assert add.reward(Problem("add", "a47+38:", "85"), "q85") == 0.0


def test_work_of_the_docstring():
    assert FAMILIES["add"].work("a47+38:") == ("75", ["7+8=15", "4+3+1=8"], "85")
    assert FAMILIES["sub"].work("s52-38:") == ("26", ["12-8=4", "4-3=1"], "14")
    assert FAMILIES["parity"].work("p0110100:") == ("0", ["00111000110101"], "1")
    assert FAMILIES["sort"].work("o3142:") == ("1324", ["1324", "1234"], "1234")
    assert FAMILIES["count"].work("nabcaab:") == ("1", ["111233"], "3")
