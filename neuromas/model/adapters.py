"""The bank of adapters: one low-rank update per node and target module, stacked over the nodes.

LoRA (Hu et al. 2022, arXiv 2106.09685): y = W x + (alpha / R) B A x, with W frozen, A of shape (R, I), B of shape (O, R).
The bank holds A as (N, R, I) and B as (N, O, R) for each target module. Files are PEFT's, one folder per node.

The nodes that join in one growth are a cohort with parameters of its own. So the optimizer's moments and step counts of the
earlier nodes stay as they are, bit for bit, and those of the new nodes start fresh.
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
from neuromas.model.grouped import has_grouped_products
from neuromas.model.lora import (
    LORA_MATRICES,
    MERGED_AT_MOST,
    WIDENED_AT_MOST,
    AdaptedLinear,
    BankState,
    Route,
    name_of,
)
from neuromas.system.process import total_memory

DEFAULT_TOTAL_RANK = 24
_PEFT_PREFIX = "base_model.model."
_SUFFIX_CARD = b"""# A LoRA adapter that acts behind the question alone

Trained with `--adapter.scope suffix`: the question is read by the bare model, and only what follows it by the model with this
adapter. PEFT and vLLM apply an adapter to every token, the question's included, so there it writes other texts than those it
was trained and scored on. `neuromas eval` and `neuromas ask` do as in training.
"""


class AdapterBank:
    """Holds all adapters of a network on one backbone.

    Building it wraps the backbone's target modules; `routed` says which node each token of the next forward belongs to.
    Adapters are kept in float32 whatever the backbone's dtype. A starts as PEFT's default and B at zero. A is drawn per node
    and module, so that an adapter's start does not depend on which other nodes exist.

    Raises ValueError if a target module is not there or the rank or budget cannot be met.
    """

    def __init__(self, model: nn.Module, nodes: Sequence[int], config: AdapterConfig, seed: int) -> None:
        self.shared = config.shared
        """Whether all nodes share one adapter."""
        self.cohorts = [tuple(nodes[:1] if self.shared else nodes)]
        """Nodes that joined together: those of the start, then those of each growth."""
        self.version = 0
        """The number of updates, one a training step; a completion carries the version that wrote it."""
        self.scope = config.scope
        self.target_modules = tuple(config.target_modules)
        targets = find_targets(model, self.target_modules)
        self.parameters_per_rank = sum(m.in_features + m.out_features for m in targets.values())
        self.rank = resolve_rank(config, len(self.nodes), self.parameters_per_rank)
        weights = len(self.nodes) * self.rank * self.parameters_per_rank
        device = next(iter(targets.values())).weight.device
        require_memory(f"adapters of --adapter.rank {self.rank} for {len(self.nodes)} nodes", 4 * weights, device)
        self.alpha = config.alpha if config.alpha is not None else 2.0 * self.rank
        self.state = BankState(self.alpha / self.rank, cohorts=self.cohorts)
        self._last_route: tuple[Tensor, Route] | None = None
        self._for_any_nodes = False
        self._dtype = next(iter(targets.values())).weight.dtype
        # Modules without an adapter count too: merged weights cover all modules of a product.
        linears = (module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name)
        self._linear_bytes = sum(linear.weight.nbytes for linear in linears)
        if self._dtype == torch.bfloat16 and device.type == "cpu" and self._linear_bytes <= WIDENED_AT_MOST:
            self.state.widened = {}
        features = [count for linear in targets.values() for count in (linear.in_features, linear.out_features)]
        self.state.groups = has_grouped_products(device, self._dtype, features)
        self.modules: dict[str, AdaptedLinear] = {}
        for name, linear in targets.items():
            parent, _, child = name.rpartition(".")
            self.modules[name] = AdaptedLinear(linear, self.state, self.rank)
            setattr(model.get_submodule(parent), child, self.modules[name])
        self._seed = seed
        for node in self.nodes:
            self._initialise(node)

    def _initialise(self, node: int) -> None:
        """Draw a node's A and set its B to zero."""
        for name, module in self.modules.items():
            bound = 1 / math.sqrt(module.base.in_features)
            tensor = self._node_tensor(module, "lora_A", node)
            tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=self._generator(f"{node}/{name}")))
            self._node_tensor(module, "lora_B", node).zero_()

    def _generator(self, what: str) -> torch.Generator:
        digest = blake2b(f"{self._seed}/{what}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)

    def _node_tensor(self, module: AdaptedLinear, half: str, node: int) -> Tensor:
        """Return a node's A or B as a view, so that writing to it changes the parameter."""
        cohort, index = next((g, nodes.index(node)) for g, nodes in enumerate(self.cohorts) if node in nodes)
        return module.stack(half, cohort).data[index]

    @property
    def nodes(self) -> tuple[int, ...]:
        """Return the nodes in the order of the indices that `routed` takes: cohort by cohort."""
        return tuple(node for cohort in self.cohorts for node in cohort)

    def add_nodes(self, copies: Mapping[int, int | None], *, noise: float = 0.0) -> list[nn.Parameter]:
        """Add nodes as a new cohort and return its parameters, to be added to an optimizer; no old tensor is touched.

        `copies` gives each new node the node that it is a copy of, or None: then it starts as every node does, with B at zero.
        A copy gets normal noise whose standard deviation is `noise` times the root mean square of the copied tensor. The rank
        is that of the earlier nodes.
        """
        self.cohorts.append(tuple(copies))
        for module in self.modules.values():
            module.add_cohort(len(self.cohorts) - 1, len(copies))
        for node, source in copies.items():
            self._initialise(node)
            if source is not None:
                self._copy(source, node, noise)
        return list(self.parameters(len(self.cohorts) - 1).values())

    def _copy(self, source: int, node: int, noise: float) -> None:
        """Copy one node's adapter to another node and add noise."""
        for name, module in self.modules.items():
            for half in LORA_MATRICES:
                copied, tensor = self._node_tensor(module, half, source), self._node_tensor(module, half, node)
                tensor.copy_(copied)
                if noise:
                    drawn = torch.randn(tensor.shape, generator=self._generator(f"{node}/{name}/{half}/noise")).to(
                        tensor.device
                    )
                    tensor.add_(drawn * (noise * copied.square().mean().sqrt()))

    def factors(self, node: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a node's A and B of each module, in one order for all nodes."""
        for module in self.modules.values():
            yield self._node_tensor(module, "lora_A", node), self._node_tensor(module, "lora_B", node)

    @contextmanager
    def replaced(self, sources: Mapping[int, int | None]) -> Iterator[None]:
        """Let nodes act with other adapters inside: {1: 2, 2: 1} exchanges those of two nodes; None is no adapter."""
        named = dict.fromkeys((*sources, *(source for source in sources.values() if source is not None)))
        kept = {node: [(a.clone(), b.clone()) for a, b in self.factors(node)] for node in named}
        for node, source in sources.items():
            for (a, b), (from_a, from_b) in zip(self.factors(node), kept[node if source is None else source], strict=True):
                a.copy_(from_a)
                b.copy_(from_b if source is not None else torch.zeros_like(b))
        self.version += 1  # an engine with copies of its own takes these over
        try:
            yield
        finally:
            for node in sources:
                for (a, b), (own_a, own_b) in zip(self.factors(node), kept[node], strict=True):
                    a.copy_(own_a)
                    b.copy_(own_b)
            self.version += 1

    @contextmanager
    def routed(self, nodes_T: Int[Tensor, " T"] | None) -> Iterator[None]:
        """Route each token of the forwards inside through the adapter at that index of `nodes`; None means the bare backbone.

        Tokens of one node should be adjacent: with gradients on, and where segments are long, each segment is a product of its
        own.
        """
        state = self.state
        before = state.route
        state.route = None if nodes_T is None else self._route(nodes_T)
        try:
            yield
        finally:
            state.route = before

    @contextmanager
    def for_any_nodes(self) -> Iterator[None]:
        """Route the tokens of the forwards inside over the adapters of all nodes, whichever they are of."""
        before, self._for_any_nodes = self._for_any_nodes, True
        try:
            yield
        finally:
            self._for_any_nodes = before

    def _route(self, nodes_T: Tensor) -> Route:
        if self._for_any_nodes:
            return Route.over(nodes_T, range(len(self.nodes)), self._dtype)
        # The engine asks for the route of the same tokens at every step until a row starts or finishes.
        if self._last_route is not None and self._last_route[0] is nodes_T:
            return self._last_route[1]
        state = self.state
        if state.groups:
            return Route.of_groups(nodes_T)
        route = Route.of(nodes_T, self._dtype, has_merged=state.merged is not None, in_segments=state.widened is None)
        if self.state.stacked is not None:
            self._last_route = nodes_T, route
        return route

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Keep stacked adapters and merged weights for all forwards inside, which have no gradients and change no adapter."""
        self.state.stacked, self.state.blocks = {}, {}
        # The bound is on one node's bytes, so that a node's tokens are computed alike whatever the number of other nodes.
        small = self._linear_bytes <= MERGED_AT_MOST
        self.state.merged = {} if small and self._dtype.itemsize >= 4 else None
        try:
            yield
        finally:
            self.state.stacked = self.state.merged = self.state.blocks = self._last_route = None
            for wide in (self.state.widened or {}).values():
                wide.holds = None

    def parameters(self, cohort: int | None = None) -> dict[str, nn.Parameter]:
        """Return every trainable tensor by name, or those of one cohort."""
        wanted = range(len(self.cohorts)) if cohort is None else [cohort]
        return {
            f"{name}.{name_of(half, number)}": module.stack(half, number)
            for number in wanted
            for name, module in self.modules.items()
            for half in LORA_MATRICES
        }

    def drop_gradients(self, learning: Collection[int]) -> None:
        """Drop the gradients of cohorts without a node in `learning`, so that an optimizer leaves their parameters alone."""
        for number, nodes in enumerate(self.cohorts):
            if not set(nodes) & set(learning):
                for parameter in self.parameters(number).values():
                    parameter.grad = None

    @property
    def trainable_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return len(self.nodes) * self.rank * self.parameters_per_rank

    def clip_grad_norms(self, max_norm: float) -> dict[int, float]:
        """Scale each node's gradient to a norm of at most `max_norm` (0: no limit) and return the norms before, by node."""
        found: dict[int, float] = {}
        for number, nodes in enumerate(self.cohorts):
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
        """Return a node's adapter as PEFT's files by name; with scope `suffix` a card says that PEFT applies them otherwise."""
        tensors = {
            f"{_PEFT_PREFIX}{name}.{half}.weight": self._node_tensor(module, half, node).cpu().contiguous()
            for name, module in self.modules.items()
            for half in LORA_MATRICES
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
        """Load a node's adapter from a PEFT folder; raise ValueError if its shapes are not this bank's."""
        self.load_tensors(node, load((folder / "adapter_model.safetensors").read_bytes()), str(folder))

    def load_tensors(self, node: int, tensors: Mapping[str, Tensor], where: str) -> None:
        """Load a node's adapter from the tensors of a PEFT file; ValueError as `load_peft`, with `where` they are from."""
        for name, module in self.modules.items():
            for half in LORA_MATRICES:
                stored = tensors.get(f"{_PEFT_PREFIX}{name}.{half}.weight")
                target = self._node_tensor(module, half, node)
                if stored is None or stored.shape != target.shape:
                    got = "nothing" if stored is None else tuple(stored.shape)
                    raise ValueError(f"adapter {where} holds {got} for {name}.{half}, expected {tuple(target.shape)}")
                target.copy_(stored)


def require_memory(what: str, needed: int, device: torch.device) -> None:
    """Raise ValueError if `what` needs more bytes than a device has in all; call it before anything is allocated."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total_memory()
    if total is not None and needed > total:
        raise ValueError(f"{what} need {needed / 2**30:,.1f} GiB of memory, there are {total / 2**30:,.1f}; ask for less")


def find_targets(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose last name part is a target; raise ValueError with those available if one is missing."""
    # The head is left out: it reads the kept tokens only, and routes are those of the whole stream.
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] != "lm_head"
    }
    found = {name: module for name, module in linears.items() if name.rpartition(".")[2] in target_modules}
    missing = set(target_modules) - {name.rpartition(".")[2] for name in found}
    if missing:
        available = sorted({name.rpartition(".")[2] for name in linears})
        raise ValueError(f"--adapter.target_modules must be among {available} for this backbone, got {sorted(missing)}")
    return found


def resolve_rank(config: AdapterConfig, num_nodes: int, parameters_per_rank: int) -> int:
    """Return the rank of each node: the given one, the largest within the budget, or a share of 24, the total by default."""
    if config.rank is not None:
        return config.rank
    if config.budget is None:
        return max(1, DEFAULT_TOTAL_RANK // num_nodes)
    rank = config.budget // (num_nodes * parameters_per_rank)
    if rank < 1:
        raise ValueError(
            f"--adapter.budget {config.budget:,} is too small for rank 1: {num_nodes} nodes need at least "
            f"{num_nodes * parameters_per_rank:,} trainable parameters"
        )
    return rank
