"""What Prometheus reads: requests by route and status, their seconds, tokens, and how full the server is."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from neuromas.serve.worker import Worker
from neuromas.training.ledger import spending
from neuromas.types import Rollout


class Metrics:
    """The metrics of one server."""

    MEDIA_TYPE = CONTENT_TYPE_LATEST

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()

        def gauge(name: str, meaning: str, value: Callable[[], float]) -> None:
            Gauge(name, meaning, registry=self._registry).set_function(value)

        gauge("neuromas_rollouts_running", "Rollouts that run", lambda: worker.active)
        gauge("neuromas_rollouts_waiting", "Rollouts that wait", lambda: worker.waiting)
        gauge("neuromas_rows", "Texts that are decoded together", lambda: worker.rows)
        gauge("neuromas_decoding_steps", "Decoding steps so far", lambda: worker.steps)
        labels = ("route", "status")
        self._requests = Counter("neuromas_requests", "Answered requests", labels, registry=self._registry)
        self._seconds = Histogram(
            "neuromas_request_seconds", "Time to the answer, or to the first byte of a stream", ("route",),
            registry=self._registry,
        )  # fmt: skip
        self._tokens = Counter("neuromas_tokens", "Tokens of all nodes", ("kind",), registry=self._registry)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer; status 499 says that its client has left before."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def spent(self, rollouts: tuple[Rollout, ...]) -> None:
        """Count the tokens of rollouts."""
        spent = spending([rollouts])
        self._tokens.labels("read").inc(spent.prompt_tokens)
        self._tokens.labels("written").inc(spent.sampled_tokens)

    def text(self) -> str:
        return generate_latest(self._registry).decode()
