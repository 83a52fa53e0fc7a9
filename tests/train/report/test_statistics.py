"""Intervals and tests against cases counted by hand and against what they promise, on numbers made for it."""

import math

import numpy as np
import pytest
from scipy.stats import binom, trim_mean

from paec_kernels.train.report import statistics
from paec_kernels.train.report.statistics import (
    batches_to_discovery,
    bootstrap,
    bootstrap_interval,
    holm,
    iqm,
    paired_differences,
    planned_comparisons,
    reward_area,
    sign_flip_test,
    t_interval,
)

SEEDS = range(16)


def found_or_not(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return scores of runs of which 85 % find the route."""
    return np.where(rng.random(n) < 0.85, 0.85, 0.3) + 0.03 * rng.normal(size=n)


def plausible(count: int, of: int, chance: float) -> bool:
    """Tell whether all but one experiment in 1,000 would count as few and as many."""
    low, high = binom.interval(0.999, of, chance)
    return low <= count <= high


def test_the_bootstrap_weighs_tasks_equally() -> None:
    small, large = np.array([[1.0, 4.0]]), np.array([[0.0, 4.0]] * 9)
    first, second = bootstrap([small, large])
    assert first == (0.5, 0.5, 0.5)  # pooled problems would give 0.1; equal problems leave nothing to resample
    assert second == (4.0, 4.0, 4.0)


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(size=(400, 1))
    (estimate,) = bootstrap([values], resamples=5000)
    half = 1.96 * values.std() / math.sqrt(400)  # the central limit theorem's
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.06)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.06)


def test_two_tasks_halve_each_others_spread() -> None:
    values = np.random.default_rng(1).normal(size=(400, 1))
    (one,) = bootstrap([values], resamples=5000)
    (two,) = bootstrap([values, values], resamples=5000)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(1 / math.sqrt(2), rel=0.06)


def test_the_bootstrap_repeats() -> None:
    values = np.random.default_rng(1).normal(size=(30, 2))
    assert bootstrap([values], seed=3) == bootstrap([values], seed=3)
    assert bootstrap([values], seed=3) != bootstrap([values], seed=4)


def test_the_bootstrap_needs_problems() -> None:
    with pytest.raises(ValueError, match=r"tasks must be .* problems >= 1, got \[\(3, 1\), \(0, 1\)\]"):
        bootstrap([np.zeros((3, 1)), np.zeros((0, 1))])


def test_t_interval() -> None:
    # s = sqrt(5/2), and a table's t of 0.975 at 4 degrees of freedom is 2.776.
    mean, low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert (low, high) == pytest.approx((3 - 2.776 * math.sqrt(0.5), 3 + 2.776 * math.sqrt(0.5)), rel=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_fewer_than_five_values_give_no_interval(n: int) -> None:
    assert t_interval([2.0, 3.0, 4.0, 5.0][:n]) == pytest.approx((2 + (n - 1) / 2, math.nan, math.nan), nan_ok=True)


def test_differences_are_paired_by_seed() -> None:
    values = {1: 5.0, 2: 15.0, 3: 25.0, 4: 35.0, 5: 45.0, 9: 100.0}
    baseline = {5: 44.0, 4: 34.0, 3: 24.0, 2: 14.0, 1: 4.0}
    assert paired_differences(values, baseline).tolist() == [1.0] * 5
    assert paired_differences({7: 1.0}, baseline).tolist() == []


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([3.0], 1.0),
        ([1.0, 2.0, 3.0], 2 / 8),  # only all and none of the signs give 6
        ([1.0, 2.0, -3.0], 1.0),  # a sum of 0 is the least extreme
        ([-1.0, 2.0, 3.0], 4 / 8),  # sums of 4, 6 and their negatives
        ([1.0, 1.0, 1.0, -1.0], 10 / 16),  # the 2 patterns of 4 and the 8 of 2
        ([0.0, 0.0, 5.0], 1.0),
        ([0.0, 0.0], 1.0),
        ([0.5, 0.1, 0.2, 0.3, 0.1, 0.9, 0.4, 0.6], 2 / 256),
        ([-1.0] * 20, 2 / 2**20),
    ],
)
def test_sign_flips_counted_by_hand(differences: list[float], p: float) -> None:
    assert sign_flip_test(differences) == p
    assert sign_flip_test([-d for d in differences]) == p


def test_sums_that_differ_by_rounding_alone_tie() -> None:
    assert 0.1 + 0.2 - 0.3 != 0.0
    assert sign_flip_test([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip_test([0.3, 0.1, 0.2, -0.4]) == sign_flip_test([3, 1, 2, -4]) == 14 / 16
    assert sign_flip_test([1e-12, 2e-12, 3e-12]) == 2 / 8  # rounding is relative to the differences


def test_drawn_sign_flips_agree_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    cases = [shift + rng.normal(size=14) for shift in (0.0, 0.3, 0.6, 2.0)]
    exact = [sign_flip_test(case) for case in cases]
    monkeypatch.setattr(statistics, "EXACT_UP_TO", 13)
    drawn = [sign_flip_test(case) for case in cases]
    assert drawn != exact
    assert min(exact) == 2 / 2**14
    for one, other in zip(drawn, exact, strict=True):
        assert plausible(round(one * (statistics.SIGN_PATTERNS + 1)) - 1, statistics.SIGN_PATTERNS, other)
    assert drawn == [sign_flip_test(case) for case in cases]


def test_drawn_sign_flips_are_never_zero() -> None:
    assert sign_flip_test([1.0] * 60) == 1 / (statistics.SIGN_PATTERNS + 1)


def test_sign_flips_of_nothing_but_noise_have_p_below_5_percent_in_5_percent() -> None:
    rng = np.random.default_rng(0)
    p_values = np.array([sign_flip_test(found_or_not(rng, 12) - found_or_not(rng, 12)) for _ in range(400)])
    for level in (0.05, 0.2, 0.5):
        assert plausible(np.count_nonzero(p_values <= level), 400, level)


def test_the_interquartile_mean() -> None:
    assert iqm([9.0, 0.0, 1.0, 2.0, 3.0, 100.0, -50.0, 4.0]) == (1 + 2 + 3 + 4) / 4
    assert iqm([1.0, 2.0, 6.0]) == 3.0  # too few to drop one
    values = np.random.default_rng(0).normal(size=(3, 16))
    np.testing.assert_allclose(iqm(values), trim_mean(values, 0.25, axis=1), rtol=1e-14)
    np.testing.assert_allclose(iqm(values), np.sort(values)[:, 4:12].mean(axis=1), rtol=1e-14)


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.9})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert adjusted == pytest.approx({"b": 4 * 0.01, "c": 3 * 0.03, "a": 3 * 0.03, "d": 0.9})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.02}) == {"a": 0.02}
    assert holm({}) == {}


@pytest.mark.parametrize(("n", "chance"), [(8, 0.84), (16, 0.90)])
def test_how_often_the_bootstrap_over_seeds_holds_the_mean(
    monkeypatch: pytest.MonkeyPatch, n: int, chance: float
) -> None:
    """The figures of its docstring, where t's interval holds it in 98 and 96 %."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        interval = bootstrap_interval(found_or_not(rng, n) - found_or_not(rng, n))
        held += interval.low <= 0 <= interval.high
    assert plausible(held, 400, chance)


def test_the_bootstrap_over_seeds_nears_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(size=400)
    mean, low, high = bootstrap_interval(values)
    assert mean == values.mean()
    assert (mean - low, high - mean) == pytest.approx([1.96 * values.std() / 20] * 2, rel=0.05)
    assert bootstrap_interval(values) == (mean, low, high)


def test_the_bootstrap_within_strata_leaves_out_what_lies_between_them() -> None:
    noise = np.random.default_rng(1).normal(size=200)
    strata = np.arange(200) % 2
    apart = bootstrap_interval(noise + 100 * strata, strata.tolist())
    within = bootstrap_interval(noise, strata.tolist())
    np.testing.assert_allclose(apart, np.array(within) + 50)
    pooled = bootstrap_interval(noise + 100 * strata)
    assert pooled.high - pooled.low > 10 * (apart.high - apart.low)


def test_the_bootstrap_takes_the_interquartile_mean() -> None:
    values = np.append(np.random.default_rng(1).normal(size=39), 1e6)
    estimate = bootstrap_interval(values, statistic=iqm)
    assert estimate.mean == iqm(values)
    assert -0.7 < estimate.low < estimate.mean < estimate.high < 0.7


def test_few_seeds_have_no_bootstrap_interval() -> None:
    assert bootstrap_interval([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.nan, math.nan), nan_ok=True)


def test_discovery() -> None:
    reward = [0.0, 0.6, 0.0, 0.0, 0.6, 0.6, 0.6]
    assert batches_to_discovery(reward, 0.6, 1) == 2
    assert batches_to_discovery(reward, 0.6, 2) == 6  # the fifth and the sixth
    assert batches_to_discovery(reward, 0.6, 3) == 7  # in the last window
    assert batches_to_discovery(reward, 0.61, 1) == 8  # never
    assert batches_to_discovery(reward, 0.3, 7) == 7  # the only window
    assert batches_to_discovery(reward, 0.35, 7) == 8
    assert batches_to_discovery(reward, 0.0, 4) == 4  # no window ends sooner
    assert batches_to_discovery([0.1, 0.7], 0.4, 2) == 2  # whose mean rounds below 0.4


def test_the_area_under_the_reward() -> None:
    assert reward_area([0.0, 0.5, 1.0, 1.0]) == 0.625


def made_up(rng: np.random.Generator, arms: str) -> dict[str, dict[int, dict[str, float]]]:
    """Return scores of runs that find the route or do not, whatever the arm."""
    columns = {arm: found_or_not(rng, len(SEEDS)) for arm in arms.split()}
    return {arm: {seed: {"maj": column[seed]} for seed in SEEDS} for arm, column in columns.items()}


PLAN = [(arm, "grpo") for arm in ("paec", "no-mask", "no-penalty", "global")]


def test_arms_renamed_at_random_show_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 10)  # the test is about p-values
    rng = np.random.default_rng(0)
    scores = made_up(rng, "grpo paec no-mask no-penalty global")
    for seed in range(12):
        scores["paec"][seed]["maj"] += 0.3  # an effect, which the names then lose
    assert planned_comparisons(scores, PLAN, ["maj"])[0].adjusted_p_value <= 0.05
    false_wins = 0
    for _ in range(200):
        renamed: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in scores}
        for seed in SEEDS:
            for arm, other in zip(scores, rng.permutation(list(scores)), strict=True):
                renamed[arm][seed] = scores[other][seed]
        false_wins += any(row.adjusted_p_value <= 0.05 for row in planned_comparisons(renamed, PLAN, ["maj"]))
    assert false_wins <= binom.ppf(0.999, 200, 0.05)


