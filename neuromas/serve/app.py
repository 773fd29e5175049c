"""The web application: OpenAI-compatible routes over a worker, its health and metrics, and a page to talk to the network."""

import asyncio
import hmac
import ipaddress
import json
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from neuromas.rollout.live import Said, Terms
from neuromas.rollout.network import Network
from neuromas.serve.metrics import Metrics
from neuromas.serve.protocol import JSON, ApiError, Asked, read_request
from neuromas.serve.replies import Reply
from neuromas.serve.worker import Begun, Event, Job, QueueFull, Refused, Worker
from neuromas.tasks import question_id
from neuromas.types import Example, Rollout

T = TypeVar("T")
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]

PAGE = Path(__file__).with_name("page.html").read_bytes()
RETRY_SECONDS = 1
CHARACTERS = 32
"""No text has so many characters a token; a longer question is refused before the network's thread spends time on it."""
DISCARDED = 64
"""Times the largest body that is read on of a larger one, so that its client hears why it is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one client may ask of the server, and all of them together."""

    running: int = 64
    """Rollouts that run at once."""
    waiting: int = 256
    """Rollouts that wait; a request for more is answered with status 429."""
    choices: int = 16
    """Answers to one request."""
    body_bytes: int = 2**20
    body_seconds: float = 10.0
    """Time in which the body of a request must have arrived."""
    seconds: float = 120.0
    """Time in which a request must be answered, and in which its client must read what it is sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What is served: a network, the name of the model, and how the task wants an answer to be written."""

    network: Network
    name: str
    answer_format: str
    key: str | None = None
    """The API key; None: everybody may ask."""
    local_only: bool = False
    """Only names of this machine are answered to: a page elsewhere, whose own name leads here, is refused."""


