"""Builds dataclasses from nested dictionaries of TOML and JSON files; the error for a mistake names the key."""

import dataclasses
import math
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

C = TypeVar("C")


def require(ok: bool, flag: str, expected: str, got: object) -> None:
    """Raise ValueError that names the flag or key, the expected and the given value, unless `ok`."""
    if not ok:
        raise ValueError(f"{flag} must be {expected}, got {got!r}")


def require_text(flag: str, text: str) -> None:
    """Raise ValueError that names the flag or key for a text with half a character, which bytes that are no UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{flag} must be UTF-8 text, got {text[error.start]!a} in it, half a character") from error


def require_finite(data: Any, where: str) -> None:
    """Raise ValueError for a number that is none: `inf` and `nan` pass comparisons, and spoil everything they meet."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list | tuple) else ()
    for key, value in items:
        name = f"{where}{str(key).replace('_', '-')}"
        require(not isinstance(value, float) or math.isfinite(value), name, "a finite number", value)
        require_finite(value, f"{name}.")


def from_dict(cls: type[C], data: dict[str, Any], *, where: str, prefix: str = "", base: C | None = None) -> C:
    """Return a config from nested dictionaries over `base`; an unknown key raises ValueError with the known ones.

    Values are converted to the fields' types: lists to tuples, texts to paths, whole numbers to floats.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # C is always a dataclass here
    values: dict[str, Any] = {} if base is None else {name: getattr(base, name) for name in fields}
    for key, value in data.items():
        if key not in fields:
            raise ValueError(
                f"{where}: unknown key {prefix + key!r}; known are {', '.join(sorted(prefix + f for f in fields))}"
            )
        kind = fields[key].type
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            require(isinstance(value, dict), f"{where}: {prefix}{key}", "a table", value)
            values[key] = from_dict(kind, value, where=where, prefix=f"{prefix}{key}.", base=values.get(key))
        else:
            values[key] = _convert(kind, value, f"{where}: {prefix}{key}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return a TOML or JSON value as the type that its field declares; ValueError if it has another type."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    options = get_args(kind)
    if get_origin(kind) is Literal:
        require(value in options, where, f"one of {list(options)}", value)
        return value
    if isinstance(kind, UnionType):
        if value is None:
            return None
        kind = options[0]
    if get_origin(kind) is tuple:
        require(isinstance(value, list | tuple), where, "a list", value)
        kinds = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        require(len(kinds) == len(value), where, f"a list of {len(kinds)}", value)
        if dataclasses.is_dataclass(options[0]) and isinstance(options[0], type):
            tables = []
            for index, table in enumerate(value):
                require(isinstance(table, dict), f"{where}[{index}]", "a table", table)
                tables.append(from_dict(options[0], table, where=f"{where}[{index}]"))
            return tuple(tables)
        return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    accepted = {float: (int, float), Path: (str, Path)}.get(kind, (kind,))
    is_right = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    require(is_right, where, f"of type {kind.__name__}", value)
    return kind(value)