def test_a_planted_win_is_found() -> None:
    scores = made_up(np.random.default_rng(0), "grpo paec no-mask no-penalty global siren")
    for seed in range(12):
        scores["paec"][seed]["maj"] = scores["grpo"][seed]["maj"] + 0.3
    rows = planned_comparisons(scores, PLAN, ["maj"], exploratory=[("siren", "grpo"), ("paec", "no-mask")])
    assert [(row.arm, row.baseline, row.planned) for row in rows] == [
        *((arm, "grpo", True) for arm, _ in PLAN),
        *(("siren", "grpo", False), ("paec", "no-mask", False)),
    ]
    assert [row.arm for row in rows if row.adjusted_p_value <= 0.05] == ["paec"]
    paec = rows[0]
    values, baseline = (np.array([scores[arm][seed]["maj"] for seed in SEEDS]) for arm in ("paec", "grpo"))
    assert (paec.outcome, paec.pairs) == ("maj", 16)
    assert (paec.mean, paec.baseline_mean) == pytest.approx((values.mean(), baseline.mean()))
    assert (paec.iqm, paec.baseline_iqm) == pytest.approx((iqm(values), iqm(baseline)))
    assert paec.difference == bootstrap_interval(values - baseline)
    assert paec.difference.low > 0
    assert paec.p_value == sign_flip_test(values - baseline)
    assert paec.adjusted_p_value == pytest.approx(4 * paec.p_value)  # the smallest of the four
    assert [math.isnan(row.adjusted_p_value) for row in rows] == [not row.planned for row in rows]


