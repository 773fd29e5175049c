"""CoLLM-CC and CoLLM-DC: agents side by side with a critic (Liu, Chen, Amiri and Amato 2026, arXiv 2601.21972).

CC: one centralised critic values the joint history, and its TD error is every agent's advantage (`credit/central_critic.py`).
DC: each agent has a critic of its own (`credit/own_critics.py`).
Differs: a critic is a small value head on the frozen backbone's states, not a language model; adapters, not whole models; 3
agents and one turn, where the source has 2 agents and up to 4 turns; the joint answer is a majority vote, as for MAGRPO
here; one update on each step's rollouts, without a buffer; the cell's temperature. In one turn all agents read the question
alone, so CC and DC differ in the number of critics and in no information.
"""

from dataclasses import replace

from neuromas.compare.methods.networks import NODES, Trained
from neuromas.config import Credit, TopologyConfig, TrainConfig


def _side_by_side(config: TrainConfig, credit: Credit) -> TrainConfig:
    return replace(config, topology=TopologyConfig(widths=(NODES,), vote=True), credit=credit)


def collm_cc(config: TrainConfig) -> TrainConfig:
    """Return settings of agents side by side with one critic."""
    return _side_by_side(config, "central_critic")


def collm_dc(config: TrainConfig) -> TrainConfig:
    """Return settings of agents side by side with a critic each."""
    return _side_by_side(config, "own_critics")


SOURCE = "Liu et al. 2026, arXiv 2601.21972; repository OpenMLRL/CoMLRL"
METHODS = (
    Trained(name="collm_cc", title="CoLLM-CC-style, one critic", source=SOURCE, change=collm_cc),
    Trained(name="collm_dc", title="CoLLM-DC-style, a critic each", source=SOURCE, change=collm_dc),
)
