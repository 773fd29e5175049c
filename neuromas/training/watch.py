"""Watches a run for what spoils its learning: one answer that takes over, and groups that carry no signal.

Each is told once when it begins and once when it ends. It is judged over the last steps together, at least `STEPS` of them with
`QUESTIONS` questions, and it ends well past the share at which it begins. A resumed run begins with no steps.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from neuromas.system.terminal import shortened
from neuromas.tasks import Task
from neuromas.training.intervals import wilson
from neuromas.types import Group

STEPS, QUESTIONS = 5, 20
TAKES_OVER, NO_LONGER = 0.9, 0.8
"""Share of one answer among those that can be read, from which on it takes over, and below which it no longer does."""
NO_SIGNAL, SIGNAL = 0.2, 0.3
"""Share of groups with different rewards, below which there is no signal, and from which on there is."""
SOLVED = 0.9
"""Mean reward from which on groups may be alike because they are right."""


@dataclass(frozen=True, slots=True)
class GroupAnswers:
    """What a question's rollouts answered."""

    answers: Counter[str]
    """How often each answer was given; what cannot be read is left out."""
    right: frozenset[str]
    rewards: tuple[float, ...]


def group_answers(task: Task, groups: Sequence[Group], rewards_PG: Tensor) -> list[GroupAnswers]:
    """Return what each question of a step was answered."""
    found = []
    for group, rewards in zip(groups, rewards_PG.tolist(), strict=True):
        answers = [task.parse_answer(rollout.answer) for rollout in group]
        right = frozenset(a for a, reward in zip(answers, rewards, strict=True) if a is not None and reward == 1)
        found.append(GroupAnswers(Counter(a for a in answers if a is not None), right, tuple(rewards)))
    return found


def top_answer(questions: Sequence[GroupAnswers]) -> tuple[str, float]:
    """Return the most frequent answer and its share of all that can be read; an empty text and 0 if there are none."""
    answers = sum((each.answers for each in questions), Counter[str]())
    (answer, count), *_ = answers.most_common(1) or [("", 0)]
    return answer, count / max(1, answers.total())


def mixed_share(rewards: Sequence[Sequence[float]]) -> float:
    """Return the share of groups whose rewards are not all equal."""
    return sum(len(set(group)) > 1 for group in rewards) / len(rewards)


class Watch:
    """Keeps the last steps of a run and says what begins and ends; `active` are the warnings that hold, in a few words."""

    def __init__(self) -> None:
        self.active: dict[str, str] = {}
        self._steps: deque[list[GroupAnswers]] = deque()

    def look(self, questions: list[GroupAnswers]) -> list[str]:
        """Add a step, and return what is to be told after it."""
        self._steps.append(questions)
        while len(self._steps) > STEPS and sum(map(len, self._steps)) - len(self._steps[0]) >= QUESTIONS:
            self._steps.popleft()
        seen = [each for step in self._steps for each in step]
        if len(self._steps) < STEPS or len(seen) < QUESTIONS:
            return []
        return [*self._one_answer(seen), *self._no_signal(seen)]

    def _one_answer(self, seen: Sequence[GroupAnswers]) -> list[str]:
        answer, share = top_answer(seen)
        rollouts = sum(len(each.rewards) for each in seen)
        given = [each for each in seen if answer in each.answers]
        right = sum(answer in each.right for each in given)
        # Where it is mostly the right one, a good network gives it as often. A few answers among texts without one say little.
        mostly_right = bool(given) and wilson(right, len(given))[1] >= TAKES_OVER
        is_parsed = sum(each.answers.total() for each in seen) >= rollouts / 2
        name = repr(shortened(answer))
        takes_over = share >= (NO_LONGER if "answer" in self.active else TAKES_OVER) and is_parsed and not mostly_right
        return self._told(
            "answer",
            f"{share:.0%} answer {name}" if takes_over else "",
            f"one answer takes over: {share:.0%} of the answers to the last {len(seen)} questions are {name}, which is right "
            f"for {right} of the {len(given)} that it was given to. Try a lower --lr, --kl-coef or --entropy-coef above 0, or "
            "a higher --temperature",
            f"one answer no longer takes over: {share:.0%} are {name}",
        )

    def _no_signal(self, seen: Sequence[GroupAnswers]) -> list[str]:
        mixed = mixed_share([each.rewards for each in seen])
        rewards = [reward for each in seen for reward in each.rewards]
        reward = sum(rewards) / len(rewards)
        # A single rollout has none to differ from.
        is_missing = mixed < (SIGNAL if "signal" in self.active else NO_SIGNAL) and reward < SOLVED and len(rewards) > len(seen)
        return self._told(
            "signal",
            f"{1 - mixed:.0%} of groups without a signal" if is_missing else "",
            f"most groups carry no signal: for {1 - mixed:.0%} of the last {len(seen)} questions all rollouts have the same "
            f"reward, at a mean reward of {reward:.2f}. Try an easier task or --task.difficulty (neuromas screen tells what "
            "can be learned), a larger --group-size, a higher --temperature, or, if all write the same, a lower --lr",
            f"groups carry a signal again: in {mixed:.0%} of them rewards differ",
        )

    def _told(self, warning: str, in_brief: str, begins: str, ends: str) -> list[str]:
        """Keep a warning that holds `in_brief`, drop it where that is empty, and return what is told if this is new."""
        was_active = warning in self.active
        if in_brief:
            self.active[warning] = in_brief
        else:
            self.active.pop(warning, None)
        return [] if was_active is bool(in_brief) else [begins if in_brief else ends]
