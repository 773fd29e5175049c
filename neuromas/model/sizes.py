"""Counts the parameters of a config's network from shapes alone: no weights are loaded or made."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from neuromas.config import TrainConfig
from neuromas.model.adapters import find_targets, resolve_rank
from neuromas.model.backbone import config_of


@dataclass(frozen=True, slots=True)
class Sizes:
    """Numbers of parameters of a network."""

    backbone: int
    rank: int
    adapters: int
    """Number of adapters: one for each node of the network that a run ends with, or one that all nodes share."""
    per_adapter: int

    @property
    def trainable(self) -> int:
        """Return the number of trainable parameters."""
        return self.adapters * self.per_adapter


def sizes(config: TrainConfig, architecture: PretrainedConfig | None = None) -> Sizes:
    """Return the sizes of a config's network; with `architecture` the backbone's own config is not read.

    An adapter of rank R on layers with (I, O) features has R * sum(I + O) parameters.
    Raises ValueError as `Backbone.load` and `AdapterBank`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture or config_of(config.backbone))
    targets = find_targets(model, config.adapter.target_modules)
    per_rank = sum(linear.in_features + linear.out_features for linear in targets.values())
    first = 1 if config.adapter.shared else len(config.topology.build().nodes)
    # Nodes that join later have the rank of the nodes of the start.
    rank = resolve_rank(config.adapter, first, per_rank)
    adapters = len(growths[-1].grown.nodes) if (growths := config.growths()) else first
    return Sizes(sum(p.numel() for p in model.parameters()), rank, adapters, rank * per_rank)
