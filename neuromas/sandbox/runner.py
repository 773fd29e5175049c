"""Checks one program at a time, in a separate process, so that the training process does not fork.

It reads jobs from standard input and writes results to standard output. Each program gets a new isolated judge, which starts
while the one before it works. The runner reads only its short verdict: no byte that a program writes arrives here.
"""

import ctypes
import os
import secrets
import select
import time
import warnings

from neuromas.sandbox.isolation import Isolation, IsolationName, Process, make_isolation
from neuromas.sandbox.judge import READY, VERDICT_BYTES
from neuromas.sandbox.wire import decode, encode, frame, frame_length, read_frame, write_frame

START_FAILED = "start failed"
"""Status of a job for which no isolated process could be started; it says nothing about the program."""

SPARE_SECONDS = 2
"""Processor seconds beyond the wall-clock limit: this second limit stops a program that outlives this process."""

_STATUSES = ("failed", "invalid", "memory", "output", "crashed")
"""Statuses of a verdict other than "passed"."""
_START_SECONDS = 30.0
_PR_SET_CHILD_SUBREAPER = 36


class _Ended(Exception):
    """The process closed its pipe."""


class _Late(Exception):
    """The deadline passed."""


class _Long(Exception):
    """More bytes than allowed."""


class _Judge:
    """Sends and receives frames of an isolated judge, under a deadline and while the owner's pipe is open."""

    def __init__(self, process: Process, owner: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._owner = process, owner
        self._to, self._from = process.stdin.fileno(), process.stdout.fileno()
        for fd in (self._to, self._from):
            os.set_blocking(fd, False)

    def await_ready(self) -> None:
        """Wait until the judge is isolated and has forked its worker; OSError if that never happens."""
        try:
            if self.receive(time.monotonic() + _START_SECONDS, len(READY)) == READY:
                return
        except (_Ended, _Late, _Long):
            pass
        raise OSError("the isolated judge did not start")

    def send(self, payload: bytes | bytearray, deadline: float) -> None:
        data = memoryview(frame(payload))
        while data:
            self._wait(self._to, select.POLLOUT, deadline)
            try:
                data = data[os.write(self._to, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise _Ended from None

    def receive(self, deadline: float, limit: int) -> bytes:
        count = frame_length(self._read(4, deadline))
        if count > limit:
            raise _Long
        return self._read(count, deadline)

    def close(self) -> None:
        # This ends the process group (sandlock) or process namespace (bubblewrap), the worker included.
        self._process.kill()
        self._process.wait(5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, count: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        while count:
            self._wait(self._from, select.POLLIN, deadline)
            part = os.read(self._from, count)
            if not part:
                raise _Ended
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        poll.register(self._owner, 0)  # reports only that the other end was closed
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if any(which == self._owner for which, _ in ready):
            raise EOFError("nobody waits for the result any more")
        if not ready:
            raise _Late


class Runner:
    """Checks programs in one isolation, one at a time, with the next judge started ahead."""

    def __init__(self, isolation: Isolation, owner: int) -> None:
        self._isolation, self._owner = isolation, owner
        self._next: _Judge | None = None

    def check(
        self,
        source: str,
        tests: str,
        names: tuple[str, ...],
        seconds: float | int,
        memory_bytes: int,
        open_files: int,
        output_bytes: int,
    ) -> tuple[str, str]:
        """Return the status of a program and a short reason; OSError if no judge can be started."""
        judge, self._next = self._next or self._start(), None
        try:
            judge.await_ready()
            secret = f"secret-{secrets.token_hex(16)}"
            limits = (memory_bytes, int(seconds) + SPARE_SECONDS, open_files)
            # Time counts from here: a slow start is not the program's fault.
            deadline = time.monotonic() + seconds
            judge.send(encode((source, tests, names, secret, output_bytes, *limits)), deadline)
            self._next = self._start()
            said = judge.receive(deadline, VERDICT_BYTES)
        except _Late:
            return "timeout", f"not done after {seconds:g} s"
        except (_Ended, _Long):
            return "failed", "the process of the tests ended without a verdict"
        finally:
            judge.close()
        status, _, detail = said.decode("utf-8", "replace").partition("\n")
        if status == "passed" and secrets.compare_digest(detail.encode(), secret.encode()):
            return status, ""
        return (status, detail) if status in _STATUSES else ("failed", "the verdict is not this program's")

    def close(self) -> None:
        """End the judge that waits for its program."""
        if self._next is not None:
            self._next.close()
            self._next = None

    def _start(self) -> _Judge:
        return _Judge(self._isolation.start(), self._owner)


def adopt_orphans() -> None:
    """Make this process adopt processes whose parent was killed: the first process of a container may never reap them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(isolation: IsolationName) -> None:
    # sandlock 0.9.0 warns of an option that it does apply.
    warnings.filterwarnings("ignore", message="Policy field 'gid' is set but not wired")
    jobs, results = os.dup(0), os.dup(1)
    # Standard error is /dev/null: printed output cannot get between the frames.
    for stream in (0, 1):
        os.dup2(2, stream)
    adopt_orphans()
    runner = Runner(make_isolation(isolation), jobs)
    try:
        while True:
            job = decode(read_frame(jobs))
            started = time.monotonic()
            try:
                status, detail = runner.check(*job)  # type: ignore[misc]  # ours: the arguments in their order
            except (OSError, RuntimeError) as error:
                status, detail = START_FAILED, f"{type(error).__name__}: {error}"
                runner.close()
            write_frame(results, encode((status, detail, time.monotonic() - started)))
    except EOFError:
        pass
    finally:
        runner.close()
