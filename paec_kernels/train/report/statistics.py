"""What numbers over problems or seeds can tell: intervals, tests that decide between arms, and outcomes of a run."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from paec_kernels.checks import integer, number, shown
from paec_kernels.extras import extra

with extra("train"):
    from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95  # of every interval
ENOUGH = 5  # values for an interval over seeds; a t interval of two is 18 times as wide as of many, and tells nothing
RESAMPLES = 10_000  # of a bootstrap over seeds
EXACT_UP_TO = 20  # differences: half of the sums of their 2^20 sign patterns take 4 MB, and the other half none
SIGN_PATTERNS = 100_000  # drawn for more differences than that
ROUNDING = 1e-9  # of what is summed: equal sums in another order differ by less

Key = TypeVar("Key", bound=Hashable)
Pair = tuple[str, str]  # an arm, and the one that it is compared with
Scores = Mapping[str, Mapping[int, Mapping[str, float]]]  # by arm, seed and outcome, as `compare.Comparison.scores`


class Estimate(NamedTuple):
    """A mean with its interval; ``low`` and ``high`` are NaN where the data cannot give one."""

    mean: float
    low: float
    high: float


class PairedComparison(NamedTuple):
    """An arm against another in one outcome, over the seeds that both have."""

    arm: str
    baseline: str
    outcome: str
    planned: bool
    pairs: int
    mean: float  # of the arm, as its IQM; a share, where the outcome is 0 or 1
    baseline_mean: float
    iqm: float
    baseline_iqm: float
    difference: Estimate  # arm - baseline, by the bootstrap
    p_value: float  # of the sign-flip test
    adjusted_p_value: float  # over the planned comparisons in this outcome; NaN for those not planned


def bootstrap(tasks: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0) -> list[Estimate]:
    """Return macro-averages over tasks with 95 % percentile intervals, problems resampled within each task.

    A task weighs the same whatever the number of its problems. The interval tells what other problems of the same
    kind would have given; training again with another seed is not in it.

    Args:
        tasks: for each, values ``[problems, M]``; problems may differ in number, M may not.
        seed: seed of the resampling, which is the same for each of the M columns.
    Returns:
        M estimates.
    Raises:
        ValueError: no task, or one without problems.
    """
    if not tasks or any(values.ndim != 2 or not len(values) for values in tasks):
        raise ValueError(f"tasks must be [problems, M] each, problems >= 1, got {[v.shape for v in tasks]}")
    rng = np.random.default_rng(seed)
    means = np.mean([values.mean(axis=0) for values in tasks], axis=0)  # [M]
    resampled = np.mean(
        # How often each problem is drawn, instead of which: [resamples, problems] @ [problems, M].
        [rng.multinomial(len(v), np.full(len(v), 1 / len(v)), size=resamples) @ v / len(v) for v in tasks],
        axis=0,
    )  # [resamples, M]
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return [Estimate(*row) for row in np.stack([means, low, high], axis=1).tolist()]


def t_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean with Student's 95 % t interval: of runs with different seeds, or of their paired differences.

        mean +- t(n - 1) * s / sqrt(n)

    It takes the values as draws from one normal distribution.

    Args:
        values: n numbers; with fewer than ENOUGH the interval is NaN. A NaN among them makes everything NaN.
    Raises:
        ValueError: no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = float(np.mean(values))
    if n < ENOUGH:
        return Estimate(mean, np.nan, np.nan)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def bootstrap_interval(
    values: ArrayLike, strata: Sequence[int] | None = None, statistic: Callable[..., Any] = np.mean
) -> Estimate:
    """Return a statistic over seeds with its 95 % percentile bootstrap interval, seeds resampled within strata.

    It assumes no distribution and is as lopsided as the values are, but of few it is too narrow: 8 differences between
    arms that find something or do not hold their mean in 84 % of such intervals, 16 in 90 % (t: 98 and 96 %). So it
    tells a size, and `sign_flip_test` decides. The resampling is the same in each call (Efron & Tibshirani 1993,
    chapter 13; in strata as in Agarwal et al. 2021, arXiv 2108.13264).

    Args:
        values: n numbers, one a seed; with fewer than ENOUGH the interval is NaN.
        strata: n labels, of warm starts say: the interval is then about other seeds of the same warm starts. A
            stratum's mean varies only if it has two values or more.
        statistic: of the last axis of an array, taking ``axis``: np.mean or `iqm`.
    Raises:
        ValueError: no values, or one that is not finite; strata of another number, or one with a single value.
    """
    numbers = _finite("values", values)
    n = len(numbers)
    labels = np.zeros(n) if strata is None else np.asarray(strata)
    if labels.shape != (n,):
        raise ValueError(f"strata must be as many as the {n} values, got {shown(strata)}")
    sizes = Counter(labels.tolist())
    if strata is not None and 1 in sizes.values():
        raise ValueError(f"strata must hold at least 2 values each, got {dict(sizes)}")
    estimate = float(statistic(numbers, axis=-1))
    if n < ENOUGH:
        return Estimate(estimate, np.nan, np.nan)
    rng = np.random.default_rng(0)
    drawn = np.empty((RESAMPLES, n))
    for label in sizes:
        of_stratum = labels == label
        drawn[:, of_stratum] = rng.choice(numbers[of_stratum], size=(RESAMPLES, sizes[label]))
    low, high = np.quantile(statistic(drawn, axis=-1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(estimate, float(low), float(high))


def iqm(values: ArrayLike, axis: int = -1) -> Any:
    """Return the interquartile mean: of n values the mean without the floor(n / 4) lowest and as many highest.

    This is `scipy.stats.trim_mean`, as in the code of Agarwal et al. 2021 (arXiv 2108.13264): where 4 does not divide n
    a value is kept whole or dropped whole, so that a little more than the middle half counts.
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def paired_differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> np.ndarray:
    """Return values - baseline for the seeds in both, in their order; float64, empty if there are none.

    Runs with the same seed start from the same weights and see the same problems, so much of what a seed does cancels.
    """
    return np.array([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())], dtype=float)


