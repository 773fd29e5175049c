"""From a plan to a network that is ready to train; what does not fit is said before any training."""

from dataclasses import dataclass

import torch

from neuromas.config import TrainConfig
from neuromas.graph.topology import Topology
from neuromas.model.adapters import require_memory
from neuromas.model.backbone import Backbone
from neuromas.rollout.engine import Engine
from neuromas.rollout.network import Network
from neuromas.rollout.society import Society
from neuromas.rollout.torch_engine import CACHE_BYTES, MAX_ROWS
from neuromas.tasks import from_config
from neuromas.training.learner import Learner, TorchLearner
from neuromas.training.plan import Plan

ROLLOUT_BYTES = 3000
"""What a completion of few words takes in memory, at least."""

TRAINING_BYTES = 16
"""Of a trainable parameter, in float32: its weight, its gradient, and AdamW's two moments of it."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A plan, and what carries it out: a network, whose engine samples, and a learner."""

    plan: Plan
    network: Network
    learner: Learner


def set_up(plan: Plan) -> Setup:
    """Build the network of a plan and start its engine; ValueError names the flag that is wrong."""
    return start_engine(plan, network_of(plan))


def network_of(plan: Plan) -> Network:
    """Build the network of a plan, whose engine is not started yet; ValueError names the flag that is wrong."""
    network = build_network(plan.config, plan.topology)
    # What the network will grow to must fit as well, and that is better said now than in the midst of the run.
    later = [growth.grown for growth in plan.growths]
    network.check_lengths(plan.questions.all, *later)
    check_memory(plan.config, network, _most_nodes(plan))
    return network


def start_engine(plan: Plan, network: Network) -> Setup:
    """Start the engine of a plan's network, which may take minutes; ValueError names the flag that is wrong."""
    network.engine, learner = plug(plan.config, network, _most_nodes(plan))
    return Setup(plan, network, learner)


def _most_nodes(plan: Plan) -> int:
    return max(len(shape.nodes) for shape in (plan.topology, *(growth.grown for growth in plan.growths)))


def plug(config: TrainConfig, network: Network, most_nodes: int) -> tuple[Engine, Learner]:
    """Return who samples and who learns with `--engine`, for a network of this many nodes in the end.

    Raises ValueError if the engine's package is missing, or it cannot serve this backbone or these adapters.
    """
    if config.engine.name == "vllm":
        from neuromas.rollout.vllm_engine import VllmEngine  # an extra

        return VllmEngine(network.policy, most_nodes), TorchLearner(network.policy, config)
    if config.engine.name == "tinker":
        from neuromas.training.tinker_learner import plug_service  # an extra

        return plug_service(config, network.policy)
    return network.engine, TorchLearner(network.policy, config)


def build_network(config: TrainConfig, topology: Topology | None = None) -> Network:
    """Return the network of a config as it starts; ValueError if that is a society."""
    if config.society.rounds:
        raise ValueError(
            "these settings are a society's (society.rounds), which debates and is no network: `neuromas finetune` trains it, "
            "`neuromas eval` scores it"
        )
    read = from_config(config.task).parse_answer if config.topology.vote else None
    return Network(
        topology or config.topology.build(), Backbone.of(config), adapter=config.adapter,
        max_new_tokens=config.max_new_tokens, seed=config.seed, prompt=config.prompt, read=read,
    )  # fmt: skip


def build_society(config: TrainConfig) -> Society:
    """Return the society of a config as it starts."""
    return Society(
        config.society, config.topology.build(), Backbone.of(config), read=from_config(config.task).parse_answer,
        adapter=config.adapter, max_new_tokens=config.max_new_tokens, seed=config.seed, prompt=config.prompt,
    )  # fmt: skip


def check_memory(config: TrainConfig, network: Network | Society, nodes: int) -> None:
    """Raise ValueError if training would need more memory than there is: before it, not in the midst of it."""
    bank, rollouts = network.adapters, config.examples_per_step * config.group_size
    trainable = (1 if config.adapter.shared else nodes) * bank.rank * bank.parameters_per_rank
    device = network.backbone.device
    require_training_memory(trainable, bank.rank, nodes, device)
    text = config.max_new_tokens * network.backbone.token_bytes
    texts = text * min(rollouts * nodes, MAX_ROWS)
    # On a CPU fewer rows decode at once where their texts take more, but one at least.
    texts = max(text, min(texts, CACHE_BYTES)) if device.type == "cpu" else texts
    require_memory(f"keys and values of texts of --max-new-tokens {config.max_new_tokens}", texts, device)
    what = f"--examples-per-step {config.examples_per_step} x --group-size {config.group_size} rollouts of {nodes} nodes"
    require_memory(what, records := rollouts * nodes * ROLLOUT_BYTES, torch.device("cpu"))
    backbone = network.backbone
    # A pass may take fewer tokens. On a GPU, and with layers that are recomputed, what it keeps has not been measured.
    tokens = min(config.tokens_per_micro_batch or backbone.tokens_per_micro_batch, backbone.tokens_per_micro_batch)
    kept = 0 if device.type != "cpu" or config.grad_checkpoint else tokens * backbone.bytes_per_trained_token
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in backbone.model.parameters()),
        "adapters in training": TRAINING_BYTES * trainable,
        "texts": texts + (records if device.type == "cpu" else 0),
        "a forward and backward pass": kept,
    }
    told = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    require_memory(f"training ({told} GiB) would", sum(parts.values()), device)


def require_training_memory(trainable: int, rank: int, nodes: int, device: torch.device) -> None:
    """Raise ValueError if adapters with all that training keeps of them do not fit into memory."""
    require_memory(f"{trainable:,} trainable parameters (rank {rank}, {nodes} nodes)", TRAINING_BYTES * trainable, device)
