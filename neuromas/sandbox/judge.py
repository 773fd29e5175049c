"""Runs the tests of one program and says how they went, with the program's secret if they hold. Then it ends.

The program is in a fork, the worker, made before anything is known of program, tests or secret. The tests see the program's
functions as handles: a call travels to the worker and comes back as plain data, so an assertion compares values that were made
here, by the interpreter's own types. Both processes serve one program, confine themselves before it is loaded, and die with it:
nothing that a program writes is ever read by anything that serves another. The tests are trusted to say what passing means, and
with nothing else.
"""

import builtins
import os
import sys
from _collections_abc import Callable  # what `collections.abc` shows; importing that costs 2 ms

from neuromas.sandbox.confine import confine
from neuromas.sandbox.wire import TooLongError, decode, encode, read_frame, write_frame
from neuromas.sandbox.worker import LOADED, MESSAGE_CHARACTERS, serve

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing it costs as much as starting Python
    from typing import NoReturn

READY = b"ready"
"""The first frame of a judge: isolated, its worker forked. The second and last is its verdict."""

VERDICT_BYTES = 8 << 10
"""What a verdict takes at most: the status, a line end, and the secret or a few words."""

_COMPLAINT_BYTES = 4 << 10
_FILES = 256
"""More than the files that a judge has open."""


class ProgramError(Exception):
    """The program raised an exception that is none of Python's own, or one that iteration in the tests would swallow."""


class Program:
    """The worker's end of the channel, seen from the tests."""

    def __init__(self, reading: int, writing: int, verdicts: int, output_bytes: int) -> None:
        self._reading, self._writing, self._verdicts, self._room = reading, writing, verdicts, output_bytes
        self.calls = 0

    def load(self, source: str, limits: tuple[int, ...]) -> None:
        """End with a verdict unless the program could be loaded."""
        request = encode((source, *limits))
        complaint = str(self._exchange(request, _COMPLAINT_BYTES, lambda data: data.decode("utf-8", "replace")))
        if complaint != LOADED:
            status = "memory" if complaint.startswith("MemoryError") else "invalid"
            self.end(status, complaint[:MESSAGE_CHARACTERS])

    def ask(self, operation: str, *arguments: object) -> object:
        """Return the worker's answer, or raise what the program raised."""
        request = encode((operation, *arguments), _number)
        self.calls += operation == "call"
        answer = self._exchange(request, self._room, lambda data: decode(data, lambda number: Handle(self, number)))
        match answer:
            case ("value", _):
                return answer[1]
            case ("raise", str(name), str(message)):
                raise _error(operation, name, message)
            case ("end", str(name), str(message)):
                return self.end("crashed", f"the program ended itself: {name}: {message}")
            case _:
                return self.end("failed", "unreadable answer")

    def end(self, status: str, detail: str) -> "NoReturn":
        """Give the verdict and end the process, past every `except` and `finally` of the tests."""
        try:
            write_frame(self._verdicts, f"{status}\n{detail}".encode("utf-8", "replace")[:VERDICT_BYTES])
        finally:
            os._exit(0)

    def _exchange(self, request: bytes, limit: int, read: Callable[[bytes], object]) -> object:
        """Return what the worker says to a request. What cannot be read to its end ends the process: nobody reads on."""
        whole = False
        try:
            write_frame(self._writing, request)
            data = read_frame(self._reading, limit)
            self._room -= len(data)
            answer = read(data)
            whole = True
            return answer
        except TooLongError:
            self.end("output", "more bytes of results than allowed")
        except (EOFError, OSError):
            self.end("crashed", "the program's process ended before its tests did")
        except MemoryError:
            self.end("memory", "MemoryError")
        except BaseException as error:
            self.end("failed", f"unreadable answer: {type(error).__name__}")
        finally:
            if not whole:
                os._exit(0)


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

    def __bool__(self) -> "NoReturn":
        raise TypeError("the program returned an object of its own where the tests need plain data")