def sign_flip_test(differences: ArrayLike) -> float:
    """Return the two-sided p-value of paired differences' mean under random flips of their signs.

        p = share of the 2^n sign patterns s with |sum of s_i d_i| >= |sum of d_i|

    If an arm makes no difference, each seed's d is as likely to have come out as -d, however its size is distributed
    (Fisher 1935, The Design of Experiments, section 21). The smallest p that n differences can give is 2 / 2^n. All
    patterns count up to n = EXACT_UP_TO. Beyond, b of m drawn ones are as extreme, and p = (b + 1) / (m + 1), so that p
    is at most alpha with chance alpha at most (Phipson & Smyth 2010, arXiv 1603.05766). Each call draws the same.

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    d = _finite("differences", differences)
    least = abs(d.sum()) - ROUNDING * np.abs(d).sum()  # a tie is as extreme, whichever way its sum was rounded
    if len(d) <= EXACT_UP_TO:
        sums = d[:1]  # its flip gives the other half of the patterns, with the same sizes
        for difference in d[1:]:
            sums = np.concatenate([sums + difference, sums - difference])
        return float(np.mean(np.abs(sums) >= least))
    rng = np.random.default_rng(0)
    as_extreme = 0
    for _ in range(100):  # parts, which bound the memory
        signs = rng.choice([-1.0, 1.0], size=(SIGN_PATTERNS // 100, len(d)))
        as_extreme += int(np.count_nonzero(np.abs(signs @ d) >= least))
    return (as_extreme + 1) / (SIGN_PATTERNS + 1)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Return a family's p-values adjusted by Holm 1979 (Scand. J. Statist. 6, 65-70), under the same names.

        adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)),  p_(1) <= ... <= p_(m)

    With those of at most alpha taken for effects, the chance that any of them is none is alpha at most, however the
    tests depend on each other.

    Raises:
        TypeError, ValueError: a p-value that is no number in [0, 1].
    """
    ordered = sorted(p_values, key=lambda name: number(f"p_values[{name!r}]", p_values[name], least=0, most=1))
    factors = np.arange(len(ordered), 0, -1)
    adjusted = np.minimum(1, np.maximum.accumulate(factors * [p_values[name] for name in ordered]))
    found = dict(zip(ordered, adjusted.tolist(), strict=True))
    return {name: found[name] for name in p_values}


def reward_area(reward: ArrayLike) -> float:
    """Return the area under a run's reward over its batches, over their number: the mean reward of all of them.

    Of two runs that end alike the one that learned sooner has more.
    """
    return float(_finite("reward", reward).mean())


