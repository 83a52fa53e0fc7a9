r"""What counts as the answer in a ``\boxed{}``."""

import time

import pytest

from paec_kernels.train.tasks.boxes import boxed, is_blank


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # The last that is not empty
        (r"So \boxed{42}. I marked it with \boxed as asked.", "42"),
        (r"First \boxed{3}. No: \boxed{42}, as 40 + 2 = 42.", "42"),
        (r"\boxed{1} and \boxed{42}", "42"),
        (r"\boxed{42}\boxed{}", "42"),
        (r"\boxed{42} \boxed{ } \boxed{\,} \boxed{\text{}} \boxed{~}", "42"),
        (r"\boxed{42}, in \boxed{...} as asked; \boxed{\ldots}, \boxed{?}, \boxed{___}", "42"),
        (r"\boxed{}", None),
        ("the answer is 42", None),
        ("", None),
        # Spaces, and no braces
        (r"\boxed {42}", "42"),
        ("\\boxed\n  {\n 42 \n}", "42"),
        (r"\boxed 42", "42"),
        (r"$x = \boxed 42$", "42"),
        (r"\boxed42.", "42"),
        (r"\boxed -1.5, or so", "-1.5"),
        (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
        (r"\boxed \text{no real root}.", r"\text{no real root}"),
        (r"$\boxed x$", "x"),
        (r"It is \boxed{42}. Then \boxed and \boxed. and \boxed, \boxed a box", "42"),
        (r"\boxed", None),
        (r"\boxedx{42} \boxeds{42}", None),
        # Punctuation and dollars
        (r"\boxed{42.}", "42"),
        (r"\boxed{42,}", "42"),
        (r"\boxed{42\,.}", "42"),
        (r"\boxed{42;} \\", "42"),
        (r"\boxed{42\\}", "42"),
        (r"\boxed{$42.$}", "42"),
        (r"\boxed{5!}", "5!"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        # Braces
        (r"\boxed{\frac{1}{\sqrt{2}}} is {it}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{\}}", r"\{\}"),
        (r"\boxed{\left\} x}", r"\left\} x"),
        (r"{ \boxed{42}", "42"),
        (r"\boxed{42}}", "42"),
        (r"} \boxed{42}", "42"),
        (r"\boxed{42", "42"),
        (r"$\boxed{\frac{1}{2}$ is it", r"\frac{1}{2}"),
        ("\\boxed{42\nThat is it.", "42"),
        (r"\boxed{3 \boxed{42}", "42"),
        (r"\boxed{\boxed{42}}", "42"),
        (r"\boxed{\boxed{}}", None),
        (r"\boxed{{1}, {2}}", "{1}, {2}"),
        # Other commands
        (r"\fbox{42}", "42"),
        (r"\boxed{41} \fbox{42}", "42"),
        (r"\\boxed{42}", "42"),  # escaped once too often
        (r"x \\\boxed{42}", "42"),  # after a line break
    ],
)
def test_boxed(text: str, answer: str | None) -> None:
    assert boxed(text) == answer


@pytest.mark.parametrize(
    "text",
    [r"\boxed{" * 14_000, r"\boxed{" * 7_000 + "}" * 7_000, r"\boxed{}" * 12_000, "{" * 100_000, "\\" * 100_000]
    + [r"\boxed{" + " " * 99_000 + "1}", r"\boxed " * 14_000, r"\boxed{" + "." * 9_900 + "1}", r"\boxed{{" * 12_000]
    + [r"\boxed1" * 14_000, r"\boxed1{a" * 11_000],
    ids=range(11),
)
def test_no_text_takes_long(text: str) -> None:
    start = time.perf_counter()
    boxed(text)
    assert time.perf_counter() - start < 5


def test_is_blank() -> None:
    assert all(map(is_blank, ("", " ", "{}", "...", r"\quad \text{ }", r"\dots", "$ $")))
    assert not any(map(is_blank, ("0", "x", "-", r"\infty", r"\{\}", "∞", r"\text{no}")))
