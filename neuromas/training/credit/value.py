"""`value` and `token_value`: a learned value of what a node has read is taken off its reward.

    value        advantage of a text   =  r - V(inbox) - mean of the same over the question's other rollouts
    token_value  advantage of token t  =  r - V(inbox and tokens before t) - mean over the other rollouts of (r - V(inbox))

V is one head for all nodes (`critic.py`); the state at the end of a node's prompt stands for its inbox. A critic that has
learned nothing is the same for all rollouts and cancels: both are then `shared`.

Unbiased, whatever V is: it depends on what was there before the token, and on earlier steps. Related: action-dependent
baselines factorised over agents (COMA, Foerster et al. 2018, arXiv 1705.08926), with the state in place of the other agents'
actions.
"""

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Credits, advantages


def value(step: Step) -> Credits:
    found = step.value_prompts([completion.prompt for _, _, completion in step.texts])
    left = step.rewards_minus(found)
    return Credits.of(step.groups, {node: advantages(each_PG, "leave_one_out") for node, each_PG in left.items()})


def token_value(step: Step) -> Credits:
    found = step.value_tokens([completion for _, _, completion in step.texts])
    left = step.rewards_minus([values[0] for values in found])
    # What the others leave: the same number is taken off every token of a text.
    others = {node: each_PG - advantages(each_PG, "leave_one_out") for node, each_PG in left.items()}
    rewards = step.rewards_PG.tolist()
    texts = tuple(
        (completion, tuple(rewards[p][g] - v - others[completion.node][p, g].item() for v in values))
        for (p, g, completion), values in zip(step.texts, found, strict=True)
    )
    return Credits(texts, step.terminal_PG.numel())
