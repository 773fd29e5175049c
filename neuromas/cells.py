"""Cells of a comparison on disk, and the workers that make them.

    OUT/cells/METHOD-TASK-BACKBONE-seedN-KEY.json    what one cell measured, or what it died of; written whole or not at all
    OUT/runs/...  OUT/logs/...                       the run behind it, and what it printed

KEY is a hash of the method, the resolved settings, the weights of the backbone and the examples that come from files. The
version of the code is kept inside the file: a cell that other code made is known as such. Each worker is a process that makes
one cell after the other, so that whatever ends it costs one cell.
"""

import ast
import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from neuromas.baselines.base import Answer, CellResult, CellSpec, CurvePoint, Method
from neuromas.config import from_json, to_json
from neuromas.files import replace_file
from neuromas.grid import describe_cell, find_method
from neuromas.identity import MAY_DIFFER
from neuromas.process import settle
from neuromas.stop import Interrupted

PACKAGE = Path(__file__).parent
LEFT_OUT = frozenset(PACKAGE / name for name in ("baselines/__init__.py", "progress.py", "plot.py", "show.py", "statistics.py"))
"""Sources that are no part of a method's code version: the list of all methods, and what only shows or weighs results."""
PATIENCE = 60.0
"""Seconds that a worker has to save what it is at."""
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
        key = _digest(json.dumps([of, settings, checksum, spec.trial], sort_keys=True).encode())
        what = f"{'trial-' * spec.trial}{of}-{spec.config.task.name}-{spec.config.backbone}-seed{spec.config.seed}-{key}"
        return re.sub(r"[^\w.-]+", "_", what)

    sources = _sources_of(method)
    run = f"{name(getattr(method, 'trains_as', method.name))}-{_digest(sources)}"
    return Cell(spec, out / "cells" / f"{name(method.name)}.json", out / "runs" / run, code_version(method))


def code_version(method: Method) -> str:
    """Hash a method's own fields, its source, and that of every module of the package that it imports, in turn.

    A change of the report or of another method leaves it as it is.
    """
    # What shows as an address in memory is another one in every process; its source counts all the same.
    fields = [text for name, value in _fields(method) if " at 0x" not in (text := f"{name}={value!r}")]
    return _digest(b"\0".join([type(method).__name__.encode(), *(text.encode() for text in fields), _sources_of(method)]))


def _fields(method: Method) -> list[tuple[str, Any]]:
    names = [field.name for field in dataclasses.fields(method)] if dataclasses.is_dataclass(method) else sorted(vars(method))
    return [(name, getattr(method, name)) for name in names]


def _sources_of(method: Method) -> bytes:
    """Return the source of a method, of the functions that are its fields, and of all that these import."""
    functions = [inspect.unwrap(value) for _, value in _fields(method) if inspect.isfunction(value)]
    files = {Path(inspect.getfile(kind)).resolve() for kind in (*type(method).__mro__[:-1], *functions)}
    imported = frozenset().union(*(_imported(file) for file in files if file.suffix == ".py"))
    return b"\0".join(path.read_bytes() for path in sorted(imported))


@cache
def _imported(file: Path) -> frozenset[Path]:
    """Return a source file and all that it imports from this package, directly or not."""
    found, left = {file}, [file]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            new = {path for name in names for path in _files_of(name)} - found - LEFT_OUT
            found |= new
            left += sorted(new)
    return frozenset(found)


def _files_of(name: str) -> Iterator[Path]:
    """Give the files that importing a module of this package runs: the packages around it and its own."""
    first, *parts = name.split(".")
    if first != PACKAGE.name:
        return
    place = PACKAGE
    for part in ["", *parts]:
        place = place / part if part else place
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                yield path


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


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


