"""Train a team of language-model nodes as one neural network (NeuroMAS, arXiv 2605.16757)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuromas.graph.topology import Topology
    from neuromas.model.backbone import Backbone
    from neuromas.rollout.network import Network

__all__ = ["Backbone", "Network", "Topology"]

_HOMES = {"Backbone": "neuromas.model.backbone", "Network": "neuromas.rollout.network", "Topology": "neuromas.graph.topology"}


def __getattr__(name: str) -> Any:
    # Loaded when first used: the command line answers --help without waiting for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'neuromas' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
