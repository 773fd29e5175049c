"""Statistics: hand-computed values, scipy's, and simulations of false positives and power.

1. Over questions and runs, two identical methods differ at 5% in at most 5% of the experiments, training luck included.
2. Over questions alone, the same holds for fixed runs, and fails for trained ones: which is why the first is what tables show.
3. A known effect is found as often as `detectable` says.
"""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from neuromas.compare import statistics
from neuromas.compare.statistics import Estimate, share_interval
from neuromas.training.intervals import independent, wilson

EXPERIMENTS = 600
TOLERANCE = 0.03
"""More than three standard deviations of a 5% rate over that many experiments (0.9 points each)."""


def experiment(
    rng: np.random.Generator, *, runs: int, questions: int, luck: float = 0.0, effect: float = 0.0, fixed: bool = False
) -> np.ndarray:
    """Draw differences of two methods: questions differ in difficulty for each, runs in luck, on the logit scale."""
    common = rng.normal(0.5, 1, questions)

    def method(shift: float) -> np.ndarray:
        logits = common + rng.normal(0, 0.7, questions) + rng.normal(0, luck, (runs, 1)) + shift
        right = rng.random((runs, questions)) < 1 / (1 + np.exp(-logits))
        return (right[:1].repeat(runs, 0) if fixed else right).astype(float)

    return method(effect) - method(0.0)


def rate(test: str, **kwargs: float | bool | int) -> float:
    rng, found = np.random.default_rng(1), 0
    for _ in range(EXPERIMENTS):
        table = experiment(rng, **kwargs)  # type: ignore[reportArgumentType]  # counts and sizes as the caller writes them
        if test == "crossed":
            p = statistics.crossed_estimate(table).p_value()
        elif test == "permutation":
            p = statistics.permutation_test(table, resamples=400)
        else:
            p = statistics.mcnemar((table[0] > 0).tolist(), (table[0] < 0).tolist())[2]
        found += p < 0.05
    return found / EXPERIMENTS


def test_wilson_is_scipys() -> None:
    interval = stats.binomtest(81, 200).proportion_ci(method="wilson")
    assert wilson(81, 200) == pytest.approx((interval.low, interval.high))
    assert wilson(10, 10)[1] == 1
    assert wilson(10, 10)[0] == pytest.approx(10 / (10 + 1.959964**2))  # p = 1: centre - reach = n / (n + z^2)


def test_mcnemar_by_hand() -> None:
    # Only the first is right on 6 questions, only the second on 1: 2 * (1 + 7) / 2^7.
    first = [True] * 6 + [False] + [True] * 5
    second = [False] * 6 + [True] + [True] * 5
    assert statistics.mcnemar(first, second) == (6, 1, pytest.approx(16 / 128))
    assert statistics.mcnemar([True, False], [True, False]) == (0, 0, 1.0)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04; never less than a smaller one's.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_one_run_is_students_t_over_questions() -> None:
    differences = np.array([1, 1, 0, -1, 1, 0, 0, 1, 0, 1], dtype=float)
    reference: Any = stats.ttest_1samp(differences, 0)
    estimate = statistics.crossed_estimate(differences[None])
    assert estimate.p_value() == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval()
    assert estimate.interval() == pytest.approx((interval.low, interval.high))


def test_crossed_by_hand() -> None:
    # Means of runs 0, 1, of questions 0, 1, 0.5; mean of all 0.5.
    # MS_runs = 3 * (0.25 + 0.25) / 1 = 1.5; MS_questions = 2 * (0.25 + 0.25 + 0) / 2 = 0.5.
    table = np.array([[-0.5, 0.5, 0.0], [0.5, 1.5, 1.0]])
    estimate = statistics.crossed_estimate(table)
    # Additive: no residual, so the variance is (1.5 + 0.5) / 6 and the degrees of freedom 2^2 / (1.5^2 / 1 + 0.5^2 / 2).
    assert (estimate.mean, estimate.standard_error**2, estimate.degrees_of_freedom) == pytest.approx((0.5, 2 / 6, 4 / 2.375))


def test_runs_that_repeat_each_other_add_nothing() -> None:
    one = np.array([[1, 0, 1, 1, -1, 0, 1, 0]], dtype=float)
    single, repeated = statistics.crossed_estimate(one), statistics.crossed_estimate(one.repeat(5, 0))
    assert repeated.interval() == pytest.approx(single.interval())
    assert statistics.permutation_test(one.repeat(5, 0)) == statistics.permutation_test(one)
    right = np.abs(one)
    assert statistics.share_interval(right.repeat(5, 0))[0] < wilson(25, 40)[0]


def test_intervals_of_a_perfect_or_constant_score_are_no_points() -> None:
    assert statistics.share_interval(np.ones((5, 20))) == pytest.approx(wilson(20, 20))
    assert statistics.crossed_estimate(np.zeros((3, 20))).p_value() == 1
    assert Estimate(0.5, 0.0, 3.0).p_value() == 0
    assert math.isinf(statistics.crossed_estimate(np.ones((3, 1))).standard_error)


