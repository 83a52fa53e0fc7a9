"""Final answers of mathematical responses: found and graded by math-verify, never by rules of our own."""

from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]
from math_verify.errors import TimeoutException  # type: ignore[import-untyped]
from math_verify.utils import timeout  # type: ignore[import-untyped]

SECONDS = 5  # for each answer, as math-verify has it; its timeout needs the main thread
DIGITS = 12  # math-verify compares numbers to 15, which rounding may not leave
LARGEST_EXACT = 10**100  # larger numbers are not written out: 2^(10^10) has three thousand million digits

_EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


@lru_cache(maxsize=4096)
def parse_response(text: str) -> list[Any]:
    """Return what math-verify finds: the answer as sympy has it, then as it was written; nothing if there is none.

    Only the last ``\\boxed{}`` counts; math-verify would join all that a response tried on its way into a set.
    """
    return parse(text[max(0, text.rfind("\\boxed")) :], _EXTRACTION, parsing_timeout=SECONDS)


@lru_cache(maxsize=4096)
def parse_expected(answer: str) -> list[Any]:
    """Parse a data set's answer, which is LaTeX without its dollars."""
    return parse_response(f"${answer}$")


def is_right(expected: str, text: str) -> bool:
    """Return math-verify's verdict on the final answer in ``text``."""
    return bool(verify(parse_expected(expected), parse_response(text), timeout_seconds=SECONDS))


@lru_cache(maxsize=4096)
def final_answer(text: str) -> str | None:
    """Return the final answer in ``text``, in a form that equal answers share, so that they vote together.

    Numbers are evaluated to DIGITS digits, so 1/2 is 0.5; expressions are expanded; an equation counts by its
    right-hand side; sets are sorted. What sympy cannot do in time stays as it was written.
    """
    parsed = parse_response(text)
    if not parsed:
        return None
    try:
        return timeout(SECONDS)(_canonical)(parsed[0])
    except (TimeoutException, ArithmeticError, AttributeError, TypeError, ValueError, RecursionError):
        return str(parsed[-1])


def _canonical(value: Any) -> str:
    if isinstance(value, sympy.Equality):
        value = value.rhs
    if isinstance(value, sympy.FiniteSet):
        return "{" + ", ".join(sorted(map(_canonical, value.args))) + "}"
    if isinstance(value, sympy.Interval):
        left, right = "(" if value.left_open else "[", ")" if value.right_open else "]"
        return f"{left}{_canonical(value.start)}, {_canonical(value.end)}{right}"
    if isinstance(value, sympy.MatrixBase):
        return str([[_canonical(entry) for entry in row] for row in value.tolist()])
    if isinstance(value, sympy.Tuple):
        return f"({', '.join(map(_canonical, value.args))})"
    if not isinstance(value, sympy.Expr):
        return str(value)
    return _number(value) if value.is_number else str(sympy.expand(value))


def _number(value: Any) -> str:
    number = sympy.N(value, DIGITS)
    if number.is_Float and abs(number) > LARGEST_EXACT:
        return str(number)
    value = value.doit()  # what math-verify parses is not evaluated yet
    if value.is_Integer:
        return str(value)
    number = sympy.N(value, DIGITS)
    return f"{float(number):.{DIGITS}g}" if number.is_Float else str(number)  # 2.0 as 2; complex numbers as they are
