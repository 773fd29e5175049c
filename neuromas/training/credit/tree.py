"""`tree`: each rollout of a question branches at one node, into 1 + `--replays` leaves (tree-sampled groups).

The node is drawn for each question, among those that read messages. A rollout's texts before it are kept, the node's own and
those that follow from it are written once for each leaf:

    advantage of a text that all leaves hold  =  mean reward of its leaves - mean reward of the other rollouts' leaves
    advantage of a text of one leaf           =  its reward - mean reward of the rollout's other leaves

Texts of a leaf learn with the share 1 / leaves. Unbiased. The trees of AT-GRPO (arXiv 2510.11062) go on from the best text
alone: `turn_groups`. `--branches` is the other kind of tree: it branches at every layer, and samples a text again for each
rollout that holds it; here a text that leaves share is sampled once.
"""

from dataclasses import dataclass
from itertools import islice

import torch

from neuromas.rollout.engine import uniforms
from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Advantage, Credits, advantages
from neuromas.types import Completion, Group, Replay, Rollout


@dataclass(frozen=True, slots=True)
class _Tree:
    """A rollout with its leaves."""

    kept: list[Completion]
    """Texts that all leaves hold."""
    leaves: list[list[Completion]]
    """The other texts, those of the rollout itself first."""
    rewards: list[float]
    """Of each leaf."""


def tree(step: Step) -> Credits:
    count, nodes = step.config.replays, [branching_node(step, group) for group in step.groups]
    branching = [(rollout, node) for group, node in zip(step.groups, nodes, strict=True) if node for rollout in group]
    replays = step.replay([(rollout, node, draw) for rollout, node in branching for draw in range(1, count + 1)])
    grown = iter(zip(replays, step.rewards([each.rollout for each in replays]), strict=True))
    texts: list[tuple[Completion, Advantage]] = []
    for group, node, rewards in zip(step.groups, nodes, step.rewards_PG.tolist(), strict=True):
        trees = [
            _tree_of(rollout, reward, list(islice(grown, count if node else 0)))
            for rollout, reward in zip(group, rewards, strict=True)
        ]
        values = torch.tensor([[sum(each.rewards) / len(each.rewards) for each in trees]])
        for each, advantage in zip(trees, advantages(values, "leave_one_out")[0].tolist(), strict=True):
            shares = advantages(torch.tensor([each.rewards]), "leave_one_out")[0] / len(each.rewards)
            texts += [(completion, advantage) for completion in each.kept]
            texts += [(c, share) for leaf, share in zip(each.leaves, shares.tolist(), strict=True) for c in leaf]
    return Credits(tuple(texts), step.rewards_PG.numel())


def _tree_of(rollout: Rollout, reward: float, grown: list[tuple[Replay, float]]) -> _Tree:
    anew = {completion.node for replay, _ in grown for completion in replay.written}
    own = [completion for completion in rollout.completions if completion.node in anew]
    return _Tree(
        kept=[completion for completion in rollout.completions if completion.node not in anew],
        leaves=[own, *(list(replay.written) for replay, _ in grown)],
        rewards=[reward, *(found for _, found in grown)],
    )


def branching_node(step: Step, group: Group) -> int:
    """Return the node at which a question's rollouts branch; 0 where no node reads messages."""
    topology = step.topology_of(group)
    reading = [node for node in topology.nodes if topology.senders(node)]
    draw = uniforms((*step.seed, group[0].example.id, "branching node"), 1)[0]
    return reading[int(draw * len(reading))] if reading else 0
