"""The static key-value cache of rows that decode together, and what their tokens read of it and of their prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuromas.model import kernels
from neuromas.model.attention import Prefixes, SuffixAttention, additive, columns_of, cutting, merge, read
from neuromas.model.ops import TorchOps
from neuromas.model.packing import Packed

_UNEVEN = 4
"""Times as many places as rows, from which on a grid of prefixes and their rows is mostly padding."""


@dataclass(slots=True)
class Slots:
    """Per-slot state as tensors; row i of each belongs to slot i."""

    keys: list[Tensor]
    """By layer: (slots, heads, columns, head size)."""
    values: list[Tensor]
    nodes: Tensor
    prefix: Tensor
    """Which of the computed prefixes the row goes on from."""
    prefix_length: Tensor
    length: Tensor
    """Tokens in the cache; the next one goes to this column."""
    last_token: Tensor
    count: Tensor
    """Tokens sampled so far."""
    uniforms: Tensor
    tokens: Tensor
    logprobs: Tensor

    def tensors(self) -> list[Tensor]:
        return [
            *self.keys, *self.values, self.nodes, self.prefix, self.prefix_length, self.length, self.last_token, self.count,
            self.uniforms, self.tokens, self.logprobs,
        ]  # fmt: skip

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        places = torch.tensor([sources, targets], device=self.nodes.device)
        columns = int(self.length[places[0]].max())
        for tensor in (*self.keys, *self.values):
            tensor[places[1], :, :columns] = tensor[places[0], :, :columns]
        for tensor in self.tensors()[len(self.keys) + len(self.values) :]:
            tensor[places[1]] = tensor[places[0]]


class _Writing:
    """Where the new tokens of a forward go in the caches: looked up once, for all layers."""

    def __init__(self, slots: Slots, row_T: Tensor, column_T: Tensor) -> None:
        self._slots, self._row_T, self._column_T = slots, row_T, column_T
        self._places: dict[int, Tensor] = {}
        """By heads, which may differ between layers."""

    def write(self, layer: int, keys_THD: Tensor, values_THD: Tensor) -> None:
        for cache, new in zip((self._slots.keys[layer], self._slots.values[layer]), (keys_THD, values_THD), strict=True):
            _, heads, columns, size = cache.shape
            if heads not in self._places:
                # One index for rows of a matrix: several times faster than an index for each dimension.
                of_head = self._row_T[:, None] * heads + torch.arange(heads, device=self._row_T.device)
                self._places[heads] = (of_head * columns + self._column_T[:, None]).flatten()
            cache.view(-1, size).index_copy_(0, self._places[heads], new.flatten(0, 1))


class PrefillAttention(SuffixAttention):
    """The first tokens of rows in the slots from `first` on."""

    def __init__(self, slots: Slots, packed: Packed, prefixes: Prefixes, of_row_B: Tensor, first: int) -> None:
        super().__init__(packed, prefixes, of_row_B)
        self._writing = _Writing(slots, packed.row_T + first, packed.column_T)

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self._writing.write(layer, keys_THD, values_THD)
        return super().attend(layer, query_THD, keys_THD, values_THD, scale=scale, window=window, keep_K=keep_K)


class Order:
    """Live rows by node, so that a node's tokens lie together, as long as none comes or goes."""

    def __init__(self, slots: Slots, live: int) -> None:
        self.slot_B = slots.nodes[:live].argsort(stable=True)
        self.node_B = slots.nodes[self.slot_B]
        self.prefix_B = slots.prefix[self.slot_B]
        self.every_B = torch.arange(live, device=self.slot_B.device)


class Sharing:
    """Which live rows go on from which prefix: with the queries of a prefix behind each other, (Q, S), it is read once."""

    def __init__(self, prefixes: Prefixes, order: Order, before: "Sharing | None") -> None:
        self.order = order
        in_order = torch.equal(order.slot_B, order.every_B)
        self._place_of_slot_B = None if in_order else order.slot_B.argsort()
        """Where among the live rows each slot's row stands; None where slots are in order."""
        used = order.prefix_B.unique()
        # Prefixes are copied together when new ones come, and when half of those that are there have no reader left.
        if before is not None and 2 * len(used) > len(before.places) and bool(torch.isin(used, before.places).all()):
            self.places, self.prefixes = before.places, before.prefixes
        else:
            self.places, self.prefixes = used, prefixes.select(used).contiguous()
        self.row_B = torch.searchsorted(self.places, order.prefix_B)
        self.column_B, self.width = columns_of(self.row_B, len(self.places))
        self.even = len(self.places) * self.width <= _UNEVEN * len(order.slot_B)
        """Whether all scores of the grid may be made at once."""
        self._readings: dict[tuple[int, int, int], kernels.Reading] = {}

    def reading(self, queries: int, heads: int, size: int) -> kernels.Reading:
        """Return the compiled loops' plan for layers with such heads; they may differ."""
        key = queries, heads, size
        if key not in self._readings:
            self._readings[key] = kernels.Reading(
                self.order.slot_B, self.row_B, self.column_B, self.width, self.prefixes.lengths_Q, *key
            )
        return self._readings[key]

    def by_slot(self, stream: Tensor) -> Tensor:
        return stream if self._place_of_slot_B is None else stream.index_select(0, self._place_of_slot_B)

    def by_order(self, of_slots: Tensor) -> Tensor:
        return of_slots if self._place_of_slot_B is None else of_slots.index_select(0, self.order.slot_B)


