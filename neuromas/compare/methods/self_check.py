"""SelfCheck: weigh sampled solutions by checks of their steps (Miao et al. 2023, arXiv 2308.00436)."""

import math
import re

from neuromas.compare.methods.conversation import Call, Conversation, lines, listing
from neuromas.compare.methods.statements import stated
from neuromas.compare.methods.untrained import Untrained
from neuromas.rollout.voting import majority_vote
from neuromas.tasks import Task
from neuromas.types import Example

_STEP = re.compile(r"^\s*step\s*\d+\s*[:.]", re.IGNORECASE | re.MULTILINE)

StepIndex = tuple[int, int]
"""(solution, step), both counted from 0."""


def self_check(
    example: Example, task: Task, *, samples: int, most_steps: int, failure_weight: float, unsure_weight: float
) -> Conversation:
    """Sample solutions in steps, check each step in four calls, and let solutions vote with weights from these checks.

    The four calls name the target of the step, name the earlier steps that it uses, find the target again from those alone, and
    compare both results. The weight is 2 * sigmoid(-f * contradictions - u * unclear); without any it is 1.
    Differs: 3 solutions, where the paper has 10; steps after the `most_steps`-th are not checked.
    """
    ask = 'Solve it in numbered steps, "Step 1:" and so on, then answer.'
    solutions = yield [Call(f"solution/{k}", lines(ask, example.answer_format), works_first=True) for k in range(samples)]
    steps = [split_steps(solution) for solution in solutions]
    indices = [(k, n) for k, own in enumerate(steps) for n in range(min(len(own), most_steps))]

    def call(stage: str, index: StepIndex, *text: str) -> Call:
        return Call(f"{stage}/{index[0]}/{index[1]}", lines(*text))

    def so_far(index: StepIndex) -> str:
        return listing("Steps of a solution:", steps[index[0]][: index[1] + 1])

    targets = yield [
        call("target", p, so_far(p), f"What does step {p[1] + 1} want to find? Write one sentence.") for p in indices
    ]
    uses = yield [
        call("uses", p, so_far(p), f"Which of the earlier steps does step {p[1] + 1} use? Write their numbers.")
        for p in indices
    ]
    known = [_named(text, steps[k][:n]) for text, (k, n) in zip(uses, indices, strict=True)]
    again = yield [
        call("again", p, listing("Known:", facts), f"Find this: {target.strip()}")
        for p, facts, target in zip(indices, known, targets, strict=True)
    ]
    verdicts = yield [
        call(
            "compare", p, f"First: {steps[p[0]][p[1]]}", f"Second: {text.strip()}",
            "Does the second support the first, contradict it, or is it not directly related? Write one of these.",
        )
        for p, text in zip(indices, again, strict=True)
    ]  # fmt: skip
    weights = []
    for k in range(samples):
        scores = [read_verdict(verdict) for index, verdict in zip(indices, verdicts, strict=True) if index[0] == k]
        penalty = failure_weight * scores.count(-1) + unsure_weight * scores.count(0)
        weights.append(2 / (1 + math.exp(penalty)))
    return solutions[majority_vote(solutions, task.parse_answer, weights)]


def split_steps(solution: str) -> list[str]:
    """Return the steps of a solution; one that numbers none is a single step."""
    # What comes before the first number belongs to no step.
    return [part.strip() for part in _STEP.split(solution)[1:]] or [solution.strip()]


def read_verdict(text: str) -> int:
    """Return 1 for support, -1 for a contradiction, 0 for neither or for a text that states both."""
    plain = re.sub(r"\bnot (?:\w+ )?related\b", "unrelated", text.lower())
    words = stated(plain, r"support(?:s|ed|ing)?|contradict(?:s|ed|ing|ion|ions|ory)?|unrelated|irrelevant")
    kinds = {word[:7] for word in words}
    return {"support": 1, "contrad": -1}.get(kinds.pop(), 0) if len(kinds) == 1 else 0


def _named(text: str, earlier: list[str]) -> list[str]:
    # "2, not 1": a denial ends at the next comma.
    numbers = {int(number[:9]) for number in stated(text.replace(",", "\n"), r"\d+")}
    return [step for number, step in enumerate(earlier, start=1) if number in numbers]


METHODS = (
    Untrained(
        name="self_check",
        title="SelfCheck",
        source="Miao et al. 2023, arXiv 2308.00436; repository NingMiao/SelfCheck",
        conversation=self_check,
        settings={"samples": 3, "most_steps": 8, "failure_weight": 0.5, "unsure_weight": 0.2},
        temperature=1.0,
    ),
)
