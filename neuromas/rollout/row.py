"""A row of an engine outside of this process: a request, and what has been written for it so far, one text after the other."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from neuromas.model.policy import Policy
from neuromas.types import Request, Sample


@dataclass(slots=True)
class Row:
    """A request in progress. A row with several texts asks for each of them, with all before it in the prompt."""

    key: int
    request: Request
    max_new_tokens: int
    """Most tokens that are sampled for all its texts."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    stopped: bool = True

    @property
    def texts_left(self) -> int:
        return 1 + len(self.request.headers) - len(self.texts)

    @property
    def limit(self) -> int:
        """Most tokens of the next text: each text has an equal share of what is left."""
        return max(1, (self.max_new_tokens - len(self.logprobs)) // self.texts_left)

    @property
    def prompt(self) -> list[int]:
        """All that is read before the next text."""
        return [*self.request.prompt.prefix_ids, *self.request.prompt.suffix_ids, *self.tokens]

    def seed(self, bits: int) -> int:
        """Return the seed of the next text's draws, as a number of so many bits."""
        seed = (*self.request.seed, "text", len(self.texts)) if self.texts else self.request.seed
        return seed_of(seed, bits)

    def record(self, policy: Policy, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Add a text that has ended, and begin the next one by its header; a text that was cut off gets its end first."""
        self.tokens += ids
        self.logprobs += logprobs
        text, ended = policy.frame.read(ids, policy.backbone.detokenize)
        self.texts.append(text)
        self.stopped &= ended
        if self.texts_left:
            header = self.request.headers[len(self.texts) - 1]
            begin = header if ended else (*policy.frame.end, *header)
            self.given += range(len(self.tokens), len(self.tokens) + len(begin))
            self.tokens += begin

    def sample(self, version: int) -> Sample:
        return Sample(
            tuple(self.tokens), tuple(self.logprobs), tuple(self.texts), self.stopped, version, tuple(self.given)
        )  # fmt: skip


def seed_of(seed: tuple[int | str, ...], bits: int) -> int:
    """Return a seed as services take it: a number of so many bits."""
    return int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()) >> (64 - bits)
