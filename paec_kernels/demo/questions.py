"""Arithmetic questions that a very small model gets right now and then, and the verifier that rewards it."""

import re
from typing import NamedTuple


class Question(NamedTuple):
    text: str
    answer: int


QUESTIONS = (
    Question("What is 9 + 6?", 15),
    Question("What is 6 * 7?", 42),
    Question("A box holds 4 pens. How many pens do 3 boxes hold?", 12),
    Question("What is 5 * 3?", 15),
)

# Worked examples ahead of each question: they show a short form that ends in the answer.
EXAMPLES = (
    (
        "Mia has 6 pens and buys 5 more. How many pens does she have?",
        "She starts with 6 pens and adds 5, and 6 + 5 = 11. The answer is 11.",
    ),
    ("What is 4 * 3?", "4 * 3 means three fours, and 4 + 4 + 4 = 12. The answer is 12."),
)

_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?")  # in "20-15" the minus is no sign


def messages(question: Question) -> list[dict[str, str]]:
    """The chat that asks ``question``, after the worked examples."""
    chat = []
    for asked, answered in EXAMPLES:
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*chat, {"role": "user", "content": question.text}]


def reward(question: Question, text: str) -> float:
    """1.0 if the last number in ``text`` is the answer, else 0.0."""
    numbers = _NUMBER.findall(text)
    return float(bool(numbers) and float(numbers[-1].replace(",", "")) == question.answer)
