"""`removal`: what would the answer have been without this node's message? (CCPO, arXiv 2603.21563)

For each rollout and each node: leave out what it wrote, run only what follows, and take the reward that is left as its
baseline:

    c_n = r - r without n's message        advantage = c_n - mean of c_n over the question's other rollouts

A text that answers leaves nothing when it is left out: one of several is missing in the vote, and of a single one r without
it is 0. What follows is sampled with the random numbers of the rollout itself, so that the two differ by the message and not
by luck.

Unbiased: what is taken off does not depend on what the node wrote. Where no other path leads around a node, what follows reads
nothing that was said before: its counterfactual then tells the luck of the rollout and no more. Differs: CCPO normalizes by a
running mean and deviation of all credits, here they are centred leave-one-out.
"""

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Credits, advantages


def removal(step: Step) -> Credits:
    without = step.replay([(step.groups[p][g], completion.node, 0) for p, g, completion in step.texts], remove=True)
    left = step.rewards_minus(step.rewards([each.rollout for each in without]))
    return Credits.of(step.groups, {node: advantages(each_PG, "leave_one_out") for node, each_PG in left.items()})
