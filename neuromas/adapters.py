"""The bank of adapters: one low-rank update per node and target module, stacked so that one batched product serves all.

LoRA (Hu et al. 2022, arXiv 2106.09685): y = W x + (alpha / r) B A x, with W frozen, A of shape (r, in), B of shape (out, r).
The bank holds A as (N, r, in) and B as (N, out, r) for each target module. Files are PEFT's, one folder per node.
"""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor, nn

from neuromas.config import AdapterConfig

DEFAULT_TOTAL_RANK = 24
_PEFT_PREFIX = "base_model.model."


class AdaptedLinear(nn.Module):
    """A frozen linear layer plus, for each row of the batch, the update of that row's node."""

    def __init__(self, base: nn.Linear, bank: "AdapterBank", rank: int) -> None:
        super().__init__()
        self.base = base
        # A tuple hides the bank from nn.Module: it already owns these parameters through the model.
        self._bank = (bank,)
        nodes = len(bank.nodes)
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.zeros(nodes, rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(nodes, base.out_features, rank, **like))
        self._gathered: tuple[Tensor, Tensor, Tensor] | None = None

    def forward(self, x: Float[Tensor, "rows tokens in"]) -> Float[Tensor, "rows tokens out"]:
        bank = self._bank[0]
        y = self.base(x)
        if bank.route is None:
            return y
        a, b = self._weights(bank.route, x.dtype)
        return torch.baddbmm(y, torch.bmm(x, a), b)

    def _weights(self, route: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A^T (rows, in, r) and scaled B^T (rows, r, out).

        An engine, which runs in inference mode, hands in the same route tensor for as long as its rows are the same: what was
        gathered for it is then used again, and a step of a decode gathers nothing.
        """
        if self._gathered and self._gathered[0] is route and torch.is_inference_mode_enabled():
            return self._gathered[1:]
        a = self.lora_A.to(dtype)[route].mT
        b = (self._bank[0].scaling * self.lora_B).to(dtype)[route].mT
        self._gathered = (route, a, b) if torch.is_inference_mode_enabled() else None
        return a, b


class AdapterBank:
    """All adapters of a network on one backbone.

    Building it wraps the backbone's target modules; `routed` says which node each row of the next forward belongs to.
    Adapters are kept in float32 whatever the backbone's dtype. A starts as PEFT's default, B at zero, drawn per node and
    module, so that an adapter's start does not depend on which other nodes exist.

    Raises ValueError if a target module is not there or the rank or budget cannot be met.
    """

    def __init__(self, model: nn.Module, nodes: Sequence[int], config: AdapterConfig, seed: int) -> None:
        self.nodes = tuple(nodes[:1] if config.shared else nodes)
        """Whose adapters these are; a single one serves whoever speaks."""
        self.version = 0
        """Counts optimizer steps; a completion carries the version that wrote it."""
        self.route: Tensor | None = None
        self.target_modules = tuple(config.target_modules)
        targets = find_targets(model, self.target_modules)
        self.parameters_per_rank = sum(m.in_features + m.out_features for m in targets.values())
        self.rank = resolve_rank(config, len(self.nodes), self.parameters_per_rank)
        self.alpha = config.alpha if config.alpha is not None else 2.0 * self.rank
        self.scaling = self.alpha / self.rank
        self.modules: dict[str, AdaptedLinear] = {}
        for name, linear in targets.items():
            parent, _, child = name.rpartition(".")
            self.modules[name] = AdaptedLinear(linear, self, self.rank)
            setattr(model.get_submodule(parent), child, self.modules[name])
        for index, node in enumerate(self.nodes):
            self._initialise(index, node, seed)

    def _initialise(self, index: int, node: int, seed: int) -> None:
        for name, module in self.modules.items():
            digest = blake2b(f"{seed}/{node}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
            bound = 1 / math.sqrt(module.base.in_features)
            drawn = torch.empty(module.lora_A.shape[1:]).uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                module.lora_A[index] = drawn.to(module.lora_A.device)
                module.lora_B[index] = 0

    @contextmanager
    def routed(self, rows: Int[Tensor, " rows"] | None) -> Iterator[None]:
        """Route each row of the forwards inside through the adapter at that index of `nodes`; None: bare backbone."""
        before = self.route
        self.route = rows
        try:
            yield
        finally:
            self.route = before

    def index(self, node: int) -> int:
        return self.nodes.index(node) if len(self.nodes) > 1 else 0

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return every trainable tensor by name."""
        named: dict[str, nn.Parameter] = {}
        for name, module in self.modules.items():
            named |= {f"{name}.lora_A": module.lora_A, f"{name}.lora_B": module.lora_B}
        return named

    @property
    def trainable_parameters(self) -> int:
        return len(self.nodes) * self.rank * self.parameters_per_rank

    def clip_grad_norms(self, max_norm: float) -> dict[int, float]:
        """Scale each node's gradient to at most `max_norm` (0: leave it) and return the norms from before, by node."""
        grads = [p.grad for p in self.parameters().values() if p.grad is not None]
        if not grads:
            return dict.fromkeys(self.nodes, 0.0)
        norms_N = torch.stack([grad.flatten(1).norm(dim=1) for grad in grads]).norm(dim=0)
        if max_norm > 0:
            scale_N = (max_norm / (norms_N + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(scale_N.view(-1, *[1] * (grad.dim() - 1)))
        return dict(zip(self.nodes, norms_N.tolist(), strict=True))

    def peft_files(self, node: int, base_model: str) -> dict[str, bytes]:
        """Return a node's adapter as PEFT's two files, by name."""
        index = self.index(node)
        tensors = {
            f"{_PEFT_PREFIX}{name}.{half}.weight": getattr(module, half).detach()[index].cpu().contiguous()
            for name, module in self.modules.items()
            for half in ("lora_A", "lora_B")
        }
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True,
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "target_modules": sorted(self.target_modules),
        }  # fmt: skip
        return {
            "adapter_config.json": json.dumps(config, indent=2).encode(),
            "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        }

    def load_peft(self, node: int, folder: Path) -> None:
        """Read a node's adapter from a PEFT folder; ValueError if its shapes are not this bank's."""
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
        index = self.index(node)
        for name, module in self.modules.items():
            for half in ("lora_A", "lora_B"):
                stored = tensors.get(f"{_PEFT_PREFIX}{name}.{half}.weight")
                target = getattr(module, half).data[index]
                if stored is None or stored.shape != target.shape:
                    got = "nothing" if stored is None else tuple(stored.shape)
                    raise ValueError(f"adapter {folder} holds {got} for {name}.{half}, expected {tuple(target.shape)}")
                target.copy_(stored)


def find_targets(model: nn.Module, target_modules: Sequence[str]) -> dict[str, nn.Linear]:
    """Return the linear layers whose last name part is a target; ValueError names the targets that can be had."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: module for name, module in linears.items() if name.rpartition(".")[2] in target_modules}
    missing = set(target_modules) - {name.rpartition(".")[2] for name in found}
    if missing:
        available = sorted({name.rpartition(".")[2] for name in linears} - {"lm_head"})
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
