"""The scores against cases counted by hand."""

import itertools

import numpy as np
import pytest

from paec_kernels.train.report import metrics

CORRECT = np.array([[True, False, False, True], [False, False, False, False], [True, True, True, True]])


def test_mean_at_k() -> None:
    assert metrics.mean_at_k(CORRECT).tolist() == [0.5, 0.0, 1.0]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(k: int) -> None:
    correct = np.arange(7) < np.arange(8)[:, None]  # 0 to 7 right of 7
    subsets = [correct[:, list(chosen)].any(axis=1) for chosen in itertools.combinations(range(7), k)]
    np.testing.assert_allclose(metrics.pass_at_k(correct, k), np.mean(subsets, axis=0), rtol=1e-14)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_k_needs_k_samples(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be 1 to the 4 samples of a problem, got {k}"):
        metrics.pass_at_k(CORRECT, k)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["7", "7", "3", None], "7", 1.0),
        (["7", "3", "3", None], "7", 0.0),
        (["7", "3", "3", "7"], "7", 1 / 2),  # a tie of two
        (["7", "3", "2", None], "7", 1 / 3),
        ([None, None, None, "7"], "7", 1.0),  # None is no vote, though it is the most frequent
        ([None, None, None, None], "7", 0.0),
    ],
)
def test_majority_vote(answers: list[str | None], right: str, expected: float) -> None:
    correct = np.array([[answer == right for answer in answers]])
    np.testing.assert_allclose(metrics.majority_vote(correct, [answers]), [expected])


def test_majority_vote_where_the_verifier_judges_equal_answers_apart() -> None:
    correct = np.array([[True, False, True, False]])
    np.testing.assert_allclose(metrics.majority_vote(correct, [["7", "7", "7", "3"]]), [2 / 3])


def close(one: str, other: str) -> bool:
    return abs(int(one) - int(other)) <= 1


def test_vote_classes_are_what_the_verifier_joins() -> None:
    answers = ["12", "7", None, "5", "11", "12", "6", "99"]
    assert metrics.vote_classes(answers, close) == ["12", "5", None, "5", "12", "12", "5", "99"]
    assert metrics.vote_classes([], close) == []
    assert metrics.vote_classes([None], close) == [None]


def test_vote_classes_do_not_depend_on_the_order() -> None:
    answers = ["1", "2", "2", "3", "9", "10", "14"]  # 1 and 3 are equal by way of 2
    for order in itertools.permutations(range(len(answers))):
        found = metrics.vote_classes([answers[i] for i in order], close)
        assert [found[order.index(i)] for i in range(len(answers))] == ["2", "2", "2", "2", "9", "9", "14"]


def test_vote_classes_ask_the_verifier_no_more_than_they_need() -> None:
    asked: list[tuple[str, str]] = []

    def same(one: str, other: str) -> bool:
        asked.append((one, other))
        return close(one, other)

    metrics.vote_classes(["5"] * 9 + [None], same)
    assert asked == []
    metrics.vote_classes(["1", "2", "3"] * 5, same)
    assert asked == [("1", "2"), ("1", "3"), ("2", "3")]
    asked.clear()
    metrics.vote_classes(["1", "2", "2", "3"], same)  # 1 and 3 are in one class when they would be asked for
    assert asked == [("2", "1"), ("2", "3")]


def test_vote_classes_stop_where_the_verifier_cannot_tell() -> None:
    asked: list[tuple[str, str]] = []

    def same(one: str, other: str) -> None:
        asked.append((one, other))

    answers = [str(number) for number in range(10)]
    assert metrics.vote_classes(answers, same) == answers
    assert len(asked) == metrics.UNDECIDED


def test_distinct_answers() -> None:
    assert metrics.distinct_answers([["7", "7", "3", None], [None, None, None, None]]).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("correct", [np.zeros((2, 3)), [[True]]])
def test_correct_must_be_bool(correct) -> None:
    with pytest.raises(TypeError, match="correct must be a bool array"):
        metrics.mean_at_k(correct)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"correct must be \[problems, k\] with k >= 1, got shape \(3,\)"):
        metrics.mean_at_k(np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match=r"answers must be as many as correct's \(1, 2\), got rows of \[1\]"):
        metrics.majority_vote(np.zeros((1, 2), dtype=bool), [["7"]])
