"""The default engine: in process, on the learner's own weights, so that what it samples is never stale.

Rows live in slots of a static key-value cache, token by token from the first column on: a row's prefix, copied from where
each distinct prefix is computed once, then the node's part of the prompt, then what the row writes. Rows of all nodes and
layers decode together; a row that stops leaves its slot to one that has become ready, or to a later row, so live rows stay in
front.
"""

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuromas.backbone import Backbone
from neuromas.engines.base import OnSample, uniforms
from neuromas.packing import Packed, PrefixAttention, additive, attend_on_grid
from neuromas.types import Prompt, Request, Sample

Keyed = tuple[int, Request]
PrefixKey = tuple[tuple[int, ...], int]


class TorchEngine:
    """Samples from a backbone with its adapters. `max_rows` bounds how many rows decode at once, and so the memory."""

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
    length: Tensor
    """Tokens in the cache; the next one goes to this column, which is its position too."""
    last_token: Tensor
    count: Tensor
    """Tokens sampled so far."""
    uniforms: Tensor
    tokens: Tensor
    logprobs: Tensor

    def tensors(self) -> list[Tensor]:
        return [
            *self.keys, *self.values, self.nodes, self.length, self.last_token, self.count, self.uniforms, self.tokens,
            self.logprobs,
        ]  # fmt: skip

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        places = torch.tensor([sources, targets], device=self.nodes.device)
        columns = int(self.length[places[0]].max())
        for tensor in (*self.keys, *self.values):
            tensor[places[1], :, :columns] = tensor[places[0], :, :columns]
        for tensor in self.tensors()[len(self.keys) + len(self.values) :]:
            tensor[places[1]] = tensor[places[0]]


class _SlotAttention:
    """New tokens of the slots from `first` on: they are written behind what their slots hold, and read all of it."""

    def __init__(self, slots: _Slots, packed: Packed, first: int) -> None:
        self.slots, self.packed = slots, packed
        self.rows = slice(first, first + packed.rows)
        before_B = slots.length[self.rows]
        self.positions_T = before_B[packed.row_T] + packed.column_T
        self._row_T = packed.row_T + first
        self._width = int(self.positions_T.max()) + 1
        self._query_BS = before_B[:, None] + torch.arange(packed.width, device=before_B.device)
        self._masks: dict[int | None, Tensor] = {}

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        if window not in self._masks:
            columns = torch.arange(self._width, device=self._query_BS.device)
            seen = columns <= self._query_BS[:, :, None]
            if window is not None:
                seen = seen & (self._query_BS[:, :, None] - columns < window)
            self._masks[window] = additive(seen, dtype)[:, None]
        return self._masks[window]

    def attend(
        self, layer: int, query_THD: Tensor, keys_THD: Tensor, values_THD: Tensor, *, scale: float, window: int | None
    ) -> Tensor:
        caches = self.slots.keys[layer], self.slots.values[layer]
        for cache, new in zip(caches, (keys_THD, values_THD), strict=True):
            cache[self._row_T, :, self.positions_T] = new
        keys, values = (cache[self.rows, :, : self._width] for cache in caches)
        return attend_on_grid(self.packed, query_THD, keys, values, self._mask(window, query_THD.dtype), scale)


