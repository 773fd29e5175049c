"""Frozen linear modules with a low-rank update per node: each token of a stream gets its own node's update.

LoRA (Hu et al. 2022, arXiv 2106.09685): y = W x + (alpha / R) B A x, with W frozen, A of shape (R, I), B of shape (O, R).
Modules with the same input are one product: their W are concatenated along the output features, and so are their A. Two copies
save work while adapters do not change: the stacked adapters of several nodes, and one node's merged weights, W + scaling B A.
"""

import itertools
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuromas.model.grouped import adapters_in_blocks, grouped_update
from neuromas.model.products import concatenated, frozen_product, write_product
from neuromas.model.widened import Widened, WidenedLinear

LORA_MATRICES = ("lora_A", "lora_B")
LONG_SEGMENT = 256
"""Segments of at least this many tokens, on average, cost less as one product each than as one with stacked adapters."""
LONG_SEGMENT_IF_MERGED = 8
"""The same bound where each node's merged weights are kept."""
MERGED_AT_MOST = 2**24
"""Merged weights of one node are kept while sampling if they take at most this many bytes."""
WIDENED_AT_MOST = 2**30
"""Weights in bfloat16 are copied for widened products if they take at most this many bytes."""
_MERGE_FROM = 4
"""A segment of at least this many times I x O / (I + O) tokens is multiplied by merged weights made for it."""
Segments = tuple[tuple[int, int, int], ...]
"""Segments of a stream, each the tokens of one node: (index of the node, first token, one past the last token)."""
Stacked = tuple[Tensor, list[Tensor]]
"""Stacked adapters: the A of some nodes and modules, (N x modules x R, I), and scaling times each module's B, (N x R, O)."""


@dataclass(frozen=True, slots=True)
class Route:
    """Says which node's adapter acts on which tokens of a stream."""

    segments: Segments
    """The segments, each of which is a product of its own: with gradients, or where segments are long. Otherwise empty."""
    nodes: range = range(0)
    """Indices from the first to the last node that has tokens here; no other node enters the product. A node without tokens
    would add 0, but processors sum a product of another width in another order."""
    mask_TN: Tensor | None = None
    """1 at a token's node, else 0, for the nodes of `nodes`; None if the tokens are of a single node."""
    groups: tuple[Tensor, Tensor] | None = None
    """The node of each segment, and one past its last token, where all of them together are a grouped product."""

    @classmethod
    def of(cls, nodes_T: Tensor, dtype: torch.dtype, *, has_merged: bool, in_segments: bool) -> "Route":
        """Return the route of tokens of the given nodes.

        `has_merged` says whether merged weights are kept, `in_segments` whether long segments are products of their own.
        """
        segment_nodes, counts = torch.unique_consecutive(nodes_T, return_counts=True)
        long_from = LONG_SEGMENT_IF_MERGED if has_merged else LONG_SEGMENT
        if in_segments and (torch.is_grad_enabled() or len(nodes_T) >= long_from * len(segment_nodes)):
            ends = counts.cumsum(0)
            return cls(tuple(zip(segment_nodes.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True)))
        present = segment_nodes.tolist()
        return cls.over(nodes_T, range(min(present), max(present) + 1), dtype)

    @classmethod
    def of_groups(cls, nodes_T: Tensor) -> "Route":
        """Return the route of tokens whose segments together are a grouped product."""
        segment_nodes, counts = torch.unique_consecutive(nodes_T, return_counts=True)
        return cls((), groups=(segment_nodes, counts.cumsum(0).to(torch.int32)))

    @classmethod
    def over(cls, nodes_T: Tensor, nodes: range, dtype: torch.dtype) -> "Route":
        """Return the route of tokens that are of any of some nodes."""
        if len(nodes) == 1:
            return cls((), nodes)
        return cls((), nodes, (nodes_T[:, None] == torch.arange(nodes.start, nodes.stop, device=nodes_T.device)).to(dtype))


