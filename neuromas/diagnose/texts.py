"""What texts alone tell: which node wrote one, and how varied a node's texts are.

A node's text here is what its messages hold, without their headers, which name the recipients; of an answering node, all of it.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from neuromas.training.diversity import distinct_bigrams, mean_of_pairs
from neuromas.training.intervals import wilson
from neuromas.types import MessageStatus, Rollout

FOLDS = 5
ARRIVED = (MessageStatus.OK.value, MessageStatus.UNADDRESSED.value)


def words(text: str) -> list[str]:
    """Return words, numbers and marks of a text in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def of_rollout(rollout: Rollout) -> dict[int, str]:
    """Return the text of each node of a rollout."""
    return {
        c.node: joined([(m.text, m.status.value) for m in c.messages]) if c.messages else c.text for c in rollout.completions
    }


def joined(sent: Sequence[tuple[str, str]]) -> str:
    """Return the texts of a node's messages, (text, status), each once and without placeholders."""
    return "\n".join(dict.fromkeys(text for text, status in sent if status in ARRIVED))


def specialisation(by_question: Sequence[Mapping[int, str]]) -> dict[str, Any] | None:
    """Say how well a node is told from its text alone; None with one node or one question.

    A naive Bayes classifier of words (multinomial, one count added to each) learns on four fifths of the questions and is asked
    for the others. Chance is one over the number of nodes: `accuracy` is the mean over nodes of the share of their texts that
    are told, and texts that two nodes are equally likely to have written count half. The interval counts questions, not texts.
    """
    nodes = sorted({node for texts in by_question for node in texts})
    if len(nodes) < 2 or len(by_question) < 2:
        return None
    counts = [{node: Counter(words(text)) for node, text in texts.items()} for texts in by_question]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(w for q in counts for c in q.values() for w in c))}
    folds, whole = min(FOLDS, len(counts)), np.zeros((len(nodes), max(1, len(vocabulary))))
    of_fold = np.stack([whole] * folds)
    for number, question in enumerate(counts):
        for node, of_text in question.items():
            for word, count in of_text.items():
                of_fold[number % folds, nodes.index(node), vocabulary[word]] += count
    learned = of_fold.sum(0) - of_fold + 1
    log_p = np.log(learned / learned.sum(2, keepdims=True))
    told: dict[int, list[float]] = {node: [] for node in nodes}
    for number, question in enumerate(counts):
        for node, of_text in question.items():
            columns = [vocabulary[word] for word in of_text]
            scores = log_p[number % folds][:, columns] @ np.array(list(of_text.values()), float)
            best = np.isclose(scores, scores.max(), rtol=1e-12, atol=0)
            told[node].append(float(best[nodes.index(node)] / best.sum()))
    recall = {node: fmean(found) for node, found in told.items()}
    accuracy = fmean(recall.values())
    low, high = wilson(accuracy * len(counts), len(counts))
    return {
        "accuracy": accuracy, "low": low, "high": high, "chance": 1 / len(nodes), "questions": len(counts),
        "by_node": {str(node): share for node, share in recall.items()},
    }  # fmt: skip


def variety(by_question: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Return how varied a node's texts are, given those to each question; None where there is no pair, or no word.

    `distinct_2`: distinct bigrams over all bigrams of two texts to one question (Li et al. 2016), mean over pairs; 0.5 if they
    are equal. `self_similarity`: cosine of the word counts of texts to two different questions, 1 if the node says the same
    whatever is asked. `entropy`: of its words, in bits.
    """
    firsts = [Counter(words(texts[0])) for texts in by_question if texts]
    total = sum((Counter(words(text)) for texts in by_question for text in texts), Counter[str]())
    count = total.total()
    return {
        "distinct_2": mean_of_pairs(by_question, distinct_bigrams),
        "self_similarity": fmean(_cosine(a, b) for a, b in pairwise(firsts)) if len(firsts) > 1 else None,
        "entropy": -sum(n / count * math.log2(n / count) for n in total.values()) if count else None,
    }


def _cosine(first: Counter[str], second: Counter[str]) -> float:
    """Return the cosine of two texts' word counts; two texts without a word are alike."""
    if not first or not second:
        return float(first == second)
    norms = math.sqrt(sum(n * n for n in first.values()) * sum(n * n for n in second.values()))
    return sum(n * second[word] for word, n in first.items()) / norms