class App:
    """Holds the state of the application; `asgi` is what a server runs."""

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.started = int(time.time())
        self.worker = Worker(served.network, self._deliver, most_running=limits.running, most_waiting=limits.waiting)
        self.metrics = Metrics(self.worker)
        self._loop: asyncio.AbstractEventLoop | None = None
        routes = [
            Route("/", self._page),
            Route("/health", self._health),
            Route("/metrics", self._guarded(self._metrics)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/chat/completions", self._guarded(self._complete), methods=["POST"]),
            Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _our_error}
        self.asgi = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        self.worker.start()
        yield
        self.worker.close()
        await asyncio.to_thread(self.worker.join)

    def _deliver(self, events: Sequence[tuple[Job, Event]]) -> None:
        """Hand events of the worker over to this loop, all of a step at once."""

        def hear() -> None:
            for job, event in events:
                job.hear(event)

        assert self._loop is not None
        self._loop.call_soon_threadsafe(hear)

    def _guarded(self, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that asks for the key first, and counts its answers."""

        async def guarded(request: Request) -> Response:
            begun, status = time.monotonic(), 500
            try:
                self._check_key(request)
                response = await endpoint(request)
                status = response.status_code
                return response
            except ApiError as error:
                status = error.status
                raise
            except ClientDisconnect:
                # Nobody reads this.
                status = 499
                return Response(status_code=status)
            finally:
                self.metrics.answered(request.scope["route"].path, status, time.monotonic() - begun)

        return guarded

    def _check_key(self, request: Request) -> None:
        # Not that of `request.url`, which takes our own address where a header is malformed.
        host = re.sub(r":[0-9]+$", "", request.headers.get("host", ""))
        if self.served.local_only and not is_loopback(host.strip("[]")):
            raise ApiError(
                403, f"without an API key this server answers to localhost and loopback addresses alone, got Host {host!r}"
            )
        if (key := self.served.key) is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # Headers are latin-1; comparing bytes takes any.
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key")

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(PAGE)

    async def _health(self, _: Request) -> Response:
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "the worker has ended"}, 200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), media_type=Metrics.MEDIA_TYPE)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.served.name:
            raise ApiError(404, f"the model does not exist; this server has {self.served.name!r}", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> JSON:
        network = self.served.network
        card = {"id": self.served.name, "object": "model", "created": self.started, "owned_by": "neuromas"}
        return card | {"topology": network.topology.to_json(), "max_tokens": network.max_new_tokens}

    async def _complete(self, request: Request) -> Response:
        """Answer a request for a completion, with all nodes of the network."""
        chat = request.scope["route"].path == "/v1/chat/completions"
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A page of another site may send anything else without asking this server first.
            raise ApiError(415, "the body must come with 'Content-Type: application/json'")
        body = await self._body(request)
        asked = read_request(body, chat=chat, model=self.served.name, most_choices=self.limits.choices)
        waited = _Waited(self, asked, time.monotonic() + self.limits.seconds)
        try:
            # Only then it is known that the network reads the question.
            first = await _unless_left(request, waited.next())
        except BaseException:
            waited.end()
            raise
        reply = Reply(asked, self.served.name)
        if asked.stream:
            return StreamingResponse(
                _events(waited, reply, first), media_type="text/event-stream", background=BackgroundTask(waited.end)
            )
        try:
            rollouts = await _unless_left(request, waited.rollouts(first))
        finally:
            waited.end()
        self.metrics.spent(rollouts)
        return JSONResponse(reply.whole(rollouts))

    async def _body(self, request: Request) -> bytes:
        """Return the body; ApiError if it is too large or too slow."""
        most, body, size = self.limits.body_bytes, bytearray(), 0
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= most:
                        body += chunk
                    elif size > DISCARDED * most:
                        break
        except TimeoutError as error:
            raise ApiError(408, f"the body must arrive within {self.limits.body_seconds:g} seconds", code="timeout") from error
        if size > most:
            raise ApiError(413, f"the body must have at most {most:,} bytes", code="body_too_large")
        return bytes(body)

    def submit(self, asked: Asked, hear: Callable[[int, Event], None]) -> list[Job]:
        """Queue the rollouts of a request; `hear` gets the number of the choice and what becomes of it."""
        drawn = 0 if asked.temperature == 0 else secrets.randbits(63)
        seed = ("evaluate", drawn if asked.seed is None else asked.seed)
        terms = Terms(
            asked.temperature, asked.max_tokens, asked.stop, hears_answer=asked.stream,
            hears_messages=asked.stream and asked.trace,
        )  # fmt: skip
        longest = self.served.network.backbone.max_tokens
        if longest is not None and (most := longest * CHARACTERS) < max(map(len, asked.questions)):
            raise ApiError(400, f"a question must have at most {most:,} characters", code="context_length_exceeded")
        jobs, drawn_of = [], Counter[str]()
        for number in range(len(asked.questions) * asked.choices):
            question, index = asked.questions[number // asked.choices], number % asked.choices
            if asked.seed is None:
                # A question that is asked twice is drawn anew.
                index, drawn_of[question] = drawn_of[question], drawn_of[question] + 1
            example = Example(question_id(question), question, "", self.served.answer_format)
            jobs.append(Job(example, index, seed, terms, lambda event, number=number: hear(number, event)))
        try:
            self.worker.submit(jobs)
        except QueueFull as error:
            raise ApiError(429, "too many requests wait; try again later", code="queue_full") from error
        return jobs


class _Waited:
    """The rollouts of one request, as they are waited for."""

    def __init__(self, app: App, asked: Asked, until: float) -> None:
        self.app, self.asked, self.until = app, asked, until
        self.left = len(asked.questions) * asked.choices
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs = app.submit(asked, lambda number, event: self._events.put_nowait((number, event)))

    def end(self) -> None:
        """Let the worker forget what still runs."""
        self.app.worker.drop(self._jobs)

    async def next(self) -> tuple[int, Event]:
        """Return the next event; ApiError if it is a refusal or does not come in time."""
        try:
            async with asyncio.timeout(left := self.until - time.monotonic()):
                if left <= 0:
                    # Events that wait for a client that reads slowly would come without any waiting here.
                    raise TimeoutError
                number, event = await self._events.get()
        except TimeoutError as error:
            raise ApiError(504, f"no answer within {self.app.limits.seconds:g} seconds", code="timeout") from error
        if isinstance(event, Refused):
            raise ApiError(500 if event.ours else 400, event.reason, code=None if event.ours else "context_length_exceeded")
        self.left -= isinstance(event, Rollout)
        return number, event

    async def rollouts(self, first: tuple[int, Event]) -> tuple[Rollout, ...]:
        """Return all rollouts, by the number of their choice."""
        found = {}
        number, event = first
        while True:
            if isinstance(event, Rollout):
                found[number] = event
            if not self.left:
                return tuple(found[number] for number in sorted(found))
            number, event = await self.next()


def is_loopback(host: str) -> bool:
    """Say whether an address or a name is that of this machine for itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


async def _events(waited: _Waited, reply: Reply, first: tuple[int, Event]) -> AsyncIterator[str]:
    """Yield the lines of a stream of server-sent events."""
    rollouts: dict[int, Rollout] = {}
    number, event = first
    try:
        while True:
            if isinstance(event, Begun):
                chunks = reply.opening(number)
            elif isinstance(event, Said):
                chunks = reply.said(number, event)
            else:
                assert isinstance(event, Rollout)
                rollouts[number] = event
                chunks = reply.closing(number, event)
            for chunk in chunks:
                yield _line(chunk)
            if not waited.left:
                break
            number, event = await waited.next()
        for chunk in reply.usage(tuple(rollouts.values())):
            yield _line(chunk)
        waited.app.metrics.spent(tuple(rollouts.values()))
    except ApiError as error:
        yield _line(error.to_json())
    finally:
        waited.end()
    yield "data: [DONE]\n\n"


def _line(chunk: JSON) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


async def _unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what some work returns; ClientDisconnect, and an end of the work, if the client leaves before."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api_error(_: Request, error: ApiError) -> Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 429 else {}
    if error.status in (408, 413):
        headers["Connection"] = "close"
    return JSONResponse(error.to_json(), error.status, headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"there is no {request.method} {request.url.path[:200]} here" if error.status_code in (404, 405) else error.detail
    found = ApiError(error.status_code, message)
    return JSONResponse(found.to_json(), error.status_code, error.headers)


async def _our_error(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"the server failed: {type(error).__name__}").to_json(), 500)
