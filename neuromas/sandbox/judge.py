"""Runs the tests of one program after another, each in a fork of its own, and prints the program's secret if they hold.

The tests see the program's functions as handles: a call travels to the worker and comes back as plain data, so an assertion
compares values that were made here, by the interpreter's own types. The fork confines itself just as the worker does. The tests
are trusted to say what passing means, and with nothing else.
"""

import builtins
import os
import sys
from typing import NoReturn

from neuromas.sandbox.confine import confine
from neuromas.sandbox.wire import decode, encode, read_frame, write_frame
from neuromas.sandbox.worker import MESSAGE_CHARACTERS, READY, take_channel

TESTS, ANSWER = b"T", b"A"
"""First byte of a frame to the judge: the tests of the next program, or what the worker answered."""
CALL, VERDICT, ENDED = b"C", b"V", b"E"
"""First byte of a frame from the judge: a request to the worker, how the tests went, or that they ended without a verdict."""


_DONE = 86
"""Exit code of a fork that has given its verdict. The verdict is what counts: this only says that there is none to wait for."""


class ProgramError(Exception):
    """The program raised an exception that is none of Python's own."""


class ProgramEnded(BaseException):
    """The program ended itself while it was called; not an `Exception`, so that no test takes it for an error it expects."""


class Program:
    """The worker's end of the channel, seen from the tests."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self.calls = 0

    def ask(self, operation: str, *arguments: object) -> object:
        """Return the worker's answer, or raise what the program raised."""
        write_frame(self._writing, CALL + encode((operation, *arguments), _number))
        answer = read_frame(self._reading)[1:]
        self.calls += operation == "call"
        kind, *rest = decode(answer, lambda number: Handle(self, number))  # type: ignore[misc]  # if it is no tuple, it fails
        if kind == "raise":
            raise _error(*map(str, rest))
        if kind == "end":
            raise ProgramEnded(": ".join(map(str, rest)))
        (value,) = rest
        return value


class Handle:
    """A function or object of the program. Equal to nothing but itself, neither true nor false: only plain data is compared."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._program.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"{name!r} of the program's objects is out of the tests' reach")
        return self._program.ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._program.ask("set", self, name, value)

    def __getitem__(self, key: object) -> object:
        return self._program.ask("item", self, key)

    def __iter__(self) -> object:
        return self._program.ask("iter", self)

    def __next__(self) -> object:
        return self._program.ask("next", self)

    def __len__(self) -> object:
        return self._program.ask("len", self)

    def __bool__(self) -> NoReturn:
        raise TypeError("the program returned an object of its own where the tests need plain data")


def main() -> None:
    reading, writing = take_channel()
    write_frame(writing, READY)
    while True:
        try:
            frame = read_frame(reading)
        except EOFError:
            return
        if frame[:1] != TESTS:
            continue
        child = os.fork()
        if child == 0:
            try:
                write_frame(writing, VERDICT + encode(_run_tests(frame[1:], reading, writing)))
            finally:
                os._exit(_DONE)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != _DONE:
            write_frame(writing, ENDED)


def _run_tests(payload: bytes, reading: int, writing: int) -> tuple[str, str]:
    """Return ("passed", secret), or another status and why."""
    tests, names, entry_point, secret, *limits = decode(payload)  # type: ignore[misc]  # the runner's: a tuple
    confine(*limits)
    program = Program(reading, writing)
    try:
        namespace: dict[str, object] = {"__name__": "tests", "__builtins__": builtins}
        root = Handle(program, 0)
        namespace |= {name: program.ask("get", root, name) for name in names}
        namespace["candidate"] = namespace[entry_point]
        exec(compile(tests, "tests.py", "exec", dont_inherit=True, optimize=0), namespace)
    except MemoryError:
        return "memory", "MemoryError"
    except ProgramEnded as error:
        return "crashed", f"the program ended itself: {error}"
    except BaseException as error:
        return "failed", _describe(error)
    if not program.calls:
        return "failed", "the tests never called the program"
    return "passed", secret


def _number(value: object) -> int:
    if not isinstance(value, Handle):
        raise TypeError(f"only plain data can be passed to the program, got {type(value).__name__!r}")
    return value._number


def _error(name: str, message: str) -> Exception:
    """Return the exception of Python's own that has this name, or else a `ProgramError`."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:
            # UnicodeDecodeError and its like want more than a message.
            pass
    return ProgramError(f"{name}: {message}")


def _describe(error: BaseException) -> str:
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            line = f" (line {trace.tb_lineno} of the tests)"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}"[:MESSAGE_CHARACTERS] + line


if sys.flags.optimize:
    raise SystemExit("the judge needs assertions: run Python without -O")
