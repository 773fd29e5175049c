"""Runs the tests of one program and writes a verdict, with the program's secret if they hold. Then it ends.

The program is in a fork, the worker, which starts before the judge has program, tests or secret. The tests see the program's
functions as handles: a call is sent to the worker and its result returns as plain data, so an assertion compares values that
were made here, of the interpreter's own types. Both processes serve one program, confine themselves before it is loaded, and
end with it: no process that serves another program reads the bytes of this one. The tests are trusted to define passing, and
with nothing else.
"""

import builtins
import os
import sys
from _collections_abc import Callable  # what `collections.abc` shows; importing that costs 2 ms
from itertools import islice

from neuromas.sandbox.confine import confine
from neuromas.sandbox.wire import TooLongError, decode, encode, read_frame, write_frame
from neuromas.sandbox.worker import LOADED, MESSAGE_CHARACTERS, serve

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing it costs as much as starting Python
    from typing import NoReturn

READY = b"ready"
"""The first frame of a judge: it is isolated and has forked its worker. The second and last frame is its verdict."""

VERDICT_BYTES = 8 << 10
"""Most bytes of a verdict: the status, a line end, and the secret or a short reason."""

_COMPLAINT_BYTES = 4 << 10
_ITERATOR_ITEMS = 1 << 20
"""Most items of an iterator that the tests pass: all are read before the call."""
_FILES = 256
"""More than the number of files that a judge has open."""


class ProgramError(Exception):
    """The program raised its own exception, or one that iteration in the tests would swallow."""


class Program:
    """The worker, as the tests reach it."""

    def __init__(self, reading: int, writing: int, verdicts: int, output_bytes: int, swallowed: frozenset[str]) -> None:
        """`swallowed` are the exceptions that loops in these tests would take for the end of an iteration."""
        self._reading, self._writing, self._verdicts, self._room = reading, writing, verdicts, output_bytes
        self._swallowed = swallowed
        self._handles: dict[int, Handle] = {}
        self.calls = 0

    def load(self, source: str, limits: tuple[int, ...]) -> None:
        """Load the program; end with a verdict if it cannot be loaded."""
        request = encode((source, *limits))
        complaint = str(self._exchange(request, _COMPLAINT_BYTES, lambda data: data.decode("utf-8", "replace")))
        if complaint != LOADED:
            status = "memory" if complaint.startswith("MemoryError") else "invalid"
            self.end(status, complaint[:MESSAGE_CHARACTERS])

    def ask(self, operation: str, *arguments: object) -> object:
        """Return the worker's answer, or raise what the program raised."""
        try:
            request = encode((operation, *arguments), _number)
        except Exception as error:
            # Tests that expect an exception would take one raised here for the program's.
            self.end("failed", f"a call cannot be made: {type(error).__name__}: {error}")
        self.calls += operation == "call"
        answer = self._exchange(request, self._room, lambda data: decode(data, self.handle))
        match answer:
            case ("value", _):
                return answer[1]
            case ("raise", str(kind), str(name), str(message), tuple(args)):
                raise self._error(operation, kind, name, message, args)
            case ("end", str(name), str(message)):
                return self.end("crashed", f"the program ended itself: {name}: {message}")
            case _:
                return self.end("failed", "unreadable answer")

    def read_iterator(self, iterator: object) -> list[object]:
        """Return the remaining items of an iterator of the tests."""
        items: list[object] = list(islice(iterator, _ITERATOR_ITEMS + 1))  # type: ignore[arg-type]  # an iterator
        if len(items) > _ITERATOR_ITEMS:
            self.end("failed", f"an iterator of more than {_ITERATOR_ITEMS} items cannot be passed to the program")
        return items

    def refuse(self) -> "NoReturn":
        """End the judge where the tests compare an object of the program."""
        self.end("failed", "the program returned an object of its own where the tests compare plain data")

    def handle(self, number: int) -> "Handle":
        """Return the handle of a number; the same object of the program always has the same handle."""
        if number not in self._handles:
            self._handles[number] = Handle(self, number)
        return self._handles[number]

    def _error(self, operation: str, kind: str, name: str, message: str, args: tuple[object, ...]) -> Exception:
        """Return the built-in exception that the program raised, or else a `ProgramError`.

        A StopIteration would end any loop of the tests (`all(map(f, ...))`), so it is raised only for the next item of an
        iterator of the program.
        """
        known = getattr(builtins, kind, None)
        swallowed = kind in self._swallowed and (operation, kind) != ("next", "StopIteration")
        own = kind == "Exception" != name
        if isinstance(known, type) and issubclass(known, Exception) and not swallowed and not own:
            for given in (args, (message,)):
                try:
                    error = known(*given)
                    if _is_sound(error) and (given is not args or str(error)[:MESSAGE_CHARACTERS] == message):
                        return error
                except Exception:
                    # The exception needs other arguments, or has no text.
                    continue
        return ProgramError(f"{name}: {message}")

    def end(self, status: str, detail: str) -> "NoReturn":
        """Write the verdict and end the process; no `except` or `finally` of the tests runs."""
        try:
            write_frame(self._verdicts, f"{status}\n{detail}".encode("utf-8", "replace")[:VERDICT_BYTES])
        finally:
            os._exit(0)

    def _exchange(self, request: bytearray, limit: int, read: Callable[[bytearray], object]) -> object:
        """Return the worker's answer to a request. An answer that cannot be decoded ends the process."""
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
    """A function or object of the program; one object has one handle.

    Tests can find that it is itself and that it is not None. Any other comparison, and its truth value, ends the judge, since
    the program could make it come out either way.
    """

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: object, **kwargs: object) -> object:
        iterators = [place for place, value in (*enumerate(args), *kwargs.items()) if _is_iterator(value)]
        if iterators:
            read = self._program.read_iterator
            args = tuple(read(value) if place in iterators else value for place, value in enumerate(args))
            kwargs = {name: read(value) if name in iterators else value for name, value in kwargs.items()}
        return self._program.ask("call", self, args, kwargs, iterators)

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

    def __reversed__(self) -> object:
        # Python's default would take an IndexError of the program for the end.
        for place in range(len(self) - 1, -1, -1):  # type: ignore[arg-type]  # Python checks that it is a number
            yield self[place]

    def __eq__(self, other: object) -> bool:
        if other is not self and other is not None:
            self._program.refuse()
        return other is self

    def __hash__(self) -> int:
        return self._program.refuse()

    def __bool__(self) -> bool:
        return self._program.refuse()

    def __str__(self) -> str:
        return self._program.ask("str", self)  # type: ignore[return-value]  # Python checks that it is text

    def __repr__(self) -> str:
        return self._program.ask("repr", self)  # type: ignore[return-value]


