"""The scores against cases counted by hand, and the intervals against what they promise."""

import itertools
import math

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


def test_the_bootstrap_weighs_tasks_equally() -> None:
    small, large = np.array([[1.0, 4.0]]), np.array([[0.0, 4.0]] * 9)
    first, second = metrics.bootstrap([small, large])
    assert first == (0.5, 0.5, 0.5)  # pooled problems would give 0.1; equal problems leave nothing to resample
    assert second == (4.0, 4.0, 4.0)


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=(400, 1))
    (estimate,) = metrics.bootstrap([values], resamples=5000)
    half = 1.96 * values.std() / math.sqrt(400)  # the central limit theorem's
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.06)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.06)


def test_two_tasks_halve_each_others_spread() -> None:
    values = np.random.default_rng(1).normal(size=(400, 1))
    (one,) = metrics.bootstrap([values], resamples=5000)
    (two,) = metrics.bootstrap([values, values], resamples=5000)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(1 / math.sqrt(2), rel=0.06)


def test_the_bootstrap_repeats() -> None:
    values = np.random.default_rng(1).normal(size=(30, 2))
    assert metrics.bootstrap([values], seed=3) == metrics.bootstrap([values], seed=3)
    assert metrics.bootstrap([values], seed=3) != metrics.bootstrap([values], seed=4)


def test_the_bootstrap_needs_problems() -> None:
    with pytest.raises(ValueError, match=r"tasks must be .* problems >= 1, got \[\(3, 1\), \(0, 1\)\]"):
        metrics.bootstrap([np.zeros((3, 1)), np.zeros((0, 1))])


def test_t_interval() -> None:
    # s = sqrt(5/2), and a table's t of 0.975 at 4 degrees of freedom is 2.776.
    mean, low, high = metrics.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert (low, high) == pytest.approx((3 - 2.776 * math.sqrt(0.5), 3 + 2.776 * math.sqrt(0.5)), rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_fewer_than_five_values_give_no_interval(n: int) -> None:
    assert metrics.t_interval([2.0, 3.0, 4.0, 5.0][:n]) == pytest.approx(
        (2 + (n - 1) / 2, math.nan, math.nan), nan_ok=True
    )


def test_differences_are_paired_by_seed() -> None:
    values = {1: 5.0, 2: 15.0, 3: 25.0, 4: 35.0, 5: 45.0, 9: 100.0}
    baseline = {5: 44.0, 4: 34.0, 3: 24.0, 2: 14.0, 1: 4.0}
    assert metrics.paired_difference(values, baseline) == (1.0, 1.0, 1.0)
    assert metrics.paired_difference({7: 1.0}, baseline) is None


@pytest.mark.parametrize("correct", [np.zeros((2, 3)), [[True]]])
def test_correct_must_be_bool(correct) -> None:
    with pytest.raises(TypeError, match="correct must be a bool array"):
        metrics.mean_at_k(correct)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"correct must be \[problems, k\] with k >= 1, got shape \(3,\)"):
        metrics.mean_at_k(np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match=r"answers must be as many as correct's \(1, 2\), got rows of \[1\]"):
        metrics.majority_vote(np.zeros((1, 2), dtype=bool), [["7"]])
    with pytest.raises(ValueError, match="values must hold at least one number"):
        metrics.t_interval([])
