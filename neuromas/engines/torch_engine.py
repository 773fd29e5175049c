"""The default engine: in process, on the learner's own weights, so that what it samples is never stale.

Each distinct prefix is computed once, however many rows go on from it, and kept to the end of a call. Rows live in slots of a
static key-value cache, token by token from the first column on: the node's part of the prompt, then what the row writes. Rows
of all nodes and layers decode together; a row that stops leaves its slot to one that has become ready, or to a later row, so
live rows stay in front.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuromas.attention import Prefixes, SuffixAttention, additive, columns_of, cutting, merge, read
from neuromas.backbone import Backbone
from neuromas.engines.base import OnSample, uniforms
from neuromas.packing import Packed
from neuromas.types import Prompt, Request, Sample

Keyed = tuple[int, Request]
PrefixKey = tuple[tuple[int, ...], int]


class TorchEngine:
    """Samples from a backbone with its adapters.

    `max_rows` bounds how many rows decode at once, and so their memory; distinct prefixes take theirs beside it.
    """

    def __init__(self, backbone: Backbone, max_rows: int = 256) -> None:
        self.backbone = backbone
        self.max_rows = max_rows

    @torch.inference_mode()
    def generate(self, requests: Sequence[Keyed], on_sample: OnSample, *, temperature: float, max_new_tokens: int) -> None:
        decode = _Decode(self.backbone, self.max_rows, temperature, max_new_tokens)
        waiting = deque(requests)
        with self.backbone.adapters.keep_merged() if self.backbone.adapters else nullcontext():
            while waiting or decode.live:
                # Late rows come in bunches: a prefill of a few rows costs nearly as much as one of many.
                if waiting and decode.live <= min(self.max_rows - 1, 3 * len(waiting)):
                    decode.admit([waiting.popleft() for _ in range(min(len(waiting), self.max_rows - decode.live))])
                for key, sample in decode.step():
                    waiting.extend(on_sample(key, sample))


@dataclass(slots=True)
class _Slots:
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

    def __init__(self, slots: _Slots, row_T: Tensor, column_T: Tensor) -> None:
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


class _PrefillAttention(SuffixAttention):
    """The first tokens of rows in the slots from `first` on."""

    def __init__(self, slots: _Slots, packed: Packed, prefixes: Prefixes, of_row_B: Tensor, first: int) -> None:
        super().__init__(packed, prefixes, of_row_B)
        self._writing = _Writing(slots, packed.row_T + first, packed.column_T)

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self._writing.write(layer, keys_THD, values_THD)
        return super().attend(layer, query_THD, keys_THD, values_THD, scale=scale, window=window, keep_K=keep_K)


class _Order:
    """Live rows by node, so that a node's tokens lie together, as long as none comes or goes.

    And which go on from which prefix: with the queries of a prefix behind each other, (Q, S), it is read once.
    """

    def __init__(self, prefixes: Prefixes, slots: _Slots, live: int, before: "_Order | None") -> None:
        self.slot_B = slots.nodes[:live].argsort(stable=True)
        in_order = torch.equal(self.slot_B, torch.arange(live, device=self.slot_B.device))
        self.place_of_slot_B = None if in_order else self.slot_B.argsort()
        """Where among the live rows each slot's row stands; None where slots are in order."""
        self.node_B = slots.nodes[self.slot_B]
        self._share(prefixes, slots.prefix[self.slot_B], before)

    def by_slot(self, stream: Tensor) -> Tensor:
        return stream if self.place_of_slot_B is None else stream.index_select(0, self.place_of_slot_B)

    def _share(self, prefixes: Prefixes, prefix_B: Tensor, before: "_Order | None") -> None:
        used = prefix_B.unique()
        # Prefixes are copied together when new ones come, and when half of those that are there have no reader left.
        if before is not None and 2 * len(used) > len(before.places) and bool(torch.isin(used, before.places).all()):
            self.places, self.prefixes = before.places, before.prefixes
        else:
            self.places, self.prefixes = used, prefixes.select(used)
        self.row_B = torch.searchsorted(self.places, prefix_B)
        self.column_B, self.width = columns_of(self.row_B, len(self.places))


