"""Credit: how the rewards of a step become advantages. One small file a scheme, each a function of a `Step`.

A scheme that needs the terminal reward alone reads `step.rewards_PG`; whatever else one may need has a name in `Step`: other
texts in a rollout's place, the reward of a node's own form, values of a critic. All return `Credits`, which the estimator
takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from neuromas.config import Credit
from neuromas.training.credit.central_critic import central_critic
from neuromas.training.credit.own_critics import own_critics
from neuromas.training.credit.per_node import per_node
from neuromas.training.credit.removal import removal
from neuromas.training.credit.replay import replay
from neuromas.training.credit.sequential_critic import sequential_critic
from neuromas.training.credit.shared import shared
from neuromas.training.credit.step import Step
from neuromas.training.credit.tree import tree
from neuromas.training.credit.turn_groups import turn_groups
from neuromas.training.credit.value import token_value, value
from neuromas.training.reinforce import Credits


@dataclass(frozen=True, slots=True)
class Scheme:
    """A credit scheme, and the value heads that it learns."""

    credit: Callable[[Step], Credits]
    heads: Literal["none", "one", "one a node"] = "none"


SCHEMES: dict[Credit, Scheme] = {
    "shared": Scheme(shared),
    "per_node": Scheme(per_node),
    "replay": Scheme(replay),
    "removal": Scheme(removal),
    "tree": Scheme(tree),
    "value": Scheme(value, heads="one"),
    "token_value": Scheme(token_value, heads="one"),
    "central_critic": Scheme(central_critic, heads="one"),
    "own_critics": Scheme(own_critics, heads="one a node"),
    "sequential_critic": Scheme(sequential_critic, heads="one"),
    "turn_groups": Scheme(turn_groups),
}

__all__ = ["SCHEMES", "Credits", "Scheme", "Step"]
