"""Cells of a comparison on disk.

    OUT/cells/METHOD-TASK-BACKBONE-seedN-KEY.json    what one cell measured, or what it died of; written whole or not at all
    OUT/runs/...  OUT/logs/...                       the run behind it, and what it printed

KEY is a hash of the method, the resolved settings, the weights of the backbone and the examples that come from files. The
version of the code is kept inside the file: a cell that other code made is known as such.
"""

import dataclasses
import json
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromas.compare.code_version import code_version, digest, sources_of
from neuromas.compare.grid import find_method
from neuromas.compare.methods.method import Answer, CellResult, CellSpec, CurvePoint
from neuromas.system.files import replace_file
from neuromas.training.config_file import MAY_DIFFER, to_json
from neuromas.training.signals import Interrupted

STOPPED = 130
"""Status of a worker that the user has stopped."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell and where it is kept."""

    spec: CellSpec
    path: Path
    run: Path
    """Folder of the training behind it; methods that train alike share one, and are made one after the other."""
    code: str
    """Version of the code that would make it now."""

    @property
    def log(self) -> Path:
        return self.path.parent.parent / "logs" / f"{self.path.stem}.log"


@dataclass(frozen=True, slots=True)
class Stored:
    """What the file of a cell says: one of `result` and `error` is None."""

    code: str
    result: CellResult | None
    error: str | None
    seconds: float


def cell(spec: CellSpec, out: Path, checksum: str) -> Cell:
    """Return where a cell is kept, given a checksum of its backbone's weights and of the examples that come from files."""
    method = find_method(spec.method)
    settings = {key: value for key, value in json.loads(to_json(spec.config)).items() if key not in MAY_DIFFER}

    def name(of: str) -> str:
        key = digest(json.dumps([of, settings, checksum, spec.trial], sort_keys=True).encode())
        what = f"{'trial-' * spec.trial}{of}-{spec.config.task.name}-{spec.config.backbone}-seed{spec.config.seed}-{key}"
        return re.sub(r"[^\w.-]+", "_", what)

    sources = sources_of(method)
    run = f"{name(getattr(method, 'trains_as', method.name))}-{digest(sources)}"
    return Cell(spec, out / "cells" / f"{name(method.name)}.json", out / "runs" / run, code_version(method))


def read(place: Cell) -> Stored | None:
    """Return what is stored of a cell; None if nothing is. ValueError if the file is damaged."""
    try:
        data = json.loads(place.path.read_bytes())
        result = _result_from(data["result"]) if data["result"] else None
        return Stored(data["code"], result, data["error"], data["seconds"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cell {place.path} is damaged ({error})") from error


def write(place: Cell, stored: Stored) -> None:
    """Store a cell: whoever is killed leaves the old file or the new one, never a part."""
    data = {
        "code": stored.code, "error": stored.error, "seconds": round(stored.seconds, 1), "method": place.spec.method,
        "config": json.loads(to_json(place.spec.config)), "result": _result_to(stored.result) if stored.result else None,
    }  # fmt: skip
    place.path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(place.path, json.dumps(data, default=str).encode())


def _result_to(result: CellResult) -> dict[str, Any]:
    """Return a result as JSON-ready data, answers column by column: the names of the fields once, not for every answer."""
    names = [field.name for field in dataclasses.fields(Answer)]
    data = {field.name: getattr(result, field.name) for field in dataclasses.fields(CellResult)}
    for of in ("answers", "best_answers"):
        data[of] = {
            which: {name: [getattr(answer, name) for answer in answers] for name in names}
            for which, answers in getattr(result, of).items()
        }
    return data | {"curve": [dataclasses.asdict(point) for point in result.curve]}


def _result_from(data: dict[str, Any]) -> CellResult:
    def answers(of: str) -> dict[str, tuple[Answer, ...]]:
        names = [field.name for field in dataclasses.fields(Answer)]
        return {
            which: tuple(Answer(*row) for row in zip(*(columns[name] for name in names), strict=True))
            for which, columns in data[of].items()
        }

    curve = tuple(CurvePoint(**point) for point in data["curve"])
    made = {"answers": answers("answers"), "best_answers": answers("best_answers"), "curve": curve}
    return CellResult(**{**data, **made})


def make(place: Cell) -> Stored:
    """Run one cell here and store what came of it: a result, or the error that it died of."""
    started = time.monotonic()
    place.run.mkdir(parents=True, exist_ok=True)
    result, error = None, None
    try:
        result = find_method(place.spec.method).run(place.spec, place.run)
    except Exception as raised:  # whatever a method dies of belongs into the table
        traceback.print_exc()
        # The user's Ctrl-C is no result: the cell goes on where it was, when the comparison does.
        if isinstance(raised, Interrupted):
            sys.exit(STOPPED)
        error = _one_line(raised)
    stored = Stored(place.code, result, error, time.monotonic() - started)
    write(place, stored)
    return stored


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
