"""Frozen linear modules with low-rank updates: for each token of a stream, the update of that token's node.

LoRA (Hu et al. 2022, arXiv 2106.09685): y = W x + (alpha / r) B A x, with W frozen, A of shape (r, in), B of shape (out, r).
Modules that read the same tokens are one product: their W stand below each other, and so do their A.
"""

import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

HALVES = ("lora_A", "lora_B")
LONG_STRETCH = 256
"""Tokens of one node, on average, from which on products of their own cost less than one product with several nodes' ranks."""
SHORT_STRETCH = 8
"""The same where each node's whole weights are kept."""
KEPT_AT_MOST = 2**24
"""Bytes of one node's whole weights, W + scaling B A, up to which they are kept while sampling."""
_WHOLE_FROM = 4
"""A stretch of in x out / (in + out) tokens, times this, is read by whole weights made for it."""
Runs = tuple[tuple[int, int, int], ...]
Merged = tuple[Tensor, list[Tensor]]
"""The A of some nodes and modules, (nodes x modules x r, in), and scaling times each module's B, (nodes x r, out)."""


@dataclass(frozen=True, slots=True)
class Route:
    """Which node's adapter acts on which tokens of a stream."""

    runs: Runs
    """Stretches of tokens of one node: (its index, first, one past the last). With gradients, or where they are long."""
    nodes: range = range(0)
    """Indices of nodes, from the first to the last one with tokens here. No others enter a product: what nodes that have
    nothing to say would add is 0, but processors sum products of another width in another order."""
    mask_TN: Tensor | None = None
    """(tokens, those nodes): 1 at a token's node, else 0. Where tokens are of several nodes."""

    @classmethod
    def of(cls, nodes_T: Tensor, dtype: torch.dtype, *, kept_whole: bool) -> "Route":
        stretches, counts = torch.unique_consecutive(nodes_T, return_counts=True)
        shortest = SHORT_STRETCH if kept_whole else LONG_STRETCH
        if torch.is_grad_enabled() or len(nodes_T) >= shortest * len(stretches):
            ends = counts.cumsum(0)
            return cls(tuple(zip(stretches.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)))
        present = stretches.tolist()
        nodes = range(min(present), max(present) + 1)
        if len(nodes) == 1:
            return cls((), nodes)
        return cls((), nodes, (nodes_T[:, None] == torch.arange(nodes.start, nodes.stop, device=nodes_T.device)).to(dtype))


