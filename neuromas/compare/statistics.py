"""Intervals and tests for scores of several runs on the same questions.

Two kinds of chance are in such a score, and they cross: which questions were drawn, and which runs (seeds) were trained. The
results of a method are therefore a table of seeds x questions, the same questions in every row (letters: R runs, Q questions).

    over questions and runs   would the next training run, on new questions, show it too? `crossed_estimate`
    over questions            do these very runs differ on new questions? `bootstrap_interval`, `permutation_test`
    one run                   `wilson`, `mcnemar`

With one run the first kind cannot be told: its answers are then those of the second kind.
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

RESAMPLES = 10_000
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over runs and questions, with its standard error and the degrees of freedom of that."""

    mean: float
    error: float
    freedom: float

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        reach = self.error * float(stats.t.ppf(0.5 + level / 2, self.freedom)) if self.error else 0.0
        return self.mean - reach, self.mean + reach

    def p_value(self) -> float:
        """Two-sided, against a mean of 0; 1 if all differences are 0, 0 if they are all the same and not 0."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    def detectable(self, power: float = 0.8, level: float = LEVEL) -> float:
        """Return the true difference that a test like this one finds with a probability of about `power`.

        Takes the error for known: with five runs, 0.8 means 0.65 to 0.8 in simulation.
        """
        reaches = stats.t.ppf([0.5 + level / 2, power], self.freedom)
        return self.error * float(sum(reaches))


def crossed_estimate(table_RQ: Table) -> Estimate:
    """Estimate the mean of a table in which both rows and columns are drawn at random.

    Two-way random effects without repeats (Clark 1973, quasi F): the variance of the mean is (MS_R + MS_Q - MS_rest) / (R Q),
    with Satterthwaite's degrees of freedom. It is never taken below what runs or questions alone give, which makes the test
    conservative where both are small. One run: the variance over questions.
    """
    runs, questions = table_RQ.shape
    mean = float(table_RQ.mean())
    by_run, by_question = table_RQ.mean(1), table_RQ.mean(0)
    if questions == 1:
        return Estimate(mean, math.inf, 1.0)
    ms_questions = runs * float(((by_question - mean) ** 2).sum()) / (questions - 1)
    if runs == 1:
        return Estimate(mean, math.sqrt(ms_questions / questions), float(questions - 1))
    ms_runs = questions * float(((by_run - mean) ** 2).sum()) / (runs - 1)
    rest_RQ = table_RQ - by_run[:, None] - by_question[None] + mean
    freedom_rest = (runs - 1) * (questions - 1)
    ms_rest = float((rest_RQ**2).sum()) / freedom_rest
    variance = max(ms_runs + ms_questions - ms_rest, ms_runs, ms_questions)
    if variance < 1e-15:
        return Estimate(mean, 0.0, float(runs - 1))
    spread = ms_runs**2 / (runs - 1) + ms_questions**2 / (questions - 1) + ms_rest**2 / freedom_rest
    return Estimate(mean, math.sqrt(variance / (runs * questions)), max(1.0, variance**2 / spread))


def share_interval(right_RQ: Table, questions: float | None = None) -> tuple[float, float]:
    """Return the interval of a pooled accuracy over runs and questions, `questions` independent ones; None: all of them.

    Wilson's with an effective number of questions, and Student's t (Korn and Graubard 1998, for shares in clustered samples):
    R x Q answers to the same Q questions are worth less than R x Q questions. One run: Wilson's.
    """
    runs, columns = right_RQ.shape
    worth: float = columns if questions is None else questions
    share = min(1.0, max(0.0, float(right_RQ.mean())))
    estimate = crossed_estimate(right_RQ)
    if runs == 1 or estimate.error in (0.0, math.inf) or share * (1 - share) < 1e-12:
        # All answers alike: then the questions are what there is.
        return wilson(share * worth, worth)
    effective = min(share * (1 - share) / estimate.error**2, runs * worth)
    return wilson(share * effective, effective, freedom=estimate.freedom)


def bootstrap_interval(table_RQ: Table, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the percentile interval of the mean over resampled questions, the runs held fixed; a question keeps all its runs.

    Says nothing about runs that were not trained: for that see `crossed_estimate`.
    """
    by_question = table_RQ.mean(0)
    rng, means = np.random.default_rng(seed), []
    for count in _parts(resamples, by_question.size):
        weights = rng.multinomial(by_question.size, np.full(by_question.size, 1 / by_question.size), size=count)
        means.append(weights @ by_question / by_question.size)
    low, high = np.quantile(np.concatenate(means), [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def permutation_test(table_RQ: Table, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Return the two-sided p-value of paired differences under random signs, one sign for a question in all its runs.

    Two methods that are the same answer a question alike whichever name is on the answer. Signs drawn for each run and question
    by itself would count a question that one method can do, and the other cannot, once for every run. The runs are held fixed.
    """
    by_question = table_RQ.mean(0)
    seen = abs(float(by_question.sum()))
    rng, extreme = np.random.default_rng(seed), 0
    for count in _parts(resamples, by_question.size):
        signs = rng.integers(0, 2, size=(count, by_question.size)) * 2 - 1
        # Sums of sevenths and fifths: equal sums may differ in the last bit.
        extreme += int((np.abs(signs @ by_question) >= seen - 1e-9).sum())
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
    variances = [estimate.error**2 / n**2 for estimate in estimates]
    total = sum(variances)
    if math.isinf(total):  # one of a single question: nothing is known
        return Estimate(sum(estimate.mean for estimate in estimates) / n, math.inf, 1.0)
    spread = sum(v**2 / estimate.freedom for v, estimate in zip(variances, estimates, strict=True))
    mean = sum(estimate.mean for estimate in estimates) / n
    return Estimate(mean, math.sqrt(total), total**2 / spread if spread else math.inf)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that the chance of any false positive in the whole table stays (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def collapsed(answers: Mapping[str, int], floor: float | None) -> str | None:
    """Return the answer that takes almost all: 90% of the answers, and 10 points more than the floor; None if none does."""
    answer, count = max(answers.items(), key=lambda item: item[1])
    return answer if count / sum(answers.values()) >= max(0.9, min(1.0, (floor or 0.0) + 0.1)) else None


def _parts(resamples: int, questions: int) -> list[int]:
    """Split resamples so that a part's weights take some ten megabytes."""
    size = max(1, 1_000_000 // questions)
    return [min(size, resamples - start) for start in range(0, resamples, size)]
