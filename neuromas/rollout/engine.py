"""Who samples: the interface of engines, and the random numbers that they use. Who learns is `training/learner.py`.

`ENGINES` in `system/engines.py` says which engine samples and which learns for each `--engine`, and what holds then.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from neuromas.types import Request, Sample

OnSample = Callable[[int, Sample], Sequence[tuple[int, Request]]]
"""Takes a request's key and its sample, and returns the keyed requests that have become ready through it."""


class EngineFault(ValueError):
    """Says that an engine, or what it has sampled, cannot be used: the run ends, and goes on from its last checkpoint."""


@runtime_checkable
class Engine(Protocol):
    """Samples completions. A request is started as soon as it is ready, and does not wait for a whole layer to end.

    A sample carries the version of the adapters that wrote it. An engine with copies of its own takes the adapters over when
    the policy's version has changed, or nodes have joined.
    """

    def generate(
        self,
        requests: Sequence[tuple[int, Request]],
        on_sample: OnSample,
        *,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        """Sample a completion for each request and for those that `on_sample` returns; temperature 0 is greedy."""
        ...


def uniforms(seed: tuple[int | str, ...], count: int) -> np.ndarray:
    """Return `count` uniform draws in [0, 1) that depend on the seed alone.

    A row's draws are fixed by its seed before it meets a batch, so they do not depend on what else is in the batch.
    """
    key = int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=16).digest())
    return np.random.Generator(np.random.Philox(key=key)).random(count)
