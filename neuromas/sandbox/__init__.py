"""Run programs that nobody has read, each with its tests, and say which passed.

    from neuromas.sandbox import Program, check_programs
    outcomes = check_programs([Program("def add(a, b): return a + b", "assert add(2, 3) == 5", "add")])
    outcomes[0].passed  # True

A model that is rewarded for passing tests will sooner or later write whatever makes a checker say "passed": an early
`sys.exit(0)`, an object that equals everything, a search of the interpreter for what it must print. So passing is no exit code
and nothing
that the program could print. Three processes, none of which trusts the next one down:

    runner   (host)      starts a judge for each program, holds the clock and the secret, reads one short verdict
    judge    (isolated)  runs the tests of one program; each name they take from it is a handle that asks the worker
    worker   (isolated)  the judge's fork, holds the program and answers calls

Judge and worker serve one program and die with it. What the program sends is read by its own judge and by nobody else, so
there is nobody whom it could mislead about the next program. The tests, the expected values and the secret (random, new for
each program) reach the judge after the fork: the worker has no memory, file or pipe in which they are, and no system call that
reaches another process. What the program can do is answer, and an answer is read as plain data (`wire.py`): numbers, text,
lists, dicts, sets. `assert f(x) == 3` compares an `int` made by the judge's own interpreter; an `__eq__` stays where it was
written. After the last line of the tests the judge gives the secret back, and that is passing.

Two walls stand between program and host (and tests and host): `isolation.py`, bubblewrap or else sandlock, which takes away the
files, and `confine.py`, an allow-list of system calls and hard limits on resources. The isolation is tried out before it is
trusted, with a program that tries to get out. If none holds, that is an error: a program is never run on the bare host.

What this costs. Objects that are no plain data stay in the worker behind a handle: tests can pass them back, call them, set
their attributes and iterate over them, but not compare them, and what they say of themselves is the program's word. Arguments
are copies: a program that should change its argument in place is not seen to. Tests cannot pass functions. There are no
threads, no subprocesses, no files to write, no packages beyond the standard library. What tests do not check is not checked: a
program that knows the tests' inputs by heart passes.
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
    """How a program fared. Compare with `is`."""

    PASSED = "passed"
    """Every test held, and the judge said so with the program's secret."""
    FAILED = "failed"
    """A test did not hold, or raised."""
    INVALID = "invalid"
    """The program could not be loaded: a syntax error, an exception, an exit."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    """The program said that it ran out of memory (it may also crash of it)."""
    OUTPUT = "output"
    """It returned more than allowed."""
    CRASHED = "crashed"
    """Its process ended before its tests did."""


@dataclass(frozen=True, slots=True)
class Program:
    """An untrusted program with its tests, e.g. `Program("def f(x): ...", "assert f(1) == 2", "f")`."""

    source: str
    tests: str
    """Python that raises unless the program is right. It finds the function as `candidate` and under its own name."""
    entry_point: str
    """The function under test."""
    helpers: tuple[str, ...] = ()
    """Further names that the tests take from the program. Every other name is the tests' own or Python's, so that a program
    that defines `sorted` or `abs` changes nothing in them."""

    def __post_init__(self) -> None:
        for name in (self.entry_point, *self.helpers):
            if not name.isidentifier():
                raise ValueError(f"entry_point and helpers must be Python names, got {name!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one program may use. Not to be set: one process, one thread, no network, no file to write, no package to import."""

    seconds: float | int = 10
    """Wall-clock time for one program with all its tests."""
    memory_mb: int = 512
    """Address space in MiB, of the program and, separately, of its tests."""
    open_files: int = 32
    output_bytes: int = 64 << 20
    """Size of all that the program returns to the tests. What it prints goes nowhere."""

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
        """Raise ValueError if a limit is above this host's own hard limit, under which no program could be given it."""
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
    """What became of a program, e.g. `Outcome(Status.FAILED, "AssertionError:  (line 3 of the tests)", "sandlock", 0.02)`."""

    status: Status
    detail: str
    """A few words on why; empty if it passed. Partly the program's own: for people, not to be parsed. One line of printable
    characters: others are spelled out, e.g. `\\x1b`."""
    isolation: IsolationName
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status is Status.PASSED


class Sandbox:
    """Processes that check programs, `workers` at a time (None: one per core). A context manager; may be used from any thread.

    `isolation` is chosen by trying (`choose_isolation`) unless it is given. Raises ValueError if there is none.
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
                # An interrupt, for one: nobody waits for the outcomes any more, however long the programs would run.
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
    """Check programs once, in order; keep a `Sandbox` instead where this happens again and again."""
    with Sandbox(limits, workers, isolation) as sandbox:
        return sandbox.check(programs)


@cache
def choose_isolation(names: tuple[IsolationName, ...] = ISOLATIONS) -> IsolationName:
    """Return the first isolation that holds against a program that tries to get out.

    Raises ValueError with what to install if none does.
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
"""A host whose own limits are low has isolation nevertheless."""


def _try_out(name: IsolationName) -> str | None:
    """Return why an isolation is not to be trusted on this machine, None if it is."""
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
    """A process of `runner.py` and the socket on which it takes jobs and gives results. One thread may ask at a time."""

    def __init__(self, isolation: IsolationName) -> None:
        self._isolation: IsolationName = isolation
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from neuromas.sandbox.runner import main; main({isolation!r})"
        # Of the environment only what finds programs and libraries: no token that happens to be there.
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
        """Make it end with its isolated processes, whatever they are doing; whoever waits for it hears of it at once."""
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
