"""Files that are whole or not there, whoever is killed while they are written."""

import os
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write a file down to the disk; whoever is killed may leave a part of it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that whoever is killed leaves the old one or the new one, never a part."""
    fresh = path.with_name(f"{path.name}.new")
    write_file(fresh, data)
    fresh.replace(path)


def sync_folder(path: Path) -> None:
    """Write the names in a folder down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
