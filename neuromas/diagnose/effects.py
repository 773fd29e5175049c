"""What an intervention does to the answers: the change of accuracy on the same questions, and how to read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from neuromas.diagnose.interventions import Intervention
from neuromas.tasks import Task, rewards_of
from neuromas.training.evaluate import Evaluation
from neuromas.training.intervals import paired
from neuromas.types import Rollout

READINGS = {
    "loss": "answers get worse: the interval lies below 0",
    "gain": "answers get better: the interval lies above 0",
    "no answer changes": "the part is ignored on these questions, whatever their number can show",
    "not shown": "answers change, and the interval holds 0",
    "uninformative": "answers change, but the undisturbed network is at the floor, where there is nothing to lose, or answers "
    "everything right, where nothing can be gained",
    "nothing to disturb": "the intervention leaves all messages as they are, e.g. because they are equal",
}


@dataclass(frozen=True, slots=True)
class Effect:
    """What one intervention has done, compared with the undisturbed network on the same questions."""

    what: Intervention
    accuracy: float
    change: float
    """Accuracy minus that of the undisturbed network."""
    low: float
    """Lower end of the 95% interval of the change, paired by question."""
    high: float
    answers_changed: float
    """Share of questions whose answer, as the task reads it, is another; where it reads none, whose text is."""
    disturbed: float
    """Share of questions in which another text arrived somewhere; 1 where adapters were replaced."""
    reading: str

    def to_json(self) -> dict[str, Any]:
        what = {"name": str(self.what), "kind": self.what.kind, "nodes": list(self.what.nodes)}
        edges = [list(edge) for edge in self.what.edges]
        numbers = ("accuracy", "change", "low", "high", "answers_changed", "disturbed", "reading")
        return {**what, "edges": edges, **{name: getattr(self, name) for name in numbers}}


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """The rollouts that interventions are compared with, their rewards and their score."""

    rollouts: list[Rollout]
    rewards: list[float]
    score: Evaluation

    def effect(self, what: Intervention, rollouts: Sequence[Rollout], task: Task) -> Effect:
        """Compare rollouts of the same questions with the undisturbed ones."""
        rewards = rewards_of(task, [(rollout.example, rollout.answer) for rollout in rollouts])
        low, high = paired([new - old for new, old in zip(rewards, self.rewards, strict=True)])
        pairs = list(zip(rollouts, self.rollouts, strict=True))
        changed = fmean(_said(task, new) != _said(task, old) for new, old in pairs)
        disturbed = 1.0 if what.sources is not None else fmean(_received(new) != _received(old) for new, old in pairs)
        accuracy = fmean(rewards)
        reading = self._reading(low, high, changed, disturbed)
        return Effect(what, accuracy, accuracy - fmean(self.rewards), low, high, changed, disturbed, reading)

    def _reading(self, low: float, high: float, changed: float, disturbed: float) -> str:
        """Return one of READINGS."""
        if not disturbed:
            return "nothing to disturb"
        if not changed:
            return "no answer changes"
        if self.score.low <= self.score.floor:
            return "uninformative"
        if high < 0 or low > 0:
            return "loss" if high < 0 else "gain"
        return "uninformative" if self.score.accuracy == 1 else "not shown"


def _said(task: Task, rollout: Rollout) -> tuple[str | None, str]:
    """Return the answer as the task reads it, or the text in which it reads none."""
    read = task.parse_answer(rollout.answer)
    return read, "" if read is not None else rollout.answer


def _received(rollout: Rollout) -> list[str]:
    return [message.text for completion in rollout.completions for message in completion.messages]