def test_permutation_is_exact_where_it_can_be_enumerated() -> None:
    # Five differences of +1: 2 of 32 sign patterns are as extreme.
    assert statistics.permutation_test(np.ones((1, 5)), resamples=20_000) == pytest.approx(2 / 32, abs=0.006)
    reference = stats.permutation_test(
        (np.array([1.0, 1, 1, 0, -1, 1, 1]), np.zeros(7)), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples",
        vectorized=True,
    )  # fmt: skip
    found = statistics.permutation_test(np.array([[1.0, 1, 1, 0, -1, 1, 1]]), resamples=20_000)
    assert found == pytest.approx(reference.pvalue, abs=0.012)


def test_bootstrap_is_scipys() -> None:
    differences = np.random.default_rng(0).integers(-1, 2, 200).astype(float)
    reference = stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert statistics.bootstrap_interval(differences[None]) == pytest.approx((reference.low, reference.high), abs=0.006)


def test_the_mean_over_tasks_adds_variances() -> None:
    mean = statistics.mean_of([Estimate(0.1, 0.03, 4.0), Estimate(0.3, 0.04, 10.0)])
    assert (mean.mean, mean.standard_error) == pytest.approx((0.2, 0.025))
    assert mean.degrees_of_freedom == pytest.approx(0.000625**2 / (0.000225**2 / 4 + 0.0004**2 / 10))
    assert statistics.mean_of([Estimate(0.1, 0.0, 4.0)]).p_value() == 0
    # A single question says nothing, and nor does a mean with it.
    alone = statistics.crossed_estimate(np.array([[1.0]]))
    assert statistics.mean_of([alone, mean]).p_value() == alone.p_value() == 1


@pytest.mark.parametrize("luck", [0.3, 1.0])
def test_identical_methods_with_training_luck_differ_in_five_percent(luck: float) -> None:
    assert rate("crossed", runs=5, questions=100, luck=luck) == pytest.approx(0.05, abs=TOLERANCE)


@pytest.mark.parametrize("runs", [2, 3])
def test_so_few_runs_that_they_may_agree_by_luck_are_no_better_evidence(runs: int) -> None:
    for luck in (0.3, 0.5):
        assert rate("crossed", runs=runs, questions=300, luck=luck) <= 0.05 + TOLERANCE
    # Two runs with the same mean difference, by answers to other questions: runs have one degree of freedom.
    table = np.zeros((2, 40))
    table[0, :6] = table[1, 6:12] = 1
    assert statistics.crossed_estimate(table).degrees_of_freedom < 2


def test_identical_methods_without_training_luck_differ_in_five_percent_at_most() -> None:
    assert rate("crossed", runs=5, questions=100) <= 0.05 + TOLERANCE
    assert rate("crossed", runs=5, questions=100, fixed=True) == pytest.approx(0.05, abs=TOLERANCE)


def test_the_permutation_test_holds_its_level_for_fixed_runs_only() -> None:
    assert rate("permutation", runs=5, questions=100, fixed=True) == pytest.approx(0.05, abs=TOLERANCE)
    assert rate("permutation", runs=5, questions=100) == pytest.approx(0.05, abs=TOLERANCE)
    assert rate("permutation", runs=5, questions=100, luck=1.0) > 0.4


def test_mcnemar_holds_its_level() -> None:
    assert 0.01 < rate("mcnemar", runs=1, questions=200) <= 0.05 + TOLERANCE


@pytest.mark.parametrize(("runs", "least"), [(1, 0.75), (5, 0.62)])
def test_a_known_effect_is_found_about_as_often_as_stated(runs: int, least: float) -> None:
    # The shift on the logit scale whose mean difference is what an experiment of this size says it detects.
    rng, size = np.random.default_rng(2), {"runs": runs, "questions": 200, "luck": 0.3 if runs > 1 else 0.0}
    shifts = np.linspace(0.2, 1.2, 11)
    means = [np.mean([experiment(rng, effect=shift, **size).mean() for _ in range(200)]) for shift in shifts]
    seen = [statistics.crossed_estimate(experiment(rng, effect=0.7, **size)).detectable() for _ in range(200)]
    found = rate("crossed", effect=float(np.interp(np.mean(seen), means, shifts)), **size)
    assert least <= found <= 0.87


def test_collapsed_answers() -> None:
    assert statistics.collapsed({"Yes": 95, "No": 5}, 0.5) == "Yes"
    assert statistics.collapsed({"Yes": 85, "No": 15}, 0.5) is None
    # Where 88% of the gold answers are Yes, saying it 95% of the time is no collapse; always saying it is.
    assert statistics.collapsed({"Yes": 95, "No": 5}, 0.88) is None
    assert statistics.collapsed({"Yes": 100}, 0.95) == "Yes"
    assert statistics.collapsed({"(none)": 99, "7": 1}, None) == "(none)"


def test_intervals_hold_their_share_for_all_sizes() -> None:
    """At shares of 0 and 1 an end that rounds past the share would be a negative error bar."""
    for n in range(1, 1001):
        assert wilson(n, n)[1] == 1.0
        assert wilson(0, n)[0] == 0.0


def test_all_right_and_all_wrong_have_an_interval_for_any_weights() -> None:
    for share in (0.0, 1.0000000000000002):
        low, high = share_interval(np.full((3, 91), share), independent([2] * 11 + [1] * 80))
        assert 0 <= low <= high <= 1
        assert high - low < 0.05
