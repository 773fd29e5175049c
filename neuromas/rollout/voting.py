"""The majority vote that picks the answer among several texts."""

from collections.abc import Callable, Sequence


def majority_vote(
    texts: Sequence[str], parse_answer: Callable[[str], str | None], weights: Sequence[float] | None = None
) -> int:
    """Return the index of the winner: the first text that gives the answer with the most votes.

    A text votes for the answer that `parse_answer` finds in it, with its weight (1 each by default); a text without an answer
    does not vote. Ties go to the answer that is given first; if no text gives one, the first text wins.

    >>> majority_vote(["B", "A", "?", "A"], lambda text: text if text in "AB" else None)
    1
    """
    answers = [parse_answer(text) for text in texts]
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights or [1.0] * len(texts), strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    # max returns the first of equals, and a dictionary keeps the order in which answers were first given.
    return answers.index(max(votes, key=lambda answer: votes[answer])) if votes else 0
