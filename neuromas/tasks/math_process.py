"""Runs judgements that may not end in a separate process: algebra on a model's text, regular expressions of a user.

This file is run by its path, so that it loads neither the package nor torch. It reads one JSON request per line and writes one
JSON answer per line. `Judge` sends the requests: it kills a process that is late and starts another for the next request.
"""

import atexit
import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from typing import Any

START_SECONDS = 120.0
"""Most seconds for loading sympy, also on a busy machine."""
MEMORY_BYTES = 2 << 30
"""Most bytes of address space: an expression that needs more is wrong."""


class Judge:
    """Sends judgements to the process; any thread may use it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def ask(self, kind: str, gold: str, answer: str) -> bool:
        """Return the judgement; False if it takes longer than `seconds`, or more than `MEMORY_BYTES`.

        Raises OSError if the process cannot be started, as where math-verify is not installed.
        """
        with self._lock:
            process = self._process or self._start()
            request = json.dumps([kind, gold, answer]).encode() + b"\n"
            reply = b""
            with contextlib.suppress(OSError):
                _stdin(process).write(request)
                reply = _read_line(process, self.seconds)
            if not reply:
                self._stop()
            return reply == b"true\n"

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        greeting = _read_line(self._process, START_SECONDS)
        if greeting != b"ready\n":
            self._stop()
            raise OSError(f"verifier math cannot start: {greeting.decode().strip() or 'its process ended'}")
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with self._process:  # closes its pipes and waits for it
                self._process = None


def _stdin(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdin is not None
    return process.stdin


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """Return a line of the process; empty if none comes in time."""
    assert process.stdout is not None
    end, line = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, end - time.monotonic())):
                return b""
            part = process.stdout.read(4096)
            if not part:
                return b""
            line += part
    return line


def main() -> None:
    """Answer requests until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    # The output of libraries must not get between the answers.
    os.dup2(2, 1)
    try:
        import math_verify
    except ImportError as error:
        print(f"{error} (pip install math-verify)", file=out, flush=True)
        return
    import logging
    import resource

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        kind, gold, answer = json.loads(line)
        try:
            if kind == "regex":
                right = re.fullmatch(gold, answer) is not None
            else:
                # 0 switches off its own time limits, which are signals: `Judge` limits the time of this process.
                gold_side, side = (math_verify.parse(f"${text}$", parsing_timeout=0) for text in (gold, answer))
                right = bool(gold_side and side) and math_verify.verify(gold_side, side, strict=True, timeout_seconds=0)
        except Exception:
            # Sympy may raise any error on a model's text: an answer that can't be compared is wrong.
            right = False
        print(json.dumps(bool(right)), file=out, flush=True)


if __name__ == "__main__":
    main()