def test_each_outcome_has_its_family_and_each_pair_its_seeds() -> None:
    scores = made_up(np.random.default_rng(0), "grpo paec")
    for of_seeds in scores.values():
        for of_seed in of_seeds.values():
            of_seed["other"] = of_seed["maj"]
    del scores["grpo"][3]
    first, second = planned_comparisons(scores, [("paec", "grpo")], ["maj", "other"])
    assert first._replace(outcome="other") == second
    assert (first.pairs, first.adjusted_p_value) == (15, first.p_value)
    assert first.mean == pytest.approx(np.mean([scores["paec"][seed]["maj"] for seed in SEEDS if seed != 3]))


def test_seeds_of_one_warm_start_are_resampled_together() -> None:
    scores = made_up(np.random.default_rng(0), "grpo paec")
    for seed in SEEDS:
        scores["paec"][seed]["maj"] += 10 * (seed % 4)
    (pooled,) = planned_comparisons(scores, [("paec", "grpo")], ["maj"])
    (apart,) = planned_comparisons(scores, [("paec", "grpo")], ["maj"], warm_starts=4)
    assert pooled._replace(difference=apart.difference) == apart
    assert pooled.difference.high - pooled.difference.low > 10 * (apart.difference.high - apart.difference.low)
    with pytest.raises(ValueError, match=r"strata must hold at least 2 values each, got \{0: 1, 1: 1"):
        planned_comparisons(scores, [("paec", "grpo")], ["maj"], warm_starts=16)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf], [[1.0]], 1.0])
