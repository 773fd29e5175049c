"""AT-GRPO: a fixed workflow of roles, a GRPO group for each agent and turn (Zhao et al. 2025, arXiv 2510.11062).

At an agent's turn a group of texts is drawn from one state, scored, compared, and the best is the next agent's state
(`credit/turn_groups.py`). The group is the cell's, so a question costs more calls than a question of the other methods:
what is matched is tokens. Differs: one turn an agent; a text is scored by the terminal reward of one continuation, as our
tasks have no team reward before the end; no PPO clipping; the three roles of `neuromas_roles`.
"""

from dataclasses import replace

from neuromas.compare.methods.networks import Trained, with_roles
from neuromas.config import TrainConfig


def at_grpo(config: TrainConfig) -> TrainConfig:
    """Return settings of NeuroMAS-3 with roles and a group for each node."""
    return replace(with_roles(config), credit="turn_groups")


METHODS = (
    Trained(
        name="at_grpo",
        title="AT-GRPO-style turn-wise groups",
        source="Zhao et al. 2025, arXiv 2510.11062; repository pettingllms-ai/PettingLLMs",
        change=at_grpo,
    ),
)