@dataclass(slots=True)
class Forwarding:
    """What a bank tells its modules: where tokens of the present forward go."""

    scaling: float
    """alpha / r."""
    route: Route | None = None
    """None: no adapter acts."""
    kept: "dict[tuple[tuple[AdaptedLinear, ...], range], Merged] | None" = None
    """What modules made of their adapters, by modules and nodes, for forwards without gradients, while adapters do not
    change."""
    whole: "dict[tuple[tuple[AdaptedLinear, ...], int, int], Tensor] | None" = None
    """The same as whole weights, W + scaling B A, by modules, rows of W and node; None where they are too large, or have too
    few digits to hold B A."""
    generations: list[tuple[int, ...]] = field(default_factory=list)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a low-rank update per node."""

    def __init__(self, base: nn.Linear, routing: Forwarding, rank: int) -> None:
        super().__init__()
        self.base, self.routing, self.rank = base, routing, rank
        self.lora_A, self.lora_B = self._zeros(len(routing.generations[0]))

    def _zeros(self, nodes: int) -> tuple[nn.Parameter, nn.Parameter]:
        like = {"device": self.base.weight.device, "dtype": torch.float32}
        return (
            nn.Parameter(torch.zeros(nodes, self.rank, self.base.in_features, **like)),
            nn.Parameter(torch.zeros(nodes, self.base.out_features, self.rank, **like)),
        )

    def add_generation(self, generation: int, nodes: int) -> None:
        """Make room for nodes that join; the tensors of those before are not touched."""
        for half, parameter in zip(HALVES, self._zeros(nodes), strict=True):
            self.register_parameter(name_of(half, generation), parameter)

    def stack(self, half: str, generation: int) -> nn.Parameter:
        """Return `lora_A`, (nodes, r, in), or `lora_B`, (nodes, out, r), of the nodes that joined together."""
        return self.get_parameter(name_of(half, generation))

    @property
    def nodes(self) -> int:
        return sum(map(len, self.routing.generations))

    def all_nodes(self, half: str) -> Tensor:
        """Return the stacks of all nodes as one."""
        stacks: list[Tensor] = [self.stack(half, generation) for generation in range(len(self.routing.generations))]
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        base = self.base
        if self.routing.route is None:
            return base(x)
        y_TO = product(x.flatten(0, -2), base.weight, base.bias, (self,), (slice(0, base.out_features),))
        return y_TO.unflatten(0, x.shape[:-1])


def name_of(half: str, generation: int) -> str:
    """Return the name of a stack: the nodes that a network starts with have the plain one."""
    return half if generation == 0 else f"{half}_{generation}"


class LinearGroup:
    """Linear modules that read the same tokens, as one product; each may have adapters or none.

    Weights of several modules are copied behind each other, once, and the modules made to look into the copy: none is held
    twice.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        linears = [_base(module) for module in modules]
        self._ends = list(itertools.accumulate(linear.out_features for linear in linears))
        self.weight, self.bias = _joined([linear.weight.data for linear in linears]), linears[0].bias
        if self.bias is not None:
            self.bias = torch.cat([linear.bias.data for linear in linears])
        for linear, columns in zip(linears, self._columns(), strict=True):
            linear.weight.data = self.weight[columns]
        self._keep_adapted()

    def _columns(self) -> list[slice]:
        return [slice(first, end) for first, end in zip([0, *self._ends], self._ends, strict=False)]

    def _keep_adapted(self) -> None:
        pairs = zip(self._modules, self._columns(), strict=True)
        adapted = [(module, columns) for module, columns in pairs if isinstance(module, AdaptedLinear)]
        self._adapted, self._adapted_columns = tuple(m for m, _ in adapted), tuple(columns for _, columns in adapted)

    def select(self, first: int, end: int) -> "LinearGroup":
        """Return some of the modules as a group that looks into the same weights."""
        columns = self._columns()[first:end]
        rows = slice(columns[0].start, columns[-1].stop)
        part = copy(self)
        part._modules, part._ends = self._modules[first:end], [stop.stop - rows.start for stop in columns]
        part.weight, part.bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        part._keep_adapted()
        return part

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """Return the outputs of the modules beside each other, (T, sum of out), plus the residual."""
        return product(x_TI, self.weight, self.bias, self._adapted, self._adapted_columns, residual_TO)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """Return weights below each other, as they lie where they have been joined before."""
    first = weights[0]
    ends = itertools.accumulate((weight.nbytes for weight in weights[:-1]), initial=first.data_ptr())
    one_storage = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if one_storage and all(weight.data_ptr() == end for weight, end in zip(weights, ends, strict=True)):
        return first.as_strided((sum(map(len, weights)), first.shape[1]), first.stride())
    return torch.cat(list(weights))


def _base(module: nn.Module) -> nn.Linear:
    linear = module.base if isinstance(module, AdaptedLinear) else module
    assert isinstance(linear, nn.Linear)
    return linear


