"""The KV cache of rows that decode together, a slot a row, and attention over it and over the rows' prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from neuromas.model import kernels
from neuromas.model.attention import (
    Prefixes,
    additive_mask,
    columns_in_groups,
    effective_window,
    merge_parts,
    partial_attention,
)
from neuromas.model.flex import suffix_attention
from neuromas.model.ops import TorchOps
from neuromas.model.packing import Packed

NOT_GIVEN = -1
_DENSE_UP_TO = 4
"""Queries padded by prefix are dense enough to compute all at once up to this many times as many entries as rows."""


@dataclass(slots=True)
class Slots:
    """Holds the state of the slots: index i of each tensor's first axis belongs to slot i."""

    keys: list[Tensor]
    """The cache by layer, (S, J, L, D)."""
    values: list[Tensor]
    nodes: Tensor
    """Index of the adapter of the slot's row."""
    temperature: Tensor
    prefix: Tensor
    """Index of the computed prefix that the row continues."""
    prefix_length: Tensor
    length: Tensor
    """Number of tokens in the cache; the next one goes to this column."""
    last_token: Tensor
    count: Tensor
    """Number of tokens after the prompt so far."""
    uniforms: Tensor
    tokens: Tensor
    logprobs: Tensor
    limit: Tensor
    """Number of tokens at which the current text is cut off."""
    given: Tensor
    """Tokens that take the place of sampled ones, by their index after the prompt, or -1."""

    @classmethod
    def of(
        cls, layers: Sequence[tuple[Tensor, Tensor]], rows: int, columns: int, texts: int, old: "Slots | None"
    ) -> "Slots":  # fmt: skip
        """Return slots with a cache like these keys and values, for so many tokens after a prompt; they keep those of `old`."""
        device = layers[0][0].device

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        def cache_like(tensor: Tensor, before: list[Tensor] | None) -> Tensor:
            cache = tensor.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])
            # Each layer's old cache goes before the next layer's new one is made.
            return _copied(before.pop(0), cache) if before else cache

        slots = cls(
            keys=[cache_like(keys, old.keys if old else None) for keys, _ in layers],
            values=[cache_like(values, old.values if old else None) for _, values in layers],
            nodes=integers(rows),
            temperature=torch.zeros(rows, dtype=torch.float64, device=device),
            prefix=integers(rows),
            prefix_length=integers(rows),
            length=integers(rows),
            last_token=integers(rows),
            count=integers(rows),
            uniforms=torch.zeros((rows, texts), dtype=torch.float64, device=device),
            tokens=integers(rows, texts),
            logprobs=torch.zeros((rows, texts), device=device),
            limit=integers(rows),
            given=integers(rows, texts) + NOT_GIVEN,
        )
        if old is not None:
            for target, source in zip(slots.tensors()[2 * len(layers) :], old.tensors(), strict=True):
                _copied(source, target)
        return slots

    def tensors(self) -> list[Tensor]:
        """Return all tensors, those of the cache first."""
        return [
            *self.keys, *self.values, self.nodes, self.temperature, self.prefix, self.prefix_length, self.length,
            self.last_token, self.count, self.uniforms, self.tokens, self.logprobs, self.limit, self.given,
        ]  # fmt: skip

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the state of some slots to others."""
        indices = torch.tensor([sources, targets], device=self.nodes.device)
        columns = int(self.length[indices[0]].max())
        for tensor in (*self.keys, *self.values):
            tensor[indices[1], :, :columns] = tensor[indices[0], :, :columns]
        for tensor in self.tensors()[len(self.keys) + len(self.values) :]:
            tensor[indices[1]] = tensor[indices[0]]


def _copied(source: Tensor, target: Tensor) -> Tensor:
    """Copy a tensor into the first corner of one that is at least as large, and return that."""
    target[tuple(slice(0, size) for size in source.shape)] = source
    return target


class _CacheWriter:
    """Writes the keys and values of a forward's new tokens into the cache, at indices computed once for all layers."""

    def __init__(self, slots: Slots, row_T: Tensor, column_T: Tensor) -> None:
        self._slots, self._row_T, self._column_T = slots, row_T, column_T
        self._indices: dict[int, Tensor] = {}
        """Indices into the cache by number of heads, which may differ between layers."""

    def write(self, layer: int, keys_TJD: Tensor, values_TJD: Tensor) -> None:
        """Write a layer's new keys and values."""
        for cache, new in zip((self._slots.keys[layer], self._slots.values[layer]), (keys_TJD, values_TJD), strict=True):
            _, heads, columns, size = cache.shape
            if heads not in self._indices:
                # One index into the rows of a matrix is several times faster than an index for each dimension.
                of_head = self._row_T[:, None] * heads + torch.arange(heads, device=self._row_T.device)
                self._indices[heads] = (of_head * columns + self._column_T[:, None]).flatten()
            cache.view(-1, size).index_copy_(0, self._indices[heads], new.flatten(0, 1))


