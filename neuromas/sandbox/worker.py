"""Holds one untrusted program and answers calls to it, in an isolated process that never sees the tests or the secret.

Whatever the program does to this process (patch builtins, walk frames, write to the channel itself), all that leaves is a frame
that the judge reads as plain data: the worst it can achieve is what it may do anyway, to answer.
"""

import os
import sys
from _collections_abc import Callable  # what `collections.abc` shows; importing that costs a worker 2 ms

from neuromas.sandbox.confine import confine
from neuromas.sandbox.wire import decode, encode, read_frame, write_frame

READY = b"ready"
"""The first frame of a worker or judge: isolated and confined, before it runs anything that is not ours."""

LOADED = b""
"""The next frame of a worker if the program was loaded; otherwise it says in words why not."""

MESSAGE_CHARACTERS = 300


def take_channel() -> tuple[int, int]:
    """Move the pipes away from standard input and output, which become /dev/null: printing is no answer."""
    reading, writing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    return reading, writing


def main() -> None:
    reading, writing = take_channel()
    source, memory_bytes, cpu_seconds, open_files = decode(read_frame(reading))  # type: ignore[misc]  # ours: a tuple of four
    confine(memory_bytes, cpu_seconds, open_files)
    write_frame(writing, READY)
    # What can be imported: the standard library and nothing else, this package neither.
    for name in [name for name in sys.modules if name.partition(".")[0] == "neuromas"]:
        del sys.modules[name]
    program = type(sys)("program")
    sys.modules["program"] = program
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True, optimize=0), program.__dict__)
    except BaseException as error:
        write_frame(writing, ": ".join(_describe(error)).encode("utf-8", "replace") or b"an exception")
        return
    write_frame(writing, LOADED)
    objects: list[object] = [program]
    while True:
        write_frame(writing, _answer(read_frame(reading), objects))


def _answer(request: bytes, objects: list[object]) -> bytes:
    """Do what a request says and return ("value", value), ("raise", type, message) or ("end", type, message) as bytes."""

    def number(value: object) -> int:
        objects.append(value)
        return len(objects) - 1

    try:
        operation, target, *arguments = decode(request, objects.__getitem__)  # type: ignore[misc]  # the judge's: a tuple
        return encode(("value", _OPERATIONS[operation](target, *arguments)), number)
    except Exception as error:
        return encode(("raise", *_describe(error)))
    except BaseException as error:
        return encode(("end", *_describe(error)))


def _describe(error: BaseException) -> tuple[str, str]:
    name = str(type(error).__name__)
    try:
        return name, str(error)[:MESSAGE_CHARACTERS]
    except BaseException:
        return name, ""


_OPERATIONS: dict[str, Callable[..., object]] = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "len": len,
    "iter": iter,
    "next": next,
}