def product(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, adapted: tuple[AdaptedLinear, ...], columns: tuple[slice, ...],
    residual_TO: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return W x plus the bias, the residual and, in each adapted module's columns, the update of a token's node."""
    routing = adapted[0].routing if adapted else None
    if routing is None or routing.route is None:
        return _linear(x_TI, weight, bias, residual_TO)
    route = routing.route
    if route.runs and routing.whole is not None:
        return _by_whole_weights(x_TI, weight, bias, adapted, columns, residual_TO)
    if route.runs:
        halves = [module.all_nodes(half) for module in adapted for half in HALVES]
        y = _RoutedLinear.apply(x_TI, weight, bias, residual_TO, routing.scaling, route.runs, columns, *halves)
        assert isinstance(y, Tensor)
        return y
    y_TO = _linear(x_TI, weight, bias, residual_TO)
    # Adapters of several nodes as one, of which a token keeps its node's ranks: as many products whatever the number of nodes.
    a, bs = _merged(routing, adapted, route.nodes, x_TI.dtype)
    inner_TR = x_TI @ a.T
    if route.mask_TN is None:
        parts = inner_TR.chunk(len(adapted), 1)
    else:
        inner_MTNr = inner_TR.view(len(x_TI), len(route.nodes), len(adapted), -1).permute(2, 0, 1, 3)
        parts = torch.mul(inner_MTNr, route.mask_TN[..., None], out=inner_TR.new_empty(inner_MTNr.shape)).flatten(2)
    for part, b, where in zip(parts, bs, columns, strict=True):
        y_TO[:, where].addmm_(part, b)
    return y_TO


def _linear(x_TI: Tensor, weight: Tensor, bias: Tensor | None, residual_TO: Tensor | None) -> Tensor:
    if residual_TO is None:
        return functional.linear(x_TI, weight, bias)
    y_TO = torch.addmm(residual_TO, x_TI, weight.T)
    return y_TO if bias is None else y_TO + bias


def _by_whole_weights(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, adapted: tuple[AdaptedLinear, ...], columns: tuple[slice, ...],
    residual_TO: Tensor | None,
) -> Tensor:  # fmt: skip
    routing = adapted[0].routing
    assert routing.route is not None
    assert routing.whole is not None
    weights: list[Tensor] = []
    for node, _, _ in routing.route.runs:
        key = adapted, weight.shape[0], node
        if key not in routing.whole:
            pairs = [(module.all_nodes("lora_A")[node], module.all_nodes("lora_B")[node]) for module in adapted]
            routing.whole[key] = _whole_weight(weight, columns, pairs, routing.scaling).T
        weights.append(routing.whole[key])
    if len(weights) == 1:
        y_TO = x_TI @ weights[0] if residual_TO is None else torch.addmm(residual_TO, x_TI, weights[0])
    else:
        y_TO = x_TI.new_empty(x_TI.shape[0], weight.shape[0])
        for (_, first, end), whole in zip(routing.route.runs, weights, strict=True):
            _write(y_TO, x_TI, whole, residual_TO, slice(first, end))
    return y_TO if bias is None else y_TO.add_(bias)


def _write(y_TO: Tensor, x_TI: Tensor, weight_IO: Tensor, residual_TO: Tensor | None, stretch: slice) -> None:
    """Write a stretch of a product, plus the residual."""
    if residual_TO is None:
        torch.mm(x_TI[stretch], weight_IO, out=y_TO[stretch])
    else:
        torch.addmm(residual_TO[stretch], x_TI[stretch], weight_IO, out=y_TO[stretch])


def _whole_weight(weight: Tensor, columns: tuple[slice, ...], pairs: Sequence[tuple[Tensor, Tensor]], scaling: float) -> Tensor:
    """Return W + scaling B A, (out, in)."""
    whole = weight.clone()
    for where, (a, b) in zip(columns, pairs, strict=True):
        whole[where].addmm_(b, a, alpha=scaling)
    return whole


def _merged(routing: Forwarding, adapted: tuple[AdaptedLinear, ...], nodes: range, dtype: torch.dtype) -> Merged:
    if routing.kept is not None and (adapted, nodes) in routing.kept:
        return routing.kept[adapted, nodes]
    if nodes.start == 0 and nodes.stop == adapted[0].nodes:
        a = torch.stack([module.all_nodes("lora_A").to(dtype) for module in adapted], 1).flatten(0, 2)
        # Laid out alike for one node and for several: a product's order of adding up may follow the layout too.
        bs = [(routing.scaling * module.all_nodes("lora_B")).to(dtype).mT.contiguous().flatten(0, 1) for module in adapted]
    else:
        # They are looked at, not copied.
        a, bs = _merged(routing, adapted, range(adapted[0].nodes), dtype)
        rank = adapted[0].rank
        a = a[nodes.start * len(adapted) * rank : nodes.stop * len(adapted) * rank]
        bs = [b[nodes.start * rank : nodes.stop * rank] for b in bs]
    if routing.kept is not None:
        routing.kept[adapted, nodes] = a, bs
    return a, bs


class _RoutedLinear(torch.autograd.Function):
    """W x plus, stretch by stretch, scaling B A x. Written out: each stretch is added in place and nothing is gathered.

    A long stretch is read by W + scaling B A, made for it and made again for its gradient: one product in place of three. Not
    in bfloat16, whose digits lose small updates of a weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight: Tensor, bias: Tensor | None, residual_TO: Tensor | None, scaling: float, runs: Runs,
        columns: tuple[slice, ...], *halves: Tensor,
    ) -> Tensor:  # fmt: skip
        every_a, every_b = ([half.to(x_TI.dtype) for half in halves[which::2]] for which in (0, 1))
        y_TO = x_TI.new_empty(x_TI.shape[0], weight.shape[0])
        for node, first, end in runs:
            x, y = x_TI[first:end], y_TO[first:end]
            pairs = [(a[node], b[node]) for a, b in zip(every_a, every_b, strict=True)]
            long = _is_long(end - first, weight)
            used = _whole_weight(weight, columns, pairs, scaling) if long else weight
            _write(y_TO, x_TI, used.T, residual_TO, slice(first, end))
            if not long:
                for where, (a, b) in zip(columns, pairs, strict=True):
                    y[:, where].addmm_(x @ a.T, b.T, alpha=scaling)
        if bias is not None:
            y_TO += bias
        ctx.save_for_backward(x_TI, weight, *every_a, *every_b)
        ctx.scaling, ctx.runs, ctx.columns = scaling, runs, columns
        ctx.like = [(half.shape, half.dtype) for half in halves]
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight, *halves = ctx.saved_tensors
        count, columns, scaling, dy_TO = len(ctx.columns), ctx.columns, ctx.scaling, grads[0]
        every_a, every_b = halves[:count], halves[count:]
        rank = every_a[0].shape[1]
        dx_TI = torch.empty_like(x_TI) if ctx.needs_input_grad[0] else None
        d_halves = [torch.zeros(shape, dtype=dtype, device=x_TI.device) for shape, dtype in ctx.like]
        for node, first, end in ctx.runs:
            x, dy = x_TI[first:end], dy_TO[first:end]
            pairs = [(a[node], b[node]) for a, b in zip(every_a, every_b, strict=True)]
            every = torch.cat([a for a, _ in pairs])
            inner, d_inner = x @ every.T, x.new_empty(len(x), len(every))
            for place, (where, (_, b)) in enumerate(zip(columns, pairs, strict=True)):
                ranks = slice(place * rank, (place + 1) * rank)
                d_inner[:, ranks] = dy[:, where] @ b
                # This way around it takes less than half the time.
                d_halves[2 * place + 1][node].add_((inner[:, ranks].T @ dy[:, where]).T, alpha=scaling)
            for d_a, part in zip(d_halves[::2], (d_inner.T @ x).split(rank), strict=True):
                d_a[node].add_(part, alpha=scaling)
            if dx_TI is not None:
                long = _is_long(end - first, weight)
                dx = torch.mm(dy, _whole_weight(weight, columns, pairs, scaling) if long else weight, out=dx_TI[first:end])
                if not long:
                    dx.addmm_(d_inner, every, alpha=scaling)
        return dx_TI, None, None, dy_TO if ctx.needs_input_grad[3] else None, None, None, None, *d_halves


def _is_long(tokens: int, weight: Tensor) -> bool:
    rows, columns = weight.shape
    return weight.dtype.itemsize >= 4 and tokens * (rows + columns) >= _WHOLE_FROM * rows * columns