class PrefillAttention:
    """Attention of the suffixes of new rows, whose keys and values go into the slots from `first` on."""

    def __init__(self, slots: Slots, packed: Packed, prefixes: Prefixes, prefix_of_row_B: Tensor, first: int) -> None:
        self._attention = suffix_attention(packed, prefixes, prefix_of_row_B)
        self.positions_T = self._attention.positions_T
        self._writer = _CacheWriter(slots, packed.row_T + first, packed.column_T)

    def attend(
        self, layer: int, query_KHD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self._writer.write(layer, keys_TJD, values_TJD)
        return self._attention.attend(layer, query_KHD, keys_TJD, values_TJD, scale=scale, window=window, keep_K=keep_K)


class LiveRows:
    """Orders live rows by node, so that a node's tokens are adjacent; it holds until a row starts or finishes."""

    def __init__(self, slots: Slots, live: int) -> None:
        self.slot_B = slots.nodes[:live].argsort(stable=True)
        self.node_B = slots.nodes[self.slot_B]
        self.prefix_B = slots.prefix[self.slot_B]
        self.row_B = torch.arange(live, device=self.slot_B.device)


class PrefixSharing:
    """Groups live rows by prefix: the queries of a prefix's rows are concatenated, so that its keys are loaded once."""

    def __init__(self, prefixes: Prefixes, live_rows: LiveRows, before: "PrefixSharing | None") -> None:
        self.live_rows = live_rows
        in_order = torch.equal(live_rows.slot_B, live_rows.row_B)
        self._index_of_slot_B = None if in_order else live_rows.slot_B.argsort()
        """Index of each slot's row among the live rows; None if the rows are in slot order."""
        used = live_rows.prefix_B.unique()
        # Prefixes are copied when a new one is in use, and when half of the copied ones have no row left.
        if (
            before is not None
            and 2 * len(used) > len(before.prefix_indices)
            and bool(torch.isin(used, before.prefix_indices).all())
        ):
            self.prefix_indices, self.prefixes = before.prefix_indices, before.prefixes
        else:
            self.prefix_indices, self.prefixes = used, prefixes.select(used).contiguous()
        self.used_prefix_B = torch.searchsorted(self.prefix_indices, live_rows.prefix_B)
        self.index_in_prefix_B, self.rows_per_prefix = columns_in_groups(self.used_prefix_B, len(self.prefix_indices))
        self.is_dense = len(self.prefix_indices) * self.rows_per_prefix <= _DENSE_UP_TO * len(live_rows.slot_B)
        """Whether queries padded by prefix have little padding, so that all their scores may be computed at once."""
        self._compiled: dict[tuple[int, int, int], kernels.CacheAttention] = {}

    @property
    def slot_B(self) -> Tensor:
        """Return the slot of each live row."""
        return self.live_rows.slot_B

    def compiled_attention(self, queries: int, heads: int, size: int) -> kernels.CacheAttention:
        """Return the compiled attention for layers with these numbers of heads and this head size, which may differ."""
        key = queries, heads, size
        if key not in self._compiled:
            self._compiled[key] = kernels.CacheAttention(
                self.live_rows.slot_B, self.used_prefix_B, self.index_in_prefix_B, self.rows_per_prefix,
                self.prefixes.lengths_Q, *key,
            )  # fmt: skip
        return self._compiled[key]

    def in_slot_order(self, stream: Tensor) -> Tensor:
        """Return a tensor of live rows in the order of slots."""
        return stream if self._index_of_slot_B is None else stream.index_select(0, self._index_of_slot_B)

    def in_row_order(self, of_slots: Tensor) -> Tensor:
        """Return a tensor of slots in the order of live rows."""
        return of_slots if self._index_of_slot_B is None else of_slots.index_select(0, self.live_rows.slot_B)


class Sharing(Protocol):
    """Says which prefix each row reads, and the place of its query among those of the prefix's rows."""

    @property
    def prefixes(self) -> Prefixes: ...
    @property
    def prefix_indices(self) -> Tensor: ...
    @property
    def used_prefix_B(self) -> Tensor: ...
    @property
    def index_in_prefix_B(self) -> Tensor: ...
    @property
    def rows_per_prefix(self) -> int: ...
    @property
    def slot_B(self) -> Tensor: ...
    def in_slot_order(self, stream: Tensor) -> Tensor: ...
    def in_row_order(self, of_slots: Tensor) -> Tensor: ...


class DecodeAttention:
    """Attention of one new token of each live row over its slot, to which its key and value are added, and its prefix.

    `longest` bounds the columns of the cache and the length of a text; None looks at the rows, which waits for a GPU.
    """

    def __init__(self, slots: Slots, sharing: Sharing, ops: TorchOps, longest: tuple[int, int] | None = None) -> None:
        self._slots, self._sharing = slots, sharing
        self._loops = sharing if isinstance(sharing, PrefixSharing) and ops.has_cache_attention and sharing.is_dense else None
        self.column_B = slots.length[sharing.slot_B]
        self.positions_B = slots.prefix_length[sharing.slot_B] + self.column_B
        self._writer = _CacheWriter(slots, sharing.slot_B, self.column_B)
        self._width, self._longest = longest or (int(self.column_B.max()) + 1, int(self.positions_B.max()) + 1)
        self._masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return masks of the row's own tokens, (B, 1, 1, L), and of prefixes, (Q, 1, 1 or rows per prefix, L)."""
        if window not in self._masks:
            sharing, device = self._sharing, self.column_B.device
            own, column_of_slot_B = torch.arange(self._width, device=device), sharing.in_slot_order(self.column_B)
            seen_own = own <= column_of_slot_B[:, None]
            of_prefix = torch.arange(sharing.prefixes.width, device=device)
            seen_prefix = (of_prefix < sharing.prefixes.lengths_Q[:, None])[:, None]
            if window is not None:
                seen_own = seen_own & (column_of_slot_B[:, None] - own < window)
                positions = self.positions_B.new_zeros(len(sharing.prefix_indices), sharing.rows_per_prefix)
                positions[sharing.used_prefix_B, sharing.index_in_prefix_B] = self.positions_B
                seen_prefix = seen_prefix & (positions[:, :, None] - of_prefix < window)
            self._masks[window] = additive_mask(seen_own, dtype)[:, None, None], additive_mask(seen_prefix, dtype)[:, None]
        return self._masks[window]

    def attend(
        self, layer: int, query_KHD: Tensor, keys_TJD: Tensor, values_TJD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert keep_K is None, "every row has one token, and it is kept"
        slots, sharing = self._slots, self._sharing
        window = effective_window(window, self._longest)
        if self._loops and keys_TJD.shape == values_TJD.shape and query_KHD.dtype == torch.float32:
            attention = self._loops.compiled_attention(query_KHD.shape[1], *keys_TJD.shape[1:])
            cache = slots.keys[layer], slots.values[layer]
            return attention.attend(
                query_KHD, keys_TJD, values_TJD, self.column_B, self._width, cache, sharing.prefixes.past[layer],
                window=window, scale=scale,
            )  # fmt: skip
        self._writer.write(layer, keys_TJD, values_TJD)
        seen_own, seen_prefix = self._mask(window, query_KHD.dtype)
        # The query heads that share a key head are laid out as several queries of one head.
        grouped_query = query_KHD.unflatten(1, (keys_TJD.shape[1], -1))
        keys, values = (cache[: len(query_KHD), :, : self._width] for cache in (slots.keys[layer], slots.values[layer]))
        own = partial_attention(sharing.in_slot_order(grouped_query), keys, values, seen_own, scale=scale)
        prefix_keys, prefix_values = sharing.prefixes.past[layer]
        _, heads, shared, size = grouped_query.shape
        prefix_query = grouped_query.new_zeros(len(prefix_keys), heads, sharing.rows_per_prefix, shared, size)
        prefix_query[sharing.used_prefix_B, :, sharing.index_in_prefix_B] = grouped_query
        if seen_prefix.shape[2] > 1:
            seen_prefix = seen_prefix.repeat_interleave(shared, 2)
        of_prefix = partial_attention(prefix_query.flatten(2, 3), prefix_keys, prefix_values, seen_prefix, scale=scale)
        out, logsumexp = (
            part.unflatten(2, (sharing.rows_per_prefix, shared))[sharing.used_prefix_B, :, sharing.index_in_prefix_B]
            for part in of_prefix
        )
        own = sharing.in_row_order(own[0]), sharing.in_row_order(own[1])
        return merge_parts((out, logsumexp), own).flatten(1, 2)
