"""The default engine samples in process, with the learner's own weights, so that the samples are never of an older version.

Each distinct prefix is computed once, however many rows continue it; where prefixes take much memory, those without a live row
are dropped. A row takes a slot of a KV cache, which holds its suffix and then what it writes. Rows of all nodes and layers
decode together. A row with several texts goes on where it has ended one: the tokens that begin the next one take the place of
sampled ones. When a row finishes, a later row moves to its slot, so that live rows stay in the first slots, and new rows are
added after them.
"""

from collections import deque
from collections.abc import Collection, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from neuromas.model.attention import Prefixes
from neuromas.model.left_out import is_left_out
from neuromas.model.packing import Packed
from neuromas.model.policy import Policy, PrefixKey
from neuromas.rollout.engine import OnSample, uniforms
from neuromas.rollout.fixed_decoding import TOKENS_AT_ONCE, FixedSharing, Graphs
from neuromas.rollout.kv_cache import NOT_GIVEN, DecodeAttention, LiveRows, PrefillAttention, PrefixSharing, Slots
from neuromas.types import Request, Sample

MAX_ROWS = 256
CACHE_BYTES = 2**29
"""On a CPU, rows decode at once whose KV cache takes about this much at most."""
PREFIX_BYTES = 2**28
"""Prefixes are kept while all take no more than this: another row may continue them."""

Keyed = tuple[int, Request]
"""A request with the caller's key for it."""


class TorchEngine:
    """Samples from a policy.

    `max_rows` bounds how many rows decode at once, and so the memory of the cache; distinct prefixes need memory of their own.
    With `graphs`, a GPU runs tokens as recorded graphs; without, it is asked for each operation, and gives the same.
    """

    def __init__(self, policy: Policy, max_rows: int = MAX_ROWS, *, graphs: bool = True) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.graphs = graphs

    @torch.inference_mode()
    def generate(self, requests: Sequence[Keyed], on_sample: OnSample, *, temperature: float, max_new_tokens: int) -> None:
        batch = DecodingBatch(self.policy, self.max_rows, max_new_tokens, PREFIX_BYTES, graphs=self.graphs)
        waiting = deque(requests)
        with self.policy.sampling():
            while waiting or batch.live:
                if waiting and (room := batch.room(waiting)) > 0:
                    batch.admit([waiting.popleft() for _ in range(min(len(waiting), room))], temperature)
                for key, sample in batch.step():
                    waiting.extend(on_sample(key, sample))


