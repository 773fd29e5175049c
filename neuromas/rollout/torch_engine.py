"""The default engine: in process, on the learner's own weights, so that what it samples is never stale.

Each distinct prefix is computed once, however many rows go on from it, and kept to the end of a call. Rows live in slots of a
static key-value cache, token by token from the first column on: the node's part of the prompt, then what the row writes. Rows
of all nodes and layers decode together; a row that stops leaves its slot to one that has become ready, or to a later row, so
live rows stay in front.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from neuromas.model.attention import Prefixes
from neuromas.model.packing import Packed
from neuromas.model.policy import Policy, PrefixKey
from neuromas.rollout.engine import OnSample, uniforms
from neuromas.rollout.kv_cache import DecodeAttention, Order, PrefillAttention, Sharing, Slots
from neuromas.types import Request, Sample

MAX_ROWS = 256

Keyed = tuple[int, Request]


class TorchEngine:
    """Samples from a policy.

    `max_rows` bounds how many rows decode at once, and so their memory; distinct prefixes take theirs beside it.
    """

    def __init__(self, policy: Policy, max_rows: int = MAX_ROWS) -> None:
        self.policy = policy
        self.max_rows = max_rows

    @torch.inference_mode()
    def generate(self, requests: Sequence[Keyed], on_sample: OnSample, *, temperature: float, max_new_tokens: int) -> None:
        decode = _Decode(self.policy, self.max_rows, temperature, max_new_tokens)
        waiting = deque(requests)
        with self.policy.sampling():
            while waiting or decode.live:
                # Late rows come in bunches: a prefill of a few rows costs nearly as much as one of many.
                if waiting and decode.live <= min(self.max_rows - 1, 3 * len(waiting)):
                    decode.admit([waiting.popleft() for _ in range(min(len(waiting), self.max_rows - decode.live))])
                for key, sample in decode.step():
                    waiting.extend(on_sample(key, sample))


class _Decode:
    """The rows of one call of `generate`."""

    def __init__(self, policy: Policy, max_rows: int, temperature: float, max_new_tokens: int) -> None:
        self.policy, self.backbone, self.max_rows = policy, policy.backbone, max_rows
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.stop_ids = torch.tensor(sorted(self.backbone.stop_ids), device=self.backbone.device)
        self.version, self.routing = policy.version, policy.routing
        self.rows: list[int] = []
        """Key of the request in each live slot."""
        self.prefixes: Prefixes | None = None
        self.place_of_prefix: dict[PrefixKey, int] = {}
        self.order: Order | None = None
        """None as soon as rows come or go."""
        self.sharing: Sharing | None = None
        self.slots: Slots | None = None

    @property
    def live(self) -> int:
        return len(self.rows)

    def admit(self, requests: Sequence[Keyed]) -> None:
        """Prefill new rows into the slots behind the live ones."""
        # Tokens of one node lie together: they are then one product of its adapter.
        requests = sorted(requests, key=lambda keyed: keyed[1].node)
        prompts = [request.prompt for _, request in requests]
        nodes = [self.routing.adapter_of(request.node) for _, request in requests]
        wanted = [self.routing.prefix_key(request.prompt, request.node) for _, request in requests]
        self._compute_prefixes(wanted, nodes)
        self._reserve(self.live + len(prompts), max(len(prompt.suffix_ids) for prompt in prompts) + self.max_new_tokens)
        slots, prefixes, first, device = self.slots, self.prefixes, self.live, self.backbone.device
        assert slots is not None
        assert prefixes is not None
        new = slice(first, first + len(prompts))
        self.rows += [key for key, _ in requests]
        self.order = None
        slots.prefix[new] = torch.tensor([self.place_of_prefix[key] for key in wanted], device=device)
        slots.prefix_length[new] = prefixes.lengths_Q[slots.prefix[new]]
        slots.length[new] = 0
        slots.nodes[new] = torch.tensor(nodes, device=device)
        slots.count[new] = 0
        draws = np.stack([uniforms(request.seed, self.max_new_tokens) for _, request in requests])
        slots.uniforms[new] = torch.from_numpy(draws).to(device)
        suffixes = Packed.of([prompt.suffix_ids for prompt in prompts], device)
        used, of_row_B = slots.prefix[new].unique(return_inverse=True)
        attention = PrefillAttention(slots, suffixes, prefixes.select(used), of_row_B, first)
        last_B = suffixes.lengths_B.cumsum(0) - 1
        nodes_T = slots.nodes[new][suffixes.row_T]
        logits_BV = self.policy.decode(suffixes.ids_T, attention.positions_T, nodes_T, attention, last_B)
        self._advance(logits_BV, suffixes.lengths_B, torch.arange(new.start, new.stop, device=device))

    def step(self) -> list[tuple[int, Sample]]:
        """Hand out the rows that have stopped; give every other row its next token."""
        finished = self._take_finished()
        if self.live:
            slots, prefixes = self.slots, self.prefixes
            assert slots is not None
            assert prefixes is not None
            if self.order is None:
                self.order = Order(slots, self.live)
                self.sharing = Sharing(prefixes, self.order, self.sharing)
            assert self.sharing is not None
            order, attention = self.order, DecodeAttention(slots, self.sharing, self.policy.ops)
            ids_B = slots.last_token[order.slot_B]
            logits_BV = self.policy.decode(ids_B, attention.positions_B, order.node_B, attention, order.every_B)
            self._advance(logits_BV, torch.ones_like(ids_B), order.slot_B)
        return finished

    def _advance(self, logits_BV: Tensor, written_B: Tensor, slot_B: Tensor) -> None:
        """Count the tokens now in slots; draw each slot's next by inverting the distribution function at its uniform draw."""
        slots = self.slots
        assert slots is not None
        slots.length[slot_B] += written_B
        count_B = slots.count[slot_B]
        tokens_B, logprobs_B = self.policy.ops.draw(logits_BV, slots.uniforms[slot_B, count_B], self.temperature)
        slots.tokens[slot_B, count_B] = tokens_B
        slots.logprobs[slot_B, count_B] = logprobs_B
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
        self.order = None
        return finished

    def _compute_prefixes(self, wanted: Sequence[PrefixKey], nodes: Sequence[int]) -> None:
        missing = {key: node for key, node in zip(wanted, nodes, strict=True) if key not in self.place_of_prefix}
        if not missing:
            return
        device = self.backbone.device
        packed = Packed.of([prefix for prefix, _ in missing], device)
        computed = self.policy.prefill(packed, torch.tensor(list(missing.values()), device=device))
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

        slots = Slots(
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
