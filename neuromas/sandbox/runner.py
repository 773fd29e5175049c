"""Carries one program at a time to its verdict. A process of its own, so that the training process forks nothing.

Reads jobs from standard input and writes results to standard output. It starts a fresh isolated worker for each program and one
isolated judge for all, passes frames between them in strict turn, and looks at the clock and at sizes. It never decodes what a
worker says: only the judge does.
"""

import ctypes
import os
import secrets
import select
import time
import warnings

from neuromas.sandbox.isolation import Isolation, Process, Role, make_isolation
from neuromas.sandbox.judge import ANSWER, CALL, TESTS, VERDICT
from neuromas.sandbox.wire import decode, encode, frame, frame_length, read_frame, write_frame
from neuromas.sandbox.worker import LOADED, MESSAGE_CHARACTERS, READY

START_FAILED = "start failed"
"""Status of a job for which no isolated process could be started: the only one that says nothing about the program."""

_JUDGE_FRAME_BYTES = 64 << 20
_START_SECONDS = 30.0
_PR_SET_CHILD_SUBREAPER = 36


class _Ended(Exception):
    """The process closed its pipe."""


class _Late(Exception):
    """The deadline passed."""


class _Long(Exception):
    """More bytes than allowed."""


class _Party:
    """An isolated process with frames instead of pipes, all under a deadline and for as long as the owner's pipe is open."""

    def __init__(self, process: Process, owner: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._owner = process, owner
        self._to, self._from = process.stdin.fileno(), process.stdout.fileno()
        for fd in (self._to, self._from):
            os.set_blocking(fd, False)

    def send(self, payload: bytes, deadline: float) -> None:
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
        # The whole process group (sandlock) or process namespace (bubblewrap) goes.
        self._process.kill()
        self._process.wait(5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, count: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        while count:
            self._wait(self._from, select.POLLIN, deadline)
            part = os.read(self._from, min(count, 1 << 20))
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
    """One isolation, one judge that outlives programs, one worker at a time."""

    def __init__(self, isolation: Isolation, owner: int) -> None:
        self._isolation, self._owner = isolation, owner
        self._judge: _Party | None = None

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
        # The clock of the processor is a second guard: it stops a program that outlives this process.
        limits = (memory_bytes, int(seconds) + 2, open_files)
        judge, worker = self._started_judge(), self._start("worker", encode((source, *limits)))
        # Only now does time count: a slow start is the machine's.
        deadline = time.monotonic() + seconds
        finished = False
        try:
            complaint = worker.receive(deadline, output_bytes)
            if complaint != LOADED:
                status = "memory" if complaint.startswith(b"MemoryError") else "invalid"
                finished = True
                return status, complaint[:MESSAGE_CHARACTERS].decode("utf-8", "replace")
            secret = secrets.token_hex(16)
            judge.send(TESTS + encode((tests, names, names[0], secret, *limits)), deadline)
            verdict = self._converse(judge, worker, deadline, output_bytes)
            finished = True
            if verdict[:1] != VERDICT:
                return "failed", "the process of the tests ended without a verdict"
            status, detail = decode(verdict[1:])  # type: ignore[misc]  # the judge's: a tuple of two
            if status == "passed" and not secrets.compare_digest(detail, secret):
                return "failed", "the secret is not this program's"
            return status, "" if status == "passed" else detail
        except _Late:
            return "timeout", f"not done after {seconds:g} s"
        except _Long:
            return "output", f"more than {output_bytes} bytes of results"
        except _Ended:
            return "crashed", "the program's process ended before its tests did"
        finally:
            worker.close()
            if not finished:
                self.close()

    def close(self) -> None:
        """End the judge: the tests of an unfinished program may still be running in it. No worker may be alive."""
        if self._judge is not None:
            self._judge.close()
            self._judge = None
        # The fork in which the tests ran was killed with it and has come to us.
        for _ in range(100):
            try:
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
            except ChildProcessError:
                return
            time.sleep(0.01)

    def _started_judge(self) -> _Party:
        if self._judge is None:
            self._judge = self._start("judge", None)
        return self._judge

    def _start(self, role: Role, first: bytes | None) -> _Party:
        """Start a party, send it its first frame and wait until it is isolated and confined."""
        party = _Party(self._isolation.start(role), self._owner)
        deadline = time.monotonic() + _START_SECONDS
        try:
            if first is not None:
                party.send(first, deadline)
            if party.receive(deadline, len(READY)) == READY:
                return party
        except (_Ended, _Late, _Long):
            pass
        party.close()
        raise OSError(f"the isolated {role} did not start")

    def _converse(self, judge: _Party, worker: _Party, deadline: float, output_bytes: int) -> bytes:
        """Pass calls to the worker and answers to the judge until the judge says something else; return that."""
        while True:
            said = judge.receive(deadline, _JUDGE_FRAME_BYTES)
            if said[:1] != CALL:
                return said
            worker.send(said[1:], deadline)
            answer = worker.receive(deadline, output_bytes)
            output_bytes -= len(answer)
            judge.send(ANSWER + answer, deadline)


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