def batches_to_discovery(reward: ArrayLike, level: float, window: int) -> int:
    """Return the first batch, counted from 1, at which the mean of the last ``window`` rewards reaches ``level``.

    The first window ends at batch ``window``. A run that never gets there is censored and counts as its batches + 1,
    the least that it can have taken, so a mean over runs is too low. Report beside it the IQM, the share of the runs
    that got there, and a sign-flip test, which holds all the same: if an arm makes no difference, as many of its runs
    are censored.

    Raises:
        TypeError, ValueError: a reward or level that is not finite; a window that is not in 1 .. batches.
    """
    rewards = _finite("reward", reward)
    number("level", level)
    integer("window", window, least=1, most=len(rewards))
    means = np.lib.stride_tricks.sliding_window_view(rewards, window).mean(axis=-1)
    reached = np.flatnonzero(means >= level - ROUNDING * abs(level))
    return int(reached[0]) + window if len(reached) else len(rewards) + 1


def planned_comparisons(
    scores: Scores,
    planned: Sequence[Pair],
    outcomes: Sequence[str],
    *,
    exploratory: Sequence[Pair] = (),
    warm_starts: int = 1,
) -> list[PairedComparison]:
    """Return each outcome's planned comparisons, paired by seed and adjusted by `holm`, then the exploratory ones.

    A plan is made before the runs. Its comparisons in one outcome are a family: a false win in any of them has chance
    .05 at most at adjusted p <= .05. Each outcome has a family of its own, so say beforehand which outcome decides.
    Exploratory comparisons stay unadjusted: they suggest, and decide nothing.

    Args:
        planned: pairs of an arm and its baseline.
        exploratory: further such pairs.
        warm_starts: how many weights the runs start from, seed s from those of s mod ``warm_starts``. The bootstrap's
            seeds are resampled among those that start alike, so each needs two pairs or more.
    Raises:
        ValueError: no plan; a pair twice, in either order, or of one arm; an arm, seed or outcome without scores.
    """
    integer("warm_starts", warm_starts, least=1)
    pairs = [*planned, *exploratory]
    if not planned:
        raise ValueError("planned must be at least one pair of an arm and its baseline, got none")
    if len({frozenset(pair) for pair in pairs if len(set(pair)) == 2}) < len(pairs):
        raise ValueError(f"planned and exploratory must be different pairs of two arms each, got {pairs}")
    rows = []
    for outcome in outcomes:
        found = {pair: _compared(scores, pair, outcome, warm_starts) for pair in pairs}
        adjusted = holm({pair: found[pair].p_value for pair in planned})
        for pair, row in found.items():
            is_planned = pair in adjusted
            rows.append(row._replace(planned=is_planned, adjusted_p_value=adjusted.get(pair, np.nan)))
    return rows


def _compared(scores: Scores, pair: Pair, outcome: str, warm_starts: int) -> PairedComparison:
    """Compare two arms in one outcome, as if it were not planned."""
    for arm in pair:
        if arm not in scores:
            raise ValueError(f"scores must hold the arm {arm!r}, got {', '.join(scores)}")
    seeds = sorted(scores[pair[0]].keys() & scores[pair[1]].keys())
    if not seeds:
        raise ValueError(f"scores must hold a seed that both {pair[0]!r} and {pair[1]!r} have, got none")
    for arm in pair:
        for seed in seeds:
            if outcome not in scores[arm][seed]:
                raise ValueError(
                    f"scores of {arm!r}, seed {seed}, must hold {outcome!r}, got {list(scores[arm][seed])}"
                )
    values, baseline = (
        _finite(f"{outcome!r} of {arm!r}", [scores[arm][seed][outcome] for seed in seeds]) for arm in pair
    )
    differences = values - baseline
    return PairedComparison(
        arm=pair[0],
        baseline=pair[1],
        outcome=outcome,
        planned=False,
        pairs=len(seeds),
        mean=float(values.mean()),
        baseline_mean=float(baseline.mean()),
        iqm=float(iqm(values)),
        baseline_iqm=float(iqm(baseline)),
        difference=bootstrap_interval(
            differences, None if warm_starts == 1 else [seed % warm_starts for seed in seeds]
        ),
        p_value=sign_flip_test(differences),
        adjusted_p_value=np.nan,
    )


def _finite(name: str, values: ArrayLike) -> np.ndarray:
    """Return numbers as float64 ``[n]``."""
    numbers = np.asarray(values, dtype=float)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be one finite number or more in a row, got {shown(values)}")
    return numbers
