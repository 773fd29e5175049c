"""`per_node`: each node's rewards are normalized by its own mean and standard deviation (Dr. MAS, arXiv 2602.08847).

    advantage of a text of node n = (r - mean_n) / std_n        over the texts of node n that answer the same question

Differs: nothing in the formula. In Dr. MAS agents are called unequally often, so their means differ. Here each node writes
once in each rollout, so without a reward of a node's own all nodes have the group's mean and deviation, and this is
`--centring group_mean --normalize`. With `--format-bonus` a node is paid for the form of its own messages alone, and they
differ.

Biased: the mean holds the text's own reward, which scales the expected gradient by (G - 1) / G, and the deviation weighs
questions by how often they are answered right.
"""

import torch

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Credits, advantages


def per_node(step: Step) -> Credits:
    rollouts = [rollout for group in step.groups for rollout in group]
    found = {}
    for node in step.network.topology.nodes:
        rewards_PG = step.terminal_PG + torch.tensor(step.local_rewards(rollouts, node)).view_as(step.terminal_PG)
        found[node] = advantages(rewards_PG, "group_mean", normalize=True)
    return Credits.of(step.groups, found)
