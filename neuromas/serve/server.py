"""The process that listens: uvicorn, whose own errors are worded as all others, and which ends when it is asked to."""

import asyncio
import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from neuromas.serve.app import App
from neuromas.serve.protocol import ApiError

HEAD_SECONDS = 10.0
"""Time in which the head of a request must have arrived."""


class _Protocol(H11Protocol):
    """Refuses what is no HTTP with the same JSON as any error; closes the connection of a client that asks or reads nothing."""

    def __init__(self, read_seconds: float, **settings: Any) -> None:
        super().__init__(**settings)
        self._read_seconds = read_seconds
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever the system does not take at once pauses the writing, until all of it is gone.
        transport.set_write_buffer_limits(high=0)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        # To close would be to wait until the client has read the rest.
        self._unread = self.loop.call_later(self._read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Who is answered, and still sends what was asked for, keeps the connection no longer than who asks nothing.
        if self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE:
            self._watch()
        else:
            self._unwatch()

    def _watch(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, msg).to_json()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    """Ends with status 0 after a signal, once everything that was asked is answered; a second signal ends it at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        print("stopping as soon as all requests are answered; once more stops at once", file=sys.stderr)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; OSError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)


def serve(app: App, listening: socket.socket, ready: Callable[[], None]) -> None:
    """Answer requests until a signal comes."""
    protocol: Any = partial(_Protocol, app.limits.seconds)  # called, as a class is
    config = uvicorn.Config(
        app.asgi, http=protocol, ws="none", log_level="error", server_header=False,
        timeout_graceful_shutdown=int(app.limits.seconds) + 1,
    )  # fmt: skip
    server = _Server(config)
    ready()
    server.run(sockets=[listening])