@dataclass(slots=True)
class BankState:
    """State that a bank shares with its modules: the route of the current forward, and what is kept between forwards."""

    scaling: float
    """alpha / R."""
    route: Route | None = None
    """The route of the current forward; with None no adapter acts."""
    stacked: "dict[tuple[tuple[AdaptedLinear, ...], range], Stacked] | None" = None
    """Stacked adapters by modules and nodes, kept for forwards without gradients while adapters do not change."""
    merged: "dict[tuple[tuple[AdaptedLinear, ...], int, int], Tensor] | None" = None
    """Merged weights by modules, output features of W and node; None if they are too large, or their dtype has too few digits
    to hold B A."""
    widened: "dict[tuple[tuple[AdaptedLinear, ...], int], Widened] | None" = None
    """Widened weights by modules and output features of W, each made once; None where products are not widened."""
    groups: bool = False
    """Whether the adapters of all nodes are grouped products."""
    blocks: "dict[tuple[tuple[AdaptedLinear, ...], int], tuple[Tensor, Tensor]] | None" = None
    """What grouped products multiply by, kept like `stacked`, by modules and output features of W."""
    cohorts: list[tuple[int, ...]] = field(default_factory=list)
    """Nodes that joined together: those of the start, then those of each growth."""


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a low-rank update per node."""

    def __init__(self, base: nn.Linear, state: BankState, rank: int) -> None:
        super().__init__()
        self.base, self.state, self.rank = base, state, rank
        self.lora_A, self.lora_B = self._zeros(len(state.cohorts[0]))

    def _zeros(self, nodes: int) -> tuple[nn.Parameter, nn.Parameter]:
        like = {"device": self.base.weight.device, "dtype": torch.float32}
        return (
            nn.Parameter(torch.zeros(nodes, self.rank, self.base.in_features, **like)),
            nn.Parameter(torch.zeros(nodes, self.base.out_features, self.rank, **like)),
        )

    def add_cohort(self, cohort: int, nodes: int) -> None:
        """Add parameters for the nodes of a new cohort; the tensors of earlier cohorts are not touched."""
        for half, parameter in zip(LORA_MATRICES, self._zeros(nodes), strict=True):
            self.register_parameter(name_of(half, cohort), parameter)

    def stack(self, half: str, cohort: int) -> nn.Parameter:
        """Return `lora_A`, (N, R, I), or `lora_B`, (N, O, R), of the nodes of one cohort."""
        return self.get_parameter(name_of(half, cohort))

    @property
    def nodes(self) -> int:
        """Return the number of nodes in all cohorts."""
        return sum(map(len, self.state.cohorts))

    def all_nodes(self, half: str) -> Tensor:
        """Return `lora_A` or `lora_B` of all cohorts, concatenated."""
        stacks: list[Tensor] = [self.stack(half, cohort) for cohort in range(len(self.state.cohorts))]
        return stacks[0] if len(stacks) == 1 else torch.cat(stacks)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        base = self.base
        if self.state.route is None:
            return base(x)
        y_TO = product(x.flatten(0, -2), base.weight, base.bias, (self,), (slice(0, base.out_features),))
        return y_TO.unflatten(0, x.shape[:-1])


def name_of(half: str, cohort: int) -> str:
    """Return the name of a cohort's parameter; the nodes that a network starts with have the plain name."""
    return half if cohort == 0 else f"{half}_{cohort}"


class LinearGroup:
    """Linear modules with the same input, computed as one product; each may have adapters or none.

    The weights of several modules are concatenated once, and each module's weight becomes a view of the result, so that none
    is held twice.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        linears = [_base_linear(module) for module in modules]
        self._ends = list(itertools.accumulate(linear.out_features for linear in linears))
        self.weight, self.bias = concatenated([linear.weight.data for linear in linears]), linears[0].bias
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
        """Return the modules `first` to `end` as a group whose weights are views of this group's."""
        columns = self._columns()[first:end]
        rows = slice(columns[0].start, columns[-1].stop)
        part = copy(self)
        part._modules, part._ends = self._modules[first:end], [stop.stop - rows.start for stop in columns]
        part.weight, part.bias = self.weight[rows], None if self.bias is None else self.bias[rows]
        part._keep_adapted()
        return part

    def __call__(self, x_TI: Tensor, residual_TO: Tensor | None = None) -> Tensor:
        """Return the outputs of all modules, concatenated along the features, plus the residual."""
        return product(x_TI, self.weight, self.bias, self._adapted, self._adapted_columns, residual_TO)


def _base_linear(module: nn.Module) -> nn.Linear:
    linear = module.base if isinstance(module, AdaptedLinear) else module
    assert isinstance(linear, nn.Linear)
    return linear


