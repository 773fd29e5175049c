"""Tree of Thoughts, breadth first (Yao et al. 2023, arXiv 2305.10601)."""

import re

from neuromas.compare.methods.conversation import Call, Conversation, lines, listing
from neuromas.compare.methods.statements import stated
from neuromas.compare.methods.untrained import Untrained
from neuromas.tasks import Task
from neuromas.types import Example

VALUES = {"impossible": 0.001, "likely": 1.0, "sure": 20.0}
"""The repository's values of the words of a judgement; a text with no such word, or with two of them, counts 0."""

State = tuple[str, ...]


def tree_of_thoughts(example: Example, task: Task, *, steps: int, samples: int, votes: int, keep: int) -> Conversation:
    """At each step sample next thoughts of every kept state, value the new states by `votes` calls each, keep the best.

    The last thought of the best state is returned as the answer. A state that occurs twice is valued once and kept
    once, where the repository keeps its repetition with value 0. Differs: no few-shot prompts of one game, and fewer thoughts
    and states than its 5 kept (Game of 24) or 5 samples and 5 votes (writing).
    """
    states: list[State] = [()]
    for step in range(1, steps + 1):
        wanted = "Write the next step, not yet the answer." if step < steps else example.answer_format
        thoughts = yield [
            Call(f"step/{step}/state/{s}/thought/{k}", lines(listing("Steps so far:", state), wanted))
            for s, state in enumerate(states)
            for k in range(samples)
        ]
        parents = [state for state in states for _ in range(samples)]
        new: list[State] = [(*parent, thought.strip()) for parent, thought in zip(parents, thoughts, strict=True)]
        distinct = list(dict.fromkeys(new))
        judgements = yield [
            Call(f"step/{step}/value/{s}/{k}", lines(listing("Steps so far:", state), _QUESTION))
            for s, state in enumerate(distinct)
            for k in range(votes)
        ]
        values = {s: sum(map(read_value, judgements[i * votes : (i + 1) * votes])) for i, s in enumerate(distinct)}
        # sorted is stable: the earlier one of equals is kept.
        states = [state for state, _ in sorted(values.items(), key=lambda item: -item[1])][:keep]
    return states[0][-1]


_QUESTION = "Can these steps lead to the right answer? Write sure, likely or impossible."


def read_value(judgement: str) -> float:
    """Return the value of the word in the last clause that states one, e.g. of "likely" in "not sure, but likely"."""
    words, denied = "|".join(VALUES), set[str]()
    for clause in reversed(re.split(r"[.,;:!?\n]+", judgement.lower())):
        named = stated(clause, words)
        if named:
            return VALUES[named.pop()] if len(named) == 1 and not named & denied else 0.0
        denied |= set(re.findall(rf"\b(?:{words})\b", clause))
    return 0.0


METHODS = (
    Untrained(
        name="tree_of_thoughts",
        title="Tree of Thoughts (BFS)",
        source="Yao et al. 2023, arXiv 2305.10601; repository princeton-nlp/tree-of-thought-llm",
        conversation=tree_of_thoughts,
        settings={"steps": 3, "samples": 3, "votes": 3, "keep": 2},
        temperature=0.7,
    ),
)
