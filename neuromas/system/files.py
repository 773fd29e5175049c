"""Writes files and folders atomically, so that a process that is killed leaves no part of one; reads files with checks."""

import errno
import functools
import hashlib
import json
import os
import shutil
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 2**30
"""Most bytes of a text file that is read: a larger one is no config and no list of questions."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk; a process that is killed here may leave a part of it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file atomically: a crash or a loss of power leaves the old file or the new one, never a part."""
    fresh = path.with_name(f"{path.name}.new")
    write_file(fresh, data)
    fresh.replace(path)
    sync(path.parent)


def require_writable(path: Path, flag: str) -> None:
    """Raise ValueError if `replace_file` would fail, before the work whose results it is to write.

    It would also put a file in the place of a device, a pipe or a link: /dev/stdout would then be gone.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{flag} {path} is a link or no regular file, and would be replaced; name another file")
    fresh = path.with_name(f"{path.name}.new")
    try:
        write_file(fresh, b"")
        fresh.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be written: {error.strerror}") from error


def sync(path: Path) -> None:
    """Flush the names in a folder, or the data of a file, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(final: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files atomically: a crash or a loss of power leaves all files or no folder of that name."""
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, data in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(partial / name, data)
    for folder in {partial, *(folder for folder in partial.rglob("*") if folder.is_dir())}:
        sync(folder)
    partial.rename(final)
    sync(final.parent)


def checksum_of(data: bytes) -> str:
    """Return a checksum of 32 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; a process reads it again only if its size or time has changed."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_file(path: Path, most: int | None = MOST_BYTES) -> bytes:
    """Return the bytes of a file; OSError also for a device, a pipe, or more than `most` bytes."""
    # Without O_NONBLOCK, opening a pipe without a writer waits for ever.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file, but a device or a pipe", str(path))
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"{found.st_size / 2**30:.1f} GiB, more than is read at once", str(path))
        return file.read() if most is None else file.read(most)


def damaged(path: Path, error: object) -> ValueError:
    """Return the error for a run's file whose contents are wrong."""
    return ValueError(f"{path} is damaged ({error}); restore it, or delete it to go on without it")


def read_or_damaged(path: Path, most: int | None = MOST_BYTES) -> bytes:
    """Return the bytes of a run's file; ValueError names the file."""
    try:
        return read_file(path, most)
    except OSError as error:
        raise damaged(path, error.strerror) from error


def parse_json(path: Path, data: bytes, kind: type) -> Any:
    """Return the JSON value of a run's file; ValueError names the file if it is damaged or its value is no `kind`."""
    try:
        found = json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from error
    if not isinstance(found, kind):
        raise damaged(path, f"it holds no JSON {'object' if kind is dict else 'list'}")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file; ValueError names the file."""
    try:
        return tomllib.loads(read_file(path).decode())
    except OSError as error:
        raise ValueError(f"config {path} cannot be read: {error.strerror}") from error
    # Errors of TOML, of UTF-8, of numbers with thousands of digits, and of tables nested too deeply.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path} is not TOML: {error}") from error
