"""`turn_groups`: one group for each node, all of whose texts answer the same prompt (AT-GRPO, arXiv 2510.11062).

Nodes take turns. At a node's turn `--group-size` texts at one state are compared: the one by which the kept rollout went on,
and others that are drawn there. Each is scored by the reward that it leads to, all learn, and the best is kept as the state
of the next turn:

    advantage of text k = (r_k - mean of r) / std of r
    r                   = terminal reward + format bonus * form of the node's own messages

Differs: a text is scored by the terminal reward of one continuation, for there is no other team reward before the end; the
source draws all texts of a group at its state; one turn a node; on-policy REINFORCE without clipping. Nodes that read nothing
but the question have the question's rollouts as their group.

Biased: later nodes learn in the states that the best texts lead to, not in those that they will meet; groups are normalized;
and the first text of a later group is no draw of the node, for its rollout was kept because of the reward that it led to:
where a draw is right with q it is right with 1 - (1 - q)^G, even if the state says nothing.
"""

import torch

from neuromas.training.credit.step import Step, text_of
from neuromas.training.reinforce import Advantage, Credits, advantages
from neuromas.types import Completion


def turn_groups(step: Step) -> Credits:
    draws, topologies = range(1, step.config.group_size), [step.topology_of(group) for group in step.groups]
    # Each question's candidates at the node whose turn it is, with their terminal rewards, and the one that is kept.
    candidates, rewards = [list(group) for group in step.groups], step.terminal_PG.tolist()
    best = [0] * len(candidates)
    texts: list[tuple[Completion, Advantage]] = []
    for node in step.network.topology.nodes:
        reading = [p for p, topology in enumerate(topologies) if node in topology.nodes and topology.senders(node)]
        replays = step.replay([(candidates[p][best[p]], node, draw) for p in reading for draw in draws])
        drawn = [replay.rollout for replay in replays]
        terminal = step.terminal(drawn)
        for index, p in enumerate(reading):
            part = slice(index * len(draws), (index + 1) * len(draws))
            candidates[p] = [candidates[p][best[p]], *drawn[part]]
            rewards[p] = [rewards[p][best[p]], *terminal[part]]
        for p, group in enumerate(candidates):
            if node in topologies[p].nodes:
                scores = [a + b for a, b in zip(rewards[p], step.local_rewards(group, node), strict=True)]
                found = advantages(torch.tensor([scores]), "group_mean", normalize=True)[0].tolist()
                texts += zip((text_of(each, node) for each in group), found, strict=True)
                best[p] = scores.index(max(scores))
    return Credits(tuple(texts), step.terminal_PG.numel())
