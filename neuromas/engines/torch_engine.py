"""The default engine: in process, on the learner's own weights, so that what it samples is never stale.

Rows live in slots of a static key-value cache. A slot holds a row's prefix, copied from a bank in which each distinct
prefix is computed once, then the node's part of the prompt, then what the row writes. Rows of all nodes and layers decode
together; a row that stops leaves its slot to one that has become ready, or to the last row, so live rows stay in front.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuromas.backbone import Backbone, KVCache
from neuromas.engines.base import OnSample, uniforms
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
    key_positions: Tensor
    key_mask: Tensor
    nodes: Tensor
    column: Tensor
    """Where the next key goes."""
    position: Tensor
    last_token: Tensor
    count: Tensor
    """Tokens sampled so far."""
    uniforms: Tensor
    tokens: Tensor
    logprobs: Tensor

    def tensors(self) -> list[Tensor]:
        scalars = [
            self.key_positions,
            self.key_mask,
            self.nodes,
            self.column,
            self.position,
            self.last_token,
            self.count,
        ]
        return [*self.keys, *self.values, *scalars, self.uniforms, self.tokens, self.logprobs]

    def move(self, source: int, target: int) -> None:
        for tensor in self.tensors():
            tensor[target] = tensor[source]


class _SlotCache:
    """Writes new keys and values in place, at columns of given slots, and returns the part of the cache to attend to."""

    def __init__(self, slots: _Slots, rows: slice, columns: Tensor | slice, width: int) -> None:
        self.slots, self.rows, self.columns, self.width = slots, rows, columns, width

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        out = []
        for cache, new in ((self.slots.keys[layer], keys), (self.slots.values[layer], values)):
            live = cache[self.rows]
            if isinstance(self.columns, slice):
                live[:, :, self.columns] = new
            else:
                live[torch.arange(len(live), device=live.device), :, self.columns] = new[:, :, 0]
            out.append(live[:, :, : self.width])
        return out[0], out[1]


class _Decode:
    """The rows of one call of `generate`."""

    def __init__(self, backbone: Backbone, max_rows: int, temperature: float, max_new_tokens: int) -> None:
        self.backbone, self.max_rows = backbone, max_rows
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.stop_ids = torch.tensor(sorted(backbone.stop_ids), device=backbone.device)
        self.version = backbone.adapters.version if backbone.adapters else 0
        self.rows: list[int] = []
        """Key of the request in each live slot."""
        self.prefixes: dict[PrefixKey, tuple[list[tuple[Tensor, Tensor]], int]] = {}
        self.slots: _Slots | None = None
        self.route: Tensor | None = None
        """Node index of each live row; the same tensor for as long as the rows are the same."""

    @property
    def live(self) -> int:
        return len(self.rows)

    def admit(self, requests: Sequence[Keyed]) -> None:
        """Prefill new rows into the slots behind the live ones."""
        prompts = [request.prompt for _, request in requests]
        nodes = [self._node_index(request.node) for _, request in requests]
        self._compute_prefixes(prompts, nodes)
        prefix_width = max(len(prompt.prefix_ids) for prompt in prompts)
        suffix_width = max(len(prompt.suffix_ids) for prompt in prompts)
        filled = prefix_width + suffix_width
        self._reserve(self.live + len(prompts), filled + self.max_new_tokens)
        slots, first = self.slots, self.live
        assert slots is not None
        new = slice(first, first + len(prompts))
        self.rows += [key for key, _ in requests]
        self.route = None
        device = self.backbone.device

        slots.key_mask[new] = False
        self._copy_prefixes([self._prefix_key(prompt, node) for prompt, node in zip(prompts, nodes, strict=True)], first)
        ids, mask = pad_left([prompt.suffix_ids for prompt in prompts], suffix_width, self.backbone.pad_id, device)
        lengths = torch.tensor([len(prompt.prefix_ids) for prompt in prompts], device=device)
        positions = lengths[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        slots.key_mask[new, prefix_width:filled] = mask
        slots.key_positions[new, prefix_width:filled] = positions
        slots.nodes[new] = torch.tensor(nodes, device=device)
        slots.column[new], slots.count[new] = filled, 0
        slots.position[new] = positions[:, -1] + 1
        draws = np.stack([uniforms(request.seed, self.max_new_tokens) for _, request in requests])
        slots.uniforms[new] = torch.from_numpy(draws).to(device)
        cache = _SlotCache(slots, new, slice(prefix_width, filled), filled)
        logits = self.backbone.forward(
            ids, positions, slots.key_positions[new, :filled], slots.key_mask[new, :filled], cache, slots.nodes[new], keep=1
        )  # fmt: skip
        self._sample(logits[:, 0], new)

    def step(self) -> list[tuple[int, Sample]]:
        """Hand out the rows that have stopped; give every other row its next token."""
        finished = self._take_finished()
        if not self.live:
            return finished
        slots, live = self.slots, slice(0, self.live)
        assert slots is not None
        if finished or self.route is None:
            self.route = slots.nodes[live].clone()
        columns = slots.column[live]
        every = torch.arange(self.live, device=columns.device)
        slots.key_mask[every, columns] = True
        slots.key_positions[every, columns] = slots.position[live]
        width = int(columns.max()) + 1
        logits = self.backbone.forward(
            slots.last_token[live, None], slots.position[live, None], slots.key_positions[live, : width],
            slots.key_mask[live, : width], _SlotCache(slots, live, columns, width), self.route, keep=1,
        )  # fmt: skip
        slots.column[live] += 1
        slots.position[live] += 1
        self._sample(logits[:, 0], live)
        return finished

    def _sample(self, logits: Tensor, rows: slice) -> None:
        """Draw one token per row by inverting the distribution function at the row's own uniform draw."""
        slots = self.slots
        assert slots is not None
        count = slots.count[rows]
        every = torch.arange(len(count), device=count.device)
        if self.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            logits = logits / self.temperature
            cumulative = logits.double().softmax(-1).cumsum(-1)
            target = slots.uniforms[rows][every, count] * cumulative[:, -1]
            tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        slots.tokens[rows][every, count] = tokens
        slots.logprobs[rows][every, count] = logits.log_softmax(-1)[every, tokens]
        slots.last_token[rows] = tokens
        slots.count[rows] += 1

    def _take_finished(self) -> list[tuple[int, Sample]]:
        slots = self.slots
        assert slots is not None
        stopped = torch.isin(slots.last_token[: self.live], self.stop_ids)
        done = (stopped | (slots.count[: self.live] >= self.max_new_tokens)).nonzero()[:, 0].tolist()
        if not done:
            return []
        finished = []
        # From the back, so that the row moved into a hole is never one that has stopped as well.
        for row in reversed(done):
            count = int(slots.count[row])
            ids = slots.tokens[row, :count].tolist()
            did_stop = bool(stopped[row])
            text = self.backbone.decode(ids[:-1] if did_stop else ids)
            logprobs = tuple(slots.logprobs[row, :count].tolist())
            finished.append((self.rows[row], Sample(tuple(ids), logprobs, text, did_stop, self.version)))
            last = self.live - 1
            if row != last:
                slots.move(last, row)
                self.rows[row] = self.rows[last]
            self.rows.pop()
        return finished[::-1]

    def _node_index(self, node: int) -> int:
        return self.backbone.adapters.index(node) if self.backbone.adapters else 0

    def _prefix_key(self, prompt: Prompt, node: int) -> PrefixKey:
        return prompt.prefix_ids, (node if self.backbone.scope == "all" else -1)

    def _compute_prefixes(self, prompts: Sequence[Prompt], nodes: Sequence[int]) -> None:
        missing = {self._prefix_key(p, n): n for p, n in zip(prompts, nodes, strict=True)}
        missing = {key: node for key, node in missing.items() if key not in self.prefixes}
        if not missing:
            return
        device = self.backbone.device
        width = max(len(prefix) for prefix, _ in missing)
        ids, mask = pad_right([prefix for prefix, _ in missing], width, self.backbone.pad_id, device)
        positions = torch.arange(width, device=device).expand_as(ids)
        cache = KVCache()
        routed = torch.tensor(list(missing.values()), device=device) if self.backbone.scope == "all" else None
        self.backbone.forward(ids, positions, positions, mask, cache, routed, keep=1)
        for at, key in enumerate(missing):
            self.prefixes[key] = (cache.new, at)

    def _copy_prefixes(self, wanted: Sequence[PrefixKey], first: int) -> None:
        """Copy each wanted prefix into its slot, slots counted from `first`; one copy a layer for each computed bunch."""
        slots, device = self.slots, self.backbone.device
        assert slots is not None
        bunches: dict[int, list[int]] = {}
        for row, key in enumerate(wanted):
            bunches.setdefault(id(self.prefixes[key][0]), []).append(row)
        for rows in bunches.values():
            layers = self.prefixes[wanted[rows[0]]][0]
            source = torch.tensor([self.prefixes[wanted[row]][1] for row in rows], device=device)
            target = torch.tensor(rows, device=device) + first
            lengths = torch.tensor([len(wanted[row][0]) for row in rows], device=device)
            width = int(lengths.max())
            for layer, (keys, values) in enumerate(layers):
                slots.keys[layer][target, :, :width] = keys[source, :, :width]
                slots.values[layer][target, :, :width] = values[source, :, :width]
            columns = torch.arange(width, device=device)
            slots.key_mask[target, :width] = columns < lengths[:, None]
            slots.key_positions[target, :width] = columns

    def _reserve(self, rows: int, columns: int) -> None:
        """Make the cache at least this large, keeping what is in it."""
        old = self.slots
        if old is not None and old.key_mask.shape[0] >= rows and old.key_mask.shape[1] >= columns:
            return
        if old is not None:
            # Room to spare: a cache that grows by a little at a time is copied at every growth.
            rows, columns = max(rows, old.key_mask.shape[0]), max(columns + 32, old.key_mask.shape[1])
        layers = next(iter(self.prefixes.values()))[0]
        device = self.backbone.device

        def whole(shape: tuple[int, ...]) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        def cache_like(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(rows, tensor.shape[1], columns, tensor.shape[3])

        slots = _Slots(
            keys=[cache_like(keys) for keys, _ in layers],
            values=[cache_like(values) for _, values in layers],
            key_positions=whole((rows, columns)),
            key_mask=torch.zeros((rows, columns), dtype=torch.bool, device=device),
            nodes=whole((rows,)),
            column=whole((rows,)),
            position=whole((rows,)),
            last_token=whole((rows,)),
            count=whole((rows,)),
            uniforms=torch.zeros((rows, self.max_new_tokens), dtype=torch.float64, device=device),
            tokens=whole((rows, self.max_new_tokens)),
            logprobs=torch.zeros((rows, self.max_new_tokens), device=device),
        )
        if old is not None:
            for target, source in zip(slots.tensors(), old.tensors(), strict=True):
                corner = tuple(slice(0, size) for size in source.shape)
                target[corner] = source
        self.slots = slots


def pad_left(sequences: Sequence[Sequence[int]], width: int, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids (rows, width) and the mask of real tokens, with padding in front."""
    ids, mask = pad_right([s[::-1] for s in sequences], width, pad_id, device)
    return ids.flip(1), mask.flip(1)


def pad_right(sequences: Sequence[Sequence[int]], width: int, pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids (rows, width) and the mask of real tokens, with padding behind."""
    ids = torch.tensor([[*s, *[pad_id] * (width - len(s))] for s in sequences], device=device)
    mask = torch.arange(width, device=device) < torch.tensor([len(s) for s in sequences], device=device)[:, None]
    return ids, mask
