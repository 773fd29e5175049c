"""What a credit scheme may credit by: a step's rollouts and rewards, and by name whatever is more than these."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from neuromas.config import TrainConfig
from neuromas.graph.topology import Topology
from neuromas.rollout.network import Network
from neuromas.tasks import Task, rewards_of
from neuromas.training.credit.critic import Critic
from neuromas.training.ledger import spending
from neuromas.training.metrics import own_form, well_formed
from neuromas.types import Completion, Group, Prompt, Replay, Rollout


@dataclass(kw_only=True, slots=True)
class Step:
    """A step's rollouts with their terminal rewards. What a scheme does beyond reading them is counted here."""

    config: TrainConfig
    network: Network
    task: Task
    seed: tuple[int, ...]
    """The one that the rollouts were drawn by."""
    groups: Sequence[Group]
    terminal_PG: Float[Tensor, "P G"]
    """One number of a rollout: whether its answer is right."""
    running_mean: float = 0.0
    critic: Critic | None = None
    """Values of texts, for a scheme that learns them."""
    replays: list[Replay] = field(default_factory=list)
    """All that `replay` has sampled."""
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def shared_by(self) -> dict[int, int]:
        """Return, by node, how many consecutive rollouts of a question hold one and the same text of it."""
        topology = self.network.topology
        return {node: self.config.branches ** (topology.depth - topology.layer(node)) for node in topology.nodes}

    @property
    def rewards_PG(self) -> Float[Tensor, "P G"]:
        """Return the terminal rewards, with the bonus for well-formed messages if there is one."""
        if not self.config.format_bonus:
            return self.terminal_PG
        form = [well_formed(self.task, rollout) for group in self.groups for rollout in group]
        return self.terminal_PG + self.config.format_bonus * torch.tensor(form).view_as(self.terminal_PG)

    def rewards(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the same, with the bonus, for any rollouts."""
        terminal, bonus = self.terminal(rollouts), self.config.format_bonus
        return [r + bonus * well_formed(self.task, each) if bonus else r for r, each in zip(terminal, rollouts, strict=True)]

    def local_rewards(self, rollouts: Sequence[Rollout], node: int) -> list[float]:
        """Return what a node is paid in rollouts for itself: the bonus, if there is one, for the form of its own messages.

        A rollout through the network before a growth, in which the node did not write, pays it nothing.
        """
        bonus = self.config.format_bonus
        return [bonus * own_form(self.task, rollout, node) if bonus else 0.0 for rollout in rollouts]

    def terminal(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the terminal rewards of any rollouts, such as replays."""
        return rewards_of(self.task, [(rollout.example, rollout.answer) for rollout in rollouts])

    @property
    def texts(self) -> list[tuple[int, int, Completion]]:
        """Return every text of the rollouts, with the indices of its question and of its rollout."""
        return [
            (p, g, completion)
            for p, group in enumerate(self.groups)
            for g, rollout in enumerate(group)
            for completion in rollout.completions
        ]

    def rewards_minus(self, found: Sequence[float]) -> dict[int, Float[Tensor, "P G"]]:
        """Return, by node, the rewards minus one number for each of `texts`."""
        rewards_PG = self.rewards_PG
        left = {node: rewards_PG.clone() for node in self.network.topology.nodes}
        for (p, g, completion), number in zip(self.texts, found, strict=True):
            left[completion.node][p, g] -= number
        return left

    def topology_of(self, group: Group) -> Topology:
        """Return the topology that a group ran through."""
        return self.network.topology_of(group[0].example, self.seed)

    def replay(self, texts: Sequence[tuple[Rollout, int, int]], *, remove: bool = False) -> list[Replay]:
        """Continue rollouts from one text each, as `Network.replay` does; the ledger and the metrics count it."""
        started = time.perf_counter()
        found = self.network.replay(texts, seed=self.seed, temperature=self.config.temperature, remove=remove) if texts else []
        self.replays += found
        tokens = spending((), found).sampled_tokens
        for name, value in (("replay_tokens/sum", float(tokens)), ("seconds/replay/sum", time.perf_counter() - started)):
            self.metrics[name] = self.metrics.get(name, 0.0) + value
        return found

    def value_prompts(self, prompts: Sequence[Prompt], heads: Sequence[int] = (), rewards: Sequence[float] = ()) -> list[float]:
        """Return the values of prompts by their heads (a single one if none are named), then have the critic learn.

        It learns the rewards of the rollouts, for a prompt of each of `texts`, or the given ones.
        """
        assert self.critic is not None
        return self._value(self.critic.prompt_states(prompts), heads or [0] * len(prompts), rewards or self._rewards_of_texts())

    def value_tokens(self, completions: Sequence[Completion]) -> list[list[float]]:
        """Return the values before each sampled token of each of `texts`, then have the critic learn."""
        assert self.critic is not None
        states = self.critic.states(completions)
        counts = [len(each) for each in states]
        rewards = [r for r, count in zip(self._rewards_of_texts(), counts, strict=True) for _ in range(count)]
        values = iter(self._value(torch.cat(states), [0] * sum(counts), rewards))
        return [[next(values) for _ in range(count)] for count in counts]

    def _value(self, states_BC: Tensor, heads: Sequence[int], rewards: Sequence[float]) -> list[float]:
        assert self.critic is not None
        # In this order: a value that has seen its own reward would bias the gradient.
        values = self.critic.values(states_BC, heads).tolist()
        self.metrics["critic_error/mean"] = self.critic.fit(states_BC, heads, rewards)
        return values

    def _rewards_of_texts(self) -> list[float]:
        rewards = self.rewards_PG.tolist()
        return [rewards[p][g] for p, g, _ in self.texts]


def text_of(rollout: Rollout, node: int) -> Completion:
    """Return what a node has written in a rollout."""
    return next(completion for completion in rollout.completions if completion.node == node)
