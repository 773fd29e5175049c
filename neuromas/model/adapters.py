"""The bank of adapters: one low-rank update per node and target module, stacked; tokens of a node are one product.

LoRA (Hu et al. 2022, arXiv 2106.09685): y = W x + (alpha / r) B A x, with W frozen, A of shape (r, in), B of shape (out, r).
The bank holds A as (N, r, in) and B as (N, out, r) for each target module. Files are PEFT's, one folder per node.

Nodes that join when a network grows are stacks of their own, so that an optimizer's moments and step count of the nodes that
were there before stay as they are, bit for bit, and those of the new nodes start fresh.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load, save
from torch import Tensor, nn

from neuromas.config import AdapterConfig
from neuromas.model.lora import HALVES, KEPT_AT_MOST, AdaptedLinear, Forwarding, Route, name_of
from neuromas.system.process import total_memory

DEFAULT_TOTAL_RANK = 24
_PEFT_PREFIX = "base_model.model."
_SUFFIX_CARD = b"""# A LoRA adapter that acts behind the question alone

Trained with `--adapter.scope suffix`: the question is read by the bare model, and only what follows it by the model with this
adapter. PEFT and vLLM apply an adapter to every token, the question's included, so there it writes other texts than those it
was trained and scored on. `neuromas eval` and `neuromas ask` do as in training.
"""


class AdapterBank:
    """All adapters of a network on one backbone.

    Building it wraps the backbone's target modules; `routed` says which node each token of the next forward belongs to.
    Adapters are kept in float32 whatever the backbone's dtype. A starts as PEFT's default, B at zero, drawn per node and
    module, so that an adapter's start does not depend on which other nodes exist.

    Raises ValueError if a target module is not there or the rank or budget cannot be met.
    """

    def __init__(self, model: nn.Module, nodes: Sequence[int], config: AdapterConfig, seed: int) -> None:
        self.shared = config.shared
        """Whether one adapter serves whoever speaks."""
        self.generations = [tuple(nodes[:1] if self.shared else nodes)]
        """Nodes that joined together: those of the start, then those of each growth."""
        self.version = 0
        """Counts optimizer steps; a completion carries the version that wrote it."""
        self.scope = config.scope
        self.target_modules = tuple(config.target_modules)
        targets = find_targets(model, self.target_modules)
        self.parameters_per_rank = sum(m.in_features + m.out_features for m in targets.values())
        self.rank = resolve_rank(config, len(self.nodes), self.parameters_per_rank)
        weights = len(self.nodes) * self.rank * self.parameters_per_rank
        device = next(iter(targets.values())).weight.device
        require_memory(f"adapters of --adapter.rank {self.rank} for {len(self.nodes)} nodes", 4 * weights, device)
        self.alpha = config.alpha if config.alpha is not None else 2.0 * self.rank
        self.routing = Forwarding(self.alpha / self.rank, generations=self.generations)
        self._last_route: tuple[Tensor, Route] | None = None
        self._dtype = next(iter(targets.values())).weight.dtype
        # Modules without an adapter too: a product of several is kept as a whole.
        linears = (module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name)
        self._linear_bytes = sum(linear.weight.nbytes for linear in linears)
        self.modules: dict[str, AdaptedLinear] = {}
        for name, linear in targets.items():
            parent, _, child = name.rpartition(".")
            self.modules[name] = AdaptedLinear(linear, self.routing, self.rank)
            setattr(model.get_submodule(parent), child, self.modules[name])
        self._seed = seed
        for node in self.nodes:
            self._initialise(node)

    def _initialise(self, node: int) -> None:
        for name, module in self.modules.items():
            bound = 1 / math.sqrt(module.base.in_features)
            row = self._row(module, "lora_A", node)
            row.copy_(torch.empty(row.shape).uniform_(-bound, bound, generator=self._generator(f"{node}/{name}")))
            self._row(module, "lora_B", node).zero_()

    def _generator(self, what: str) -> torch.Generator:
        digest = blake2b(f"{self._seed}/{what}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)

    def _row(self, module: AdaptedLinear, half: str, node: int) -> Tensor:
        """Return a node's tensor, a view that writes through."""
        generation, place = next((g, nodes.index(node)) for g, nodes in enumerate(self.generations) if node in nodes)
        return module.stack(half, generation).data[place]

    @property
    def nodes(self) -> tuple[int, ...]:
        """Nodes in the order of the indices that `routed` takes: by generation."""
        return tuple(node for generation in self.generations for node in generation)

    def add_nodes(self, copies: Mapping[int, int | None], *, noise: float = 0.0) -> list[nn.Parameter]:
        """Add nodes as a new generation and return its parameters, for an optimizer to take up; no old tensor is touched.

        A node starts as every node does, B at zero, or as a copy of the node given, with normal noise whose standard deviation
        is `noise` times the root mean square of the copied tensor. The rank is that of the nodes before.
        """
        self.generations.append(tuple(copies))
        for module in self.modules.values():
            module.add_generation(len(self.generations) - 1, len(copies))
        for node, source in copies.items():
            self._initialise(node)
            if source is not None:
                self._copy(source, node, noise)
        return list(self.parameters(len(self.generations) - 1).values())

    def _copy(self, source: int, node: int, noise: float) -> None:
        for name, module in self.modules.items():
            for half in HALVES:
                copied, row = self._row(module, half, source), self._row(module, half, node)
                row.copy_(copied)
                if noise:
                    drawn = torch.randn(row.shape, generator=self._generator(f"{node}/{name}/{half}/noise")).to(row.device)
                    row.add_(drawn * (noise * copied.square().mean().sqrt()))

    @contextmanager
    def routed(self, nodes_T: Int[Tensor, " T"] | None) -> Iterator[None]:
        """Route each token of the forwards inside through the adapter at that index of `nodes`; None: bare backbone.

        Tokens of one node should lie together: with gradients on, and where stretches are long, each is a product of its own.
        """
        routing = self.routing
        before = routing.route
        routing.route = None if nodes_T is None else self._route(nodes_T)
        try:
            yield
        finally:
            routing.route = before

    def _route(self, nodes_T: Tensor) -> Route:
        # Whoever samples asks for the same tokens' route again and again.
        if self._last_route is not None and self._last_route[0] is nodes_T:
            return self._last_route[1]
        route = Route.of(nodes_T, self._dtype, kept_whole=self.routing.whole is not None)
        if self.routing.kept is not None:
            self._last_route = nodes_T, route
        return route

    @contextmanager
    def keep_merged(self) -> Iterator[None]:
        """Prepare adapters for products once for all forwards inside, which have no gradients and change no adapter."""
        self.routing.kept = {}
        # By what one node takes: how a node's tokens are computed does not depend on how many other nodes there are.
        small = self._linear_bytes <= KEPT_AT_MOST
        self.routing.whole = {} if small and self._dtype.itemsize >= 4 else None
        try:
            yield
        finally:
            self.routing.kept = self.routing.whole = self._last_route = None

    def parameters(self, generation: int | None = None) -> dict[str, nn.Parameter]:
        """Return every trainable tensor by name, or those of one generation."""
        wanted = range(len(self.generations)) if generation is None else [generation]
        return {
            f"{name}.{name_of(half, number)}": module.stack(half, number)
            for number in wanted
            for name, module in self.modules.items()
            for half in HALVES
        }

    def drop_gradients(self, learning: Collection[int]) -> None:
        """Forget the gradients of generations without a node in `learning`: an optimizer then leaves all of theirs alone."""
        for number, nodes in enumerate(self.generations):
            if not set(nodes) & set(learning):
                for parameter in self.parameters(number).values():
                    parameter.grad = None

    @property
    def trainable_parameters(self) -> int:
        return len(self.nodes) * self.rank * self.parameters_per_rank

    def clip_grad_norms(self, max_norm: float) -> dict[int, float]:
        """Scale each node's gradient to at most `max_norm` (0: leave it) and return the norms from before, by node."""
        found: dict[int, float] = {}
        for number, nodes in enumerate(self.generations):
            grads = [p.grad for p in self.parameters(number).values() if p.grad is not None]
            if not grads:
                found |= dict.fromkeys(nodes, 0.0)
                continue
            norms_N = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
            if max_norm > 0:
                scale_N = (max_norm / (norms_N + 1e-6)).clamp(max=1.0)
                for grad in grads:
                    grad.mul_(scale_N.view(-1, *[1] * (grad.dim() - 1)))
            found |= dict(zip(nodes, norms_N.tolist(), strict=True))
        return found

    def peft_files(self, node: int, base_model: str) -> dict[str, bytes]:
        """Return a node's adapter as PEFT's files, by name; with scope `suffix`, a card that says what they cannot do."""
        tensors = {
            f"{_PEFT_PREFIX}{name}.{half}.weight": self._row(module, half, node).cpu().contiguous()
            for name, module in self.modules.items()
            for half in HALVES
        }
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "target_modules": sorted(self.target_modules),
        }  # fmt: skip
        files = {
            "adapter_config.json": json.dumps(config, indent=2).encode(),
            "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        }
        return files | ({"README.md": _SUFFIX_CARD} if self.scope == "suffix" else {})

    def load_peft(self, node: int, folder: Path) -> None:
        """Read a node's adapter from a PEFT folder; ValueError if its shapes are not this bank's."""
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
        for name, module in self.modules.items():
            for half in HALVES:
                stored = tensors.get(f"{_PEFT_PREFIX}{name}.{half}.weight")
                target = self._row(module, half, node)
                if stored is None or stored.shape != target.shape:
                    got = "nothing" if stored is None else tuple(stored.shape)
                    raise ValueError(f"adapter {folder} holds {got} for {name}.{half}, expected {tuple(target.shape)}")
                target.copy_(stored)


def require_memory(what: str, needed: int, device: torch.device) -> None:
    """Raise ValueError if something takes more bytes than a device has in all: asked before any of them is taken."""
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total_memory()
    if there is not None and needed > there:
        raise ValueError(f"{what} need {needed / 2**30:,.1f} GiB of memory, there are {there / 2**30:,.1f}; ask for less")


def find_targets(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose last name part is a target; ValueError names the targets that can be had."""
    # The head reads the tokens that are kept, not the stream that is routed.
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }
    found = {name: module for name, module in linears.items() if name.rpartition(".")[2] in target_modules}
    missing = set(target_modules) - {name.rpartition(".")[2] for name in found}
    if missing:
        available = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"adapter.target_modules must be among {available} for this backbone, got {sorted(missing)}")
    return found


def resolve_rank(config: AdapterConfig, num_nodes: int, parameters_per_rank: int) -> int:
    """Return the rank of each node: as given, as the budget allows, or a total of 24 shared by all nodes."""
    if config.rank is not None:
        return config.rank
    if config.budget is None:
        return max(1, DEFAULT_TOTAL_RANK // num_nodes)
    rank = config.budget // (num_nodes * parameters_per_rank)
    if rank < 1:
        raise ValueError(
            f"adapter.budget {config.budget:,} is too small for rank 1: {num_nodes} nodes need at least "
            f"{num_nodes * parameters_per_rank:,} trainable parameters"
        )
    return rank
