"""`own_critics`: each node has a critic of its own, that values what the node itself reads (CoLLM-DC, arXiv 2601.21972).

    advantage of a text of node n = r - V_n(what n has read)

Each node writes once, so the return of its history is the terminal reward. Unbiased: a value does not depend on what the
node writes. Differs: V_n is a value head on the frozen backbone's states (`critic.py`), not a language model of its own;
advantages are not normalized; one update on each step's rollouts.
"""

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Credits


def own_critics(step: Step) -> Credits:
    completions = [completion for _, _, completion in step.texts]
    found = step.value_prompts([c.prompt for c in completions], heads=[c.node for c in completions])
    return Credits.of(step.groups, step.rewards_minus(found))
