"""The records of a comparison's results, and their JSON form, from which the report is made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from neuromas.compare import statistics
from neuromas.compare.grid import Grid, find_method
from neuromas.compare.tuning import Trial

Problem = tuple[str, str, str]
"""Backbone, task, set of examples."""

Trials = Mapping[tuple[str, str, str], Sequence[Trial]]
"""Trials by method, backbone and task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunScore:
    """Accuracy of one run, with Wilson's interval."""

    seed: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One method on one problem, over its seeds."""

    method: str
    title: str
    trained: bool
    n: int
    """Number of questions."""
    distinct: int
    """Number of different questions."""
    accuracy: float
    low: float
    """Lower end of the 95% interval over questions and runs; over questions alone where there is one run."""
    high: float
    runs: list[RunScore]
    floor: float | None
    """Accuracy of the best constant answer on these questions; None where no two questions have the same answer."""
    floor_answer: str | None
    parse_rate: float
    answers: dict[str, int]
    """How often each answer was given in all runs, the most frequent first."""
    amounts: dict[str, float]
    """Mean over runs of each of QUANTITIES."""
    best_steps: list[int] = field(default_factory=list)
    """Training steps done by each run's best validation; empty where nothing was validated."""
    curve: list[dict[str, int | float]] = field(default_factory=list)
    """Points `seed`, `step`, `sampled_tokens`, `accuracy` of the validation curves."""
    iterations: list[dict[str, Any]] = field(default_factory=list)
    """With `seed`, what each society was measured to be in the course of its finetuning."""
    growths: list[int] = field(default_factory=list)
    """Training steps done before each growth of the network."""
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The difference of a pair, first minus second, on one problem; the numbers are None where `refused` holds the reason."""

    refused: str | None = None
    mean: float | None = None
    low: float | None = None
    """95% interval over questions and runs, or over questions alone where there is one run."""
    high: float | None = None
    p: float | None = None
    """Over questions and runs, or over questions alone where there is one run."""
    p_holm: float | None = None
    """The same, adjusted for all differences of the table."""
    detectable: float | None = None
    """True difference that this comparison finds about four times in five."""
    low_these_runs: float | None = None
    """95% bootstrap interval over questions, for exactly these runs."""
    high_these_runs: float | None = None
    p_these_runs: float | None = None
    """Permutation test over questions, for exactly these runs."""
    runs: list[dict[str, int | float]] = field(default_factory=list)
    """For each seed: its difference, the numbers of questions that only one got right, McNemar's exact p."""
    unmatched: list[str] = field(default_factory=list)
    """Descriptions of the quantities that differ and are not declared as matched."""
    uninformative: str | None = None
    """Why the difference is uninformative: no method is clear of the floor, or both are at the ceiling; for a mean, where."""


@dataclass(frozen=True, slots=True)
class Table:
    """All scores and differences on one problem."""

    problem: Problem
    scores: dict[str, Score]
    missing: dict[str, str]
    """By method: why there is no score, or why seeds are missing."""
    differences: list[Difference]
    """In the order of the grid's pairs."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All results of a comparison."""

    grid: Grid
    tables: list[Table]
    overall: list[Difference]
    """By pair: the mean over all problems."""
    notes: list[str]
    trials: Trials
    last: "Comparison | None" = None
    """The same for the last adapters of training; this one is for those of the best validation."""


def format_problem(problem: Problem) -> str:
    """Return the name of a problem: its task, and its set and backbone where they are not the default."""
    backbone, task, which = problem
    return task + (f", {which}" if which != "test" else "") + (f", {backbone}" if backbone != "bundled" else "")


def format_difference(found: Difference) -> str:
    """Return a difference as one line."""
    if found.refused is not None or found.mean is None or found.low is None or found.high is None:
        return f"not compared: {found.refused}"
    unmatched = f"; not matched: {'; '.join(found.unmatched)}" if found.unmatched else ""
    known = statistics.varies(found.low, found.high)
    interval = f"95% interval {100 * found.low:+.1f} to {100 * found.high:+.1f}" if known else statistics.NO_INTERVAL
    uninformative = f"; UNINFORMATIVE {found.uninformative}" if found.uninformative else ""
    return f"{100 * found.mean:+.1f} points ({interval}, p {found.p:.2g}){uninformative}{unmatched}"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return all data of the report, JSON-ready."""
    grid = comparison.grid
    return {
        "name": grid.name,
        "methods": list(grid.methods), "tasks": list(grid.tasks), "backbones": list(grid.backbones), "seeds": list(grid.seeds),
        "titles": {
            name: {"title": method.title, "source": method.source, "trained": method.trained}
            for name, method in ((name, find_method(name)) for name in grid.methods)
        },
        "notes": comparison.notes,
        "pairs": [asdict(pair) for pair in grid.pairs],
        **_tables_json(comparison),
        "last": _tables_json(comparison.last) if comparison.last else None,
        "trials": [
            {"method": method, "backbone": backbone, "task": task, "trials": [asdict(trial) for trial in trials]}
            for (method, backbone, task), trials in comparison.trials.items() if trials
        ],
    }  # fmt: skip


def _tables_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "overall": [asdict(found) for found in comparison.overall],
        "problems": [
            {
                "name": format_problem(t.problem), "backbone": t.problem[0], "task": t.problem[1], "set": t.problem[2],
                "scores": {name: asdict(score) for name, score in t.scores.items()},
                "missing": t.missing,
                "differences": [asdict(found) for found in t.differences],
            }
            for t in comparison.tables
        ],
    }  # fmt: skip
