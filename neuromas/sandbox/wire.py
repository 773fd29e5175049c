"""Encodes plain Python data as bytes, and sends frames of bytes through pipes.

Values that pass between tests and an untrusted program are built here from `None`, `bool`, `int`, `float`, `complex`, `str`,
`bytes`, `bytearray`, `list`, `tuple`, `set`, `frozenset`, `dict`, `range`, `slice` and the names of these types, and from
nothing else: decoding calls no code of the sender, so no value can have its own `__eq__`, `__reduce__` or class. Any other
object is sent as a handle, a number that only its owner can resolve.

    encode((1, "a"))  ->  b"t" + 2 + (b"i" + 1 + b"\\x01") + (b"s" + 1 + b"a"), counts as four bytes

Existing formats do not fit: `pickle` and `marshal` are not safe to decode, and importing `json` takes longer than starting the
program.
"""

import os
import struct
from _collections_abc import Callable  # what `collections.abc` shows; importing that costs a worker 2 ms

_COUNT = struct.Struct("<I")
_FLOAT = struct.Struct("<d")
_CONSTANTS: dict[str, object] = {"N": None, "T": True, "F": False}
_SEQUENCES: dict[str, type] = {"l": list, "t": tuple, "e": set, "z": frozenset}
_SEQUENCE_TAGS = {kind: tag.encode() for tag, kind in _SEQUENCES.items()}
_TRIPLES = "rx"
_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(bool, int, float, complex, str, bytes, bytearray, dict, type(None)),
        *(*_SEQUENCES.values(), range, slice),
    )
}
_BLOCKS: dict[str, Callable[[bytes | bytearray], object]] = {
    "i": lambda data: int.from_bytes(data, "little", signed=True),
    "s": lambda data: data.decode("utf-8", "surrogatepass"),
    "b": bytes,
    "a": bytearray,
    "y": lambda data: _TYPES[data.decode()],
}
"""Tag -> function that returns a value from its bytes, for values encoded as a count and as many bytes."""
_CONTAINERS: dict[str, Callable[[list[object]], object]] = {
    "l": lambda items: items,
    "t": tuple,
    "e": set,
    "z": frozenset,
    "d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    "r": lambda items: range(*items),  # type: ignore[arg-type]  # raises if they are no numbers
    "x": lambda items: slice(*items),
}
"""Tag -> function that returns a container from its items."""

_PACKED: dict[type, tuple[bytes, str]] = {int: (b"I", "q"), float: (b"D", "d")}
"""Type -> (tag, struct format) of sequences of numbers of one type, which take eight bytes each and are packed at once."""
_PACKED_FORMATS = {tag.decode(): code for tag, code in _PACKED.values()}
_MANY = 16
_AT_ONCE = 1 << 14


def _no_handle(value: object) -> int:
    raise TypeError(f"only plain data can be passed to the program, got {type(value).__name__!r}")


def _no_object(number: int) -> object:
    raise ValueError(f"handle {number} where plain data was expected")


def encode(value: object, handle: Callable[[object], int] = _no_handle) -> bytearray:
    """Return `value` as bytes; `handle` numbers other objects. A subclass of a plain type is sent as that type."""
    out = bytearray()
    _encode(value, out, handle)
    return out