class DecodingBatch:
    """The rows that decode together, which may join and leave at any step; it needs `Policy.sampling` around it."""

    def __init__(
        self, policy: Policy, max_rows: int, max_new_tokens: int, prefix_bytes: int, *, graphs: bool = True
    ) -> None:  # fmt: skip
        self.policy, self.backbone, self.max_rows = policy, policy.backbone, max_rows
        self.max_new_tokens, self.prefix_bytes = max_new_tokens, prefix_bytes
        self.temperatures: set[float] = set()
        """Those of all rows so far."""
        self.stop_ids = torch.tensor(sorted(policy.frame.stop_ids), device=self.backbone.device)
        self.version, self.routing = policy.version, policy.routing
        self.rows: list[int] = []
        """Key of the request in each live slot."""
        self.headers: dict[int, list[tuple[int, ...]]] = {}
        """Tokens that begin the texts to come, by the key of a row that has any."""
        self.gives_tokens = False
        """Whether any row has had headers."""
        self.prefixes: Prefixes | None = None
        self.index_of_prefix: dict[PrefixKey, int] = {}
        self.live_rows: LiveRows | None = None
        """None after a row has started or finished, until the next step."""
        self.sharing: PrefixSharing | None = None
        self._slots: Slots | None = None
        self.fixed: FixedSharing | None = None
        """The buffers that rows decode over where their shapes are fixed."""
        # Other layers than ours may read something back from a GPU, which cannot be recorded.
        on_gpu = self.backbone.device.type == "cuda" and not is_left_out("graphs")
        self.records = graphs and on_gpu and self.backbone.has_own_decoder
        self.graphs = Graphs(records=self.records)

    @property
    def live(self) -> int:
        """Return the number of live rows."""
        return len(self.rows)

    @property
    def slots(self) -> Slots:
        """Return the state of the rows, which the first of them has made room for."""
        assert self._slots is not None
        return self._slots

    def room(self, waiting: Collection[Keyed]) -> int:
        """Return how many more rows may decode now: on a CPU, as many as keep the cache at `CACHE_BYTES`, but one at least."""
        # New rows wait for each other: a prefill of a few rows costs nearly as much as one of many.
        if self.live > 3 * len(waiting):
            return 0
        backbone, most = self.backbone, self.max_rows
        if backbone.device.type == "cpu" and backbone.token_bytes:
            columns = max(len(request.prompt.suffix_ids) for _, request in waiting) + self.max_new_tokens
            if self._slots is not None:
                columns = max(columns, self._slots.keys[0].shape[2])
            most = max(1, min(most, CACHE_BYTES // (columns * backbone.token_bytes)))
        return most - self.live

    def admit(self, requests: Sequence[Keyed], temperature: float) -> None:
        """Prefill new rows, all of one temperature, into the slots after the live ones."""
        # Rows of one node are adjacent, so that their tokens are one product with its adapter.
        requests = sorted(requests, key=lambda keyed: keyed[1].node)
        prompts = [request.prompt for _, request in requests]
        nodes = [self.routing.adapter_of(request.node) for _, request in requests]
        prefix_keys = [self.routing.prefix_key(request.prompt, request.node) for _, request in requests]
        self._compute_prefixes(prefix_keys, nodes)
        # A text that is cut off gets its end.
        frame = self.policy.frame
        given = max(sum(len(frame.end) + len(header) for header in request.headers) for _, request in requests)
        texts = self.max_new_tokens + given
        self._reserve(self.live + len(prompts), max(len(prompt.suffix_ids) for prompt in prompts) + texts, texts)
        slots, prefixes, first, device = self.slots, self.prefixes, self.live, self.backbone.device
        assert prefixes is not None
        new = slice(first, first + len(prompts))
        self.rows += [key for key, _ in requests]
        self.live_rows = None
        slots.prefix[new] = torch.tensor([self.index_of_prefix[key] for key in prefix_keys], device=device)
        slots.prefix_length[new] = prefixes.lengths_Q[slots.prefix[new]]
        slots.length[new] = 0
        slots.nodes[new] = torch.tensor(nodes, device=device)
        slots.temperature[new] = temperature
        self.temperatures.add(temperature)
        slots.count[new] = 0
        self.headers |= {key: list(request.headers) for key, request in requests if request.headers}
        self.gives_tokens |= bool(self.headers)
        slots.given[new] = NOT_GIVEN
        shares = [self.max_new_tokens // (1 + len(request.headers)) for _, request in requests]
        slots.limit[new] = torch.tensor(shares, device=device)
        draws = np.stack([uniforms(request.seed, slots.uniforms.shape[1]) for _, request in requests])
        slots.uniforms[new] = torch.from_numpy(draws).to(device)
        suffixes = Packed.of([prompt.suffix_ids for prompt in prompts], device)
        used, prefix_of_row_B = slots.prefix[new].unique(return_inverse=True)
        attention = PrefillAttention(slots, suffixes, prefixes.select(used), prefix_of_row_B, first)
        last_B = suffixes.lengths_B.cumsum(0) - 1
        nodes_T = slots.nodes[new][suffixes.row_T]
        logits_BV = self.policy.decode(suffixes.ids_T, attention.positions_T, nodes_T, attention, last_B)
        self._advance(logits_BV, suffixes.lengths_B, torch.arange(new.start, new.stop, device=device))

    def step(self) -> list[tuple[int, Sample]]:
        """Return the samples of finished rows with their requests' keys, and sample the next token or a few of every other."""
        finished = self._take_finished()
        if self.live and self.policy.ops.has_fixed_buffers:
            self._decode_chunk()
        elif self.live:
            slots, prefixes = self.slots, self.prefixes
            assert prefixes is not None
            if self.live_rows is None:
                self.live_rows = LiveRows(slots, self.live)
                self.sharing = PrefixSharing(prefixes, self.live_rows, self.sharing)
            assert self.sharing is not None
            live_rows, attention = self.live_rows, DecodeAttention(slots, self.sharing, self.policy.ops)
            ids_B = slots.last_token[live_rows.slot_B]
            logits_BV = self.policy.decode(ids_B, attention.positions_B, live_rows.node_B, attention, live_rows.row_B)
            self._advance(logits_BV, torch.ones_like(ids_B), live_rows.slot_B)
        return finished

    def _decode_chunk(self) -> None:
        """Sample the next few tokens of every row, over buffers of fixed shapes; a row that ends waits for the others."""
        slots, prefixes = self.slots, self.prefixes
        assert prefixes is not None
        left = int((slots.limit[: self.live] - slots.count[: self.live]).max())
        # A row that is cut may be at its end in the midst of a header, which it still writes.
        tokens = max(1, min(TOKENS_AT_ONCE, left))
        if self.fixed is None or not self.fixed.fits(prefixes, self.live):
            self.fixed, self.graphs = FixedSharing(slots, prefixes, self.live, tokens), Graphs(records=self.records)
        else:
            self.fixed.fill(prefixes, self.live, tokens)
        # To tell rows of several temperatures apart, something is read back.
        graphs = self.graphs if len(self.temperatures) == 1 else Graphs(records=False)
        graphs.run(self._fixed_step, self.fixed.shape, tokens)

    def _fixed_step(self) -> None:
        slots, fixed = self.slots, self.fixed
        assert fixed is not None
        rows, attention = fixed.slot_B, fixed.attention(self.policy.ops)
        first = slice(0, len(rows))
        # A row that has ended computes something, which is not kept.
        count_B = slots.count[first].clamp(max=slots.tokens.shape[1] - 1)
        given_B = slots.given[rows, count_B]
        # A row that has ended a text goes on where the next one's header has been given.
        goes_on_B = fixed.is_live[first] & (~self._ended(len(rows))[0] | (given_B != NOT_GIVEN))
        logits_BV = self.policy.decode_anywhere(slots.last_token[first], attention.positions_B, slots.nodes[first], attention)
        tokens_B, logprobs_B = self._draw(logits_BV, slots.uniforms[rows, count_B], rows)
        tokens_B = torch.where(given_B == NOT_GIVEN, tokens_B, given_B)
        slots.tokens[rows, count_B] = torch.where(goes_on_B, tokens_B, slots.tokens[rows, count_B])
        slots.logprobs[rows, count_B] = torch.where(goes_on_B, logprobs_B, slots.logprobs[rows, count_B])
        slots.last_token[first] = torch.where(goes_on_B, tokens_B, slots.last_token[first])
        slots.count[first] += goes_on_B
        slots.length[first] += goes_on_B

    def _ended(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return which of the first rows have ended a text, and which of those by a stop token."""
        slots = self.slots
        stopped = (slots.last_token[:rows, None] == self.stop_ids).any(1)
        ended = stopped | (slots.count[:rows] >= slots.limit[:rows])
        if self.gives_tokens or self.fixed is not None:
            # A header's own tokens, such as the end of a text that was cut off, end nothing.
            last = (slots.count[:rows, None] - 1).clamp(min=0)
            ended &= slots.given[:rows].gather(1, last)[:, 0] == NOT_GIVEN
        return ended, stopped

    def _advance(self, logits_BV: Tensor, written_B: Tensor, slot_B: Tensor) -> None:
        """Count the written tokens, and sample each slot's next one: invert the distribution function at its uniform draw."""
        slots = self.slots
        slots.length[slot_B] += written_B
        count_B = slots.count[slot_B]
        tokens_B, logprobs_B = self._draw(logits_BV, slots.uniforms[slot_B, count_B], slot_B)
        if self.gives_tokens:
            given_B = slots.given[slot_B, count_B]
            tokens_B = torch.where(given_B == NOT_GIVEN, tokens_B, given_B)
        slots.tokens[slot_B, count_B] = tokens_B
        slots.logprobs[slot_B, count_B] = logprobs_B
        slots.last_token[slot_B] = tokens_B
        slots.count[slot_B] = count_B + 1

    def _draw(self, logits_BV: Tensor, uniform_B: Tensor, slot_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the token that each slot samples at its temperature, and its log-probability."""
        if len(self.temperatures) == 1:
            return self.policy.ops.sample(logits_BV, uniform_B, next(iter(self.temperatures)))
        temperature_B = self.slots.temperature[slot_B]
        tokens_B, logprobs_B = torch.empty_like(slot_B), logits_BV.new_empty(len(slot_B))
        for temperature in temperature_B.unique().tolist():
            rows = (temperature_B == temperature).nonzero()[:, 0]
            tokens_B[rows], logprobs_B[rows] = self.policy.ops.sample(logits_BV[rows], uniform_B[rows], temperature)
        return tokens_B, logprobs_B

    def written(self, keys: Collection[int]) -> dict[int, Sample]:
        """Return what these rows have written so far; those that are not live are left out."""
        rows = [row for row, key in enumerate(self.rows) if key in keys]
        return dict(zip((self.rows[row] for row in rows), self._samples(rows), strict=True)) if rows else {}

    def cut(self, key: int, tokens: int) -> None:
        """Let a live row end with so many tokens at most after its prompt, and with the text that it is at."""
        if key in self.rows:
            self.slots.limit[self.rows.index(key)].clamp_(max=tokens)
            self.headers.pop(key, None)

    def _take_finished(self) -> list[tuple[int, Sample]]:
        """Remove the rows that have finished and return their samples; later rows move into their slots."""
        slots = self.slots
        ended, stopped = self._ended(self.live)
        done = []
        for row in ended.nonzero()[:, 0].tolist():
            if self.rows[row] in self.headers:
                self._begin_next_text(row, bool(stopped[row]))
            else:
                done.append(row)
        if not done:
            return []
        finished = list(zip((self.rows[row] for row in done), self._samples(done), strict=True))
        gone = set(done)
        left = self.live - len(gone)
        holes = [row for row in gone if row < left]
        movers = [row for row in range(left, self.live) if row not in gone]
        if holes:
            slots.move(movers, holes)
        for mover, hole in zip(movers, holes, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[left:]
        self.live_rows = None
        return finished

    def _begin_next_text(self, row: int, stopped: bool) -> None:
        """Have a row that has ended a text go on with the header of the next one, and give that its share of tokens."""
        slots, key = self.slots, self.rows[row]
        header, left = self.headers[key][0], len(self.headers[key])
        tokens = header if stopped else (*self.policy.frame.end, *header)
        count = int(slots.count[row])
        sampled = int((slots.given[row, :count] == NOT_GIVEN).sum())
        slots.given[row, count : count + len(tokens)] = torch.tensor(tokens, device=slots.given.device)
        slots.limit[row] = count + len(tokens) + max(1, (self.max_new_tokens - sampled) // left)
        del self.headers[key][0]
        if not self.headers[key]:
            del self.headers[key]

    def _samples(self, rows: list[int]) -> list[Sample]:
        """Return what live rows have written."""
        slots = self.slots
        counts, tokens, logprobs = slots.count[rows].tolist(), slots.tokens[rows].tolist(), slots.logprobs[rows].tolist()
        is_given = (slots.given[rows] != NOT_GIVEN).tolist()
        return [
            self._sample(ids[:count], sampled[:count], given[:count])
            for count, ids, sampled, given in zip(counts, tokens, logprobs, is_given, strict=True)
        ]

    def _sample(self, ids: list[int], logprobs: list[float], is_given: list[bool]) -> Sample:
        """Return what a row has written: its texts are what stands between the tokens that were given."""
        texts, stopped = list[str](), True
        for given, text in groupby(range(len(ids)), key=lambda index: is_given[index]):
            if not given:
                body, ended = self.policy.frame.read([ids[index] for index in text], self.backbone.detokenize)
                texts.append(body)
                stopped &= ended
        kept = tuple(logprob for logprob, given in zip(logprobs, is_given, strict=True) if not given)
        indices = tuple(index for index, given in enumerate(is_given) if given)
        return Sample(tuple(ids), kept, tuple(texts), stopped, self.version, indices)

    def _compute_prefixes(self, prefix_keys: Sequence[PrefixKey], nodes: Sequence[int]) -> None:
        """Prefill the prefixes that are not computed yet."""
        missing = {key: node for key, node in zip(prefix_keys, nodes, strict=True) if key not in self.index_of_prefix}
        if not missing:
            return
        self._drop_prefixes(prefix_keys)
        device = self.backbone.device
        packed = Packed.of([prefix for prefix, _ in missing], device)
        computed = self.policy.prefill(packed, torch.tensor(list(missing.values()), device=device))
        self.index_of_prefix |= {key: len(self.index_of_prefix) + index for index, key in enumerate(missing)}
        self.prefixes = computed if self.prefixes is None else self.prefixes.join(computed)

    def _drop_prefixes(self, prefix_keys: Sequence[PrefixKey]) -> None:
        """Drop the prefixes that neither a live row nor a new one continues, if all take much and those are half of them."""
        slots, indices = self._slots, self.index_of_prefix
        if slots is None or self.prefixes is None or self.prefixes.nbytes <= self.prefix_bytes:
            return
        kept = {*slots.prefix[: self.live].tolist(), *(indices[key] for key in prefix_keys if key in indices)}
        if 2 * len(kept) > len(indices):
            return
        # They number prefixes as they were.
        self.live_rows = self.sharing = self.fixed = None
        if not kept:
            self.prefixes, self.index_of_prefix = None, {}
            return
        self.prefixes = self.prefixes.select(torch.tensor(sorted(kept), device=self.backbone.device))
        moved = {old: new for new, old in enumerate(sorted(kept))}
        self.index_of_prefix = {key: moved[old] for key, old in indices.items() if old in kept}
        live = slots.prefix[: self.live]
        slots.prefix[: self.live] = live.new_tensor([moved[old] for old in live.tolist()])

    def _reserve(self, rows: int, columns: int, texts: int) -> None:
        """Make the cache at least this large, with room for so many tokens after a prompt, and keep its content."""
        old = self._slots
        if old is not None:
            had_rows, _, had_columns, _ = old.keys[0].shape
            had_texts = old.tokens.shape[1]
            if had_rows >= rows and had_columns >= columns and had_texts >= texts:
                return
            # The cache grows by more than is needed, because it is copied every time.
            rows, columns, texts = max(rows, had_rows), max(columns + 32, had_columns), max(texts, had_texts)
        assert self.prefixes is not None
        self._slots, self.fixed = Slots.of(self.prefixes.past, rows, columns, texts, old), None
