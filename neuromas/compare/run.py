"""The command `neuromas compare`: make the cells that are not there yet, then the report of all of them."""

import dataclasses
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table as RichTable
from transformers import PretrainedConfig

from neuromas.compare.analysis import compare
from neuromas.compare.budget_match import QUANTITIES, format_amount
from neuromas.compare.cells import Cell, Stored, cell_of, read
from neuromas.compare.cluster import make_on_cluster
from neuromas.compare.findings import Comparison, format_difference, format_problem, to_json
from neuromas.compare.grid import Grid, Pair, describe_cell, find_method, problem_of, settings_of
from neuromas.compare.methods.method import CellResult, CellSpec
from neuromas.compare.methods.paper_sizes import qwen3_0_6b
from neuromas.compare.report import write_report
from neuromas.compare.tuning import Tuning
from neuromas.compare.workers import make_all
from neuromas.config import TrainConfig
from neuromas.model.backbone import Backbone, config_of, resolve_dtype
from neuromas.model.sizes import sizes
from neuromas.system.cluster import joined
from neuromas.system.terminal import one_line
from neuromas.tasks import from_config
from neuromas.training.plan import resolve
from neuromas.training.questions import data_checksum, evaluation_sets

PAPER_BACKBONE = "Qwen/Qwen3-0.6B"


class MakeCells(Protocol):
    """Makes cells, wherever, and calls `done` with each, once."""

    def __call__(self, cells: Sequence[Cell], /, *, done: Callable[[Cell, Stored], None]) -> None: ...


def make_comparison(
    grid: Grid, out: Path, *, jobs: int = 1, workers: str = "", keep_old: bool = False, report_only: bool = False
) -> Comparison:
    """Make the missing cells of a grid in `out`, write the report there, and return its results.

    They are made in `jobs` processes at a time, or by the Ray cluster at the address `workers`.
    Cells of other code are made again, unless `keep_old`; cells that died are tried again. Raises ValueError if another process
    uses `out`.
    """
    if not report_only:
        check_questions(grid)
    grid = with_dtypes(grid)
    checksums = {name: _checksum(name, grid) for name in grid.backbones}
    data = {task: data_checksum(task) for task in {spec.config.task for spec in grid.cells}}
    with _locked(out) as lock, joined("--workers", workers) if workers and not report_only else nullcontext():
        make_cells = make_on_cluster if workers else partial(make_all, jobs=jobs, keep=[lock])
        found: dict[Path, Stored] = {}
        notes: list[str] = []

        def locate(spec: CellSpec) -> Cell:
            return cell_of(spec, out, checksums[spec.config.backbone] + data[spec.config.task])

        def result_of(spec: CellSpec) -> CellResult | str | None:
            stored = found.get(locate(spec).path)
            return (stored.result or stored.error) if stored else None

        tuning = Tuning(grid, result_of)
        tuning.check_settings()
        tuning.check()
        specs, seen = [*tuning.trials(), *grid.cells], set[Path]()
        # The settings of some cells follow from the results of others, so cells are made in rounds.
        while cells := [c for s in map(tuning.resolve, specs) if s and (c := locate(s)).path not in seen]:
            seen |= {cell.path for cell in cells}
            there, lines = _read_cells(cells, keep_old or report_only, "left out" if report_only else "made again")
            found |= there
            notes += lines
            left = [c for c in cells if (stored := found.get(c.path)) is None or stored.error is not None]
            if left and not report_only:
                waiting = len(specs) - len(seen)
                _print_progress(
                    f"{len(specs)} cells: {len(seen) - len(left)} are there, {len(left)} to make, "
                    f"{'as tasks of Ray' if workers else f'{jobs} at a time'}, in {out}"
                    + (f"; {waiting} wait for the results of these" if waiting else "")
                )
                found |= _make(left, make_cells)
        if report_only:
            _require_any(found, out)
        resolved = [(spec, tuning.resolve(spec)) for spec in grid.cells]
        results = [
            (own, found.get(locate(own).path)) if own else (spec, Stored("", None, tuning.why_not(spec), 0.0))
            for spec, own in resolved
        ]
        trials = {(spec.method, *problem_of(spec)): tuning.table(spec) for spec in grid.cells}
        comparison = compare(grid, results, notes, trials)
        codes = sorted({stored.code for _, stored in results if stored and stored.code})
        write_report(to_json(comparison) | {"code": codes, "backbone_checksums": checksums}, out)
    return comparison


