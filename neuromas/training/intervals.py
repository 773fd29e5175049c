"""The interval of an accuracy, and how many independent questions it is from."""

import math
from collections.abc import Sequence

from scipy import stats

LEVEL = 0.95


def wilson(right: float | int, n: float | int, *, level: float = LEVEL, freedom: float = math.inf) -> tuple[float, float]:
    """Return the interval of a share (Wilson 1927), with Student's t instead of the normal where `freedom` is finite."""
    z2 = float(stats.t.ppf(0.5 + level / 2, freedom)) ** 2
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
