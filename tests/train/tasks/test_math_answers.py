"""Answers as math-verify grades them, and which of them vote together."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.train.report.metrics import vote_classes
from paec_kernels.train.tasks import math_answers
from paec_kernels.train.tasks.grader import LENGTH, TEXT, Grader
from paec_kernels.train.tasks.math_answers import final_answer, is_readable, is_right, same


def classes(*texts: str) -> int:
    """How many votes the answers in these responses are."""
    return len(set(vote_classes([final_answer(text) for text in texts], same)) - {None})


@pytest.mark.parametrize(
    "equal",
    [
        (r"\boxed{\frac{2}{4}}", r"so $x = \frac12$", "The answer is 1/2.", r"\boxed{0.5}", r"\boxed{50\%}", "50%"),
        ("Answer: 34", r"\boxed{34.0}", r"Thus \boxed{n = 34}.", r"\boxed{34^\circ}", "so 30 + 4 = 34"),
        (r"\boxed{2\sqrt{2}}", r"\boxed{\sqrt{8}}"),
        (r"\boxed{(x+1)^2}", r"\boxed{x^2+2x+1}"),
        (r"\boxed{2, 1}", r"\boxed{\{1,2\}}"),
        (r"\boxed{\{\sqrt{9}, 4\}}", r"\boxed{\{3, 4\}}"),  # sympy's order is another before it evaluates
        (r"\boxed{10^{20}}", r"\boxed{100000000000000000000}"),
        (r"\boxed{\text{(C)}}", r"\boxed{C}"),
        (r"\boxed{\text{Evelyn}}", r"\boxed{Evelyn}", r"\boxed{\text{Evelyn}.}"),
        (r"\boxed{\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}}"),
        (r"\boxed{(1, \frac{4}{2}]}", r"\boxed{(1, 2]}"),
        (
            r"\boxed{0.00002}",
            r"\boxed{2e-05}",
            r"\boxed{2e-5}",
            r"\boxed{2 \times 10^{-5}}",
            r"\boxed{\frac{1}{50000}}",
        ),
        (r"\boxed{1.5E+6}", r"\boxed{1500000}", r"\boxed{1,500,000}", r"\boxed{15e5}"),
        (
            r"\boxed{42}",
            r"\boxed{42.}",
            r"\boxed {42}",
            r"\boxed 42",
            r"\boxed{42}\boxed{}",
            r"\boxed{42} as \boxed asks",
        ),
    ],
)
def test_equal_answers_vote_together_and_are_right(equal: tuple[str, ...]) -> None:
    assert classes(*equal) == 1
    expected = str(final_answer(equal[0]))
    for text in equal:
        assert is_right(expected, text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\boxed{34}", r"\boxed{35}"),
        (r"\boxed{(1, 2]}", r"\boxed{(1, 2)}"),
        (r"\boxed{x+1}", r"\boxed{x+2}"),
        (r"\boxed{\text{Ann}}", r"\boxed{\text{Bob}}"),
        (r"\boxed{10^{20}}", r"\boxed{100000000000000000001}"),
        (r"\boxed{\{1,2\}}", r"\boxed{\{1,2,3\}}"),
        (r"\boxed{0.333}", r"\boxed{\frac13}"),
        (r"\boxed{\frac{x^2}{4}+\frac{y^2}{3}=1}", r"\boxed{1}"),
        (r"\boxed{2e-5}", r"\boxed{2e - 5}"),  # Euler's
        (r"\boxed{0.00002}", r"\boxed{0.0000204}"),
        (r"\boxed{0.0000001}", r"\boxed{0.0000002}"),
        (r"\boxed{1e-300}", r"\boxed{0.0}"),
    ],
)
def test_different_answers_do_not(one: str, other: str) -> None:
    assert classes(one, other) == 2
    assert not is_right(one, other)


def test_math_verify_holds_them_equal_both_ways_or_they_are_not_the_same() -> None:
    assert is_right("1", r"\boxed{x^2 + 3 = 1}")  # it takes the right-hand side for the answer
    assert not is_right("x^2 + 3 = 1", r"\boxed{1}")
    assert same("1", "x^2 + 3 = 1") is False
    assert same("x = 1", "1") is True


def test_the_last_box_counts() -> None:
    text = r"First \boxed{3}. But wait, that is wrong: 5 + 7 = 12. So \boxed{4}, as 3 + 1 = 4 and not 5."
    assert final_answer(text) == "4"
    assert is_right("4", text)
    assert not is_right("3", text)


@pytest.mark.parametrize("text", ["", "I do not know.", r"\boxed{}"])
def test_no_answer(text: str) -> None:
    assert final_answer(text) is None
    assert not is_right("4", text)


@pytest.mark.parametrize(
    "expected",
    [
        "204",
        "-3",
        r"\boxed{5}",
        r"\frac{1}{2}",
        r"\text{Evelyn}",
        r"x \in [-2,7]",
        r"$\pi$",
        "27.0",
        "1e-7",
        "0." + "0" * 60 + "1",
    ],
)
def test_answers_of_data_sets_need_no_dollars(expected: str) -> None:
    assert is_readable(expected)
    assert is_right(expected, rf"Therefore \boxed{{{expected.strip('$')}}}.")
    assert not is_right(expected, r"\boxed{77}")


@pytest.mark.parametrize("answer", ["", " ", "...", "1" * (LENGTH + 1)])
def test_what_is_no_answer_is_not_readable(answer: str) -> None:
    assert not is_readable(answer)


@pytest.mark.parametrize(
    "text",
    [r"\boxed{\frac{1}{0}}", r"\boxed{\sqrt{-4} + 1}", r"\boxed{x < 5}", r"\boxed{\infty}", r"\boxed{\nonsense{}"],
)
def test_odd_answers_raise_nothing(text: str) -> None:
    assert isinstance(final_answer(text), str)
    assert not is_right("4", text)
    assert same("4", str(final_answer(text))) is False


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Grader:
    grader = Grader("math", 0.5)
    monkeypatch.setattr(math_answers, "GRADER", grader)
    for cached in (math_answers._verdict, math_answers._are_same, math_answers._found_without_box):
        cached.cache_clear()
    return grader


TOWER = r"\boxed{10^{10^{10}}}"


@pytest.mark.filterwarnings("ignore:answers that could not be graded")
def test_what_cannot_be_graded_is_wrong_and_counted_and_votes_for_itself(impatient: Grader) -> None:
    with ThreadPoolExecutor(1) as thread:  # where no signal reaches
        assert thread.submit(is_right, "4", TOWER).result() is False
    assert impatient.given_up == 1
    assert not is_right("4", TOWER)
    assert not is_right("4", rf"\boxed{{{'1+' * LENGTH}}}")
    assert impatient.given_up == 3  # each time
    answers = [final_answer(text) for text in (TOWER, r"\boxed{4}", TOWER, r"\boxed{4.0}", r"\boxed{4}")]
    assert vote_classes(answers, same) == ["10^{10^{10}}", "4", "10^{10^{10}}", "4", "4"]
    assert not is_readable("10^{10^{10}}")


@pytest.mark.filterwarnings("ignore:answers that could not be graded")
def test_any_exponent_is_graded() -> None:
    """Python reads no whole number of more than 4,300 digits."""
    for exponent in ("1" * 5000, "1" * TEXT, "-" + "9" * 400):
        assert not is_right("3", rf"\boxed{{1e{exponent}}}")
        assert not is_right("3", f"1e{exponent}")
        assert same("3", f"1e{exponent}") is False
    is_readable("1e" + "1" * 5000)  # raises nothing


def test_free_text_may_begin_with_an_empty_box() -> None:
    """The length of a boxed answer is bounded, that of the text around one is not."""
    assert is_right("42", r"\boxed{}" + " so we think" * (LENGTH // 10) + " the answer is $42$")


def test_a_warning_names_the_answer(impatient: Grader) -> None:
    with pytest.warns(UserWarning, match=r"could not be graded.*: 1 so far.*'10\^\{10\^\{10\}\}': it takes more than"):
        is_right("4", TOWER)


def test_only_the_end_of_a_long_response_is_read() -> None:
    assert is_right("4", "1 " * TEXT + r"\boxed{4}")
    assert is_right("4", "x" * 10_000_000 + " so the answer is 4")
    assert not is_right("4", r"\boxed{4}" + " " * TEXT)


def test_the_order_of_answers_decides_nothing() -> None:
    answers: list[str | None] = [
        r"\frac13",
        "0.333333",
        "0.3333333",
        "0.3333334",
        "1",
        "x = 1",
        "1.0",
        "x+1",
        "1+x",
        None,
    ]
    found = [set(zip(answers, vote_classes(answers, same), strict=True))]
    for seed in range(5):
        random.Random(seed).shuffle(answers)
        found.append(set(zip(answers, vote_classes(answers, same), strict=True)))
    assert all(pairs == found[0] for pairs in found)


@pytest.mark.filterwarnings("ignore:answers that could not be graded")
def test_code_in_an_answer_is_not_run(tmp_path: Path) -> None:
    code = f"__import__('os').system('touch {tmp_path}/run')"
    for text in (rf"\boxed{{{code}}}", f"The answer is {code}", code, rf"\boxed{{\text{{{code}}}}}", f"${code}$"):
        assert not is_right("4", text)
        final_answer(text)
        assert same(code, "4") is False
    assert not list(tmp_path.iterdir())