def _require_any(found: Mapping[Path, Stored], out: Path) -> None:
    """Raise ValueError if there is nothing to report: what an earlier report says stays."""
    if not found:
        raise ValueError(
            f"--out {out} holds no cell of this comparison, so --report-only has nothing to report; name the folder in which "
            "its cells were made, with the flags that they were made with"
        )


def check_questions(grid: Grid) -> None:
    """Raise ValueError if a task has no questions for its cells: before any is made, not as an error of each."""
    needed = {
        (spec.config.task.name, find_method(spec.method).trained): settings_of(spec.method, spec.config) for spec in grid.cells
    }
    for (_, trained), config in needed.items():
        if trained:
            resolve(config)
        else:
            task = from_config(config.task)
            task.check_ready()
            evaluation_sets(config, task)


def with_dtypes(grid: Grid) -> Grid:
    """Return a grid whose cells say which number format `auto` is on this machine: it is part of what they are."""
    wanted = {(spec.config.backbone, spec.config.device) for spec in grid.cells if spec.config.dtype == "auto"}
    chosen = {(name, device): resolve_dtype("auto", name, device) for name, device in wanted}

    def resolved(spec: CellSpec) -> CellSpec:
        config = spec.config
        if config.dtype != "auto":
            return spec
        return dataclasses.replace(spec, config=dataclasses.replace(config, dtype=chosen[config.backbone, config.device]))

    return dataclasses.replace(grid, cells=tuple(map(resolved, grid.cells)))


def _checksum(backbone: str, grid: Grid) -> str:
    dtype = next(spec.config.dtype for spec in grid.cells if spec.config.backbone == backbone)
    return Backbone.load(backbone, dtype=dtype, device="cpu").checksum()


def _read_cells(cells: Sequence[Cell], keep_old: bool, otherwise: str) -> tuple[dict[Path, Stored], list[str]]:
    """Return the cells that are on disk, and a note on each that other code made."""
    found, notes = {}, []
    for cell in cells:
        try:
            stored = read(cell)
        except ValueError as error:
            _print_progress(f"{error}; it is {otherwise}")
            continue
        if stored is not None and stored.code != cell.code:
            which = f"{describe_cell(cell.spec)}: made by other code ({stored.code}, now {cell.code})"
            if not keep_old:
                _print_progress(f"{which}; it is {otherwise}")
                continue
            notes.append(f"{which}; kept as it is")
        if stored is not None:
            found[cell.path] = stored
    return found, notes


def _make(left: Sequence[Cell], make_cells: MakeCells) -> dict[Path, Stored]:
    made: dict[Path, Stored] = {}
    started = time.monotonic()

    def done(cell: Cell, stored: Stored) -> None:
        made[cell.path] = stored
        remaining = (time.monotonic() - started) / len(made) * (len(left) - len(made))
        _print_progress(
            f"[{len(made)}/{len(left)}] {describe_cell(cell.spec)}: {_outcome(stored)} in {stored.seconds:.0f} s"
            f"{f', about {_duration(remaining)} left' if len(made) < len(left) else ''}"
        )

    # On SIGTERM the comparison stops its processes, as on Ctrl-C.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        make_cells(left, done=done)
    except KeyboardInterrupt:
        _print_progress("stopped; the same command goes on from here")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return made


