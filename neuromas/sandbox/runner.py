"""Carries one program at a time to its verdict. A process of its own, so that the training process forks nothing.

Reads jobs from standard input and writes results to standard output. Each program gets an isolated judge that has
served nobody, started while the one before it works. What is read of it is one short verdict: no byte that a program writes
comes here.
"""

import ctypes
import os
import secrets
import select
import time
import warnings

from neuromas.sandbox.isolation import Isolation, Process, make_isolation
from neuromas.sandbox.judge import READY, VERDICT_BYTES
from neuromas.sandbox.wire import decode, encode, frame, frame_length, read_frame, write_frame

START_FAILED = "start failed"
"""Status of a job for which no isolated process could be started: the only one that says nothing about the program."""

SPARE_SECONDS = 2
"""Processor time beyond the wall-clock time: a second guard, which stops a program that outlives this process."""

_STATUSES = ("failed", "invalid", "memory", "output", "crashed")
"""What a judge may say of a program besides that it passed."""
_START_SECONDS = 30.0
_PR_SET_CHILD_SUBREAPER = 36


class _Ended(Exception):
    """The process closed its pipe."""


class _Late(Exception):
    """The deadline passed."""


class _Long(Exception):
    """More bytes than allowed."""


class _Judge:
    """An isolated judge with frames instead of pipes, all under a deadline and for as long as the owner's pipe is open."""

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
        # The whole process group (sandlock) or process namespace (bubblewrap) goes, the worker with it.
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
    """One isolation, one program at a time, and one judge ahead."""

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
        """Return the status of a program and a few words on it; OSError if the machine cannot start what it takes."""
        judge, self._next = self._next or self._start(), None
        try:
            judge.await_ready()
            secret = f"secret-{secrets.token_hex(16)}"
            limits = (memory_bytes, int(seconds) + SPARE_SECONDS, open_files)
            # Only now does time count: a slow start is the machine's.
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
    """Let processes whose parent was killed come to this one: the first process of a container may never reap them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def main(isolation: str) -> None:
    # sandlock 0.9.0 says so of an option that it does pass on.
    warnings.filterwarnings("ignore", message="Policy field 'gid' is set but not wired")
    jobs, results = os.dup(0), os.dup(1)
    # Standard error is /dev/null: nothing that prints can get between the frames.
    for stream in (0, 1):
        os.dup2(2, stream)
    adopt_orphans()
    runner = Runner(make_isolation(isolation), jobs)  # type: ignore[arg-type]  # one of the two names
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
