"""What each command of the command line takes. A string under a field is its help text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from neuromas.config import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainArguments:
    """Train a network of language-model nodes on one task by joint REINFORCE.

    A TOML file may come first: neuromas train configs/chain3.toml --lr 5e-4. Flags win over the file, the file over the
    defaults. `--widths 1` is single-model reinforcement learning with as many trainable parameters.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """Go on from the last checkpoint of --run-dir, with that run's settings; starts it if there is no such folder yet."""
    allow_code: bool = False
    """Execute the Python file that the task of a run to --resume is in; a task that is named here need not be allowed."""
    dry_run: bool = False
    """Print the network, its trainable parameters and the resolved settings, and stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowArguments:
    """Grow a finished run's network and train on, in a new run; the old one stays as it is.

    Old nodes keep ids, adapters and optimizer state. Steps, questions and the ledger count on from the old run's; the learning
    rate begins anew. Settings not named here are the old run's.
    """

    run: tyro.conf.Positional[Path]
    """Folder of the run to grow."""
    to: tuple[int, ...] = ()
    """Nodes per layer afterwards, ending in 1, e.g. 2 2 1."""
    new_layers: tuple[int, ...] = ()
    """Which layers of --to are new. Empty: the last ones before the output layer that need be."""
    connect: tuple[tuple[int, int], ...] = ()
    """Edges to add, e.g. 1 3; they may name new nodes."""
    edges: tuple[tuple[int, int], ...] = ()
    """All edges afterwards, in place of --to and --connect; old nodes keep their ids."""
    start: tuple[str, ...] = ("zero",)
    """Adapters of new nodes: zero or copy:NODE for all, NEW:zero or NEW:copy:NODE for one."""
    noise: float = 0.0
    """Normal noise on copies, as a share of the copied tensor's root mean square."""
    opening: Literal["immediate", "annealed"] = "immediate"
    """`immediate`: every question runs through the grown network at once (the paper's). `annealed`: with a probability that
    rises from 0, at which the network is still its parent, to 1."""
    open_steps: int = 10
    """Steps over which an annealed opening rises."""
    warmup_new: int = 0
    """Steps in which new nodes alone learn."""
    steps: int | None = None
    """Steps to train on. None: as many as the old run had."""
    lr: float | None = None
    """Peak learning rate. None: the old run's."""
    step_tokens: int | None = None
    """Sampled tokens of a step, see `neuromas train`. None: as the old run."""
    run_dir: Path | None = None
    """Folder of the new run. None: RUN-to-WIDTHS."""
    task: str | None = None
    """Checked only: a network grows on the task that it has."""
    backbone: str | None = None
    """Checked only: a network grows on the backbone that it has."""
    allow_code: bool = False
    """Execute the Python file that the run's task is in (class:FILE.py:CLASS)."""
    dry_run: bool = False
    """Print what would be kept and what new, the grown network and all settings, and stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalArguments:
    """Score a trained run: accuracy with n, 95% interval, floor, parse rate and cost of an answer."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    file: Annotated[Path | None, tyro.conf.arg(aliases=["--task.file"])] = None
    """Score on this file: BIG-Bench-Hard JSON, or JSONL with `question` and `answer`. None: the task's own problems."""
    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """Read the benchmark's items from here. None: from where the run had them."""
    split: Literal["test", "validation", "train", "dev", "first200"] = "test"
    """Which of its problems."""
    size: int = 500
    """How many of them, at most."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Seed of the draws where the temperature is above 0."""
    untrained: bool = False
    """Score the network as it was before training."""
    allow_code: bool = False
    """Execute the Python file that the run's task is in (class:FILE.py:CLASS)."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskArguments:
    """Put one question to a trained run and print every message on its edge, then the answer."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    question: tyro.conf.Positional[str]
    """The question; `-` reads it from standard input."""
    allow_code: bool = False
    """Execute the Python file that the run's task is in (class:FILE.py:CLASS)."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowArguments:
    """Draw a network, who writes to whom, and what it costs."""

    what: tyro.conf.Positional[Path]
    """Folder of a run, or a TOML config."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksArguments:
    """List every task: items of each split, floor (score of the best constant answer), verifier. Fetches nothing.

    `neuromas tasks show NAME` prints an example as each node would read it.
    """

    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """Folder of benchmark files: count them, and leave out the benchmarks that it does not hold. None: counts stay open."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksShowArguments:
    """Print an example of a task as each node of a chain of three would read it."""

    name: tyro.conf.Positional[str]
    """Name of the task, as --task has it."""
    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """File or folder of a benchmark's items. None: from the Hugging Face hub."""
    split: Annotated[Literal["test", "validation", "train", "dev", "first200"], tyro.conf.arg(aliases=["--task.split"])] = (
        "test"
    )
    """Which split's first example; another one where the data has no such split."""
    difficulty: Annotated[int | None, tyro.conf.arg(aliases=["--task.difficulty"])] = None
    """How hard generated problems are, in the task's own unit."""
    verifier: Annotated[
        Literal["exact", "choice", "number", "regex", "math", "python"], tyro.conf.arg(aliases=["--task.verifier"])
    ] = "exact"
    """How the answers of a task jsonl:PATH are checked."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareArguments:
    """Run a comparison, methods x tasks x seeds, and write its report. What is there already is not run again."""

    grid: tyro.conf.Positional[Path]
    """TOML file that names methods, tasks, seeds and pairs."""
    quick: bool = False
    """Take the file's [quick] table: smaller, in minutes."""
    jobs: int = 1
    """Cells that run at a time, in processes that share the cores."""
    out: Path | None = None
    """Folder of cells and report. None: runs/compare-NAME."""
    dry_run: bool = False
    """Print cells, budgets and what is matched, and stop."""
    report_only: bool = False
    """Write the report of the cells that are there; run nothing."""
    keep_old: bool = False
    """Take cells that other code made as they are; they are named in the report."""
    tasks: tuple[str, ...] = ()
    """Tasks in place of the file's."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of the file's."""
    backbone: tuple[str, ...] = ()
    """Backbones in place of the file's."""
    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """Folder of benchmark files. None: as the file says."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to run. None: as the file says."""