def _outcome(stored: Stored) -> str:
    if stored.result is None:
        return f"died: {stored.error}"
    if not stored.result.answers:
        return f"validation {max((point.accuracy for point in stored.result.curve), default=0.0):.1%} at best"
    scores = (f"{sum(a.reward for a in answers) / len(answers):.1%} of {len(answers)} right on {which}"
              for which, answers in stored.result.answers.items())  # fmt: skip
    return ", ".join(scores)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _print_progress(text: str) -> None:
    print(one_line(text), file=sys.stderr, flush=True)


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Lock the folder; workers inherit the lock, so that no other comparison starts while one of them still runs."""
    out.mkdir(parents=True, exist_ok=True)
    # Nonblocking: a pipe of this name must not keep the program waiting.
    with os.fdopen(os.open(out / "lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--out {out} is in use by another comparison; wait for it or name another") from error
        yield file.fileno()


def print_plan(grid: Grid) -> None:
    """Print the cells of a grid, their budgets, and what is declared as matched, without loading weights."""
    # A file or a pipe has no width.
    console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    table = RichTable(box=None, pad_edge=False)
    several = len(grid.backbones) > 1
    for name in ("method", *(["backbone"] if several else []), "trained", "cells", "trainable parameters", "training rollouts",
                 "steps"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("method", "backbone") else "right", no_wrap=True)
    for method in grid.methods:
        for backbone in grid.backbones:
            specs = [spec for spec in grid.cells if spec.method == method and spec.config.backbone == backbone]
            trained = find_method(method).trained
            table.add_row(
                method, *([backbone] if several else []), "yes" if trained else "no", str(len(specs)), _parameters(specs),
                *(_training(specs) if trained else ("0", "0")),
            )  # fmt: skip
    console.print(table)
    console.print(
        f"\n{len(grid.cells)} cells: {len(grid.methods)} methods x {len(grid.tasks)} tasks x {len(grid.seeds)} seeds"
        + (f" x {len(grid.backbones)} backbones" if several else f" on {grid.backbones[0]}")
    )
    console.print(f"tasks: {', '.join(grid.tasks)}")
    tuning = Tuning(grid, lambda spec: None)
    tuning.check_settings()
    if trials := tuning.trials():
        tried = ", ".join(f"{lr:g}" for lr in grid.tuning.lrs) if grid.tuning else ""
        console.print(f"{len(trials)} trials: every trained method on every task tries lr {tried}; validation chooses")
    for pair in grid.pairs:
        console.print(describe_pair(pair))


def describe_pair(pair: Pair) -> str:
    """Return a pair with its matched quantities as one line."""
    matched = ", ".join(QUANTITIES[name] for name in pair.matched)
    asks = f"  {pair.asks}" if pair.asks else ""
    return f"{pair.first} - {pair.second}: matched in {matched} (to within {pair.tolerance:.0%}).{asks}"


def _training(specs: Sequence[CellSpec]) -> tuple[str, str]:
    """Return training rollouts and steps as text; a budget of tokens is named itself, as its rollouts depend on the texts."""
    method = find_method(specs[0].method)
    configs = [settings_of(spec.method, spec.config) for spec in specs]
    if other := getattr(method, "tokens_of", None):
        return f"tokens of {other}", "as many"
    steps = _range([config.num_steps for config in configs])
    if tokens := [c.num_steps * c.step_tokens for c in configs if c.step_tokens]:
        return f"of {_range(tokens)} tokens", steps
    return _range([c.num_steps * c.examples_per_step * c.group_size for c in configs]), steps


def _range(counts: Sequence[int]) -> str:
    return " to ".join(format_amount(count) for count in sorted({min(counts), max(counts)}))


def _parameters(specs: Sequence[CellSpec]) -> str:
    """Return trainable parameters as text, counted from the model's config alone."""
    method = find_method(specs[0].method)
    change: Callable[[TrainConfig], TrainConfig] | None = getattr(method, "change", None)
    if not method.trained:
        return "0"
    if change is None:
        return "known when run"
    networks = {repr((c.backbone, c.topology, c.adapter)): c for c in (change(spec.config) for spec in specs)}
    counts = sorted({sizes(config, _architecture(config.backbone)).trainable for config in networks.values()})
    return " to ".join(f"{count:,} ({count / 1e6:.1f}M)" if count >= 1e6 else f"{count:,}" for count in counts)


@cache
def _architecture(backbone: str) -> PretrainedConfig:
    """Return a backbone's config; that of the paper's backbone is in the code, so that its preset needs no network."""
    return qwen3_0_6b() if backbone == PAPER_BACKBONE else config_of(backbone)


def print_result(comparison: Comparison, out: Path) -> None:
    """Print every pair's mean over the tasks, or why there is none."""
    for note in comparison.notes:
        print(one_line(note))
    for table in comparison.tables:
        for method, reason in table.missing.items():
            print(one_line(f"{format_problem(table.problem)}: {method}: {reason}"))
    for pair, found in zip(comparison.grid.pairs, comparison.overall, strict=True):
        print(f"{pair.first} - {pair.second}: {format_difference(found)}")
    print(f"report: {out / 'report.html'} and {out / 'report.md'}")