class _DecodeAttention:
    """One new token of each live row: it is written behind what its slot holds, and reads all of it and the row's prefix."""

    def __init__(self, slots: _Slots, order: _Order) -> None:
        self._slots, self._order = slots, order
        self.column_B = slots.length[order.slot_B]
        self.positions_B = slots.prefix_length[order.slot_B] + self.column_B
        self._writing = _Writing(slots, order.slot_B, self.column_B)
        self._width = int(self.column_B.max()) + 1
        self._longest = int(self.positions_B.max()) + 1
        self._masks: dict[int | None, tuple[Tensor, Tensor]] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what is seen of the row's own tokens, (B, 1, 1, columns), and of prefixes, (Q, 1, 1 or S, W)."""
        if window not in self._masks:
            order, device = self._order, self.column_B.device
            own, column_of_slot_B = torch.arange(self._width, device=device), order.by_slot(self.column_B)
            seen_own = own <= column_of_slot_B[:, None]
            of_prefix = torch.arange(order.prefixes.width, device=device)
            seen_prefix = (of_prefix < order.prefixes.lengths_Q[:, None])[:, None]
            if window is not None:
                seen_own = seen_own & (column_of_slot_B[:, None] - own < window)
                positions_QS = self.positions_B.new_zeros(len(order.places), order.width)
                positions_QS[order.row_B, order.column_B] = self.positions_B
                seen_prefix = seen_prefix & (positions_QS[:, :, None] - of_prefix < window)
            self._masks[window] = additive(seen_own, dtype)[:, None, None], additive(seen_prefix, dtype)[:, None]
        return self._masks[window]

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None,
        keep_K: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert keep_K is None, "every row's one token is asked for"
        slots, order = self._slots, self._order
        window = cutting(window, self._longest)
        self._writing.write(layer, keys_THD, values_THD)
        seen_own, seen_prefix = self._mask(window, query_THD.dtype)
        # Heads of queries that share a head of keys stand behind each other as queries of one head.
        query_TKGD = query_THD.unflatten(1, (keys_THD.shape[1], -1))
        keys, values = (cache[: len(query_THD), :, : self._width] for cache in (slots.keys[layer], slots.values[layer]))
        own = read(order.by_slot(query_TKGD), keys, values, seen_own, scale=scale)
        prefix_keys, prefix_values = order.prefixes.past[layer]
        _, heads, shared, size = query_TKGD.shape
        grid = query_TKGD.new_zeros(len(prefix_keys), heads, order.width, shared, size)
        grid[order.row_B, :, order.column_B] = query_TKGD
        if seen_prefix.shape[2] > 1:
            seen_prefix = seen_prefix.repeat_interleave(shared, 2)
        of_grid = read(grid.flatten(2, 3), prefix_keys, prefix_values, seen_prefix, scale=scale)
        out, total = (part.unflatten(2, (order.width, shared))[order.row_B, :, order.column_B] for part in of_grid)
        if order.place_of_slot_B is not None:
            own = own[0].index_select(0, order.slot_B), own[1].index_select(0, order.slot_B)
        return merge((out, total), own).flatten(1, 2)


