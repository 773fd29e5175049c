"""`replay`: what would another message at the same place have led to? (C3, arXiv 2603.06859)

For each rollout and each node: freeze what the node has read, draw `--replays` other texts of it, run only what follows from
them, and compare the rewards:

    advantage of text k = r_k - mean of the other r        over the K = 1 + replays texts at the same context

All K texts learn, each with the share 1 / K, so that a rollout still counts as one. A node that reads nothing but the
question has the same context in all rollouts of the question: these are its K texts already, and nothing is replayed.

Unbiased: texts at one context are drawn independently. Differs: the frozen context is what the node itself reads, which is
all that its text depends on; no clipping, no normalization.
"""

import torch

from neuromas.training.credit.step import Step, text_of
from neuromas.training.reinforce import Advantage, Credits, advantages
from neuromas.types import Completion


def replay(step: Step) -> Credits:
    draws, rewards_PG = range(1, step.config.replays + 1), step.rewards_PG
    over_group = advantages(rewards_PG, "leave_one_out").tolist()
    texts: list[tuple[Completion, Advantage]] = []
    reading: list[tuple[int, int, int]] = []
    for p, group in enumerate(step.groups):
        topology = step.topology_of(group)
        for g, rollout in enumerate(group):
            texts += [(c, over_group[p][g]) for c in rollout.completions if not topology.senders(c.node)]
            reading += [(p, g, c.node) for c in rollout.completions if topology.senders(c.node)]
    replays = step.replay([(step.groups[p][g], node, draw) for p, g, node in reading for draw in draws])
    rewards = step.rewards([each.rollout for each in replays])
    for index, (p, g, node) in enumerate(reading):
        part = slice(index * len(draws), (index + 1) * len(draws))
        candidates = [step.groups[p][g], *(each.rollout for each in replays[part])]
        compared = torch.tensor([[rewards_PG[p, g].item(), *rewards[part]]])
        shares = (advantages(compared, "leave_one_out")[0] / len(candidates)).tolist()
        texts += zip((text_of(each, node) for each in candidates), shares, strict=True)
    return Credits(tuple(texts), rewards_PG.numel())
