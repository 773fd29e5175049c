"""`sequential_critic`: the last of a sequence of nodes is rewarded, a critic spreads it (MARFT, arXiv 2504.16129).

    delta_n = GAMMA * V(s_n+1) - V(s_n)        of the last node  r - V(s_n)
    advantage of a text of node n = sum over k of (GAMMA * LAMBDA)^k * delta_n+k

This is GAE (Schulman et al. 2016, arXiv 1506.02438) over nodes, the action-level form. s_n is what node n reads: in a chain
with skip edges all that was said before. Biased as far as V is wrong, by the discount, and by a power of LAMBDA for a text that
node n+1 does not read, such as that of its neighbour in a layer: no V of s_n+1 can know it. Differs: V is a value head on the
frozen backbone's states (`critic.py`); one on-policy update on each step's rollouts, without PPO's clipping and epochs, entropy
bonus, or updates of one agent at a time; the reward is the task's.
"""

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Advantage, Credits
from neuromas.types import Completion

GAMMA, LAMBDA = 0.99, 0.95


def sequential_critic(step: Step) -> Credits:
    values = iter(step.value_prompts([completion.prompt for _, _, completion in step.texts]))
    texts: list[tuple[Completion, Advantage]] = []
    for group, rewards in zip(step.groups, step.rewards_PG.tolist(), strict=True):
        for rollout, reward in zip(group, rewards, strict=True):
            states = [next(values) for _ in rollout.completions]
            after = [*(GAMMA * value for value in states[1:]), reward]
            spread, advantage = [], 0.0
            for value, following in reversed(list(zip(states, after, strict=True))):
                advantage = following - value + GAMMA * LAMBDA * advantage
                spread.append(advantage)
            texts += zip(rollout.completions, reversed(spread), strict=True)
    return Credits(tuple(texts), step.terminal_PG.numel())
