"""Cells of a comparison as tasks of a Ray cluster, which places them, and begins those of a dead process or node again.

A task returns its cell and this process stores it: a cell is on disk once, however often it was begun.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuromas.compare.cells import Cell, Stored, attempt, write
from neuromas.compare.code_version import code_version
from neuromas.compare.grid import find_method
from neuromas.compare.workers import PATIENCE, chains_of, from_order, printing_to, to_order
from neuromas.system.cluster import RETRIES, device_of, enter, load_ray, require_cores
from neuromas.system.process import configure_process
from neuromas.system.terminal import one_line


def make_on_cluster(cells: Sequence[Cell], done: Callable[[Cell, Stored], None]) -> None:
    """Make cells on the Ray cluster that is joined, and call `done` with each; as `workers.make_all`."""
    ray = load_ray()
    for device in {cell.spec.config.device for cell in cells}:
        require_cores(ray.cluster_resources(), device, 1, "cell")
    task = ray.remote(max_retries=RETRIES)(make_remotely)
    waiting = chains_of(cells)
    begun: dict[Any, tuple[Cell, float]] = {}

    def begin(run: Path) -> None:
        if chain := waiting[run]:
            cell = chain.pop(0)
            on_gpu = task.options(num_gpus=1) if cell.spec.config.device == "cuda" else task
            begun[on_gpu.remote(to_order(cell), str(Path.cwd()))] = cell, time.monotonic()

    try:
        for run in waiting:
            begin(run)
        while begun:
            ref = ray.wait(list(begun), num_returns=1)[0][0]
            cell, started = begun[ref]
            stored = _outcome(ref, cell, started)
            write(cell, stored)
            del begun[ref]
            done(cell, stored)
            begin(cell.run)
    finally:
        for ref in begun:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(ref)
        if begun:
            ray.wait(list(begun), num_returns=len(begun), timeout=PATIENCE)


def _outcome(ref: Any, cell: Cell, started: float) -> Stored:
    """Return what a task has made; the death of its process, time and again, is the error of its cell."""
    ray = load_ray()
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise ValueError(f"--workers: {one_line(str(error.cause))}") from error
    except ray.exceptions.RayError as error:
        short = "out of memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else type(error).__name__
        died = f"its process died {RETRIES + 1} times ({short}); see {cell.log}"
        return Stored(cell.code, None, died, time.monotonic() - started)


def make_remotely(order: str, folder: str) -> Stored:
    """Make a cell in a process of the cluster."""
    enter(folder)
    configure_process()
    cell = from_order(order)
    config = replace(cell.spec.config, device=device_of(cell.spec.config.device))
    cell = replace(cell, spec=replace(cell.spec, config=config))
    if (code := code_version(find_method(cell.spec.method))) != cell.code:
        raise ValueError(
            f"node {os.uname().nodename} has other code ({code}) than this machine ({cell.code}); install the same"
        )
    with printing_to(cell.log, cell.spec):
        return attempt(cell)