def _encode(value: object, out: bytearray, handle: Callable[[object], int]) -> None:
    if value is None or value is True or value is False:
        out += b"N" if value is None else b"T" if value is True else b"F"
    elif isinstance(value, int):
        _put(out, b"i", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    elif isinstance(value, float):
        out += b"f" + _FLOAT.pack(value)
    elif isinstance(value, complex):
        out += b"c" + _FLOAT.pack(value.real) + _FLOAT.pack(value.imag)
    elif isinstance(value, str):
        _put(out, b"s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray)):
        _put(out, b"b" if isinstance(value, bytes) else b"a", value)
    elif isinstance(value, dict):
        out += b"d" + _COUNT.pack(len(value))
        for key, item in value.items():
            _encode(key, out, handle)
            _encode(item, out, handle)
    elif isinstance(value, (list, tuple, set, frozenset)):
        tag = _SEQUENCE_TAGS.get(type(value)) or next(tag for kind, tag in _SEQUENCE_TAGS.items() if isinstance(value, kind))
        if len(value) < _MANY or not _pack(value, tag, out):
            out += tag + _COUNT.pack(len(value))
            for item in value:
                _encode(item, out, handle)
    elif isinstance(value, (range, slice)):
        out += b"r" if isinstance(value, range) else b"x"
        for item in (value.start, value.stop, value.step):
            _encode(item, out, handle)
    elif isinstance(value, type) and value in _TYPES.values():
        _put(out, b"y", value.__name__.encode())
    else:
        out += b"h" + _COUNT.pack(handle(value))


def _put(out: bytearray, tag: bytes, data: bytes | bytearray) -> None:
    out += tag + _COUNT.pack(len(data))
    out += data


def _pack(values: "list[object] | tuple[object, ...] | set[object] | frozenset[object]", tag: bytes, out: bytearray) -> bool:
    """Append numbers if all are of one type and fit into eight bytes, and return True; return False for other values."""
    kinds = set(map(type, values))
    if len(kinds) > 1 or not kinds <= _PACKED.keys():
        return False
    own, code = _PACKED[kinds.pop()]
    try:
        data = struct.pack(f"<{len(values)}{code}", *values)
    except struct.error:
        return False
    out += own + tag + _COUNT.pack(len(values))
    out += data
    return True


def decode(data: bytes | bytearray, from_handle: Callable[[int], object] = _no_object) -> object:
    """Return the value of `encode`'s bytes. Raises on others: ValueError, TypeError, KeyError, struct.error, RecursionError."""
    value, end = _decode(data, 0, from_handle)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes after the value")
    return value


def _decode(data: bytes | bytearray, at: int, from_handle: Callable[[int], object]) -> tuple[object, int]:
    if at >= len(data):
        raise ValueError("the bytes end before the value does")
    tag = chr(data[at])
    at += 1
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    if tag == "f":
        return _FLOAT.unpack_from(data, at)[0], at + 8
    if tag == "c":
        return complex(*struct.unpack_from("<dd", data, at)), at + 16
    if tag in _PACKED_FORMATS:
        return _unpack(data, at, _PACKED_FORMATS[tag])
    if tag in _TRIPLES:
        count = 3
    else:
        (count,) = _COUNT.unpack_from(data, at)
        at += 4
    if tag == "h":
        return from_handle(count), at
    if count > len(data) - at:
        # Every item takes at least a byte: a larger count is false, and reading on would only take time.
        raise ValueError(f"{count} items announced, {len(data) - at} bytes left")
    if tag in _BLOCKS:
        return _BLOCKS[tag](data[at : at + count]), at + count
    if tag not in _CONTAINERS:
        raise ValueError(f"unknown tag {tag!r}")
    items: list[object] = []
    for _ in range(2 * count if tag == "d" else count):
        item, at = _decode(data, at, from_handle)
        items.append(item)
    return _CONTAINERS[tag](items), at


def _unpack(data: bytes | bytearray, at: int, code: str) -> tuple[object, int]:
    kind = _SEQUENCES[chr(data[at])]
    (count,) = _COUNT.unpack_from(data, at + 1)
    at += 5
    if 8 * count > len(data) - at:
        raise ValueError(f"{count} numbers announced, {len(data) - at} bytes left")
    items: list[object] = []
    for done in range(0, count, _AT_ONCE):
        # In parts: a tuple of all numbers would take as much memory as the list.
        items.extend(struct.unpack_from(f"<{min(_AT_ONCE, count - done)}{code}", data, at + 8 * done))
    return items if kind is list else kind(items), at + 8 * count


class TooLongError(Exception):
    """A frame announces more bytes than its reader takes."""


def read_frame(fd: int, limit: int = 0xFFFFFFFF) -> bytearray:
    """Read one frame from a blocking pipe; EOFError when the other side has closed it, TooLongError before reading too much."""
    count = frame_length(_read_exactly(fd, 4))
    if count > limit:
        raise TooLongError(f"{count} bytes announced, {limit} allowed")
    return _read_exactly(fd, count)


def write_frame(fd: int, payload: bytes | bytearray) -> None:
    """Write one frame to a blocking pipe."""
    # In two parts: joining them would copy a large payload.
    parts = [memoryview(_COUNT.pack(len(payload))), memoryview(payload)]
    while parts:
        done = os.writev(fd, parts)
        while parts and done >= len(parts[0]):
            done -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][done:]


def frame(payload: bytes | bytearray) -> bytes:
    """Return a frame: the payload after its length."""
    return _COUNT.pack(len(payload)) + payload


def frame_length(header: bytes | bytearray) -> int:
    """Return the number of bytes that follow a frame's four first bytes."""
    return _COUNT.unpack(header)[0]


def _read_exactly(fd: int, count: int) -> bytearray:
    data = bytearray(count)
    left = memoryview(data)
    while left:
        done = os.readv(fd, [left[: 1 << 20]])
        if not done:
            raise EOFError("the pipe was closed")
        left = left[done:]
    return data
