"""Answers as math-verify finds and grades them, and the form in which they vote."""

import time

import pytest

pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.train.tasks.math_answers import final_answer, is_right, parse_expected


@pytest.mark.parametrize(
    "equal",
    [
        (r"\boxed{\frac{2}{4}}", r"so $x = \frac12$", "The answer is 1/2.", r"\boxed{0.5}", r"\boxed{50\%}"),
        ("Answer: 34", r"\boxed{34.0}", r"Thus \boxed{n = 34}.", r"\boxed{34^\circ}", "so 30 + 4 = 34"),
        (r"\boxed{2\sqrt{2}}", r"\boxed{\sqrt{8}}"),
        (r"\boxed{(x+1)^2}", r"\boxed{x^2+2x+1}"),
        (r"\boxed{2, 1}", r"\boxed{\{1,2\}}"),
        (r"\boxed{\{\sqrt{9}, 4\}}", r"\boxed{\{3, 4\}}"),  # sympy's order is another before it evaluates
        (r"\boxed{10^{20}}", r"\boxed{100000000000000000000}"),
        (r"\boxed{\text{(C)}}", r"\boxed{C}"),
        (r"\boxed{\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}}", r"\boxed{\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}}"),
        (r"\boxed{(1, \frac{4}{2}]}", r"\boxed{(1, 2]}"),
    ],
)
def test_equal_answers_vote_together_and_are_right(equal: tuple[str, ...]) -> None:
    assert len({final_answer(text) for text in equal}) == 1
    assert final_answer(equal[0]) is not None
    for text in equal:
        assert is_right(equal[0], text)


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
    ],
)
def test_different_answers_do_not(one: str, other: str) -> None:
    assert final_answer(one) != final_answer(other)
    assert not is_right(one, other)


def test_the_last_box_counts() -> None:
    text = r"First \boxed{3}. But wait, that is wrong: 5 + 7 = 12. So \boxed{4}, as 3 + 1 = 4 and not 5."
    assert final_answer(text) == "4"
    assert is_right("4", text)
    assert not is_right("3", text)


@pytest.mark.parametrize("text", ["", "I do not know.", r"\boxed{}"])
def test_no_answer(text: str) -> None:
    assert final_answer(text) is None
    assert not is_right("4", text)


@pytest.mark.parametrize("expected", ["204", "-3", r"\frac{1}{2}", r"\text{Evelyn}", r"x \in [-2,7]", r"$\pi$", "27.0"])
def test_answers_of_data_sets_need_no_dollars(expected: str) -> None:
    assert parse_expected(expected)
    assert is_right(expected, rf"Therefore \boxed{{{expected.strip('$')}}}.")


@pytest.mark.timeout(60)
def test_what_takes_too_long_stays_as_it_was_written() -> None:
    start = time.perf_counter()
    assert final_answer(r"\boxed{(x+y)^{100000}}") == "(x+y)^{100000}"
    assert final_answer(r"\boxed{2^{10000000000}}") == "4.36326863456e+3010299956"
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "text", [r"\boxed{\frac{1}{0}}", r"\boxed{\sqrt{-4} + 1}", r"\boxed{x < 5}", r"\boxed{\infty}"]
)
def test_odd_answers_raise_nothing(text: str) -> None:
    assert isinstance(final_answer(text), str)
