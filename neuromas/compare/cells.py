"""Cells of a comparison on disk.

    OUT/cells/METHOD-TASK-BACKBONE-seedN-KEY.json    the result of one cell, or its error; written in one piece or not at all
    OUT/runs/...  OUT/logs/...                       the training run of the cell, and its output

KEY is a hash of the method, the resolved settings, the weights of the backbone and the examples that come from files. The
file holds the version of the code, so that a cell that other code made is recognised.
"""

import dataclasses
import json
import re
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuromas.compare.code_version import code_version, digest, sources_of
from neuromas.compare.grid import find_method
from neuromas.compare.methods.method import Answer, CellResult, CellSpec, CurvePoint
from neuromas.system.files import replace_file
from neuromas.system.terminal import in_short
from neuromas.training.config_file import MAY_DIFFER, to_json
from neuromas.training.signals import Interrupted


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell with the paths of its file and of its run."""

    spec: CellSpec
    path: Path
    run: Path
    """Folder of its training run; methods that train alike share one, and their cells are made one after the other."""
    code: str
    """Current version of the code that makes it."""

    @property
    def log(self) -> Path:
        """Return the file that gets the output of making the cell."""
        return self.path.parent.parent / "logs" / f"{self.path.stem}.log"


@dataclass(frozen=True, slots=True)
class Stored:
    """Contents of a cell's file: one of `result` and `error` is None."""

    code: str
    result: CellResult | None
    error: str | None
    seconds: float


def cell_of(spec: CellSpec, out: Path, checksum: str) -> Cell:
    """Return a cell with its paths, given a checksum of its backbone's weights and of the examples that come from files."""
    method = find_method(spec.method)
    settings = {key: value for key, value in json.loads(to_json(spec.config)).items() if key not in MAY_DIFFER}

    def name(method_name: str) -> str:
        key = digest(json.dumps([method_name, settings, checksum, spec.trial], sort_keys=True).encode())
        kind = "trial-" * spec.trial
        text = f"{kind}{method_name}-{spec.config.task.name}-{spec.config.backbone}-seed{spec.config.seed}-{key}"
        return re.sub(r"[^\w.-]+", "_", text)

    sources = sources_of(method)
    run = f"{name(getattr(method, 'trains_as', method.name))}-{digest(sources)}"
    return Cell(spec, out / "cells" / f"{name(method.name)}.json", out / "runs" / run, code_version(method))


def read(cell: Cell) -> Stored | None:
    """Return the contents of a cell's file; None if there is none. ValueError if the file is damaged."""
    try:
        data = json.loads(cell.path.read_bytes())
        result = _result_from_json(data["result"]) if data["result"] else None
        return Stored(data["code"], result, data["error"], data["seconds"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cell {cell.path} is damaged ({error})") from error


def write(cell: Cell, stored: Stored) -> None:
    """Write a cell's file: a process that is killed here leaves the old file or the new one, never a part."""
    data = {
        "code": stored.code, "error": stored.error, "seconds": round(stored.seconds, 1), "method": cell.spec.method,
        "config": json.loads(to_json(cell.spec.config)), "result": _result_to_json(stored.result) if stored.result else None,
    }  # fmt: skip
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(cell.path, json.dumps(data, default=str).encode())


def _result_to_json(result: CellResult) -> dict[str, Any]:
    """Return a result as JSON-ready data, answers column by column: each name of a field stands once, not for every answer."""
    names = [field.name for field in dataclasses.fields(Answer)]
    data = {field.name: getattr(result, field.name) for field in dataclasses.fields(CellResult)}
    for key in ("answers", "best_answers"):
        data[key] = {
            which: {name: [getattr(answer, name) for answer in answers] for name in names}
            for which, answers in getattr(result, key).items()
        }
    return data | {"curve": [dataclasses.asdict(point) for point in result.curve]}


def _result_from_json(data: dict[str, Any]) -> CellResult:
    """Return the result that `_result_to_json` was given."""

    def answers(key: str) -> dict[str, tuple[Answer, ...]]:
        names = [field.name for field in dataclasses.fields(Answer)]
        return {
            which: tuple(Answer(*row) for row in zip(*(columns[name] for name in names), strict=True))
            for which, columns in data[key].items()
        }

    curve = tuple(CurvePoint(**point) for point in data["curve"])
    records = {"answers": answers("answers"), "best_answers": answers("best_answers"), "curve": curve}
    return CellResult(**{**data, **records})


def attempt(cell: Cell) -> Stored:
    """Run one cell in this process; return its result, or the error that it died of. Interrupted if the user stops it."""
    started = time.monotonic()
    cell.run.mkdir(parents=True, exist_ok=True)
    result, error = None, None
    try:
        result = find_method(cell.spec.method).run(cell.spec, cell.run)
    except Exception as raised:  # any error of a method is a line of the report
        traceback.print_exc()
        # The user's Ctrl-C is no result: the cell resumes when the comparison does.
        if isinstance(raised, Interrupted):
            raise
        error = f"{type(raised).__name__}: {in_short(raised)}"
    return Stored(cell.code, result, error, time.monotonic() - started)
