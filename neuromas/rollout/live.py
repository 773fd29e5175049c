"""Rollouts that begin at any time: their rows join the batch that decodes, and each is heard while it is written."""

import itertools
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from neuromas.rollout.network import MessagePassing, Network
from neuromas.rollout.torch_engine import CACHE_BYTES, MAX_ROWS, DecodingBatch
from neuromas.types import Completion, Example, Request, Rollout, Sample


@dataclass(frozen=True, slots=True)
class Terms:
    """How one rollout is sampled and heard."""

    temperature: float = 0.0
    """0 is greedy."""
    max_tokens: int | None = None
    """Most tokens of an answer, if that is less than a node of the network may write."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    hears_answer: bool = False
    """Whether an answer is reported after each of its tokens, and not only when it is written."""
    hears_messages: bool = False
    """Whether the texts of all other nodes are."""


@dataclass(eq=False, slots=True)
class LiveRollout:
    """A rollout that runs."""

    terms: Terms
    passing: MessagePassing
    rows: dict[int, Request] = field(default_factory=dict)
    """Requests that are not answered yet, by the key of their row."""
    result: Rollout | None = None
    """None until all nodes have written."""

    def answers(self, node: int) -> bool:
        """Say whether a node's text is an answer and no message."""
        return not self.passing.rollouts[0].neighbours.recipients[node]

    @property
    def answering(self) -> int:
        """Return the number of nodes that answer: several are put to the vote."""
        return sum(map(self.answers, self.passing.rollouts[0].neighbours.topology.nodes))


@dataclass(frozen=True, slots=True)
class Said:
    """What a node of a rollout has written so far."""

    rollout: LiveRollout
    node: int
    text: str
    """With what it was begun by."""
    completion: Completion | None
    """None while the node still writes."""


class LiveRollouts:
    """Runs the rollouts of a network that are begun while others run; `step` samples one token for each row of all of them.

    It is used by one thread, inside of `running`. A rollout is the one that `Network.rollout` returns for the same seed,
    example and index, up to rounding.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self._batch: DecodingBatch | None = None
        self._waiting: deque[tuple[int, Request]] = deque()
        self._rollout_of: dict[int, tuple[LiveRollout, int]] = {}
        """Rollout of each row, and the key by which that knows the row."""
        self._keys = itertools.count()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the adapters prepared; in this time they may not change."""
        with torch.inference_mode(), self.network.policy.sampling():
            yield

    @property
    def rows(self) -> int:
        """Return the number of rows that decode."""
        # Other threads read this: between two looks the batch may end.
        batch = self._batch
        return batch.live if batch is not None else 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self.rows)

    def begin(self, example: Example, index: int, *, seed: Sequence[int | str], terms: Terms) -> LiveRollout:
        """Begin a rollout; ValueError if the question is longer than the backbone reads."""
        passing = self.network.begin(example, index, seed=seed)
        rollout = LiveRollout(terms, passing)
        self._add(rollout, passing.start())
        return rollout

    def drop(self, rollout: LiveRollout) -> None:
        """End a rollout that nobody waits for any more."""
        for key in rollout.rows:
            del self._rollout_of[key]
            if self._batch:
                self._batch.cut(key, 0)
        self._waiting = deque(item for item in self._waiting if item[0] not in rollout.rows)
        rollout.rows.clear()

    def step(self) -> list[Said]:
        """Sample the next token of each row; return the texts that have ended, and those so far that are to be heard."""
        self._admit()
        if self._batch is None:
            return []
        ended = [self._end(key, sample) for key, sample in self._batch.step() if key in self._rollout_of]
        heard = [key for key, (rollout, _) in self._rollout_of.items() if self._is_heard(rollout, key)]
        return ended + [self._hear(key, sample) for key, sample in self._batch.written(heard).items()]

    def _add(self, rollout: LiveRollout, requests: Iterable[tuple[int, Request]]) -> None:
        for own_key, request in requests:
            key = next(self._keys)
            self._rollout_of[key] = rollout, own_key
            rollout.rows[key] = request
            self._waiting.append((key, request))

    def _admit(self) -> None:
        """Let waiting rows decode if there is room; a batch without rows is left behind, with all its memory."""
        if self._batch is not None and not self._batch.live:
            self._batch = None
        if not self._waiting:
            return
        if self._batch is None:
            network = self.network
            self._batch = DecodingBatch(network.policy, MAX_ROWS, network.max_new_tokens, prefix_bytes=0)
        by_temperature: dict[float, list[tuple[int, Request]]] = {}
        for key, request in self._fitting(self._batch):
            by_temperature.setdefault(self._rollout_of[key][0].terms.temperature, []).append((key, request))
        for temperature, rows in by_temperature.items():
            self._batch.admit(rows, temperature)
            for key, request in rows:
                rollout = self._rollout_of[key][0]
                if rollout.terms.max_tokens is not None and rollout.answers(request.node):
                    self._batch.cut(key, rollout.terms.max_tokens)

    def _fitting(self, batch: DecodingBatch) -> list[tuple[int, Request]]:
        """Take the rows from the waiting ones for which there is room now, in order."""
        taken = []
        # One long question pads the prefixes of all others: keys and values of a token are computed for each of them.
        width = batch.prefixes.width if batch.prefixes is not None else 0
        for _ in range(max(0, batch.room(self._waiting))):
            if not self._waiting:
                break
            width = max(width, len(self._waiting[0][1].prompt.prefix_ids))
            rows = batch.live + len(taken)
            if rows and (rows + 1) * width * self.network.backbone.token_bytes > CACHE_BYTES:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _end(self, key: int, sample: Sample) -> Said:
        """Record the text of a row that has ended, and let the nodes begin that waited for it alone."""
        rollout, own_key = self._rollout_of.pop(key)
        node = rollout.rows.pop(key).node
        self._add(rollout, rollout.passing.receive(own_key, sample))
        completion = rollout.passing.rollouts[0].completions[node]
        if not rollout.rows:
            (rollout.result,) = self.network.end(rollout.passing)
        return Said(rollout, node, completion.text, completion)

    def _is_heard(self, rollout: LiveRollout, key: int) -> bool:
        terms = rollout.terms
        return bool(terms.hears_answer or terms.stop) if rollout.answers(rollout.rows[key].node) else terms.hears_messages

    def _hear(self, key: int, sample: Sample) -> Said:
        """Report a text so far; an answer that has come to where it is to stop is ended."""
        rollout, _ = self._rollout_of[key]
        node = rollout.rows[key].node
        text = rollout.passing.text_so_far(node, sample)
        if rollout.answers(node) and cut_at(text, rollout.terms.stop) is not None:
            assert self._batch is not None
            self._batch.cut(key, len(sample.token_ids))
        return Said(rollout, node, text, None)


def cut_at(text: str, stops: Collection[str]) -> str | None:
    """Return the text before the first of these stops, or None if none is in it."""
    found = [place for place in map(text.find, stops) if place >= 0]
    return text[: min(found)] if found else None
