"""An engine that takes its completions from a function: it shows and tests the flow of messages without a model."""

from collections import deque
from collections.abc import Callable, Sequence

from neuromas.rollout.engine import OnSample
from neuromas.types import Request, Sample


class ScriptedEngine:
    """Answers each request with `script(request)`, and keeps the requests in the order in which they came."""

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
            text = self._script(request)
            sample = Sample(tuple(text.encode()), (0.0,) * len(text.encode()), text, stopped=True, adapter_version=0)
            waiting.extend(on_sample(key, sample))
