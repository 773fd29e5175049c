"""Runs untrusted programs, each with its tests, and returns which passed.

    from neuromas.sandbox import Program, check_programs
    outcomes = check_programs([Program("def add(a, b): return a + b", "assert add(2, 3) == 5", "add")])
    outcomes[0].passed  # True

A model that is rewarded for passing tests will sooner or later exploit any weakness of the checker: an early `sys.exit(0)`, an
object that equals everything, a search of the interpreter's memory for the expected output. So neither an exit code nor
printed output counts as passing. There are three processes, none of which trusts the next one:

    runner   (host)      starts a judge for each program, holds the deadline and the secret, reads one short verdict
    judge    (isolated)  runs the tests of one program; each name that they take from it is a handle that calls the worker
    worker   (isolated)  the judge's fork; it holds the program and answers calls

Judge and worker serve one program and end with it. Only its own judge reads the bytes that a program sends, so it cannot
affect the verdict on the next program. The tests, the expected values and the secret (random, new for each program) reach the
judge after the fork: they are in no memory, file or pipe of the worker, and no system call of it reaches another process. The
program can only answer, and an answer is decoded as plain data (`wire.py`): numbers, text, lists, dicts, sets.
`assert f(x) == 3` compares an `int` made by the judge's own interpreter; a class with its own `__eq__` never leaves the worker.
After the last line of the tests the judge returns the secret, and that is passing.

Two walls separate program and host (and tests and host): `isolation.py` (bubblewrap or else sandlock), which removes access to
files, and `confine.py`, an allow-list of system calls and hard limits on resources. Before it is used, the isolation is tested
with a program that tries to escape. It is an error if none holds: a program is never run on the bare host.

Limitations. Objects that are no plain data stay in the worker, and tests get a handle: they can pass it back, call it, set
attributes and iterate over it, but not compare it, and its `str` is the program's own. Arguments are copies: tests cannot see
that a program changes its argument in place. Tests cannot pass functions. There are no threads, no subprocesses, no files to
write, no packages beyond the standard library. Only the tests decide: a program that has memorised their inputs passes.
"""

import contextlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from neuromas.sandbox.isolation import ISOLATIONS, IsolationName, make_isolation
from neuromas.sandbox.runner import SPARE_SECONDS, START_FAILED
from neuromas.sandbox.wire import decode, encode, read_frame, write_frame

__all__ = ["Limits", "Outcome", "Program", "Sandbox", "Status", "check_programs", "choose_isolation"]


class Status(Enum):
    """The status of a checked program. Compare with `is`."""

    PASSED = "passed"
    """Every test held, and the judge returned the program's secret."""
    FAILED = "failed"
    """A test did not hold, or raised."""
    INVALID = "invalid"
    """The program could not be loaded: a syntax error, an exception, an exit."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    """The program raised MemoryError (out of memory it may also crash)."""
    OUTPUT = "output"
    """It returned more bytes than allowed."""
    CRASHED = "crashed"
    """Its process ended before its tests ended."""


@dataclass(frozen=True, slots=True)
class Program:
    """An untrusted program with its tests, e.g. `Program("def f(x): ...", "assert f(1) == 2", "f")`."""

    source: str
    tests: str
    """Python that raises unless the program is right. The function has the names `candidate` and its own."""
    entry_point: str
    """The function under test."""
    helpers: tuple[str, ...] = ()
    """Further names that the tests take from the program. Every other name is the tests' own or Python's: a program that
    defines `sorted` or `abs` does not change the tests."""

    def __post_init__(self) -> None:
        for name in (self.entry_point, *self.helpers):
            if not name.isidentifier():
                raise ValueError(f"entry_point and helpers must be Python names, got {name!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Resources of one program. Fixed for all: one process, one thread, no network, no file to write, no package to import."""

    seconds: float | int = 10
    """Wall-clock time for one program with all its tests."""
    memory_mb: int = 512
    """Address space in MiB, of the program and, separately, of its tests."""
    open_files: int = 32
    output_bytes: int = 64 << 20
    """Most bytes that the program returns to the tests. Its printed output is discarded."""

    def __post_init__(self) -> None:
        ranges = {
            "seconds": (0.1, 86400),
            "memory_mb": (64, 1 << 27),
            "open_files": (8, 1 << 30),
            "output_bytes": (1024, 1 << 40),
        }
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if not least <= value <= most or not (name == "seconds" or isinstance(value, int)):
                kind = "number" if name == "seconds" else "whole number"
                raise ValueError(f"limits.{name} must be a {kind} from {least} to {most}, got {value!r}")

    def check_host(self) -> None:
        """Raise ValueError if a limit is above this host's own hard limit, which processes cannot raise."""
        for name, value, kind, unit, letter in (
            ("seconds", int(self.seconds) + SPARE_SECONDS, resource.RLIMIT_CPU, "seconds of processor time", "t"),
            ("memory_mb", self.memory_mb << 20, resource.RLIMIT_AS, "bytes of address space", "v"),
            ("open_files", self.open_files, resource.RLIMIT_NOFILE, "open files", "n"),
        ):
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY and value > hard:
                raise ValueError(
                    f"limits.{name}={getattr(self, name)} takes {value} {unit}, and the hard limit of this host is {hard}: "
                    f"lower limits.{name}, or raise the hard limit (ulimit -H{letter})"
                )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a program, e.g. `Outcome(Status.FAILED, "AssertionError:  (line 3 of the tests)", "sandlock", 0.02)`."""

    status: Status
    detail: str
    """A short reason; empty if it passed. The program writes part of it: it is for people, not for parsing. It is one line of
    printable characters: others are escaped, e.g. `\\x1b`."""
    isolation: IsolationName
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status is Status.PASSED


class Sandbox:
    """Processes that check programs, `workers` at a time (None: one per core). A context manager that any thread may use.

    `choose_isolation` tests and chooses the isolation unless it is given. Raises ValueError if there is none.
    """

    def __init__(
        self, limits: Limits | None = None, workers: int | None = None, isolation: IsolationName | None = None
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        self._count = cores if workers is None else workers
        if self._count < 1:
            raise ValueError(f"workers must be at least 1, got {workers!r}")
        self.limits = Limits() if limits is None else limits
        self.limits.check_host()
        self.isolation: IsolationName = choose_isolation(ISOLATIONS if isolation is None else (isolation,))
        self._lock = threading.Lock()
        self._runners: list[_Runner] = []

    def check(self, programs: Iterable[Program]) -> list[Outcome]:
        """Return the outcome of each program, in order."""
        todo = list(programs)
        outcomes: list[Outcome | None] = [None] * len(todo)
        failures: list[BaseException] = []
        queue = iter(range(len(todo)))

        def work(runner: _Runner) -> None:
            try:
                # next() of one iterator is atomic: every index goes to one thread.
                for index in queue:
                    if failures:
                        return
                    outcomes[index] = runner.ask(todo[index], self.limits)
            except BaseException as error:
                failures.append(error)

        with self._lock:
            while len(self._runners) < min(self._count, len(todo)):
                self._runners.append(_Runner(self.isolation))
            threads = [threading.Thread(target=work, args=(runner,), daemon=True) for runner in self._runners]
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            except BaseException as error:
                # An interrupt, for example: the programs are stopped, as their outcomes are not needed any more.
                failures.append(error)
                for runner in self._runners:
                    runner.hang_up()
                for thread in threads:
                    if thread.is_alive():
                        thread.join()
            if failures:
                self._stop()
                raise failures[0]
        return [outcome for outcome in outcomes if outcome is not None]

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        for runner in self._runners:
            runner.hang_up()
        for runner in self._runners:
            runner.close()
        self._runners.clear()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_programs(
    programs: Sequence[Program],
    limits: Limits | None = None,
    workers: int | None = None,
    isolation: IsolationName | None = None,
) -> list[Outcome]:
    """Return the outcomes of programs, in order; keep a `Sandbox` instead for repeated checks."""
    with Sandbox(limits, workers, isolation) as sandbox:
        return sandbox.check(programs)


@cache
def choose_isolation(names: tuple[IsolationName, ...] = ISOLATIONS) -> IsolationName:
    """Return the first isolation that holds against a program that tries to escape.

    Raises ValueError that names packages to install if none does.
    """
    reasons = []
    for name in names:
        reason = _try_out(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"untrusted programs are not run without isolation, and there is none here ({'; '.join(reasons)}): install bubblewrap "
        "0.8 or later (apt install bubblewrap) or sandlock (pip install sandlock; Linux 6.12 or later)"
    )


_ESCAPE = """
import os

