"""Builds the page of one or several runs: one HTML file that needs no server and loads nothing.

The data lie in it as chunks, gzipped and in base64: number 0 is the index, which the page reads when it opens, and the others
hold the texts, which it reads when they are looked at. A policy in the page allows its own scripts only, by their checksums,
and no request. What a model wrote is in the chunks alone, and reaches the page as text, never as HTML.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from neuromas.system.files import read_file, replace_file
from neuromas.view.recorded import TRAIN, Json, Recorded, RunRecord

FOLDER = Path(__file__).parent
SCRIPTS = (
    "vendor/uPlot.iife.min.js", "vendor/dagre.min.js", "data.js", "network.js", "curves.js", "tables.js", "diagnosis.js",
    "examples.js", "page.js",
)  # fmt: skip
STYLES = ("vendor/uPlot.min.css", "page.css")
BEGINS = b"<!doctype html>\n<!-- made by neuromas view -->"
"""How every page begins: only such a file is replaced."""
CHUNK_CHARACTERS = 400_000
"""Characters of JSON from which on a chunk is full: it is decoded in a few milliseconds."""


@dataclass(slots=True)
class Chunks:
    """Gathers rollouts into chunks, and says where each of them is."""

    full: list[bytes]
    _open: list[str]
    _size: int = 0

    def add(self, said: Json) -> tuple[int, int]:
        """Return the chunk, counted from 1, and the place in it."""
        text = json.dumps(said, separators=(",", ":"))
        if self._size and self._size + len(text) > CHUNK_CHARACTERS:
            self.close()
        self._open.append(text)
        self._size += len(text)
        return len(self.full) + 1, len(self._open) - 1

    def close(self) -> None:
        if self._open:
            self.full.append(f"[{','.join(self._open)}]".encode())
        self._open, self._size = [], 0


def build_page(records: Sequence[RunRecord], *, watched: bool = False) -> bytes:
    """Return the page of these runs, which a browser loads again and again if it is `watched`.

    Raises ValueError if they have different tasks, or one has no rollouts.
    """
    first = records[0].run
    for record in records[1:]:
        if record.run.config.task.name != first.config.task.name:
            raise ValueError(
                f"runs {first.path} and {record.run.path} have different tasks, {first.config.task.name} and "
                f"{record.run.config.task.name}, so no example is in both; give runs of one task"
            )
    chunks = Chunks([], [])
    examples = _examples([record.rollouts() for record in records], chunks)
    chunks.close()
    labels = _labels([record.run.path for record in records])
    runs = [record.summary(label) for record, label in zip(records, labels, strict=True)]
    index = json.dumps({"runs": runs, "examples": examples}, separators=(",", ":")).encode()
    return _render(f"{first.config.task.name}: {', '.join(labels)}", [index, *chunks.full], watched=watched)


def _examples(runs: Sequence[Sequence[Recorded]], chunks: Chunks) -> list[Json]:
    """Return every example with, for each run, where its rollouts are; evaluated examples first."""
    found: dict[tuple[str, str], Json] = {}
    placed: dict[tuple[str, str], list[list[Recorded]]] = {}
    for number, rollouts in enumerate(runs):
        for rollout in rollouts:
            key = (rollout.split, rollout.example.id)
            placed.setdefault(key, [[] for _ in runs])[number].append(rollout)
            found.setdefault(
                key,
                {
                    "id": rollout.example.id, "set": rollout.split, "question": rollout.example.question,
                    "gold": rollout.example.answer,
                },
            )  # fmt: skip
    for key in sorted(found, key=lambda key: key[0] == TRAIN):
        # What is looked at together lies in one chunk.
        found[key]["runs"] = [
            [[each.when, each.step, each.index, each.reward, int(each.malformed), *chunks.add(each.said)] for each in rollouts]
            for rollouts in placed[key]
        ]
    return sorted(found.values(), key=lambda example: example["set"] == TRAIN)


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the last names in the paths that tell them apart: `a/run` and `b/run` are a and b."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(f"RUN must name each run once, got {', '.join(map(str, paths))}")
    while len(parts) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({part[-n:] for part in parts}) == len(parts))
    return ["/".join(part[-length:]) for part in parts]


def _render(title: str, chunks: Sequence[bytes], *, watched: bool) -> bytes:
    """Return the HTML file around the chunks."""

    def joined(names: Sequence[str]) -> str:
        return "\n" + "\n".join((FOLDER / name).read_text(encoding="utf-8").strip() for name in names) + "\n"

    script, style = joined(SCRIPTS), joined(STYLES)
    environment = Environment(loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, autoescape=True)
    page = environment.get_template("page.html.jinja").render(
        begins=Markup(BEGINS.decode()),
        title=title,
        watched=watched,
        script=Markup(script),
        style=Markup(style),
        script_checksum=_checksum(script),
        style_checksum=_checksum(style),
        licences=Markup((FOLDER / "vendor/LICENSES.txt").read_text(encoding="utf-8")),
        # A fixed time, so that the same runs make the same page.
        chunks=[base64.b64encode(gzip.compress(chunk, mtime=0)).decode() for chunk in chunks],
    )
    # A folder's name may be no Unicode.
    return page.encode(errors="replace")


def _checksum(text: str) -> str:
    """Return what a content security policy calls a script or a style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def check_out(out: Path) -> None:
    """Raise ValueError if something else than a page of ours is there: it is not overwritten."""
    if not out.exists():
        return
    try:
        is_ours = read_file(out).startswith(BEGINS)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be replaced: {error.strerror}") from error
    if not is_ours:
        raise ValueError(f"--out {out} exists already and is no page of neuromas view; name another --out")


def write_page(out: Path, page: bytes) -> None:
    """Write the page atomically; ValueError if the disk refuses."""
    try:
        replace_file(out, page)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}") from error
