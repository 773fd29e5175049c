"""An engine that takes its completions from a function: it shows and tests the flow of messages without a model."""

from collections import deque
from collections.abc import Callable, Sequence

from neuromas.rollout.engine import OnSample
from neuromas.types import Request, Sample


class ScriptedEngine:
    """Answers each request with `script(request)`, once for each of its texts.

    Keeps the requests in the order in which they came.
    """

    def __init__(self, script: Callable[[Request], str]) -> None:
        self._script = script
        self.requests: list[Request] = []

    def generate(
        self, requests: Sequence[tuple[int, Request]], on_sample: OnSample, *, temperature: float, max_new_tokens: int
    ) -> None:
        waiting = deque(requests)
        while waiting:
            key, request = waiting.popleft()
            self.requests.append(request)
            texts = tuple(self._script(request) for _ in range(1 + len(request.headers)))
            ids = tuple("".join(texts).encode())
            sample = Sample(ids, (0.0,) * len(ids), texts, stopped=True, adapter_version=0)
            waiting.extend(on_sample(key, sample))
