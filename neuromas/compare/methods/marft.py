"""MARFT: agents act in a sequence, the last alone is rewarded, a critic spreads it (Liao et al. 2025, arXiv 2504.16129).

Each agent reads all that was said before and has one adapter; the advantage is GAE over agents
(`credit/sequential_critic.py`). Differs: one on-policy REINFORCE update on each step's rollouts, without PPO's clipping,
epochs and entropy bonus; the critic is a value head on the frozen backbone's states; the cell's rank and modules, not r = 8
on q and v; one pass to answer and no judge's line; the reward is the task's for the last agent's answer, where the source
counts the share of agents that answer right.
"""

from dataclasses import replace

from neuromas.compare.methods.networks import Trained
from neuromas.config import TopologyConfig, TrainConfig

MARFT_ROLES = (
    "You are a reasoner: think about the question.",
    "You are a reasoner: go on from what was said.",
    "You are an actor: give the final answer.",
)


def marft(config: TrainConfig) -> TrainConfig:
    """Return settings of two reasoners and an actor that read all that was said before them."""
    topology = TopologyConfig(widths=(1, 1, 1), skip=True, roles=MARFT_ROLES)
    return replace(config, topology=topology, credit="sequential_critic")


METHODS = (
    Trained(
        name="marft",
        title="MARFT-style sequence with a critic",
        source="Liao et al. 2025, arXiv 2504.16129; repository SII-MARFT/MARFT",
        change=marft,
    ),
)
