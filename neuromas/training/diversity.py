"""How different agents are: measured on debates of the same questions after each iteration of finetuning.

Agreement and texts are measured on pairs, so that consensus does not depend on how many agents there are. What is measured on
pairs of right first answers does: the more answers, the harder the questions to which two of them are right. Texts are first
answers: what generation agents write alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from statistics import fmean
from typing import TypeVar

import torch

from neuromas.model.policy import Policy
from neuromas.rollout.society import Society
from neuromas.tasks import Task, rewards_of
from neuromas.training.reinforce import Batch
from neuromas.types import Completion, Rollout

T = TypeVar("T")

LIKELIHOOD_QUESTIONS = 32
"""Questions whose first answers are read by every other agent."""


@dataclass(frozen=True, slots=True)
class Diversity:
    """Measures of a society on some debates; None where there is no pair."""

    first_accuracy: float
    """Mean reward of first answers: what an agent is worth alone."""
    consensus: float | None
    """Probability that two agents give the same answer in the last round."""
    different_texts: float | None
    """Probability that two right first answers to a question are different texts."""
    distinct_bigrams: float | None
    """Distinct pairs of neighbouring words over all, in two right first answers to a question (distinct-2, Li et al. 2016)."""
    nll_own: float
    """Mean of -log p of a token of an agent's first answer under that agent, in nats, at temperature 1."""
    nll_other: float | None
    """The same under the other agents; the difference estimates the divergence of two agents a token."""


def measure(society: Society, task: Task, debates: Sequence[Rollout], *, tokens_per_micro_batch: int) -> Diversity:
    """Measure a society on its debates."""
    firsts = [list(society.answers_of(debate)[0]) for debate in debates]
    rewards = iter(
        rewards_of(task, [(d.example, text.text) for d, texts in zip(debates, firsts, strict=True) for text in texts])
    )
    right = [[text.text for text in texts if next(rewards) >= 1] for texts in firsts]
    last = [[task.parse_answer(text.text) for text in society.answers_of(debate)[-1]] for debate in debates]
    own, other = _likelihoods(
        society, [text for texts in firsts[:LIKELIHOOD_QUESTIONS] for text in texts], tokens_per_micro_batch
    )
    return Diversity(
        first_accuracy=sum(map(len, right)) / sum(map(len, firsts)),
        consensus=mean_of_pairs(last, lambda a, b: float(a is not None and a == b)),
        different_texts=mean_of_pairs(right, lambda a, b: float(a.split() != b.split())),
        distinct_bigrams=mean_of_pairs(right, distinct_bigrams),
        nll_own=own,
        nll_other=other,
    )


def distinct_bigrams(first: str, second: str) -> float:
    """Return the number of distinct bigrams in two texts over that of all bigrams; the ends of a text count as words.

    >>> distinct_bigrams("so it is", "so it goes")  # ^so so-it it-is is$ | ^so so-it it-goes goes$
    0.75
    """
    bigrams = [pair for text in (first, second) for pair in _bigrams(text)]
    return len(set(bigrams)) / len(bigrams)


def _bigrams(text: str) -> list[tuple[str, str]]:
    return list(pairwise(["", *text.split(), ""]))


def mean_of_pairs(questions: Sequence[Sequence[T]], measured: Callable[[T, T], float]) -> float | None:
    """Return the mean over questions of the mean over the pairs of a question; None where no question has a pair."""
    pairs = [[measured(a, b) for a, b in combinations(texts, 2)] for texts in questions]
    means = [fmean(of_question) for of_question in pairs if of_question]
    return fmean(means) if means else None


def _likelihoods(society: Society, texts: Sequence[Completion], tokens: int) -> tuple[float, float | None]:
    """Return the mean -log p of a token under its own agent and under all other generation agents."""
    nodes = sorted(set(society.generators))
    own = mean_nll(society.policy, texts, tokens)
    if len(society.adapters.nodes) == 1 or len(nodes) == 1:
        return own, None
    others = [replace(text, node=node) for text in texts for node in nodes if node != text.node]
    return own, mean_nll(society.policy, others, tokens)


def mean_nll(policy: Policy, texts: Sequence[Completion], tokens_per_micro_batch: int) -> float:
    """Return the mean of -log p over all sampled tokens of texts, each under the adapter of its node, at temperature 1."""
    ordered = sorted(((text, 0.0) for text in texts), key=lambda item: item[0].node)
    batch = Batch(tuple(ordered), 1, policy.routing, temperature=1.0)
    with torch.no_grad():
        parts = [policy.logprobs(part.rows) for part in batch.split(tokens_per_micro_batch, policy.backbone.device)]
    return -torch.cat(parts).double().mean().item()