def escapes():
    ways = {
        "read a file of the host": lambda: open(CANARY).read(),
        "write a file of the host": lambda: open(CANARY, "a").write("x"),
        "write beside it": lambda: open(CANARY + ".new", "w"),
        "delete it": lambda: os.unlink(CANARY),
        "change its mode": lambda: os.chmod(CANARY, 0o777),
        "list the host's processes": lambda: os.listdir("/proc"),
        "start a process": os.fork,
        "signal a process": lambda: os.kill(os.getppid(), 0),
    }
    found = []
    for name, way in ways.items():
        try:
            way()
            found.append(name)
        except OSError:
            pass
    return found
"""


_SMALL = Limits(memory_mb=64, open_files=8)
"""Limits of the test of an isolation: a host with low limits can have isolation too."""


def _try_out(name: IsolationName) -> str | None:
    """Return why an isolation does not hold on this machine; None if it holds."""
    try:
        make_isolation(name)
    except ValueError as error:
        return str(error)
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder, "canary")
        canary.write_text("host")
        program = Program(f"CANARY = {str(canary)!r}\n{_ESCAPE}", "found = candidate()\nassert found == [], found", "escapes")
        runner = _Runner(name)
        try:
            outcome = runner.ask(program, _SMALL)
        except OSError as error:
            return str(error)
        finally:
            runner.close()
    return None if outcome.passed else f"it does not hold: {outcome.status.value}, {outcome.detail}"


class _Runner:
    """A process of `runner.py`, with the socket for its jobs and results. One thread may ask at a time."""

    def __init__(self, isolation: IsolationName) -> None:
        self._isolation: IsolationName = isolation
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from neuromas.sandbox.runner import main; main({isolation!r})"
        # Only the variables that find programs and libraries: the environment may hold secrets.
        environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )

    def ask(self, program: Program, limits: Limits) -> Outcome:
        """Return the outcome of a program."""
        names = (program.entry_point, *program.helpers)
        sizes = (limits.seconds, limits.memory_mb << 20, limits.open_files, limits.output_bytes)
        try:
            write_frame(self._socket.fileno(), encode((program.source, program.tests, names, *sizes)))
            answer = read_frame(self._socket.fileno())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            raise OSError(f"the process that runs programs ended (exit code {self.process.returncode})") from None
        status, detail, seconds = decode(answer)  # type: ignore[misc]  # the runner's: a tuple of three
        if status == START_FAILED:
            raise OSError(f"no isolated process could be started with {self._isolation}: {detail}")
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in detail)
        return Outcome(Status(status), shown, self._isolation, seconds)

    def hang_up(self) -> None:
        """Make the process and its isolated processes end at once; a waiting `ask` raises."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._socket.close()