class _Decode:
    """The rows of one call of `generate`."""

    def __init__(self, backbone: Backbone, max_rows: int, temperature: float, max_new_tokens: int) -> None:
        self.backbone, self.max_rows = backbone, max_rows
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.stop_ids = torch.tensor(sorted(backbone.stop_ids), device=backbone.device)
        self.version = backbone.adapters.version if backbone.adapters else 0
        self.rows: list[int] = []
        """Key of the request in each live slot."""
        self.prefixes: Prefixes | None = None
        self.place_of_prefix: dict[PrefixKey, int] = {}
        self.order: _Order | None = None
        self._order_is_old = True
        self.slots: _Slots | None = None

    @property
    def live(self) -> int:
        return len(self.rows)

    def admit(self, requests: Sequence[Keyed]) -> None:
        """Prefill new rows into the slots behind the live ones."""
        # Tokens of one node lie together: they are then one product of its adapter.
        requests = sorted(requests, key=lambda keyed: keyed[1].node)
        prompts = [request.prompt for _, request in requests]
        nodes = [self._node_index(request.node) for _, request in requests]
        wanted = [self._prefix_key(prompt, node) for prompt, node in zip(prompts, nodes, strict=True)]
        self._compute_prefixes(wanted, nodes)
        self._reserve(self.live + len(prompts), max(len(prompt.suffix_ids) for prompt in prompts) + self.max_new_tokens)
        slots, prefixes, first, device = self.slots, self.prefixes, self.live, self.backbone.device
        assert slots is not None
        assert prefixes is not None
        new = slice(first, first + len(prompts))
        self.rows += [key for key, _ in requests]
        self._order_is_old = True
        slots.prefix[new] = torch.tensor([self.place_of_prefix[key] for key in wanted], device=device)
        slots.prefix_length[new] = prefixes.lengths_Q[slots.prefix[new]]
        slots.length[new] = 0
        slots.nodes[new] = torch.tensor(nodes, device=device)
        slots.count[new] = 0
        draws = np.stack([uniforms(request.seed, self.max_new_tokens) for _, request in requests])
        slots.uniforms[new] = torch.from_numpy(draws).to(device)
        suffixes = Packed.of([prompt.suffix_ids for prompt in prompts], device)
        used, of_row_B = slots.prefix[new].unique(return_inverse=True)
        attention = _PrefillAttention(slots, suffixes, prefixes.select(used), of_row_B, first)
        last_B = suffixes.lengths_B.cumsum(0) - 1
        nodes_T = slots.nodes[new][suffixes.row_T]
        logits_BV = self.backbone.forward(suffixes.ids_T, attention.positions_T, nodes_T, attention, last_B)
        self._advance(logits_BV, suffixes.lengths_B, torch.arange(new.start, new.stop, device=device))

    def step(self) -> list[tuple[int, Sample]]:
        """Hand out the rows that have stopped; give every other row its next token."""
        finished = self._take_finished()
        if self.live:
            slots, prefixes = self.slots, self.prefixes
            assert slots is not None
            assert prefixes is not None
            if self._order_is_old:
                self.order = _Order(prefixes, slots, self.live, self.order)
                self._order_is_old = False
            assert self.order is not None
            attention = _DecodeAttention(slots, self.order)
            last = Packed.column(slots.last_token[self.order.slot_B])
            logits_BV = self.backbone.forward(last.ids_T, attention.positions_B, self.order.node_B, attention, last.row_T)
            self._advance(logits_BV, last.lengths_B, self.order.slot_B)
        return finished

    def _advance(self, logits_BV: Tensor, written_B: Tensor, slot_B: Tensor) -> None:
        """Count the tokens now in slots; draw each slot's next by inverting the distribution function at its uniform draw."""
        slots = self.slots
        assert slots is not None
        slots.length[slot_B] += written_B
        count_B = slots.count[slot_B]
        if self.temperature not in (0, 1):
            logits_BV = logits_BV / self.temperature
        logprobs_BV = logits_BV.log_softmax(-1)
        if self.temperature == 0:
            tokens_B = logits_BV.argmax(-1)
        else:
            # In float64: a sum over a large vocabulary in float32 would shift the tail.
            cumulative = logprobs_BV.exp().double().cumsum(-1)
            target_B = slots.uniforms[slot_B, count_B] * cumulative[:, -1]
            tokens_B = torch.searchsorted(cumulative, target_B[:, None], right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
        slots.tokens[slot_B, count_B] = tokens_B
        slots.logprobs[slot_B, count_B] = logprobs_BV.gather(1, tokens_B[:, None])[:, 0]
        slots.last_token[slot_B] = tokens_B
        slots.count[slot_B] = count_B + 1

    def _take_finished(self) -> list[tuple[int, Sample]]:
        slots = self.slots
        assert slots is not None
        stopped = torch.isin(slots.last_token[: self.live], self.stop_ids)
        done = (stopped | (slots.count[: self.live] >= self.max_new_tokens)).nonzero()[:, 0]
        if not len(done):
            return []
        finished = []
        counts, tokens, logprobs = slots.count[done].tolist(), slots.tokens[done].tolist(), slots.logprobs[done].tolist()
        did_stop = stopped[done].tolist()
        for row, count, ids, sampled, stop in zip(done.tolist(), counts, tokens, logprobs, did_stop, strict=True):
            text = self.backbone.decode(ids[: count - 1] if stop else ids[:count])
            finished.append((self.rows[row], Sample(tuple(ids[:count]), tuple(sampled[:count]), text, stop, self.version)))
        gone = set(done.tolist())
        left = self.live - len(gone)
        holes = [row for row in gone if row < left]
        movers = [row for row in range(left, self.live) if row not in gone]
        if holes:
            slots.move(movers, holes)
        for mover, hole in zip(movers, holes, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[left:]
        self._order_is_old = True
        return finished

    def _node_index(self, node: int) -> int:
        return self.backbone.adapters.index(node) if self.backbone.adapters else 0

    def _prefix_key(self, prompt: Prompt, node: int) -> PrefixKey:
        return prompt.prefix_ids, (node if self.backbone.scope == "all" else 0)

    def _compute_prefixes(self, wanted: Sequence[PrefixKey], nodes: Sequence[int]) -> None:
        missing = {key: node for key, node in zip(wanted, nodes, strict=True) if key not in self.place_of_prefix}
        if not missing:
            return
        device = self.backbone.device
        packed = Packed.of([prefix for prefix, _ in missing], device)
        computed = self.backbone.read_prefixes(packed, torch.tensor(list(missing.values()), device=device))
        self.place_of_prefix |= {key: len(self.place_of_prefix) + at for at, key in enumerate(missing)}
        self.prefixes = computed if self.prefixes is None else self.prefixes.join(computed)

    def _reserve(self, rows: int, columns: int) -> None:
        """Make the cache at least this large, keeping what is in it."""
        old = self.slots
        if old is not None:
            had_rows, _, had_columns, _ = old.keys[0].shape
            if had_rows >= rows and had_columns >= columns:
                return
            # Room to spare: a cache that grows by a little at a time is copied at every growth.
            rows, columns = max(rows, had_rows), max(columns + 32, had_columns)
        assert self.prefixes is not None
        layers = self.prefixes.past
        device = self.backbone.device

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        def cache_like(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])

        slots = _Slots(
            keys=[cache_like(keys) for keys, _ in layers],
            values=[cache_like(values) for _, values in layers],
            nodes=whole(rows),
            prefix=whole(rows),
            prefix_length=whole(rows),
            length=whole(rows),
            last_token=whole(rows),
            count=whole(rows),
            uniforms=torch.zeros((rows, self.max_new_tokens), dtype=torch.float64, device=device),
            tokens=whole(rows, self.max_new_tokens),
            logprobs=torch.zeros((rows, self.max_new_tokens), device=device),
        )
        if old is not None:
            for target, source in zip(slots.tensors(), old.tensors(), strict=True):
                corner = tuple(slice(0, size) for size in source.shape)
                target[corner] = source
        self.slots = slots
