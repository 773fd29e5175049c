"""The growths of a run over time: which of them the network has, and with which probability the last one is open.

What a network is at a step is a function of the config and the step: a growth happens at the beginning of the step `at_step`,
in memory, from adapters that a checkpoint holds. So a killed run is before it or after it, and a resumed one grows again, bit
for bit.
"""

from collections.abc import Sequence

from torch.nn import Parameter

from neuromas.graph.growth import Growth
from neuromas.rollout.network import Network
from neuromas.tasks import Task
from neuromas.training.evaluate import Evaluation, evaluate
from neuromas.types import Example, Group


class GrowthSchedule:
    """Takes a network through all growths of a run."""

    def __init__(self, network: Network, growths: Sequence[Growth]) -> None:
        self.network, self.all = network, tuple(growths)
        self.taken = 0

    @property
    def last(self) -> Growth | None:
        """The growth that was taken on last."""
        return self.all[self.taken - 1] if self.taken else None

    def restore(self, step: int) -> list[list[Parameter]]:
        """Make the network what it is after `step` steps; return the parameters of each growth, which are to be loaded."""
        added = []
        while self.taken < len(self.all) and self.all[self.taken].at_step < step:
            added.append(self.network.grow(self.all[self.taken]))
            self.taken += 1
            self.set_open_probability(step)
        return [parameters for parameters in added if parameters]

    def due(self, step: int) -> Growth | None:
        """Return the growth with which this step begins, if any."""
        following = self.all[self.taken] if self.taken < len(self.all) else None
        return following if following and following.at_step <= step else None

    def set_open_probability(self, step: int) -> None:
        """Set the probability that the last growth is open to that of this step."""
        if self.last:
            self.network.open_probability = self.last.open_probability(step)

    def expected_calls(self) -> float:
        """Return the expected number of completions of a rollout."""
        network, p = self.network, self.network.open_probability
        return p * len(network.topology.nodes) + (1 - p) * len((network.parent or network.topology).nodes)

    def learning(self, step: int, groups: Sequence[Group]) -> set[int]:
        """Return the nodes that learn from this step: those that have written, in a warm-up the new ones of them alone."""
        wrote = {completion.node for group in groups for rollout in group for completion in rollout.completions}
        if self.last and step < self.last.at_step + self.last.warmup_new:
            return wrote & set(self.last.new)
        return wrote


def changed_answers(
    before: tuple[Evaluation, Sequence[Group]], network: Network, task: Task, examples: Sequence[Example]
) -> dict[str, float]:
    """Return the share of greedy answers on these examples that differ between an opened network and its parent."""
    score, groups = evaluate(network, task, examples)

    def answers(found: Sequence[Group]) -> list[str | None]:
        return [task.parse_answer(rollout.answer) for group in found for rollout in group]

    changed = sum(a != b for a, b in zip(answers(before[1]), answers(groups), strict=True))
    return {
        "share": changed / score.n, "n": score.n, "accuracy_before": before[0].accuracy, "accuracy_after": score.accuracy,
        "floor": score.floor,
    }  # fmt: skip
