"""Sealed folders: `state.json` holds the checksum of every other file and `checksum` that of `state.json`.

No bit of a checkpoint or an export changes unnoticed. Loads no torch.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neuromas.system.files import checksum_of, read_file


def seal(head: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of a folder with its seal; `head` goes to state.json, with the checksums of the files."""
    listing = {name: [len(data), checksum_of(data)] for name, data in files.items()}
    state = json.dumps({**head, "files": listing}, indent=2, allow_nan=False).encode()
    return {**files, "state.json": state, "checksum": checksum_of(state).encode()}


def check_seal(folder: Path, what: str, remedy: str) -> dict[str, Any]:
    """Return state.json after checking every file of the folder against it; ValueError names the file and the remedy."""
    try:
        raw = read_file(folder / "state.json")
        is_whole = read_file(folder / "checksum") == checksum_of(raw).encode()
        state = json.loads(raw) if is_whole else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{what} {folder}: state.json or checksum is missing or damaged; {remedy}") from error
    if not is_whole:
        raise ValueError(f"{what} {folder}: state.json is damaged (its checksum differs); {remedy}")
    for name, (size, digest) in state["files"].items():
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        if len(data) != size:
            found = "truncated" if len(data) < size else "too long"
            raise ValueError(f"{what} {folder}: {name} is {found} ({len(data)} of {size} bytes); {remedy}")
        if checksum_of(data) != digest:
            raise ValueError(f"{what} {folder}: {name} is damaged (its checksum differs); {remedy}")
    return state
