"""The interval of an accuracy, and how many independent questions it is from."""

import math
from collections.abc import Sequence

from scipy import stats

LEVEL = 0.95


def wilson(right: float | int, n: float | int, *, freedom: float = math.inf) -> tuple[float, float]:
    """Return the interval of a share (Wilson 1927), with Student's t instead of the normal where `freedom` is finite."""
    z2 = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) ** 2
    share = right / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At shares of 0 and 1 the ends are exact, but for rounding.
    return min(max(0.0, centre - reach), share), max(min(1.0, centre + reach), share)


def independent(counts: Sequence[int]) -> float:
    """Return how many independent questions a set is worth in which question i occurs counts[i] times (Kish 1965).

    >>> independent([1, 1, 2])  # (1 + 1 + 2)^2 / (1 + 1 + 4)
    2.6666666666666665
    """
    return sum(counts) ** 2 / sum(count * count for count in counts)


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a mean difference of rewards between 0 and 1 on the same questions (Agresti and Min 2005).

    As if two more questions had been asked: one that half gains and half loses, and one that stays. So the interval has a width
    where no reward has changed: among n questions, a few that would may be missing.
    """
    n, total = len(differences) + 2, math.fsum(differences)
    mean = total / n
    deviation = math.sqrt(max(0.0, (math.fsum(d * d for d in differences) + 1) / n - mean * mean) / n)
    reach = float(stats.norm.ppf(0.5 + LEVEL / 2)) * deviation
    return max(-1.0, mean - reach), min(1.0, mean + reach)
