"""Scores of sampled answers, a value for each problem.

``correct`` is bool ``[problems, k]``; ``answers`` is ``[problems][k]``, each a string that equal answers share (see
`vote_classes`), or None for a response without an answer.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

UNDECIDED = 3  # pairs of a problem's answers, after which no more are compared: each takes seconds

Answers = Sequence[Sequence[str | None]]


def mean_at_k(correct: np.ndarray) -> np.ndarray:
    """Return the share of a problem's samples that are right, float64 ``[problems]``."""
    return _checked(correct).mean(axis=1)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Return the chance that k of a problem's n samples, drawn without replacement, hold a right one; ``[problems]``.

        1 - C(n - c, k) / C(n, k) = 1 - product over i = n - c + 1 .. n of (1 - k / i),  c of the n are right

    the unbiased estimate of Chen et al. 2021 (arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: k is not in 1 .. n.
    """
    n = _checked(correct).shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be 1 to the {n} samples of a problem, got {k!r}")
    missed = [np.prod(1 - k / np.arange(n - c + 1, n + 1)) if n - c >= k else 0.0 for c in correct.sum(axis=1)]
    return 1 - np.array(missed)


def majority_vote(correct: np.ndarray, answers: Answers) -> np.ndarray:
    """Return maj@k, 1 where the most frequent answer is right, ``[problems]``.

    None is no vote, and without any vote a problem scores 0. Answers that tie for the most votes are drawn with
    equal chances, and the expected value counts.
    """
    shape = _checked(correct).shape
    if len(answers) != shape[0] or any(len(row) != shape[1] for row in answers):
        raise ValueError(f"answers must be as many as correct's {shape}, got rows of {[len(row) for row in answers]}")
    scores = []
    for row, right in zip(answers, correct, strict=True):
        votes = Counter(answer for answer in row if answer is not None)
        most = max(votes.values(), default=0)
        # All votes for winners, which have equally many; a verifier may judge two of the same class apart.
        winners = [r for answer, r in zip(row, right, strict=True) if answer is not None and votes[answer] == most]
        scores.append(float(np.mean(winners)) if winners else 0.0)
    return np.array(scores)


def vote_classes(answers: Sequence[str | None], same: Callable[[str, str], bool | None]) -> list[str | None]:
    """Return for each of a problem's answers the name of its class, under which it votes.

    Answers are in one class if the verifier holds them equal, or each equal to one between them, as 1/3 and 0.333333
    may be to 0.3333. The classes do not depend on the answers' order. The one that most responses give names its class.

    Args:
        same: the verifier, of two different answers in any order. Those of which it cannot tell (None) are not equal;
            after UNDECIDED such pairs no more are compared.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    names = {answer: answer for answer in sorted(votes, key=lambda answer: (-votes[answer], len(answer), answer))}
    undecided = 0
    for one, other in itertools.combinations(names, 2):
        if names[one] != names[other] and undecided < UNDECIDED:
            verdict = same(one, other)
            undecided += verdict is None
            if verdict:
                first, second = sorted((names[one], names[other]), key=list(names).index)
                names = {answer: first if name == second else name for answer, name in names.items()}
    return [None if answer is None else names[answer] for answer in answers]


def distinct_answers(answers: Answers) -> np.ndarray:
    """Return how many different answers a problem got, None not counted; float64 ``[problems]``."""
    return np.array([float(len(set(row) - {None})) for row in answers])


def _checked(correct: np.ndarray) -> np.ndarray:
    if not isinstance(correct, np.ndarray) or correct.dtype != bool:
        raise TypeError(f"correct must be a bool array, got {getattr(correct, 'dtype', type(correct).__name__)}")
    if correct.ndim != 2 or correct.shape[1] == 0:
        raise ValueError(f"correct must be [problems, k] with k >= 1, got shape {correct.shape}")
    return correct
