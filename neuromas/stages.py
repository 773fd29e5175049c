"""The growths of a run as it goes: which are taken on, how far the last is open, what a run that is grown hands on.

What a network is at a step is a function of the config and the step: a growth happens at the beginning of the step `at_step`,
in memory, from adapters that a checkpoint holds. So a killed run is before it or after it, and a resumed one grows again, bit
for bit.
"""

import dataclasses
from collections.abc import Sequence

from neuromas.checkpoint import RunDirectory
from neuromas.config import GrowthConfig, TrainConfig, differences
from neuromas.evaluate import Evaluation, evaluate
from neuromas.growth import Growth, widths_of
from neuromas.network import Network
from neuromas.tasks import Task
from neuromas.types import Example, Group

FREE = ("num_steps", "growth", "lr", "warmup_steps", "final_lr", "step_tokens", "eval_size", "eval_every", "validation_size")
"""Settings that a run may have otherwise than the run that it grows from, beside those of every resumed run."""


class Stages:
    """Takes a network through the growths of a run."""

    def __init__(self, network: Network, growths: Sequence[Growth]) -> None:
        self.network, self.growths = network, tuple(growths)
        self.taken = 0

    @property
    def last(self) -> Growth | None:
        """The growth that was taken on last."""
        return self.growths[self.taken - 1] if self.taken else None

    def restore(self, step: int) -> None:
        """Make the network what it is after `step` steps; its new adapters are to be loaded."""
        while self.taken < len(self.growths) and self.growths[self.taken].at_step < step:
            self.network.grow(self.growths[self.taken])
            self.taken += 1
            self.open(step)

    def due(self, step: int) -> Growth | None:
        """Return the growth with which this step begins, if any."""
        following = self.growths[self.taken] if self.taken < len(self.growths) else None
        return following if following and following.at_step <= step else None

    def open(self, step: int) -> None:
        """Open the network as far as it is in this step."""
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
    """Return the share of greedy answers that an opened network gives otherwise than its parent did on these examples."""
    score, groups = evaluate(network, task, examples)

    def answers(found: Sequence[Group]) -> list[str | None]:
        return [task.parse_answer(rollout.answer) for group in found for rollout in group]

    changed = sum(a != b for a, b in zip(answers(before[1]), answers(groups), strict=True))
    return {
        "share": changed / score.n, "n": score.n, "accuracy_before": before[0].accuracy, "accuracy_after": score.accuracy,
        "floor": score.floor,
    }  # fmt: skip


def grown_config(parent: RunDirectory, entry: GrowthConfig, *, steps: int | None = None, **changes: object) -> TrainConfig:
    """Return the config of a run that grows a finished one and goes on for `steps` steps, by default as many as it had.

    Steps count on from the parent's, so that no question is drawn twice; the learning rate begins anew. Raises ValueError if
    the parent is not finished, is to have another task or backbone, or cannot grow in this way.
    """
    done = parent.step
    if done < parent.config.num_steps:
        raise ValueError(
            f"run {parent.path} has done {done} of {parent.config.num_steps} steps; finish it with neuromas train --resume "
            f"--run-dir {parent.path} first"
        )
    begun = [entry.at_step for entry in parent.config.growth if entry.restart_lr]
    if steps is None:
        steps = done - max(begun, default=0)
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    entry = dataclasses.replace(entry, at_step=done, restart_lr=True)
    config = dataclasses.replace(
        parent.config,
        **{"growth": (*parent.config.growth, entry), "num_steps": done + steps, "run_dir": None, **changes},  # type: ignore[arg-type]  # names of fields
    )
    if config.run_dir is None:
        suffix = "-".join(map(str, widths_of(config.growths()[-1].grown)))
        config = dataclasses.replace(config, run_dir=parent.path.with_name(f"{parent.path.name}-to-{suffix}"))
    check_descends(parent, config)
    return config.check()


def check_descends(parent: RunDirectory, config: TrainConfig) -> None:
    """Raise ValueError unless a run of this config can go on from the parent's adapters."""
    same = dataclasses.replace(config, **{name: getattr(parent.config, name) for name in FREE})
    if other := differences(parent.config, same):
        raise ValueError(f"run {parent.path} cannot be grown into another task, backbone or setting: it has {other}")
    if bool(config.step_tokens) != bool(parent.config.step_tokens):
        raise ValueError(
            f"--step-tokens: run {parent.path} has {parent.config.step_tokens}; with a budget a run draws other questions than "
            "without one, and would meet some twice"
        )
    if config.growth[: len(parent.config.growth)] != parent.config.growth or config.num_steps <= parent.step:
        raise ValueError(f"run {parent.path} cannot be grown: the config leaves out its growths or its {parent.step} steps")
