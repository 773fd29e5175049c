"""`neuromas serve`: answer requests of OpenAI's clients with a trained run."""

import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from neuromas.cli.flags import parse_flags, require_best
from neuromas.model.sources import find_backbone
from neuromas.system.schema import require
from neuromas.training.questions import open_run

KEY_VARIABLE = "NEUROMAS_API_KEY"
MOST = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeArguments:
    """Serve a trained run at an OpenAI-compatible endpoint, with a page to talk to it, until Ctrl-C.

    The environment variable NEUROMAS_API_KEY, or the file of --api-key-file, holds the key that clients must send; without
    either no key is asked for.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    name: str | None = None
    """Name of the model. None: the name of the run's folder."""
    best: bool = False
    """Serve the adapters of the run's best validation, not its last ones."""
    api_key_file: Path | None = None
    """File that holds the API key."""
    max_running: int = 64
    """Rollouts that run at once."""
    max_waiting: int = 256
    """Rollouts that wait; a request beyond that is answered with status 429."""
    max_choices: int = 16
    """Most answers to one request; there are never more than may wait."""
    max_body_bytes: int = 2**20
    """Largest body of a request."""
    timeout: float = 120.0
    """Seconds in which a request must be answered, and in which its client must read what it is sent."""
    allow_code: bool = False
    """Execute the Python file that holds the run's task (class:FILE.py:CLASS)."""


def run(args: Sequence[str]) -> None:
    """Run the command `serve`."""
    parsed = parse_flags(ServeArguments, args, "serve")
    for name in ("max_running", "max_waiting", "max_choices"):
        value = getattr(parsed, name)
        require(1 <= value <= MOST, f"--{name.replace('_', '-')}", f"1 to {MOST:,}", value)
    require(parsed.max_body_bytes >= 1, "--max-body-bytes", "at least 1", parsed.max_body_bytes)
    require(0 < parsed.timeout <= MOST, "--timeout", f"above 0 and at most {MOST:,}", parsed.timeout)
    require(0 <= parsed.port <= 65535, "--port", "0 to 65535", parsed.port)
    if missing := [name for name in ("starlette", "uvicorn", "prometheus_client") if not importlib.util.find_spec(name)]:
        raise ValueError(f"serve needs {missing[0]}, which is not installed: pip install 'neuromas[serve]'")
    key = _key(parsed.api_key_file)
    opened, task = open_run(parsed.run, allow_code=parsed.allow_code)
    if parsed.best:
        require_best(opened)
    find_backbone(opened.config.backbone)
    from neuromas.serve.app import App, Limits, Served, is_loopback
    from neuromas.serve.server import serve
    from neuromas.training.load_run import load_network

    with _listen(parsed.host, parsed.port) as listening:
        network, _ = load_network(opened, best=parsed.best)
        name = parsed.name or parsed.run.resolve().name
        served = Served(
            network=network,
            name=name,
            answer_format=task.answer_format,
            key=key,
            local_only=key is None and is_loopback(parsed.host),
        )
        limits = Limits(
            running=parsed.max_running, waiting=parsed.max_waiting,
            # What cannot wait would never be answered but by 429.
            choices=min(parsed.max_choices, parsed.max_waiting), body_bytes=parsed.max_body_bytes, seconds=parsed.timeout,
        )  # fmt: skip
        if key is None and not is_loopback(parsed.host):
            print(f"warning: everybody who reaches {parsed.host} may ask; {KEY_VARIABLE} sets an API key", file=sys.stderr)
        where = f"[{parsed.host}]" if ":" in parsed.host else parsed.host
        address = f"http://{where}:{listening.getsockname()[1]}"
        serve(App(served, limits), listening, lambda: print(f"{name} at {address}/v1, a page at {address}/", flush=True))


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; ValueError if the address cannot be had."""
    from neuromas.serve.server import listen

    try:
        return listen(host, port)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--host {host} --port {port} cannot be listened at: {reason}; name others") from error


def _key(path: Path | None) -> str | None:
    """Return the API key of the environment or of a file; ValueError if it is empty, or cannot be sent in a header."""
    try:
        key = os.environ.get(KEY_VARIABLE) if path is None else path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"--api-key-file {path} cannot be read: {error.strerror}") from error
    # A header has no blanks at its ends.
    key = key and key.strip()
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        got = "other characters" if key else "none"
        raise ValueError(f"the API key must be printable ASCII, got {got}; look at {path or KEY_VARIABLE}")
    return key