def test_values_must_be_finite_numbers(values) -> None:
    for name, call in (
        ("differences", sign_flip_test),
        ("values", bootstrap_interval),
        ("reward", reward_area),
        ("reward", lambda reward: batches_to_discovery(reward, 0.5, 1)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be one finite number or more in a row, got "):
            call(values)


def test_what_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="values must hold at least one number"):
        t_interval([])
    with pytest.raises(ValueError, match=r"strata must be as many as the 3 values, got \[0, 1\]"):
        bootstrap_interval([1.0, 2.0, 3.0], [0, 1])
    with pytest.raises(ValueError, match=r"strata must hold at least 2 values each, got \{0: 2, 1: 1\}"):
        bootstrap_interval([1.0, 2.0, 3.0], [0, 0, 1])
    with pytest.raises(ValueError, match=r"p_values\['b'\] must be in \[0, 1\], got 1.5"):
        holm({"a": 0.5, "b": 1.5})
    with pytest.raises(ValueError, match=r"p_values\['a'\] must be in \[0, 1\], got nan"):
        holm({"a": math.nan})
    with pytest.raises(ValueError, match="level must be finite, got nan"):
        batches_to_discovery([0.5], math.nan, 1)
    for window in (0, 3):
        with pytest.raises(ValueError, match=rf"window must be in \[1, 2\], got {window}"):
            batches_to_discovery([0.5, 0.5], 0.5, window)


def test_plans_that_cannot_be_followed() -> None:
    scores = made_up(np.random.default_rng(0), "grpo paec global")
    scores["global"] = {99: {"maj": 0.5}}
    pair = ("paec", "grpo")
    with pytest.raises(ValueError, match="planned must be at least one pair"):
        planned_comparisons(scores, [], ["maj"])
    for planned, exploratory in (
        ([pair, pair], []),
        ([pair], [pair]),
        ([pair, pair[::-1]], []),
        ([("paec", "paec")], []),
    ):
        with pytest.raises(ValueError, match=r"must be different pairs of two arms each, got \[\('paec', "):
            planned_comparisons(scores, planned, ["maj"], exploratory=exploratory)
    with pytest.raises(ValueError, match="scores must hold the arm 'siren', got grpo, paec, global"):
        planned_comparisons(scores, [("siren", "grpo")], ["maj"])
    with pytest.raises(ValueError, match="scores must hold a seed that both 'global' and 'grpo' have, got none"):
        planned_comparisons(scores, [("global", "grpo")], ["maj"])
    with pytest.raises(ValueError, match=r"scores of 'paec', seed 0, must hold 'min', got \['maj'\]"):
        planned_comparisons(scores, [pair], ["min"])
    with pytest.raises(ValueError, match="warm_starts must be >= 1, got 0"):
        planned_comparisons(scores, [pair], ["maj"], warm_starts=0)
    scores["paec"][2]["maj"] = math.nan
    with pytest.raises(ValueError, match="'maj' of 'paec' must be one finite number or more in a row, got"):
        planned_comparisons(scores, [pair], ["maj"])
