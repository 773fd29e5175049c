"""Holds one untrusted program and answers calls to it, in a process that never sees the tests or the secret.

Whatever the program does to this process (patch builtins, walk frames, write to the channel itself), all that leaves is a frame
that the judge reads as plain data: the worst it can achieve is what it may do anyway, to answer.
"""

import sys
from _collections_abc import Callable  # what `collections.abc` shows; importing that costs 2 ms

from neuromas.sandbox.confine import confine
from neuromas.sandbox.wire import decode, encode, read_frame, write_frame

LOADED = ""
"""The first frame of a worker if the program was loaded; otherwise it says in words why not."""

MESSAGE_CHARACTERS = 300
_ARGUMENT_BYTES = 4 << 10
"""Longest arguments of an exception, as bytes, that are sent beside its message."""


class _Own:
    """A value that is sent as a handle whatever it is: `solve = set` is a function of the program like any other."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


def serve(reading: int, writing: int) -> None:
    """Load the program that the first frame holds, then answer calls until the judge is gone."""
    source, *limits = decode(read_frame(reading))  # type: ignore[misc]  # the judge's: a tuple
    confine(*limits)
    # What can be imported: the standard library and nothing else, this package neither.
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
    """What the tests have handles of. Everything is kept, so that one object has one number for ever, and no other has it."""

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
    """Do what a request says and return ("value", value), ("raise", *_complaint(error)) or ("end", type, message) as bytes."""
    try:
        operation, target, *arguments = decode(request, objects.find)  # type: ignore[misc]  # the judge's: a tuple
        return encode(("value", _OPERATIONS[operation](target, *arguments)), objects.number)
    except Exception as error:
        return encode(("raise", *_complaint(error)))
    except BaseException as error:
        return encode(("end", *_describe(error)))


def _complaint(error: Exception) -> tuple[str, str, str, tuple[object, ...]]:
    """Return the nearest of Python's own exceptions that it is, its own name, its message and, if plain data, its arguments."""
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
    # What the tests gave an iterator for came as a list: by its place or its name.
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