def make_all(cells: Sequence[Cell], jobs: int, done: Callable[[Cell, Stored], None], keep: Sequence[int] = ()) -> None:
    """Make cells in `jobs` processes at a time; `done` is told of each. `keep` are file descriptors that workers inherit.

    On Ctrl-C cells that train save their step before this ends.
    """
    # Two cells of one run would be in each other's way: they go one after the other.
    chains: dict[Path, list[Cell]] = {}
    for place in cells:
        chains.setdefault(place.run, []).append(place)
    left: SimpleQueue[list[Cell]] = SimpleQueue()
    for chain in chains.values():
        left.put(chain)
    made: SimpleQueue[tuple[Cell, Stored] | Exception] = SimpleQueue()
    workers = [Worker(max(1, len(os.sched_getaffinity(0)) // jobs), keep) for _ in range(min(jobs, len(chains)))]
    threads = [threading.Thread(target=worker.make_each, args=(left, made)) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for _ in cells:
            outcome = made.get()
            if isinstance(outcome, Exception):
                raise outcome
            done(*outcome)
    finally:
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()


class Worker:
    """A process that makes cells, one line in and one line out for each; started again when it has died."""

    def __init__(self, threads: int, keep: Sequence[int] = ()) -> None:
        self._threads, self._keep = threads, keep
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def make_each(self, left: "SimpleQueue[list[Cell]]", made: "SimpleQueue[tuple[Cell, Stored] | Exception]") -> None:
        """Have cells made, chain by chain, until none is left or this is stopped."""
        with contextlib.suppress(Empty):
            while True:
                for place in left.get_nowait():
                    if self._stopped:
                        return
                    try:
                        made.put((place, self.make(place)))
                    except Exception as error:  # for the thread that waits: a full disk, or a mistake of ours
                        made.put(error)
                        return

    def make(self, place: Cell) -> Stored:
        """Have a cell made; a worker that dies over it is what the cell died of."""
        started = time.monotonic()
        process = self._process if self._process and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        order = {"method": place.spec.method, "trial": place.spec.trial, "config": to_json(place.spec.config),
                 "path": str(place.path), "run": str(place.run), "code": place.code}  # fmt: skip
        try:
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # a closed pipe: the worker is gone
            answer = ""
        stored = read(place) if answer else None
        if stored is None:
            status = process.wait()
            stored = Stored(place.code, None, f"its process {_ending(status)}; see {place.log}", time.monotonic() - started)
            if not self._stopped and status not in (STOPPED, -signal.SIGINT):
                write(place, stored)
        return stored

    def _start(self) -> "subprocess.Popen[str]":
        self.close()
        threads = min(self._threads, int(os.environ.get("OMP_NUM_THREADS", str(self._threads)).partition(",")[0]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "neuromas.cells"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)}, pass_fds=self._keep,
        )  # fmt: skip
        return self._process

    def stop(self) -> None:
        """Let the process end: at once if it is idle; else it has a minute to save what it is at."""
        self._stopped = True
        if self._process is None:
            return
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(PATIENCE + 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Close the pipes of a process that has ended."""
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            # What was meant for a process that has died cannot be sent any more.
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


@contextlib.contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Send what this process and its children print to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with log.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in zip((1, 2), kept, strict=True):
                os.dup2(original, number)
                os.close(original)


def _orders() -> Iterator[str]:
    """Give the lines of standard input. When it ends, whatever the process is at is asked to stop, and soon made to.

    It ends when the parent wants no more cells, and when the parent is gone, of whatever it died: then nobody else would stop
    what is being made, and it keeps the folder locked.
    """
    lines: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        # Not sys.stdin: whoever ends while a thread waits in there is aborted.
        with open(0, "rb", buffering=0, closefd=False) as orders:  # a number, not a path
            for line in orders:
                lines.put(line.decode())
        lines.put("")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=listen, daemon=True).start()
    while line := lines.get():
        yield line


def serve() -> None:
    """Make the cells that come as lines on standard input, until it ends."""
    # What methods print must not get between the lines that the parent reads.
    answers = os.fdopen(os.dup(1), "w")
    for line in _orders():
        order = json.loads(line)
        spec = CellSpec(order["method"], from_json(order["config"], "order"), order["trial"])
        place = Cell(spec, Path(order["path"]), Path(order["run"]), order["code"])
        with _printing_to(place.log):
            print(f"--- {describe_cell(spec)}", flush=True)
            make(place)
        print("made", file=answers, flush=True)


if __name__ == "__main__":
    settle()
    try:
        serve()
    except KeyboardInterrupt:
        sys.exit(STOPPED)
