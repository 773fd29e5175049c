"""Processes that make the cells of a comparison, one after the other; a process that dies costs one cell."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from neuromas.compare.cells import Cell, Stored, attempt, read, write
from neuromas.compare.grid import describe_cell
from neuromas.compare.methods.method import CellSpec
from neuromas.system.process import configure_process
from neuromas.training.config_file import from_json, to_json
from neuromas.training.signals import Interrupted

STOPPED = 130
"""Exit status of a worker that the user has stopped."""
PATIENCE = 60.0
"""Seconds that a worker has to save its step before it is killed."""


def make_all(cells: Sequence[Cell], jobs: int, done: Callable[[Cell, Stored], None], keep: Sequence[int] = ()) -> None:
    """Make cells in `jobs` processes at a time and call `done` with each; workers inherit the file descriptors `keep`.

    On Ctrl-C cells that train save their step before this function ends.
    """
    chains = chains_of(cells)
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


def chains_of(cells: Sequence[Cell]) -> dict[Path, list[Cell]]:
    """Return cells by their run: two cells of one run cannot train at once, they are made one after the other."""
    chains: dict[Path, list[Cell]] = {}
    for cell in cells:
        chains.setdefault(cell.run, []).append(cell)
    return chains


def to_order(cell: Cell) -> str:
    """Return a cell as one line for the process that makes it."""
    return json.dumps({"method": cell.spec.method, "trial": cell.spec.trial, "config": to_json(cell.spec.config),
                       "path": str(cell.path), "run": str(cell.run), "code": cell.code})  # fmt: skip


def from_order(line: str) -> Cell:
    """Return the cell that `to_order` was given."""
    order = json.loads(line)
    spec = CellSpec(order["method"], from_json(order["config"], "order"), order["trial"])
    return Cell(spec, Path(order["path"]), Path(order["run"]), order["code"])


class Worker:
    """A process that makes cells, and gets and returns one line for each; it is started again when it has died."""

    def __init__(self, threads: int, keep: Sequence[int]) -> None:
        self._threads, self._keep = threads, keep
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def make_each(self, left: "SimpleQueue[list[Cell]]", made: "SimpleQueue[tuple[Cell, Stored] | Exception]") -> None:
        """Let the process make cells, chain by chain, until none is left or this worker is stopped."""
        with contextlib.suppress(Empty):
            while True:
                for cell in left.get_nowait():
                    if self._stopped:
                        return
                    try:
                        made.put((cell, self.make(cell)))
                    except Exception as error:  # raised again by the waiting thread: a full disk, or a bug
                        made.put(error)
                        return

    def make(self, cell: Cell) -> Stored:
        """Let the process make a cell and return it; if the process dies, that is the error of the cell."""
        started = time.monotonic()
        process = self._process if self._process and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(to_order(cell) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # a closed pipe: the process has ended
            answer = ""
        stored = read(cell) if answer else None
        if stored is None:
            status = process.wait()
            stored = Stored(cell.code, None, f"its process {_ending(status)}; see {cell.log}", time.monotonic() - started)
            if not self._stopped and status not in (STOPPED, -signal.SIGINT):
                write(cell, stored)
        return stored

    def _start(self) -> "subprocess.Popen[str]":
        self.close()
        threads = min(self._threads, int(os.environ.get("OMP_NUM_THREADS", str(self._threads)).partition(",")[0]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "neuromas.compare.workers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)}, pass_fds=self._keep,
        )  # fmt: skip
        return self._process

    def stop(self) -> None:
        """End the process: at once if it is idle; else it has a minute to save its step."""
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
            # Buffered input of a process that has died cannot be sent any more.
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with status {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


@contextlib.contextmanager
def printing_to(log: Path, spec: CellSpec) -> Iterator[None]:
    """Redirect the output of this process and its children, which make a cell, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with log.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            print(f"--- {describe_cell(spec)}", flush=True)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in zip((1, 2), kept, strict=True):
                os.dup2(original, number)
                os.close(original)


def _orders() -> Iterator[str]:
    """Yield the lines of standard input. When it ends, this process is asked to stop, and killed after `PATIENCE` seconds.

    Standard input ends when the parent wants no more cells, and when the parent has died: then no other process would stop
    this one, which keeps the folder locked.
    """
    lines: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        # Not sys.stdin: a process that ends while a thread waits in it is aborted.
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
    """Make the cells that standard input names, one in each line, until it ends."""
    # The output of methods must not get between the lines that the parent reads.
    answers = os.fdopen(os.dup(1), "w")
    for line in _orders():
        cell = from_order(line)
        with printing_to(cell.log, cell.spec):
            write(cell, attempt(cell))
        print("made", file=answers, flush=True)


if __name__ == "__main__":
    configure_process()
    try:
        serve()
    except (KeyboardInterrupt, Interrupted):
        sys.exit(STOPPED)
