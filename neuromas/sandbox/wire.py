"""Plain Python data as bytes, and frames of bytes on a pipe.

What crosses between the tests and an untrusted program is built here from `None`, `bool`, `int`, `float`, `complex`, `str`,
`bytes`, `list`, `tuple`, `set`, `frozenset`, `dict` and the names of these types, and from nothing else: decoding calls no code
of the sender, so no value can bring an `__eq__`, a `__reduce__` or a class of its own. Anything else crosses as a handle, a
number that means something to its owner only.

    encode((1, "a"))  ->  b"t" + 2 + (b"i" + 1 + b"\\x01") + (b"s" + 1 + b"a"), counts as four bytes

A format of our own, because the others cost more: `pickle` and `marshal` are not safe to read, and importing `json` takes
longer than starting the program.
"""

import os
import struct
from _collections_abc import Callable  # what `collections.abc` shows; importing that costs a worker 2 ms

_COUNT = struct.Struct("<I")
_FLOAT = struct.Struct("<d")
_CONSTANTS: dict[bytes, object] = {b"N": None, b"T": True, b"F": False}
_SEQUENCES: tuple[tuple[type, bytes], ...] = ((list, b"l"), (tuple, b"t"), (set, b"e"), (frozenset, b"z"))
_TYPES: dict[str, type] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None))
}
_SEQUENCE_TAGS = dict(_SEQUENCES)
_SEQUENCE_TYPES: dict[bytes, type] = {tag: kind for kind, tag in _SEQUENCES}


def _no_handle(value: object) -> int:
    raise TypeError(f"only plain data can be passed to the program, got {type(value).__name__!r}")


def _no_object(number: int) -> object:
    raise ValueError(f"handle {number} where plain data was expected")


def encode(value: object, handle: Callable[[object], int] = _no_handle) -> bytes:
    """Return `value` as bytes; `handle` numbers what is not plain data. A subclass of a plain type is sent as that type."""
    parts: list[bytes] = []
    _encode(value, parts.append, handle)
    return b"".join(parts)


def _encode(value: object, put: Callable[[bytes], None], handle: Callable[[object], int]) -> None:
    if value is None or value is True or value is False:
        put(b"N" if value is None else b"T" if value is True else b"F")
    elif isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        put(b"i" + _COUNT.pack(len(data)) + data)
    elif isinstance(value, float):
        put(b"f" + _FLOAT.pack(value))
    elif isinstance(value, complex):
        put(b"c" + _FLOAT.pack(value.real) + _FLOAT.pack(value.imag))
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        put(b"s" + _COUNT.pack(len(data)) + data)
    elif isinstance(value, bytes):
        put(b"b" + _COUNT.pack(len(value)) + value)
    elif isinstance(value, dict):
        put(b"d" + _COUNT.pack(len(value)))
        for key, item in value.items():
            _encode(key, put, handle)
            _encode(item, put, handle)
    elif isinstance(value, (list, tuple, set, frozenset)):
        tag = _SEQUENCE_TAGS.get(type(value)) or next(tag for kind, tag in _SEQUENCES if isinstance(value, kind))
        put(tag + _COUNT.pack(len(value)))
        for item in value:
            _encode(item, put, handle)
    elif isinstance(value, type) and value in _TYPES.values():
        data = value.__name__.encode()
        put(b"y" + _COUNT.pack(len(data)) + data)
    else:
        put(b"h" + _COUNT.pack(handle(value)))


def decode(data: bytes, from_handle: Callable[[int], object] = _no_object) -> object:
    """Return the value of `encode`'s bytes. Raises on others: ValueError, TypeError, KeyError, struct.error, RecursionError."""
    value, end = _decode(data, 0, from_handle)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes after the value")
    return value


def _decode(data: bytes, at: int, from_handle: Callable[[int], object]) -> tuple[object, int]:
    tag = data[at : at + 1]
    at += 1
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    if tag == b"f":
        return _FLOAT.unpack_from(data, at)[0], at + 8
    if tag == b"c":
        return complex(*struct.unpack_from("<dd", data, at)), at + 16
    (count,) = _COUNT.unpack_from(data, at)
    at += 4
    if tag == b"h":
        return from_handle(count), at
    if count > len(data) - at:
        # Every item takes a byte or more: a count beyond that is a lie, and believing it would only cost time.
        raise ValueError(f"{count} items announced, {len(data) - at} bytes left")
    if tag == b"i":
        return int.from_bytes(data[at : at + count], "little", signed=True), at + count
    if tag == b"s":
        return data[at : at + count].decode("utf-8", "surrogatepass"), at + count
    if tag == b"y":
        return _TYPES[data[at : at + count].decode()], at + count
    if tag == b"b":
        return data[at : at + count], at + count
    items: list[object] = []
    for _ in range(2 * count if tag == b"d" else count):
        item, at = _decode(data, at, from_handle)
        items.append(item)
    if tag == b"d":
        return dict(zip(items[::2], items[1::2], strict=True)), at
    if tag not in _SEQUENCE_TYPES:
        raise ValueError(f"unknown tag {tag!r}")
    return _SEQUENCE_TYPES[tag](items), at


class TooLongError(Exception):
    """A frame announces more bytes than its reader takes."""


def read_frame(fd: int, limit: int = 0xFFFFFFFF) -> bytes:
    """Read one frame from a blocking pipe; EOFError when the other side has closed it, TooLongError before reading too much."""
    count = frame_length(_read_exactly(fd, 4))
    if count > limit:
        raise TooLongError(f"{count} bytes announced, {limit} allowed")
    return _read_exactly(fd, count)


def write_frame(fd: int, payload: bytes) -> None:
    data = memoryview(frame(payload))
    while data:
        data = data[os.write(fd, data) :]


def frame(payload: bytes) -> bytes:
    return _COUNT.pack(len(payload)) + payload


def frame_length(header: bytes) -> int:
    """Return the number of bytes that follow a frame's four first bytes."""
    return _COUNT.unpack(header)[0]


def _read_exactly(fd: int, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            raise EOFError("the pipe was closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