def main() -> None:
    jobs, verdicts = _take_channel()
    reading, writing = _start_worker()
    write_frame(verdicts, READY)
    source, tests, names, secret, output_bytes, *limits = decode(read_frame(jobs))  # type: ignore[misc]  # the runner's: a tuple
    os.close(jobs)
    confine(*limits)
    # Iteration over a class of the tests with __getitem__ ends when that raises.
    ends = ("IndexError", "KeyError", "LookupError") if "__getitem__" in tests else ()
    program = Program(reading, writing, verdicts, output_bytes, frozenset(("StopIteration", "StopAsyncIteration", *ends)))
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
    """Fork the worker and return our two ends of its pipes. The worker keeps its own two and no other file."""
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
        root = program.handle(0)
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


def _is_iterator(value: object) -> bool:
    return not isinstance(value, Handle) and hasattr(type(value), "__next__")


def _number(value: object) -> int:
    if not isinstance(value, Handle):
        raise TypeError(f"only plain data can be passed to the program, got {type(value).__name__!r}")
    return value._number


def _is_sound(error: Exception) -> bool:
    """Return whether an error can be printed: Python reads out of bounds if its position is outside of its text."""
    if isinstance(error, (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)):
        _, start, end, _ = error.args[-4:]
        return 0 <= start < end <= len(error.object)
    return True


def _describe(error: BaseException) -> str:
    line, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            line = f" (line {trace.tb_lineno} of the tests)"
        trace = trace.tb_next
    try:
        # `assert got == 5, got` raises with the program's answer, of any size: only its beginning becomes text.
        text = _brief(error.args[0], MESSAGE_CHARACTERS) if len(error.args) == 1 else str(error)
    except BaseException as unprintable:
        text = f"<{type(unprintable).__name__}>"
    return f"{type(error).__name__}: {text}"[:MESSAGE_CHARACTERS] + line


def _brief(value: object, room: int, show: Callable[[object], str] = str) -> str:
    """Return the beginning of `str(value)`, in time and memory that do not grow with the value."""
    if isinstance(value, (str, bytes)):
        return show(value[:room])
    if isinstance(value, int):
        # Python refuses to print longer integers.
        return show(value) if value.bit_length() < 4 * room else f"<int of {value.bit_length()} bits>"
    if isinstance(value, Handle):
        # Its text would need a call to the program.
        return "<object of the program>"
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