class _Decode:
    """The rows of one call of `generate`."""

    def __init__(self, backbone: Backbone, max_rows: int, temperature: float, max_new_tokens: int) -> None:
        self.backbone, self.max_rows = backbone, max_rows
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.stop_ids = torch.tensor(sorted(backbone.stop_ids), device=backbone.device)
        self.version = backbone.adapters.version if backbone.adapters else 0
        self.rows: list[int] = []
        """Key of the request in each live slot."""
        self.prefixes: dict[PrefixKey, tuple[PrefixAttention, int]] = {}
        self.slots: _Slots | None = None

    @property
    def live(self) -> int:
        return len(self.rows)

    def admit(self, requests: Sequence[Keyed]) -> None:
        """Prefill new rows into the slots behind the live ones."""
        prompts = [request.prompt for _, request in requests]
        nodes = [self._node_index(request.node) for _, request in requests]
        wanted = [self._prefix_key(prompt, node) for prompt, node in zip(prompts, nodes, strict=True)]
        self._compute_prefixes(wanted, nodes)
        longest = max(len(prompt.prefix_ids) + len(prompt.suffix_ids) for prompt in prompts)
        # Prefixes are copied with the padding that they were computed with.
        columns = max(longest + self.max_new_tokens, *(self.prefixes[key][0].packed.width for key in wanted))
        self._reserve(self.live + len(prompts), columns)
        slots, first, device = self.slots, self.live, self.backbone.device
        assert slots is not None
        new = slice(first, first + len(prompts))
        self.rows += [key for key, _ in requests]
        self._copy_prefixes(wanted, first)
        slots.length[new] = torch.tensor([len(prompt.prefix_ids) for prompt in prompts], device=device)
        slots.nodes[new] = torch.tensor(nodes, device=device)
        slots.count[new] = 0
        draws = np.stack([uniforms(request.seed, self.max_new_tokens) for _, request in requests])
        slots.uniforms[new] = torch.from_numpy(draws).to(device)
        suffixes = Packed.of([prompt.suffix_ids for prompt in prompts], device)
        self._forward(suffixes, first)

    def step(self) -> list[tuple[int, Sample]]:
        """Hand out the rows that have stopped; give every other row its next token."""
        finished = self._take_finished()
        if self.live:
            assert self.slots is not None
            self._forward(Packed.column(self.slots.last_token[: self.live]), 0)
        return finished

    def _forward(self, packed: Packed, first: int) -> None:
        """Write tokens into the slots from `first` on and sample each slot's next."""
        slots = self.slots
        assert slots is not None
        attention = _SlotAttention(slots, packed, first)
        nodes_T = slots.nodes[attention.rows][packed.row_T]
        last_B = packed.lengths_B.cumsum(0) - 1
        logits_BV = self.backbone.forward(packed.ids_T, attention.positions_T, nodes_T, attention, last_B)
        slots.length[attention.rows] += packed.lengths_B
        self._sample(logits_BV, attention.rows)

    def _sample(self, logits_BV: Tensor, rows: slice) -> None:
        """Draw one token per row by inverting the distribution function at the row's own uniform draw."""
        slots = self.slots
        assert slots is not None
        count = slots.count[rows]
        every = torch.arange(len(count), device=count.device)
        if self.temperature not in (0, 1):
            logits_BV = logits_BV / self.temperature
        logprobs_BV = logits_BV.log_softmax(-1)
        if self.temperature == 0:
            tokens = logits_BV.argmax(-1)
        else:
            # In float64: a sum over a large vocabulary in float32 would shift the tail.
            cumulative = logprobs_BV.exp().double().cumsum(-1)
            target = slots.uniforms[rows][every, count] * cumulative[:, -1]
            tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logits_BV.shape[-1] - 1)
        slots.tokens[rows][every, count] = tokens
        slots.logprobs[rows][every, count] = logprobs_BV[every, tokens]
        slots.last_token[rows] = tokens
        slots.count[rows] += 1

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
        return finished

    def _node_index(self, node: int) -> int:
        return self.backbone.adapters.index(node) if self.backbone.adapters else 0

    def _prefix_key(self, prompt: Prompt, node: int) -> PrefixKey:
        return prompt.prefix_ids, (node if self.backbone.scope == "all" else 0)

    def _compute_prefixes(self, wanted: Sequence[PrefixKey], nodes: Sequence[int]) -> None:
        missing = {key: node for key, node in zip(wanted, nodes, strict=True) if key not in self.prefixes}
        if not missing:
            return
        device = self.backbone.device
        packed = Packed.of([prefix for prefix, _ in missing], device)
        computed = self.backbone.read_prefixes(packed, torch.tensor(list(missing.values()), device=device))
        self.prefixes |= {key: (computed, at) for at, key in enumerate(missing)}

    def _copy_prefixes(self, wanted: Sequence[PrefixKey], first: int) -> None:
        """Copy each wanted prefix into its slot, slots counted from `first`; one copy a layer for each computed bunch."""
        slots, device = self.slots, self.backbone.device
        assert slots is not None
        bunches: dict[int, list[int]] = {}
        for row, key in enumerate(wanted):
            bunches.setdefault(id(self.prefixes[key][0]), []).append(row)
        for rows in bunches.values():
            computed = self.prefixes[wanted[rows[0]]][0]
            source = torch.tensor([self.prefixes[wanted[row]][1] for row in rows], device=device)
            target = torch.tensor(rows, device=device) + first
            for layer, (keys, values) in enumerate(computed.past):
                slots.keys[layer][target, :, : computed.packed.width] = keys[source]
                slots.values[layer][target, :, : computed.packed.width] = values[source]

    def _reserve(self, rows: int, columns: int) -> None:
        """Make the cache at least this large, keeping what is in it."""
        old = self.slots
        if old is not None:
            had_rows, _, had_columns, _ = old.keys[0].shape
            if had_rows >= rows and had_columns >= columns:
                return
            # Room to spare: a cache that grows by a little at a time is copied at every growth.
            rows, columns = max(rows, had_rows), max(columns + 32, had_columns)
        layers = next(iter(self.prefixes.values()))[0].past
        device = self.backbone.device

        def whole(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        def cache_like(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])

        slots = _Slots(
            keys=[cache_like(keys) for keys, _ in layers],
            values=[cache_like(values) for _, values in layers],
            nodes=whole(rows),
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
