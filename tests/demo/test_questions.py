import pytest

from paec_kernels.demo.questions import EXAMPLES, QUESTIONS, Question, messages, reward


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("9 + 6 = 15. The answer is 15.", 15, 1.0),
        ("15", 15, 1.0),
        ("15.0", 15, 1.0),
        ("It is 1,500 in all.", 1500, 1.0),
        ("15 at first, but then 16.", 15, 0.0),
        ("It is 15.5", 15, 0.0),
        ("the answer is -15", 15, 0.0),
        ("the answer is -15", -15, 1.0),
        ("that makes 20 - 15", 15, 1.0),
        ("that makes 20-15", 15, 1.0),
        ("115", 15, 0.0),
        ("fifteen", 15, 0.0),
        ("", 15, 0.0),
    ],
)
def test_reward_is_for_the_last_number(text: str, answer: int, expected: float) -> None:
    assert reward(Question("?", answer), text) == expected


@pytest.mark.parametrize(("asked", "answered"), EXAMPLES)
def test_worked_examples_are_not_among_the_questions(asked: str, answered: str) -> None:
    assert asked not in {question.text for question in QUESTIONS}


def test_messages_end_with_the_question() -> None:
    chat = messages(QUESTIONS[0])
    assert [message["role"] for message in chat] == ["user", "assistant", "user", "assistant", "user"]
    assert chat[-1]["content"] == QUESTIONS[0].text