class DecodeAttention:
    """One new token of each live row: it is written behind what its slot holds, and reads all of it and the row's prefix."""

    def __init__(self, slots: Slots, sharing: Sharing, ops: TorchOps) -> None:
        self._slots, self._sharing, order = slots, sharing, sharing.order
        self._by_loops = ops.reads_cache and sharing.even
        self.column_B = slots.length[order.slot_B]
        self.positions_B = slots.prefix_length[order.slot_B] + self.column_B
        self._writing = _Writing(slots, order.slot_B, self.column_B)
        self._width = int(self.column_B.max()) + 1
        self._longest = int(self.positions_B.max()) + 1
        self._masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what is seen of the row's own tokens, (B, 1, 1, columns), and of prefixes, (Q, 1, 1 or S, W)."""
        if window not in self._masks:
            sharing, device = self._sharing, self.column_B.device
            own, column_of_slot_B = torch.arange(self._width, device=device), sharing.by_slot(self.column_B)
            seen_own = own <= column_of_slot_B[:, None]
            of_prefix = torch.arange(sharing.prefixes.width, device=device)
            seen_prefix = (of_prefix < sharing.prefixes.lengths_Q[:, None])[:, None]
            if window is not None:
                seen_own = seen_own & (column_of_slot_B[:, None] - own < window)
                positions_QS = self.positions_B.new_zeros(len(sharing.places), sharing.width)
                positions_QS[sharing.row_B, sharing.column_B] = self.positions_B
                seen_prefix = seen_prefix & (positions_QS[:, :, None] - of_prefix < window)
            self._masks[window] = additive(seen_own, dtype)[:, None, None], additive(seen_prefix, dtype)[:, None]
        return self._masks[window]

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert keep_K is None, "every row's one token is asked for"
        slots, sharing = self._slots, self._sharing
        window = cutting(window, self._longest)
        if self._by_loops and keys_THD.shape == values_THD.shape:
            reading = sharing.reading(query_THD.shape[1], *keys_THD.shape[1:])
            cache = slots.keys[layer], slots.values[layer]
            return reading.attend(
                query_THD, keys_THD, values_THD, self.column_B, self._width, cache, sharing.prefixes.past[layer],
                window=window, scale=scale,
            )  # fmt: skip
        self._writing.write(layer, keys_THD, values_THD)
        seen_own, seen_prefix = self._mask(window, query_THD.dtype)
        # Heads of queries that share a head of keys stand behind each other as queries of one head.
        query_TKGD = query_THD.unflatten(1, (keys_THD.shape[1], -1))
        keys, values = (cache[: len(query_THD), :, : self._width] for cache in (slots.keys[layer], slots.values[layer]))
        own = read(sharing.by_slot(query_TKGD), keys, values, seen_own, scale=scale)
        prefix_keys, prefix_values = sharing.prefixes.past[layer]
        _, heads, shared, size = query_TKGD.shape
        grid = query_TKGD.new_zeros(len(prefix_keys), heads, sharing.width, shared, size)
        grid[sharing.row_B, :, sharing.column_B] = query_TKGD
        if seen_prefix.shape[2] > 1:
            seen_prefix = seen_prefix.repeat_interleave(shared, 2)
        of_grid = read(grid.flatten(2, 3), prefix_keys, prefix_values, seen_prefix, scale=scale)
        out, total = (part.unflatten(2, (sharing.width, shared))[sharing.row_B, :, sharing.column_B] for part in of_grid)
        own = sharing.by_order(own[0]), sharing.by_order(own[1])
        return merge((out, total), own).flatten(1, 2)
