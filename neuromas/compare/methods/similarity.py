"""Finds the program that is most like the others, by BLEU."""

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST = 4


def most_similar(texts: Sequence[str]) -> int:
    """Return the index of the text with the highest summed BLEU to the others, the first of equals."""
    words = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    sums = [sum(bleu(mine, other) for k, other in enumerate(words) if k != i) for i, mine in enumerate(words)]
    return sums.index(max(sums))


def bleu(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """Return sentence BLEU (Papineni et al. 2002): geometric mean of the precisions of 1- to 4-grams, times a penalty for
    brevity. Precisions of 2-grams and up are smoothed by adding one; without a common word it is 0.
    """
    logs = 0.0
    for n in range(1, LONGEST + 1):
        mine, theirs = (Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (candidate, reference))
        smooth = int(n > 1)
        common, total = (mine & theirs).total() + smooth, mine.total() + smooth
        if common == 0:
            return 0.0
        logs += math.log(common / total) / LONGEST
    return math.exp(logs + min(0.0, 1 - len(reference) / len(candidate)))
