r"""Final answers of mathematical responses: graded by math-verify, never by rules of our own.

A response's answer is what stands in its last ``\boxed{}``; math-verify would join all that a response tried on its way
into a set. Without a box it is what math-verify finds. A number as programs write it, ``2e-5`` without spaces, is that
number; math-verify would read Euler's e.
"""

import re
from functools import lru_cache

from paec_kernels.train.tasks.boxes import boxed, is_blank, without_punctuation
from paec_kernels.train.tasks.grader import LENGTH, TEXT, GaveUp, Grader

GRADER = Grader("math")

_SCIENTIFIC = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([-+]?\d{1,9})")  # of longer exponents no number is made


def final_answer(text: str) -> str | None:
    """Return the final answer in ``text`` as it is written there, or None without one."""
    text = text[-TEXT:]
    found = boxed(text)
    return _found_without_box(text) if found is None else found


def is_right(expected: str, text: str) -> bool:
    """Return math-verify's verdict on the final answer in ``text``.

    An answer that it cannot grade, in `grader.SECONDS` or for its length of more than `grader.LENGTH`, is wrong, and
    counted in ``GRADER.given_up``.
    """
    text = text[-TEXT:]
    found = boxed(text)
    gold = _latex(boxed(expected) or expected)
    verdict, why = _verdict(gold, text) if found is None else _boxed_verdict(gold, found)
    if verdict is None:
        GRADER.give_up(found or text, why)
    return bool(verdict)


def same(one: str, other: str) -> bool | None:
    """Return whether math-verify holds two final answers equal, whichever is the expected one; None if it cannot tell.

    An answer that it cannot grade at all is equal to none but itself.
    """
    if one == other:
        return True
    if not (_can_be_graded(one) and _can_be_graded(other)):
        return False
    verdict, why = _are_same(*sorted((_latex(one), _latex(other))))
    if verdict is None:
        GRADER.give_up(f"{one} = {other}", why)
    return verdict


def is_readable(answer: str) -> bool:
    """Return whether a data set's answer, which is LaTeX with or without dollars, is one that can be graded."""
    if is_blank(answer) or len(answer) > LENGTH:
        return False
    return answer.isdecimal() or _can_be_graded(boxed(answer) or answer)


def _latex(answer: str) -> str:
    answer = without_punctuation(answer)
    if number := _SCIENTIFIC.fullmatch(answer):
        answer = rf"{number[1]} \times 10^{{{int(number[2])}}}"
    return rf"\boxed{{{answer}}}"


def _can_be_graded(answer: str) -> bool:
    return _boxed_verdict(r"\boxed{0}", answer)[0] is not None


def _boxed_verdict(expected: str, answer: str) -> tuple[bool | None, str]:
    if len(answer) > LENGTH:
        return None, f"longer than {LENGTH:,} characters"
    return _verdict(expected, _latex(answer))


@lru_cache(maxsize=512)
def _verdict(expected: str, text: str) -> tuple[bool | None, str]:
    """Return None where the verifier cannot tell, and why."""
    return _ask("is_right", expected, text)


def _ask(function: str, *arguments: str) -> tuple[bool | None, str]:
    try:
        return GRADER(function, *arguments), ""
    except GaveUp as why:
        return None, str(why)


@lru_cache(maxsize=512)
def _found_without_box(text: str) -> str | None:
    try:
        return GRADER("written", text)
    except GaveUp:  # counted where it is graded
        return None


@lru_cache(maxsize=4096)
def _are_same(one: str, other: str) -> tuple[bool | None, str]:
    return _ask("same", one, other)
