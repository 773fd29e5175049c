"""Train a team of language-model nodes as one neural network (NeuroMAS, arXiv 2605.16757)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuromas.config import TaskConfig, TopologyConfig, TrainConfig
    from neuromas.graph.topology import Topology
    from neuromas.model.backbone import Backbone
    from neuromas.rollout.network import Network
    from neuromas.training.load_run import load_run
    from neuromas.training.start import train

__all__ = ["Backbone", "Network", "TaskConfig", "Topology", "TopologyConfig", "TrainConfig", "load_run", "train"]

_HOMES = {
    "Backbone": "neuromas.model.backbone", "Network": "neuromas.rollout.network", "TaskConfig": "neuromas.config",
    "Topology": "neuromas.graph.topology", "TopologyConfig": "neuromas.config", "TrainConfig": "neuromas.config",
    "load_run": "neuromas.training.load_run", "train": "neuromas.training.start",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command line answers --help without waiting for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'neuromas' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
