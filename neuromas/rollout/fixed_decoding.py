"""Decoding over buffers whose shapes do not change from token to token, so that a GPU takes a token as one graph.

A GPU computes a token of a few hundred rows in less time than it takes to ask it for each of its thousand operations. They are
asked for once, recorded as a graph, and the graph is run again for every further token. For this no shape and no address may
change and nothing may be read back, so rows that end stay where they are, and do nothing, to the end of a chunk of tokens. Then
they leave, other rows take their place, and shapes are rounded up to powers of two, so that few graphs are recorded.

On a CPU the same steps are run one by one: that is how they are tested.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from neuromas.model.attention import Prefixes, columns_in_groups
from neuromas.model.left_out import way_out
from neuromas.model.ops import TorchOps
from neuromas.rollout.engine import EngineFault
from neuromas.rollout.kv_cache import DecodeAttention, Slots

TOKENS_AT_ONCE = 8
"""Tokens of a chunk."""
_LEAST_ROWS = 8


class Shape(NamedTuple):
    """The sizes that a graph is recorded for: powers of two that hold what is there."""

    rows: int
    prefixes: int
    """One more than are in use at least: what is no row reads the last one, which is empty."""
    rows_per_prefix: int
    columns: int
    """Columns of the cache."""


class FixedSharing:
    """Groups rows by prefix as `PrefixSharing` does, in buffers that keep their shapes and addresses."""

    def __init__(self, slots: Slots, prefixes: Prefixes, live: int, tokens: int) -> None:
        rows, device = len(slots.nodes), slots.nodes.device
        self._slots, self._indices = slots, slots.prefix.new_zeros(0)
        self._capacity = _power_of_two(len(slots.prefix[:live].unique()) + 1)
        self._past = [tuple(tensor.new_zeros(self._capacity, *tensor.shape[1:]) for tensor in layer) for layer in prefixes.past]
        self._lengths = torch.zeros(self._capacity, dtype=torch.long, device=device)
        self._used, self._index, self._rows = (torch.arange(rows, device=device) for _ in range(3))
        self.is_live = torch.zeros(rows, dtype=torch.bool, device=device)
        self.fill(prefixes, live, tokens)

    def fits(self, prefixes: Prefixes, live: int) -> bool:
        """Say whether the prefixes in use have room in the buffers."""
        used = len(self._slots.prefix[:live].unique())
        return used < self._capacity and prefixes.width == self._past[0][0].shape[2]

    def fill(self, prefixes: Prefixes, live: int, tokens: int) -> None:
        """Take up which rows are live and what they read, for so many tokens to come."""
        slots, rows = self._slots, min(len(self._rows), max(_LEAST_ROWS, _power_of_two(live)))
        indices, used = slots.prefix[:live].unique(return_inverse=True)
        if not torch.equal(indices, self._indices):
            for buffers, layer in zip(self._past, prefixes.past, strict=True):
                for buffer, tensor in zip(buffers, layer, strict=True):
                    torch.index_select(tensor, 0, indices, out=buffer[: len(indices)])
            self._lengths.zero_()
            self._lengths[: len(indices)] = prefixes.lengths_Q[indices]
            self._indices = indices
        index, most = columns_in_groups(used, len(indices))
        count = min(self._capacity, _power_of_two(len(indices) + 1))
        columns = int(slots.length[:live].max()) + tokens
        self.shape = Shape(rows, count, _power_of_two(most), min(slots.keys[0].shape[2], _power_of_two(columns)))
        self._used[:live], self._used[live:rows] = used, count - 1
        self._index[:live], self._index[live:rows] = index, 0
        self.is_live[:live], self.is_live[live:] = True, False

    @property
    def prefixes(self) -> Prefixes:
        count = self.shape.prefixes
        return Prefixes([(keys[:count], values[:count]) for keys, values in self._past], self._lengths[:count])

    @property
    def prefix_indices(self) -> Tensor:
        return self._lengths[: self.shape.prefixes]

    @property
    def used_prefix_B(self) -> Tensor:
        return self._used[: self.shape.rows]

    @property
    def index_in_prefix_B(self) -> Tensor:
        return self._index[: self.shape.rows]

    @property
    def rows_per_prefix(self) -> int:
        return self.shape.rows_per_prefix

    @property
    def slot_B(self) -> Tensor:
        return self._rows[: self.shape.rows]

    def in_slot_order(self, stream: Tensor) -> Tensor:
        """Return a tensor of rows as it is: they are in the order of slots."""
        return stream

    def in_row_order(self, of_slots: Tensor) -> Tensor:
        return of_slots

    def attention(self, ops: TorchOps) -> DecodeAttention:
        """Return the attention of one token of each row."""
        columns = self.shape.columns
        return DecodeAttention(self._slots, self, ops, longest=(columns, self._past[0][0].shape[2] + columns))


class Graphs:
    """Runs a step over fixed buffers as often as is asked; recorded, from the second time on, as a graph of a GPU.

    A step that cannot be recorded is an EngineFault: torch does not undo a recording that has failed.
    """

    def __init__(self, *, records: bool) -> None:
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        # They share the memory between: one of them runs at a time.
        self._pool = torch.cuda.graph_pool_handle() if records else None

    def run(self, step: Callable[[], None], shape: Shape, times: int) -> None:
        """Run a step so many times; `shape` says which graph is its."""
        for _ in range(times):
            if shape in self._graphs:
                self._graphs[shape].replay()
                continue
            # What is made when a shape is first run, such as stacked adapters, is there when it is recorded.
            step()
            if self._pool is not None:
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(graph, pool=self._pool):
                        step()
                except RuntimeError as error:
                    # The end of a recording that has failed raises an error of its own.
                    raise EngineFault(way_out("graphs", error.__context__ or error)) from error
                self._graphs[shape] = graph


def _power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << max(0, number - 1).bit_length()
