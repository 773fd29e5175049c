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
    objects: list[object] = [program]
    while True:
        write_frame(writing, _answer(read_frame(reading), objects))


def _answer(request: bytes, objects: list[object]) -> bytes:
    """Do what a request says and return ("value", value), ("raise", type, message) or ("end", type, message) as bytes."""

    def number(value: object) -> int:
        objects.append(value.value if type(value) is _Own else value)
        return len(objects) - 1

    try:
        operation, target, *arguments = decode(request, objects.__getitem__)  # type: ignore[misc]  # the judge's: a tuple
        return encode(("value", _OPERATIONS[operation](target, *arguments)), number)
    except Exception as error:
        return encode(("raise", *_describe(error)))
    except BaseException as error:
        return encode(("end", *_describe(error)))


def _describe(error: BaseException) -> tuple[str, str]:
    name = str(type(error).__name__)[:MESSAGE_CHARACTERS]
    try:
        return name, str(error)[:MESSAGE_CHARACTERS]
    except BaseException:
        return name, ""


def _name(target: object, name: str) -> object:
    value = getattr(target, name)
    return _Own(value) if callable(value) else value


_OPERATIONS: dict[str, Callable[..., object]] = {
    "name": _name,
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "len": len,
    "iter": iter,
    "next": next,
}
