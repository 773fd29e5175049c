"""From debates to what each agent learns from, without labels: what the majority says is right (arXiv 2501.05707).

    generation agent   its own first answers that agree with the vote
    critic agent       its answers of all later rounds, where the last one agrees with the vote: corrections, if its generation
                       agent's first answer did not agree, and keeps, if it did

With labels, the task's reward takes the place of the vote.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from neuromas.rollout.society import Society
from neuromas.tasks import Task, rewards_of
from neuromas.types import Completion, Rollout

Dialogue = tuple[Completion, ...]
"""A critic's answers in one debate, from the second round to the last."""


@dataclass(frozen=True, slots=True)
class Sets:
    """What each agent learns from, in the order of the questions."""

    first_answers: dict[int, list[Completion]]
    """By generation agent."""
    corrections: dict[int, list[Dialogue]]
    """By critic agent."""
    keeps: dict[int, list[Dialogue]]
    """By critic agent; those that were drawn into its set."""
    right: float
    """Share of the texts in all sets that the task's reward calls right: what the labels without labels are worth."""

    def by_node(self) -> dict[int, list[Completion]]:
        """Return the texts of each agent's set."""
        texts: dict[int, list[Completion]] = defaultdict(list)
        for node, answers in self.first_answers.items():
            texts[node] += answers
        for dialogues in (self.corrections, self.keeps):
            for node, of_node in dialogues.items():
                texts[node] += [text for dialogue in of_node for text in dialogue]
        return dict(texts)


def collect(society: Society, task: Task, debates: Sequence[Rollout], *, seed: Sequence[int | str]) -> Sets:
    """Return the sets of all agents; `seed` draws the keeps that go with a critic's corrections."""
    config = society.config
    pairs = [(debate.example, text.text) for debate in debates for of_round in society.answers_of(debate) for text in of_round]
    rewards = iter(rewards_of(task, pairs))
    first_answers: dict[int, list[Completion]] = defaultdict(list)
    corrections: dict[int, list[Dialogue]] = defaultdict(list)
    keeps: dict[int, list[Dialogue]] = defaultdict(list)
    is_right: dict[int, bool] = {}
    for debate in debates:
        rounds = society.answers_of(debate)
        vote = task.parse_answer(debate.answer)
        agrees: dict[int, bool] = {}
        for text in (text for of_round in rounds for text in of_round):
            is_right[id(text)] = next(rewards) >= 1
            voted = vote is not None and task.parse_answer(text.text) == vote
            agrees[id(text)] = is_right[id(text)] if config.labels else voted
        for text in rounds[0]:
            if agrees[id(text)]:
                first_answers[text.node].append(text)
        for agent, last in enumerate(rounds[-1] if society.has_critics else ()):
            if agrees[id(last)]:
                dialogue = tuple(of_round[agent] for of_round in rounds[1:])
                (keeps if agrees[id(rounds[0][agent])] else corrections)[last.node].append(dialogue)
    drawn = {
        node: _draw(kept, len(corrections[node]), config.corrections, (*seed, node)) for node, kept in sorted(keeps.items())
    }
    sets = Sets(dict(first_answers), {node: found for node, found in corrections.items() if found}, drawn, 0.0)
    texts = [text for of_node in sets.by_node().values() for text in of_node]
    return Sets(sets.first_answers, sets.corrections, drawn, sum(is_right[id(text)] for text in texts) / max(1, len(texts)))


def _draw(keeps: Sequence[Dialogue], corrections: int, share: float, seed: tuple[int | str, ...]) -> list[Dialogue]:
    """Draw the keeps that make corrections this share of a set, as far as there are so many."""
    # A share next to 0 wants more keeps than there are numbers.
    wanted = round(min(len(keeps), corrections * (1 - share) / share)) if corrections else 0
    chosen = random.Random(repr(seed)).sample(range(len(keeps)), wanted)
    return [keeps[index] for index in sorted(chosen)]


def schedule(count: int, epochs: int, steps: int, seed: tuple[int | str, ...]) -> list[list[int]]:
    """Return which texts of a set are learned in each step: each one `epochs` times, evenly over the steps.

    >>> tuple(len(part) for part in schedule(3, 2, 4, ()))
    (1, 2, 1, 2)
    """
    order = [index for epoch in range(epochs) for index in random.Random(repr((*seed, epoch))).sample(range(count), count)]
    return [order[step * len(order) // steps : (step + 1) * len(order) // steps] for step in range(steps)]
