"""Intervals and tests for scores of several runs on the same questions.

Such a score has two crossed random factors: the questions that were drawn, and the runs (seeds) that were trained. The results
of a method are therefore a table of runs x questions, with the same questions in every row.

    over questions and runs   would the next training run, on new questions, show it too? `crossed_estimate`
    over questions            do exactly these runs differ on new questions? `bootstrap_interval`, `permutation_test`
    one run                   `wilson`, `mcnemar`

The variance between runs cannot be estimated from one run: the estimate is then over questions alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy import stats

from neuromas.training.intervals import LEVEL, wilson

Table = Float[ndarray, "runs questions"]
"""One value for each run and question."""

RESAMPLES = 10_000
SIGNIFICANT = 0.05
POWER = 0.8
"""Chance of finding a difference that is called detectable."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over runs and questions, with its standard error and the degrees of freedom of that error."""

    mean: float
    standard_error: float
    degrees_of_freedom: float

    def interval(self) -> tuple[float, float]:
        """Return Student's confidence interval of the mean."""
        margin = (
            self.standard_error * float(stats.t.ppf(0.5 + LEVEL / 2, self.degrees_of_freedom)) if self.standard_error else 0.0
        )
        return self.mean - margin, self.mean + margin

    def p_value(self) -> float:
        """Return the two-sided p against a mean of 0; 1 if all differences are 0, 0 if they are all the same and not 0."""
        if self.standard_error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.standard_error, self.degrees_of_freedom))

    def detectable(self) -> float:
        """Return the true difference that a test like this one finds with a chance of about `POWER`.

        The standard error counts as known: with five runs, 0.8 means 0.65 to 0.8 in simulation.
        """
        quantiles = stats.t.ppf([0.5 + LEVEL / 2, POWER], self.degrees_of_freedom)
        return self.standard_error * float(sum(quantiles))


NO_INTERVAL = "no interval: all differences are equal"


def varies(low: float, high: float) -> bool:
    """Say whether these ends are apart: differences that are all equal do not tell how far others would be from them."""
    return high - low > 1e-9


def crossed_estimate(table: Table) -> Estimate:
    """Estimate the mean of a table in which both rows and columns are drawn at random.

    This is the model of two-way random effects without repeats (Clark 1973, quasi F): the variance of the mean is (MS_runs +
    MS_questions - MS_residual) / (runs x questions), with Satterthwaite's degrees of freedom. It is never taken below the
    variance from runs or questions alone, which makes the test conservative where both are small. With one run it is the
    variance over questions.
    """
    runs, questions = table.shape
    mean = float(table.mean())
    run_means, question_means = table.mean(1), table.mean(0)
    if questions == 1:
        return Estimate(mean, math.inf, 1.0)
    ms_questions = runs * float(((question_means - mean) ** 2).sum()) / (questions - 1)
    if runs == 1:
        return Estimate(mean, math.sqrt(ms_questions / questions), float(questions - 1))
    ms_runs = questions * float(((run_means - mean) ** 2).sum()) / (runs - 1)
    residuals = table - run_means[:, None] - question_means[None] + mean
    freedom_residual = (runs - 1) * (questions - 1)
    ms_residual = float((residuals**2).sum()) / freedom_residual
    variance = max(ms_runs + ms_questions - ms_residual, ms_runs, ms_questions)
    if variance < 1e-15:
        return Estimate(mean, 0.0, float(runs - 1))
    # Runs that are by luck closer to each other than their questions allow are no evidence of degrees of freedom.
    spread = max(ms_runs, ms_residual) ** 2 / (runs - 1) + ms_questions**2 / (questions - 1) + ms_residual**2 / freedom_residual
    return Estimate(mean, math.sqrt(variance / (runs * questions)), max(1.0, variance**2 / spread))


def share_interval(right: Table, questions: float | None = None) -> tuple[float, float]:
    """Return the interval of a pooled accuracy over runs and questions, `questions` of them independent (None: all).

    It is Wilson's interval with an effective number of questions and Student's t (Korn and Graubard 1998, for shares in
    clustered samples): answers of several runs to the same questions are worth less than as many answers to different
    questions. With one run it is Wilson's interval.
    """
    runs, columns = right.shape
    independent_questions: float = columns if questions is None else questions
    share = min(1.0, max(0.0, float(right.mean())))
    estimate = crossed_estimate(right)
    if runs == 1 or estimate.standard_error in (0.0, math.inf) or share * (1 - share) < 1e-12:
        # Without a variance between runs only the questions count.
        return wilson(share * independent_questions, independent_questions)
    effective = min(share * (1 - share) / estimate.standard_error**2, runs * independent_questions)
    return wilson(share * effective, effective, freedom=estimate.degrees_of_freedom)


def bootstrap_interval(table: Table) -> tuple[float, float]:
    """Return the percentile interval of the mean over resampled questions; runs are fixed, and a question keeps all its runs.

    It says nothing about runs that were not trained: for that see `crossed_estimate`.
    """
    question_means = table.mean(0)
    rng, means = np.random.default_rng(0), []
    for count in _chunk_sizes(RESAMPLES, question_means.size):
        weights = rng.multinomial(question_means.size, np.full(question_means.size, 1 / question_means.size), size=count)
        means.append(weights @ question_means / question_means.size)
    low, high = np.quantile(np.concatenate(means), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def permutation_test(table: Table, *, resamples: int = RESAMPLES) -> float:
    """Return the two-sided p-value of paired differences under random signs, one sign for a question in all its runs.

    Under the null hypothesis the names of the two methods can be exchanged for any question. A separate sign for each run and
    question would count a question that one method solves, and the other does not, once for every run. The runs are fixed.
    """
    question_means = table.mean(0)
    observed = abs(float(question_means.sum()))
    rng, extreme = np.random.default_rng(0), 0
    for count in _chunk_sizes(resamples, question_means.size):
        signs = rng.integers(0, 2, size=(count, question_means.size)) * 2 - 1
        # Equal sums of sevenths and fifths may differ in the last bit.
        extreme += int((np.abs(signs @ question_means) >= observed - 1e-9).sum())
    return (extreme + 1) / (resamples + 1)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Return how many questions only the first got right, how many only the second, and the exact p-value (McNemar 1947)."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 0, 0, 1.0
    return only_first, only_second, float(stats.binomtest(only_first, only_first + only_second).pvalue)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean of independent estimates, e.g. of a difference over tasks."""
    n = len(estimates)
    variances = [estimate.standard_error**2 / n**2 for estimate in estimates]
    total = sum(variances)
    if math.isinf(total):  # the standard error of a single question is unknown
        return Estimate(sum(estimate.mean for estimate in estimates) / n, math.inf, 1.0)
    spread = sum(v**2 / estimate.degrees_of_freedom for v, estimate in zip(variances, estimates, strict=True))
    mean = sum(estimate.mean for estimate in estimates) / n
    return Estimate(mean, math.sqrt(total), total**2 / spread if spread else math.inf)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that they bound the chance of any false positive in the table (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def collapsed(answers: Mapping[str, int], floor: float | None) -> str | None:
    """Return the answer that makes up at least 90% of the answers, and 10 points more than the floor; None if none does."""
    answer, count = max(answers.items(), key=lambda item: item[1])
    return answer if count / sum(answers.values()) >= max(0.9, min(1.0, (floor or 0.0) + 0.1)) else None


def _chunk_sizes(resamples: int, questions: int) -> list[int]:
    """Return the sizes of chunks of resamples, so that the weights of a chunk take about ten megabytes."""
    size = max(1, 1_000_000 // questions)
    return [min(size, resamples - start) for start in range(0, resamples, size)]
