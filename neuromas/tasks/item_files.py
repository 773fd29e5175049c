"""Reads questions from files; every error names the flag, the file and the line."""

import csv
import errno
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from neuromas.system.files import MOST_BYTES, read_file


@dataclass(frozen=True, slots=True)
class Record:
    """One item of a file and its position, e.g. `Record("task.file a.jsonl, line 3", {"question": ..., "answer": ...})`."""

    position: str
    data: Mapping[str, Any]

    def error(self, text: str) -> ValueError:
        """Return an error that names the item's position."""
        return ValueError(f"{self.position}: {text}")

    def texts(self, *keys: str) -> list[str]:
        """Return the texts under these keys; ValueError if one is missing or is no text."""
        texts = [text for key in keys if isinstance(text := self.data.get(key), str)]
        if len(texts) < len(keys):
            raise self.error(f"expected an object with the texts {' and '.join(map(repr, keys))}")
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise self.error(f"a text holds half a character, {half}, without its other half") from error
        return texts


def read_text(path: Path, flag: str) -> str:
    """Return a file's text, decompressed if its name ends in .gz."""
    try:
        data = read_file(path)
        return (_unpacked(data) if path.suffix == ".gz" else data).decode("utf-8")
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror or error}") from error
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{flag} {path} is damaged: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _unpacked(data: bytes) -> bytes:
    # A small file may hold gigabytes of one letter.
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        unpacked = file.read(MOST_BYTES + 1)
    if len(unpacked) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"more than {MOST_BYTES / 2**30:g} GiB when unpacked")
    return unpacked


def read_json_lines(path: Path, flag: str) -> Iterator[Record]:
    """Yield the objects of a JSONL file, compressed or not."""
    # Not splitlines(): a JSON text may hold other line separators, such as U+2028, unescaped.
    for number, line in enumerate(read_text(path, flag).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{flag} {path}, line {number}: not JSON ({_reason(error)})") from error
        yield Record(f"{flag} {path}, line {number}", data if isinstance(data, dict) else {})


def read_json_list(path: Path, flag: str, key: str | None = None) -> Iterator[Record]:
    """Yield the objects of a JSON list, or of the list under `key` of a JSON object."""
    text = read_text(path, flag)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{flag} {path}{line}: not JSON ({_reason(error)})") from error
    items = data if key is None else data.get(key) if isinstance(data, dict) else None
    if not isinstance(items, list):
        expected = "a JSON list" if key is None else f"a JSON object with a list {key!r}, as BIG-Bench-Hard has it"
        raise ValueError(f"{flag} {path}: expected {expected}")
    for number, item in enumerate(items, start=1):
        yield Record(f"{flag} {path}, item {number}", item if isinstance(item, dict) else {})


def _reason(error: ValueError | RecursionError) -> str:
    """Return what is wrong with JSON: its form, a number of thousands of digits, or lists nested too deeply."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def read_csv(path: Path, flag: str, columns: tuple[str, ...]) -> Iterator[Record]:
    """Yield the rows of a CSV file without a header."""
    rows = csv.reader(io.StringIO(read_text(path, flag), newline=""))
    for number in count(1):
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{flag} {path}, row {number}: not CSV ({error})") from error
        if row is None:
            return
        if len(row) != len(columns):
            raise ValueError(f"{flag} {path}, row {number}: expected {len(columns)} columns, got {len(row)}")
        yield Record(f"{flag} {path}, row {number}", dict(zip(columns, row, strict=True)))


def read_question_file(path: Path, flag: str) -> Iterator[Record]:
    """Yield records with `question` and `answer`: of JSONL with these keys, or of BIG-Bench-Hard JSON."""
    if path.suffix == ".jsonl":
        yield from read_json_lines(path, flag)
        return
    for record in read_json_list(path, flag, "examples"):
        question, answer = record.texts("input", "target")
        yield Record(record.position, {"question": question, "answer": answer})