def main() -> None:
    jobs, verdicts = _take_channel()
    reading, writing = _start_worker()
    write_frame(verdicts, READY)
    source, tests, names, secret, output_bytes, *limits = decode(read_frame(jobs))  # type: ignore[misc]  # the runner's: a tuple
    os.close(jobs)
    confine(*limits)
    program = Program(reading, writing, verdicts, output_bytes)
    program.load(source, tuple(limits))
    program.end(*_run_tests(program, tests, names, secret))


def _take_channel() -> tuple[int, int]:
    """Move the pipes away from standard input and output, which become /dev/null: printing is no answer."""
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    return reading, writing


def _start_worker() -> tuple[int, int]:
    """Fork the worker and return the two ends of its pipes that are ours. It keeps its own two and no other file."""
    requests, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            low, high = sorted((requests[0], answers[1]))
            for first, end in ((3, low), (low + 1, high), (high + 1, _FILES)):
                os.closerange(first, end)
            serve(requests[0], answers[1])
        finally:
            os._exit(0)
    os.close(requests[0])
    os.close(answers[1])
    return answers[0], requests[1]


def _run_tests(program: Program, tests: str, names: tuple[str, ...], secret: str) -> tuple[str, str]:
    """Return ("passed", secret), or another status and why."""
    try:
        namespace: dict[str, object] = {"__name__": "tests", "__builtins__": builtins}
        root = Handle(program, 0)
        namespace |= {name: program.ask("name", root, name) for name in names}
        namespace["candidate"] = namespace[names[0]]
        exec(compile(tests, "tests.py", "exec", dont_inherit=True, optimize=0), namespace)
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:
        return "failed", _describe(error)
    if not program.calls:
        return "failed", "the tests never called the program"
    return "passed", secret


def _number(value: object) -> int:
    if not isinstance(value, Handle):
        raise TypeError(f"only plain data can be passed to the program, got {type(value).__name__!r}")
    return value._number


def _error(operation: str, name: str, message: str) -> Exception:
    """Return the exception of Python's own that has this name, or else a `ProgramError`.

    StopIteration ends whatever loop of the tests it passes (`all(map(f, ...))`), so it is one only where an iterator of the
    program is asked for its next item.
    """
    kind = getattr(builtins, name, None)
    swallowed = name in ("StopIteration", "StopAsyncIteration") and (operation, name) != ("next", "StopIteration")
    if isinstance(kind, type) and issubclass(kind, Exception) and not swallowed:
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
    try:
        # What `assert got == 5, got` raises holds the program's answer, of any size: only its beginning is put in words.
        text = _brief(error.args[0], MESSAGE_CHARACTERS) if len(error.args) == 1 else str(error)
    except BaseException as unprintable:
        text = f"<{type(unprintable).__name__}>"
    return f"{type(error).__name__}: {text}"[:MESSAGE_CHARACTERS] + line


def _brief(value: object, room: int, show: Callable[[object], str] = str) -> str:
    """Return the beginning of `str(value)`, in time and memory that do not grow with the value."""
    if isinstance(value, (str, bytes)):
        return show(value[:room])
    if isinstance(value, int):
        # Python refuses to print longer ones.
        return show(value) if value.bit_length() < 4 * room else f"<int of {value.bit_length()} bits>"
    if not isinstance(value, (list, tuple, set, frozenset, dict)):
        return show(value)
    words: list[str] = []
    left = room
    for item in value.items() if isinstance(value, dict) else value:
        if left <= 0:
            words.append("...")
            break
        words.append(": ".join(_brief(part, left - 1, repr) for part in (item if isinstance(value, dict) else (item,))))
        left -= len(words[-1]) + 2
    opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")") if isinstance(value, tuple) else ("{", "}")
    return f"{opening}{', '.join(words)}{closing}"


if sys.flags.optimize:
    raise SystemExit("the judge needs assertions: run Python without -O")