def product(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, adapted: tuple[AdaptedLinear, ...], columns: tuple[slice, ...],
    residual_TO: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return W x plus the bias, the residual and, in each adapted module's columns, the update of the token's node."""
    state = adapted[0].state if adapted else None
    if state is None or state.route is None:
        return frozen_product(x_TI, weight, bias, residual_TO)
    route = state.route
    if state.widened is not None:
        assert residual_TO is None, "the residual stream is wider than a product"
        return _widened_product(x_TI, weight, bias, adapted, columns)
    if route.groups is not None:
        return _grouped_product(x_TI, weight, bias, adapted, columns, residual_TO)
    if route.segments and state.merged is not None:
        return _by_merged_weights(x_TI, weight, bias, adapted, columns, residual_TO)
    if route.segments:
        halves = [module.all_nodes(half) for module in adapted for half in LORA_MATRICES]
        y = _RoutedLinear.apply(x_TI, weight, bias, residual_TO, state.scaling, route.segments, columns, *halves)
        assert isinstance(y, Tensor)
        return y
    y_TO = frozen_product(x_TI, weight, bias, residual_TO)
    # One product with the stacked ranks of several nodes, masked to those of the token's node: the number of products does not
    # depend on the number of nodes.
    a, bs = _stacked_adapters(state, adapted, route.nodes, x_TI.dtype)
    inner = x_TI @ a.T  # (T, N x modules x R)
    if route.mask_TN is None:
        parts = inner.chunk(len(adapted), 1)
    else:
        inner_by_node = inner.view(len(x_TI), len(route.nodes), len(adapted), -1).permute(2, 0, 1, 3)
        parts = torch.mul(inner_by_node, route.mask_TN[..., None], out=inner.new_empty(inner_by_node.shape)).flatten(2)
    for part, b, where in zip(parts, bs, columns, strict=True):
        y_TO[:, where].addmm_(part, b)
    return y_TO


def _widened_product(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, adapted: tuple[AdaptedLinear, ...], columns: tuple[slice, ...]
) -> Tensor:
    state, ranks = adapted[0].state, adapted[0].nodes * len(adapted) * adapted[0].rank
    assert state.widened is not None
    assert state.route is not None
    key, route = (adapted, weight.shape[0]), state.route
    wide = state.widened.get(key)
    # Nodes may have joined since it was made.
    if wide is None or wide.ranks < ranks:
        wide = state.widened[key] = Widened(weight, columns, ranks)
    if torch.is_grad_enabled():
        halves = [module.all_nodes(half) for module in adapted for half in LORA_MATRICES]
        nodes = slice(route.nodes.start, route.nodes.stop)
        y = WidenedLinear.apply(x_TI, wide, route.mask_TN, nodes, state.scaling, *halves)
        assert isinstance(y, Tensor)
    else:
        a, bs = _stacked_adapters(state, adapted, route.nodes, x_TI.dtype)
        if state.stacked is None or wide.holds != route.nodes:
            wide.hold([b.unflatten(0, (len(route.nodes), -1)).mT for b in bs])
            wide.holds = None if state.stacked is None else route.nodes
        y = wide.product(wide.with_ranks(x_TI, a, route.mask_TN))
    return y if bias is None else y + bias


def _grouped_product(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, adapted: tuple[AdaptedLinear, ...], columns: tuple[slice, ...],
    residual_TO: Tensor | None,
) -> Tensor:  # fmt: skip
    state, key = adapted[0].state, (adapted, weight.shape[0])
    assert state.route is not None
    assert state.route.groups is not None
    kept = None if state.blocks is None else state.blocks.get(key)
    if kept is None:
        every_a, every_b = ([module.all_nodes(half) for module in adapted] for half in LORA_MATRICES)
        kept = adapters_in_blocks(state.scaling, every_a, every_b, columns, weight.shape[0], x_TI.dtype)
        if state.blocks is not None:
            state.blocks[key] = kept
    return frozen_product(x_TI, weight, bias, residual_TO) + grouped_update(x_TI, *kept, state.route.groups)


def _by_merged_weights(
    x_TI: Tensor, weight: Tensor, bias: Tensor | None, adapted: tuple[AdaptedLinear, ...], columns: tuple[slice, ...],
    residual_TO: Tensor | None,
) -> Tensor:  # fmt: skip
    state = adapted[0].state
    assert state.route is not None
    assert state.merged is not None
    weights: list[Tensor] = []
    for node, _, _ in state.route.segments:
        key = adapted, weight.shape[0], node
        if key not in state.merged:
            pairs = [(module.all_nodes("lora_A")[node], module.all_nodes("lora_B")[node]) for module in adapted]
            state.merged[key] = _merged_weight(weight, columns, pairs, state.scaling).T
        weights.append(state.merged[key])
    if len(weights) == 1:
        y_TO = x_TI @ weights[0] if residual_TO is None else torch.addmm(residual_TO, x_TI, weights[0])
    else:
        y_TO = x_TI.new_empty(x_TI.shape[0], weight.shape[0])
        for (_, first, end), merged in zip(state.route.segments, weights, strict=True):
            write_product(y_TO, x_TI, merged, residual_TO, slice(first, end))
    return y_TO if bias is None else y_TO.add_(bias)


def _merged_weight(
    weight: Tensor, columns: tuple[slice, ...], pairs: Sequence[tuple[Tensor, Tensor]], scaling: float
) -> Tensor:
    """Return the merged weight W + scaling B A, (O, I)."""
    merged = weight.clone()
    for where, (a, b) in zip(columns, pairs, strict=True):
        merged[where].addmm_(b, a, alpha=scaling)
    return merged


def _stacked_adapters(state: BankState, adapted: tuple[AdaptedLinear, ...], nodes: range, dtype: torch.dtype) -> Stacked:
    """Return the stacked adapters of these nodes and modules, which are made once while `state.stacked` keeps them."""
    if state.stacked is not None and (adapted, nodes) in state.stacked:
        return state.stacked[adapted, nodes]
    if nodes.start == 0 and nodes.stop == adapted[0].nodes:
        a = torch.stack([module.all_nodes("lora_A").to(dtype) for module in adapted], 1).flatten(0, 2)
        # The layout is the same for one node and for several: a product's order of summation may depend on the layout too.
        bs = [(state.scaling * module.all_nodes("lora_B")).to(dtype).mT.contiguous().flatten(0, 1) for module in adapted]
    else:
        # Slices of all nodes' stacked adapters are views, not copies.
        a, bs = _stacked_adapters(state, adapted, range(adapted[0].nodes), dtype)
        rank = adapted[0].rank
        a = a[nodes.start * len(adapted) * rank : nodes.stop * len(adapted) * rank]
        bs = [b[nodes.start * rank : nodes.stop * rank] for b in bs]
    if state.stacked is not None:
        state.stacked[adapted, nodes] = a, bs
    return a, bs


class _RoutedLinear(torch.autograd.Function):
    """Computes W x plus scaling B A x, segment by segment; its own backward adds segments in place and gathers nothing.

    A long segment is multiplied by merged weights, W + scaling B A, which are made again for its gradient: one product instead
    of three. This is not done in bfloat16, whose digits lose small updates of a weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, weight: Tensor, bias: Tensor | None, residual_TO: Tensor | None, scaling: float,
        segments: Segments, columns: tuple[slice, ...], *halves: Tensor,
    ) -> Tensor:  # fmt: skip
        every_a, every_b = ([half.to(x_TI.dtype) for half in halves[which::2]] for which in (0, 1))
        y_TO = x_TI.new_empty(x_TI.shape[0], weight.shape[0])
        for node, first, end in segments:
            x, y = x_TI[first:end], y_TO[first:end]
            pairs = [(a[node], b[node]) for a, b in zip(every_a, every_b, strict=True)]
            long = _is_long(end - first, weight)
            used = _merged_weight(weight, columns, pairs, scaling) if long else weight
            write_product(y_TO, x_TI, used.T, residual_TO, slice(first, end))
            if not long:
                for where, (a, b) in zip(columns, pairs, strict=True):
                    y[:, where].addmm_(x @ a.T, b.T, alpha=scaling)
        if bias is not None:
            y_TO += bias
        ctx.save_for_backward(x_TI, weight, *every_a, *every_b)
        ctx.scaling, ctx.segments, ctx.columns = scaling, segments, columns
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
        for node, first, end in ctx.segments:
            x, dy = x_TI[first:end], dy_TO[first:end]
            pairs = [(a[node], b[node]) for a, b in zip(every_a, every_b, strict=True)]
            stacked_a = torch.cat([a for a, _ in pairs])
            inner, d_inner = x @ stacked_a.T, x.new_empty(len(x), len(stacked_a))
            for index, (where, (_, b)) in enumerate(zip(columns, pairs, strict=True)):
                ranks = slice(index * rank, (index + 1) * rank)
                d_inner[:, ranks] = dy[:, where] @ b
                # The product transposed takes less than half the time.
                d_halves[2 * index + 1][node].add_((inner[:, ranks].T @ dy[:, where]).T, alpha=scaling)
            for d_a, part in zip(d_halves[::2], (d_inner.T @ x).split(rank), strict=True):
                d_a[node].add_(part, alpha=scaling)
            if dx_TI is not None:
                long = _is_long(end - first, weight)
                dx = torch.mm(dy, _merged_weight(weight, columns, pairs, scaling) if long else weight, out=dx_TI[first:end])
                if not long:
                    dx.addmm_(d_inner, stacked_a, alpha=scaling)
        return dx_TI, None, None, dy_TO if ctx.needs_input_grad[3] else None, None, None, None, *d_halves


def _is_long(tokens: int, weight: Tensor) -> bool:
    """Say whether a segment of this many tokens is multiplied by merged weights while training."""
    rows, columns = weight.shape
    return weight.dtype.itemsize >= 4 and tokens * (rows + columns) >= _MERGE_FROM * rows * columns
