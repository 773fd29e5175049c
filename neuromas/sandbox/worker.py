"""Holds one untrusted program and answers calls to it, in a process that never sees the tests or the secret.

The program may change this process in any way (patch builtins, walk frames, write to the channel), but the judge decodes its
frames as plain data only: all that it can achieve is an answer, which it may give anyway.
"""

import sys
from _collections_abc import Callable  # what `collections.abc` shows; importing that costs 2 ms

from neuromas.sandbox.confine import confine
from neuromas.sandbox.wire import decode, encode, read_frame, write_frame

LOADED = ""
"""The first frame of a worker if the program was loaded; otherwise that frame holds the reason."""

MESSAGE_CHARACTERS = 300
_ARGUMENT_BYTES = 4 << 10
"""Most bytes of an exception's arguments that are sent in addition to its message."""


class _Own:
    """A value that is always sent as a handle: `solve = set` is a function of the program like any other."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def serve(reading: int, writing: int) -> None:
    """Load the program of the first frame, then answer calls until the judge has ended."""
    source, *limits = decode(read_frame(reading))  # type: ignore[misc]  # the judge's: a tuple
    confine(*limits)
    # Only the standard library can be imported, not this package.
    for name in [name for name in sys.modules if name.partition(".")[0] == "neuromas"]:
        del sys.modules[name]
    program = type(sys)("program")
    sys.modules["program"] = program
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True, optimize=0), program.__dict__)
    except BaseException as error:
        write_frame(writing, ": ".join(_describe(error)).encode("utf-8", "replace"))
        return
    write_frame(writing, LOADED.encode())
    objects = _Objects()
    objects.number(program)
    while True:
        write_frame(writing, _answer(read_frame(reading), objects))


class _Objects:
    """The objects that the tests have handles of. All are kept, so that an object's number is never changed or reused."""

    def __init__(self) -> None:
        self._kept: list[object] = []
        self._numbers: dict[int, int] = {}

    def number(self, value: object) -> int:
        value = value.value if type(value) is _Own else value
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._kept)
            self._kept.append(value)
        return self._numbers[id(value)]

    def find(self, number: int) -> object:
        return self._kept[number]


def _answer(request: bytes | bytearray, objects: _Objects) -> bytearray:
    """Execute a request and return ("value", value), ("raise", *_complaint(error)) or ("end", type, message) as bytes."""
    try:
        operation, target, *arguments = decode(request, objects.find)  # type: ignore[misc]  # the judge's: a tuple
        return encode(("value", _OPERATIONS[operation](target, *arguments)), objects.number)
    except Exception as error:
        return encode(("raise", *_complaint(error)))
    except BaseException as error:
        return encode(("end", *_describe(error)))


def _complaint(error: Exception) -> tuple[str, str, str, tuple[object, ...]]:
    """Return an error's nearest built-in class, its own name, its message and, if they are plain data, its arguments."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
    name, message = _describe(error)
    try:
        arguments = error.args
        if len(encode(arguments)) > _ARGUMENT_BYTES:
            arguments = (message,)
    except BaseException:
        arguments = (message,)
    return kind, name, message, arguments


def _describe(error: BaseException) -> tuple[str, str]:
    name = str(type(error).__name__)[:MESSAGE_CHARACTERS]
    try:
        return name, str(error)[:MESSAGE_CHARACTERS]
    except BaseException:
        return name, ""


def _name(target: object, name: str) -> object:
    value = getattr(target, name)
    return _Own(value) if callable(value) else value


def _call(target: Callable[..., object], args: "list[object]", kwargs: dict[str, object], iterators: list[object]) -> object:
    # Arguments that were iterators in the tests arrive as lists; `iterators` holds their positions and names.
    args = [iter(value) if place in iterators else value for place, value in enumerate(args)]  # type: ignore[call-overload]
    kwargs = {name: iter(value) if name in iterators else value for name, value in kwargs.items()}  # type: ignore[call-overload]
    return target(*args, **kwargs)


_OPERATIONS: dict[str, Callable[..., object]] = {
    "name": _name,
    "call": _call,
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "len": len,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
}
