"""The version of the code that makes a cell: a hash of all sources of this package that a method imports."""

import ast
import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from neuromas.compare.methods.method import Method

PACKAGE = Path(__file__).parents[1]
LEFT_OUT = frozenset(
    PACKAGE / name for name in ("compare/methods/__init__.py", "compare/statistics.py", "training/progress.py")
)
"""Sources that are no part of a method's code version: the list of all methods, and modules that only show or test results."""


def code_version(method: Method) -> str:
    """Return a hash of a method's fields, of its source, and of every module of the package that it imports, directly or not.

    A change of the report or of another method does not change it.
    """
    # The repr of a function holds its address, which differs between processes; its source is hashed below.
    fields = [text for name, value in _fields(method) if " at 0x" not in (text := f"{name}={value!r}")]
    return digest(b"\0".join([type(method).__name__.encode(), *(text.encode() for text in fields), sources_of(method)]))


def _fields(method: Method) -> list[tuple[str, Any]]:
    names = [field.name for field in dataclasses.fields(method)] if dataclasses.is_dataclass(method) else sorted(vars(method))
    return [(name, getattr(method, name)) for name in names]


def sources_of(method: Method) -> bytes:
    """Return the sources of a method, of the functions among its fields, and of all modules that these import."""
    functions = [inspect.unwrap(value) for _, value in _fields(method) if inspect.isfunction(value)]
    files = {Path(inspect.getfile(kind)).resolve() for kind in (*type(method).__mro__[:-1], *functions)}
    imported = frozenset().union(*(_imported(file) for file in files if file.suffix == ".py"))
    return b"\0".join(path.read_bytes() for path in sorted(imported))


@cache
def _imported(file: Path) -> frozenset[Path]:
    """Return a source file and all files of this package that it imports, directly or not."""
    found, left = {file}, [file]
    while left:
        names = _names_imported(left.pop().read_text(encoding="utf-8"))
        new = {path for name in names for path in _files_of(name)} - found - LEFT_OUT
        found |= new
        left += sorted(new)
    return frozenset(found)


@cache
def _names_imported(source: str) -> frozenset[str]:
    """Return the names of this package that a source imports; methods import much the same sources."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in names if name.split(".")[0] == PACKAGE.name)


def _files_of(name: str) -> Iterator[Path]:
    """Yield the files that importing a module of this package runs: its own and those of the packages that hold it."""
    _, *parts = name.split(".")
    module = PACKAGE
    for part in ["", *parts]:
        module = module / part if part else module
        for path in (module / "__init__.py", module.with_suffix(".py")):
            if path.is_file():
                yield path


def digest(data: bytes) -> str:
    """Return a hash of 12 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=6).hexdigest()
