r"""The final answer that a response puts into a ``\boxed{}``, wherever and however it is written."""

import re

from paec_kernels.train.tasks.grader import LENGTH

_TOKEN = re.compile(r"(\\{1,2}(?:boxed|fbox)(?![A-Za-z])\s*)(\{?)|\\.|[{}]", re.DOTALL)
# Without a brace TeX takes what comes next, which is an answer where it is no word of prose: "with \boxed as asked".
_UNBRACED = re.compile(r"(?:[-+]?[\d.]|\\[A-Za-z])(?:\{[^{}\n]*\}|(?!\\(?:boxed|fbox))[^\s$])*|[A-Za-z](?=\s*\$)")
_UNCLOSED = re.compile(r"\s*((?:(?!\\(?:boxed|fbox))[^$\n])*)")
_BLANK = re.compile(r"\\(?:[,;:! ]|(?:q?quad|[lc]?dots|text[a-z]*|math[a-z]+|boxed|fbox)(?![A-Za-z]))|[\s~{}$.,;:?_…]")
_MARKS = (r"\,", r"\;", r"\:", r"\!", r"\ ", r"\\", r"\quad", r"\qquad", ".", ",", ";", ":", "~", " ", "\n", "\t", "\r")


def boxed(text: str) -> str | None:
    r"""Return what stands in the last box that is not empty, or None without one.

    ``\boxed`` and ``\fbox`` count, with spaces before the brace or without braces, as in ``\boxed 42``. Braces nest,
    and escaped ones do not count. A box that is never closed ends with its line or formula. Of boxes inside boxes the
    innermost counts. Dots, question marks, underscores and spaces alone are an empty box.
    """
    open_groups: list[int | None] = []  # for each brace that is open, where its box begins, or None
    spans = []
    for token in _TOKEN.finditer(text):
        if token[1] and token[2]:
            open_groups.append(token.end())
        elif token[1]:
            if found := _UNBRACED.match(text, token.end()):
                spans.append(found.span())
        elif token[0] == "{":
            open_groups.append(None)
        elif token[0] == "}" and open_groups:
            start = open_groups.pop()
            if start is not None:
                spans.append((start, token.start()))
    for start in open_groups:
        if start is not None and (found := _UNCLOSED.match(text, start)):
            spans.append(found.span(1))
    contents = (text[start:end] for start, end in sorted(spans, reverse=True))
    return next((without_punctuation(content) for content in contents if not is_blank(content)), None)


def is_blank(answer: str) -> bool:
    """Return whether only spaces, dots, braces and the like are written."""
    return len(answer) <= LENGTH and not _BLANK.sub("", answer)


def without_punctuation(answer: str) -> str:
    """Return the answer without dollars around it and without the punctuation and spaces at its end."""
    answer = answer.strip()
    if len(answer) > 1 and answer[0] == answer[-1] == "$":
        answer = answer.strip("$")
    end = len(answer)
    while not answer.endswith(r"\right.", 0, end):
        mark = next((mark for mark in _MARKS if answer.endswith(mark, 0, end)), None)
        if mark is None:
            break
        end -= len(mark)
    return answer[:end]
